//! ○ (target, observed) → actions with reasons.
//!
//! ```text
//! for each replica:  how is it? (health) ─► fine, wait, or a new layout (planner) ─► Adopt
//! for each worker:   what should it be? ─► differs from what it was told ─► Assign
//! ```
//!
//! A new layout is only proposed here; workers are told of it in the next round, after the state
//! has taken it. What must be remembered between rounds (who ran under which start number, how often
//! a replica was planned anew) goes in and comes out as [`History`], so that the function has no
//! memory of its own. It converges from any state, and a round that changes nothing has no action.

mod health;
mod patience;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::control::{Register, Report};
use shoal_protocol::id::{
    DeploymentName, Generation, Incarnation, NodeId, RankIndex, ReplicaId, StageIndex,
};
use shoal_protocol::plan::{Assignment, DeploymentSpec, PeerAddress, ReplicaPlan};
use shoal_protocol::units::{Bytes, Instant};

use super::planner::{Candidate, Inventory, Job, PlanRefusal, plan};
use super::shape::ModelShape;
use super::state::{ClusterState, Deployment, GENERATIONS_SKIPPED_MAX};
use health::Health;
use patience::Standing;

/// How long a coordinator that has just started waits for the workers of a layout before it counts
/// them as lost. They try again every second, and their shards may still be serving.
pub const RECONNECT_GRACE: Duration = Duration::from_secs(5);

/// How long a shard that lost its link waits at most for a better explanation. Most often it takes two
/// beats: a worker that has died is given up on its control link at about the same time as on its
/// other links, and where all workers of the layout were heard since, none of them has died. The
/// detector takes 1.2 s at worst.
pub const LINK_SETTLE: Duration = Duration::from_secs(2);

/// How often to see who was heard meanwhile: two beats of a worker at which work flows.
pub const LINK_SETTLE_LOOK: Duration = Duration::from_millis(20);

/// The wait after the second layout in a row that did not last; it doubles with each further one.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(250);

/// The longest such wait: a person who has mended the cause should not have to wait longer.
pub const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// A layout that was ready for so long counts as a success: the next failure is a first one.
pub const STABLE_AFTER: Duration = Duration::from_secs(30);

/// What this coordinator sees of the workers, and what it remembers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// The time.
    pub now: Instant,
    /// When this coordinator began to listen.
    pub since: Instant,
    /// Whether another one leads, or nobody: then nothing is done here, nobody is blamed for what
    /// nobody was told from here, and what is to be done is only foreseen.
    pub follows: bool,
    /// The workers that have registered since then.
    pub workers: BTreeMap<NodeId, ObservedWorker>,
    /// What the last round left.
    pub history: BTreeMap<ReplicaId, History>,
}

/// One worker, as it registered and reported.
#[derive(Clone, Debug, PartialEq)]
pub struct ObservedWorker {
    /// Whether its control link is up.
    pub connected: bool,
    /// How long ago it was last heard on that link.
    pub silent_for: Duration,
    /// What it registered with, under addresses that others reach.
    pub register: Register,
    /// Its last report.
    pub report: Report,
    /// What it was last told to be on its present connection; `None` before the first time.
    pub pushed: Option<Vec<Assignment>>,
}

/// What is remembered of one replica between rounds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// The layout that the next three fields are about.
    generation: Generation,
    /// The start numbers under which its workers took it.
    incarnations: BTreeMap<NodeId, Incarnation>,
    /// Where its shards stand that are not ready.
    standing: BTreeMap<NodeId, Standing>,
    /// Since when a shard has had no link.
    unlinked_since: Option<Instant>,
    /// Since when the coordinator has missed all of its workers, or some that it missed then.
    alone_since: Option<Instant>,
    /// Since when all of it has been ready.
    ready_since: Option<Instant>,
    /// New layouts in a row, none of which was ready for `STABLE_AFTER`.
    failures: u32,
    /// No new layout before.
    not_before: Instant,
    /// The workers for which the planner last said no, and its words.
    refused: Option<(Inventory, String)>,
    /// The workers for which a follower's planner last said yes.
    foreseen: Option<Inventory>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Propose this layout.
    Adopt {
        /// The layout.
        plan: Box<ReplicaPlan>,
        /// Why.
        reason: String,
    },
    /// Tell a worker all that it should be.
    Assign {
        /// The worker.
        node: NodeId,
        /// All of it.
        assignments: Vec<Assignment>,
        /// Why.
        reason: String,
    },
}

