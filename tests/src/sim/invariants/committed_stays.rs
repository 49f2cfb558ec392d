//! **What was committed stays.** Whatever any coordinator has applied up to an entry, every other one
//! has the same state there, for ever: nothing is lost, exchanged or put in between.

use std::sync::Arc;

use shoal_coordinator::control::state::ClusterState;
use shoal_protocol::id::NodeId;

use super::Checks;

impl Checks {
    /// A voter has applied everything up to an entry.
    pub fn applied(&mut self, id: NodeId, index: u64, state: &Arc<ClusterState>) {
        if !self.states.contains_key(&index) {
            self.layouts_of(state);
        }
        let known = self.states.entry(index).or_insert_with(|| Arc::clone(state));
        if !Arc::ptr_eq(known, state) && known != state {
            self.violate("committed_stays", format!("{id} has another state behind entry {index}"));
        }
    }
}
