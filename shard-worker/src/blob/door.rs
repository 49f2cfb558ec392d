//! ● The `shoal-blob` endpoint: gives chunks to other workers, and gets chunks from them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use shoal_protocol::blob::ModelCache;
use shoal_protocol::frame::FrameKind;
use shoal_protocol::id::NodeId;
use shoal_protocol::quic::{
    Accepting, Alpn, Connection, Endpoint, EndpointError, Expect, FrameReceiver, FrameSender,
    Identity, close_code,
};
use shoal_protocol::weights::{ASK_LEN_MAX, ChunkAsk, ChunkReply};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::{BlobsError, Vouched};
use crate::stage::Ways;

/// How long another worker may take to let us in.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a chunk may take, from the question to its last byte: 4 MiB at half a MiB a second.
const FETCH_TIMEOUT: Duration = Duration::from_secs(8);

/// How long whoever has begun a stream may take to ask, and to take what it asked for.
const SERVE_TIMEOUT: Duration = Duration::from_secs(20);

/// How long whoever asks may be unknown.
const VOUCH_PATIENCE: Duration = Duration::from_secs(1);

/// Chunks that are given at once, each held in memory: what keeps a fast link busy.
const GIVEN_AT_ONCE: usize = 16;

/// How long peers are given to hear of the end.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(300);

/// Both sides of it, on a thread of its own.
#[derive(Debug)]
pub(super) struct Door {
    endpoint: Endpoint,
    runtime: tokio::runtime::Handle,
    connections: Mutex<BTreeMap<NodeId, Connection>>,
    /// Whom this worker could not reach when it last tried: each is told of once.
    unreached: Mutex<BTreeSet<NodeId>>,
    given: Arc<AtomicU64>,
    ways: OnceLock<Ways>,
    stop: watch::Sender<bool>,
}

