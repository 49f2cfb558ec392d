//! Adapters beside deployments: which ones are to be served, under which names and numbers.
//!
//! A name of an adapter is a model's name to clients, so it is no deployment's, and none may take it. A
//! number goes with each request that uses an adapter, so that it is never given twice.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shoal_protocol::adapters::{
    ADAPTERS_MAX, ADAPTERS_OF_CLUSTER_MAX, AdapterSpec, DeploymentAdapters, PATH_LEN_MAX,
    WantedAdapters,
};
use shoal_protocol::blob::name::is_pinned_adapter;
use shoal_protocol::id::{AdapterId, DeploymentName};

use super::command::{Advice, Effect, Noun, Refusal, Timestamp};

/// Changes of which adapters are to be served. Since version 3.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum AdapterCommand {
    /// Serve one beside its base model.
    Load {
        /// What clients call it.
        name: DeploymentName,
        /// The deployment of its base model.
        deployment: DeploymentName,
        /// Its folder, the same on each node.
        path: String,
        /// What the coordinator read there.
        fingerprint: [u8; 32],
    },
    /// Serve it no more.
    Unload {
        /// Which.
        name: DeploymentName,
    },
}

/// One adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adapter {
    /// Never given twice in this cluster.
    pub id: AdapterId,
    /// The deployment of its base model.
    pub deployment: DeploymentName,
    /// Its folder.
    pub path: String,
    /// What is there.
    pub fingerprint: [u8; 32],
    /// When it was asked for.
    pub created: Timestamp,
}

/// All adapters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adapters {
    by_name: BTreeMap<DeploymentName, Adapter>,
    /// The last number given; never given twice.
    given: u32,
    /// Grows with each change: workers do not go back to what was before.
    revision: u64,
}

impl Adapters {
    /// All of them by name.
    pub fn iter(&self) -> impl Iterator<Item = (&DeploymentName, &Adapter)> {
        self.by_name.iter()
    }

    /// The adapter, where there is one.
    pub fn get(&self, name: &DeploymentName) -> Option<&Adapter> {
        self.by_name.get(name)
    }

    /// What workers are told: all of it.
    pub fn wanted(&self) -> WantedAdapters {
        let mut by_deployment: BTreeMap<&DeploymentName, Vec<AdapterSpec>> = BTreeMap::new();
        for (name, adapter) in &self.by_name {
            let Adapter { id, path, fingerprint, .. } = adapter;
            let (name, path) = (name.clone(), path.clone());
            let spec = AdapterSpec { id: *id, name, path, fingerprint: *fingerprint };
            by_deployment.entry(&adapter.deployment).or_default().push(spec);
        }
        let of = |(deployment, adapters): (&DeploymentName, _)| DeploymentAdapters {
            deployment: deployment.clone(),
            adapters,
        };
        let deployments = by_deployment.into_iter().map(of).collect();
        WantedAdapters { revision: self.revision, deployments }
    }

    /// The last number that was given.
    pub(super) fn given(&self) -> u32 {
        self.given
    }

    /// Whether there is nothing that older builds do not know, and never was.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Of a deployment that is there, under a name that is no deployment's.
    pub(super) fn change(
        &mut self,
        command: &AdapterCommand,
        at: Timestamp,
    ) -> Result<Vec<Effect>, Refusal> {
        match command {
            AdapterCommand::Load { name, deployment, path, fingerprint } => {
                self.check(name, deployment, path)?;
                let id = self.number()?;
                let (deployment, path, created) = (deployment.clone(), path.clone(), at);
                let adapter = Adapter { id, deployment, path, fingerprint: *fingerprint, created };
                self.by_name.insert(name.clone(), adapter);
                self.revision += 1;
                Ok(vec![Effect::AdapterLoaded { name: name.clone(), id }])
            }
            AdapterCommand::Unload { name } => {
                let gone = self.by_name.remove(name);
                let gone = gone.ok_or_else(|| Refusal::UnknownAdapter { name: name.clone() })?;
                self.revision += 1;
                Ok(vec![Effect::AdapterUnloaded { name: name.clone(), id: gone.id }])
            }
        }
    }

    /// The deployment goes, and its adapters with it.
    pub(super) fn forget(&mut self, deployment: &DeploymentName) {
        let had = self.by_name.len();
        self.by_name.retain(|_, adapter| adapter.deployment != *deployment);
        if self.by_name.len() < had {
            self.revision += 1;
        }
    }

    fn check(
        &self,
        name: &DeploymentName,
        deployment: &DeploymentName,
        path: &str,
    ) -> Result<(), Refusal> {
        if self.by_name.contains_key(name) {
            return Err(Refusal::AdapterNameTaken { name: name.clone() });
        }
        let is_one = path.starts_with('/') || is_pinned_adapter(path);
        if path.len() > PATH_LEN_MAX || !is_one {
            return Err(Refusal::BadAdapterPath);
        }
        let beside = self.by_name.values().filter(|one| one.deployment == *deployment).count();
        for (there, what, max) in [
            (beside, Noun::AdaptersOfDeployment, ADAPTERS_MAX),
            (self.by_name.len(), Noun::Adapters, ADAPTERS_OF_CLUSTER_MAX),
        ] {
            if there >= max {
                return Err(Refusal::TooMany { what, max, advice: Advice::UnloadAdapter });
            }
        }
        Ok(())
    }

    fn number(&mut self) -> Result<AdapterId, Refusal> {
        let next = self.given.checked_add(1).ok_or(Refusal::TooMany {
            what: Noun::Adapters,
            max: u32::MAX as usize,
            advice: Advice::NewCluster,
        })?;
        self.given = next;
        Ok(AdapterId(next))
    }
}

#[cfg(test)]
#[path = "adapters_test.rs"]
mod tests;
