//! Who gets into the ring: neighbours dial, say which link they are, and are let in where a shard
//! waits for exactly them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use shoal_protocol::activation::LinkHello;
use shoal_protocol::frame::{Flat, FrameError, FrameKind};
use shoal_protocol::id::{Generation, NodeId, RankIndex, ReplicaId, StageIndex};
use shoal_protocol::quic::{
    Accepting, Connection, Endpoint, FrameReceiver, FrameSender, RecvError, SendError, close_code,
};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::task::JoinSet;

use super::ring::Neighbour;

/// How long a peer may take to say which link it is, and to answer. Beyond the handshake this is one
/// round trip.
pub(super) const HELLO_TIMEOUT: Duration = Duration::from_secs(2);

/// Links that say hello at once. A worker has a few for each shard, and only members of the cluster get
/// so far: strangers are counted by the endpoint, where their handshakes are.
const HELLOS_MAX: usize = 64;

/// How long peers are given to hear of the end when the process stops.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(300);

/// Links for which a shard of this worker waits. Held for one look-up, never over an await.
/// A replica that moves has two generations at once.
pub(super) type Waiting = Arc<Mutex<HashMap<(ReplicaId, Generation, Port), Expected>>>;

/// A place of a shard that one link fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Port {
    pub stage: StageIndex,
    pub rank: RankIndex,
    /// Of a link between ranks: the other one.
    pub sibling: Option<RankIndex>,
}

#[derive(Debug)]
pub(super) struct Expected {
    pub from: Neighbour,
    pub linked: oneshot::Sender<(Connection, FrameSender, FrameReceiver)>,
}

/// Lets in the stages that are expected until told to stop.
pub(super) async fn accept_all(
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
    if let Err(error) = send_hello(&mut sender, &hello.answer()).await {
        // The dialler has not heard that it is in, and will knock again.
        expect_again(waiting, &hello, expected);
        return Err(error.into());
    }
    // It fails where the shard has just been withdrawn: dropping the connection tells the peer.
    let _ = expected.linked.send((connection, sender, receiver));
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
        let same = |(replica, _, port): &(_, _, _)| (*replica, *port) == (key.0, key.2);
        let why = match waiting.keys().any(same) {
            true => "another generation is assigned here",
            false => "that stage waits for no link here",
        };
        return Err((close_code::STALE, why));
    };
    if expected.from.stage.0 != hello.from_stage {
        return Err((close_code::REFUSED, "another stage is expected on this link"));
    }
    if expected.from.rank != hello.from_rank() {
        return Err((close_code::REFUSED, "another rank is expected on this link"));
    }
    if Some(expected.from.node) != peer {
        return Err((close_code::REFUSED, "that stage belongs to another worker"));
    }
    waiting.remove(&key).ok_or((close_code::STALE, "that stage waits for no link here"))
}

/// The place that a link is for.
fn place_of(hello: &LinkHello) -> (ReplicaId, Generation, Port) {
    let of_ranks = hello.ranks & LinkHello::OF_RANKS != 0;
    let port = Port {
        stage: StageIndex(hello.to_stage),
        rank: hello.to_rank(),
        sibling: of_ranks.then(|| hello.from_rank()),
    };
    (ReplicaId(hello.replica), Generation(hello.generation), port)
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

pub(super) async fn read_hello(receiver: &mut FrameReceiver) -> Result<LinkHello, RecvError> {
    let head = receiver.next().await?.ok_or(RecvError::Truncated)?;
    if head.kind != FrameKind::LinkHello {
        return Err(FrameError::UnexpectedKind { found: head.kind, expected: "LinkHello" }.into());
    }
    head.body_within(0)?;
    Ok(LinkHello::read_from(head.header())?)
}

pub(super) async fn send_hello(
    sender: &mut FrameSender,
    hello: &LinkHello,
) -> Result<(), SendError> {
    sender.send(FrameKind::LinkHello, hello, bytes::Bytes::new(), bytes::Bytes::new()).await
}
