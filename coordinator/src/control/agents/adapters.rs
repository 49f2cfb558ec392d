//! ● Which adapters workers are told of, and what they say that their shards have.

use shoal_protocol::adapters::{HeldAdapters, WantedAdapters};
use shoal_protocol::id::NodeId;

use super::{Agents, THINGS_MAX};
use crate::control::adapters::Held;

impl Agents {
    /// Tells all workers, those that are connected and those that come, which adapters there should be.
    pub fn set_adapters(&self, wanted: WantedAdapters) {
        let mut registry = self.lock();
        if registry.adapters == wanted {
            return;
        }
        for (node, worker) in &registry.workers {
            worker.tell_adapters(*node, &wanted);
        }
        registry.adapters = wanted;
    }

    /// What the workers that are connected said of their shards.
    pub fn held_adapters(&self) -> Held {
        let registry = self.lock();
        let said = registry.workers.iter();
        let said = said.filter(|(_, worker)| worker.link.is_some() && !worker.adapters.is_empty());
        said.map(|(node, worker)| (*node, worker.adapters.clone())).collect()
    }

    /// Takes what a worker says.
    pub(super) fn hear_adapters(
        &self,
        node: NodeId,
        session: u64,
        held: Vec<HeldAdapters>,
    ) -> Result<(), &'static str> {
        if held.len() > THINGS_MAX || !held.iter().all(HeldAdapters::is_bounded) {
            return Err("it has more adapters than there can be");
        }
        self.with_link(node, session, |worker| worker.adapters = held);
        self.changed.send_modify(|n| *n += 1);
        Ok(())
    }
}
