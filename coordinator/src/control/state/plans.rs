//! Where each replica is served: one layout per replica, numbered by generation.
//!
//! A generation belongs to one replica alone: a new layout of one never touches another's.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shoal_protocol::id::{Generation, NodeId, PlanRevision, ReplicaId, Role};
use shoal_protocol::plan::{Plan, ReplicaPlan};

use super::command::{Effect, Refusal};
use super::deployments::Deployments;
use super::nodes::Nodes;

/// The most generations that a new layout may leave out. A state that was restored from a backup goes
/// on behind what the workers have seen since; there is a layout every 30 s at most where nothing
/// works, so this is a year. One number that makes no sense must not use up all others.
pub const GENERATIONS_SKIPPED_MAX: u64 = 1 << 20;

/// Changes of where a replica is served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PlanCommand {
    /// Take this layout for its replica. Its generation must be newer than the last one: mostly by one,
    /// so of two layouts that were made from the same view only the first is taken.
    Adopt {
        /// The whole layout.
        plan: Box<ReplicaPlan>,
    },
}

/// All layouts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plans {
    revision: PlanRevision,
    by_replica: BTreeMap<ReplicaId, ReplicaPlan>,
}

impl Plans {
    /// All layouts by replica.
    pub fn iter(&self) -> impl Iterator<Item = &ReplicaPlan> {
        self.by_replica.values()
    }

    /// The replica's layout, where it has one.
    pub fn get(&self, replica: ReplicaId) -> Option<&ReplicaPlan> {
        self.by_replica.get(&replica)
    }

    /// The number of the replica's layout; 0 before the first.
    pub fn generation(&self, replica: ReplicaId) -> Generation {
        self.get(replica).map_or(Generation(0), |plan| plan.generation)
    }

    /// The whole plan as others see it.
    pub fn to_plan(&self) -> Plan {
        Plan { revision: self.revision, replicas: self.iter().cloned().collect() }
    }

    pub(super) fn adopt(
        &mut self,
        plan: &ReplicaPlan,
        deployments: &Deployments,
        nodes: &Nodes,
    ) -> Result<Vec<Effect>, Refusal> {
        let replica = plan.id;
        let bad = |fault: String| Refusal::BadPlan { replica, fault };
        let name = &plan.deployment;
        let deployment = deployments
            .get(name)
            .filter(|deployment| deployment.replicas.contains(&replica))
            .ok_or_else(|| Refusal::UnknownDeployment { name: name.clone() })?;
        let current = self.generation(replica);
        let offered = plan.generation;
        if offered <= current {
            return Err(Refusal::StalePlan { replica, current, offered });
        }
        if offered.0 - current.0 > GENERATIONS_SKIPPED_MAX {
            return Err(bad(format!("it jumps from {current} to {offered}")));
        }
        if plan.model != deployment.spec.model {
            return Err(bad("it names another model than its deployment".into()));
        }
        let known = |node| nodes.get(node).is_some();
        if let Some(fault) = fault(plan, deployment.shape.layers(), known) {
            return Err(bad(fault));
        }
        self.revision.0 += 1;
        self.by_replica.insert(replica, plan.clone());
        let revision = self.revision;
        Ok(vec![Effect::PlanAdopted { revision, replica, generation: plan.generation }])
    }

    /// Forgets the layouts of these replicas.
    pub(super) fn remove(&mut self, replicas: &[ReplicaId]) -> Vec<Effect> {
        let mut effects = Vec::new();
        for replica in replicas {
            if self.by_replica.remove(replica).is_some() {
                self.revision.0 += 1;
                let revision = self.revision;
                effects.push(Effect::PlanRemoved { revision, replica: *replica });
            }
        }
        effects
    }
}

/// What is wrong with a layout of a model with this many layers. A new one names nodes that are there;
/// one that is there may name some that were removed since.
pub(super) fn fault(
    plan: &ReplicaPlan,
    layers: u32,
    known: impl Fn(NodeId) -> bool,
) -> Option<String> {
    let mut next = 0;
    for (index, stage) in plan.stages.iter().enumerate() {
        if stage.layers.start != next || stage.layers.is_empty() {
            return Some(format!("stage {index} has layers {}, not from {next}", stage.layers));
        }
        next = stage.layers.end;
        if stage.shards.is_empty() {
            return Some(format!("stage {index} has no shard"));
        }
        for shard in &stage.shards {
            if shard.node.role != Role::Worker || !known(shard.node) {
                return Some(format!("stage {index} is on {}, no worker of ours", shard.node));
            }
        }
    }
    let mut places: Vec<_> =
        plan.stages.iter().flat_map(|s| &s.shards).map(|s| (s.node, &s.device)).collect();
    places.sort();
    if let Some(pair) = places.windows(2).find(|pair| pair[0] == pair[1]) {
        return Some(format!("two shards are on {} {}", pair[0].0, pair[0].1));
    }
    (next != layers).then(|| format!("its stages end at layer {next} of {layers}"))
}
