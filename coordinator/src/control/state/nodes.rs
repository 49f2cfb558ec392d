//! Who belongs to the cluster: identities, and how often each has started.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shoal_protocol::id::{Incarnation, NodeId, Role};

use super::command::{Advice, Effect, Noun, Refusal, Timestamp};
use super::tokens::TokenHash;

/// BLAKE3 of a node's public key (its SubjectPublicKeyInfo, DER). A certificate is renewed only for
/// the key that is on record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyFingerprint(pub [u8; 32]);

/// Changes of who belongs to the cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum NodeCommand {
    /// A coordinator takes an identity for itself, or for the admin certificate that it writes.
    Enrol {
        /// What the node is.
        role: Role,
        /// Its key.
        key: KeyFingerprint,
    },
    /// A joiner takes an identity; spends one use of the token, whose role it becomes.
    Join {
        /// The hash of the token's secret.
        token: TokenHash,
        /// Its key.
        key: KeyFingerprint,
    },
    /// A process with this identity has started (or registers again).
    Start {
        /// Who.
        node: NodeId,
        /// Its start number.
        incarnation: Incarnation,
        /// The version of its binary.
        build: String,
    },
    /// A node is forgotten for ever: its certificate opens nothing any more, and is not renewed.
    Remove {
        /// Which.
        node: NodeId,
    },
}

/// All nodes, and the numbers that were given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Nodes {
    by_id: BTreeMap<NodeId, Node>,
    /// The last number given in each role. Numbers are never given twice, not even where the node
    /// has been removed: a ghost must not be taken for its successor.
    given: BTreeMap<Role, u32>,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Its key.
    pub key: KeyFingerprint,
    /// When it joined.
    pub joined: Timestamp,
    /// Its last start; `None` before it first registered.
    pub incarnation: Option<Incarnation>,
    /// The version of its binary; empty before it first registered.
    pub build: String,
}

impl Nodes {
    /// All nodes in order: workers of the same role by number.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        self.by_id.iter().map(|(id, node)| (*id, node))
    }

    /// All workers by number.
    pub fn workers(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        self.iter().filter(|(id, _)| id.role == Role::Worker)
    }

    /// The node, where there is one.
    pub fn get(&self, id: NodeId) -> Option<&Node> {
        self.by_id.get(&id)
    }

    /// The last number that was given in a role.
    pub(super) fn given(&self, role: Role) -> u32 {
        self.given.get(&role).copied().unwrap_or(0)
    }

    pub(super) fn add(
        &mut self,
        role: Role,
        key: KeyFingerprint,
        at: Timestamp,
    ) -> Result<Vec<Effect>, Refusal> {
        let number = self.given(role).checked_add(1).ok_or(Refusal::TooMany {
            what: Noun::Nodes,
            max: u32::MAX as usize,
            advice: Advice::NewCluster,
        })?;
        let node = NodeId { role, number };
        self.given.insert(role, number);
        let record = Node { key, joined: at, incarnation: None, build: String::new() };
        self.by_id.insert(node, record);
        Ok(vec![Effect::NodeAdded { node }])
    }

    pub(super) fn forget(&mut self, id: NodeId) {
        self.by_id.remove(&id);
    }

    /// Forgets a node. Coordinators vote and the first admin is the cluster's own, so both stay.
    pub(super) fn remove(&mut self, node: NodeId) -> Result<Vec<Effect>, Refusal> {
        if node.role == Role::Coordinator || node == NodeId::admin(1) {
            return Err(Refusal::NotToBeRemoved { node });
        }
        self.by_id.remove(&node).ok_or(Refusal::UnknownNode { node })?;
        Ok(vec![Effect::NodeRemoved { node }])
    }

    /// Leaves so many numbers of each role out: others may have given them.
    pub(in crate::control) fn skip(&mut self, count: u32) {
        self.given.values_mut().for_each(|last| *last = last.saturating_add(count));
    }

    /// Whether a node has, or had, this id.
    pub fn was_given(&self, node: NodeId) -> bool {
        node.number >= 1 && node.number <= self.given(node.role)
    }

    pub(super) fn start(
        &mut self,
        id: NodeId,
        incarnation: Incarnation,
        build: &str,
    ) -> Result<Vec<Effect>, Refusal> {
        let node = self.by_id.get_mut(&id).ok_or(Refusal::UnknownNode { node: id })?;
        match node.incarnation {
            Some(last) if incarnation < last => {
                Err(Refusal::OldIncarnation { node: id, incarnation, last })
            }
            Some(last) if incarnation == last => Ok(Vec::new()),
            _ => {
                node.incarnation = Some(incarnation);
                node.build = build.to_owned();
                Ok(vec![Effect::NodeStarted { node: id, incarnation }])
            }
        }
    }
}
