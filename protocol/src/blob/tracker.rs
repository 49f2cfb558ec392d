//! ○ A coordinator's memory of who has which chunks: it passes on what workers say to those who want the
//! same model.
//!
//! The first hash that is said of a chunk counts. A worker that says another one is named, and what it
//! said is not passed on. Nothing of this is kept or replicated: workers say all of it again to whom they
//! connect.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;

use crate::id::NodeId;
use crate::weights::{BlobNews, ChunkHash, ChunkId, ModelKey, NAMED_MAX};

/// The most chunks of one model that are remembered, counted once for each worker that has one: a
/// terabyte on a few workers. Who wants others asks the origin.
const ITEMS_MAX: usize = 1 << 20;

/// The most models that are remembered.
const MODELS_MAX: usize = 256;

/// What is remembered of all models.
#[derive(Debug, Default)]
pub struct Tracker {
    models: BTreeMap<ModelKey, Model>,
}

/// How far a worker has been told, by model.
#[derive(Clone, Debug, Default)]
pub struct Told(BTreeMap<ModelKey, u64>);

/// A hash of a chunk that is not the one that another worker said first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{later} says another hash of chunk {}/{} than {first} did", chunk.file, chunk.index)]
pub struct Conflict {
    /// Which chunk.
    pub chunk: ChunkId,
    /// Who spoke first.
    pub first: NodeId,
    /// Who says something else.
    pub later: NodeId,
}

#[derive(Debug, Default)]
struct Model {
    /// In the order in which they were said.
    items: BTreeMap<u64, (NodeId, Item)>,
    next: u64,
    said: BTreeMap<ChunkId, (NodeId, ChunkHash)>,
    members: BTreeMap<NodeId, SocketAddr>,
}

#[derive(Clone, Debug)]
enum Item {
    Wants(Vec<(u32, Range<u32>)>),
    Has(ChunkId, ChunkHash),
    Gone,
}

impl Item {
    /// What it takes of a message, in chunks.
    fn cost(&self) -> usize {
        match self {
            Item::Wants(chunks) => chunks.len().max(1),
            Item::Has(..) | Item::Gone => 1,
        }
    }
}

impl Tracker {
    /// Takes what a worker says that is reached at this address; the first conflict, if there is one.
    pub fn hear(
        &mut self,
        node: NodeId,
        address: SocketAddr,
        news: BlobNews,
    ) -> Result<(), Conflict> {
        let key = news.key();
        if self.models.len() >= MODELS_MAX && !self.models.contains_key(&key) {
            self.models.retain(|_, model| !model.members.is_empty());
            if self.models.len() >= MODELS_MAX {
                return Ok(());
            }
        }
        let model = self.models.entry(key).or_default();
        if model.members.insert(node, address) != Some(address) {
            model.items.retain(|_, (of, _)| *of != node);
        }
        match news {
            BlobNews::Wants { chunks, .. } => {
                model.items.retain(|_, (of, item)| *of != node || !matches!(item, Item::Wants(_)));
                model.push(node, Item::Wants(chunks));
                Ok(())
            }
            BlobNews::Has { chunks, .. } => model.has(node, chunks),
            // Workers do not say it of themselves.
            BlobNews::Gone { .. } => Ok(()),
        }
    }

    /// A worker is gone, and what it said with it. Hashes stay: they are the model's.
    pub fn gone(&mut self, node: NodeId) {
        for model in self.models.values_mut() {
            if model.members.remove(&node).is_some() {
                model.items.retain(|_, (of, _)| *of != node);
                model.push(node, Item::Gone);
            }
        }
    }

    /// What a worker is to be told next: of the models that it wants, of others; empty where there is
    /// nothing.
    pub fn tell(&self, node: NodeId, told: &mut Told) -> Vec<(NodeId, SocketAddr, BlobNews)> {
        let mut news = Vec::new();
        let mut room = NAMED_MAX;
        for (key, model) in &self.models {
            if !model.members.contains_key(&node) {
                continue;
            }
            let from = told.0.entry(*key).or_default();
            for (at, (of, item)) in model.items.range(*from..) {
                if room == 0 {
                    break;
                }
                *from = at + 1;
                if *of != node {
                    room = room.saturating_sub(item.cost());
                    model.add(&mut news, (*key, *of), item);
                }
            }
        }
        news
    }
}

