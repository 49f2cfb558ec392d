//! A replica that serves and is to be somewhere else: off a drained worker, or spread anew because it
//! was asked for.
//!
//! ```text
//! as it would be planned now ─► Confirm
//! memory for both            ─► Prepare: the next one is loaded while this one serves
//! memory for one of them     ─► Adopt: its streams pause, and go on by replay
//! memory for none            ─► it stays, with words
//! ```

use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::id::ReplicaId;
use shoal_protocol::plan::ReplicaPlan;

use super::super::planner::{Inventory, same_layout};
use super::super::state::Deployment;
use super::health;
use super::replica::stand;
use super::words::place_of;
use super::{Action, History, Round, Stand};

/// What a move is decided from; where it is the same again, so is the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    asked: u64,
    replicas: usize,
    drained: bool,
    beside: Inventory,
}

impl Round<'_> {
    /// A replica whose layout is ready, and has no next one.
    pub(super) fn ready(
        &mut self,
        deployment: &Deployment,
        plan: &ReplicaPlan,
        history: &mut History,
        reason: String,
    ) -> Stand {
        let Some((why, drained)) = self.why_move(deployment, plan) else {
            history.stuck = None;
            return Stand { settled: true, ..stand(DeploymentPhase::Ready, reason) };
        };
        if self.observed.follows {
            let reason = format!("{reason}; {why}: it is for the leader to move it");
            return stand(DeploymentPhase::Ready, reason);
        }
        if self.observed.now < history.not_before {
            self.wake(history.not_before);
            let wait = history.not_before.since(self.observed.now);
            let reason = format!("{reason}; {why}: a new layout is made in {wait:.1?}");
            return stand(DeploymentPhase::Ready, reason);
        }
        let mut beside = self.inventory(deployment, plan.id, false);
        history.unreadable.leave_out(&mut beside);
        let wish =
            Wish { asked: deployment.asked, replicas: deployment.replicas.len(), drained, beside };
        if let Some((last, words)) = &history.stuck
            && *last == wish
        {
            return stand(DeploymentPhase::Ready, format!("{reason}; {why}, but {words}"));
        }
        history.stuck = None;
        let now = self.observed.now;
        let job = self.job(deployment, plan.id);
        let mut instead = self.inventory(deployment, plan.id, true);
        history.unreadable.leave_out(&mut instead);
        let ideal = match history.suspects.plan(&instead, &job, now) {
            Ok(ideal) => ideal,
            Err(refusal) => {
                let words = refusal.to_string();
                let told = format!("{reason}; {why}, but {words}");
                history.stuck = Some((wish, words));
                return stand(DeploymentPhase::Ready, told);
            }
        };
        if same_layout(&ideal, plan) {
            let (replica, generation, asked) = (plan.id, plan.generation, deployment.asked);
            self.decision.actions.push(Action::Confirm { replica, generation, asked });
            return stand(DeploymentPhase::Ready, reason);
        }
        let context = ideal.limits.context_max.min(plan.limits.context_max);
        let good = |next: &ReplicaPlan| {
            next.stages.len() == ideal.stages.len() && next.limits.context_max >= context
        };
        let beside = history.suspects.plan(&wish.beside, &job, now).ok().filter(good);
        match beside {
            Some(next) => {
                let told = format!(
                    "{reason}; {why}: {} is being made: {}",
                    next.generation,
                    place_of(&next)
                );
                self.plans.push(next.clone());
                let (plan, asked) = (Box::new(next), deployment.asked);
                self.decision.actions.push(Action::Prepare { plan, asked, reason: why });
                stand(DeploymentPhase::Ready, told)
            }
            None => self.break_first(deployment, plan.id, ideal, reason, why),
        }
    }

    /// There is no memory for both layouts. One replica of a deployment at a time: the others serve.
    fn break_first(
        &mut self,
        deployment: &Deployment,
        replica: ReplicaId,
        ideal: ReplicaPlan,
        reason: String,
        why: String,
    ) -> Stand {
        let plans = self.plans.iter().filter(|other| other.id != replica);
        let siblings = plans.filter(|other| deployment.replicas.contains(&other.id));
        let mut serving = siblings.filter(|other| {
            self.target.plans.next(other.id).is_none_or(|n| n.generation != other.generation)
        });
        if let Some(down) = serving.find(|other| !health::is_up(other, self.observed)) {
            let words = format!("{reason}; {why}: it moves when {} serves", down.id);
            return stand(DeploymentPhase::Ready, words);
        }
        let loading = format!("{} is being made: {}", ideal.generation, place_of(&ideal));
        self.adopt(ideal, format!("{why}; there is no memory for both layouts, so streams pause"));
        stand(DeploymentPhase::Loading, loading)
    }

    /// Why a replica is not where it should be, and whether a drained worker is the reason.
    fn why_move(&self, deployment: &Deployment, plan: &ReplicaPlan) -> Option<(String, bool)> {
        let drained: Vec<_> = plan
            .nodes()
            .filter(|node| self.target.drains.contains(*node))
            .map(|node| node.to_string())
            .collect();
        if !drained.is_empty() {
            let verb = if drained.len() == 1 { "is" } else { "are" };
            return Some((format!("{} {verb} drained", drained.join(", ")), true));
        }
        let asked = self.target.plans.asked(plan.id) < deployment.asked;
        asked.then(|| ("it was asked for anew".to_owned(), false))
    }
}
