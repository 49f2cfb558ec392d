//! One replica in one round: fine, wait, a new layout in its place, or a next one beside it.

use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::id::{Generation, NodeId, ReplicaId};
use shoal_protocol::plan::{ReplicaPlan, StagePlan};
use shoal_protocol::units::Instant;

use super::super::planner::{Inventory, Job};
use super::super::state::{Deployment, GENERATIONS_SKIPPED_MAX};
use super::health::{self, Health};
use super::words::place_of;
use super::{
    Action, History, Question, Round, STABLE_AFTER, Seeker, Stand, inventory_of, workers_for,
};

/// What the next layout comes to in this round.
enum Next {
    /// There is none, or it is given up in this round.
    None,
    /// It is being made.
    Coming(String),
    /// It takes over in this round.
    Here,
}

impl Round<'_> {
    pub(super) fn replica(&mut self, deployment: &Deployment, replica: ReplicaId) -> Stand {
        let observed = self.observed;
        let mut history = observed.history.get(&replica).cloned().unwrap_or_default();
        history.forget_gone(self.target, observed);
        let plan = self.target.plans.get(replica);
        if plan.is_some_and(|plan| history.next.generation == plan.generation) {
            history.current = std::mem::take(&mut history.next);
        }
        let removed = plan.map_or_else(Vec::new, |plan| self.removed(plan));
        let health = match removed.is_empty() {
            true => health::of(plan, observed, &mut history.current),
            false => health::needs_plan(format!("{} was removed", removed.join(", "))),
        };
        if !observed.follows {
            for watched in [&mut history.current, &mut history.next] {
                let apart = std::mem::take(&mut watched.apart);
                if !apart.is_empty() && !std::mem::replace(&mut watched.apart_counted, true) {
                    history.pairs.note(apart, observed.now);
                }
            }
            self.apart.extend(history.pairs.apart(observed.now));
        }
        if let (Health::Ready { .. }, Some(plan)) = (&health, plan) {
            self.look_at_paces(deployment, plan, &mut history);
        }
        let health = self.or_on_other_files(deployment, replica, health, &mut history);
        let stable = |since| observed.now.since(since) >= STABLE_AFTER;
        if history.current.ready_since.is_some_and(stable) {
            history.failures = 0;
            history.not_before = Instant::default();
        }
        let next = self.next(deployment, replica, &mut history);
        let stand = match next {
            Next::None => self.without_next(deployment, replica, &mut history, health),
            Next::Coming(coming) => with_next(health, &coming),
            Next::Here => with_next(health, "the next layout is ready and takes over"),
        };
        self.decision.history.insert(replica, history);
        stand
    }

    fn without_next(
        &mut self,
        deployment: &Deployment,
        replica: ReplicaId,
        history: &mut History,
        health: Health,
    ) -> Stand {
        let now = self.observed.now;
        match health {
            Health::Ready { reason } => match self.target.plans.get(replica) {
                Some(plan) => self.ready(deployment, plan, history, reason),
                None => stand(DeploymentPhase::Ready, reason),
            },
            Health::Loading { until, reason } => {
                until.into_iter().for_each(|until| self.wake(until));
                stand(DeploymentPhase::Loading, reason)
            }
            Health::Awaiting { until, reason } => {
                self.wake(until);
                stand(DeploymentPhase::Loading, reason)
            }
            Health::Hopeless { reason, .. } => stand(DeploymentPhase::Failed, reason),
            Health::NeedsPlan { reason, .. } if now < history.not_before => {
                self.wake(history.not_before);
                let wait = history.not_before.since(now);
                let reason = format!("{reason}; a new layout is made in {wait:.1?}");
                stand(DeploymentPhase::Loading, reason)
            }
            Health::NeedsPlan { reason, blame } => {
                self.plan_anew(deployment, replica, history, reason, &blame)
            }
        }
    }

    /// A worker that cannot read the model has said nothing about the copies that others have: they are
    /// asked before it is hopeless.
    fn or_on_other_files(
        &self,
        deployment: &Deployment,
        replica: ReplicaId,
        health: Health,
        history: &mut History,
    ) -> Health {
        let Health::Hopeless { reason, files_at: Some(node) } = health else { return health };
        history.unreadable.note(node, self.observed);
        let mut inventory = self.inventory(deployment, replica, true);
        history.unreadable.leave_out(&mut inventory);
        match inventory.workers.is_empty() {
            true => Health::Hopeless { reason, files_at: None },
            false => Health::NeedsPlan { reason, blame: Vec::new() },
        }
    }

    /// Looks at the next layout: whether it is ready, or not wanted any more.
    fn next(&mut self, deployment: &Deployment, replica: ReplicaId, history: &mut History) -> Next {
        let observed = self.observed;
        let Some(next) = self.target.plans.next(replica) else { return Next::None };
        let generation = next.generation;
        let asked = self.target.plans.next_asked(replica).unwrap_or(deployment.asked);
        let drained = next.nodes().find(|node| self.target.drains.contains(*node));
        if let Some(node) = drained.filter(|_| !observed.follows) {
            return self.abandon(next, format!("{node} is drained by now"));
        }
        let removed = self.removed(next);
        if !removed.is_empty() && !observed.follows {
            return self.abandon(next, format!("{} was removed", removed.join(", ")));
        }
        if asked < deployment.asked && !observed.follows {
            return self.abandon(next, "something else was asked for by now".into());
        }
        match health::of(Some(next), observed, &mut history.next) {
            Health::Ready { reason }
            | Health::NeedsPlan { reason, .. }
            | Health::Hopeless { reason, .. }
                if observed.follows =>
            {
                Next::Coming(format!("{generation}: {reason}"))
            }
            Health::Ready { .. } => {
                self.decision.actions.push(Action::Promote { replica, generation });
                Next::Here
            }
            Health::Loading { until, reason } => {
                until.into_iter().for_each(|until| self.wake(until));
                Next::Coming(reason)
            }
            Health::Awaiting { until, reason } => {
                self.wake(until);
                Next::Coming(format!("{generation}: {reason}"))
            }
            Health::NeedsPlan { reason, blame } => {
                history.blame(observed.now, Some(generation), &blame);
                history.note_failure(observed.now);
                self.abandon(next, reason)
            }
            Health::Hopeless { reason, files_at: Some(node) } => {
                history.unreadable.note(node, observed);
                history.note_failure(observed.now);
                self.abandon(next, reason)
            }
            Health::Hopeless { reason, files_at: None } => {
                let blame: Vec<NodeId> = next.nodes().collect();
                // Which of them it was stands in the words; the current layout runs on others.
                let here: Vec<NodeId> = self.serving_nodes(replica);
                let new: Vec<_> = blame.into_iter().filter(|node| !here.contains(node)).collect();
                history.blame(observed.now, Some(generation), &new);
                history.note_failure(observed.now);
                self.abandon(next, reason)
            }
        }
    }

    fn abandon(&mut self, next: &ReplicaPlan, reason: String) -> Next {
        let (replica, generation) = (next.id, next.generation);
        self.decision.actions.push(Action::Abandon { replica, generation, reason });
        self.plans.retain(|plan| (plan.id, plan.generation) != (replica, generation));
        Next::None
    }

    fn serving_nodes(&self, replica: ReplicaId) -> Vec<NodeId> {
        self.target.plans.get(replica).map(|plan| plan.nodes().collect()).unwrap_or_default()
    }

    fn plan_anew(
        &mut self,
        deployment: &Deployment,
        replica: ReplicaId,
        history: &mut History,
        reason: String,
        blame: &[NodeId],
    ) -> Stand {
        let mut inventory = self.inventory(deployment, replica, true);
        // Where it is the files, whoever waits for capacity waits for an operator.
        let phase = match history.unreadable.leave_out(&mut inventory) {
            true => DeploymentPhase::Failed,
            false => DeploymentPhase::Waiting,
        };
        let waiting = |why: &str| {
            let reason =
                if reason.is_empty() { why.to_owned() } else { format!("{reason}; {why}") };
            stand(phase, reason)
        };
        let question = self.question(deployment, &inventory);
        // The planner is a function, so it would say the same again.
        if let Some((refused, why)) = &history.refused
            && *refused == question
        {
            return waiting(why);
        }
        let previous = self.target.plans.get(replica);
        let follows = self.observed.follows;
        let blame = if follows { Default::default() } else { blame };
        history.blame(self.observed.now, previous.map(|plan| plan.generation), blame);
        let job = self.job(deployment, replica);
        let generation = job.generation;
        let foreseen = || {
            let words = format!("{reason}; {generation} is for the leader to make");
            let words = words.trim_start_matches("; ").to_owned();
            stand(DeploymentPhase::Loading, words)
        };
        if follows && history.foreseen.as_ref() == Some(&question) {
            return foreseen();
        }
        match history.suspects.plan(&inventory, &job, self.observed.now) {
            Ok(_) if follows => {
                history.refused = None;
                history.foreseen = Some(question);
                foreseen()
            }
            Ok(plan) => {
                history.refused = None;
                if previous.is_some() {
                    history.note_failure(self.observed.now);
                }
                let loading = format!("{} is being made: {}", plan.generation, place_of(&plan));
                let reason = if reason.is_empty() { "it has no layout yet".into() } else { reason };
                self.adopt(plan, reason);
                stand(DeploymentPhase::Loading, loading)
            }
            Err(refusal) => {
                let why = refusal.to_string();
                let stand = match refusal.is_of_the_cluster() {
                    true => waiting(&why),
                    false => stand(DeploymentPhase::Failed, why.clone()),
                };
                history.refused = Some((question, why));
                stand
            }
        }
    }

    /// Proposes a layout in the place of whatever the replica has.
    pub(super) fn adopt(&mut self, plan: ReplicaPlan, reason: String) {
        self.plans.retain(|other| other.id != plan.id);
        self.plans.push(plan.clone());
        self.decision.actions.push(Action::Adopt { plan: Box::new(plan), reason });
    }

    pub(super) fn question(&self, deployment: &Deployment, inventory: &Inventory) -> Question {
        Question::new(deployment.asked, self.target.meshes.of(&deployment.spec.name), inventory)
    }

    pub(super) fn job<'a>(&'a self, deployment: &'a Deployment, replica: ReplicaId) -> Job<'a> {
        Job {
            replica,
            generation: Generation(self.newest(replica).0 + 1),
            spec: &deployment.spec,
            shape: &deployment.shape,
            previous: self.target.plans.get(replica),
            replicas: deployment.replicas.len(),
            ask: self.target.meshes.of(&deployment.spec.name),
        }
    }

    /// The workers that a replica may use; `instead`: what it has now counts as free.
    pub(super) fn inventory(
        &self,
        deployment: &Deployment,
        replica: ReplicaId,
        instead: bool,
    ) -> Inventory {
        let seeker = Seeker { name: &deployment.spec.name, replica, instead };
        let workers = workers_for(self.target, self.observed, &self.plans, seeker);
        inventory_of(self.target, self.observed, workers, self.apart.clone())
    }

    /// Notes how fast each worker of a layout that serves was since the last time.
    fn look_at_paces(&self, deployment: &Deployment, plan: &ReplicaPlan, history: &mut History) {
        let bytes = |stage: &StagePlan| -> u64 {
            let layers = stage.layers;
            let step = |layer| deployment.shape.step_bytes(layer, plan.precision).0;
            let all: u64 = (layers.start..layers.end).map(step).sum();
            all / (stage.shards.len().max(1) as u64)
        };
        // A shard for each rank of each stage, in mesh order.
        let bytes =
            plan.stages.iter().flat_map(|stage| stage.shards.iter().map(move |_| bytes(stage)));
        let shards: Vec<_> = health::current_shards(plan, self.observed)
            .into_iter()
            .zip(bytes)
            .map(|((node, shard), bytes)| (node, shard, bytes))
            .collect();
        history.paces.look(plan.generation, &shards, self.observed.now);
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
}

/// Where a replica is whose next layout is under way.
fn with_next(health: Health, coming: &str) -> Stand {
    match health {
        Health::Ready { reason } => {
            stand(DeploymentPhase::Ready, format!("{reason}; moving: {coming}"))
        }
        Health::Loading { reason, .. }
        | Health::Awaiting { reason, .. }
        | Health::Hopeless { reason, .. }
        | Health::NeedsPlan { reason, .. } => {
            stand(DeploymentPhase::Loading, format!("{reason}; moving: {coming}"))
        }
    }
}

/// Not settled: something is under way.
pub(super) fn stand(phase: DeploymentPhase, reason: String) -> Stand {
    Stand { phase, reason, settled: false }
}
