//! A replica that serves and is to be somewhere else: off a drained worker, or spread anew because it
//! was asked for. What nobody asks for and is better all the same: `spread`.
//!
//! ```text
//! as it would be planned now ─► Confirm
//! memory for both            ─► Prepare: the next one is loaded while this one serves
//! memory for one of them     ─► Adopt: its streams pause, and go on by replay; not where it is only slow
//! memory for none            ─► it stays, with words
//! ```

use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::id::ReplicaId;
use shoal_protocol::plan::ReplicaPlan;

use super::super::planner::same_layout;
use super::super::state::Deployment;
use super::health;
use super::pace;
use super::replica::stand;
use super::words::place_of;
use super::{Action, History, Question, Round, Stand};

/// Why a replica is to be somewhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// It has a worker that is drained.
    Drained,
    /// Somebody wants it so.
    Asked,
    /// A worker of it is far slower than the others.
    Slow,
}

/// Names whoever is slow, in a layout that serves.
fn pace_words(history: &History, reason: String) -> String {
    let slow = history.paces.slow(pace::NOTICED);
    let names: Vec<_> = slow.iter().map(ToString::to_string).collect();
    match names.as_slice() {
        [] => reason,
        [one] => format!("{reason}; {one} is slow"),
        many => format!("{reason}; {} are slow", many.join(", ")),
    }
}

/// What a move is decided from; where it is the same again, so is the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    replicas: usize,
    drained: bool,
    beside: Question,
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
        let Some((why, cause)) = self.why_move(deployment, plan, history) else {
            history.stuck = None;
            let reason = pace_words(history, reason);
            if let Some(moves) = self.spread(deployment, plan, history, &reason) {
                return moves;
            }
            return Stand { settled: true, ..stand(DeploymentPhase::Ready, reason) };
        };
        let drained = cause == Cause::Drained;
        // A slow layout is served as was asked for.
        let settled = cause == Cause::Slow;
        if self.observed.follows {
            let reason = format!("{reason}; {why}: it is for the leader to move it");
            return Stand { settled, ..stand(DeploymentPhase::Ready, reason) };
        }
        if self.observed.now < history.not_before {
            self.wake(history.not_before);
            let wait = history.not_before.since(self.observed.now);
            let reason = format!("{reason}; {why}: a new layout is made in {wait:.1?}");
            return stand(DeploymentPhase::Ready, reason);
        }
        let mut beside = self.inventory(deployment, plan.id, false);
        history.unreadable.leave_out(&mut beside);
        let question = self.question(deployment, &beside);
        let wish = Wish { replicas: deployment.replicas.len(), drained, beside: question };
        if let Some((last, words)) = &history.stuck
            && *last == wish
        {
            let told = format!("{reason}; {why}, but {words}");
            return Stand { settled, ..stand(DeploymentPhase::Ready, told) };
        }
        history.stuck = None;
        let now = self.observed.now;
        let slow = history.paces.slow(pace::LASTING);
        let job = self.job(deployment, plan.id);
        let mut instead = self.inventory(deployment, plan.id, true);
        history.unreadable.leave_out(&mut instead);
        if cause == Cause::Slow {
            // Neither is a failure of theirs, nor may they be part of what is to be better.
            for inventory in [&mut instead, &mut beside] {
                inventory.workers.retain(|worker| !slow.contains(&worker.node));
            }
        }
        let stays = |history: &mut History, words: String| {
            let told = format!("{reason}; {why}, but {words}");
            history.stuck = Some((wish, words));
            Stand { settled, ..stand(DeploymentPhase::Ready, told) }
        };
        let ideal = match history.suspects.plan(&instead, &job, now) {
            Ok(ideal) if cause != Cause::Slow || ideal.stages.len() >= plan.stages.len() => ideal,
            Err(refusal) if cause != Cause::Slow => return stays(history, refusal.to_string()),
            _ => return stays(history, "there is no better place for its layers".into()),
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
        let beside = history.suspects.plan(&beside, &job, now).ok().filter(good);
        match beside {
            Some(next) => {
                if cause == Cause::Slow {
                    history.paces.moved(now);
                    // Others are preferred for a while, whatever the next layout is made for.
                    history.suspects.blame(&slow, now);
                }
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
            // Slow is better than none for as long as another one loads.
            None if cause == Cause::Slow => {
                stays(history, "there is no memory for a better place beside it".into())
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

    /// Why a replica is not where it should be.
    fn why_move(
        &self,
        deployment: &Deployment,
        plan: &ReplicaPlan,
        history: &History,
    ) -> Option<(String, Cause)> {
        let drained: Vec<_> = plan
            .nodes()
            .filter(|node| self.target.drains.contains(*node))
            .map(|node| node.to_string())
            .collect();
        if !drained.is_empty() {
            let verb = if drained.len() == 1 { "is" } else { "are" };
            return Some((format!("{} {verb} drained", drained.join(", ")), Cause::Drained));
        }
        if self.target.plans.asked(plan.id) < deployment.asked {
            return Some(("it was asked for anew".to_owned(), Cause::Asked));
        }
        let slow = history.paces.slow(pace::LASTING);
        let slow = slow.first().filter(|_| history.paces.may_move(self.observed.now))?;
        let lasting = pace::LASTING;
        let words = format!("{slow} has been slow for {lasting} s and more, though it is heard");
        Some((words, Cause::Slow))
    }
}
