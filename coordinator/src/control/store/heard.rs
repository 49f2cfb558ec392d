//! What the other coordinators have been heard to speak: soft state of this one.
//!
//! It decides nothing by itself: `VersionCommand::Raise` takes it to the log, where it is compared with
//! who is there; until then it gives a refusal its names.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shoal_protocol::id::NodeId;
use tokio::sync::watch;

use crate::control::state::{ClusterState, Refusal, versions};

/// What each start of each coordinator was heard to speak. Bounded by the coordinators of the state,
/// since `keep` is called with each. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    spoken: Arc<Mutex<BTreeMap<NodeId, (u64, u16)>>>,
    changed: Arc<watch::Sender<()>>,
}

impl Heard {
    /// This start (`boot`) of a coordinator speaks up to this version.
    pub fn note(&self, node: NodeId, boot: u64, version: u16) {
        if self.lock().insert(node, (boot, version)) != Some((boot, version)) {
            self.changed.send_replace(());
        }
    }

    /// What the present start of a coordinator was heard to speak.
    pub fn of(&self, node: NodeId, boot: u64) -> Option<u16> {
        let (at, version) = *self.lock().get(&node)?;
        (at == boot).then_some(version)
    }

    /// Forgets those that are no coordinators any more.
    pub fn keep(&self, state: &ClusterState) {
        self.lock().retain(|node, _| state.coordinators.get(*node).is_some());
    }

    /// Fires when something new was heard.
    pub fn changed(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Of the coordinators that a refusal names, only those that have not been heard to speak enough.
    pub fn explain(&self, state: &ClusterState, refusal: Refusal) -> Refusal {
        let Refusal::HeldBack { needs, by, more: 0 } = refusal else { return refusal };
        let speaks = |node: &NodeId| {
            let record = state.coordinators.get(*node);
            let version = record.and_then(|record| self.of(*node, record.boot));
            version.is_some_and(|version| version >= needs)
        };
        versions::held_back(needs, by.into_iter().filter(|node| !speaks(node)).collect())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, (u64, u16)>> {
        // A panic under the lock leaves a map, each entry of which is valid by itself.
        self.spoken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
