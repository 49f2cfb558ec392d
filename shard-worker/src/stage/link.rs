//! Activation links: the ring of QUIC streams that joins the stages of one replica.
//!
//! ```text
//!   ┌─► stage 0 ══Open·Step·Close══► stage 1 ══…══► stage n ─┐
//!   └──────────────────────Samples──────────────────────────-┘
//! ```
//!
//! Every stage dials the next one and is dialled by the one before; the last one dials the head. The
//! dialler says which link it is (`LinkHello`), the receiver compares that with its assignment and
//! with the certificate, and answers with a `LinkHello` of its own. Nobody else gets in.
//!
//! A worker has one endpoint for all its links, on a thread of its own, so that neither requests nor
//! reports delay a frame. A link that is lost stays lost: what was in flight is gone, so the shard
//! needs a new generation. Each end of a link watches the other one's pulse.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use shoal_protocol::activation::LinkHello;
use shoal_protocol::quic::{
    Alpn, Connection, Endpoint, EndpointError, Expect, FrameSender, Identity, Loss, Pulse,
    close_code,
};
use shoal_protocol::trace::Tracer;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::counters::Counters;
use super::door::{Expected, HELLO_TIMEOUT, Waiting, accept_all, read_hello, send_hello};
use super::ring::{LinkPlan, Neighbour};
use super::wire::{self, Inlet, LinkEnd, LinkFrame};
use super::work::Work;

/// The pause after the first failed dial; it doubles up to `REDIAL_PAUSE_MAX`. Neighbours load for
/// seconds to minutes, and nothing waits on a link that could be up.
const REDIAL_PAUSE_MIN: Duration = Duration::from_millis(20);

/// The longest pause between dials.
const REDIAL_PAUSE_MAX: Duration = Duration::from_millis(400);

/// Up, up, lost: a shard's links have no more to say.
pub const LINK_EVENTS_MAX: usize = 4;

/// What a shard hears of its links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// The stage before has dialled us.
    UpstreamUp,
    /// The next stage has let us in.
    DownstreamUp,
    /// A link is gone; the other one has been closed too.
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
    /// Frames for downstream.
    pub outlet: mpsc::Receiver<LinkFrame>,
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
        let (runtime, work, tracer) = (handle, Work::default(), Tracer::off());
        Ok(Self { endpoint, runtime, waiting, refused, suspicions, work, tracer, stop, thread })
    }

    /// The same; the shards that are attached tell what they do for requests that are traced.
    pub fn tracing(mut self, tracer: Tracer) -> Self {
        self.tracer = tracer;
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
        let pulse = || Arc::new(Pulse::default().telling(Arc::clone(&self.suspicions)));
        let pulses = [pulse(), pulse()];
        ends.counters.watched(pulses.clone());
        let waiting = Arc::clone(&self.waiting);
        let work = link_shard(self.endpoint.clone(), waiting, plan, ends, pulses, left);
        Attached { leave: Some(leave), task: self.runtime.spawn(work) }
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
async fn link_shard(
    endpoint: Endpoint,
    waiting: Waiting,
    plan: LinkPlan,
    ends: LinkEnds,
    [from_upstream, from_downstream]: [Arc<Pulse>; 2],
    left: oneshot::Receiver<Goodbye>,
) {
    let LinkEnds { inlet, outlet, events, counters, work } = ends;
    let key = (plan.replica, plan.generation, plan.stage);
    let (linked, upstream) = oneshot::channel();
    let expected = Expected { from: plan.upstream, linked };
    waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(key, expected);

    let mut open: [Option<Connection>; 2] = [None, None];
    let [upstream_open, downstream_open] = &mut open;
    let receive = async {
        // The sender is dropped only together with this task's registration.
        let Ok((connection, receiver)) = upstream.await else {
            return std::future::pending().await;
        };
        let connection = upstream_open.insert(connection);
        let _ = events.send(LinkEvent::UpstreamUp).await;
        let pulse = &*from_upstream;
        let end = tokio::select! {
            end = wire::receive(receiver, &inlet, &plan, pulse) => end,
            silence = pulse.keep(connection, work.clone()) => Err(LinkEnd::Silent(silence)),
        };
        match end {
            // The shard has stopped; it knows why, and says goodbye with words.
            Ok(()) => std::future::pending().await,
            Err(end) => plan.upstream.lost(end, connection),
        }
    };
    let send = async {
        let (connection, sender) = dial(&endpoint, &plan).await;
        let connection = downstream_open.insert(connection);
        counters.linked(connection.clone());
        let _ = events.send(LinkEvent::DownstreamUp).await;
        let pulse = &*from_downstream;
        let end = tokio::select! {
            end = wire::send(sender, connection, outlet, &counters, pulse) => end,
            silence = pulse.keep(connection, work.clone()) => Err(LinkEnd::Silent(silence)),
        };
        match end {
            Ok(()) => std::future::pending().await,
            Err(end) => plan.downstream.lost(end, connection),
        }
    };
    let (goodbye, event) = tokio::select! {
        goodbye = left => {
            let reason = "the shard was withdrawn".to_owned();
            (goodbye.unwrap_or(Goodbye { code: close_code::STALE, reason }), None)
        }
        lost = receive => lost.event(),
        lost = send => lost.event(),
    };
    waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
    for connection in open.into_iter().flatten() {
        connection.close(goodbye.code, &goodbye.reason);
    }
    if let Some(event) = event {
        let _ = events.send(event).await;
    }
}

impl Neighbour {
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

/// Dials the next stage until it lets us in. The caller drops the future when the shard is withdrawn.
async fn dial(endpoint: &Endpoint, plan: &LinkPlan) -> (Connection, FrameSender) {
    let mut pause = REDIAL_PAUSE_MIN;
    loop {
        match dial_once(endpoint, plan).await {
            Ok(link) => return link,
            Err(why) => tracing::debug!(
                replica = %plan.replica, generation = %plan.generation,
                "no link to {} yet: {why}", plan.downstream
            ),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(REDIAL_PAUSE_MAX);
    }
}

async fn dial_once(
    endpoint: &Endpoint,
    plan: &LinkPlan,
) -> Result<(Connection, FrameSender), String> {
    let to = plan.downstream;
    let connection = endpoint
        .connect(to.address, Expect::Node(to.node), Alpn::Activations, HELLO_TIMEOUT)
        .await
        .map_err(|error| error.to_string())?;
    let greet = async {
        let (mut sender, mut receiver) = connection.open_bi().await.map_err(|e| e.to_string())?;
        let hello = plan.hello_to(to.stage);
        send_hello(&mut sender, &hello).await.map_err(|e| e.to_string())?;
        let answer = read_hello(&mut receiver).await.map_err(|e| e.to_string())?;
        let expected =
            LinkHello { from_stage: hello.to_stage, to_stage: hello.from_stage, ..hello };
        if answer != expected {
            return Err(format!("it answered {answer:?}"));
        }
        Ok(sender)
    };
    match tokio::time::timeout(HELLO_TIMEOUT, greet).await {
        Ok(Ok(sender)) => Ok((connection, sender)),
        Ok(Err(why)) => {
            connection.close(close_code::PROTOCOL, "no LinkHello in answer");
            Err(why)
        }
        Err(_) => {
            connection.close(close_code::PROTOCOL, "no LinkHello in answer");
            Err(format!("no answer within {HELLO_TIMEOUT:?}"))
        }
    }
}
