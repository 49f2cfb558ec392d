//! Faults on real processes: a cluster under load, a fault, and what its clients saw of it.
//!
//! ```text
//! for each fault, so often: streams run ─► fault ─► they run to their end ─► compared with undisturbed ones ─► heal
//! ```
//!
//! Every stream is compared token by token with what the same request gave before any fault. Real
//! models and real clients are in the e2e tests; here the tokens are a pretend model's, so that a run
//! takes seconds and any token that is lost, doubled or another shows.

use std::fmt;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::plan::{ModelSource, PretendSpec};

use crate::api::{Api, Event};
use crate::proc::cluster::START_TIMEOUT;
use crate::proc::{Cluster, Signal};

/// Coordinators, all of which vote.
const COORDINATORS: usize = 3;

/// Workers: two for each deployment's stages, which is all of them, and one to spare.
const WORKERS: usize = 4;

const DEPLOYMENTS: [&str; 2] = ["one", "two"];

/// Streams at once, over both deployments.
const STREAMS: usize = 4;

/// Tokens of a stream: at 1 ms and more each it outlasts detection, an election and a new layout.
const TOKENS: usize = 400;

/// Tokens that each stream has before the fault.
const BEFORE: usize = 40;

/// How long a frozen process stays frozen: longer than any silence that is waited for.
const FROZEN: Duration = Duration::from_secs(3);

/// What is done to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// kill -9 of a worker with the head of the first deployment.
    KillHead,
    /// kill -9 of the worker with its last stage.
    KillLast,
    /// SIGSTOP of a worker, SIGCONT three seconds later.
    FreezeWorker,
    /// kill -9 of the coordinator that leads; streams go through the others.
    KillLeader,
    /// kill -9 of a coordinator that follows; streams go through the others.
    KillFollower,
    /// SIGSTOP of the leader, SIGCONT three seconds later; streams go through the others.
    FreezeLeader,
    /// SIGTERM of a worker: it drains.
    StopWorker,
    /// kill -9 of a worker and of the leader at once.
    KillBoth,
}

impl Fault {
    /// Every kind.
    pub const ALL: [Fault; 8] = [
        Fault::KillHead,
        Fault::KillLast,
        Fault::FreezeWorker,
        Fault::KillLeader,
        Fault::KillFollower,
        Fault::FreezeLeader,
        Fault::StopWorker,
        Fault::KillBoth,
    ];

    fn hits_a_worker(self) -> bool {
        !matches!(self, Fault::KillLeader | Fault::KillFollower | Fault::FreezeLeader)
    }

    fn hits_a_coordinator(self) -> bool {
        matches!(
            self,
            Fault::KillLeader | Fault::KillFollower | Fault::FreezeLeader | Fault::KillBoth
        )
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::KillHead => "kill -9 a worker with a head",
            Fault::KillLast => "kill -9 a worker with a last stage",
            Fault::FreezeWorker => "SIGSTOP a worker, SIGCONT after 3 s",
            Fault::KillLeader => "kill -9 the leader",
            Fault::KillFollower => "kill -9 a follower",
            Fault::FreezeLeader => "SIGSTOP the leader, SIGCONT after 3 s",
            Fault::StopWorker => "SIGTERM a worker",
            Fault::KillBoth => "kill -9 a worker and the leader",
        })
    }
}

/// What clients saw of one kind of fault.
#[derive(Clone, Debug)]
pub struct Row {
    /// The fault.
    pub fault: Fault,
    /// How often it was done.
    pub runs: usize,
    /// Streams that were under way.
    pub streams: usize,
    /// Tokens that never came.
    pub lost: usize,
    /// Tokens behind the end of the expected ones.
    pub duplicated: usize,
    /// Tokens that are not the expected ones.
    pub differing: usize,
    /// Streams that ended with an error.
    pub errors: usize,
    /// The longest gap of each stream after the fault, sorted.
    pub stalls: Vec<Duration>,
}

/// All rows, and the usual gap beside which the stalls stand.
#[derive(Clone, Debug)]
pub struct Report {
    /// One for each kind of fault.
    pub rows: Vec<Row>,
    /// The longest gaps of undisturbed streams, sorted.
    pub usual: Vec<Duration>,
}

impl Report {
    /// Faults that were done.
    pub fn faults(&self) -> usize {
        self.rows.iter().map(|row| row.runs).sum()
    }

    /// Whether no token was lost, doubled or another, and no stream failed.
    pub fn is_clean(&self) -> bool {
        self.rows.iter().all(|r| r.lost + r.duplicated + r.differing + r.errors == 0)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| fault | runs | streams hit | tokens lost | twice | different | errors | stall p50 | p99 |"
        )?;
        writeln!(f, "|---|---|---|---|---|---|---|---|---|")?;
        let ms = |d: Duration| format!("{:.0} ms", d.as_secs_f64() * 1000.0);
        for r in &self.rows {
            let (half, most) = (quantile(&r.stalls, 0.5), quantile(&r.stalls, 0.99));
            writeln!(
                f,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                r.fault,
                r.runs,
                r.streams,
                r.lost,
                r.duplicated,
                r.differing,
                r.errors,
                ms(half),
                ms(most)
            )?;
        }
        let (half, most) = (quantile(&self.usual, 0.5), quantile(&self.usual, 0.99));
        writeln!(
            f,
            "| none | - | {} | 0 | 0 | 0 | 0 | {} | {} |",
            self.usual.len(),
            ms(half),
            ms(most)
        )
    }
}

