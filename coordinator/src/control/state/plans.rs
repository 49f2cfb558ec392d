//! Where each replica is served: one layout per replica, numbered by generation, and while it moves
//! the next one beside it.
//!
//! ```text
//! Adopt:    (none | g1)       ─► g2          the old one is gone at once
//! Prepare:  g1                ─► g1, next g2
//! Promote:  g1, next g2       ─► g2          Abandon: ─► g1
//! ```
//!
//! A generation belongs to one replica alone: a new layout of one never touches another's. No number is
//! given twice, not even that of a layout that was given up.

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
    /// Make this layout beside the one that serves; a next one that there is already is given up.
    Prepare {
        /// The whole layout.
        plan: Box<ReplicaPlan>,
        /// The `Deployment::asked` that it was made for.
        asked: u64,
    },
    /// The next layout takes the place of the one that serves.
    Promote {
        /// The replica.
        replica: ReplicaId,
        /// The next layout.
        generation: Generation,
    },
    /// Give the next layout up.
    Abandon {
        /// The replica.
        replica: ReplicaId,
        /// The next layout.
        generation: Generation,
    },
    /// The layout is as was asked for, so there is nothing to move.
    Confirm {
        /// The replica.
        replica: ReplicaId,
        /// Its layout.
        generation: Generation,
        /// The `Deployment::asked` that it serves as well.
        asked: u64,
    },
}

/// All layouts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plans {
    revision: PlanRevision,
    by_replica: BTreeMap<ReplicaId, Layouts>,
}

/// The layouts of one replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Layouts {
    /// The one that serves, or is to.
    current: ReplicaPlan,
    /// The `Deployment::asked` that it was made for.
    asked: u64,
    /// The one that is being made beside it, and what for.
    next: Option<(ReplicaPlan, u64)>,
    /// The newest number that was given.
    newest: Generation,
}

impl Plans {
    /// All layouts that serve, or are to, by replica.
    pub fn iter(&self) -> impl Iterator<Item = &ReplicaPlan> {
        self.by_replica.values().map(|layouts| &layouts.current)
    }

    /// All layouts that are being made beside others, by replica.
    pub fn nexts(&self) -> impl Iterator<Item = &ReplicaPlan> {
        self.by_replica.values().filter_map(|layouts| Some(&layouts.next.as_ref()?.0))
    }

    /// All layouts that hold memory: by replica, the one that serves before the next.
    pub fn all(&self) -> impl Iterator<Item = &ReplicaPlan> {
        self.by_replica.values().flat_map(|layouts| {
            [&layouts.current].into_iter().chain(layouts.next.as_ref().map(|(next, _)| next))
        })
    }

    /// The replica's layout, where it has one.
    pub fn get(&self, replica: ReplicaId) -> Option<&ReplicaPlan> {
        self.by_replica.get(&replica).map(|layouts| &layouts.current)
    }

    /// The replica's next layout, where one is being made.
    pub fn next(&self, replica: ReplicaId) -> Option<&ReplicaPlan> {
        Some(&self.by_replica.get(&replica)?.next.as_ref()?.0)
    }

    /// The `Deployment::asked` that the replica's layout was made for; 0 before the first.
    pub fn asked(&self, replica: ReplicaId) -> u64 {
        self.by_replica.get(&replica).map_or(0, |layouts| layouts.asked)
    }

    /// The `Deployment::asked` that the replica's next layout is made for, where there is one.
    pub fn next_asked(&self, replica: ReplicaId) -> Option<u64> {
        Some(self.by_replica.get(&replica)?.next.as_ref()?.1)
    }

    /// The newest number of the replica's layouts; 0 before the first.
    pub fn generation(&self, replica: ReplicaId) -> Generation {
        self.by_replica.get(&replica).map_or(Generation(0), |layouts| layouts.newest)
    }

    /// The whole plan as others see it.
    pub fn to_plan(&self) -> Plan {
        Plan { revision: self.revision, replicas: self.iter().cloned().collect() }
    }

