//! The agent's event loop: everything that can happen to a worker is in `Event`; what follows is
//! decided by `Lifecycle` and done here.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use shoal_protocol::control::{
    CoordinatorAddress, CoordinatorMessage, REPORT_INTERVAL, Register, Report, ShardCounters,
    WorkerMessage,
};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::NodeId;
use shoal_protocol::mesh::Fact;
use shoal_protocol::plan::{Assignment, ModelSource};
use shoal_protocol::quic::{Endpoint, SharedLease};
use shoal_protocol::units::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::adapters::Adapters;
use super::book::Book;
use super::coordinators::{Coordinators, FILE_NAME, left};
use super::fate::{END_WITHIN, Fate, said};
use super::lifecycle::{self, Action, Lifecycle, LoadId, ShardKey, Stop};
use super::models::Models;
use super::orders::{Orders, Outranked};
use super::renewal::Renewal;
use super::session::Told;
use crate::head::Heads;
use crate::node::IDENTITY_FILE;
use crate::stage::{Links, LoadedModel, Shard, ShardEvent, ShardNews, ShardStop};

/// Events that wait for the loop, which never waits for those who send them.
const EVENTS_MAX: usize = 64;

/// Messages of the coordinators that wait: each `Assign` makes the one before obsolete.
const TOLD_MAX: usize = 16;

/// Probes at once: each reads the headers of a model's files.
const PROBES_MAX: usize = 8;

/// What an agent is made of.
#[derive(Debug)]
pub struct AgentParts {
    /// What it registers with.
    pub register: Register,
    /// What it says of itself besides.
    pub facts: watch::Receiver<Vec<Fact>>,
    /// Where somebody said that coordinators are.
    pub seeds: Vec<SocketAddr>,
    /// Where they were in the last life.
    pub kept: Vec<CoordinatorAddress>,
    /// The endpoint that reaches them.
    pub endpoint: Endpoint,
    /// The ring's endpoint.
    pub links: Arc<Links>,
    /// Where heads are found by requests.
    pub heads: Heads,
    /// What the coordinators renew.
    pub lease: Arc<SharedLease>,
    /// Where models come from.
    pub models: Models,
    /// The memory that all shards together may take.
    pub budget: Bytes,
}

/// What happens to a worker.
#[derive(Debug)]
enum Event {
    /// A shard has news.
    Shard(ShardNews),
    /// A load has ended.
    Loaded(LoadId, Result<LoadedModel, WireError>),
    /// A shard has stopped and left its model, to be kept or not.
    Stopped { key: ShardKey, left: Option<LoadedModel>, keep: bool },
}

/// Asks an agent to end.
#[derive(Clone, Debug)]
pub struct AgentHandle {
    drain: watch::Sender<bool>,
    book: Arc<watch::Sender<Book>>,
}

impl AgentHandle {
    /// Resolves when a coordinator is none any more.
    pub async fn left(&self, coordinator: NodeId) {
        left(&self.book, coordinator).await;
    }

    /// Let out what runs, then end.
    pub fn drain(&self) {
        self.drain.send_replace(true);
    }
}

/// One worker's agent.
#[derive(Debug)]
pub struct Agent {
    lifecycle: Lifecycle,
    links: Arc<Links>,
    heads: Heads,
    models: Models,
    adapters: Adapters,
    shards: HashMap<ShardKey, Shard>,
    loads: HashMap<LoadId, Load>,
    /// Models of stopped shards, for their heirs.
    kept: HashMap<ShardKey, LoadedModel>,
    /// Loads, stops and the session: none outlives the agent.
    tasks: JoinSet<()>,
    probes: JoinSet<()>,
    events: mpsc::Sender<Event>,
    inbox: mpsc::Receiver<Event>,
    news: mpsc::Sender<ShardNews>,
    news_inbox: mpsc::Receiver<ShardNews>,
    told: mpsc::Receiver<Told>,
    orders: Orders,
    reports: watch::Sender<Report>,
    drain: watch::Receiver<bool>,
    fate: watch::Receiver<Option<String>>,
}

#[derive(Debug, Default)]
struct Load {
    progress: Arc<Progress>,
    /// Where it is complete and not taken yet.
    model: Option<LoadedModel>,
}

