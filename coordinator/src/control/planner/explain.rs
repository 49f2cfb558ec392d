//! A layout in words: the arithmetic behind it, for `shoal plan --explain`.

use shoal_protocol::mesh::Reduction;
use shoal_protocol::plan::{
    BLOCK_TOKENS, KvPrecision, ReplicaPlan, ShardMemory, ShardPlan, StagePlan,
};
use shoal_protocol::units::Bytes;

use super::cost::Slices;
use super::memory::{Costs, KV_TOKENS_MAX};
use super::predict::predict;
use super::ways;
use super::{Inventory, ModelShape};

/// The arithmetic of a layout, a line each.
pub fn explain(plan: &ReplicaPlan, shape: &ModelShape, inventory: &Inventory) -> Vec<String> {
    let costs = Costs::new(shape, plan.precision);
    let limits = &plan.limits;
    let most = plan.stages.iter().map(|stage| stage.shards.len()).max().unwrap_or(1);
    let reduction = Reduction::of(plan.numerics);
    let slices = Slices::new(shape, most as u32, (reduction, plan.precision));
    let mut lines = vec![format!(
        "{} {} {}: {} layers in {}, mesh {}, numerics {}",
        plan.deployment,
        plan.id,
        plan.generation,
        shape.layers(),
        plan.precision,
        plan.mesh(),
        plan.numerics,
    )];
    let slowest = plan.stages.iter().map(|stage| costs.step(stage.layers)).max().unwrap_or(0);
    let tightest = plan.stages.iter().flat_map(|stage| &stage.shards).filter_map(|shard| {
        let worker = inventory.workers.iter().find(|worker| worker.node == shard.node)?;
        Some((worker.free().saturating_sub(shard.memory.total()), shard.node))
    });
    let tightest = tightest.min();
    for (index, stage) in plan.stages.iter().enumerate() {
        let slices = slices.of(stage.shards.len());
        for (shard, slice) in stage.shards.iter().zip(slices) {
            let own = Costs::of_rank(slice, plan.precision).step(stage.layers);
            let step = costs.step(stage.layers);
            let ShardMemory { weights, kv, activations } = shard.memory;
            let budget = inventory.workers.iter().find(|worker| worker.node == shard.node);
            let of = budget.map_or("is not connected".into(), |worker| match worker.used {
                Bytes(0) => format!("of {}", worker.budget),
                used => format!("of {}, other replicas have {used}", worker.budget),
            });
            lines.push(format!(
                "stage {index}{} on {} {}: layers {}: {weights} weights + {kv} KV + {activations} activations = {} {of}; a step reads {}{}",
                rank_of(stage, shard),
                shard.node,
                shard.device,
                stage.layers,
                shard.memory.total(),
                Bytes(own),
                if step == slowest { ", the most of all stages" } else { "" },
            ));
        }
    }
    let tokens = limits.kv_blocks.saturating_mul(BLOCK_TOKENS);
    let bound = match tightest {
        _ if tokens >= KV_TOKENS_MAX => "the most that a replica takes".to_owned(),
        Some((left, node)) => format!("{node} has the least left: {left}"),
        None => "as it was planned".to_owned(),
    };
    if let ModelShape::Encoder(spec) = shape {
        lines.push(super::encoders::explain(spec, limits));
    } else {
        lines.push(format!(
        "KV: {} blocks of {BLOCK_TOKENS} tokens{} = {tokens} tokens at once ({bound}); sequences of up to {} tokens, the model allows {}",
        limits.kv_blocks,
        held_as(plan.numerics.kv()),
        limits.context_max,
        shape.context_max(),
        ));
    }
    lines.extend(times(plan, shape, inventory));
    lines.extend(ways::lines(plan, inventory));
    lines.push(format!(
        "limits: {} rows a step, {} sequences at once, {} steps in flight",
        limits.step_rows_max, limits.sequences_max, limits.steps_in_flight_max,
    ));
    lines
}

/// How keys and values are held, where that is not as they are computed.
fn held_as(kv: KvPrecision) -> String {
    match kv {
        KvPrecision::F32 => String::new(),
        kv => format!(", held as {kv}"),
    }
}

/// ` rank 1` where there are several.
fn rank_of(stage: &StagePlan, shard: &ShardPlan) -> String {
    match stage.shards.len() {
        0 | 1 => String::new(),
        _ => format!(" rank {}", shard.rank.0),
    }
}

/// What a token's time is made of, as far as it can be told before.
fn times(plan: &ReplicaPlan, shape: &ModelShape, inventory: &Inventory) -> Vec<String> {
    let prediction = predict(plan, shape, inventory);
    let ms = |ns: u64| format!("{:.3} ms", ns as f64 / 1e6);
    let mut lines = Vec::new();
    for (index, stage) in prediction.stages.iter().enumerate() {
        let told = match stage.told_ns {
            0 => String::new(),
            ns => format!(" + {} between its ranks", ms(ns)),
        };
        let next = if index + 1 < prediction.stages.len() { "to the next stage" } else { "back" };
        let hop = match stage.hop_ns {
            0 => String::new(),
            ns => format!(" + {} {next}", ms(ns)),
        };
        lines.push(format!("stage {index}: predicted {} compute{told}{hop}", ms(stage.compute_ns)));
    }
    let rates = match prediction.measured {
        true => "rates as the workers measured them at their start",
        false => "no rate is known of some worker, so one is assumed",
    };
    lines.push(format!(
        "predicted: {} a token of one stream, {} a step when full; {rates}",
        ms(prediction.token_ns()),
        ms(prediction.full_ns),
    ));
    lines
}