fn quantile(sorted: &[Duration], q: f64) -> Duration {
    let last = sorted.len().saturating_sub(1);
    sorted.get(((last as f64) * q).round() as usize).copied().unwrap_or_default()
}

/// Does each of these faults so often, on a cluster of its own.
pub fn run(faults: &[Fault], times: usize, mut say: impl FnMut(&str)) -> Result<Report> {
    let mut trial = Trial::new()?;
    let mut report = Report { rows: Vec::new(), usual: trial.usual.clone() };
    for fault in faults {
        let mut row = Row {
            fault: *fault,
            runs: 0,
            streams: 0,
            lost: 0,
            duplicated: 0,
            differing: 0,
            errors: 0,
            stalls: Vec::new(),
        };
        for n in 0..times {
            trial.once(*fault, n, &mut row).with_context(|| format!("{fault}, run {n}"))?;
            say(&format!("{fault}: {} of {times}", n + 1));
        }
        row.stalls.sort();
        report.rows.push(row);
    }
    Ok(report)
}

struct Trial {
    cluster: Cluster,
    /// What each deployment answers, undisturbed.
    expected: Vec<Vec<u64>>,
    usual: Vec<Duration>,
}

/// What a stream had at its end.
struct Seen {
    deployment: usize,
    tokens: Vec<u64>,
    error: Option<String>,
    longest: Duration,
}

struct Stream {
    thread: JoinHandle<Seen>,
    /// Fires when it has `BEFORE` tokens.
    begun: mpsc::Receiver<()>,
}

impl Trial {
    fn new() -> Result<Self> {
        let cluster = Cluster::start(COORDINATORS, WORKERS)?;
        for (seed, name) in DEPLOYMENTS.iter().enumerate() {
            let model = PretendSpec {
                layers: 4,
                hidden: 64,
                vocab: 1000,
                max_context: 2048,
                seed: seed as u64 + 1,
                layer_step_ns: 250_000,
                layer_row_ns: 0,
                layer_weight_bytes: 1 << 20,
            };
            cluster.admin(0)?.deploy(name, ModelSource::Pretend(model), 2)?;
        }
        let mut trial = Self { cluster, expected: Vec::new(), usual: Vec::new() };
        trial.until_ready()?;
        for deployment in 0..DEPLOYMENTS.len() {
            let mut first = None;
            for coordinator in 0..COORDINATORS {
                let stream = start(trial.cluster.api(coordinator), deployment);
                let seen =
                    stream.thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
                if let Some(error) = seen.error {
                    bail!("an undisturbed stream failed: {error}");
                }
                trial.usual.push(seen.longest);
                if first.get_or_insert(seen.tokens.clone()) != &seen.tokens {
                    bail!("two undisturbed streams differ");
                }
            }
            trial.expected.extend(first);
        }
        trial.usual.sort();
        Ok(trial)
    }

    fn until_ready(&self) -> Result<()> {
        for coordinator in 0..COORDINATORS {
            let admin = self.cluster.admin(coordinator)?;
            admin.wait_until("all connected", START_TIMEOUT, |view| {
                view.workers.iter().filter(|worker| worker.connected).count() == WORKERS
            })?;
            for name in DEPLOYMENTS {
                admin.wait_for_phase(name, DeploymentPhase::Ready, START_TIMEOUT)?;
            }
        }
        Ok(())
    }

    fn once(&mut self, fault: Fault, n: usize, row: &mut Row) -> Result<()> {
        let leader = self.cluster.leader(0)?;
        let coordinator = match fault {
            Fault::KillFollower => (leader + 1 + n % 2) % COORDINATORS,
            _ => leader,
        };
        let clients: Vec<_> = (0..COORDINATORS)
            .filter(|index| !fault.hits_a_coordinator() || *index != coordinator)
            .collect();
        let worker = self.worker_of(fault, clients[0], n)?;
        let streams: Vec<_> = (0..STREAMS)
            .map(|i| {
                let through = clients[i % clients.len()];
                start(self.cluster.api(through), i % DEPLOYMENTS.len())
            })
            .collect();
        for stream in &streams {
            stream.begun.recv_timeout(START_TIMEOUT).context("a stream did not begin")?;
        }
        self.strike(fault, worker, coordinator)?;
        for stream in streams {
            let seen = stream.thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
            self.judge(&seen, row);
        }
        row.runs += 1;
        self.heal(fault, worker, coordinator)
    }

