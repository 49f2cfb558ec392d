//! **Only a leader tells workers what to be.** An epoch in which somebody is told something belongs to
//! the one who leads in that term; a greater one is used only where a worker asked for it.

use shoal_protocol::id::NodeId;

use super::Checks;

impl Checks {
    /// A coordinator tells a worker something under an epoch.
    pub fn told(&mut self, id: NodeId, epoch: u64, floor: u64) {
        if epoch == floor && floor > 0 {
            return;
        }
        if self.reigns.get(&epoch) != Some(&id) {
            let leader = self.reigns.get(&epoch);
            self.violate("one_voice", format!("{id} speaks in epoch {epoch}, led by {leader:?}"));
        }
    }
}
