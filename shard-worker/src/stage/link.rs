//! Activation links: the ring of QUIC streams that joins the stages of one replica.
//!
//! ```text
//!   ┌─► stage 0 ══Open·Step·Close══► stage 1 ══…══► stage n ─┐
//!   └──────────────────────Samples──────────────────────────-┘
//! ```
//!
//! Every stage dials the next one and is dialled by the one before; the last one dials the head. Where
//! stages have several ranks, `ring` says who dials whom, and the ranks of a stage are joined too. The
//! dialler says which link it is (`LinkHello`), the receiver compares that with its assignment and
//! with the certificate, and answers with a `LinkHello` of its own. Nobody else gets in.
//!
//! A worker has one endpoint for all its links, on a thread of its own, so that neither requests nor
//! reports delay a frame. A link that is lost stays lost: what was in flight is gone, so the shard
//! needs a new generation. Each end of a link watches the other one's pulse.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use shoal_protocol::id::RankIndex;
use shoal_protocol::quic::{
    Alpn, Connection, Endpoint, EndpointError, FrameReceiver, FrameSender, Identity, Loss, Pulse,
    close_code,
};
use shoal_protocol::trace::Tracer;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::counters::Counters;
use super::dial::dial;
use super::door::{Expected, Port, Waiting, accept_all};
use super::meet::Meeting;
use super::ring::{LinkPlan, Neighbour};
use super::ways::{Meter, Ways};
use super::wire::{self, Inlet, LinkEnd, LinkFrame, RankEnd};
use super::work::Work;

/// How long a link may take until it is said which worker does not come: most are up in much less, and what is
/// made of it (`LINKING` of the coordinator) takes longer.
const MISSED_AFTER: Duration = Duration::from_secs(2);

/// How long the words of a neighbour that has ended its stream are waited for.
const WORDS_TIMEOUT: Duration = Duration::from_millis(20);

/// Each link's coming up, and the loss of one: a shard's links have no more to say.
pub fn link_events_max(plan: &LinkPlan) -> usize {
    plan.links() + 1
}

/// What a shard hears of its links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// One more of [`LinkPlan::links`] is up.
    Up,
    /// A link is gone; the others have been closed too.
    Lost(LinkLost),
}

/// A link that is gone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", shoal_protocol::lost::message(.neighbour, .why))]
pub struct LinkLost {
    /// Who was at its other end.
    pub neighbour: Neighbour,
    /// Whether the neighbour broke the protocol, rather than being lost.
    pub violation: bool,
    /// How it was lost, where it said nothing.
    pub loss: Option<Loss>,
    /// What happened.
    pub why: String,
}

/// What a shard's links carry, and where to.
#[derive(Debug)]
pub struct LinkEnds {
    /// Where frames from upstream go.
    pub inlet: Inlet,
    /// Frames for each of the mirrors, then of the downstream neighbours, in the plan's order.
    pub outlets: Vec<mpsc::Receiver<LinkFrame>>,
    /// What is exchanged with each of the siblings, in the plan's order.
    pub siblings: Vec<RankEnd>,
    /// Where events go.
    pub events: mpsc::Sender<LinkEvent>,
    /// What the downstream link counts.
    pub counters: Arc<Counters>,
    /// How many sequences are open at the shard: while there are any, its neighbours are heard often.
    pub work: watch::Receiver<usize>,
}

/// A worker's `shoal-act` endpoint, on its own thread.
#[derive(Debug)]
pub struct Links {
    endpoint: Endpoint,
    runtime: tokio::runtime::Handle,
    waiting: Waiting,
    refused: Arc<AtomicU64>,
    suspicions: Arc<watch::Sender<u64>>,
    work: Work,
    tracer: Tracer,
    ways: Option<Ways>,
    may_meet: bool,
    stop: watch::Sender<bool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// No thread or no socket for activations.
#[derive(Debug, thiserror::Error)]
pub enum LinksError {
    /// The socket could not be opened.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The thread or its runtime could not be started.
    #[error("cannot start the thread for activations: {0}")]
    Thread(#[from] std::io::Error),
}

impl Links {
    /// Opens the endpoint and starts its thread.
    pub fn start(address: SocketAddr, identity: Arc<Identity>) -> Result<Self, LinksError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let endpoint = {
            let _inside = handle.enter();
            Endpoint::bind(address, identity, &[Alpn::Activations])?
        };
        let waiting = Waiting::default();
        let refused = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = watch::channel(false);
        let serve =
            accept_all(endpoint.clone(), Arc::clone(&waiting), Arc::clone(&refused), stopped);
        let thread = std::thread::Builder::new()
            .name("shoal-act".to_owned())
            .spawn(move || runtime.block_on(serve))?;
        let suspicions = Arc::new(watch::Sender::new(0));
        let thread = Some(thread);
        let (runtime, work, tracer, ways) = (handle, Work::default(), Tracer::off(), None);
        Ok(Self {
            endpoint,
            runtime,
            waiting,
            refused,
            suspicions,
            work,
            tracer,
            ways,
            may_meet: true,
            stop,
            thread,
        })
    }

