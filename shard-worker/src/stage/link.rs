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
//! needs a new generation.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use shoal_protocol::activation::LinkHello;
use shoal_protocol::frame::{Flat, FrameError, FrameKind};
use shoal_protocol::id::{Generation, NodeId, ReplicaId, StageIndex};
use shoal_protocol::quic::{
    Accepting, Alpn, Connection, Endpoint, EndpointError, Expect, FrameReceiver, FrameSender,
    Identity, RecvError, SendError, close_code,
};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::counters::Counters;
use super::ring::{LinkPlan, Neighbour};
use super::wire::{self, Inlet, LinkEnd, LinkFrame};

/// How long a peer may take to say which link it is, and to answer. Beyond the handshake this is one
/// round trip.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);

/// The pause after the first failed dial; it doubles up to `REDIAL_PAUSE_MAX`. Neighbours load for
/// seconds to minutes, and nothing waits on a link that could be up.
const REDIAL_PAUSE_MIN: Duration = Duration::from_millis(20);

/// The longest pause between dials.
const REDIAL_PAUSE_MAX: Duration = Duration::from_millis(400);

/// Links that say hello at once. A worker has two for each shard, and only members of the cluster get
/// so far: strangers are counted by the endpoint, where their handshakes are.
const HELLOS_MAX: usize = 64;

/// Up, up, lost: a shard's links have no more to say.
pub const LINK_EVENTS_MAX: usize = 4;

/// How long peers are given to hear of the end when the process stops.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(300);

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
#[error("the link to {neighbour} is gone: {why}")]
pub struct LinkLost {
    /// Who was at its other end.
    pub neighbour: Neighbour,
    /// Whether the neighbour broke the protocol, rather than being lost.
    pub violation: bool,
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
}

/// A worker's `shoal-act` endpoint, on its own thread.
#[derive(Debug)]
pub struct Links {
    endpoint: Endpoint,
    runtime: tokio::runtime::Handle,
    waiting: Waiting,
    refused: Arc<AtomicU64>,
    stop: watch::Sender<bool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Shards whose upstream has not dialled yet. Held for one look-up, never over an await.
/// A replica that moves has two generations at once.
type Waiting = Arc<Mutex<HashMap<(ReplicaId, Generation, StageIndex), Expected>>>;

#[derive(Debug)]
struct Expected {
    from: Neighbour,
    linked: oneshot::Sender<(Connection, FrameReceiver)>,
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
        Ok(Self { endpoint, runtime: handle, waiting, refused, stop, thread: Some(thread) })
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

