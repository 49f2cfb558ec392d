//! Several coordinators and workers of one cluster, each a real process, with ports that stay the same
//! over restarts.

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use shoal_protocol::admin::{AdminCall, AdminReply, Vote};
use shoal_protocol::id::{NodeId, Role};
use tempfile::TempDir;

use super::disk::Disk;
use super::relay::{Network, address_of};
use super::{Admin, Finished, Process, Signal};

/// How long a process may take to start on a machine that is busy.
pub const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Coordinators and workers have these addresses and the following ones, where a network stands
/// between: `relay::address_of`.
const COORDINATORS_AT: u8 = 10;
const WORKERS_AT: u8 = 100;

/// How long one may take to end: its streams finish first.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// A cluster of processes.
#[derive(Debug)]
pub struct Cluster {
    /// What is started from now on.
    binary: PathBuf,
    coordinators: Vec<Coordinator>,
    workers: Vec<Worker>,
    /// What stands between them, where it can be cut.
    network: Option<Network>,
    options: Options,
    /// What all of them have said so far, by whom.
    said: Vec<(String, String)>,
    /// Last: what is mounted in it goes before it.
    folder: TempDir,
}

/// What can be done to a cluster beside signals.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// A network in userspace stands between the processes.
    pub relayed: bool,
    /// Each data folder is a disk of its own.
    pub disks: bool,
}

#[derive(Debug)]
struct Coordinator {
    process: Option<Process>,
    data: PathBuf,
    api: String,
    /// Where it listens.
    cluster: String,
    /// Where others reach that.
    reached: String,
    disk: Option<Disk>,
}

#[derive(Debug)]
struct Worker {
    process: Option<Process>,
    data: PathBuf,
    /// Flags and addresses, the same over restarts.
    addresses: Vec<String>,
    disk: Option<Disk>,
}

impl Cluster {
    /// So many coordinators, all of which vote, and so many workers, all of which are connected to each.
    pub fn start(coordinators: usize, workers: usize) -> Result<Self> {
        Self::begin(super::shoal(), Options::default(), coordinators, workers)
    }

    /// The same with another build.
    pub fn start_with(binary: &Path, coordinators: usize, workers: usize) -> Result<Self> {
        Self::begin(binary, Options::default(), coordinators, workers)
    }

    /// The same, with more that can be done to it.
    pub fn start_for(options: Options, coordinators: usize, workers: usize) -> Result<Self> {
        Self::begin(super::shoal(), options, coordinators, workers)
    }

    fn begin(binary: &Path, options: Options, coordinators: usize, workers: usize) -> Result<Self> {
        let network = options.relayed.then(Network::new).transpose()?;
        let mut cluster = Self {
            binary: binary.to_owned(),
            coordinators: Vec::new(),
            workers: Vec::new(),
            network,
            options,
            said: Vec::new(),
            folder: tempfile::tempdir()?,
        };
        cluster.add_coordinator(None)?;
        if coordinators > 1 {
            let token = cluster.token(Role::Coordinator, coordinators - 1)?;
            for _ in 1..coordinators {
                cluster.add_coordinator(Some(&token))?;
            }
            let others = 2..=u32::try_from(coordinators)?;
            let add = others.map(NodeId::coordinator).collect();
            cluster.admin(0)?.call(AdminCall::ChangeVoters { add, remove: Vec::new() })?;
        }
        if workers > 0 {
            let token = cluster.token(Role::Worker, workers)?;
            for _ in 0..workers {
                cluster.add_worker(&token)?;
            }
        }
        for index in 0..coordinators {
            let connected = move |view: &shoal_protocol::admin::ClusterView| {
                view.workers.iter().filter(|worker| worker.connected).count() == workers
            };
            cluster.admin(index)?.wait_until("all connected", START_TIMEOUT, connected)?;
        }
        Ok(cluster)
    }

    /// Starts another build from now on.
    pub fn use_binary(&mut self, binary: &Path) {
        self.binary = binary.to_owned();
    }

