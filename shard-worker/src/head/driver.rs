//! The event loop around the engine. Everything that can happen to a head is in `Event` and
//! `Samples`; everything that it can do is in `engine::Action`.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use shoal_protocol::activation::Samples;
use shoal_protocol::control::HeadReport;
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::SequenceId;
use shoal_protocol::prefix::PrefixReport;
use shoal_protocol::request::{FailedHeader, Generate, HeadEvent};
use shoal_protocol::trace::Tracer;
use shoal_protocol::units::Instant;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::heads::Marks;
use super::lateness::Lateness;
use crate::engine::{self, Action, BadEngineConfig, ClientKey, Engine, EngineConfig};
use crate::stage::{Served, StageInput, StepData, records_of};
use crate::trace::HeadTraces;

/// Requests and cancels that wait for the loop, which takes microseconds for each. The engine has
/// the queue that matters, and answers what does not fit it with `Overloaded`.
const EVENTS_MAX: usize = 256;

/// Events taken at once before steps are made, so that requests that arrive together travel together.
const EVENTS_AT_ONCE: usize = 64;

/// How long the loop may take to end: it waits for nothing but room in the stage's queue.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Tokens that wait for one client's stream. QUIC's window holds thousands more; who reads so slowly
/// that this fills has gone away in all but name, and must not hold KV blocks.
pub const TOKENS_WAITING_MAX: usize = 1024;

/// What happens to a head besides samples.
#[derive(Debug)]
enum Event {
    /// A coordinator's stream has brought a request.
    Submit { key: ClientKey, request: Box<Generate>, marks: Marks, tokens: mpsc::Sender<HeadEvent> },
    /// The client or its coordinator went away.
    Cancel { key: ClientKey },
    /// All links are up.
    Linked,
    /// The generation cannot go on.
    Fault { reason: String },
    /// Take nothing new; finish what runs.
    Drain,
    /// End the loop, behind everything that was told before.
    Stop,
}

/// What a head says of itself.
type Reports = (HeadReport, PrefixReport);

/// What a head is made of.
#[derive(Debug)]
pub struct HeadParts {
    /// Bounds and defaults.
    pub config: EngineConfig,
    /// Stage 0's queue.
    pub stage: mpsc::Sender<StageInput>,
    /// What comes back from the last stage.
    pub samples: mpsc::Receiver<Samples>,
    /// Told once, where the engine itself finds that the generation cannot go on.
    pub fault: mpsc::Sender<String>,
    /// The adapters that requests may name.
    pub served: Served,
    /// Where it tells of answers that are traced.
    pub tracer: Tracer,
}

/// A head that runs, as its shard sees it. Dropping it ends the loop and all its streams.
#[derive(Debug)]
pub struct Head {
    client: HeadClient,
    idle: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

/// A head, as the streams of coordinators and the reports see it.
#[derive(Clone, Debug)]
pub struct HeadClient {
    events: mpsc::Sender<Event>,
    report: watch::Receiver<Reports>,
    slow_readers: Arc<AtomicU64>,
    /// Whether it takes requests.
    open: Arc<AtomicBool>,
    context_max: u32,
}

impl Head {
    /// Starts the loop on `runtime`: where samples arrive, so that no token waits for another thread
    /// to wake. It refuses requests until `linked`.
    pub fn start(
        parts: HeadParts,
        runtime: &tokio::runtime::Handle,
    ) -> Result<Self, BadEngineConfig> {
        let context_max = parts.config.limits.context_max;
        let traces = HeadTraces::new(parts.tracer, parts.config.replica, parts.config.generation);
        let engine = Engine::new(EngineConfig { prefix_key: prefix_key(), ..parts.config })?;
        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        let (report_to, report) = watch::channel((engine.report(), engine.prefixes()));
        let (idle_to, idle) = watch::channel(true);
        let slow_readers = Arc::new(AtomicU64::new(0));
        let open = Arc::new(AtomicBool::new(false));
        let driver = Driver {
            engine,
            origin: std::time::Instant::now(),
            clients: HashMap::new(),
            heard: Vec::new(),
            stage: parts.stage,
            fault: parts.fault,
            served: parts.served,
            refuse: Some(not_ready()),
            faulted: false,
            retires: false,
            lateness: Lateness::default(),
            traces,
            report: report_to,
            idle: idle_to,
            slow_readers: Arc::clone(&slow_readers),
            open: Arc::clone(&open),
        };
        let task = runtime.spawn(driver.run(inbox, parts.samples));
        let client = HeadClient { events, report, slow_readers, open, context_max };
        Ok(Self { client, idle, task })
    }

