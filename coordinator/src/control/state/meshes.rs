//! What operators asked of the planner beyond a number of stages: a mesh, an objective, a reduction.
//!
//! It stands beside the deployments, whose specification keeps its shape for ever: `spec.stages` holds the
//! stages of a mesh that is written out, so that whoever reads that alone is not wrong.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shoal_protocol::id::DeploymentName;
use shoal_protocol::mesh::{MeshAsk, MeshAsked};
use shoal_protocol::plan::StagesAsked;

/// What was asked, by deployment; of most nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meshes {
    asks: BTreeMap<DeploymentName, MeshAsk>,
}

impl Meshes {
    /// What was asked for a deployment.
    pub fn of(&self, name: &DeploymentName) -> MeshAsk {
        self.asks.get(name).copied().unwrap_or_default()
    }

    /// The deployments for which something was asked.
    pub(super) fn names(&self) -> impl Iterator<Item = &DeploymentName> {
        self.asks.keys()
    }

    /// Whether there is nothing that older builds do not know.
    pub(super) fn is_empty(&self) -> bool {
        self.asks.is_empty()
    }

    pub(super) fn put(&mut self, name: &DeploymentName, ask: MeshAsk) {
        match ask.is_empty() {
            true => self.asks.remove(name),
            false => self.asks.insert(name.clone(), ask),
        };
    }

    pub(super) fn forget(&mut self, name: &DeploymentName) {
        self.asks.remove(name);
    }

    /// A number of stages was asked for, in words that know no mesh: it takes the place of a mesh.
    pub(super) fn stages_asked(&mut self, name: &DeploymentName, stages: StagesAsked) {
        if stages != StagesAsked::Same {
            self.put(name, MeshAsk { mesh: None, ..self.of(name) });
        }
    }
}

/// The stages of what is asked.
pub fn stages_of(ask: MeshAsk) -> StagesAsked {
    match ask.mesh {
        None => StagesAsked::Same,
        Some(MeshAsked::Auto) => StagesAsked::Auto,
        Some(MeshAsked::Exactly(mesh)) => StagesAsked::Exactly(mesh.stages),
    }
}

#[cfg(test)]
#[path = "meshes_test.rs"]
mod tests;