    /// Another coordinator, which joins and does not vote yet; its index.
    pub fn join_coordinator(&mut self, seen_by: usize) -> Result<usize> {
        let token = self.token_from(seen_by, Role::Coordinator, 1)?;
        self.add_coordinator(Some(&token))?;
        Ok(self.coordinators.len() - 1)
    }

    fn token(&self, role: Role, uses: usize) -> Result<String> {
        self.token_from(0, role, uses)
    }

    /// A join token that a coordinator has made.
    pub fn token_from(&self, index: usize, role: Role, uses: usize) -> Result<String> {
        let call = AdminCall::CreateToken { role, uses: u32::try_from(uses)?, expires_s: 600 };
        match self.admin(index)?.call(call)? {
            AdminReply::Token { token } => Ok(token),
            other => bail!("{other:?} where a token was expected"),
        }
    }

    /// Where others reach an address: where a network stands between, at a front of it.
    fn reached(&self, address: SocketAddr) -> Result<SocketAddr> {
        self.network.as_ref().map_or(Ok(address), |network| network.front(address))
    }

    fn disk(&self, folder: &Path) -> Result<Option<Disk>> {
        self.options.disks.then(|| Disk::under(folder)).transpose()
    }

    /// A port that is free now, of a node's own address where a network stands between.
    fn free_port(&self, number: u8) -> Result<SocketAddr> {
        let ip = match self.network {
            Some(_) => address_of(number),
            None => std::net::Ipv4Addr::LOCALHOST.into(),
        };
        Ok(UdpSocket::bind(SocketAddr::new(ip, 0))?.local_addr()?)
    }

    fn add_coordinator(&mut self, token: Option<&str>) -> Result<()> {
        let index = self.coordinators.len();
        let data = self.folder.path().join(format!("c{}", index + 1));
        // It stays this coordinator's over restarts.
        let cluster = self.free_port(COORDINATORS_AT + index as u8)?;
        let reached = self.reached(cluster)?.to_string();
        let disk = self.disk(&data)?;
        let (process, cluster) = (None, cluster.to_string());
        let api = "127.0.0.1:0".to_owned();
        self.coordinators.push(Coordinator { process, data, api, cluster, reached, disk });
        self.start_coordinator(index, token)
    }

    fn start_coordinator(&mut self, index: usize, token: Option<&str>) -> Result<()> {
        let limited = self.options.disks;
        // The first ones that are there: who founded the cluster may be gone.
        let runs = |other: &&Coordinator| other.process.is_some();
        let seeds: Vec<_> =
            self.coordinators.iter().filter(runs).map(|c| c.reached.clone()).collect();
        let seeds = seeds.join(",");
        let coordinator = &mut self.coordinators[index];
        let data = coordinator.data.to_string_lossy().into_owned();
        let mut args =
            vec!["coordinator", "--data", &data, "--listen", &coordinator.api, "--announce"];
        args.extend(["--cluster", &coordinator.cluster]);
        if coordinator.reached != coordinator.cluster {
            args.extend(["--advertise", &coordinator.reached]);
        }
        if let Some(token) = token {
            args.extend(["--join", &seeds, "--token", token]);
        }
        let mut process = spawn(&self.binary, &args, limited)?;
        let line: serde_json::Value = serde_json::from_str(&process.line(START_TIMEOUT)?)?;
        coordinator.api = line["api"].as_str().context("an address")?.to_owned();
        coordinator.process = Some(process);
        Ok(())
    }

    fn add_worker(&mut self, token: &str) -> Result<()> {
        let index = self.workers.len();
        let data = self.folder.path().join(format!("w{}", index + 1));
        let mut addresses = Vec::new();
        // An older build has no such flags, and nothing is done to its ports.
        let named = self.options.relayed || self.options.disks;
        for name in ["requests", "activations"].into_iter().filter(|_| named) {
            let address = self.free_port(WORKERS_AT + index as u8)?;
            addresses.extend([format!("--{name}"), address.to_string()]);
            if self.network.is_some() {
                let reached = self.reached(address)?;
                addresses.extend([format!("--advertise-{name}"), reached.to_string()]);
            }
        }
        let disk = self.disk(&data)?;
        self.workers.push(Worker { process: None, data, addresses, disk });
        self.start_worker(index, Some(token))
    }