    /// Links a shard with its neighbours until the guard is dropped or a link is lost.
    pub fn attach(&self, plan: LinkPlan, ends: LinkEnds) -> Attached {
        let (leave, left) = oneshot::channel();
        let work = link_shard(self.endpoint.clone(), Arc::clone(&self.waiting), plan, ends, left);
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

/// Lets in the stages that are expected until told to stop.
async fn accept_all(
    endpoint: Endpoint,
    waiting: Waiting,
    refused: Arc<AtomicU64>,
    mut stop: watch::Receiver<bool>,
) {
    let mut handshakes = JoinSet::new();
    let places = Arc::new(Semaphore::new(HELLOS_MAX));
    loop {
        tokio::select! {
            accepting = endpoint.accept() => {
                let Some(accepting) = accepting else { break };
                let (waiting, refused) = (Arc::clone(&waiting), Arc::clone(&refused));
                let places = Arc::clone(&places);
                handshakes.spawn(async move {
                    if let Err(error) = accept_one(accepting, &waiting, &places).await {
                        refused.fetch_add(1, Ordering::Relaxed);
                        tracing::debug!("link refused: {error}");
                    }
                });
            }
            Some(done) = handshakes.join_next() => {
                if let Err(error) = done {
                    tracing::error!("a link handshake panicked: {error}");
                }
            }
            // An error means that the owner is gone, which is the same.
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    handshakes.shutdown().await;
    endpoint.close(close_code::DRAINING, "the worker is stopping");
    endpoint.drained(GOODBYE_TIMEOUT).await;
}

/// A link that was not let in.
#[derive(Debug, thiserror::Error)]
enum HelloError {
    #[error(transparent)]
    Accept(#[from] shoal_protocol::quic::AcceptError),
    #[error("{0}")]
    Connection(String),
    #[error(transparent)]
    Receive(#[from] RecvError),
    #[error(transparent)]
    Send(#[from] SendError),
    #[error("no hello within {HELLO_TIMEOUT:?}")]
    Timeout,
    #[error("{peer} says that it is {hello:?}: {why}")]
    NotExpected { peer: NodeId, hello: LinkHello, why: &'static str },
}

async fn accept_one(
    accepting: Accepting,
    waiting: &Waiting,
    places: &Semaphore,
) -> Result<(), HelloError> {
    let connection = accepting.establish().await?;
    let Ok(_place) = places.try_acquire() else {
        connection.close(close_code::REFUSED, "too many links at once; try again");
        return Err(HelloError::Connection(format!("{HELLOS_MAX} others say hello")));
    };
    let greeted = async {
        let (sender, mut receiver) =
            connection.accept_bi().await.map_err(|e| HelloError::Connection(e.to_string()))?;
        let hello = read_hello(&mut receiver).await?;
        Ok::<_, HelloError>((sender, receiver, hello))
    };
    let greeted = tokio::time::timeout(HELLO_TIMEOUT, greeted).await;
    let (mut sender, receiver, hello) = match greeted.unwrap_or(Err(HelloError::Timeout)) {
        Ok(greeted) => greeted,
        Err(error) => {
            connection.close(close_code::PROTOCOL, "a LinkHello was expected");
            return Err(error);
        }
    };
    let expected = match expected_by(waiting, &hello, connection.peer()) {
        Ok(expected) => expected,
        Err((code, why)) => {
            connection.close(code, why);
            let peer = connection.peer().unwrap_or(NodeId::worker(0));
            return Err(HelloError::NotExpected { peer, hello, why });
        }
    };
    let answer = LinkHello { from_stage: hello.to_stage, to_stage: hello.from_stage, ..hello };
    if let Err(error) = send_hello(&mut sender, &answer).await {
        // The dialler has not heard that it is in, and will knock again.
        expect_again(waiting, &hello, expected);
        return Err(error.into());
    }
    sender.finish();
    // It fails where the shard has just been withdrawn: dropping the connection tells the peer.
    let _ = expected.linked.send((connection, receiver));
    Ok(())
}

/// Takes the place that this hello may fill, or says why there is none.
fn expected_by(
    waiting: &Waiting,
    hello: &LinkHello,
    peer: Option<NodeId>,
) -> Result<Expected, (u32, &'static str)> {
    let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
    let key = place_of(hello);
    let Some(expected) = waiting.get(&key) else {
        let same = |(replica, _, stage): &(_, _, _)| (*replica, *stage) == (key.0, key.2);
        let why = match waiting.keys().any(same) {
            true => "another generation is assigned here",
            false => "that stage waits for no link here",
        };
        return Err((close_code::STALE, why));
    };
    if expected.from.stage.0 != hello.from_stage {
        return Err((close_code::REFUSED, "another stage is expected on this link"));
    }
    if Some(expected.from.node) != peer {
        return Err((close_code::REFUSED, "that stage belongs to another worker"));
    }
    waiting.remove(&key).ok_or((close_code::STALE, "that stage waits for no link here"))
}

/// The place that a link is for.
fn place_of(hello: &LinkHello) -> (ReplicaId, Generation, StageIndex) {
    (ReplicaId(hello.replica), Generation(hello.generation), StageIndex(hello.to_stage))
}

/// Gives a place back that was taken for a link that did not come about.
fn expect_again(waiting: &Waiting, hello: &LinkHello, expected: Expected) {
    let key = place_of(hello);
    let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
    // A shard that has left since is not brought back, and a newer one's place is its own.
    if !expected.linked.is_closed() {
        waiting.entry(key).or_insert(expected);
    }
}

async fn read_hello(receiver: &mut FrameReceiver) -> Result<LinkHello, RecvError> {
    let head = receiver.next().await?.ok_or(RecvError::Truncated)?;
    if head.kind != FrameKind::LinkHello {
        return Err(FrameError::UnexpectedKind { found: head.kind, expected: "LinkHello" }.into());
    }
    head.body_within(0)?;
    Ok(LinkHello::read_from(head.header())?)
}

async fn send_hello(sender: &mut FrameSender, hello: &LinkHello) -> Result<(), SendError> {
    sender.send(FrameKind::LinkHello, hello, bytes::Bytes::new(), bytes::Bytes::new()).await
}

/// A shard's links, from the first dial to the first loss.
async fn link_shard(
    endpoint: Endpoint,
    waiting: Waiting,
    plan: LinkPlan,
    ends: LinkEnds,
    left: oneshot::Receiver<Goodbye>,
) {
    let LinkEnds { inlet, outlet, events, counters } = ends;
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
        match wire::receive(receiver, &inlet, &plan).await {
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
        match wire::send(sender, connection, outlet, &counters).await {
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
        // The connection knows more than the stream: whether it timed out, or the words of the peer.
        let why = match connection.close_reason() {
            Some(reason) if !violation => reason.to_string(),
            _ => end.to_string(),
        };
        LinkLost { neighbour: self, violation, why }
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
