//! Several coordinators and workers of one cluster, each a real process that can be killed, frozen and
//! started again where it was.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, kill_process};
use serde_json::Value;
use shoal_protocol::admin::{AdminCall, ClusterView};
use shoal_protocol::id::{NodeId, Role};
use tempfile::TempDir;

pub use rustix::process::Signal;

use crate::admin::{ADMIN_TIMEOUT, Admin};
use crate::cluster::shoal_binary;
use crate::news::News;

/// A cluster of processes. All are killed when it is dropped.
#[derive(Debug)]
pub struct Processes {
    folder: TempDir,
    coordinators: Vec<Node>,
    workers: Vec<Node>,
    /// What they say.
    pub news: Arc<News>,
}

/// What to start.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// More flags of each coordinator. All of them vote.
    pub coordinators: Vec<Vec<&'static str>>,
    /// More environment of each worker.
    pub workers: Vec<Vec<(&'static str, &'static str)>>,
    /// Workers that compute, behind those.
    pub hosts: Vec<Host>,
    /// Where coordinators take the cluster's conversations; `None`: on loopback.
    pub address: Option<String>,
}

/// What a worker runs on.
#[derive(Clone, Debug)]
pub struct Host {
    /// What is put before its command, such as `ip netns exec x`.
    pub prefix: Vec<String>,
    /// Its budget.
    pub memory: String,
    /// Its compute threads.
    pub threads: usize,
    /// The processor that these are bound to, as `--cpus` takes it.
    pub cpus: Option<String>,
}

impl Default for Host {
    fn default() -> Self {
        Self { prefix: Vec::new(), memory: "4GiB".to_owned(), threads: 1, cpus: None }
    }
}

impl Host {
    /// One whose compute thread is bound to a processor.
    pub fn computing_on(processor: usize) -> Self {
        Self { cpus: Some(processor.to_string()), ..Self::default() }
    }

    /// One of which all threads are bound to a processor: workers push each other aside no more than machines of their own do.
    pub fn on(processor: usize) -> Self {
        let prefix = ["taskset", "-c", &processor.to_string()].map(str::to_owned).to_vec();
        Self { prefix, ..Self::default() }
    }
}

#[derive(Debug)]
struct Node {
    name: String,
    child: Option<Child>,
    data: PathBuf,
    flags: Vec<&'static str>,
    environment: Vec<(&'static str, &'static str)>,
    host: Host,
    /// A coordinator's addresses, which stay over restarts.
    api: String,
    cluster: String,
}

impl Node {
    fn new(folder: &Path, name: String) -> Self {
        let (api, data) = ("127.0.0.1:0".to_owned(), folder.join(&name));
        let (flags, environment) = (Vec::new(), Vec::new());
        let host = Host { memory: "256MiB".to_owned(), ..Host::default() };
        Self { name, child: None, data, flags, environment, host, api, cluster: String::new() }
    }