    fn start_worker(&mut self, index: usize, token: Option<&str>) -> Result<()> {
        let limited = self.options.disks;
        let join: Vec<_> = self.coordinators.iter().map(|c| c.reached.as_str()).collect();
        let (join, worker) = (join.join(","), &mut self.workers[index]);
        let data = worker.data.to_string_lossy().into_owned();
        let mut args = vec!["worker", "--join", &join, "--data", &data, "--announce"];
        args.extend(["--memory", "256MiB", "--threads", "1"]);
        args.extend(worker.addresses.iter().map(String::as_str));
        args.extend(token.into_iter().flat_map(|token| ["--token", token]));
        let mut process = spawn(&self.binary, &args, limited)?;
        process.line(START_TIMEOUT)?;
        worker.process = Some(process);
        Ok(())
    }

    /// The network between the processes, where one stands there.
    pub fn network(&self) -> Result<&Network> {
        self.network.as_ref().context("this cluster was started without a network of its own")
    }

    /// A coordinator's address in that network.
    pub fn coordinator_ip(index: usize) -> std::net::IpAddr {
        address_of(COORDINATORS_AT + index as u8)
    }

    /// A worker's address in that network.
    pub fn worker_ip(index: usize) -> std::net::IpAddr {
        address_of(WORKERS_AT + index as u8)
    }

    /// A coordinator's disk and its process, where it runs.
    pub fn coordinator_disk(&self, index: usize) -> Result<(&Disk, Option<u32>)> {
        let Coordinator { disk, process, .. } = &self.coordinators[index];
        Ok((disk.as_ref().context("no disk of its own")?, process.as_ref().map(Process::pid)))
    }

    /// A worker's disk and its process, where it runs.
    pub fn worker_disk(&self, index: usize) -> Result<(&Disk, Option<u32>)> {
        let Worker { disk, process, .. } = &self.workers[index];
        Ok((disk.as_ref().context("no disk of its own")?, process.as_ref().map(Process::pid)))
    }

    /// A worker's process, where it runs.
    pub fn worker_pid(&self, index: usize) -> Option<u32> {
        self.workers[index].process.as_ref().map(Process::pid)
    }

    /// A coordinator's process, where it runs.
    pub fn coordinator_pid(&self, index: usize) -> Option<u32> {
        self.coordinators[index].process.as_ref().map(Process::pid)
    }

    /// Where a worker takes requests.
    pub fn requests_address(&self, index: usize) -> Option<SocketAddr> {
        let flags = &self.workers[index].addresses;
        flags.get(flags.iter().position(|flag| flag == "--requests")? + 1)?.parse().ok()
    }

    /// What all processes have said on stderr so far, and by whom: also those that have ended.
    pub fn said(&mut self) -> &[(String, String)] {
        let named = |letter: char, index: usize| format!("{letter}{}", index + 1);
        for (index, coordinator) in self.coordinators.iter_mut().enumerate() {
            keep(&mut self.said, named('c', index), &mut coordinator.process);
        }
        for (index, worker) in self.workers.iter_mut().enumerate() {
            keep(&mut self.said, named('w', index), &mut worker.process);
        }
        &self.said
    }

    /// Where a coordinator takes the public API.
    pub fn api(&self, index: usize) -> String {
        format!("http://{}", self.coordinators[index].api)
    }

    /// An operator at a coordinator; it has a context as soon as it holds the CA's key.
    pub fn admin(&self, index: usize) -> Result<Admin> {
        Admin::open(&self.context(index))
    }

    /// A coordinator's context file.
    pub fn context(&self, index: usize) -> PathBuf {
        self.coordinators[index].data.join("admin.context")
    }

    /// A coordinator's data folder.
    pub fn coordinator_data(&self, index: usize) -> &Path {
        &self.coordinators[index].data
    }