    /// The same; the shards that are attached tell what they do for requests that are traced.
    pub fn tracing(mut self, tracer: Tracer) -> Self {
        self.tracer = tracer;
        self
    }

    /// The same; what links tell of their ways is noted there.
    pub fn measuring(mut self, ways: Ways) -> Self {
        self.ways = Some(ways);
        self
    }

    /// The same; ranks talk over links alone, as if each worker had a machine of its own.
    pub fn apart(mut self) -> Self {
        self.may_meet = false;
        self
    }

    /// Where shards give their spans.
    pub fn tracer(&self) -> &Tracer {
        &self.tracer
    }

    /// Where neighbours dial.
    pub fn address(&self) -> SocketAddr {
        self.endpoint.local_address()
    }

    /// The runtime of the endpoint's thread: for what must not wait for another thread to wake.
    pub fn runtime(&self) -> &tokio::runtime::Handle {
        &self.runtime
    }

    /// Shows this certificate to neighbours from now on; links that are there stay.
    pub fn renew(&self, identity: Arc<Identity>) -> Result<(), LinksError> {
        Ok(self.endpoint.renew(identity)?)
    }

    /// How many links were refused: wrong generation, wrong stage, or not that stage's worker.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Changes whenever a neighbour becomes a suspect, or is heard again.
    pub fn suspicions(&self) -> watch::Receiver<u64> {
        self.suspicions.subscribe()
    }

    /// What flows at all shards of this worker.
    pub fn work(&self) -> &Work {
        &self.work
    }

    /// Links a shard with its neighbours until the guard is dropped or a link is lost.
    pub fn attach(&self, plan: LinkPlan, ends: LinkEnds) -> Attached {
        let (leave, left) = oneshot::channel();
        let pulse = |_| Arc::new(Pulse::default().telling(Arc::clone(&self.suspicions)));
        let pulses: Vec<_> = (0..plan.links()).map(pulse).collect();
        ends.counters.watched(pulses.clone());
        let shard = LinkedShard {
            endpoint: self.endpoint.clone(),
            waiting: Arc::clone(&self.waiting),
            plan,
            events: ends.events.clone(),
            counters: Arc::clone(&ends.counters),
            work: ends.work.clone(),
            ways: self.ways.clone(),
            may_meet: self.may_meet,
            open: Mutex::default(),
        };
        Attached { leave: Some(leave), task: self.runtime.spawn(shard.run(ends, pulses, left)) }
    }

