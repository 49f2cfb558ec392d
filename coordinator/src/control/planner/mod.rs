//! ○ The planner: (inventory, deployment, previous layout) → layout, or the arithmetic of why not.
//!
//! ```text
//! stages wanted ─► cut the layers (placement: exact) ─► name the workers ─► KV blocks that fit ─► ReplicaPlan
//!        └ too large for any cut: fewer stages where the operator left that open, else refused with the sums
//! ```
//!
//! The same arguments give the same layout: nothing is drawn, no clock is read, and no choice is
//! left to whoever carries the layout out.

mod apart;
mod cells;
mod chain;
mod change;
mod cost;
mod encoders;
pub(super) mod experts;
mod explain;
mod memory;
mod mesh;
mod placement;
mod predict;
mod refusal;
mod space;
mod spaces;
mod split;
mod topology;
mod ways;
mod window;
mod zones;

use std::net::IpAddr;

use shoal_protocol::id::{Generation, NodeId, RankIndex, ReplicaId};
use shoal_protocol::mesh::{MeshAsk, MeshAsked, ZoneName};
use shoal_protocol::plan::{
    Activations, DeploymentSpec, KvPrecision, Numerics, Precision, ReplicaLimits, ReplicaPlan,
    ShardPlan, StagePlan,
};
use shoal_protocol::units::Bytes;

use super::shape::ModelShape;
pub use apart::{Apart, is_torn, pair};
pub use change::{Rate, loads, same_layout, speed};
pub use cost::{Link, Links};
pub use explain::explain;
pub use memory::{KV_TOKENS_COMFORTABLE, KV_TOKENS_MAX, KV_TOKENS_MIN};
pub use predict::{Prediction, StageTime, predict};
pub use refusal::{MeshFit, PlanRefusal, StageNeed};
pub use split::{RankSums, ranks_max};
pub use ways::{Seen, SeenWays, Source};

use memory::Costs;
use placement::Cut;

/// What there is to place shards on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// The workers that may be used, each once.
    pub workers: Vec<Candidate>,
    /// Pairs of them that are not to be neighbours where that can be avoided.
    pub apart: Apart,
    /// Ways between them that are known to be longer than others.
    pub links: Links,
    /// What was measured of any ways, for people.
    pub seen: SeenWays,
}

/// One worker with one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub node: NodeId,
    /// The device: `cpu`.
    pub device: String,
    /// Its budget for weights, KV and activations of all replicas.
    pub budget: Bytes,
    /// What shards of other replicas have of it.
    pub used: Bytes,
    /// The contracts that its kernels keep.
    pub numerics: Vec<Numerics>,
    /// Whether it has a shard of another replica of the same deployment: two copies on one worker are
    /// lost together and wait for each other.
    pub sibling: bool,
    /// What its kernels read of weights, where it has said so.
    pub rate: Option<Rate>,
    /// Its failure domain, where it has one.
    pub zone: Option<ZoneName>,
    /// Whether it understands a layout with ranks.
    pub speaks_ranks: bool,
    /// Of how many ranks of a stage it says that it computes one; 0 where it has not said.
    pub ranks_most: u32,
    /// Its machine, and what all processors of that read together, where that is known.
    pub machine: Option<(IpAddr, Option<u64>)>,
}

impl Candidate {
    /// What is left for a shard of the replica that is planned.
    pub fn free(&self) -> Bytes {
        self.budget.saturating_sub(self.used)
    }
}

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// The replica.
    pub replica: ReplicaId,
    /// The number that the new layout will have.
    pub generation: Generation,
    /// What the operator asked for.
    pub spec: &'a DeploymentSpec,
    /// The model's shape.
    pub shape: &'a ModelShape,
    /// The layout that the new one replaces: a worker keeps the layers that it has where that costs
    /// nothing else.
    pub previous: Option<&'a ReplicaPlan>,
    /// How many replicas the deployment has: where the number of stages is left open, each takes its
    /// share of the workers.
    pub replicas: usize,
    /// What was asked for beyond a number of stages.
    pub ask: MeshAsk,
}

impl Job<'_> {
    /// What rows are in products with weights that are held so: there is a choice only where those are whole
    /// numbers.
    fn activations(&self, held: Precision) -> Activations {
        let asked = self.ask.activations.filter(|_| held.has_numbers());
        asked.unwrap_or_default()
    }
}

/// The most ends of cut ways that are left out in turn; each doubles the layouts that are made.
const LEFT_OUT_MAX: usize = 4;