    /// For streams and reports.
    pub fn client(&self) -> HeadClient {
        self.client.clone()
    }

    /// All links are up: requests may come.
    pub async fn linked(&self) {
        self.client.tell(Event::Linked).await;
    }

    /// Fails everything that runs, and everything that comes later.
    pub async fn fault(&self, reason: String) {
        self.client.tell(Event::Fault { reason }).await;
    }

    /// Takes nothing new, and waits until what runs has finished, at most `deadline`.
    pub async fn drain(&mut self, deadline: Duration) {
        self.client.tell(Event::Drain).await;
        let idle = self.idle.wait_for(|idle| *idle);
        if tokio::time::timeout(deadline, idle).await.is_err() {
            tracing::warn!("sequences were still running after {deadline:?}; they are failed");
        }
    }

    /// Ends the loop, behind what it was told before: streams get their last words.
    pub async fn stop(mut self) {
        self.client.tell(Event::Stop).await;
        match tokio::time::timeout(STOP_TIMEOUT, &mut self.task).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!("a head did not end by itself: {error}"),
            Err(_) => tracing::error!("a head did not end within {STOP_TIMEOUT:?}"),
        }
    }
}

impl Drop for Head {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl HeadClient {
    /// Brings a request; its events arrive on the receiver, the last of them `Done` or `Failed`. A
    /// receiver that closes without one was cancelled for reading too slowly, or the head has ended.
    pub async fn submit(
        &self,
        key: ClientKey,
        request: Generate,
        marks: Marks,
    ) -> mpsc::Receiver<HeadEvent> {
        let (tokens, receiver) = mpsc::channel(TOKENS_WAITING_MAX);
        let request = Box::new(request);
        self.tell(Event::Submit { key, request, marks, tokens }).await;
        receiver
    }

    /// The client went away.
    pub async fn cancel(&self, key: ClientKey) {
        self.tell(Event::Cancel { key }).await;
    }

    /// What the head reports.
    pub fn report(&self) -> HeadReport {
        self.report.borrow().0
    }

    /// What it reports of shared blocks.
    pub fn prefixes(&self) -> PrefixReport {
        self.report.borrow().1
    }

    /// Sequences that were cancelled because nobody read their tokens.
    pub fn slow_readers(&self) -> u64 {
        self.slow_readers.load(Ordering::Relaxed)
    }

    /// The longest sequence, in tokens: longer requests need not be read.
    pub fn context_max(&self) -> u32 {
        self.context_max
    }

    /// Whether it takes requests.
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// Whether both are of one head.
    pub(super) fn is(&self, other: &Self) -> bool {
        self.events.same_channel(&other.events)
    }

