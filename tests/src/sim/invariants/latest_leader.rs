//! **A worker obeys the latest leader.** Within one life the epochs under which it takes orders never
//! fall.

use shoal_protocol::id::NodeId;

use super::Checks;

impl Checks {
    /// A worker takes an order.
    pub fn obeyed(&mut self, id: NodeId, before: u64, epoch: u64) {
        if epoch < before {
            self.violate("latest_leader", format!("{id} obeys epoch {epoch} after {before}"));
        }
    }
}