    /// Starts it, with its standard flags behind these, and waits for its announcement.
    fn start(&mut self, news: &Arc<News>, args: &[&str], token: Option<&str>) -> Result<Value> {
        let mut command = match self.host.prefix.split_first() {
            Some((program, rest)) => {
                let mut command = Command::new(program);
                command.args(rest).arg(shoal_binary()?);
                command
            }
            None => Command::new(shoal_binary()?),
        };
        command.args(args).arg("--data").arg(&self.data).arg("--announce").args(&self.flags);
        command.env_remove("SHOAL_CONTEXT").env_remove("SHOAL_TOKEN").env_remove("SHOAL_LOG");
        command.envs(self.environment.iter().copied());
        command.envs(token.map(|token| ("SHOAL_TOKEN", token)));
        // What the machine was measured to do is known there for ten minutes: each cluster measures anew.
        command.env("TMPDIR", self.data.parent().unwrap_or(&self.data));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {}", self.name))?;
        news.listen(self.name.clone(), child.stderr.take().context("stderr is piped")?);
        let stdout = child.stdout.take().context("stdout is piped")?;
        self.child = Some(child);
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line);
            let _ = sender.send(read.map(|_| line));
        });
        let line = receiver.recv_timeout(ADMIN_TIMEOUT);
        let line = line.with_context(|| format!("{} does not announce itself", self.name))??;
        let said: Value = serde_json::from_str(&line)
            .with_context(|| format!("{} announced itself with `{line}`", self.name))?;
        match said["message"].as_str() {
            Some(why) => bail!("{}: {why}", self.name),
            None => Ok(said),
        }
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Processes {
    /// Starts them and waits until all workers are connected to all coordinators.
    pub fn start(plan: &Plan) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let news = Arc::new(News::default());
        let mut all = Self { folder, coordinators: Vec::new(), workers: Vec::new(), news };
        let count = plan.coordinators.len();
        let mut token = None;
        for (index, flags) in plan.coordinators.iter().enumerate() {
            let mut node = Node::new(all.folder.path(), format!("c{}", index + 1));
            // A port that is free now; it stays this coordinator's over restarts.
            let address = plan.address.as_deref().unwrap_or("127.0.0.1");
            node.cluster = UdpSocket::bind((address, 0))?.local_addr()?.to_string();
            node.flags.clone_from(flags);
            all.coordinators.push(node);
            all.start_coordinator(index, token.as_deref())?;
            if index == 0 && count > 1 {
                token = Some(all.admin(0)?.token(Role::Coordinator, count - 1)?);
            }
        }
        if count > 1 {
            let add = (2..=u32::try_from(count)?).map(NodeId::coordinator).collect();
            all.admin(0)?.call(AdminCall::ChangeVoters { add, remove: Vec::new() })?;
        }
        let workers = plan.workers.len() + plan.hosts.len();
        let token = all.admin(0)?.token(Role::Worker, workers)?;
        for index in 0..workers {
            let mut node = Node::new(all.folder.path(), format!("w{}", index + 1));
            if let Some(environment) = plan.workers.get(index) {
                node.environment.clone_from(environment);
            }
            if let Some(host) = plan.hosts.get(index.wrapping_sub(plan.workers.len())) {
                node.host.clone_from(host);
            }
            all.workers.push(node);
            all.start_worker(index, Some(&token))?;
        }
        for index in 0..count {
            all.wait_for_workers(index)?;
        }
        Ok(all)
    }

    fn start_coordinator(&mut self, index: usize, token: Option<&str>) -> Result<()> {
        let seed = self.coordinators[0].cluster.clone();
        let node = &mut self.coordinators[index];
        let (api, cluster) = (node.api.clone(), node.cluster.clone());
        let mut args = vec!["coordinator", "--listen", &api, "--cluster", &cluster];
        if token.is_some() {
            args.extend(["--join", &seed]);
        }
        let said = node.start(&self.news, &args, token)?;
        said["api"].as_str().context("no API address")?.clone_into(&mut node.api);
        Ok(())
    }

    fn start_worker(&mut self, index: usize, token: Option<&str>) -> Result<()> {
        let join: Vec<_> = self.coordinators.iter().map(|c| c.cluster.as_str()).collect();
        let join = join.join(",");
        let node = &mut self.workers[index];
        let Host { memory, threads, cpus, .. } = node.host.clone();
        let threads = threads.to_string();
        let mut args = vec!["worker", "--join", &join, "--memory", &memory, "--threads", &threads];
        if let Some(cpus) = &cpus {
            args.extend(["--cpus", cpus]);
        }
        node.start(&self.news, &args, token).map(drop)
    }

    /// The processes of the workers, in their order.
    pub fn worker_pids(&self) -> Vec<u32> {
        self.workers.iter().filter_map(|worker| Some(worker.child.as_ref()?.id())).collect()
    }

    /// Waits until all workers are connected to a coordinator.
    pub fn wait_for_workers(&self, coordinator: usize) -> Result<ClusterView> {
        let count = self.workers.len();
        self.admin(coordinator)?.wait_until("connected to all workers", |view| {
            view.workers.iter().filter(|worker| worker.connected).count() == count
        })
    }

    /// Where a coordinator takes the public API.
    pub fn url(&self, coordinator: usize) -> String {
        format!("http://{}", self.coordinators[coordinator].api)
    }

    /// Where a coordinator takes the cluster's conversations.
    pub fn cluster_address(&self, coordinator: usize) -> &str {
        &self.coordinators[coordinator].cluster
    }

    /// An operator at a coordinator. One that has just joined gets its certificate a little later.
    pub fn admin(&self, coordinator: usize) -> Result<Admin> {
        let context = self.coordinators[coordinator].data.join("admin.context");
        let until = Instant::now() + ADMIN_TIMEOUT;
        while !context.exists() && Instant::now() < until {
            pass(Duration::from_millis(5));
        }
        Admin::open(&context)
    }

    /// The coordinator that leads, as another sees it.
    pub fn leader(&self, seen_by: usize) -> Result<usize> {
        let leads = |view: &ClusterView| {
            let leader = view.coordinators.iter().find(|peer| peer.leads)?;
            let index = leader.id.number as usize - 1;
            self.coordinators.get(index)?.child.as_ref().map(|_| index)
        };
        let admin = self.admin(seen_by)?;
        let view = admin.wait_until("led", |view| leads(view).is_some())?;
        leads(&view).context("somebody leads")
    }

    /// kill -9 of a coordinator.
    pub fn kill_coordinator(&mut self, index: usize) {
        self.coordinators[index].kill();
    }

    /// Starts one again that was killed.
    pub fn restart_coordinator(&mut self, index: usize) -> Result<()> {
        self.start_coordinator(index, None)
    }

    /// Signals a worker.
    pub fn signal_worker(&self, index: usize, signal: Signal) -> Result<()> {
        let child = self.workers[index].child.as_ref().context("the worker does not run")?;
        let pid = Pid::from_raw(i32::try_from(child.id())?).context("a process has a number")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Starts a worker again that was killed.
    pub fn restart_worker(&mut self, index: usize) -> Result<()> {
        self.workers[index].kill();
        self.start_worker(index, None)
    }

    /// Seconds that a coordinator's process has computed so far, over all of its threads.
    pub fn coordinator_seconds(&self, index: usize) -> Result<f64> {
        let child = self.coordinators[index].child.as_ref().context("it does not run")?;
        cpu_seconds(child.id())
    }
}

/// Seconds that a process has computed, user and system, threads that have ended included.
fn cpu_seconds(pid: u32) -> Result<f64> {
    /// Of `/proc/<pid>/stat`: USER_HZ, which is 100 on every Linux.
    const TICKS: f64 = 100.0;
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind the name, which may hold anything.
    let (_, fields) = text.rsplit_once(')').context("no name in stat")?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut next = || anyhow::Ok(fields.next().context("a short stat")?.parse::<f64>()?);
    Ok((next()? + next()?) / TICKS)
}

/// Lets time pass where its passing is what is measured.
pub fn pass(time: Duration) {
    let (_sender, never) = std::sync::mpsc::sync_channel::<()>(0);
    let _ = never.recv_timeout(time);
}
