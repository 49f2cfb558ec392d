//! What a change of layout costs, and how fast a layout is expected to be.

use shoal_protocol::id::NodeId;
use shoal_protocol::plan::{ReplicaPlan, ShardPlan, StagePlan};
use shoal_protocol::units::Bytes;

use super::ModelShape;

/// What a worker is taken to read per second where it has not been measured: half of what one memory
/// channel of a present-day machine gives, so that a promise is rather too low.
const ASSUMED_BYTES_PER_S: u64 = 8 << 30;

/// How fast a worker computes, as weight bytes that its steps read in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bytes in a second.
    pub bytes_per_s: u64,
    /// Whether somebody measured it: the worker's own calibration at its start, or steps of this model.
    pub measured: bool,
}

impl Rate {
    /// The rate of steps that read so many bytes each.
    pub fn measured(step: Bytes, steps: u64, compute_us: u64) -> Option<Self> {
        let bytes = u128::from(step.0) * u128::from(steps) * 1_000_000;
        let bytes_per_s = u64::try_from(bytes.checked_div(u128::from(compute_us))?).ok()?;
        (bytes_per_s > 0).then_some(Self { bytes_per_s, measured: true })
    }

    /// What a worker has measured of itself; nothing where that cannot be.
    pub fn said(bytes_per_s: u64) -> Option<Self> {
        (bytes_per_s > 0).then_some(Self { bytes_per_s, measured: true })
    }

    /// That of a worker of which nothing is known.
    pub const ASSUMED: Self = Self { bytes_per_s: ASSUMED_BYTES_PER_S, measured: false };
}

/// Whether both have the same layers on the same workers, under one numerics contract.
pub fn same_layout(a: &ReplicaPlan, b: &ReplicaPlan) -> bool {
    let place = |stage: &StagePlan| {
        let nodes: Vec<NodeId> = stage.shards.iter().map(|shard| shard.node).collect();
        (stage.layers, nodes)
    };
    (a.precision, a.numerics) == (b.precision, b.numerics)
        && a.stages.len() == b.stages.len()
        && a.stages.iter().zip(&b.stages).all(|(a, b)| place(a) == place(b))
}

/// The weight bytes that each worker of a layout has to read. One that holds the same shard already
/// keeps it, unless both layouts are to be there at once.
pub fn loads(
    before: Option<&ReplicaPlan>,
    after: &ReplicaPlan,
    beside: bool,
) -> Vec<(NodeId, Bytes)> {
    let keeps = |stage: &StagePlan, shard: &ShardPlan| {
        let same =
            |other: &&StagePlan| other.layers == stage.layers && other.shards.contains(shard);
        before.is_some_and(|before| {
            before.limits == after.limits && before.stages.iter().any(|s| same(&s))
        })
    };
    let shards = after.stages.iter().flat_map(|s| s.shards.iter().map(move |shard| (s, shard)));
    shards
        .filter(|(stage, shard)| beside || !keeps(stage, shard))
        .map(|(_, shard)| (shard.node, shard.memory.weights))
        .collect()
}

/// Tokens per second of one stream, and the most of many, on workers with these rates: the bytes that a
/// step reads over the rate. Links are left out.
pub fn speed(
    plan: &ReplicaPlan,
    shape: &ModelShape,
    rate_of: impl Fn(NodeId) -> Rate,
) -> (f64, f64) {
    let time = |stage: &StagePlan| {
        let layers = stage.layers.start..stage.layers.end;
        let bytes: Bytes = layers.map(|layer| shape.step_bytes(layer, plan.precision)).sum();
        let node = stage.shards.first().map(|shard| shard.node);
        let rate = node.map_or(Rate::ASSUMED, &rate_of);
        let ranks = stage.shards.len().max(1) as f64;
        bytes.0 as f64 / ranks / rate.bytes_per_s.max(1) as f64
    };
    let times: Vec<f64> = plan.stages.iter().map(time).collect();
    let per_second = |seconds: f64| if seconds > 0.0 { 1.0 / seconds } else { f64::INFINITY };
    let slowest = times.iter().copied().fold(0.0, f64::max);
    (per_second(times.iter().sum()), per_second(slowest))
}