impl Door {
    /// Opens the endpoint and starts its thread.
    pub fn open(
        address: SocketAddr,
        identity: Arc<Identity>,
        (cache, vouched): (ModelCache, watch::Receiver<Vouched>),
    ) -> Result<Self, BlobsError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let endpoint = {
            let _inside = handle.enter();
            Endpoint::bind(address, identity, &[Alpn::Blobs])?
        };
        let (stop, stopped) = watch::channel(false);
        let given = Arc::new(AtomicU64::new(0));
        let giving = Giving {
            cache,
            vouched,
            places: Arc::new(Semaphore::new(GIVEN_AT_ONCE)),
            given: Arc::clone(&given),
        };
        let serve = accept_all(endpoint.clone(), giving, stopped);
        std::thread::Builder::new()
            .name("shoal-blob".to_owned())
            .spawn(move || runtime.block_on(serve))?;
        let (connections, unreached, ways) = (Mutex::default(), Mutex::default(), OnceLock::new());
        Ok(Self { endpoint, runtime: handle, connections, unreached, given, ways, stop })
    }

    pub fn address(&self) -> SocketAddr {
        self.endpoint.local_address()
    }

    pub fn given(&self) -> u64 {
        self.given.load(Ordering::Relaxed)
    }

    pub fn renew(&self, identity: Arc<Identity>) -> Result<(), EndpointError> {
        self.endpoint.renew(identity)
    }

    /// Notes there what chunks tell of the ways; once.
    pub fn measure(&self, ways: Ways) {
        let _ = self.ways.set(ways);
    }

    /// Gets a chunk of exactly so many bytes. Blocks; not for a thread of a runtime.
    pub fn fetch(
        &self,
        node: NodeId,
        address: SocketAddr,
        ask: ChunkAsk,
        len: u64,
    ) -> Result<Vec<u8>, String> {
        let fetch = async {
            let connection = self.connection(node, address).await?;
            let fetched = tokio::time::timeout(FETCH_TIMEOUT, fetch(&connection, ask, len)).await;
            if let (Some(ways), Ok(Ok((chunk, took)))) = (self.ways.get(), &fetched) {
                // With whatever else comes from there at the same time.
                ways.transferred(node, chunk.len(), *took);
            }
            let result = fetched.map(|fetched| fetched.map(|(chunk, _)| chunk));
            let result = result.unwrap_or_else(|_| {
                Err(format!("it did not give a chunk of {len} bytes within {FETCH_TIMEOUT:?}"))
            });
            if result.is_err() {
                self.lock().remove(&node);
            }
            result
        };
        self.runtime.block_on(fetch)
    }

    async fn connection(&self, node: NodeId, at: SocketAddr) -> Result<Connection, String> {
        let open = self.lock().get(&node).cloned();
        if let Some(connection) = open.filter(|open| open.remote_address() == at) {
            return Ok(connection);
        }
        let expect = Expect::Node(node);
        let connected = self.endpoint.connect(at, expect, Alpn::Blobs, CONNECT_TIMEOUT).await;
        let is_reached = connected.is_ok();
        let connection = connected.map_err(|error| {
            if self.is_news(node, is_reached) {
                tracing::warn!(
                    "{node} cannot be reached for weights at {at} (UDP), so they come from others or \
                     from the origin: {error}; open that port, or start that worker with --blobs and, \
                     where it is reached elsewhere, --advertise-blobs"
                );
            }
            error.to_string()
        })?;
        self.is_news(node, is_reached);
        self.lock().insert(node, connection.clone());
        Ok(connection)
    }

    /// Whether it was not known that a worker can be reached, or cannot.
    fn is_news(&self, node: NodeId, is_reached: bool) -> bool {
        let mut unreached = self.unreached.lock().unwrap_or_else(PoisonError::into_inner);
        match is_reached {
            true => unreached.remove(&node),
            false => unreached.insert(node),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Connection>> {
        // Nothing under the lock panics half-way.
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // The thread ends by itself, and nobody waits for it.
        self.stop.send_replace(true);
    }
}

/// The chunk, and how long its body took: what its giver's disk took is before that.
async fn fetch(
    connection: &Connection,
    ask: ChunkAsk,
    len: u64,
) -> Result<(Vec<u8>, Duration), String> {
    let broken = |error: &dyn std::fmt::Display| error.to_string();
    let (mut sender, mut receiver) = connection.open_bi().await.map_err(|e| broken(&e))?;
    sender.send_message(&ask, ASK_LEN_MAX).await.map_err(|e| broken(&e))?;
    sender.finish();
    match receiver.message(ASK_LEN_MAX).await.map_err(|e| broken(&e))? {
        Some(ChunkReply::Here { len: said }) if u64::from(said) == len => {}
        Some(ChunkReply::Here { len: said }) => {
            return Err(format!("it says that the chunk has {said} bytes; it has {len}"));
        }
        Some(ChunkReply::NotHere) => return Err("it does not have what it said".to_owned()),
        None => return Err("it ended the answer before it".to_owned()),
    }
    let head = receiver.next().await.map_err(|e| broken(&e))?;
    let head = head.ok_or("it ended the answer before the chunk")?;
    if head.body_len as u64 != len {
        return Err(format!("it sends {} bytes of a chunk of {len}", head.body_len));
    }
    let begun = Instant::now();
    let chunk = receiver.body(&head, len as usize).await.map_err(|e| broken(&e))?;
    Ok((chunk, begun.elapsed()))
}

/// What is given, and how much of it at once.
#[derive(Clone, Debug)]
struct Giving {
    cache: ModelCache,
    vouched: watch::Receiver<Vouched>,
    places: Arc<Semaphore>,
    given: Arc<AtomicU64>,
}

async fn accept_all(endpoint: Endpoint, giving: Giving, mut stop: watch::Receiver<bool>) {
    let mut peers = JoinSet::new();
    loop {
        tokio::select! {
            accepting = endpoint.accept() => {
                let Some(accepting) = accepting else { return };
                peers.spawn(serve(accepting, giving.clone()));
            }
            Some(_) = peers.join_next() => {}
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    endpoint.close(close_code::DONE, "the worker is stopping");
    endpoint.drained(GOODBYE_TIMEOUT).await;
}

async fn serve(accepting: Accepting, giving: Giving) {
    let connection = match accepting.establish().await {
        Ok(connection) => connection,
        Err(error) => return tracing::debug!("a connection is refused: {error}"),
    };
    // An endpoint lets nobody begin this conversation without a certificate.
    let Some(node) = connection.peer() else { return };
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            stream = connection.accept_bi() => {
                let Ok((sender, receiver)) = stream else { return };
                // The transport bounds how many streams a peer may have open.
                streams.spawn(give(node, sender, receiver, giving.clone()));
            }
            Some(_) = streams.join_next() => {}
        }
    }
}

async fn give(node: NodeId, sender: FrameSender, receiver: FrameReceiver, giving: Giving) {
    let answered = answer(node, sender, receiver, giving);
    if tokio::time::timeout(SERVE_TIMEOUT, answered).await.is_err() {
        tracing::debug!("a chunk was not taken within {SERVE_TIMEOUT:?}");
    }
}

async fn answer(
    node: NodeId,
    mut sender: FrameSender,
    mut receiver: FrameReceiver,
    mut giving: Giving,
) {
    let Ok(Some(ask)) = receiver.message::<ChunkAsk>(ASK_LEN_MAX).await else { return };
    // Whoever asks has been told of us by a coordinator, which may be telling us of it right now.
    let known = giving.vouched.wait_for(|vouched| vouched.contains_key(&(ask.key, node)));
    let known = tokio::time::timeout(VOUCH_PATIENCE, known).await.is_ok_and(|known| known.is_ok());
    let Ok(_place) = giving.places.acquire().await else { return };
    let cache = giving.cache.clone();
    let bytes = match known {
        true => tokio::task::spawn_blocking(move || cache.chunk(ask.key, ask.chunk)).await,
        false => Ok(None),
    };
    let Some(bytes) = bytes.ok().flatten() else {
        if sender.send_message(&ChunkReply::NotHere, ASK_LEN_MAX).await.is_ok() {
            sender.finish();
        }
        return;
    };
    // A chunk is 4 MiB.
    let len = bytes.len() as u32;
    if sender.send_message(&ChunkReply::Here { len }, ASK_LEN_MAX).await.is_ok()
        && sender.send_encoded(FrameKind::Message, &[], bytes).await.is_ok()
    {
        giving.given.fetch_add(u64::from(len), Ordering::Relaxed);
        sender.finish();
        sender.stopped().await;
    }
}
