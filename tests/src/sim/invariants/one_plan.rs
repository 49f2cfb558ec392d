//! **One plan is active per replica and generation.** When a shard says that it is linked, each other
//! worker of its layout runs a shard of exactly this layout, so that the stages fit together; and no
//! generation ever has two layouts.

use shoal_protocol::id::NodeId;
use shoal_shard_worker::agent::lifecycle::ShardKey;

use crate::sim::worker::WorkerProcess;
use crate::sim::world::World;

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
            let theirs = there.shards.iter().filter(|(other, _)| other.replica == key.replica);
            let known = theirs.clone().any(|(other, _)| *other == key)
                || there.left.contains_key(&key)
                || theirs.clone().count() == 0;
            if !known {
                let words = format!("{id} is linked as {key} with another layout at {node}");
                return self.violate("one_plan", words);
            }
            let twin = theirs.filter(|(other, _)| **other == key);
            for (_, twin) in twin {
                if twin.assignment.replica != ours {
                    self.violate("one_plan", format!("{key} has two layouts: {id} and {node}"));
                    return;
                }
            }
        }
    }
}
