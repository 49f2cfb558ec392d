//! What the operator asked to be served.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shoal_protocol::id::{DeploymentName, ReplicaId};
use shoal_protocol::plan::DeploymentSpec;

use super::command::{Advice, Effect, Noun, Refusal, Timestamp};
use crate::control::shape::ModelShape;

/// The most deployments at once: each is a row of metrics and a line of every view.
pub const DEPLOYMENTS_MAX: usize = 256;

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
    },
    /// Stop serving it.
    Remove {
        /// Which.
        name: DeploymentName,
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
    /// Its replicas.
    pub replicas: Vec<ReplicaId>,
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
        at: Timestamp,
    ) -> Result<Vec<Effect>, Refusal> {
        if self.by_name.contains_key(&spec.name) {
            return Err(Refusal::NameTaken { name: spec.name.clone() });
        }
        if self.by_name.len() >= DEPLOYMENTS_MAX || self.given == u32::MAX {
            return Err(Refusal::TooMany {
                what: Noun::Deployments,
                max: DEPLOYMENTS_MAX,
                advice: Advice::Undeploy,
            });
        }
        self.given += 1;
        let replica = ReplicaId(self.given);
        let deployment = Deployment {
            spec: spec.clone(),
            shape: shape.clone(),
            created: at,
            replicas: vec![replica],
        };
        self.by_name.insert(spec.name.clone(), deployment);
        Ok(vec![Effect::DeploymentCreated { name: spec.name.clone(), replica }])
    }

    /// Removes it and says which replicas it had.
    pub(super) fn remove(&mut self, name: &DeploymentName) -> Result<Vec<ReplicaId>, Refusal> {
        self.by_name
            .remove(name)
            .map(|deployment| deployment.replicas)
            .ok_or_else(|| Refusal::UnknownDeployment { name: name.clone() })
    }
}
