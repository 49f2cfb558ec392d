//! ○ Where a worker gets its next chunk: from another worker that has it, from the origin where it is this
//! one's turn, or later.
//!
//! Every stretch of chunks has an owner among those who want it and do not have it: all compute the same
//! one from the same names. The owner alone asks the origin, and the others get it from the owner; so the
//! origin sends each byte once, however many want it. Whoever stands still loses its turn, and whoever
//! gets nothing helps itself: the rule saves the origin's time, it is not needed for anything to arrive.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::chunks::Cut;
use super::fill::Choice;
use crate::id::NodeId;
use crate::weights::{BlobNews, ChunkHash, ChunkId};

/// How long to listen for others before the origin is asked: they were told to load at the same moment,
/// and hear of each other through a coordinator.
const GATHER: Duration = Duration::from_millis(300);

/// Who says nothing new for so long is not waited for.
const STALL: Duration = Duration::from_secs(10);

/// How long who failed to give a chunk is asked for none.
const REST: Duration = Duration::from_secs(30);

/// Chunks that one worker is asked for at once.
const BUSY_MAX: usize = 2;

/// Chunks that are compared to find one that few have.
const LOOK_AT: usize = 32;

/// What one worker knows of the others that want the same model.
#[derive(Debug)]
pub struct Swarm {
    me: NodeId,
    members: BTreeMap<NodeId, Member>,
    said: BTreeMap<ChunkId, (NodeId, ChunkHash)>,
    holders: BTreeMap<ChunkId, BTreeSet<NodeId>>,
    begun: Instant,
    /// When something came last.
    last: Instant,
}

#[derive(Debug)]
struct Member {
    address: SocketAddr,
    wants: Vec<(u32, Range<u32>)>,
    heard: Instant,
    busy: usize,
    /// It said or sent what is not true.
    avoided: bool,
    /// Until when it is left alone.
    rests: Option<Instant>,
}

impl Member {
    fn is_asked(&self, now: Instant) -> bool {
        !self.avoided && self.rests.is_none_or(|until| now >= until)
    }
}

impl Swarm {
    /// Nobody is known yet.
    pub fn new(me: NodeId, now: Instant) -> Self {
        let (members, said, holders) = Default::default();
        Self { me, members, said, holders, begun: now, last: now }
    }

    /// This worker begins to want something.
    pub fn begin(&mut self, now: Instant) {
        (self.begun, self.last) = (now, now);
    }

    /// Something has come.
    pub fn moved(&mut self, now: Instant) {
        self.last = now;
    }

    /// Takes what another worker has said.
    pub fn hear(&mut self, node: NodeId, address: SocketAddr, news: BlobNews, now: Instant) {
        if node == self.me {
            return;
        }
        let gone = matches!(news, BlobNews::Gone { .. });
        let member = self.members.entry(node).or_insert_with(|| Member {
            address,
            wants: Vec::new(),
            heard: now,
            busy: 0,
            avoided: false,
            rests: None,
        });
        member.heard = now;
        match news {
            BlobNews::Wants { chunks, .. } => (member.address, member.wants) = (address, chunks),
            BlobNews::Has { chunks, .. } => {
                member.address = address;
                for (chunk, hash) in chunks {
                    let (_, said) = *self.said.entry(chunk).or_insert((node, hash));
                    if said == hash {
                        self.holders.entry(chunk).or_default().insert(node);
                    }
                }
            }
            BlobNews::Gone { .. } => member.wants.clear(),
        }
        if gone {
            self.lose(node);
        }
    }

    /// What a chunk hashes to, and who said so.
    pub fn said(&self, chunk: ChunkId) -> Option<(NodeId, ChunkHash)> {
        self.said.get(&chunk).copied()
    }

    /// The origin's bytes have another hash than was said: that one counts for nothing.
    pub fn correct(&mut self, chunk: ChunkId, hash: ChunkHash) {
        self.said.insert(chunk, (self.me, hash));
        self.holders.remove(&chunk);
    }

    /// Nothing more is wanted from this one.
    pub fn avoid(&mut self, node: NodeId) {
        if let Some(member) = self.members.get_mut(&node) {
            member.avoided = true;
        }
        self.lose(node);
    }

    /// It did not give what it has: others are asked for a while, the origin too.
    pub fn rest(&mut self, node: NodeId, now: Instant) {
        if let Some(member) = self.members.get_mut(&node) {
            member.rests = Some(now + REST);
        }
    }

    /// Where another worker is, as long as it is to be asked.
    pub fn address(&self, node: NodeId, now: Instant) -> Option<SocketAddr> {
        self.members.get(&node).filter(|member| member.is_asked(now)).map(|member| member.address)
    }

