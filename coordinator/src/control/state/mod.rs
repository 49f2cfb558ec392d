//! ○ The replicated state: a deterministic machine that turns commands into effects.
//!
//! ```text
//! Command ─► apply ─► Vec<Effect>   the state has changed, and this is how
//!                └──► Refusal       nothing has changed
//! ```
//!
//! One module and one command enum per noun: [`nodes`], [`coordinators`], [`tokens`], [`deployments`],
//! [`plans`], [`keys`], [`drains`], [`versions`], [`authorities`], [`meshes`], [`adapters`]; this file
//! only dispatches. What is soft (who is connected, load, progress of loading) is not here: it never enters the log. Time enters as data, stamped by whoever proposes.

pub mod adapters;
pub mod authorities;
pub mod check;
pub mod command;
pub mod coordinators;
pub mod deployments;
pub mod drains;
pub mod keys;
pub mod meshes;
pub mod nodes;
pub mod plans;
pub mod snapshot;
pub mod tokens;
mod too_many;
pub mod versions;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shoal_protocol::id::{DeploymentName, Incarnation, NodeId};
use shoal_protocol::plan::StagesAsked;

pub use adapters::{Adapter, AdapterCommand, Adapters};
pub use authorities::{Authorities, AuthorityCommand, CaStep, LEAVING_MAX, Rotation};
pub use command::{Change, Command, Effect, Refusal, Timestamp};
pub use coordinators::{CoordinatorCommand, CoordinatorRecord, Coordinators};
pub use deployments::{Deployment, DeploymentCommand, Deployments, REPLICAS_MAX};
pub use drains::{DrainCommand, Drains};
pub use keys::{ApiKey, KeyCommand, KeyHash, Keys};
pub use meshes::Meshes;
pub use nodes::{KeyFingerprint, Node, NodeCommand, Nodes};
pub use plans::{GENERATIONS_SKIPPED_MAX, PlanCommand, Plans};
pub use tokens::{Token, TokenCommand, TokenHash, Tokens};
pub use versions::{VersionCommand, Versions};

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
    /// Which coordinators there are, and which of them vote.
    pub coordinators: Coordinators,
    /// The latest stamp of a command. Clocks of coordinators differ; time in the log never goes back.
    clock: Timestamp,
    /// Who may use the public API.
    pub keys: Keys,
    /// Which workers are to hold nothing.
    pub drains: Drains,
    /// The last command of each client and what it came to, so that a command that is sent twice is
    /// applied once.
    last: BTreeMap<NodeId, Applied>,
    /// Who speaks which version of the protocol. Not among what a build of version 1 reads: what came
    /// later stands behind it, each part under a tag of its own (`snapshot`).
    #[serde(skip)]
    pub versions: Versions,
    /// Which CAs are believed.
    #[serde(skip)]
    pub authorities: Authorities,
    /// What was asked of the planner.
    #[serde(skip)]
    pub meshes: Meshes,
    /// Which adapters are served beside deployments.
    #[serde(skip)]
    pub adapters: Adapters,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Applied {
    incarnation: Incarnation,
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
            let (sent, taken) =
                ((command.incarnation, command.sequence), (last.incarnation, last.sequence));
            if sent == taken {
                return last.result.clone();
            }
            if sent < taken {
                return Err(Refusal::Superseded {
                    client: command.client,
                    sequence: command.sequence,
                    last: last.sequence,
                });
            }
        }
        let at = self.clock.max(command.at);
        // Looked at again here: whoever proposed it may not have known who had come meanwhile.
        let result = match self.permits(&command.change) {
            Ok(()) => self.dispatch(command, at),
            Err(held_back) => Err(held_back),
        };
        if result.is_ok() {
            self.clock = at;
            self.note_needs(&command.change);
        }
        debug_assert_eq!(check::violations(self), Vec::new(), "after {command:?}");
        let applied = Applied {
            incarnation: command.incarnation,
            sequence: command.sequence,
            result: result.clone(),
        };
        self.last.insert(command.client, applied);
        result
    }

    /// The latest stamp of a command.
    pub fn clock(&self) -> Timestamp {
        self.clock
    }

    /// What a command came to, where it is the last one of its client.
    pub fn result_of(&self, command: &Command) -> Option<Result<Vec<Effect>, Refusal>> {
        let last = self.last.get(&command.client)?;
        let same = (last.incarnation, last.sequence) == (command.incarnation, command.sequence);
        same.then(|| last.result.clone())
    }

    /// Whether nobody but the founder and its operator can belong to it.
    pub fn is_new(&self) -> bool {
        self.nodes.iter().count() < 2 && self.coordinators.iter().next().is_none()
    }

    /// The number of the client's last command in this start of it; 0 where there was none.
    pub fn last_sequence(&self, client: NodeId, incarnation: Incarnation) -> u64 {
        let last = self.last.get(&client).filter(|applied| applied.incarnation == incarnation);
        last.map_or(0, |applied| applied.sequence)
    }

    /// The start under which a client's last command was made; the lowest where there was none.
    pub fn last_incarnation(&self, client: NodeId) -> Incarnation {
        self.last.get(&client).map_or(Incarnation::default(), |applied| applied.incarnation)
    }

    fn dispatch(&mut self, command: &Command, at: Timestamp) -> Result<Vec<Effect>, Refusal> {
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
                let recorded = self.nodes.get(*node).and_then(|known| known.incarnation);
                // The one that is on record changes nothing, and may have said more since.
                if recorded < Some(*incarnation) {
                    self.keeps_up(*node, versions::FIRST)?;
                }
                self.nodes.start(*node, *incarnation, build)
            }
            Change::Node(NodeCommand::Remove { node }) => {
                let effects = self.nodes.remove(*node)?;
                self.drains.forget(*node);
                self.versions.forget(*node);
                self.authorities.forget(*node);
                Ok(effects)
            }
            Change::Token(TokenCommand::Create { hash, role, uses, expires }) => {
                self.tokens.create(*hash, *role, *uses, *expires, at)
            }
            Change::Token(TokenCommand::Revoke { hash }) => self.tokens.revoke(hash),
            Change::Deployment(command) => self.change_deployments(command, at),
            Change::Plan(command) => self.plans.change(command, &self.deployments, &self.nodes),
            Change::Drain(command) => self.drains.change(command, &self.nodes, at),
            Change::Key(KeyCommand::Create { name, hash, limits, expires }) => {
                self.keys.create(name, *hash, *limits, *expires, at)
            }
            Change::Key(KeyCommand::Revoke { name }) => self.keys.revoke(name, at),
            Change::Coordinator(change) => self.change_coordinators(change),
            Change::Version(command) => self.change_versions(command),
            Change::Authority(command) => {
                let effects = self.authorities.change(command, &mut self.nodes, at)?;
                let signs = self.authorities.rotation().filter(|_| !effects.is_empty());
                if let Some(rotation) = signs.filter(|rotation| rotation.signs.is_some()) {
                    self.coordinators.hold_key(&rotation.holding);
                }
                Ok(effects)
            }
            Change::Adapter(command) => self.change_adapters(command, at),
        }
    }

    fn change_deployments(
        &mut self,
        command: &DeploymentCommand,
        at: Timestamp,
    ) -> Result<Vec<Effect>, Refusal> {
        match command {
            DeploymentCommand::Create { spec, shape, replicas } => {
                self.is_no_adapter(&spec.name)?;
                self.deployments.create(spec, shape, *replicas, at)
            }
            DeploymentCommand::CreateMesh { spec, shape, replicas, ask } => {
                self.is_no_adapter(&spec.name)?;
                let effects = self.deployments.create(spec, shape, *replicas, at)?;
                self.meshes.put(&spec.name, *ask);
                Ok(effects)
            }
            DeploymentCommand::Remove { name } => {
                let replicas = self.deployments.remove(name)?;
                self.meshes.forget(name);
                self.adapters.forget(name);
                let mut effects = vec![Effect::DeploymentRemoved { name: name.clone() }];
                effects.extend(self.plans.remove(&replicas));
                Ok(effects)
            }
            DeploymentCommand::Scale { name, replicas, stages } => {
                let effects = self.scale(name, *replicas, *stages)?;
                self.meshes.stages_asked(name, *stages);
                Ok(effects)
            }
            DeploymentCommand::ScaleMesh { name, replicas, ask } => {
                let effects = self.scale(name, *replicas, meshes::stages_of(*ask))?;
                self.meshes.put(name, ask.or(self.meshes.of(name)));
                Ok(effects)
            }
        }
    }

    /// Names of adapters are names of models to clients.
    fn is_no_adapter(&self, name: &DeploymentName) -> Result<(), Refusal> {
        match self.adapters.get(name) {
            Some(_) => Err(Refusal::AdapterNameTaken { name: name.clone() }),
            None => Ok(()),
        }
    }

    fn change_adapters(
        &mut self,
        command: &AdapterCommand,
        at: Timestamp,
    ) -> Result<Vec<Effect>, Refusal> {
        if let AdapterCommand::Load { name, deployment, .. } = command {
            if self.deployments.get(deployment).is_none() {
                return Err(Refusal::UnknownDeployment { name: deployment.clone() });
            }
            if self.deployments.get(name).is_some() {
                return Err(Refusal::NameTaken { name: name.clone() });
            }
        }
        self.adapters.change(command, at)
    }

    fn scale(
        &mut self,
        name: &DeploymentName,
        replicas: Option<u32>,
        stages: StagesAsked,
    ) -> Result<Vec<Effect>, Refusal> {
        let has_layout = |id| self.plans.get(id).is_some();
        let (given, taken) = self.deployments.scale(name, replicas, stages, has_layout)?;
        let removed = self.plans.remove(&taken);
        let mut effects = vec![Effect::DeploymentScaled { name: name.clone(), given, taken }];
        effects.extend(removed);
        Ok(effects)
    }

    fn change_coordinators(&mut self, change: &CoordinatorCommand) -> Result<Vec<Effect>, Refusal> {
        match change {
            CoordinatorCommand::Announce { node, incarnation, boot, cluster, build } => {
                let record = CoordinatorRecord { cluster: *cluster, boot: *boot, holds_key: false };
                self.coordinators.announce(*node, *incarnation, record, build, &mut self.nodes)
            }
            CoordinatorCommand::SetVoters { voters } => self.coordinators.set_voters(voters),
            CoordinatorCommand::KeyReceived { node } => {
                let rotation = self.authorities.rotation();
                let signs = rotation.filter(|rotation| rotation.signs.is_some());
                if signs.is_some_and(|rotation| !rotation.holding.contains(node)) {
                    // It means the key before: of the one that signs it says `Reached`, and then this.
                    return Ok(Vec::new());
                }
                self.coordinators.received_key(*node)
            }
            CoordinatorCommand::Remove { node } => {
                let effects = self.coordinators.remove(*node, &mut self.nodes)?;
                self.authorities.forget(*node);
                Ok(effects)
            }
        }
    }
}

#[cfg(test)]
mod cluster_test;
#[cfg(test)]
#[path = "state_test.rs"]
mod tests;
