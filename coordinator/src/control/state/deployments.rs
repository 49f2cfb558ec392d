//! What the operator asked to be served.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shoal_protocol::id::{DeploymentName, ReplicaId};
use shoal_protocol::mesh::MeshAsk;
use shoal_protocol::plan::{DeploymentSpec, StagesAsked};

use super::command::{Advice, Effect, Noun, Refusal, Timestamp};
use crate::control::shape::ModelShape;

/// The most deployments at once: each is a row of metrics and a line of every view.
pub const DEPLOYMENTS_MAX: usize = 256;

/// The most replicas of one deployment: the router weighs each of them for each request.
pub const REPLICAS_MAX: u32 = 64;

/// Changes of what is to be served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant)] // Few and short-lived; a box would only move the bytes.
pub enum DeploymentCommand {
    /// Serve a model.
    Create {
        /// What was asked for, with the fingerprint of what the coordinator read.
        spec: DeploymentSpec,
        /// The model's shape, so that planning never depends on a folder being readable.
        shape: ModelShape,
        /// How many full copies.
        replicas: u32,
    },
    /// Stop serving it.
    Remove {
        /// Which.
        name: DeploymentName,
    },
    /// Serve it with another number of replicas or stages. Every replica's layout is looked at anew,
    /// so that it is spread over the workers that there are now.
    Scale {
        /// Which.
        name: DeploymentName,
        /// How many full copies; `None`: as many as there are.
        replicas: Option<u32>,
        /// Into how many stages each is cut.
        stages: StagesAsked,
    },
    /// As `Create`, with what is asked of the planner. Since version 3.
    CreateMesh {
        /// What was asked for; the stages are those of the mesh.
        spec: DeploymentSpec,
        /// The model's shape.
        shape: ModelShape,
        /// How many full copies.
        replicas: u32,
        /// What is asked of the planner.
        ask: MeshAsk,
    },
    /// As `Scale`, with what is asked of the planner: what it does not say stays. Since version 3.
    ScaleMesh {
        /// Which.
        name: DeploymentName,
        /// How many full copies; `None`: as many as there are.
        replicas: Option<u32>,
        /// What is asked of the planner.
        ask: MeshAsk,
    },
}

/// All deployments.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Deployments {
    by_name: BTreeMap<DeploymentName, Deployment>,
    /// The last replica number given; never given twice.
    given: u32,
}

/// One deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Deployment {
    /// What was asked for.
    pub spec: DeploymentSpec,
    /// The model's shape.
    pub shape: ModelShape,
    /// When it was asked for.
    pub created: Timestamp,
    /// Its replicas: as many as are wanted, whether they are served yet or not.
    pub replicas: Vec<ReplicaId>,
    /// How often it was asked for: once by its creation, and with each scaling. A layout that was made
    /// for an earlier time is looked at anew.
    pub asked: u64,
}

impl Deployments {
    /// All of them by name.
    pub fn iter(&self) -> impl Iterator<Item = (&DeploymentName, &Deployment)> {
        self.by_name.iter()
    }

    /// The deployment, where there is one.
    pub fn get(&self, name: &DeploymentName) -> Option<&Deployment> {
        self.by_name.get(name)
    }

    /// The last replica number that was given.
    pub(super) fn given(&self) -> u32 {
        self.given
    }

    pub(super) fn create(
        &mut self,
        spec: &DeploymentSpec,
        shape: &ModelShape,
        replicas: u32,
        at: Timestamp,
    ) -> Result<Vec<Effect>, Refusal> {
        if self.by_name.contains_key(&spec.name) {
            return Err(Refusal::NameTaken { name: spec.name.clone() });
        }
        if self.by_name.len() >= DEPLOYMENTS_MAX {
            return Err(Refusal::TooMany {
                what: Noun::Deployments,
                max: DEPLOYMENTS_MAX,
                advice: Advice::Undeploy,
            });
        }
        let given = self.give(replicas, replicas)?;
        let deployment = Deployment {
            spec: spec.clone(),
            shape: shape.clone(),
            created: at,
            replicas: given.clone(),
            asked: 1,
        };
        self.by_name.insert(spec.name.clone(), deployment);
        let created = |replica| Effect::DeploymentCreated { name: spec.name.clone(), replica };
        Ok(given.into_iter().map(created).collect())
    }

    /// Numbers for `more` new replicas of a deployment that is to have `all`.
    fn give(&mut self, all: u32, more: u32) -> Result<Vec<ReplicaId>, Refusal> {
        if all == 0 || all > REPLICAS_MAX {
            return Err(Refusal::BadReplicas { replicas: all });
        }
        let last = self.given.checked_add(more).ok_or(Refusal::TooMany {
            what: Noun::Replicas,
            max: u32::MAX as usize,
            advice: Advice::NewCluster,
        })?;
        let new = (self.given + 1..=last).map(ReplicaId).collect();
        self.given = last;
        Ok(new)
    }

    /// Takes and gives replicas; says which were taken. Those that have no layout go first, then those
    /// that came last.
    pub(super) fn scale(
        &mut self,
        name: &DeploymentName,
        replicas: Option<u32>,
        stages: StagesAsked,
        has_layout: impl Fn(ReplicaId) -> bool,
    ) -> Result<(Vec<ReplicaId>, Vec<ReplicaId>), Refusal> {
        let unknown = || Refusal::UnknownDeployment { name: name.clone() };
        let have = self.get(name).ok_or_else(unknown)?.replicas.len() as u32;
        let wanted = replicas.unwrap_or(have);
        let given = self.give(wanted, wanted.saturating_sub(have))?;
        let deployment = self.by_name.get_mut(name).ok_or_else(unknown)?;
        deployment.asked += 1;
        match stages {
            StagesAsked::Same => {}
            StagesAsked::Auto => deployment.spec.stages = None,
            StagesAsked::Exactly(stages) => deployment.spec.stages = Some(stages),
        }
        let mut taken = deployment.replicas.clone();
        taken.sort_by_key(|id| (has_layout(*id), std::cmp::Reverse(*id)));
        taken.truncate(have.saturating_sub(wanted) as usize);
        deployment.replicas.retain(|id| !taken.contains(id));
        deployment.replicas.extend(&given);
        Ok((given, taken))
    }

    /// Removes it and says which replicas it had.
    pub(super) fn remove(&mut self, name: &DeploymentName) -> Result<Vec<ReplicaId>, Refusal> {
        self.by_name
            .remove(name)
            .map(|deployment| deployment.replicas)
            .ok_or_else(|| Refusal::UnknownDeployment { name: name.clone() })
    }
}