    /// The worker that the fault hits: of the first deployment, then of the second, in turn.
    fn worker_of(&self, fault: Fault, seen_by: usize, n: usize) -> Result<usize> {
        let view = self.cluster.admin(seen_by)?.wait_until("there", START_TIMEOUT, |_| true)?;
        let name = DEPLOYMENTS[n % DEPLOYMENTS.len()];
        let plan = view.plan.replicas.iter().find(|r| r.deployment.as_str() == name);
        let plan = plan.context("the deployment has a layout")?;
        let mut nodes = plan.nodes();
        let node = match fault {
            Fault::KillLast => nodes.last(),
            _ => nodes.next(),
        };
        Ok(node.context("a worker")?.number as usize - 1)
    }

    fn strike(&mut self, fault: Fault, worker: usize, coordinator: usize) -> Result<()> {
        match fault {
            Fault::KillHead | Fault::KillLast => {
                self.cluster.signal_worker(worker, Signal::KILL)?;
            }
            Fault::FreezeWorker => {
                self.cluster.signal_worker(worker, Signal::STOP)?;
                pass(FROZEN);
                self.cluster.signal_worker(worker, Signal::CONT)?;
            }
            Fault::KillLeader | Fault::KillFollower => {
                self.cluster.signal_coordinator(coordinator, Signal::KILL)?;
            }
            Fault::FreezeLeader => {
                self.cluster.signal_coordinator(coordinator, Signal::STOP)?;
                pass(FROZEN);
                self.cluster.signal_coordinator(coordinator, Signal::CONT)?;
            }
            Fault::StopWorker => self.cluster.signal_worker(worker, Signal::TERM)?,
            Fault::KillBoth => {
                self.cluster.signal_worker(worker, Signal::KILL)?;
                self.cluster.signal_coordinator(coordinator, Signal::KILL)?;
            }
        }
        Ok(())
    }

    fn heal(&mut self, fault: Fault, worker: usize, coordinator: usize) -> Result<()> {
        let frozen = matches!(fault, Fault::FreezeWorker | Fault::FreezeLeader);
        if fault.hits_a_coordinator() && !frozen {
            self.cluster.restart_coordinator(coordinator)?;
        }
        if fault.hits_a_worker() && !frozen {
            self.cluster.restart_worker(worker)?;
        }
        self.until_ready()
    }

    fn judge(&self, seen: &Seen, row: &mut Row) {
        let expected = &self.expected[seen.deployment];
        let common = seen.tokens.iter().zip(expected);
        row.streams += 1;
        row.differing += common.filter(|(found, expected)| found != expected).count();
        row.lost += expected.len().saturating_sub(seen.tokens.len());
        row.duplicated += seen.tokens.len().saturating_sub(expected.len());
        row.stalls.push(seen.longest);
        if let Some(error) = &seen.error {
            eprintln!("{}: a stream failed: {error}", row.fault);
            row.errors += 1;
        }
    }
}

fn start(url: String, deployment: usize) -> Stream {
    let (sender, begun) = mpsc::sync_channel(1);
    let thread = std::thread::spawn(move || follow(&url, deployment, &sender));
    Stream { thread, begun }
}

/// Lets time pass: a fault's own length is what it is about, and there is nothing to wait for.
fn pass(time: Duration) {
    let (_sender, never) = mpsc::sync_channel::<()>(0);
    let _ = never.recv_timeout(time);
}

/// Reads one stream to its end, as a client does.
fn follow(url: &str, deployment: usize, begun: &mpsc::SyncSender<()>) -> Seen {
    let mut seen = Seen { deployment, tokens: Vec::new(), error: None, longest: Duration::ZERO };
    if let Err(error) = read(url, begun, &mut seen) {
        seen.error = Some(format!("{error:#}"));
    }
    // Where it failed before, nobody waits for ever.
    let _ = begun.try_send(());
    seen
}

fn read(url: &str, begun: &mpsc::SyncSender<()>, seen: &mut Seen) -> Result<()> {
    let prompt: Vec<u32> = (10..42).collect();
    let options = json!({"max_tokens": TOKENS, "ignore_eos": true, "return_token_ids": true,
                         "seed": 5, "temperature": 0.7});
    let mut stream = Api::new(url, DEPLOYMENTS[seen.deployment]).stream(prompt, options)?;
    let mut last = None;
    loop {
        let chunk = match stream.event()? {
            Event::Chunk(chunk) => chunk,
            Event::Done => return Ok(()),
            other => bail!("{other:?}"),
        };
        let ids = chunk["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default();
        if ids.is_empty() {
            continue;
        }
        let now = Instant::now();
        let gap = now.duration_since(last.replace(now).unwrap_or(now));
        // Gaps before the fault say nothing of it.
        if seen.tokens.len() >= BEFORE {
            seen.longest = seen.longest.max(gap);
        }
        seen.tokens.extend(ids.iter().filter_map(Value::as_u64));
        if seen.tokens.len() >= BEFORE {
            let _ = begun.try_send(());
        }
    }
}