    /// A chunk is asked for, or has been answered.
    pub fn ask(&mut self, node: NodeId, asked: bool) {
        if let Some(member) = self.members.get_mut(&node) {
            member.busy = if asked { member.busy + 1 } else { member.busy.saturating_sub(1) };
        }
    }

    /// Where to get some of what is missing.
    pub fn choose(&self, missing: &BTreeSet<ChunkId>, cut: Cut, now: Instant) -> Choice {
        let Some(start) = self.start(missing) else { return Choice::Wait };
        // Everybody begins elsewhere, so that not all ask for the same.
        let rotated = || missing.range(start..).chain(missing.range(..start)).copied();
        if let Some((node, chunk, hash)) = self.nearest(rotated(), now) {
            return Choice::Peer(node, chunk, hash);
        }
        if now < self.begun + GATHER {
            return Choice::Wait;
        }
        let helps_itself = now >= self.last + STALL;
        let mine = |chunk: &ChunkId| helps_itself || self.is_mine(*chunk, cut, now);
        match rotated().find(mine) {
            Some(first) => {
                let run = cut.run(first, missing);
                let group = group_of(first, cut);
                Choice::Origin(
                    run.into_iter().take_while(|chunk| group_of(*chunk, cut) == group).collect(),
                )
            }
            None => Choice::Wait,
        }
    }

    fn start(&self, missing: &BTreeSet<ChunkId>) -> Option<ChunkId> {
        let (first, last) = (missing.first()?, missing.last()?);
        let span = u64::from(last.index - first.index.min(last.index)) + 1;
        let offset = mix(u64::from(self.me.number)) % span;
        let file = match last.file - first.file {
            0 => first.file,
            files => {
                first.file + (mix(u64::from(self.me.number) ^ 0x5eed) % u64::from(files + 1)) as u32
            }
        };
        Some(ChunkId { file, index: first.index.saturating_add(offset as u32) })
    }

    /// A chunk that another worker has: of those that are looked at, one that few have.
    fn nearest(
        &self,
        missing: impl Iterator<Item = ChunkId>,
        now: Instant,
    ) -> Option<(NodeId, ChunkId, ChunkHash)> {
        let free = |node: &&NodeId| {
            let member = self.members.get(*node);
            member.is_some_and(|member| member.is_asked(now) && member.busy < BUSY_MAX)
        };
        let found = missing.filter_map(|chunk| {
            let (_, hash) = self.said.get(&chunk)?;
            let holders = self.holders.get(&chunk)?;
            let busy = |node: &&NodeId| self.members.get(*node).map_or(0, |member| member.busy);
            let place = u64::from(chunk.index) ^ u64::from(self.me.number) << 32;
            let best = holders.iter().filter(free);
            let best = best.min_by_key(|node| (busy(node), mix(place ^ u64::from(node.number))))?;
            Some((holders.len(), *best, chunk, *hash))
        });
        let rarest = found.take(LOOK_AT).min_by_key(|(holders, ..)| *holders);
        rarest.map(|(_, node, chunk, hash)| (node, chunk, hash))
    }

    /// Whether it is this worker's turn to ask the origin for a chunk.
    fn is_mine(&self, chunk: ChunkId, cut: Cut, now: Instant) -> bool {
        let group = group_of(chunk, cut);
        let weight = |node: NodeId| {
            let place = u64::from(group.file) << 32 | u64::from(group.index);
            mix(mix(place) ^ u64::from(node.number))
        };
        let ours = weight(self.me);
        let holders = self.holders.get(&chunk);
        // Whoever has it may be busy with what it was asked for before: it will have time sooner than the
        // origin need send it once more.
        let is_asked = |node: &NodeId| self.members.get(node).is_some_and(|m| m.is_asked(now));
        if holders.is_some_and(|holders| holders.iter().any(is_asked)) {
            return false;
        }
        !self.members.iter().any(|(node, member)| {
            let wants = member
                .wants
                .iter()
                .any(|(file, range)| *file == chunk.file && range.contains(&chunk.index));
            let has = holders.is_some_and(|holders| holders.contains(node));
            let moves = now < member.heard + STALL;
            wants && !has && moves && member.is_asked(now) && weight(*node) > ours
        })
    }

    fn lose(&mut self, node: NodeId) {
        for holders in self.holders.values_mut() {
            holders.remove(&node);
        }
    }
}

/// The stretch of chunks that has one owner: what is asked of the origin at once.
fn group_of(chunk: ChunkId, cut: Cut) -> ChunkId {
    let size = u32::try_from((cut.run / cut.chunk).max(1)).unwrap_or(u32::MAX);
    ChunkId { file: chunk.file, index: chunk.index / size }
}

/// A number that looks like dice and is the same everywhere (splitmix64).
fn mix(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

#[cfg(test)]
#[path = "swarm_test.rs"]
mod tests;