/// Where a deployment is, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Phase {
    /// Where.
    pub phase: DeploymentPhase,
    /// Why, for people.
    pub reason: String,
}

/// All that one round comes to. Prints as a list of actions with reasons.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// What is to be done, in this order.
    pub actions: Vec<Action>,
    /// Where each deployment is.
    pub phases: BTreeMap<DeploymentName, Phase>,
    /// What the next round should be given.
    pub history: BTreeMap<ReplicaId, History>,
    /// When to look again even if nothing changes.
    pub wake_at: Option<Instant>,
}

/// One round.
pub fn reconcile(target: &ClusterState, observed: &Observed) -> Decision {
    let mut round = Round {
        target,
        observed,
        plans: target.plans.iter().map(|plan| (plan.id, plan.clone())).collect(),
        decision: Decision::default(),
    };
    for (name, deployment) in target.deployments.iter() {
        for replica in &deployment.replicas {
            let phase = round.replica(deployment, *replica);
            // With one replica a deployment is where its replica is.
            round.decision.phases.insert(name.clone(), phase);
        }
    }
    let connected = observed.workers.iter().filter(|(_, worker)| worker.connected);
    for (node, worker) in connected.filter(|_| !observed.follows) {
        round.assign(*node, worker);
    }
    round.decision
}

struct Round<'a> {
    target: &'a ClusterState,
    observed: &'a Observed,
    /// The layouts of the state, and those that this round proposes in their place: what they use
    /// of a worker is not free for the next one.
    plans: BTreeMap<ReplicaId, ReplicaPlan>,
    decision: Decision,
}

