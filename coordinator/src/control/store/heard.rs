//! What coordinators and workers have been heard to speak: soft state of this coordinator.
//!
//! It decides nothing by itself: `VersionCommand::Raise` takes it to the log, where it is compared with
//! who is there; until then it gives a refusal its names.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shoal_protocol::id::NodeId;

use crate::control::state::{ClusterState, Refusal, versions};

/// What each start of each node was heard to speak. Bounded by the nodes of the state: whoever notes
/// something also calls `keep`. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    spoken: Arc<Mutex<BTreeMap<NodeId, (u64, u16)>>>,
}

impl Heard {
    /// This start of a node speaks up to this version. A coordinator's start is its boot, a worker's its
    /// incarnation.
    pub fn note(&self, node: NodeId, start: u64, version: u16) {
        self.lock().insert(node, (start, version));
    }

    /// What the start of a node that the state knows was heard to speak.
    pub fn of(&self, state: &ClusterState, node: NodeId) -> Option<u16> {
        let start = match state.coordinators.get(node) {
            Some(record) => record.boot,
            None => state.nodes.get(node)?.incarnation?.0,
        };
        let (heard, version) = *self.lock().get(&node)?;
        (heard == start).then_some(version)
    }

    /// Forgets those that do not belong to the cluster any more.
    pub fn keep(&self, state: &ClusterState) {
        self.lock().retain(|node, _| state.nodes.get(*node).is_some());
    }

    /// Of those that a refusal names, only those that have not been heard to speak enough: that the
    /// others do is on its way to the log, or waits for these.
    pub fn explain(&self, state: &ClusterState, refusal: Refusal) -> Refusal {
        let Refusal::HeldBack { needs, by, more: 0 } = refusal else { return refusal };
        let speaks = |node: &NodeId| self.of(state, *node).is_some_and(|version| version >= needs);
        versions::held_back(needs, by.into_iter().filter(|node| !speaks(node)).collect())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, (u64, u16)>> {
        // A panic under the lock leaves a map, each entry of which is valid by itself.
        self.spoken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
