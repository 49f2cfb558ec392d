//! A `shoal up` with all its children.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use super::logs::unexpected_errors;
use super::process::{Finished, Process, Signal, signal, wait_until_gone};
use super::{Admin, shoal};
use crate::api::Api;

/// How long a small model may take from the command to the ready line, on a machine that is busy.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a drain may take.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// How long an operator's verb may take.
const VERB_TIMEOUT: Duration = Duration::from_secs(30);

/// Clusters of one test process run one after the other: their deadlines are of seconds, and a small
/// machine has two cores. (nextest gives each test a process, and runs these alone by its own rule.)
static TURN: Mutex<()> = Mutex::new(());

/// A worker, as the ready line describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worker {
    /// `w1` …
    pub id: String,
    /// Its process.
    pub pid: u32,
    /// Its stage, where it has one.
    pub stage: Option<u64>,
    /// Its layers, half-open, where it has some.
    pub layers: Option<(u64, u64)>,
}

/// What to start.
#[derive(Clone, Debug, Default)]
pub struct UpOptions {
    /// A model folder; `None`: the built-in model.
    pub model: Option<PathBuf>,
    /// More flags.
    pub flags: Vec<OsString>,
    /// More of the environment.
    pub environment: Vec<(String, OsString)>,
}

impl UpOptions {
    /// The built-in model with these flags, split at blanks.
    pub fn flags(line: &str) -> Self {
        let flags = line.split_whitespace().map(OsString::from).collect();
        Self { flags, ..Self::default() }
    }

    /// The same, with this in its environment.
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    /// Another model.
    pub fn model(mut self, folder: impl Into<PathBuf>) -> Self {
        self.model = Some(folder.into());
        self
    }
}

/// A cluster that serves, on a free port, with its data in a folder of its own.
#[derive(Debug)]
pub struct Up {
    process: Option<Process>,
    /// The ready line.
    pub ready: Value,
    /// All processes that it had when it was ready.
    pids: Vec<u32>,
    data: TempDir,
    /// Given back when everything else is gone.
    _turn: MutexGuard<'static, ()>,
}

impl Up {
    /// Starts one and waits until it is ready.
    pub fn start(options: &UpOptions) -> Result<Self> {
        // Whoever panicked with it has given it back all the same.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let data = tempfile::tempdir()?;
        let mut process = Self::spawn(options, data.path())?;
        let line = process.line(READY_TIMEOUT)?;
        let ready: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
        let pids = vec![process.pid()];
        let mut up = Self { process: Some(process), ready, pids, data, _turn: turn };
        let coordinator = up.ready["coordinator"]["pid"].as_u64().context("a pid")? as u32;
        up.pids.push(coordinator);
        up.pids.extend(up.workers().iter().map(|worker| worker.pid));
        Ok(up)
    }

    /// Starts one without waiting for anything: for tests of what refuses to start.
    pub fn spawn(options: &UpOptions, data: &Path) -> Result<Process> {
        let mut command = Command::new(shoal());
        command.arg("up").args(&options.model);
        command.args(["--json", "--listen", "127.0.0.1:0", "--worker-threads", "1", "--data"]);
        command.arg(data.join("up")).args(&options.flags);
        // The newest `up` of a test is not that of whoever runs the tests.
        command.env("XDG_RUNTIME_DIR", data).env_remove("SHOAL_CONTEXT").env_remove("SHOAL_LOG");
        command.envs(options.environment.iter().map(|(name, value)| (name, value)));
        Process::spawn(command)
    }

    /// The public API's URL, without `/v1`.
    pub fn url(&self) -> &str {
        self.ready["url"].as_str().unwrap_or_default()
    }

    /// A client of the public API, for the model that is served.
    pub fn api(&self) -> Api {
        Api::new(self.url(), self.ready["model"].as_str().unwrap_or_default())
    }

    /// The admin context file.
    pub fn context(&self) -> PathBuf {
        PathBuf::from(self.ready["context"].as_str().unwrap_or_default())
    }

    /// The admin API.
    pub fn admin(&self) -> Result<Admin> {
        Admin::open(&self.context())
    }

    /// The folder that XDG_RUNTIME_DIR names for it.
    pub fn runtime_dir(&self) -> &Path {
        self.data.path()
    }

    /// The workers of the ready line.
    pub fn workers(&self) -> Vec<Worker> {
        let workers = self.ready["workers"].as_array().map(Vec::as_slice).unwrap_or_default();
        let worker = |value: &Value| Worker {
            id: value["id"].as_str().unwrap_or_default().to_owned(),
            pid: value["pid"].as_u64().unwrap_or_default() as u32,
            stage: value["stage"].as_u64(),
            layers: value["layers"][0].as_u64().zip(value["layers"][1].as_u64()),
        };
        workers.iter().map(worker).collect()
    }

    /// The address at which a worker takes activations.
    pub fn address(&self, worker: usize) -> Option<SocketAddr> {
        self.ready["workers"][worker]["address"].as_str()?.parse().ok()
    }

    /// `up` itself.
    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("it runs until it is stopped, which takes the value")
    }

    /// Runs an operator's verb against this cluster.
    pub fn verb(&self, args: &[&str]) -> Result<Finished> {
        let mut command = Command::new(shoal());
        command.args(args).arg("--context").arg(self.context());
        Process::spawn(command)?.finish(VERB_TIMEOUT)
    }

    /// Stops it as a person would, and checks that it says it ended well, that no process is left and
    /// that no log has an error in it but those `expected`.
    pub fn stop(mut self, expected: &[&str]) -> Result<Finished> {
        self.process().signal(Signal::TERM)?;
        self.ended(expected)
    }

    /// Waits for the end of one that was told to stop, and checks the same.
    pub fn ended(mut self, expected: &[&str]) -> Result<Finished> {
        let process = self.process.take().context("it runs")?;
        let finished = process.finish(STOP_TIMEOUT)?;
        for &pid in &self.pids {
            if !wait_until_gone(pid, Duration::ZERO)? {
                bail!("process {pid} outlived `up`");
            }
        }
        let errors = unexpected_errors(&self.data.path().join("up/logs"), expected)?;
        if !errors.is_empty() {
            bail!("errors in the logs:\n{}", errors.join("\n"));
        }
        if finished.code() != Some(0) {
            bail!("it ended with {:?}: {}", finished.status, finished.stderr);
        }
        Ok(finished)
    }

    /// Kills `up` alone and returns all the processes that it had started.
    pub fn kill(mut self) -> Result<(Vec<u32>, TempDir)> {
        let process = self.process.take().context("it runs")?;
        process.signal(Signal::KILL)?;
        drop(process);
        let pids = std::mem::take(&mut self.pids);
        let data = std::mem::replace(&mut self.data, tempfile::tempdir()?);
        Ok((pids, data))
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let Some(process) = self.process.take() else { return };
        if std::thread::panicking() {
            // What the test saw is not enough to find out why.
            print_logs(&self.data.path().join("up/logs"));
        }
        drop(process);
        for &pid in &self.pids[1..] {
            // They end by themselves when `up` is gone, unless they are stopped or broken.
            let ended = wait_until_gone(pid, Duration::from_secs(3)).unwrap_or(true);
            if !ended {
                let _ = signal(pid, Signal::KILL);
            }
        }
    }
}

fn print_logs(folder: &Path) {
    const TAIL: usize = 30;
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        eprintln!("--- {}", entry.path().display());
        for line in &lines[lines.len().saturating_sub(TAIL)..] {
            eprintln!("{line}");
        }
    }
}