/// The layout for a job, or why there is none. No two neighbours are apart if there is any such layout;
/// where the number of stages is left open, one with fewer stages is better than one that cannot work.
pub fn plan(inventory: &Inventory, job: &Job<'_>) -> Result<ReplicaPlan, PlanRefusal> {
    let first = plan_near(inventory, job);
    let torn = |plan: &ReplicaPlan| is_torn(plan, &inventory.apart);
    let Some(broken) = first.as_ref().ok().filter(|plan| torn(plan)) else { return first };
    // A search that looks at what is measured does not look at what is cut.
    let willing = !matches!(job.ask.mesh, Some(MeshAsked::Exactly(_)));
    if let Some(mended) = apart::reseat(broken, &inventory.workers, &inventory.apart, willing) {
        return Ok(mended);
    }
    // One end of each pair is left out: of all ways to do that, the one with the most stages.
    let pairs: Vec<_> = inventory.apart.iter().take(LEFT_OUT_MAX).collect();
    let whole = (0..1_u32 << pairs.len()).filter_map(|ends| {
        let out = |(bit, pair): (usize, &&(NodeId, NodeId))| {
            if (ends >> bit) & 1 == 0 { pair.1 } else { pair.0 }
        };
        let out: Vec<_> = pairs.iter().enumerate().map(out).collect();
        let mut left = inventory.clone();
        left.workers.retain(|worker| !out.contains(&worker.node));
        plan_near(&left, job).ok().filter(|plan| !torn(plan))
    });
    // Of equals the first.
    whole
        .reduce(|best, next| if next.stages.len() > best.stages.len() { next } else { best })
        .map_or(first, Ok)
}

/// Away from the deployment's other replicas where that can be.
fn plan_near(inventory: &Inventory, job: &Job<'_>) -> Result<ReplicaPlan, PlanRefusal> {
    let share = (inventory.workers.len() / job.replicas.max(1)).max(1);
    zones::apart_from_siblings(inventory, job, share)
}

fn plan_on(inventory: &Inventory, job: &Job<'_>, share: usize) -> Result<ReplicaPlan, PlanRefusal> {
    if job.ask.is_measured() {
        return mesh::plan(inventory, job, share);
    }
    let numerics = Numerics::N1;
    let workers = candidates(inventory, numerics)?;
    let layers = job.shape.layers();
    let precision = job.spec.precision.unwrap_or(job.shape.stored());
    let (most, least) = stages_range(job.spec.stages, layers, workers.len())?;
    let costs = Costs::new(job.shape, precision).holding_kv(job.ask.kv.unwrap_or_default());
    // As many as its share, else fewer; more only where it does not fit otherwise.
    let share = share.clamp(least, most);
    let mut to_try = (least..=share).rev().chain(share + 1..=most);
    let found = to_try.find_map(|stages| layout(&costs, &workers, stages));
    let Some((limits, cuts)) = found else {
        return Err(refusal::does_not_fit(job, &costs, &workers, most));
    };
    let nodes = placement::name_workers(&cuts, &workers, job.previous, &costs, &inventory.apart);
    let limits = memory::largest_limits(&costs, limits, &cuts, &nodes);
    let stages = cuts.iter().zip(&nodes).map(|(cut, worker)| StagePlan {
        layers: cut.layers,
        shards: vec![ShardPlan {
            rank: RankIndex(0),
            node: worker.node,
            device: worker.device.clone(),
            memory: costs.memory(cut.layers, &limits),
        }],
    });
    Ok(ReplicaPlan {
        id: job.replica,
        deployment: job.spec.name.clone(),
        generation: job.generation,
        model: job.spec.model.clone(),
        precision,
        numerics: Numerics::of(job.activations(precision), false, costs.kv()),
        stages: stages.collect(),
        limits,
    })
}

/// The workers that keep the contract, by node.
fn candidates(inventory: &Inventory, numerics: Numerics) -> Result<Vec<&Candidate>, PlanRefusal> {
    if inventory.workers.is_empty() {
        return Err(PlanRefusal::NoWorkers);
    }
    let mut able: Vec<_> =
        inventory.workers.iter().filter(|w| w.numerics.contains(&numerics)).collect();
    if able.is_empty() {
        return Err(PlanRefusal::NoNumerics { numerics, workers: inventory.workers.len() });
    }
    able.sort_by_key(|worker| worker.node);
    Ok(able)
}

/// The most and the least stages to try. A stage is on a worker of its own and has a layer at least.
fn stages_range(
    asked: Option<u32>,
    layers: u32,
    workers: usize,
) -> Result<(usize, usize), PlanRefusal> {
    match asked {
        None => Ok((workers.min(layers as usize), 1)),
        Some(0) => Err(PlanRefusal::NoStages),
        Some(stages) if stages > layers => Err(PlanRefusal::TooManyStages { stages, layers }),
        Some(stages) if stages as usize > workers => {
            Err(PlanRefusal::TooFewWorkers { stages, workers })
        }
        Some(stages) => Ok((stages as usize, stages as usize)),
    }
}

/// The best cut into this many stages, under the most generous limits that fit.
fn layout(
    costs: &Costs<'_>,
    workers: &[&Candidate],
    stages: usize,
) -> Option<(ReplicaLimits, Vec<Cut>)> {
    memory::limits_to_try(costs, stages).into_iter().find_map(|limits| {
        placement::cut(costs, &limits, workers, stages).map(|cuts| (limits, cuts))
    })
}

/// Whether there is any layout at all: what `refusal` asks of clusters that are not there.
fn fits(
    shape: &ModelShape,
    (precision, kv): (Precision, KvPrecision),
    workers: &[&Candidate],
    asked: Option<u32>,
) -> bool {
    let Ok((most, least)) = stages_range(asked, shape.layers(), workers.len()) else {
        return false;
    };
    let costs = Costs::new(shape, precision).holding_kv(kv);
    (least..=most).rev().any(|stages| layout(&costs, workers, stages).is_some())
}

#[cfg(test)]
#[path = "planner_test.rs"]
mod tests;
