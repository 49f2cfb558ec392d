//! ● Changes that move shards (`deploy --replicas`, `scale`, `drain`): tried on a copy first, then
//! proposed, or only shown.

use std::sync::Arc;

use shoal_protocol::admin::{AdminReply, ChangeView, DeploymentPhase};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{NodeId, ReplicaId};
use shoal_protocol::plan::{ReplicaPlan, StagesAsked};
use shoal_protocol::units::Bytes;

use super::agents::Agents;
use super::planner::{Rate, loads, speed};
use super::reconcile::{Action, Observed, Preview, Stand, preview};
use super::shape::ModelShape;
use super::state::{Change, ClusterState, DeploymentCommand, DrainCommand};
use super::store::ControlStore;

/// What changes are made with.
#[derive(Clone, Copy, Debug)]
pub struct Changes<'a> {
    /// The replicated state.
    pub store: &'a ControlStore,
    /// The connected workers.
    pub agents: &'a Agents,
}

impl Changes<'_> {
    /// Makes a change, or shows what it would come to. What the operator asks for and nobody could ever
    /// serve on these workers is refused; a drain is not: what cannot be moved stays, with words.
    pub async fn make(
        &self,
        operator: NodeId,
        change: Change,
        dry_run: bool,
    ) -> Result<AdminReply, WireError> {
        let state = self.store.state();
        let observed = Observed { workers: self.agents.observe(), ..Observed::default() };
        let tried = {
            let (state, observed, change) = (Arc::clone(&state), observed.clone(), change.clone());
            tokio::task::spawn_blocking(move || preview(&state, &observed, change)).await
        };
        let tried = tried.map_err(|error| {
            WireError::new(ErrorCode::Internal, format!("trying the change: {error}"))
        })??;
        if let Some(why) = impossible(&state, &change, &tried) {
            return Err(WireError::new(ErrorCode::DoesNotFit, why));
        }
        if dry_run {
            return Ok(AdminReply::Change(Box::new(view(&state, &observed, &change, &tried))));
        }
        tracing::info!(%operator, "{}", words_of(&change));
        self.store.propose(change).await?;
        Ok(AdminReply::Accepted)
    }
}

/// Why what was asked for cannot be had on these workers: a new replica has no place, or the stages that
/// were asked for do not fit. What was not served before is no reason.
fn impossible(before: &ClusterState, change: &Change, tried: &Preview) -> Option<String> {
    let (name, cut) = match change {
        Change::Deployment(DeploymentCommand::Scale { name, stages, .. }) => {
            (name, *stages != StagesAsked::Same)
        }
        Change::Deployment(DeploymentCommand::ScaleMesh { name, .. }) => (name, true),
        Change::Deployment(DeploymentCommand::CreateMesh { spec, .. }) => (&spec.name, false),
        Change::Deployment(DeploymentCommand::Create { spec, .. }) => (&spec.name, false),
        _ => return None,
    };
    let deployment = tried.after.deployments.get(name)?;
    let had = before.deployments.get(name).map(|d| d.replicas.clone()).unwrap_or_default();
    let stuck = tried.stands.iter().find(|(id, stand)| {
        let new = !had.contains(id) && stand.phase != DeploymentPhase::Ready;
        let uncut = cut && tried.after.plans.asked(*id) < deployment.asked;
        deployment.replicas.contains(id) && (new || uncut)
    });
    stuck.map(|(id, stand)| {
        format!("{id} of {name} could not be served like this: {}", stand.reason)
    })
}

fn words_of(change: &Change) -> String {
    match change {
        Change::Deployment(DeploymentCommand::Scale { name, replicas, stages }) => {
            format!("scale {name}: replicas {replicas:?}, stages {stages:?}")
        }
        Change::Deployment(DeploymentCommand::ScaleMesh { name, replicas, ask }) => {
            format!("scale {name}: replicas {replicas:?}, {ask}")
        }
        Change::Drain(DrainCommand::Begin { node }) => format!("drain {node}"),
        Change::Drain(DrainCommand::End { node }) => format!("undrain {node}"),
        _ => "a change".to_owned(),
    }
}