    async fn tell(&self, event: Event) {
        // It fails where the head has ended; its streams end then, too.
        let _ = self.events.send(event).await;
    }
}

struct Driver {
    engine: Engine,
    origin: std::time::Instant,
    clients: HashMap<ClientKey, mpsc::Sender<HeadEvent>>,
    /// What clients are to hear, kept for its memory: empty but within `act`.
    heard: Vec<(ClientKey, HeadEvent)>,
    stage: mpsc::Sender<StageInput>,
    fault: mpsc::Sender<String>,
    served: Served,
    /// Why new requests are turned away, while they are.
    refuse: Option<WireError>,
    faulted: bool,
    /// Whether it takes nothing new because its layout or its worker goes.
    retires: bool,
    lateness: Lateness,
    traces: HeadTraces,
    report: watch::Sender<Reports>,
    idle: watch::Sender<bool>,
    slow_readers: Arc<AtomicU64>,
    open: Arc<AtomicBool>,
}

impl Driver {
    async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut samples: mpsc::Receiver<Samples>,
    ) {
        let (mut samples_open, mut stopping) = (true, false);
        while !stopping {
            let wake = self.wake_at();
            tokio::select! {
                drawn = samples.recv(), if samples_open => match drawn {
                    Some(drawn) => self.absorb(drawn),
                    // The last stage is gone; the shard says so with words.
                    None => samples_open = false,
                },
                event = events.recv() => {
                    let Some(event) = event else { return };
                    stopping = self.take(event);
                    for _ in 1..EVENTS_AT_ONCE {
                        let Ok(event) = events.try_recv() else { break };
                        stopping |= self.take(event);
                    }
                }
                () = sleep_until(wake) => self.tick(),
            }
            self.act().await;
            self.report.send_replace((self.engine.report(), self.engine.prefixes()));
            self.idle.send_if_modified(|idle| {
                std::mem::replace(idle, self.engine.is_idle()) != self.engine.is_idle()
            });
        }
    }

    fn now(&self) -> Instant {
        Instant(self.origin.elapsed().as_micros() as u64)
    }

    fn wake_at(&self) -> Option<tokio::time::Instant> {
        let engine = self.engine.next_deadline();
        let at = engine.into_iter().chain(self.lateness.next_check()).min()?;
        Some((self.origin + Duration::from_micros(at.0)).into())
    }

    fn tick(&mut self) {
        let now = self.now();
        if let Some(late) = self.lateness.check(now) {
            tracing::warn!("{late}");
        }
        self.engine.handle(now, engine::Event::Tick);
    }

    fn absorb(&mut self, samples: Samples) {
        let now = self.now();
        self.lateness.landed(samples.step, now);
        self.traces.landed(samples.step);
        self.engine.handle(now, engine::Event::Samples(samples));
    }

    /// Takes an event; says whether it is the last one.
    fn take(&mut self, event: Event) -> bool {
        let now = self.now();
        match event {
            Event::Submit { key, request, marks, tokens } => match self.turned_away(&request) {
                Some(why) => refuse(&request, &why, &tokens),
                None => {
                    self.clients.insert(key, tokens);
                    if let Some(mark) = marks.trace {
                        self.traces.submitted(key, &request, mark);
                    }
                    let tenant = marks.tenant;
                    self.engine.handle(now, engine::Event::Submit { key, request, tenant });
                }
            },
            Event::Cancel { key } => self.cancel(key),
            Event::Linked => {
                if !self.faulted {
                    self.refuse = None;
                    self.open.store(true, Ordering::Relaxed);
                }
            }
            Event::Fault { reason } => {
                self.faulted = true;
                self.open.store(false, Ordering::Relaxed);
                let words = format!("{reason}; a new layout is on its way, try again");
                self.refuse = Some(WireError::new(ErrorCode::NotReady, words));
                self.lateness.clear();
                self.engine.handle(now, engine::Event::Fault { reason });
            }
            Event::Drain => {
                self.open.store(false, Ordering::Relaxed);
                self.retires = true;
                let words = "the worker is letting this replica go; try again";
                self.refuse = Some(WireError::new(ErrorCode::Draining, words));
            }
            Event::Stop => return true,
        }
        false
    }

    fn turned_away(&self, request: &Generate) -> Option<WireError> {
        self.refuse.clone().or_else(|| self.served.refusal(request.adapter))
    }

    fn cancel(&mut self, key: ClientKey) {
        self.clients.remove(&key);
        self.traces.cancelled(key);
        let now = self.now();
        self.engine.handle(now, engine::Event::Cancel { key });
    }

