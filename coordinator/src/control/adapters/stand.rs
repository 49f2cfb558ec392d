//! ○ Where adapters are: what workers said, held against the layouts that are to have them.
//!
//! A layout takes requests for an adapter only where every shard of it has said that it has it.

use std::collections::BTreeMap;
use std::sync::Arc;

use shoal_protocol::adapters::{AdapterView, HeldAdapters};
use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::error::WireError;
use shoal_protocol::id::{DeploymentName, NodeId};
use shoal_protocol::plan::ReplicaPlan;

use crate::control::state::{Adapter, ClusterState};
use crate::serving::{ServedAdapter, ServedDeployment, ServedReplica, ServingTable};

/// What workers said of their shards.
pub type Held = BTreeMap<NodeId, Vec<HeldAdapters>>;

/// Where an adapter is at a layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stand {
    /// Every shard has it.
    Held,
    /// This worker has not said yet that it has it.
    Coming(NodeId),
    /// This worker cannot have it.
    Failed(NodeId, WireError),
}

/// Where an adapter is at a layout; what failed comes first.
fn stand(plan: &ReplicaPlan, adapter: &Adapter, held: &Held) -> Stand {
    let (id, this) = (adapter.id, (adapter.id, adapter.fingerprint));
    let mut stand = Stand::Held;
    for node in plan.nodes() {
        let mut said = held.get(&node).into_iter().flatten();
        let said = said.find(|s| (s.replica, s.generation) == (plan.id, plan.generation));
        let failed = said.and_then(|said| said.failed.iter().find(|(failed, _)| *failed == id));
        if let Some((_, why)) = failed {
            return Stand::Failed(node, why.clone());
        }
        if stand == Stand::Held && !said.is_some_and(|said| said.held.contains(&this)) {
            stand = Stand::Coming(node);
        }
    }
    stand
}

/// Where an adapter is at every replica that has a layout.
pub fn stands<'a>(
    state: &'a ClusterState,
    adapter: &Adapter,
    held: &Held,
) -> Vec<(&'a ReplicaPlan, Stand)> {
    let replicas = state.deployments.get(&adapter.deployment).map(|of| &of.replicas[..]);
    let plans = replicas.unwrap_or_default().iter().filter_map(|id| state.plans.get(*id));
    plans.map(|plan| (plan, stand(plan, adapter, held))).collect()
}

/// An adapter for people and scripts.
pub fn view(
    state: &ClusterState,
    name: &DeploymentName,
    adapter: &Adapter,
    held: &Held,
) -> AdapterView {
    let stands = stands(state, adapter, held);
    let has = |(_, stand): &&(&ReplicaPlan, Stand)| *stand == Stand::Held;
    AdapterView {
        name: name.clone(),
        id: adapter.id,
        deployment: adapter.deployment.clone(),
        path: adapter.path.clone(),
        created_s: adapter.created.0,
        held: stands.iter().filter(has).count() as u32,
        replicas: stands.len() as u32,
        reason: reason(name, &stands),
    }
}

/// Why not all replicas have it, for people; empty where they have.
fn reason(name: &DeploymentName, stands: &[(&ReplicaPlan, Stand)]) -> String {
    let failed = |(plan, stand): &(&ReplicaPlan, Stand)| match stand {
        Stand::Failed(node, why) => Some(format!("{node} cannot load it for {}: {why}", plan.id)),
        _ => None,
    };
    let coming = |(plan, stand): &(&ReplicaPlan, Stand)| match stand {
        Stand::Coming(node) => Some(format!(
            "adapter `{name}` is being loaded: {node} has not said that {} has it",
            plan.id
        )),
        _ => None,
    };
    stands.iter().find_map(failed).or_else(|| stands.iter().find_map(coming)).unwrap_or_default()
}

/// Puts all adapters into the table, beside the deployments that are in it.
pub fn serve(state: &ClusterState, table: &mut ServingTable, held: &Held) {
    for (name, adapter) in state.adapters.iter() {
        if let Some(base) = table.deployments.get(&adapter.deployment) {
            let served = served(state, (name, adapter), base, held);
            table.adapters.insert(name.clone(), Arc::new(served));
        }
    }
}

/// An adapter as the request plane sees it: the replicas of its base model, ready where they have it.
fn served(
    state: &ClusterState,
    (name, adapter): (&DeploymentName, &Adapter),
    base: &Arc<ServedDeployment>,
    held: &Held,
) -> ServedDeployment {
    let stands = stands(state, adapter, held);
    let at = |replica: &ServedReplica| {
        let same =
            |plan: &ReplicaPlan| (plan.id, plan.generation) == (replica.id, replica.generation);
        stands.iter().find(|(plan, _)| same(plan)).map(|(_, stand)| stand)
    };
    let replicas = base.replicas.iter().map(|replica| {
        let ready = replica.ready && at(replica) == Some(&Stand::Held);
        ServedReplica { ready, ..replica.clone() }
    });
    let replicas: Vec<ServedReplica> = replicas.collect();
    let failed = |replica: &ServedReplica| matches!(at(replica), Some(Stand::Failed(..)));
    let (phase, reason) = match base.phase {
        DeploymentPhase::Ready if replicas.iter().any(|replica| replica.ready) => {
            (DeploymentPhase::Ready, base.reason.clone())
        }
        // It is tried again, once a minute at last: nobody is kept waiting for that.
        DeploymentPhase::Ready if replicas.iter().all(failed) => {
            (DeploymentPhase::Failed, reason(name, &stands))
        }
        DeploymentPhase::Ready => (DeploymentPhase::Loading, reason(name, &stands)),
        phase => (phase, base.reason.clone()),
    };
    ServedDeployment {
        name: name.clone(),
        created: adapter.created.0,
        replicas,
        reason,
        phase,
        adapter: Some(ServedAdapter {
            id: adapter.id,
            fingerprint: adapter.fingerprint,
            base: base.name.clone(),
        }),
        ..ServedDeployment::clone(base)
    }
}

#[cfg(test)]
#[path = "stand_test.rs"]
mod tests;