impl Round<'_> {
    fn replica(&mut self, deployment: &Deployment, replica: ReplicaId) -> Phase {
        let observed = self.observed;
        let mut history = observed.history.get(&replica).cloned().unwrap_or_default();
        let plan = self.target.plans.get(replica);
        let removed = plan.map_or_else(Vec::new, |plan| self.removed(plan));
        let health = match removed.is_empty() {
            true => health::of(plan, observed, &mut history),
            false => Health::NeedsPlan { reason: format!("{} was removed", removed.join(", ")) },
        };
        let phase = match health {
            Health::Ready { reason } => Phase { phase: DeploymentPhase::Ready, reason },
            Health::Loading { until, reason } => {
                until.into_iter().for_each(|until| self.wake(until));
                Phase { phase: DeploymentPhase::Loading, reason }
            }
            Health::Awaiting { until, reason } => {
                self.wake(until);
                Phase { phase: DeploymentPhase::Loading, reason }
            }
            Health::Hopeless { reason } => Phase { phase: DeploymentPhase::Failed, reason },
            Health::NeedsPlan { reason } if observed.now < history.not_before => {
                self.wake(history.not_before);
                let wait = history.not_before.since(observed.now);
                let reason = format!("{reason}; a new layout is made in {wait:.1?}");
                Phase { phase: DeploymentPhase::Loading, reason }
            }
            Health::NeedsPlan { reason } => {
                self.plan_anew(deployment, replica, &mut history, reason)
            }
        };
        self.decision.history.insert(replica, history);
        phase
    }

    fn plan_anew(
        &mut self,
        deployment: &Deployment,
        replica: ReplicaId,
        history: &mut History,
        reason: String,
    ) -> Phase {
        let inventory = self.inventory(replica);
        let waiting = |why: &str| Phase {
            phase: DeploymentPhase::Waiting,
            reason: if reason.is_empty() { why.to_owned() } else { format!("{reason}; {why}") },
        };
        // The planner is a function, so it would say the same again.
        if let Some((refused, why)) = &history.refused
            && *refused == inventory
        {
            return waiting(why);
        }
        let previous = self.target.plans.get(replica);
        let generation = Generation(self.newest(replica).0 + 1);
        let foreseen = || Phase {
            phase: DeploymentPhase::Loading,
            reason: format!("{reason}; {generation} is for the leader to make")
                .trim_start_matches("; ")
                .to_owned(),
        };
        if self.observed.follows && history.foreseen.as_ref() == Some(&inventory) {
            return foreseen();
        }
        let job =
            Job { replica, generation, spec: &deployment.spec, shape: &deployment.shape, previous };
        match plan(&inventory, &job) {
            Ok(_) if self.observed.follows => {
                history.refused = None;
                history.foreseen = Some(inventory);
                foreseen()
            }
            Ok(plan) => {
                history.refused = None;
                if previous.is_some() {
                    history.failures = history.failures.saturating_add(1);
                    history.not_before = self.observed.now + backoff(history.failures);
                }
                let loading = format!("{generation} is being made: {}", place_of(&plan));
                self.plans.insert(replica, plan.clone());
                let reason = if reason.is_empty() { "it has no layout yet".into() } else { reason };
                self.decision.actions.push(Action::Adopt { plan: Box::new(plan), reason });
                Phase { phase: DeploymentPhase::Loading, reason: loading }
            }
            Err(refusal) => {
                let why = refusal.to_string();
                let phase = match refusal.is_of_the_cluster() {
                    true => waiting(&why),
                    false => Phase { phase: DeploymentPhase::Failed, reason: why.clone() },
                };
                history.refused = Some((inventory, why));
                phase
            }
        }
    }

    /// The workers of a layout that do not belong to the cluster any more.
    fn removed(&self, plan: &ReplicaPlan) -> Vec<String> {
        let gone = plan.nodes().filter(|node| self.target.nodes.get(*node).is_none());
        gone.map(|node| node.to_string()).collect()
    }

    /// The newest layout that there has been of a replica: workers may know of newer ones than a state
    /// that was restored from a backup.
    fn newest(&self, replica: ReplicaId) -> Generation {
        let taken = self.target.plans.generation(replica);
        let shards = self.observed.workers.values().flat_map(|worker| &worker.report.shards);
        let seen = shards.filter(|shard| shard.replica == replica).map(|shard| shard.generation);
        // The state would refuse what is after so many more.
        let credible = seen.filter(|seen| seen.0 < taken.0.saturating_add(GENERATIONS_SKIPPED_MAX));
        credible.max().map_or(taken, |seen| seen.max(taken))
    }

    /// The connected workers, with what other replicas use of them.
    fn inventory(&self, replica: ReplicaId) -> Inventory {
        inventory_without(&self.plans, Some(replica), self.observed)
    }

    fn assign(&mut self, node: NodeId, worker: &ObservedWorker) {
        let pushed = worker.pushed.as_deref();
        let mut wanted = Vec::new();
        for plan in self.target.plans.iter() {
            let Some((stage, rank)) = seat_of(plan, node) else { continue };
            // Nobody may go on with a node that was removed, whether another takes its place or not.
            // Until the next round, which has the new layout, shards are kept for their heirs.
            let replaced =
                self.plans.get(&plan.id).is_some_and(|new| new.generation != plan.generation);
            if !replaced && !self.removed(plan).is_empty() {
                continue;
            }
            // What was said once of a generation stays said: its workers may come back under other
            // addresses only as a new generation.
            let before = pushed.unwrap_or_default().iter().find(|assignment| {
                assignment.replica.id == plan.id && assignment.replica.generation == plan.generation
            });
            if let Some(before) = before {
                wanted.push(before.clone());
                continue;
            }
            match self.peers(plan) {
                Some(peers) => {
                    wanted.push(Assignment { replica: plan.clone(), stage, rank, peers });
                }
                // A list without this shard would drop it, so the worker is told nothing as long as
                // there is hope for its peers.
                None if self.observed.now < self.observed.since + RECONNECT_GRACE => return,
                None => {}
            }
        }
        if pushed == Some(wanted.as_slice()) {
            return;
        }
        let reason = reason_for(pushed, &wanted);
        self.decision.actions.push(Action::Assign { node, assignments: wanted, reason });
    }

    /// Where the workers of a layout are; `None` where one has not been heard of yet.
    fn peers(&self, plan: &ReplicaPlan) -> Option<Vec<PeerAddress>> {
        plan.nodes()
            .map(|node| {
                let activations = self.observed.workers.get(&node)?.register.activations;
                Some(PeerAddress { node, activations })
            })
            .collect()
    }

    fn wake(&mut self, at: Instant) {
        let earlier = self.decision.wake_at.is_none_or(|other| at < other);
        if earlier {
            self.decision.wake_at = Some(at);
        }
    }
}

/// The connected workers, with what the replicas of the state use of them: what a new deployment can
/// have.
pub fn inventory(target: &ClusterState, observed: &Observed) -> Inventory {
    let plans = target.plans.iter().map(|plan| (plan.id, plan.clone())).collect();
    inventory_without(&plans, None, observed)
}

