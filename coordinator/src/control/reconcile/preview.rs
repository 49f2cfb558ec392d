//! What a change would come to: the change and all that follows, tried on a copy whose workers do at
//! once what they are told.

use std::time::Duration;

use shoal_protocol::control::{ShardCounters, ShardReport, ShardState};
use shoal_protocol::id::{DeploymentName, Incarnation, NodeId, ReplicaId, Role};
use shoal_protocol::plan::{ReplicaPlan, ShardMemory, StagesAsked};

use super::super::state::{Change, ClusterState, Command, DeploymentCommand, Refusal, Timestamp};
use super::{Action, Observed, ObservedWorker, Stand, reconcile};

/// The most rounds that are tried: each replica needs four for a move, and replicas that wait for each
/// other take turns.
const ROUNDS_MAX: usize = 4 * super::super::state::REPLICAS_MAX as usize;

/// The time between rounds: beyond every wait, so that nothing is put off.
const PAUSE: Duration = Duration::from_secs(60);

/// Who tries: nobody has this identity.
const NOBODY: NodeId = NodeId { role: Role::Admin, number: 0 };

/// The change tried on a copy.
#[derive(Clone, Debug)]
pub struct Preview {
    /// What the state would be.
    pub after: ClusterState,
    /// What would be proposed, in this order, without what workers are told.
    pub steps: Vec<Action>,
    /// Where each replica would be.
    pub stands: Vec<(ReplicaId, Stand)>,
}

impl Preview {
    /// The layouts of `before` that would be gone, and those that would have come.
    pub fn difference(&self, before: &ClusterState) -> (Vec<ReplicaPlan>, Vec<ReplicaPlan>) {
        let only = |of: &ClusterState, not: &ClusterState| {
            let is_new = |plan: &&ReplicaPlan| not.plans.get(plan.id) != Some(plan);
            of.plans.iter().filter(is_new).cloned().collect()
        };
        (only(before, &self.after), only(&self.after, before))
    }

    /// Whether all of a deployment would leave a worker that is drained after this change, if its number of
    /// stages were left open: tried, not guessed.
    pub fn leaves_with_open_stages(
        &self,
        observed: &Observed,
        node: NodeId,
        name: &DeploymentName,
    ) -> bool {
        let open = DeploymentCommand::Scale {
            name: name.clone(),
            replicas: None,
            stages: StagesAsked::Auto,
        };
        let tried = preview(&self.after, observed, Change::Deployment(open));
        let stays = |plan: &ReplicaPlan| {
            plan.deployment == *name && plan.nodes().any(|placed| placed == node)
        };
        tried.is_ok_and(|tried| !tried.after.plans.iter().any(stays))
    }
}

/// Tries a change.
pub fn preview(
    state: &ClusterState,
    observed: &Observed,
    change: Change,
) -> Result<Preview, Refusal> {
    // What was tried on this copy before counts as an earlier start.
    let incarnation = Incarnation(state.last_incarnation(NOBODY).0 + 1);
    let (state, observed) = (state.clone(), observed.clone());
    let mut trial = Trial { state, observed, incarnation, sequence: 0 };
    trial.apply(change)?;
    trial.observed.history.clear();
    (trial.observed.follows, trial.observed.tried) = (false, true);
    trial.observed.workers.values_mut().for_each(obey);
    let mut steps = Vec::new();
    let mut stands = Vec::new();
    for _ in 0..ROUNDS_MAX {
        let decision = reconcile(&trial.state, &trial.observed);
        trial.observed.history = decision.history;
        trial.observed.now = trial.observed.now + PAUSE;
        stands = decision.replicas.into_iter().collect();
        if decision.actions.is_empty() {
            break;
        }
        for action in decision.actions {
            if let Action::Assign { node, assignments, .. } = action {
                if let Some(worker) = trial.observed.workers.get_mut(&node) {
                    worker.pushed = Some(assignments);
                    obey(worker);
                }
            } else if let Some(command) = action.proposal() {
                trial.apply(Change::Plan(command))?;
                steps.push(action);
            }
        }
    }
    Ok(Preview { after: trial.state, steps, stands })
}

struct Trial {
    state: ClusterState,
    observed: Observed,
    incarnation: Incarnation,
    sequence: u64,
}

impl Trial {
    fn apply(&mut self, change: Change) -> Result<(), Refusal> {
        self.sequence += 1;
        let command = Command {
            client: NOBODY,
            incarnation: self.incarnation,
            sequence: self.sequence,
            at: Timestamp(0),
            change,
        };
        self.state.apply(&command).map(drop)
    }
}

/// The worker is all that it was told to be.
fn obey(worker: &mut ObservedWorker) {
    let shards = worker.pushed.iter().flatten().map(|assignment| ShardReport {
        replica: assignment.replica.id,
        generation: assignment.replica.generation,
        stage: assignment.stage,
        state: ShardState::Ready,
        memory: ShardMemory::default(),
        counters: ShardCounters::default(),
    });
    worker.report.shards = shards.collect();
}