    /// Closes all links and ends the thread.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // The thread ends within `GOODBYE_TIMEOUT`; joining it must not block the runtime.
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::error!("the thread for activations panicked");
            }
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// A shard's place in the ring. Dropping it leaves the ring.
#[derive(Debug)]
pub struct Attached {
    leave: Option<oneshot::Sender<Goodbye>>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Goodbye {
    code: u32,
    reason: String,
}

impl Attached {
    /// Leaves the ring and tells the neighbours why. What was sent before may be lost.
    pub async fn leave(mut self, code: u32, reason: &str) {
        if let Some(leave) = self.leave.take() {
            // It fails where a lost link was faster.
            let _ = leave.send(Goodbye { code, reason: reason.to_owned() });
        }
        if let Err(error) = (&mut self.task).await
            && error.is_panic()
        {
            tracing::error!("a link task panicked: {error}");
        }
    }
}

/// A shard's links, from the first dial to the first loss.
struct LinkedShard {
    endpoint: Endpoint,
    waiting: Waiting,
    plan: LinkPlan,
    events: mpsc::Sender<LinkEvent>,
    counters: Arc<Counters>,
    work: watch::Receiver<usize>,
    ways: Option<Ways>,
    may_meet: bool,
    /// What is to be closed with words. Held for a push, never over an await.
    open: Mutex<Vec<Connection>>,
}

/// One link of a shard: it ends with its loss.
type Link<'a> = Pin<Box<dyn Future<Output = LinkLost> + Send + 'a>>;

impl LinkedShard {
    async fn run(self, ends: LinkEnds, pulses: Vec<Arc<Pulse>>, left: oneshot::Receiver<Goodbye>) {
        let LinkEnds { inlet, outlets, siblings, .. } = ends;
        let mut pulses = pulses.iter().map(|pulse| &**pulse);
        let mut links: FuturesUnordered<Link<'_>> = FuturesUnordered::new();
        for (from, pulse) in self.plan.upstream.iter().zip(&mut pulses) {
            links.push(Box::pin(self.receive(*from, &inlet, pulse)));
        }
        let to = self.plan.mirrors.iter().chain(&self.plan.downstream);
        for ((to, outlet), pulse) in to.zip(outlets).zip(&mut pulses) {
            links.push(Box::pin(self.send(*to, outlet, pulse)));
        }
        for ((with, end), pulse) in self.plan.siblings.iter().zip(siblings).zip(&mut pulses) {
            links.push(Box::pin(self.exchange(*with, end, pulse)));
        }
        let (goodbye, event) = tokio::select! {
            goodbye = left => {
                let reason = "the shard was withdrawn".to_owned();
                (goodbye.unwrap_or(Goodbye { code: close_code::STALE, reason }), None)
            }
            Some(lost) = links.next() => lost.event(),
        };
        drop(links);
        let (replica, generation) = (self.plan.replica, self.plan.generation);
        let is_own = |key: &(_, _, Port)| {
            (key.0, key.1) == (replica, generation)
                && (key.2.stage, key.2.rank.0) == (self.plan.stage, self.plan.split.rank)
        };
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).retain(|key, _| !is_own(key));
        for connection in self.open.into_inner().unwrap_or_else(PoisonError::into_inner) {
            connection.close(goodbye.code, &goodbye.reason);
        }
        if let Some(event) = event {
            let _ = self.events.send(event).await;
        }
    }

    async fn receive(&self, from: Neighbour, inlet: &Inlet, pulse: &Pulse) -> LinkLost {
        let (connection, mut sender, receiver) =
            self.missed(&from, self.accepted(from, false)).await;
        sender.finish();
        self.opened(&connection);
        self.up().await;
        let meter = self.meter(&from, &connection);
        let end = tokio::select! {
            end = wire::receive(receiver, inlet, &self.plan, pulse, meter) => end,
            silence = pulse.keep(&connection, self.work.clone()) => Err(LinkEnd::Silent(silence)),
        };
        from.ended(end, &connection).await
    }

    async fn send(
        &self,
        to: Neighbour,
        outlet: mpsc::Receiver<LinkFrame>,
        pulse: &Pulse,
    ) -> LinkLost {
        let dialled = dial(&self.endpoint, &self.plan, &to, false);
        let (connection, sender, _) = self.missed(&to, dialled).await;
        if to.stage != self.plan.stage {
            self.counters.linked(connection.clone());
        }
        self.opened(&connection);
        self.up().await;
        let watch = (pulse, self.meter(&to, &connection));
        let end = tokio::select! {
            end = wire::send(sender, &connection, outlet, &self.counters, watch) => end,
            silence = pulse.keep(&connection, self.work.clone()) => Err(LinkEnd::Silent(silence)),
        };
        to.ended(end, &connection).await
    }

