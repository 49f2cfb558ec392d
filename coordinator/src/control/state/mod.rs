//! ○ The replicated state: a deterministic machine that turns commands into effects.
//!
//! ```text
//! Command ─► apply ─► Vec<Effect>   the state has changed, and this is how
//!                └──► Refusal       nothing has changed
//! ```
//!
//! One module and one command enum per noun: [`nodes`], [`tokens`], [`deployments`], [`plans`]; this
//! file only dispatches. What is soft (who is connected, load, progress of loading) is not here: it
//! never enters the log. Time enters as data, stamped by whoever proposes.

pub mod check;
pub mod command;
pub mod deployments;
pub mod nodes;
pub mod plans;
pub mod snapshot;
pub mod tokens;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shoal_protocol::id::NodeId;

pub use command::{Change, Command, Effect, Refusal, Timestamp};
pub use deployments::{Deployment, DeploymentCommand, Deployments};
pub use nodes::{KeyFingerprint, Node, NodeCommand, Nodes};
pub use plans::{GENERATIONS_SKIPPED_MAX, PlanCommand, Plans};
pub use tokens::{Token, TokenCommand, TokenHash, Tokens};

/// Everything that all coordinators agree on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClusterState {
    /// Who belongs to the cluster.
    pub nodes: Nodes,
    /// Who may join it.
    pub tokens: Tokens,
    /// What is to be served.
    pub deployments: Deployments,
    /// Where it is served.
    pub plans: Plans,
    /// The last command of each client and what it came to, so that a command that is sent twice is
    /// applied once.
    last: BTreeMap<NodeId, Applied>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Applied {
    sequence: u64,
    result: Result<Vec<Effect>, Refusal>,
}

impl ClusterState {
    /// Applies one command: all of it, or nothing where it is refused.
    ///
    /// A command that repeats its client's last sequence number changes nothing and is answered as
    /// the first time; an older number is refused.
    pub fn apply(&mut self, command: &Command) -> Result<Vec<Effect>, Refusal> {
        if let Some(last) = self.last.get(&command.client) {
            if command.sequence == last.sequence {
                return last.result.clone();
            }
            if command.sequence < last.sequence {
                return Err(Refusal::Superseded {
                    client: command.client,
                    sequence: command.sequence,
                    last: last.sequence,
                });
            }
        }
        let result = self.dispatch(command);
        debug_assert_eq!(check::violations(self), Vec::new(), "after {command:?}");
        let applied = Applied { sequence: command.sequence, result: result.clone() };
        self.last.insert(command.client, applied);
        result
    }

    /// The sequence number of the client's last command; 0 where there was none.
    pub fn last_sequence(&self, client: NodeId) -> u64 {
        self.last.get(&client).map_or(0, |applied| applied.sequence)
    }

    fn dispatch(&mut self, command: &Command) -> Result<Vec<Effect>, Refusal> {
        let at = command.at;
        match &command.change {
            Change::Node(NodeCommand::Enrol { role, key }) => self.nodes.add(*role, *key, at),
            Change::Node(NodeCommand::Join { token, key }) => {
                // Of the two steps the second may be refused too, so the first is tried on a copy.
                let mut tokens = self.tokens.clone();
                let role = tokens.spend(token, at)?;
                let effects = self.nodes.add(role, *key, at)?;
                self.tokens = tokens;
                Ok(effects)
            }
            Change::Node(NodeCommand::Start { node, incarnation, build }) => {
                self.nodes.start(*node, *incarnation, build)
            }
            Change::Token(TokenCommand::Create { hash, role, uses, expires }) => {
                self.tokens.create(*hash, *role, *uses, *expires, at)
            }
            Change::Deployment(DeploymentCommand::Create { spec, shape }) => {
                self.deployments.create(spec, shape, at)
            }
            Change::Deployment(DeploymentCommand::Remove { name }) => {
                let replicas = self.deployments.remove(name)?;
                let mut effects = vec![Effect::DeploymentRemoved { name: name.clone() }];
                effects.extend(self.plans.remove(&replicas));
                Ok(effects)
            }
            Change::Plan(PlanCommand::Adopt { plan }) => {
                self.plans.adopt(plan, &self.deployments, &self.nodes)
            }
        }
    }
}

#[cfg(test)]
#[path = "state_test.rs"]
mod tests;
