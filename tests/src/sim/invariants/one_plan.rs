//! **One plan is active per replica and generation.** When a shard says that it is linked, each other
//! worker of its layout runs, or has just run, a shard of exactly this layout, so that the stages fit together; and no
//! generation ever has two layouts.

use shoal_coordinator::control::state::ClusterState;
use shoal_protocol::id::NodeId;
use shoal_shard_worker::agent::lifecycle::ShardKey;

use super::Checks;
use crate::sim::worker::WorkerProcess;
use crate::sim::world::World;

impl Checks {
    /// A state that nobody had before.
    pub fn layouts_of(&mut self, state: &ClusterState) {
        let mut wrong = None;
        for plan in state.plans.all() {
            let (replica, generation) = (plan.id, plan.generation);
            let known = self.layouts.entry((replica, generation)).or_insert_with(|| plan.clone());
            if known != plan {
                wrong = Some(format!("{replica} {generation} is of two layouts"));
            }
        }
        if let Some(words) = wrong {
            self.violate("one_plan", words);
        }
    }
}

impl World {
    /// A shard is linked.
    pub fn check_ring(&mut self, id: NodeId, process: &WorkerProcess, key: ShardKey) {
        let Some(shard) = process.shards.get(&key) else { return };
        let ours = shard.assignment.replica.clone();
        for node in ours.nodes().filter(|node| *node != id) {
            let Some((life, _)) = shard.ring.get(&node) else {
                let words = format!("{id} is ready as {key} without {node}");
                return self.violate("one_plan", words);
            };
            let there = self.workers.get(&node).and_then(|worker| worker.process.as_ref());
            // It may have ended since, which the shard will hear of.
            let Some(there) = there.filter(|process| process.life == *life) else { continue };
            // It may have gone on to the next layout since.
            let known = there.ran.contains(&key);
            if !known {
                let words = format!("{id} is linked as {key} with another layout at {node}");
                return self.violate("one_plan", words);
            }
            let twin = there.shards.get(&key).map(|twin| &twin.assignment.replica);
            if twin.is_some_and(|twin| *twin != ours) {
                let words = format!("{key} has two layouts: at {id} and at {node}");
                return self.violate("one_plan", words);
            }
        }
    }
}
