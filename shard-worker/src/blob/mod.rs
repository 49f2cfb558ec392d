//! Chunks of weights between workers: an endpoint (`shoal-blob`) with a thread of its own, so that gigabytes
//! delay no activation; what this worker has and wants, told to every coordinator; and what it hears of
//! others.
//!
//! ```text
//! Models::load ─► Blobs::fill ─► Swarming (Peers) ─► door::fetch ══shoal-blob══► door::serve ─► ModelCache
//!                      ▲ hear            │ news                    another worker
//!        coordinators ─┘◄────────────────┘
//! ```

mod door;
mod news;
mod swarming;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shoal_protocol::blob::{BlobError, Filling, ModelCache, Wanted};
use shoal_protocol::id::NodeId;
use shoal_protocol::plan::ModelSource;
use shoal_protocol::quic::{EndpointError, Identity};
use shoal_protocol::weights::{BlobNews, ModelKey};
use tokio::sync::watch;

use self::door::Door;
pub use self::news::{Cursor, NewsLog, Telling, more};
use self::swarming::Swarming;
use crate::stage::Ways;

/// The most models of which others are listened to: as many as a worker could hold shards of.
const MODELS_MAX: usize = 1024;

/// No thread or no socket for chunks.
#[derive(Debug, thiserror::Error)]
pub enum BlobsError {
    /// The socket could not be opened.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The thread or its runtime could not be started.
    #[error("cannot start the thread for chunks of weights: {0}")]
    Thread(#[from] std::io::Error),
}

/// A worker's part in passing weights on. Clones are the same.
#[derive(Clone, Debug)]
pub struct Blobs(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    me: NodeId,
    cache: ModelCache,
    door: Arc<Door>,
    /// Where others are told that it is, if that is not where it listens.
    advertise: Option<SocketAddr>,
    news: Arc<NewsLog>,
    swarms: Mutex<BTreeMap<ModelKey, Arc<Swarming>>>,
    vouched: watch::Sender<Vouched>,
}

/// Who wants or has which model, and the coordinators that said so. Nobody else is given any of it: a
/// worker that was removed may still have a certificate.
type Vouched = BTreeMap<(ModelKey, NodeId), BTreeSet<NodeId>>;

impl Blobs {
    /// Opens the endpoint and begins to give what the cache has; others are told to find it at
    /// `advertise`.
    pub fn start(
        (address, advertise): (SocketAddr, Option<SocketAddr>),
        identity: Arc<Identity>,
        cache: ModelCache,
    ) -> Result<Self, BlobsError> {
        let me = identity.node;
        let vouched = watch::Sender::new(Vouched::new());
        let door = Door::open(address, identity, (cache.clone(), vouched.subscribe()))?;
        let (door, (news, swarms)) = (Arc::new(door), Default::default());
        Ok(Self(Arc::new(Inner { me, cache, door, advertise, news, swarms, vouched })))
    }

    /// The same; what transfers tell of the ways is noted there.
    pub fn measuring(self, ways: Ways) -> Self {
        self.0.door.measure(ways);
        self
    }

    /// Where others find it.
    pub fn address(&self) -> SocketAddr {
        self.0.advertise.unwrap_or(self.0.door.address())
    }

    /// What there is to say to coordinators.
    pub fn news(&self) -> &Arc<NewsLog> {
        &self.0.news
    }

    /// Bytes of chunks that were given to others.
    pub fn given(&self) -> u64 {
        self.0.door.given()
    }

    /// Shows this certificate from now on.
    pub fn renew(&self, identity: Arc<Identity>) -> Result<(), BlobsError> {
        Ok(self.0.door.renew(identity)?)
    }

    /// Takes what a coordinator passes on. A worker is gone once all who spoke of it say so.
    pub fn hear(&self, coordinator: NodeId, said: Vec<(NodeId, SocketAddr, BlobNews)>) {
        for (node, address, news) in said {
            let key = news.key();
            let Some(swarming) = self.swarming(key).filter(|_| news.is_bounded()) else { continue };
            let mut left = true;
            self.0.vouched.send_modify(|vouched| match &news {
                BlobNews::Gone { .. } => {
                    let by = vouched.entry((key, node)).or_default();
                    by.remove(&coordinator);
                    left = !by.is_empty();
                    if !left {
                        vouched.remove(&(key, node));
                    }
                }
                BlobNews::Wants { .. } | BlobNews::Has { .. } => {
                    vouched.entry((key, node)).or_default().insert(coordinator);
                }
            });
            match news {
                BlobNews::Gone { .. } if left => {}
                news => swarming.hear(node, address, news),
            }
        }
    }

    /// Brings these ranges of a pinned model here, from whoever has them nearest. Blocks.
    pub fn fill(
        &self,
        source: &ModelSource,
        wanted: &[Wanted],
        filling: &Filling<'_>,
    ) -> Result<(), BlobError> {
        let Inner { cache, .. } = &*self.0;
        match self.swarming(cache.key(source)?) {
            Some(swarming) => cache.fill_with(source, wanted, &*swarming, filling),
            None => cache.fill(source, wanted, filling),
        }
    }

    fn swarming(&self, key: ModelKey) -> Option<Arc<Swarming>> {
        let Inner { me, door, news, .. } = &*self.0;
        let mut swarms = self.swarms();
        if swarms.len() >= MODELS_MAX && !swarms.contains_key(&key) {
            return None;
        }
        let swarming = swarms.entry(key).or_insert_with(|| {
            Arc::new(Swarming::new(*me, key, Arc::clone(door), Arc::clone(news)))
        });
        Some(Arc::clone(swarming))
    }

    fn swarms(&self) -> MutexGuard<'_, BTreeMap<ModelKey, Arc<Swarming>>> {
        // Nothing under the lock panics half-way.
        self.0.swarms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