impl Drop for Load {
    /// A load that nobody waits for ends soon.
    fn drop(&mut self) {
        self.progress.cancel.store(true, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    cancel: AtomicBool,
}

impl Agent {
    /// An agent that begins to talk to its coordinators at once.
    pub fn start(parts: AgentParts) -> (Self, AgentHandle) {
        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        let (news, news_inbox) = mpsc::channel(EVENTS_MAX);
        let (told_to, told) = mpsc::channel(TOLD_MAX);
        let (reports, reports_inbox) = watch::channel(Report::default());
        let (drain_to, drain) = watch::channel(false);
        let (adapters, (held, held_inbox)) =
            (Adapters::new(parts.budget), watch::channel(Vec::new()));
        let fate = Fate::of(parts.register.node);
        let renewal = Renewal {
            endpoint: parts.endpoint.clone(),
            links: Arc::clone(&parts.links),
            blobs: parts.models.blobs.clone(),
            file: parts.models.data.join(IDENTITY_FILE),
            asked: Default::default(),
            order: Default::default(),
            said: watch::Sender::new(0),
        };
        let coordinators = Coordinators {
            endpoint: parts.endpoint,
            register: Arc::new(parts.register),
            reports: reports_inbox,
            facts: parts.facts,
            adapters: held_inbox,
            heads: parts.heads.clone(),
            told: told_to,
            renewal: Arc::new(renewal),
            work: parts.links.work().subscribe(),
            lease: parts.lease,
            book: Arc::new(watch::Sender::new(Book::new(&parts.kept))),
            file: parts.models.data.join(FILE_NAME),
            seeds: parts.seeds.iter().map(ToString::to_string).collect(),
            fate: fate.clone(),
        };
        let book = Arc::clone(&coordinators.book);
        let mut tasks = JoinSet::new();
        tasks.spawn(coordinators.run(parts.seeds));
        tasks.spawn(adapters.clone().keep(parts.models.clone(), held));
        let agent = Self {
            lifecycle: Lifecycle::new(parts.budget),
            links: parts.links,
            heads: parts.heads,
            models: parts.models,
            adapters,
            shards: HashMap::new(),
            loads: HashMap::new(),
            kept: HashMap::new(),
            tasks,
            probes: JoinSet::new(),
            events,
            inbox,
            news,
            news_inbox,
            told,
            orders: Orders::default(),
            reports,
            drain,
            fate: fate.end(),
        };
        (agent, AgentHandle { drain: drain_to, book })
    }

    /// Runs until it is drained; the words of whoever wants it no more, where there is one.
    pub async fn run(mut self) -> Option<String> {
        let mut ticks = tokio::time::interval(REPORT_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut suspicions = self.links.suspicions();
        let mut draining = false;
        let (mut unwanted, mut end) = (None, tokio::time::Instant::now());
        while !(draining && self.lifecycle.is_empty()) {
            tokio::select! {
                Some(event) = self.inbox.recv() => self.take(event),
                Some(news) = self.news_inbox.recv() => self.take(Event::Shard(news)),
                Some(told) = self.told.recv() => self.take_told(told, &mut draining),
                () = asked_to_drain(&mut self.drain), if !draining => {
                    draining = true;
                    self.handle(lifecycle::Event::Drain);
                }
                // What it still serves it may finish.
                why = said(&mut self.fate), if unwanted.is_none() => {
                    (unwanted, end) = (Some(why), tokio::time::Instant::now() + END_WITHIN);
                    draining = true;
                    self.handle(lifecycle::Event::Drain);
                }
                () = tokio::time::sleep_until(end), if unwanted.is_some() => break,
                // A suspicion is news that does not wait for the next tick.
                Ok(()) = suspicions.changed() => {
                    self.reports.send_replace(self.report());
                }
                _ = ticks.tick() => {
                    self.note_progress();
                    self.reports.send_replace(self.report());
                }
                Some(done) = self.tasks.join_next() => joined(done),
                Some(done) = self.probes.join_next() => joined(done),
            }
        }
        self.tasks.shutdown().await;
        self.probes.shutdown().await;
        unwanted
    }

    fn take_told(&mut self, told: Told, draining: &mut bool) {
        let Told { from, message, answers } = told;
        let ordered = match message {
            CoordinatorMessage::Assign { epoch, assignments } => {
                let admitted = self.orders.admit(from, epoch);
                admitted.map(|()| self.handle(lifecycle::Event::Assigned(assignments)))
            }
            CoordinatorMessage::Drain { epoch } => self.orders.admit(from, epoch).map(|()| {
                *draining = true;
                self.handle(lifecycle::Event::Drain);
            }),
            CoordinatorMessage::Probe { probe, source } => {
                self.probe(probe, source, answers);
                return;
            }
            CoordinatorMessage::Adapters(wanted) => return self.adapters.want(wanted),
            CoordinatorMessage::Welcome { .. }
            | CoordinatorMessage::Refused(_)
            | CoordinatorMessage::Renewed { .. }
            | CoordinatorMessage::Trust { .. }
            | CoordinatorMessage::Blobs(_)
            | CoordinatorMessage::Coordinators(_) => {
                tracing::warn!("{from} answered what was not asked");
                return;
            }
        };
        if let Err(outranked) = ordered {
            let Outranked { later, .. } = outranked;
            tracing::warn!("{outranked}");
            // Where that queue is full, it has been told already.
            let _ = answers.try_send(WorkerMessage::Outranked { epoch: later });
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Shard(ShardNews { replica, generation, event }) => {
                let key = ShardKey { replica, generation };
                self.handle(match event {
                    ShardEvent::Linked => {
                        tracing::info!("{key} is linked");
                        lifecycle::Event::Linked(key)
                    }
                    ShardEvent::Failed(error) => {
                        tracing::warn!("{key} has failed: {error}");
                        lifecycle::Event::Broken(key, error)
                    }
                });
            }
            Event::Loaded(load, Ok(model)) => {
                if let Some(load) = self.loads.get_mut(&load) {
                    load.model = Some(model);
                }
                self.handle(lifecycle::Event::Loaded(load));
            }
            Event::Loaded(load, Err(error)) => {
                self.loads.remove(&load);
                tracing::warn!("a shard was not loaded: {error}");
                self.handle(lifecycle::Event::LoadFailed(load, error));
            }
            Event::Stopped { key, left, keep } => {
                let kept = match left {
                    Some(model) if keep => self.kept.insert(key, model).is_none(),
                    _ => false,
                };
                if !kept {
                    self.adapters.gone(key);
                }
                self.handle(lifecycle::Event::Stopped { key, kept });
            }
        }
    }

    /// Tells the lifecycle and does what it wants, until it wants nothing more.
    fn handle(&mut self, event: lifecycle::Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            for action in self.lifecycle.handle(event) {
                events.extend(self.act(action));
            }
        }
        let report = self.report();
        self.reports.send_if_modified(|last| std::mem::replace(last, report) != *last);
    }

    fn act(&mut self, action: Action) -> Option<lifecycle::Event> {
        match action {
            Action::Load(id, assignment) => {
                self.load(id, assignment);
                None
            }
            Action::Cancel(id) => {
                if let Some(load) = self.loads.get(&id) {
                    load.progress.cancel.store(true, Ordering::Relaxed);
                }
                None
            }
            Action::Discard(id) => {
                self.loads.remove(&id);
                None
            }
            Action::Start(id, assignment) => {
                let model = self.loads.remove(&id).and_then(|mut load| load.model.take());
                self.start_shard(assignment, model, None)
            }
            Action::Adopt(from, assignment) => {
                let model = self.kept.remove(&from);
                let failed = self.start_shard(assignment, model, Some(from));
                // Where it could not be started the model has gone with it.
                self.adapters.gone(from);
                failed
            }
            Action::Forget(key) => {
                self.kept.remove(&key);
                self.adapters.gone(key);
                None
            }
            Action::Stop(key, how, why) => self.stop(key, how, why),
        }
    }

    fn load(&mut self, id: LoadId, assignment: Assignment) {
        let load = Load::default();
        let (progress, models) = (Arc::clone(&load.progress), self.models.clone());
        self.loads.insert(id, load);
        let events = self.events.clone();
        self.tasks.spawn(async move {
            let work = move || {
                let note = |done: Bytes, total: Bytes| {
                    progress.done.fetch_max(done.0, Ordering::Relaxed);
                    progress.total.store(total.0, Ordering::Relaxed);
                };
                models.load(&assignment, &note, &progress.cancel)
            };
            let loaded = tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
                Err(WireError::new(ErrorCode::Internal, format!("loading panicked: {error}")))
            });
            let _ = events.send(Event::Loaded(id, loaded)).await;
        });
    }