/// What a change would come to, for people.
fn view(state: &ClusterState, observed: &Observed, change: &Change, tried: &Preview) -> ChangeView {
    let (before, after) = tried.difference(state);
    let mut explanation: Vec<String> =
        tried.steps.iter().filter(|step| is_news(step)).map(ToString::to_string).collect();
    if explanation.is_empty() {
        explanation.push("nothing would move".to_owned());
    }
    let mut moved = Bytes(0);
    for step in &tried.steps {
        let (plan, beside) = match step {
            Action::Adopt { plan, .. } => (plan, false),
            Action::Prepare { plan, .. } => (plan, true),
            _ => continue,
        };
        let read = loads(state.plans.get(plan.id), plan, beside);
        moved = moved + read.iter().map(|(_, bytes)| *bytes).sum();
        let each: Vec<_> = read.iter().map(|(node, bytes)| format!("{node} {bytes}")).collect();
        let each = if each.is_empty() { "nothing".to_owned() } else { each.join(", ") };
        explanation.push(format!("{} {} reads {each}", plan.id, plan.generation));
    }
    explanation.push(format!("weights to read in all: {moved}"));
    for (when, plans, of) in [("before", &before, state), ("after", &after, &tried.after)] {
        for plan in plans {
            if let Some(deployment) = of.deployments.get(&plan.deployment) {
                explanation
                    .push(format!("{when}: {}", speed_of(plan, &deployment.shape, observed)));
            }
        }
    }
    if let Change::Drain(DrainCommand::Begin { node }) = change {
        explanation.extend(what_stays(observed, *node, tried));
    }
    ChangeView { before, after, explanation }
}

/// What a drain leaves where it is, what it lacks, and what would do.
fn what_stays(observed: &Observed, node: NodeId, tried: &Preview) -> Vec<String> {
    let one = |(id, stand): &(ReplicaId, Stand)| {
        let plan = tried.after.plans.get(*id)?;
        let name = plan.nodes().any(|placed| placed == node).then_some(&plan.deployment)?;
        let way = match tried.leaves_with_open_stages(observed, node, name) {
            true => format!(
                "with fewer stages it would fit: `shoal scale {name} --stages auto`, or start"
            ),
            false => "start".to_owned(),
        };
        Some(format!(
            "{id} cannot leave {node}: a drain needs a place for its layers, as they were asked for, on the \
             workers that stay, and there is none ({}); {way} another worker",
            stand.reason
        ))
    };
    tried.stands.iter().filter_map(one).collect()
}

/// Whether a step is worth a line: that a layout takes over once it is ready goes without saying.
fn is_news(step: &Action) -> bool {
    matches!(step, Action::Adopt { .. } | Action::Prepare { .. } | Action::Abandon { .. })
}

/// How fast a layout is expected to be, and where that is known from.
pub fn speed_of(plan: &ReplicaPlan, shape: &ModelShape, observed: &Observed) -> String {
    let rate_of = |node: NodeId| measured(plan, shape, observed, node).unwrap_or(Rate::ASSUMED);
    let (one, many) = speed(plan, shape, rate_of);
    let known: Vec<String> = plan
        .nodes()
        .map(|node| {
            let rate = rate_of(node);
            let source = if rate.measured { "measured while it served" } else { "assumed" };
            format!("{node} reads {}/s ({source})", Bytes(rate.bytes_per_s))
        })
        .collect();
    format!(
        "{} {} {}: {one:.1} tokens/s for one stream, {many:.1} steps/s when full, without links; {}",
        plan.id,
        plan.generation,
        plan.mesh(),
        known.join(", ")
    )
}

/// The rate at which a worker has computed steps of the replica's present layout.
fn measured(
    plan: &ReplicaPlan,
    shape: &ModelShape,
    observed: &Observed,
    node: NodeId,
) -> Option<Rate> {
    let worker = observed.workers.get(&node)?;
    let assignments = worker.pushed.iter().flatten().filter(|a| a.replica.model == plan.model);
    assignments
        .filter_map(|assignment| {
            let own = &assignment.replica;
            let shard = worker.report.shards.iter().find(|shard| {
                shard.replica == own.id
                    && shard.generation == own.generation
                    && shard.stage == assignment.stage
            })?;
            let layers = assignment.layers();
            let step = (layers.start..layers.end).map(|l| shape.step_bytes(l, own.precision).0);
            let stage = own.stages.get(assignment.stage.0 as usize);
            let ranks = stage.map_or(1, |stage| stage.shards.len().max(1)) as u64;
            let step = Bytes(step.sum::<u64>() / ranks);
            Rate::measured(step, shard.counters.steps, shard.counters.compute_us)
        })
        .next()
}
