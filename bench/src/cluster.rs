//! A real cluster of real processes, and a client of its public API.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use shoal_protocol::plan::PretendSpec;

use crate::admin::Admin;

/// How long a cluster may take to be ready: a model of a few GiB from a cold disk.
const READY_TIMEOUT: Duration = Duration::from_secs(180);

/// How long one answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a cluster may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// A running `shoal up`. Stopped when dropped.
#[derive(Debug)]
pub struct Cluster {
    /// Taken when it is stopped.
    child: Option<Child>,
    /// The one line that `shoal up --json` printed.
    pub ready: Value,
    /// What the API is called: `http://127.0.0.1:4000`.
    pub url: String,
    /// From the start of the process to the ready line.
    pub ready_after: Duration,
    model: String,
    agent: ureq::Agent,
}

/// How to start a cluster.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The model's folder; `None`: the built-in one.
    pub model: Option<PathBuf>,
    /// Worker processes.
    pub workers: usize,
    /// Compute threads of each.
    pub threads: usize,
    /// Further flags.
    pub flags: Vec<String>,
}

/// The `shoal` binary beside this one.
pub fn shoal_binary() -> Result<PathBuf> {
    let beside = std::env::current_exe()?.with_file_name("shoal");
    if !beside.exists() {
        bail!("{} is missing; build it with `cargo build --release -p shoal`", beside.display());
    }
    Ok(beside)
}