    fn start_shard(
        &mut self,
        assignment: Assignment,
        model: Option<LoadedModel>,
        heir_of: Option<ShardKey>,
    ) -> Option<lifecycle::Event> {
        let key = ShardKey::of(&assignment);
        let broken = |why: String| {
            tracing::error!("{key} cannot be started: {why}");
            Some(lifecycle::Event::Broken(key, WireError::new(ErrorCode::Internal, why)))
        };
        let Some(model) = model else { return broken("its weights are gone".to_owned()) };
        match Shard::start(&assignment, model, &self.links, self.news.clone()) {
            Ok(shard) => {
                if let Some(head) = shard.head() {
                    self.heads.insert(key.replica, head.clone());
                }
                self.adapters.begin(key, assignment, shard.adapters().clone(), heir_of);
                self.shards.insert(key, shard);
                None
            }
            Err(error) => broken(error.to_string()),
        }
    }

    fn stop(&mut self, key: ShardKey, how: Stop, why: String) -> Option<lifecycle::Event> {
        // One that could not be started has nothing to stop.
        let Some(shard) = self.shards.remove(&key) else {
            return Some(lifecycle::Event::Stopped { key, kept: false });
        };
        self.adapters.end(key);
        let head = shard.head().cloned();
        let heads = self.heads.clone();
        let forget = move || {
            if let Some(head) = &head {
                heads.remove(key.replica, head);
            }
        };
        let events = self.events.clone();
        // A layout that retires still answers those who have not heard of it.
        if how != Stop::Retire {
            forget();
        }
        self.tasks.spawn(async move {
            let left = match how {
                Stop::Drain => shard.stop(ShardStop::Drain, why).await,
                Stop::Retire => shard.stop(ShardStop::Retire, why).await,
                Stop::Now | Stop::Keep => shard.stop(ShardStop::Now, why).await,
            };
            forget();
            let _ = events.send(Event::Stopped { key, left, keep: how == Stop::Keep }).await;
        });
        None
    }

