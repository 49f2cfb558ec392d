//! What each worker should be, and whether it was told so.

use shoal_protocol::id::{NodeId, RankIndex, StageIndex};
use shoal_protocol::plan::{Assignment, PeerAddress, ReplicaPlan};

use super::words::reason_for;
use super::{Action, ObservedWorker, RECONNECT_GRACE, Round};

impl Round<'_> {
    /// A worker has a shard of each layout of the state that names it: while a replica moves, of two.
    pub(super) fn assign(&mut self, node: NodeId, worker: &ObservedWorker) {
        let pushed = worker.pushed.as_deref();
        let mut wanted = Vec::new();
        for plan in self.target.plans.all() {
            let Some((stage, rank)) = seat_of(plan, node) else { continue };
            // Nobody may go on with a node that was removed, whether another takes its place or not.
            // What is given up in this round is kept for its heirs until the next one.
            let stays =
                self.plans.iter().any(|p| (p.id, p.generation) == (plan.id, plan.generation));
            if stays && !self.removed(plan).is_empty() {
                continue;
            }
            // What was said once of a generation stays said: its workers may come back under other
            // addresses only as a new generation.
            let before = pushed.unwrap_or_default().iter().find(|assignment| {
                assignment.replica.id == plan.id && assignment.replica.generation == plan.generation
            });
            if let Some(before) = before {
                wanted.push(before.clone());
                continue;
            }
            match self.peers(plan) {
                Some(peers) => {
                    wanted.push(Assignment { replica: plan.clone(), stage, rank, peers });
                }
                // A list without this shard would drop it, so the worker is told nothing as long as
                // there is hope for its peers.
                None if self.observed.now < self.observed.since + RECONNECT_GRACE => return,
                None => {}
            }
        }
        if pushed == Some(wanted.as_slice()) {
            return;
        }
        let reason = reason_for(pushed, &wanted);
        self.decision.actions.push(Action::Assign { node, assignments: wanted, reason });
    }

    /// The workers of a layout that do not belong to the cluster any more.
    pub(super) fn removed(&self, plan: &ReplicaPlan) -> Vec<String> {
        let gone = plan.nodes().filter(|node| self.target.nodes.get(*node).is_none());
        gone.map(|node| node.to_string()).collect()
    }

    /// Where the workers of a layout are; `None` where one has not been heard of yet.
    fn peers(&self, plan: &ReplicaPlan) -> Option<Vec<PeerAddress>> {
        plan.nodes()
            .map(|node| {
                let activations = self.observed.workers.get(&node)?.register.activations;
                Some(PeerAddress { node, activations })
            })
            .collect()
    }
}

/// The stage and rank of a worker in a layout.
fn seat_of(plan: &ReplicaPlan, node: NodeId) -> Option<(StageIndex, RankIndex)> {
    plan.stages.iter().enumerate().find_map(|(stage, s)| {
        let shard = s.shards.iter().find(|shard| shard.node == node)?;
        Some((StageIndex(stage as u32), shard.rank))
    })
}