impl Cluster {
    /// Starts a cluster and waits until it is ready.
    pub fn start(options: &Options) -> Result<Self> {
        let start = Instant::now();
        let mut command = Command::new(shoal_binary()?);
        command.arg("up");
        if let Some(model) = &options.model {
            command.arg(model);
        }
        command.args([
            "--listen",
            "127.0.0.1:0",
            "--json",
            "--workers",
            &options.workers.to_string(),
        ]);
        command.args(["--worker-threads", &options.threads.to_string()]).args(&options.flags);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("shoal up")?;
        let stdout = child.stdout.take().context("no stdout")?;
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = BufReader::new(stdout).read_line(&mut line);
            let _ = sender.send(read.map(|_| line));
        });
        let line = match receiver.recv_timeout(READY_TIMEOUT) {
            Ok(Ok(line)) if !line.is_empty() => line,
            other => {
                let _ = child.kill();
                let _ = child.wait();
                bail!("shoal up did not become ready: {other:?}");
            }
        };
        let ready_after = start.elapsed();
        let ready: Value =
            serde_json::from_str(&line).with_context(|| format!("not a ready line: {line}"))?;
        let text = |key: &str| {
            ready[key]
                .as_str()
                .map(str::to_owned)
                .ok_or_else(|| anyhow!("no `{key}` in the ready line {line}"))
        };
        let (url, model) = (text("url")?, text("model")?);
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(ANSWER_TIMEOUT))
            .http_status_as_error(false)
            .max_idle_connections_per_host(256)
            .build()
            .into();
        Ok(Self { child: Some(child), ready, url, ready_after, model, agent })
    }

    /// The process ids of the workers.
    pub fn worker_pids(&self) -> Vec<u32> {
        let workers = self.ready["workers"].as_array().cloned().unwrap_or_default();
        workers.iter().filter_map(|w| w["pid"].as_u64()).map(|pid| pid as u32).collect()
    }

    /// The path of the operator's context file.
    pub fn context(&self) -> String {
        self.ready["context"].as_str().unwrap_or_default().to_owned()
    }

    /// Runs an operator's verb on this cluster and gives its stdout.
    pub fn operate(&self, verb: &[&str]) -> Result<String> {
        let output = Command::new(shoal_binary()?)
            .args(verb)
            .args(["--context", &self.context()])
            .output()?;
        if !output.status.success() {
            bail!("shoal {}: {}", verb.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Serves a model whose time is modelled, and talks to that one from now on.
    pub fn deploy_pretend(&mut self, name: &str, spec: PretendSpec, stages: u32) -> Result<()> {
        Admin::open(Path::new(&self.context()))?.deploy(name, spec, stages, 1)?;
        self.model = name.to_owned();
        Ok(())
    }

    /// Asks this deployment from now on.
    pub fn talk_to(&mut self, name: &str) {
        self.model = name.to_owned();
    }

    /// Generates exactly `tokens` tokens greedily and gives the time from request to whole answer and
    /// the tokens.
    pub fn generate(&self, prompt: &[u32], tokens: u32) -> Result<(Duration, Vec<u32>)> {
        let body = json!({
            "model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "ignore_eos": true, "return_token_ids": true
        });
        let start = Instant::now();
        let mut response =
            self.agent.post(format!("{}/v1/completions", self.url)).send_json(&body)?;
        let answer: Value = response.body_mut().with_config().limit(64 << 20).read_json()?;
        let elapsed = start.elapsed();
        let ids = answer["choices"][0]["token_ids"]
            .as_array()
            .with_context(|| format!("no tokens in {answer}"))?;
        let ids: Vec<u32> = ids.iter().filter_map(Value::as_u64).map(|id| id as u32).collect();
        if ids.len() != tokens as usize {
            bail!("{} tokens instead of {tokens}", ids.len());
        }
        Ok((elapsed, ids))
    }

    /// Streams exactly `tokens` tokens and gives the time of each from the request on.
    pub fn stream(&self, prompt: &[u32], tokens: u32) -> Result<Vec<Duration>> {
        let body = json!({
            "model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "ignore_eos": true, "return_token_ids": true, "stream": true
        });
        let start = Instant::now();
        let mut response =
            self.agent.post(format!("{}/v1/completions", self.url)).send_json(&body)?;
        let mut times = Vec::with_capacity(tokens as usize);
        for line in BufReader::new(response.body_mut().as_reader()).lines() {
            let line = line?;
            let Some(data) = line.strip_prefix("data: ").filter(|data| *data != "[DONE]") else {
                continue;
            };
            let chunk: Value = serde_json::from_str(data)?;
            if !chunk["error"].is_null() {
                bail!("{chunk}");
            }
            let ids = chunk["choices"][0]["token_ids"].as_array().map_or(0, Vec::len);
            times.extend(std::iter::repeat_n(start.elapsed(), ids));
        }
        if times.len() != tokens as usize {
            bail!("{} tokens instead of {tokens}", times.len());
        }
        Ok(times)
    }

    /// Generates with all prompts at once and gives the time until the last answer.
    pub fn generate_all(&self, prompts: &[Vec<u32>], tokens: u32) -> Result<Duration> {
        let start = Instant::now();
        std::thread::scope(|scope| {
            let running: Vec<_> =
                prompts.iter().map(|p| scope.spawn(move || self.generate(p, tokens))).collect();
            running.into_iter().try_for_each(|thread| match thread.join() {
                Ok(result) => result.map(drop),
                Err(_) => Err(anyhow!("a client thread panicked")),
            })
        })?;
        Ok(start.elapsed())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let pid = child.id().to_string();
        // SIGTERM: the cluster drains and takes its children along.
        let _ = Command::new("kill").args(["-TERM", &pid]).status();
        let (ended, end) = std::sync::mpsc::sync_channel(1);
        let waiter = std::thread::spawn(move || {
            let _ = ended.send(child.wait());
        });
        if end.recv_timeout(STOP_TIMEOUT).is_err() {
            let _ = Command::new("kill").args(["-KILL", &pid]).status();
        }
        let _ = waiter.join();
    }
}

/// A field of `/proc/<pid>/status` in bytes, such as `VmHWM` or `RssAnon`.
pub fn process_memory(pid: u32, field: &str) -> Result<u64> {
    let status = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib =
        line.and_then(|rest| rest.split_whitespace().next()).and_then(|v| v.parse::<u64>().ok());
    Ok(kib.with_context(|| format!("no {field} for process {pid}"))? * 1024)
}