    /// The answer goes to whoever asked; a coordinator that left is not waited for.
    fn probe(&mut self, probe: u64, source: ModelSource, answers: mpsc::Sender<WorkerMessage>) {
        let models = self.models.clone();
        let busy = self.probes.len() >= PROBES_MAX;
        if busy {
            let words = format!("{PROBES_MAX} probes are at work already; try again");
            let result = Err(WireError::new(ErrorCode::Overloaded, words));
            // Where that queue is full too, the coordinator's deadline answers.
            let _ = answers.try_send(WorkerMessage::Probed { probe, result });
            return;
        }
        self.probes.spawn(async move {
            let read = tokio::task::spawn_blocking(move || models.fingerprint(&source)).await;
            let result = read.unwrap_or_else(|error| {
                Err(WireError::new(ErrorCode::Internal, format!("the probe panicked: {error}")))
            });
            let _ = answers.try_send(WorkerMessage::Probed { probe, result });
        });
    }

    fn note_progress(&mut self) {
        for (id, load) in &self.loads {
            let done = Bytes(load.progress.done.load(Ordering::Relaxed));
            let total = Bytes(load.progress.total.load(Ordering::Relaxed));
            if total > Bytes(0) {
                let actions = self.lifecycle.handle(lifecycle::Event::Progress(*id, done, total));
                debug_assert!(actions.is_empty(), "progress asks for nothing");
            }
        }
    }

    fn report(&self) -> Report {
        let counters = |key: ShardKey| {
            self.shards.get(&key).map_or_else(ShardCounters::default, Shard::counters)
        };
        Report { shards: self.lifecycle.report(counters), heads: self.heads.reports() }
    }
}

async fn asked_to_drain(drain: &mut watch::Receiver<bool>) {
    if drain.wait_for(|drain| *drain).await.is_err() {
        // Nobody is left to ask for it.
        std::future::pending().await
    }
}

fn joined(done: Result<(), tokio::task::JoinError>) {
    if let Err(error) = done
        && error.is_panic()
    {
        tracing::error!("a task of the agent panicked: {error}");
    }
}
