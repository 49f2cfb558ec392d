//! Which coordinators there are, where they are reached, and which of them vote.
//!
//! The log's own configuration follows this noun: the leader compares the two and proposes the
//! difference (`store::raft::membership`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use shoal_protocol::id::{Incarnation, NodeId, Role};

use super::command::{Effect, Refusal};
use super::nodes::Nodes;

/// The most coordinators that vote: with 5 two may be lost at once, and each more makes every change
/// slower.
pub const VOTERS_MAX: usize = 5;

/// Changes of which coordinators there are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum CoordinatorCommand {
    /// A process with this identity has started (or is found at another address).
    Announce {
        /// Who.
        node: NodeId,
        /// Its start number.
        incarnation: Incarnation,
        /// Drawn at its start: two processes with one start number are not the same.
        boot: u64,
        /// Where it takes the cluster's conversations.
        cluster: SocketAddr,
        /// The version of its binary.
        build: String,
    },
    /// These vote from now on, and no other.
    SetVoters {
        /// All of them.
        voters: BTreeSet<NodeId>,
    },
    /// A coordinator holds the CA's key from now on: its loss is no longer the loss of another's.
    KeyReceived {
        /// Which.
        node: NodeId,
    },
    /// A coordinator belongs to the cluster no longer.
    Remove {
        /// Which.
        node: NodeId,
    },
}

/// All coordinators.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Coordinators {
    by_id: BTreeMap<NodeId, CoordinatorRecord>,
    voters: BTreeSet<NodeId>,
}

/// One coordinator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CoordinatorRecord {
    /// Where it takes the cluster's conversations.
    pub cluster: SocketAddr,
    /// Drawn at its last start.
    pub boot: u64,
    /// Whether it holds the CA's key.
    pub holds_key: bool,
}

impl Coordinators {
    /// All that have announced themselves, by number.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, &CoordinatorRecord)> {
        self.by_id.iter().map(|(id, record)| (*id, record))
    }

    /// The coordinator, where it has announced itself.
    pub fn get(&self, id: NodeId) -> Option<&CoordinatorRecord> {
        self.by_id.get(&id)
    }

    /// Those that shall vote.
    pub fn voters(&self) -> &BTreeSet<NodeId> {
        &self.voters
    }

    pub(super) fn announce(
        &mut self,
        node: NodeId,
        incarnation: Incarnation,
        record: CoordinatorRecord,
        build: &str,
        nodes: &mut Nodes,
    ) -> Result<Vec<Effect>, Refusal> {
        if node.role != Role::Coordinator {
            return Err(Refusal::UnknownNode { node });
        }
        let last = nodes.get(node).and_then(|known| known.incarnation);
        let another = self.by_id.get(&node).is_some_and(|known| known.boot != record.boot);
        if let Some(last) = last
            && last == incarnation
            && another
        {
            // Two starts have one number: one of them is of a copy of the folder.
            return Err(Refusal::OldIncarnation { node, incarnation, last });
        }
        let effects = nodes.start(node, incarnation, build)?;
        if self.by_id.is_empty() {
            // Who founds the cluster votes.
            self.voters.insert(node);
        }
        let holds_key = self.by_id.get(&node).is_some_and(|known| known.holds_key);
        self.by_id.insert(node, CoordinatorRecord { holds_key, ..record });
        Ok(effects)
    }

    pub(super) fn received_key(&mut self, node: NodeId) -> Result<Vec<Effect>, Refusal> {
        let record = self.by_id.get_mut(&node).ok_or(Refusal::UnknownNode { node })?;
        record.holds_key = true;
        Ok(Vec::new())
    }

    /// These hold the key of the CA that signs, and no other: another one signs now.
    pub(super) fn hold_key(&mut self, holding: &BTreeSet<NodeId>) {
        for (node, record) in &mut self.by_id {
            record.holds_key = holding.contains(node);
        }
    }

    pub(super) fn set_voters(&mut self, voters: &BTreeSet<NodeId>) -> Result<Vec<Effect>, Refusal> {
        if let Some(node) = voters.iter().find(|node| !self.by_id.contains_key(node)) {
            return Err(Refusal::UnknownNode { node: *node });
        }
        if voters.len() > VOTERS_MAX || voters.len().is_multiple_of(2) {
            return Err(Refusal::BadVoters { count: voters.len() });
        }
        if self.voters == *voters {
            return Ok(Vec::new());
        }
        self.voters.clone_from(voters);
        Ok(vec![Effect::VotersChanged { voters: voters.iter().copied().collect() }])
    }

    pub(super) fn remove(
        &mut self,
        node: NodeId,
        nodes: &mut Nodes,
    ) -> Result<Vec<Effect>, Refusal> {
        if node.role != Role::Coordinator || nodes.get(node).is_none() {
            return Err(Refusal::UnknownNode { node });
        }
        if self.voters.contains(&node) {
            return Err(Refusal::StillVotes { node });
        }
        self.by_id.remove(&node);
        nodes.forget(node);
        Ok(vec![Effect::NodeRemoved { node }])
    }
}
