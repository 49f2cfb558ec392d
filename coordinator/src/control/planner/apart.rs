//! Neighbours that do not reach each other: other workers for the stages, or the same in another order.
//!
//! Stages of one rank form a ring: each sends to the next, and the last one's tokens go back to the first.
//! With tensor ranks it is a mesh (`shoal_protocol::neighbours`).

use std::collections::BTreeSet;

use shoal_protocol::id::NodeId;
use shoal_protocol::neighbours;
use shoal_protocol::plan::{Numerics, ReplicaPlan, ShardPlan, StagePlan};

use super::Candidate;
use super::placement::Cut;

/// The most choices that are tried: every order of six workers, and most where few pairs are cut.
const TRIES_MAX: usize = 20_000;

/// Pairs of workers that do not reach each other, the lower number first.
pub type Apart = BTreeSet<(NodeId, NodeId)>;

/// A pair as `Apart` holds it.
pub fn pair(a: NodeId, b: NodeId) -> (NodeId, NodeId) {
    (a.min(b), a.max(b))
}

/// Whether some shard of a layout is to be linked with one that it does not reach.
pub fn is_torn(plan: &ReplicaPlan, apart: &Apart) -> bool {
    !apart.is_empty()
        && neighbours::neighbours(plan).into_iter().any(|(a, b)| apart.contains(&pair(a, b)))
}

/// The same for a ring of stages.
pub(super) fn is_torn_ring(nodes: &[NodeId], apart: &Apart) -> bool {
    let next = nodes.iter().cycle().skip(1);
    nodes.len() > 1 && nodes.iter().zip(next).any(|(a, b)| apart.contains(&pair(*a, *b)))
}

/// A worker for each stage of a cut, no two neighbours of which are apart: for each stage the first of
/// its `choices` with which that is possible. `None` where none was found.
pub(super) fn arrange<'w>(
    cuts: &[Cut],
    choices: impl Fn(&Cut) -> Vec<&'w Candidate>,
    apart: &Apart,
) -> Option<Vec<&'w Candidate>> {
    let choices: Vec<_> = cuts.iter().map(choices).collect();
    let mut search = Search { apart, tries: 0 };
    let mut named = Vec::with_capacity(cuts.len());
    search.rest(&choices, &mut named).then_some(named)
}

struct Search<'a> {
    apart: &'a Apart,
    tries: usize,
}

impl Search<'_> {
    /// Names the workers of the stages behind those that are named.
    fn rest<'w>(&mut self, stages: &[Vec<&'w Candidate>], named: &mut Vec<&'w Candidate>) -> bool {
        let Some((stage, behind)) = stages.split_first() else {
            let nodes: Vec<_> = named.iter().map(|worker| worker.node).collect();
            return !is_torn_ring(&nodes, self.apart);
        };
        for &worker in stage {
            self.tries += 1;
            if self.tries > TRIES_MAX {
                return false;
            }
            let taken = named.iter().any(|other| other.node == worker.node);
            let last = named.last().map(|last| pair(last.node, worker.node));
            if taken || last.is_some_and(|pair| self.apart.contains(&pair)) {
                continue;
            }
            named.push(worker);
            if self.rest(behind, named) {
                return true;
            }
            named.pop();
        }
        false
    }
}

/// The same shards on workers that reach each other: each stays where it is if that is possible, else it
/// goes to the first with room for it, of those without another replica's shard before those with one, and of
/// the layout's own zones before others. How fast those are is not looked at: any layout that links is better
/// than one that does not. `willing`: only who has said that it computes as a rank becomes one. `None` where
/// none was found.
pub(super) fn reseat(
    plan: &ReplicaPlan,
    workers: &[Candidate],
    apart: &Apart,
    willing: bool,
) -> Option<ReplicaPlan> {
    let of_stage = |stage: &StagePlan| stage.shards.len();
    let shards: Vec<(usize, &ShardPlan)> = plan
        .stages
        .iter()
        .flat_map(|stage| stage.shards.iter().map(move |shard| (of_stage(stage), shard)))
        .collect();
    let joined = neighbours::joined(plan);
    let split = plan.stages.iter().any(|stage| stage.shards.len() > 1);
    let of = |node| workers.iter().find(|worker| worker.node == node);
    let zones: BTreeSet<_> = plan.nodes().filter_map(|node| of(node)?.zone.as_ref()).collect();
    let fits = |(ranks, shard): &(usize, &ShardPlan), worker: &Candidate| {
        // Sums of ranks are made by whoever keeps the contract of one rank and understands a mesh.
        let able = worker.numerics.contains(&Numerics::N1) && (!split || worker.speaks_ranks);
        let may = *ranks == 1 || !willing || worker.ranks_most as usize >= *ranks;
        able && may && worker.free() >= shard.memory.total()
    };
    let seat = |shard: &(usize, &ShardPlan)| {
        let mut able: Vec<_> = workers.iter().filter(|worker| fits(shard, worker)).collect();
        able.sort_by_key(|worker| {
            let strange = worker.zone.as_ref().is_some_and(|zone| !zones.contains(zone));
            (worker.node != shard.1.node, worker.sibling, strange, worker.node)
        });
        able
    };
    let choices: Vec<Vec<&Candidate>> = shards.iter().map(seat).collect();
    let mut search = Seats { joined: &joined, apart, tries: 0 };
    let mut seated = Vec::with_capacity(shards.len());
    if !search.rest(&choices, &mut seated) {
        return None;
    }
    let mut plan = plan.clone();
    let shards = plan.stages.iter_mut().flat_map(|stage| &mut stage.shards);
    for (shard, worker) in shards.zip(seated) {
        shard.node = worker.node;
        shard.device.clone_from(&worker.device);
    }
    Some(plan)
}

struct Seats<'a> {
    joined: &'a [(usize, usize)],
    apart: &'a Apart,
    tries: usize,
}

impl Seats<'_> {
    fn rest<'w>(&mut self, shards: &[Vec<&'w Candidate>], seated: &mut Vec<&'w Candidate>) -> bool {
        let Some((able, behind)) = shards.split_first() else { return true };
        for &worker in able {
            self.tries += 1;
            if self.tries > TRIES_MAX {
                return false;
            }
            let me = seated.len();
            let reaches = |a: usize| !self.apart.contains(&pair(seated[a].node, worker.node));
            let mut before = self.joined.iter().filter(|(_, b)| *b == me);
            if seated.iter().any(|other| other.node == worker.node)
                || !before.all(|(a, _)| reaches(*a))
            {
                continue;
            }
            seated.push(worker);
            if self.rest(behind, seated) {
                return true;
            }
            seated.pop();
        }
        false
    }
}
