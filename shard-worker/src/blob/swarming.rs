//! ● One model's swarm: the pure `Swarm`, told the time, and its way to the others.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shoal_protocol::blob::swarm::Swarm;
use shoal_protocol::blob::{Choice, Cut, Peers};
use shoal_protocol::id::NodeId;
use shoal_protocol::weights::{BlobNews, ChunkAsk, ChunkHash, ChunkId, ModelKey, RANGES_MAX};

use super::door::Door;
use super::news::NewsLog;

/// One model, and the workers that want it too.
#[derive(Debug)]
pub(super) struct Swarming {
    key: ModelKey,
    swarm: Mutex<Swarm>,
    /// Wakes who waits for others.
    news: Condvar,
    door: Arc<Door>,
    log: Arc<NewsLog>,
    /// What was told already, so that it is told once.
    told: Mutex<BTreeSet<ChunkId>>,
}

impl Swarming {
    pub fn new(me: NodeId, key: ModelKey, door: Arc<Door>, log: Arc<NewsLog>) -> Self {
        let swarm = Mutex::new(Swarm::new(me, Instant::now()));
        let (news, told) = Default::default();
        Self { key, swarm, news, door, log, told }
    }

    pub fn hear(&self, node: NodeId, address: SocketAddr, news: BlobNews) {
        self.lock().hear(node, address, news, Instant::now());
        self.news.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Swarm> {
        // Nothing under the lock panics half-way.
        self.swarm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Peers for Swarming {
    fn begin(&self, missing: &BTreeSet<ChunkId>) {
        self.lock().begin(Instant::now());
        self.log.wants(self.key, ranges(missing));
    }

    fn choose(&self, missing: &BTreeSet<ChunkId>, cut: Cut) -> Choice {
        let mut swarm = self.lock();
        let choice = swarm.choose(missing, cut, Instant::now());
        if let Choice::Peer(node, ..) = &choice {
            swarm.ask(*node, true);
        }
        choice
    }

    fn fetch(&self, node: NodeId, chunk: ChunkId, len: u64) -> Result<Vec<u8>, String> {
        let address = self.lock().address(node, Instant::now());
        let ask = ChunkAsk { key: self.key, chunk };
        let fetched = match address {
            Some(address) => self.door.fetch(node, address, ask, len),
            None => Err("it is not to be asked any more".to_owned()),
        };
        self.lock().ask(node, false);
        // It has time for another chunk.
        self.news.notify_all();
        fetched
    }

    fn have(&self, chunk: ChunkId, hash: ChunkHash) {
        self.lock().moved(Instant::now());
        let new = self.told.lock().unwrap_or_else(PoisonError::into_inner).insert(chunk);
        if new {
            self.log.has(self.key, chunk, hash);
        }
    }

    fn said(&self, chunk: ChunkId) -> Option<(NodeId, ChunkHash)> {
        self.lock().said(chunk)
    }

    fn correct(&self, chunk: ChunkId, hash: ChunkHash) {
        self.lock().correct(chunk, hash);
    }

    fn avoid(&self, node: NodeId, _why: &str) {
        self.lock().avoid(node);
    }

    fn failed(&self, node: NodeId) {
        self.lock().rest(node, Instant::now());
    }

    fn wait(&self, longest: Duration) {
        let swarm = self.lock();
        // Whatever woke it: it looks again.
        drop(self.news.wait_timeout(swarm, longest));
    }
}

/// The chunks as ranges; more than a message takes are left out, and count as wanted by nobody else.
fn ranges(chunks: &BTreeSet<ChunkId>) -> Vec<(u32, Range<u32>)> {
    let mut by_file: BTreeMap<u32, Vec<Range<u32>>> = BTreeMap::new();
    for chunk in chunks {
        let ranges = by_file.entry(chunk.file).or_default();
        match ranges.last_mut() {
            Some(last) if last.end == chunk.index => last.end += 1,
            _ => ranges.push(chunk.index..chunk.index + 1),
        }
    }
    let all = by_file
        .into_iter()
        .flat_map(|(file, ranges)| ranges.into_iter().map(move |range| (file, range)));
    all.take(RANGES_MAX).collect()
}
