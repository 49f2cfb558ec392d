//! Replicas of one deployment that share a worker while another one has nothing to do: after a drain was
//! taken back, or a worker has come again. The younger one moves there, made before the old one goes.
//!
//! ```text
//! shares a worker with an older one, a worker is idle, all is quiet ─► for STACKED_FOR ─► Prepare
//! no layout of the same form away from the others                  ─► it stays, until there are other workers
//! ```

use std::collections::BTreeSet;
use std::time::Duration;

use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::id::NodeId;
use shoal_protocol::plan::ReplicaPlan;
use shoal_protocol::units::Instant;

use super::super::planner::{Candidate, Inventory};
use super::super::state::Deployment;
use super::health;
use super::replica::stand;
use super::words::place_of;
use super::{Action, History, Question, Round, Stand};

/// How long two share a worker before one of them moves: an operator who upgrades one worker after the other
/// is done with the next step, and a worker that comes and goes has gone again.
pub const STACKED_FOR: Duration = Duration::from_secs(30);

/// With each move of one replica that wait doubles, up to this: a place that is lost again and again is none.
const STACKED_FOR_MAX: Duration = Duration::from_secs(3600);

/// A worker that is known to be slower by more than this is no better place than half of the other one.
const SLOWER_MAX: u64 = 2;

/// Since when a replica shares a worker, and what was found not to help.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Stacked {
    since: Option<Instant>,
    refused: Option<Question>,
    /// Moves that were made for it, and when the last one was.
    moves: u32,
    moved: Instant,
}

impl Stacked {
    /// It has a worker of its own, or nobody has one for it.
    fn rest(&mut self, now: Instant) {
        (self.since, self.refused) = (None, None);
        // Longer than the longest wait, or each move after that one would be the first.
        if now.since(self.moved) >= 2 * STACKED_FOR_MAX {
            self.moves = 0;
        }
    }

    /// When it is to be moved.
    fn due(&mut self, now: Instant) -> Instant {
        let wait = STACKED_FOR.saturating_mul(1 << self.moves.min(16)).min(STACKED_FOR_MAX);
        *self.since.get_or_insert(now) + wait
    }
}

impl Round<'_> {
    /// A replica that is as was asked for: whether there is a better place for it.
    pub(super) fn spread(
        &mut self,
        deployment: &Deployment,
        plan: &ReplicaPlan,
        history: &mut History,
        reason: &str,
    ) -> Option<Stand> {
        let now = self.observed.now;
        if self.observed.tried {
            return None;
        }
        let Some(why) = self.why_spread(deployment, plan) else {
            history.stacked.rest(now);
            return None;
        };
        let due = history.stacked.due(now).max(history.not_before);
        if now < due {
            self.wake(due);
            return None;
        }
        if self.observed.follows {
            return None;
        }
        let mut beside = self.inventory(deployment, plan.id, false);
        history.unreadable.leave_out(&mut beside);
        leave_the_others_alone(&mut beside, plan);
        // What was not good there is no better for being empty.
        beside.workers.retain(|worker| history.suspects.failures(worker.node, now) == 0);
        let question = self.question(deployment, &beside);
        if history.stacked.refused.as_ref() == Some(&question) {
            return None;
        }
        let job = self.job(deployment, plan.id);
        let next = history.suspects.plan(&beside, &job, now).ok();
        let Some(next) = next.filter(|next| has_the_form_of(next, plan)) else {
            history.stacked.refused = Some(question);
            return None;
        };
        let moves = history.stacked.moves + 1;
        history.stacked = Stacked { moves, moved: now, ..Stacked::default() };
        let told =
            format!("{reason}; {why}: {} is being made: {}", next.generation, place_of(&next));
        self.plans.push(next.clone());
        let (plan, asked) = (Box::new(next), deployment.asked);
        self.decision.actions.push(Action::Prepare { plan, asked, reason: why });
        Some(Stand { settled: true, ..stand(DeploymentPhase::Ready, told) })
    }

    /// Why it is to be moved, where all of them serve and none is under way.
    fn why_spread(&self, deployment: &Deployment, plan: &ReplicaPlan) -> Option<String> {
        if deployment.replicas.len() < 2 {
            return None;
        }
        let of_all = || self.plans.iter().filter(|one| one.deployment == plan.deployment);
        let all_serve = of_all().all(|one| health::is_up(one, self.observed));
        if of_all().count() != deployment.replicas.len() || !all_serve {
            return None;
        }
        let (shared, older) = of_all().filter(|other| other.id < plan.id).find_map(|older| {
            let own: BTreeSet<NodeId> = plan.nodes().collect();
            let shared = older.nodes().find(|node| own.contains(node))?;
            Some((shared, older.id))
        })?;
        let used: BTreeSet<NodeId> = self.plans.iter().flat_map(ReplicaPlan::nodes).collect();
        let idle = self.observed.workers.iter().find(|(node, worker)| {
            let may =
                self.target.nodes.get(**node).is_some() && !self.target.drains.contains(**node);
            worker.connected && may && !used.contains(node)
        });
        let (idle, _) = idle?;
        Some(format!("it shares {shared} with {older} while {idle} is idle"))
    }
}

/// Only workers that no other replica of the deployment is on, and none that is far slower than those that it
/// has.
fn leave_the_others_alone(inventory: &mut Inventory, plan: &ReplicaPlan) {
    let own: BTreeSet<NodeId> = plan.nodes().collect();
    let measured = |worker: &Candidate| worker.rate.filter(|rate| rate.measured);
    let has = inventory.workers.iter().filter(|worker| own.contains(&worker.node));
    let slowest = has.filter_map(measured).map(|rate| rate.bytes_per_s).min().unwrap_or(0);
    inventory.workers.retain(|worker| {
        let slow =
            |worker| measured(worker).is_some_and(|rate| rate.bytes_per_s < slowest / SLOWER_MAX);
        !worker.sibling && !slow(worker)
    });
}

/// Whether it is the same replica in another place: nothing that clients or operators see changes.
fn has_the_form_of(next: &ReplicaPlan, plan: &ReplicaPlan) -> bool {
    let ranks = |plan: &ReplicaPlan| -> Vec<usize> {
        plan.stages.iter().map(|stage| stage.shards.len()).collect()
    };
    let form = |plan: &ReplicaPlan| (ranks(plan), plan.precision, plan.numerics);
    form(next) == form(plan) && next.limits.context_max >= plan.limits.context_max
}

#[cfg(test)]
#[path = "spread_test.rs"]
mod tests;
