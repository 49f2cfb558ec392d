//! Workers at which layouts have failed: for a while others are preferred.

use std::collections::BTreeMap;
use std::time::Duration;

use shoal_protocol::id::{Generation, Incarnation, NodeId};
use shoal_protocol::plan::ReplicaPlan;
use shoal_protocol::units::Instant;

use super::super::planner::{Inventory, Job, PlanRefusal, plan};
use super::super::state::ClusterState;
use super::{History, Observed, backoff};

/// How long a failure counts. A worker that hangs has then had its time-out of `LOADING` once more if it
/// was chosen all the same, so that the second failure finds the first one still there.
pub const SUSPECT_FOR: Duration = Duration::from_secs(300);

/// With so many failures a worker is left out even where that makes fewer stages.
const FAILURES_BAD: u32 = 2;

/// Workers, with how often a layout failed there and until when that counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Suspects(BTreeMap<NodeId, (u32, Instant)>);

impl Suspects {
    pub(super) fn blame(&mut self, nodes: &[NodeId], now: Instant) {
        self.0.retain(|_, (_, until)| now < *until);
        for node in nodes {
            let (failures, until) = self.0.entry(*node).or_default();
            *failures = failures.saturating_add(1);
            *until = now + SUSPECT_FOR;
        }
    }

    pub(super) fn failures(&self, node: NodeId, now: Instant) -> u32 {
        self.0.get(&node).filter(|(_, until)| now < *until).map_or(0, |(failures, _)| *failures)
    }

    /// The layout for a job: without suspects where that costs no stage, without those that failed again
    /// wherever it fits, else on all.
    pub(super) fn plan(
        &self,
        inventory: &Inventory,
        job: &Job<'_>,
        now: Instant,
    ) -> Result<ReplicaPlan, PlanRefusal> {
        let all = plan(inventory, job);
        let without = |failures: u32| {
            let mut left = inventory.clone();
            left.workers.retain(|worker| self.failures(worker.node, now) < failures);
            (left.workers.len() < inventory.workers.len()).then(|| plan(&left, job).ok()).flatten()
        };
        let stages = all.as_ref().map_or(0, |plan| plan.stages.len());
        match without(1).filter(|plan| plan.stages.len() >= stages) {
            Some(plan) => Ok(plan),
            None => without(FAILURES_BAD).map_or(all, Ok),
        }
    }
}

/// Workers that cannot read the model as it was deployed, with the start at which they said so: their
/// files are damaged, or are those of another model. Whoever was started again may have better ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Unreadable(BTreeMap<NodeId, Incarnation>);

impl Unreadable {
    pub(super) fn note(&mut self, node: NodeId, observed: &Observed) {
        self.0.insert(node, start_of(node, observed));
    }

    /// Takes them out of what the planner may use; `true` where there was one.
    pub(super) fn leave_out(&self, inventory: &mut Inventory) -> bool {
        let before = inventory.workers.len();
        inventory.workers.retain(|worker| !self.0.contains_key(&worker.node));
        inventory.workers.len() < before
    }
}

fn start_of(node: NodeId, observed: &Observed) -> Incarnation {
    observed.workers.get(&node).map(|worker| worker.register.incarnation).unwrap_or_default()
}

impl History {
    /// A layout has not lasted: the next one has to wait a little, longer each time.
    pub(super) fn note_failure(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.not_before = now + backoff(self.failures);
    }

    /// A layout has failed at these workers. It is counted once, however often it is looked at.
    pub(super) fn blame(&mut self, now: Instant, layout: Option<Generation>, nodes: &[NodeId]) {
        if let Some(layout) = layout.filter(|layout| *layout != self.blamed) {
            self.blamed = layout;
            self.suspects.blame(nodes, now);
        }
    }

    /// Forgets the drained and the lost: what they failed at is nobody's business any more.
    pub(super) fn forget_gone(&mut self, target: &ClusterState, observed: &Observed) {
        let here = |node: &NodeId| {
            observed.workers.contains_key(node) && target.nodes.get(*node).is_some()
        };
        self.suspects.0.retain(|node, _| here(node));
        self.unreadable.0.retain(|node, start| here(node) && start_of(*node, observed) == *start);
        self.pairs.retain(here);
    }
}