/// What a replica could have if it were planned anew.
pub fn inventory_for(target: &ClusterState, observed: &Observed, replica: ReplicaId) -> Inventory {
    let plans = target.plans.iter().map(|plan| (plan.id, plan.clone())).collect();
    inventory_without(&plans, Some(replica), observed)
}

fn inventory_without(
    plans: &BTreeMap<ReplicaId, ReplicaPlan>,
    without: Option<ReplicaId>,
    observed: &Observed,
) -> Inventory {
    let connected = observed.workers.iter().filter(|(_, worker)| worker.connected);
    let candidates = connected.filter_map(|(node, worker)| {
        // One shard per worker and replica, so the first device is the one that counts.
        let device = worker.register.devices.first()?;
        let used: Bytes = plans
            .values()
            .filter(|plan| Some(plan.id) != without)
            .flat_map(|plan| plan.stages.iter().flat_map(|stage| &stage.shards))
            .filter(|shard| shard.node == *node)
            .map(|shard| shard.memory.total())
            .sum();
        Some(Candidate {
            node: *node,
            device: device.name.clone(),
            budget: device.memory,
            used,
            numerics: worker.register.numerics.clone(),
        })
    });
    Inventory { workers: candidates.collect() }
}

fn backoff(failures: u32) -> Duration {
    if failures == 0 {
        return Duration::ZERO;
    }
    BACKOFF_FIRST.saturating_mul(1 << (failures - 1).min(16)).min(BACKOFF_MAX)
}

/// The stage and rank of a worker in a layout.
fn seat_of(plan: &ReplicaPlan, node: NodeId) -> Option<(StageIndex, RankIndex)> {
    plan.stages.iter().enumerate().find_map(|(stage, s)| {
        let shard = s.shards.iter().find(|shard| shard.node == node)?;
        Some((StageIndex(stage as u32), shard.rank))
    })
}

fn place_of(plan: &ReplicaPlan) -> String {
    let nodes: Vec<_> = plan.nodes().map(|node| node.to_string()).collect();
    format!("{} on {}", plan.mesh(), nodes.join(", "))
}

/// The difference between what a worker was told and what it should be.
fn reason_for(pushed: Option<&[Assignment]>, wanted: &[Assignment]) -> String {
    let key = |a: &Assignment| (a.replica.id, a.replica.generation);
    let before = pushed.unwrap_or_default();
    let mut parts = Vec::new();
    for assignment in wanted.iter().filter(|a| before.iter().all(|b| key(a) != key(b))) {
        let ReplicaPlan { id, generation, .. } = assignment.replica;
        parts.push(format!(
            "{id} {generation}: {} with layers {}",
            assignment.stage,
            assignment.layers()
        ));
    }
    for gone in before.iter().filter(|b| wanted.iter().all(|a| a.replica.id != b.replica.id)) {
        parts.push(format!("no more {} {}", gone.replica.id, gone.replica.generation));
    }
    if pushed.is_none() {
        parts.insert(0, "it has just connected".into());
    }
    parts.join("; ")
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Adopt { plan, reason } => {
                write!(f, "adopt {} {} ({}): {reason}", plan.id, plan.generation, place_of(plan))
            }
            Action::Assign { node, assignments, reason } => {
                let n = assignments.len();
                let shards = if n == 1 { "shard" } else { "shards" };
                write!(f, "assign {node} {n} {shards}: {reason}")
            }
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.actions.iter().try_for_each(|action| writeln!(f, "{action}"))?;
        self.phases
            .iter()
            .try_for_each(|(name, at)| writeln!(f, "{name} is {:?}: {}", at.phase, at.reason))
    }
}

/// What the planner says when asked for a layout that nobody will carry out: for `deploy`, before
/// anything is proposed.
pub fn dry_run(
    target: &ClusterState,
    observed: &Observed,
    spec: &DeploymentSpec,
    shape: &ModelShape,
) -> Result<ReplicaPlan, PlanRefusal> {
    // No deployment has replica 0.
    let replica = ReplicaId(0);
    let job = Job { replica, generation: Generation(1), spec, shape, previous: None };
    plan(&inventory(target, observed), &job)
}

#[cfg(test)]
#[path = "reconcile_test.rs"]
mod tests;
