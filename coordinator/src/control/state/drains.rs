//! Which workers are to hold nothing: what runs there moves elsewhere, and nothing new is placed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shoal_protocol::id::{NodeId, Role};

use super::command::{Effect, Refusal, Timestamp};
use super::nodes::Nodes;

/// Changes of which workers are to hold nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum DrainCommand {
    /// Move everything off a worker.
    Begin {
        /// Which.
        node: NodeId,
    },
    /// It may hold something again.
    End {
        /// Which.
        node: NodeId,
    },
}

/// All workers that are to hold nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Drains {
    since: BTreeMap<NodeId, Timestamp>,
}

impl Drains {
    /// All of them, with when they were asked to.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, Timestamp)> {
        self.since.iter().map(|(node, since)| (*node, *since))
    }

    /// Whether a worker is to hold nothing.
    pub fn contains(&self, node: NodeId) -> bool {
        self.since.contains_key(&node)
    }

    /// A drain that has begun already, or ended already, is no mistake: nothing changes.
    pub(super) fn change(
        &mut self,
        command: &DrainCommand,
        nodes: &Nodes,
        at: Timestamp,
    ) -> Result<Vec<Effect>, Refusal> {
        let (node, draining) = match command {
            DrainCommand::Begin { node } => (*node, true),
            DrainCommand::End { node } => (*node, false),
        };
        if nodes.get(node).is_none() {
            return Err(Refusal::UnknownNode { node });
        }
        if node.role != Role::Worker {
            return Err(Refusal::NotAWorker { node });
        }
        if self.contains(node) == draining {
            return Ok(Vec::new());
        }
        if draining {
            self.since.insert(node, at);
        } else {
            self.since.remove(&node);
        }
        Ok(vec![Effect::DrainChanged { node, draining }])
    }

    /// Forgets a node that does not belong to the cluster any more.
    pub fn forget(&mut self, node: NodeId) {
        self.since.remove(&node);
    }
}
