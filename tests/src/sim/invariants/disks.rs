//! **Every disk can be read again.** Whenever a coordinator starts, what it wrote before is a log:
//! without gaps, with terms that never fall, and it fits its snapshot.

use shoal_protocol::id::NodeId;

use crate::sim::world::World;

impl World {
    /// A coordinator cannot read its disk.
    pub fn unreadable(&mut self, id: NodeId, why: &str) {
        self.violate("disks", format!("{id}: {why}"));
    }
}