    pub(super) fn change(
        &mut self,
        command: &PlanCommand,
        deployments: &Deployments,
        nodes: &Nodes,
    ) -> Result<Vec<Effect>, Refusal> {
        match command {
            PlanCommand::Adopt { plan } => self.adopt(plan, deployments, nodes),
            PlanCommand::Prepare { plan, asked } => self.prepare(plan, *asked, deployments, nodes),
            PlanCommand::Promote { replica, generation } => self.promote(*replica, *generation),
            PlanCommand::Abandon { replica, generation } => self.abandon(*replica, *generation),
            PlanCommand::Confirm { replica, generation, asked } => {
                let replica = *replica;
                let layouts = self.by_replica.get_mut(&replica);
                match layouts.filter(|layouts| layouts.current.generation == *generation) {
                    Some(layouts) => layouts.asked = layouts.asked.max(*asked),
                    None => return Err(self.stale(replica, *generation)),
                }
                Ok(vec![Effect::PlanConfirmed { replica }])
            }
        }
    }

    fn adopt(
        &mut self,
        plan: &ReplicaPlan,
        deployments: &Deployments,
        nodes: &Nodes,
    ) -> Result<Vec<Effect>, Refusal> {
        let asked = self.check(plan, deployments, nodes)?;
        self.revision.0 += 1;
        let (revision, replica, newest) = (self.revision, plan.id, plan.generation);
        let layouts = Layouts { current: plan.clone(), asked, next: None, newest };
        self.by_replica.insert(replica, layouts);
        Ok(vec![Effect::PlanAdopted { revision, replica, generation: plan.generation }])
    }

    fn prepare(
        &mut self,
        plan: &ReplicaPlan,
        asked: u64,
        deployments: &Deployments,
        nodes: &Nodes,
    ) -> Result<Vec<Effect>, Refusal> {
        self.check(plan, deployments, nodes)?;
        let (replica, generation) = (plan.id, plan.generation);
        let Some(layouts) = self.by_replica.get_mut(&replica) else {
            let fault = "there is no layout that serves meanwhile".into();
            return Err(Refusal::BadPlan { replica, fault });
        };
        layouts.next = Some((plan.clone(), asked));
        layouts.newest = generation;
        self.revision.0 += 1;
        Ok(vec![Effect::PlanPrepared { revision: self.revision, replica, generation }])
    }

    fn promote(
        &mut self,
        replica: ReplicaId,
        generation: Generation,
    ) -> Result<Vec<Effect>, Refusal> {
        let (next, asked) = self.take_next(replica, generation)?;
        if let Some(layouts) = self.by_replica.get_mut(&replica) {
            layouts.current = next;
            layouts.asked = asked;
        }
        self.revision.0 += 1;
        Ok(vec![Effect::PlanAdopted { revision: self.revision, replica, generation }])
    }

    fn abandon(
        &mut self,
        replica: ReplicaId,
        generation: Generation,
    ) -> Result<Vec<Effect>, Refusal> {
        self.take_next(replica, generation)?;
        self.revision.0 += 1;
        Ok(vec![Effect::PlanAbandoned { revision: self.revision, replica, generation }])
    }

    fn take_next(
        &mut self,
        replica: ReplicaId,
        generation: Generation,
    ) -> Result<(ReplicaPlan, u64), Refusal> {
        let next = self
            .by_replica
            .get_mut(&replica)
            .and_then(|layouts| layouts.next.take_if(|(next, _)| next.generation == generation));
        next.ok_or_else(|| self.stale(replica, generation))
    }

    fn stale(&self, replica: ReplicaId, offered: Generation) -> Refusal {
        Refusal::StalePlan { replica, current: self.generation(replica), offered }
    }

    /// Whether a layout may be taken; the `Deployment::asked` of its deployment.
    fn check(
        &self,
        plan: &ReplicaPlan,
        deployments: &Deployments,
        nodes: &Nodes,
    ) -> Result<u64, Refusal> {
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
        match fault(plan, deployment.shape.layers(), known) {
            Some(fault) => Err(bad(fault)),
            None => Ok(deployment.asked),
        }
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
