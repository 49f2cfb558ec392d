//! What must hold of every state, as a function that returns all that does not.
//!
//! Run after each command in debug builds, and after a snapshot is read.

use std::collections::BTreeSet;
use std::fmt;

use shoal_protocol::id::{NodeId, ReplicaId};

use super::{ClusterState, plans};

/// Something that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A node has a number that was never given.
    NumberNotGiven(NodeId),
    /// A token without a use left is still there.
    SpentToken,
    /// A deployment is filed under another name than its own.
    Misfiled(String),
    /// A replica belongs to two deployments, or has a number that was never given.
    ReplicaNotOwn(ReplicaId),
    /// A plan whose deployment is not there.
    Orphan(ReplicaId),
    /// A coordinator votes that has never announced itself.
    StrangeVoter(NodeId),
    /// A plan that does not hold together.
    BadPlan(ReplicaId, String),
    /// A next layout without one that serves, or that is not newer.
    NextNotNext(ReplicaId),
    /// A drain of a node that is not there.
    DrainOfNobody(NodeId),
    /// What a node speaks that is not there.
    VersionOfNobody(NodeId),
    /// A mesh of a deployment that is not there.
    MeshOfNothing(String),
    /// An adapter of a deployment that is not there, with the name of one, or with a number that was given
    /// twice or never.
    BadAdapter(String),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::NumberNotGiven(node) => write!(f, "the number of {node} was never given"),
            Violation::SpentToken => f.write_str("a token has no use left"),
            Violation::Misfiled(name) => write!(f, "deployment `{name}` is filed under another"),
            Violation::ReplicaNotOwn(id) => write!(f, "{id} was given twice or never"),
            Violation::Orphan(id) => write!(f, "{id} has a plan and no deployment"),
            Violation::StrangeVoter(id) => write!(f, "{id} votes and is not known"),
            Violation::BadPlan(id, fault) => write!(f, "the plan of {id}: {fault}"),
            Violation::NextNotNext(id) => write!(f, "the next layout of {id} follows none"),
            Violation::DrainOfNobody(node) => write!(f, "{node} is drained and not there"),
            Violation::VersionOfNobody(node) => write!(f, "{node} speaks and is not there"),
            Violation::MeshOfNothing(name) => {
                write!(f, "a mesh was asked for `{name}`, which is not there")
            }
            Violation::BadAdapter(name) => {
                write!(
                    f,
                    "adapter `{name}` has no deployment, or its name or number is not its own"
                )
            }
        }
    }
}

/// All violations; none in a sound state.
pub fn violations(state: &ClusterState) -> Vec<Violation> {
    let mut found = Vec::new();
    for (id, _) in state.nodes.iter() {
        if id.number == 0 || id.number > state.nodes.given(id.role) {
            found.push(Violation::NumberNotGiven(id));
        }
    }
    if state.tokens.iter().any(|token| token.uses_left == 0) {
        found.push(Violation::SpentToken);
    }
    let strange = |id: &&NodeId| state.coordinators.get(**id).is_none();
    found.extend(
        state.coordinators.voters().iter().filter(strange).map(|id| Violation::StrangeVoter(*id)),
    );
    let mut replicas = BTreeSet::new();
    for (name, deployment) in state.deployments.iter() {
        if *name != deployment.spec.name {
            found.push(Violation::Misfiled(deployment.spec.name.to_string()));
        }
        for id in &deployment.replicas {
            if !replicas.insert(*id) || id.0 == 0 || id.0 > state.deployments.given() {
                found.push(Violation::ReplicaNotOwn(*id));
            }
        }
    }
    for next in state.plans.nexts() {
        let current = state.plans.get(next.id);
        if current.is_none_or(|current| current.generation >= next.generation) {
            found.push(Violation::NextNotNext(next.id));
        }
    }
    for (node, _) in state.drains.iter() {
        if state.nodes.get(node).is_none() {
            found.push(Violation::DrainOfNobody(node));
        }
    }
    let gone = state.versions.recorded().filter(|node| state.nodes.get(*node).is_none());
    found.extend(gone.map(Violation::VersionOfNobody));
    let nothing = state.meshes.names().filter(|name| state.deployments.get(name).is_none());
    found.extend(nothing.map(|name| Violation::MeshOfNothing(name.to_string())));
    found.extend(bad_adapters(state));
    for plan in state.plans.all() {
        let owner = state.deployments.get(&plan.deployment);
        match owner.filter(|deployment| deployment.replicas.contains(&plan.id)) {
            None => found.push(Violation::Orphan(plan.id)),
            Some(deployment) => {
                let given = |node| state.nodes.was_given(node);
                if let Some(fault) = plans::fault(plan, deployment.shape.layers(), given) {
                    found.push(Violation::BadPlan(plan.id, fault));
                }
            }
        }
    }
    found
}

fn bad_adapters(state: &ClusterState) -> impl Iterator<Item = Violation> + '_ {
    let mut numbers = BTreeSet::new();
    let bad = state.adapters.iter().filter(move |(name, adapter)| {
        let number = adapter.id.0;
        let own = numbers.insert(number) && number != 0 && number <= state.adapters.given();
        let placed = state.deployments.get(&adapter.deployment).is_some();
        !own || !placed || state.deployments.get(name).is_some()
    });
    bad.map(|(name, _)| Violation::BadAdapter(name.to_string()))
}