    /// The coordinator that leads, as another one sees it; waits until one does that runs.
    pub fn leader(&self, seen_by: usize) -> Result<usize> {
        let leads = |view: &shoal_protocol::admin::ClusterView| {
            let leader = view.coordinators.iter().find(|peer| peer.leads)?;
            let index = leader.id.number as usize - 1;
            self.coordinators[index].process.as_ref().map(|_| index)
        };
        let admin = self.admin(seen_by)?;
        let view = admin.wait_until("led", START_TIMEOUT, |view| leads(view).is_some())?;
        leads(&view).context("somebody leads")
    }

    /// Waits until so many coordinators vote, in the eyes of one.
    pub fn wait_for_voters(&self, seen_by: usize, count: usize) -> Result<()> {
        let votes = |view: &shoal_protocol::admin::ClusterView| {
            view.coordinators.iter().filter(|peer| peer.vote == Vote::Voter).count() == count
        };
        self.admin(seen_by)?.wait_until("so many vote", START_TIMEOUT, votes).map(drop)
    }

    /// Signals a coordinator. One that is killed is gone when this returns.
    pub fn signal_coordinator(&mut self, index: usize, signal: Signal) -> Result<()> {
        self.said();
        signal_to(&mut self.coordinators[index].process, signal)
    }

    /// Signals a worker. One that is killed is gone when this returns.
    pub fn signal_worker(&mut self, index: usize, signal: Signal) -> Result<()> {
        self.said();
        signal_to(&mut self.workers[index].process, signal)
    }

    /// Starts a coordinator again that has ended.
    pub fn restart_coordinator(&mut self, index: usize) -> Result<()> {
        self.said();
        drop(self.coordinators[index].process.take());
        self.start_coordinator(index, None)
    }

    /// Waits for the end of a coordinator that ends by itself.
    pub fn finish_coordinator(&mut self, index: usize) -> Result<Finished> {
        let process = self.coordinators[index].process.take().context("it does not run")?;
        process.finish(START_TIMEOUT)
    }

    /// Starts a worker again that has ended.
    pub fn restart_worker(&mut self, index: usize) -> Result<()> {
        self.said();
        drop(self.workers[index].process.take());
        self.start_worker(index, None)
    }

    /// Ends a coordinator with SIGTERM, which lets its streams finish; returns when it has.
    pub fn stop_coordinator(&mut self, index: usize) -> Result<()> {
        self.said();
        stop(&mut self.coordinators[index].process)
    }

    /// The same for a worker.
    pub fn stop_worker(&mut self, index: usize) -> Result<()> {
        self.said();
        stop(&mut self.workers[index].process)
    }

    /// A worker's data folder.
    pub fn worker_data(&self, index: usize) -> &Path {
        &self.workers[index].data
    }

    /// Where a coordinator takes the cluster's conversations.
    pub fn cluster_address(&self, index: usize) -> &str {
        &self.coordinators[index].cluster
    }

    /// Whether a worker's process is there.
    pub fn worker_runs(&self, index: usize) -> bool {
        self.workers[index].process.is_some()
    }
}

/// Starts `shoal`. `limited`: its writes may be made to fail, and that must not kill it.
fn spawn(binary: &Path, args: &[&str], limited: bool) -> Result<Process> {
    if !limited {
        return Process::shoal_at(binary, args);
    }
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""]).arg(binary).args(args);
    command.env_remove("SHOAL_CONTEXT").env_remove("SHOAL_TOKEN");
    Process::spawn(command)
}

fn keep(said: &mut Vec<(String, String)>, who: String, process: &mut Option<Process>) {
    let lines = process.iter_mut().flat_map(Process::news);
    said.extend(lines.map(|line| (who.clone(), line)));
}

fn stop(process: &mut Option<Process>) -> Result<()> {
    let running = process.take().context("it does not run")?;
    running.signal(Signal::TERM)?;
    let finished = running.finish(STOP_TIMEOUT)?;
    match finished.code() {
        Some(0) => Ok(()),
        _ => bail!("it did not end well: {finished:?}"),
    }
}

fn signal_to(process: &mut Option<Process>, signal: Signal) -> Result<()> {
    let running = process.as_ref().context("it does not run")?;
    running.signal(signal)?;
    if signal == Signal::KILL {
        // Dropping it waits for its end.
        drop(process.take());
    }
    Ok(())
}
