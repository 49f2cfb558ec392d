//! **Frames fit.** What comes to a stage is what it can take: of its own layout, of sequences that are
//! open, at the position where they are, in blocks that nobody else has; and what comes back to the
//! head is what it asked for.

use shoal_protocol::id::NodeId;
use shoal_shard_worker::agent::lifecycle::ShardKey;

use crate::sim::world::World;

impl World {
    /// A stage or an engine has found that its protocol was broken.
    pub fn frame_misfits(&mut self, id: NodeId, key: ShardKey, fault: &str) {
        self.violate("stages", format!("{id} {key}: {fault}"));
    }
}
