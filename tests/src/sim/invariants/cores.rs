//! **No core panics, and none fails.** Nothing that this network and these disks do is more than they
//! have to bear.

use shoal_protocol::id::NodeId;

use crate::sim::world::World;

impl World {
    /// A core has said that it cannot go on.
    pub fn core_failed(&mut self, id: NodeId, error: &str) {
        self.violate("cores", format!("{id}: {error}"));
    }

    /// A core has panicked.
    pub fn core_panicked(&mut self, words: &str) {
        self.violate("cores", format!("a panic: {words}"));
    }
}