impl Model {
    fn push(&mut self, node: NodeId, item: Item) {
        if self.items.len() < ITEMS_MAX {
            self.items.insert(self.next, (node, item));
            self.next += 1;
        }
    }

    fn has(&mut self, node: NodeId, chunks: Vec<(ChunkId, ChunkHash)>) -> Result<(), Conflict> {
        let mut conflict = Ok(());
        for (chunk, hash) in chunks {
            if self.said.len() >= ITEMS_MAX && !self.said.contains_key(&chunk) {
                continue;
            }
            let (first, said) = *self.said.entry(chunk).or_insert((node, hash));
            match said == hash {
                true => self.push(node, Item::Has(chunk, hash)),
                false if conflict.is_ok() => {
                    conflict = Err(Conflict { chunk, first, later: node });
                }
                false => {}
            }
        }
        conflict
    }

    /// Adds an item to a message; chunks of one worker that follow each other become one piece of news.
    fn add(
        &self,
        news: &mut Vec<(NodeId, SocketAddr, BlobNews)>,
        (key, of): (ModelKey, NodeId),
        item: &Item,
    ) {
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let address = self.members.get(&of).copied().unwrap_or(nowhere);
        match item {
            Item::Has(chunk, hash) => {
                if let Some((last, _, BlobNews::Has { key: same, chunks })) = news.last_mut()
                    && (*last, *same) == (of, key)
                {
                    chunks.push((*chunk, *hash));
                    return;
                }
                let chunks = vec![(*chunk, *hash)];
                news.push((of, address, BlobNews::Has { key, chunks }));
            }
            Item::Wants(chunks) => {
                let chunks = chunks.clone();
                news.push((of, address, BlobNews::Wants { key, chunks }));
            }
            Item::Gone => news.push((of, address, BlobNews::Gone { key })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: ModelKey = ModelKey([1; 32]);
    const AT: ChunkId = ChunkId { file: 0, index: 7 };

    fn address(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    fn wants() -> BlobNews {
        BlobNews::Wants { key: KEY, chunks: vec![(0, 0..9)] }
    }

    fn has(hash: u8) -> BlobNews {
        BlobNews::Has { key: KEY, chunks: vec![(AT, [hash; 32])] }
    }

    #[test]
    fn who_wants_a_model_hears_once_of_all_others_and_nobody_else_hears_anything() {
        let (a, b, c) = (NodeId::worker(1), NodeId::worker(2), NodeId::worker(3));
        let mut tracker = Tracker::default();
        tracker.hear(a, address(1), wants()).unwrap();
        tracker.hear(a, address(1), has(5)).unwrap();
        tracker.hear(b, address(2), wants()).unwrap();
        let mut told = Told::default();
        let news = tracker.tell(b, &mut told);
        assert_eq!(news, [(a, address(1), wants()), (a, address(1), has(5))]);
        assert!(tracker.tell(b, &mut told).is_empty());
        assert!(tracker.tell(c, &mut Told::default()).is_empty());
        tracker.gone(a);
        let news = tracker.tell(b, &mut told);
        assert!(matches!(news[..], [(of, _, BlobNews::Gone { .. })] if of == a), "{news:?}");
    }

    #[test]
    fn another_hash_of_a_chunk_is_named_and_not_passed_on() {
        let (a, b, c) = (NodeId::worker(1), NodeId::worker(2), NodeId::worker(3));
        let mut tracker = Tracker::default();
        tracker.hear(a, address(1), has(5)).unwrap();
        let conflict = tracker.hear(b, address(2), has(6)).unwrap_err();
        assert_eq!(conflict, Conflict { chunk: AT, first: a, later: b });
        assert!(conflict.to_string().contains("w2"), "{conflict}");
        tracker.hear(c, address(3), wants()).unwrap();
        assert_eq!(tracker.tell(c, &mut Told::default()), [(a, address(1), has(5))]);
        // A worker that is gone has said its hashes all the same.
        tracker.gone(a);
        assert!(tracker.hear(b, address(2), has(6)).is_err());
    }
}
