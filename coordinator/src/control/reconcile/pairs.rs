//! Pairs of workers that do not reach each other, though both reach the coordinators: for a while no
//! layout makes them neighbours where that can be avoided.
//!
//! | how it is known | when |
//! |---|---|
//! | a shard says that its neighbour fell silent, and all workers of the layout were heard since | at once |
//! | two neighbours have not linked although all have loaded, and one says that it misses the other; where none says so (`Fact::Missing`), each two that have not linked | after `LINKING` |
//!
//! A layout that exists is not torn up for it, and none is made because a pair is forgotten: a way that
//! is mended is used again by the next layout that is made for another reason.

use std::collections::BTreeMap;
use std::time::Duration;

use shoal_protocol::control::{ShardReport, ShardState};
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::NodeId;
use shoal_protocol::lost::silent_neighbour;
use shoal_protocol::neighbours::joined;
use shoal_protocol::plan::ReplicaPlan;
use shoal_protocol::units::Instant;

use super::super::planner::{Apart, pair};

/// How long a pair is avoided after the first time.
pub const APART_FOR: Duration = Duration::from_secs(60);

/// Each time that it is cut again doubles that, up to this: whoever mends a cable should not have to
/// wait for long, and a stream stalls for each try.
pub const APART_FOR_MAX: Duration = Duration::from_secs(1800);

/// A pair that was not cut for so long after it was tried again is forgotten.
const REMEMBERED: Duration = Duration::from_secs(1800);

/// The most pairs that one replica remembers: a ring of as many stages, each way of which is cut.
const PAIRS_MAX: usize = 64;

/// What one replica has learnt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pairs(BTreeMap<(NodeId, NodeId), Cut>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    times: u32,
    until: Instant,
}

impl Pairs {
    /// These were cut off from each other.
    pub fn note(&mut self, cut: impl IntoIterator<Item = (NodeId, NodeId)>, now: Instant) {
        self.0.retain(|_, cut| now < cut.until + REMEMBERED);
        // Both ends tell of it.
        let cut: Apart = cut.into_iter().map(|(a, b)| pair(a, b)).collect();
        for pair in cut {
            if self.0.len() >= PAIRS_MAX && !self.0.contains_key(&pair) {
                continue;
            }
            let known = self.0.entry(pair).or_insert(Cut { times: 0, until: now });
            let lasts = APART_FOR.saturating_mul(1 << known.times.min(16)).min(APART_FOR_MAX);
            *known = Cut { times: known.times.saturating_add(1), until: now + lasts };
        }
    }

    /// The pairs that are avoided now.
    pub fn apart(&self, now: Instant) -> Apart {
        self.0.iter().filter(|(_, cut)| now < cut.until).map(|(pair, _)| *pair).collect()
    }

    /// Forgets those of workers that are gone.
    pub fn retain(&mut self, here: impl Fn(&NodeId) -> bool) {
        self.0.retain(|(a, b), _| here(a) && here(b));
    }
}

/// The pairs of a layout that its shards say have fallen silent to each other. Only for a layout all
/// workers of which were heard since.
pub(super) fn silent(shards: &[(NodeId, Option<&ShardReport>)]) -> Vec<(NodeId, NodeId)> {
    let nodes: Vec<_> = shards.iter().map(|(node, _)| *node).collect();
    let said = shards.iter().filter_map(|(node, shard)| match &shard.as_ref()?.state {
        ShardState::Failed(error) if error.code == ErrorCode::WorkerLost => {
            Some((*node, silent_neighbour(&error.message)?))
        }
        _ => None,
    });
    said.filter(|(node, other)| node != other && nodes.contains(other)).collect()
}

/// The neighbours of a layout both of which have loaded and not linked, where all have loaded; of those the
/// ones that miss each other, where anybody says so: a shard waits for all of its links, so that one that is
/// out of reach keeps all others waiting too. The shards are in mesh order.
pub(super) fn unlinked(
    plan: &ReplicaPlan,
    shards: &[(NodeId, Option<&ShardReport>)],
    misses: impl Fn(NodeId, NodeId) -> bool,
) -> Vec<(NodeId, NodeId)> {
    let is = |index: usize, wanted: &ShardState| {
        shards[index].1.is_some_and(|shard| shard.state == *wanted)
    };
    let loaded = |index| is(index, &ShardState::Linking) || is(index, &ShardState::Ready);
    if !(0..shards.len()).all(loaded) {
        return Vec::new();
    }
    let both =
        |(a, b): &(usize, usize)| is(*a, &ShardState::Linking) && is(*b, &ShardState::Linking);
    let links = joined(plan).into_iter().filter(both);
    let waiting: Vec<_> = links.map(|(a, b)| (shards[a].0, shards[b].0)).collect();
    let missed = |(a, b): &&(NodeId, NodeId)| misses(*a, *b) || misses(*b, *a);
    let missed: Vec<_> = waiting.iter().filter(missed).copied().collect();
    if missed.is_empty() { waiting } else { missed }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(s: u64) -> Instant {
        Instant(s * 1_000_000)
    }

    #[test]
    fn a_pair_is_avoided_longer_each_time_and_tried_again() {
        let [a, b, c] = [1, 2, 3].map(NodeId::worker);
        let mut pairs = Pairs::default();
        pairs.note([(b, a)], s(0));
        assert_eq!(pairs.apart(s(59)), Apart::from([(a, b)]));
        assert_eq!(pairs.apart(s(60)), Apart::new(), "it is tried again");
        pairs.note([(a, b)], s(100));
        assert_eq!(pairs.apart(s(219)), Apart::from([(a, b)]), "twice as long");
        assert_eq!(pairs.apart(s(220)), Apart::new());
        pairs.note([(a, c)], s(220 + 1800));
        pairs.note([(a, b)], s(220 + 1801));
        assert_eq!(pairs.apart(s(220 + 1801 + 60)), Apart::new(), "the old ones are forgotten");
        pairs.retain(|node| *node != c);
        assert_eq!(pairs.0.len(), 1);
        pairs.note((10..200).map(|n| (a, NodeId::worker(n))), s(3000));
        assert_eq!(pairs.0.len(), PAIRS_MAX);
    }
}