    /// Does what the engine wants: first what the stages wait for, then what clients hear, each in
    /// the engine's order. Waking a client's stream can cost this thread its core, and then a whole
    /// pipeline would stand still behind one token's way out.
    ///
    /// It may wait for room in stage 0's queue. That ends: the stages empty it without waiting for
    /// this loop, because the queue of samples has room for every step in flight.
    async fn act(&mut self) {
        loop {
            while let Some(action) = self.engine.poll_action() {
                self.act_on(action).await;
            }
            if self.heard.is_empty() {
                return;
            }
            let mut heard = std::mem::take(&mut self.heard);
            for (key, event) in heard.drain(..) {
                // A client that is gone is cancelled, which gives the engine more to do.
                self.emit(key, event);
            }
            self.heard = heard;
        }
    }

    async fn act_on(&mut self, action: Action) {
        let mut trace = None;
        let input = match action {
            Action::Open(open) => {
                trace = self.traces.opened(&open);
                StageInput::Open(open)
            }
            Action::Close(close) => {
                self.traces.closed(SequenceId(close.sequence));
                StageInput::Close(close)
            }
            Action::Issue { step, tokens } => {
                let (id, now) = (shoal_protocol::id::StepId(step.header.step), self.now());
                self.lateness.issued(id, now);
                self.traces.issued(&step);
                let records = records_of(&step);
                StageInput::Step { step, records, data: StepData::Tokens(tokens) }
            }
            Action::Emit { key, event } => return self.heard.push((key, event)),
            Action::Fault { reason } => {
                self.faulted = true;
                // One is enough: the shard stops at the first.
                let _ = self.fault.try_send(reason);
                return;
            }
        };
        // It fails where the stage has stopped; the shard says so with words.
        let _ = self.stage.send(input).await;
        if let Some(trace) = trace {
            let _ = self.stage.send(StageInput::Trace(trace)).await;
        }
    }

    fn emit(&mut self, key: ClientKey, mut event: HeadEvent) {
        if let HeadEvent::Failed { header, code, .. } = &mut event
            && self.retires
            && *code == ErrorCode::WorkerLost
        {
            // Nothing was lost: the layout has ended, and the answer goes on at another.
            *code = ErrorCode::Draining;
            header.code = u32::from(code.number());
        }
        self.traces.told(key, &event);
        let last = event.is_last();
        let Some(client) = self.clients.get(&key) else { return };
        match client.try_send(event) {
            Ok(()) if last => {
                self.clients.remove(&key);
            }
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Closed(_)) => self.cancel(key),
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.slow_readers.fetch_add(1, Ordering::Relaxed);
                tracing::info!("a stream was cancelled: {TOKENS_WAITING_MAX} tokens wait unread");
                self.cancel(key);
            }
        }
    }
}

/// What hashes of blocks begin with: nobody outside can make two contents look equal. Without randomness
/// nothing is shared, and all else goes on.
fn prefix_key() -> Option<[u8; 32]> {
    let mut key = [0; 32];
    getrandom::fill(&mut key).ok().map(|()| key)
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn not_ready() -> WireError {
    WireError::new(ErrorCode::NotReady, "the links between the stages are not up yet; try again")
}

/// Turns a request away on its own stream.
fn refuse(request: &Generate, why: &WireError, tokens: &mpsc::Sender<HeadEvent>) {
    // The channel is new, so it has room.
    let _ = tokens.try_send(failed(request, why));
}

/// The `Failed` event of a request.
pub(super) fn failed(request: &Generate, why: &WireError) -> HeadEvent {
    let header = FailedHeader {
        request: request.request.0,
        attempt: request.attempt.0,
        choice: request.choice,
        code: u32::from(why.code.number()),
        reserved: 0,
    };
    HeadEvent::Failed { header, code: why.code, message: why.message.clone() }
}
