//! Decisions in words.

use std::fmt;

use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::id::ReplicaId;
use shoal_protocol::plan::{Assignment, ReplicaPlan};

use super::{Action, Decision, Phase, Stand};

/// Where a deployment is: it takes requests where one of its replicas does. With one replica it is
/// where its replica is.
pub(super) fn phase_of<'a>(stands: impl Iterator<Item = (ReplicaId, &'a Stand)>) -> Phase {
    let stands: Vec<_> = stands.collect();
    if let [(_, only)] = stands.as_slice() {
        return Phase { phase: only.phase, reason: only.reason.clone() };
    }
    let order = |phase: DeploymentPhase| match phase {
        DeploymentPhase::Ready => 0,
        DeploymentPhase::Loading => 1,
        DeploymentPhase::Waiting => 2,
        DeploymentPhase::Failed => 3,
    };
    let best = stands.iter().map(|(_, stand)| stand.phase).min_by_key(|phase| order(*phase));
    let reasons: Vec<_> = stands.iter().map(|(id, s)| format!("{id}: {}", s.reason)).collect();
    Phase { phase: best.unwrap_or(DeploymentPhase::Waiting), reason: reasons.join("\n") }
}

pub(super) fn place_of(plan: &ReplicaPlan) -> String {
    let nodes: Vec<_> = plan.nodes().map(|node| node.to_string()).collect();
    format!("{} on {}", plan.mesh(), nodes.join(", "))
}

/// The difference between what a worker was told and what it should be.
pub(super) fn reason_for(pushed: Option<&[Assignment]>, wanted: &[Assignment]) -> String {
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
    // What a new layout of the same replica replaces needs no words of its own.
    let new =
        |id| wanted.iter().any(|a| a.replica.id == id && before.iter().all(|b| key(a) != key(b)));
    let gone = before.iter().filter(|b| wanted.iter().all(|a| key(a) != key(b)));
    for gone in gone.filter(|gone| !new(gone.replica.id)) {
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
            Action::Prepare { plan, reason, .. } => {
                let place = place_of(plan);
                write!(f, "prepare {} {} ({place}): {reason}", plan.id, plan.generation)
            }
            Action::Promote { replica, generation } => {
                write!(f, "promote {replica} {generation}: all of it is ready")
            }
            Action::Abandon { replica, generation, reason } => {
                write!(f, "abandon {replica} {generation}: {reason}")
            }
            Action::Confirm { replica, generation, .. } => {
                write!(f, "confirm {replica} {generation}: it is as it would be planned now")
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