    /// The lower rank dials.
    async fn exchange(&self, with: Neighbour, end: RankEnd, pulse: &Pulse) -> LinkLost {
        let dialler = self.plan.split.rank < with.rank.0;
        let (connection, mut sender, mut receiver) = match dialler {
            true => self.missed(&with, dial(&self.endpoint, &self.plan, &with, true)).await,
            false => self.missed(&with, self.accepted(with, true)).await,
        };
        self.opened(&connection);
        let RankEnd { told, heard, near, bytes_max } = end;
        let meeting = Meeting {
            connection: &connection,
            streams: (&mut sender, &mut receiver),
            generation: self.plan.generation.0,
            dialler,
            may: self.may_meet,
        };
        let mut guard = match meeting.meet(near, bytes_max).await {
            Ok(guard) => guard,
            Err(end) => return with.ended(Err(end), &connection).await,
        };
        self.up().await;
        let (streams, queues) = ((sender, receiver), (told, heard));
        let meters = [self.meter(&with, &connection), self.meter(&with, &connection)];
        let watch = (pulse, meters);
        let gone = async {
            match &mut guard {
                Some(guard) => guard.lost().await,
                None => std::future::pending().await,
            }
        };
        let end = tokio::select! {
            // First: a compute thread that has said so has ended, and its queues with it.
            biased;
            end = gone => Err(end),
            end = wire::exchange(streams, &connection, queues, bytes_max, &self.plan, watch) => end,
            silence = pulse.keep(&connection, self.work.clone()) => Err(LinkEnd::Silent(silence)),
        };
        with.ended(end, &connection).await
    }

    /// Waits until this neighbour has dialled us.
    async fn accepted(
        &self,
        from: Neighbour,
        of_ranks: bool,
    ) -> (Connection, FrameSender, FrameReceiver) {
        let (linked, link) = oneshot::channel();
        let port = Port {
            stage: self.plan.stage,
            rank: RankIndex(self.plan.split.rank),
            sibling: of_ranks.then_some(from.rank),
        };
        let key = (self.plan.replica, self.plan.generation, port);
        let expected = Expected { from, linked };
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(key, expected);
        match link.await {
            Ok(link) => link,
            // The sender is dropped only together with this shard's registration.
            Err(_) => std::future::pending().await,
        }
    }

    /// Says of whom it is that it does not come, where it does not come soon.
    async fn missed<T>(&self, whom: &Neighbour, link: impl Future<Output = T>) -> T {
        let late = async {
            tokio::time::sleep(MISSED_AFTER).await;
            let _missing = self.ways.as_ref().map(|ways| ways.missing(whom.node));
            std::future::pending().await
        };
        tokio::select! {
            link = link => link,
            link = late => link,
        }
    }

    fn meter(&self, with: &Neighbour, connection: &Connection) -> Meter {
        Meter::new(self.ways.clone(), with.node, connection.clone())
    }

    /// It is closed with words from now on.
    fn opened(&self, connection: &Connection) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).push(connection.clone());
    }

    async fn up(&self) {
        let _ = self.events.send(LinkEvent::Up).await;
    }
}

impl Neighbour {
    /// A link that has ended without an error belongs to a shard that has stopped: it knows why, and says
    /// goodbye with words.
    async fn ended(self, end: Result<(), LinkEnd>, connection: &Connection) -> LinkLost {
        match end {
            Ok(()) => std::future::pending().await,
            Err(end) => {
                if matches!(end, LinkEnd::Gone(_)) {
                    // Its words may be a packet behind the end of its stream.
                    let _ = tokio::time::timeout(WORDS_TIMEOUT, connection.closed()).await;
                }
                self.lost(end, connection)
            }
        }
    }

    fn lost(self, end: LinkEnd, connection: &Connection) -> LinkLost {
        let violation = matches!(end, LinkEnd::Violation(_));
        let loss = match &end {
            LinkEnd::Silent(silence) => Some(silence.loss),
            LinkEnd::Gone(_) | LinkEnd::Violation(_) => None,
        };
        // The connection knows more than the stream: whether it timed out, or the words of the peer.
        let why = match connection.close_reason() {
            Some(reason) if !violation => reason.to_string(),
            _ => end.to_string(),
        };
        LinkLost { neighbour: self, violation, loss, why }
    }
}

impl LinkLost {
    /// What the other neighbour and the shard are told.
    fn event(self) -> (Goodbye, Option<LinkEvent>) {
        let code = if self.violation { close_code::PROTOCOL } else { close_code::STALE };
        (Goodbye { code, reason: self.to_string() }, Some(LinkEvent::Lost(self)))
    }
}
