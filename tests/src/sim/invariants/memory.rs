//! **No worker holds more than its budget**: shards, loads under way, and what has stopped and is not
//! free yet, by the simulator's own count.

use shoal_protocol::id::NodeId;

use super::Checks;

impl Checks {
    /// What a worker holds now.
    pub fn memory(&mut self, id: NodeId, held: u64, budget: u64) {
        if held > budget {
            let (held, budget) = (held >> 20, budget >> 20);
            self.violate("memory", format!("{id} holds {held} MiB of {budget} MiB"));
        }
    }
}
