//! A layout in words: the arithmetic behind it, for `shoal plan --explain`.

use shoal_protocol::plan::{BLOCK_TOKENS, ReplicaPlan, ShardMemory};
use shoal_protocol::units::Bytes;

use super::memory::{Costs, KV_TOKENS_MAX};
use super::{Inventory, ModelShape};

/// The arithmetic of a layout, a line each.
pub fn explain(plan: &ReplicaPlan, shape: &ModelShape, inventory: &Inventory) -> Vec<String> {
    let costs = Costs::new(shape, plan.precision);
    let limits = &plan.limits;
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
        let step = costs.step(stage.layers);
        for shard in &stage.shards {
            let ShardMemory { weights, kv, activations } = shard.memory;
            let budget = inventory.workers.iter().find(|worker| worker.node == shard.node);
            let of = budget.map_or("is not connected".into(), |worker| match worker.used {
                Bytes(0) => format!("of {}", worker.budget),
                used => format!("of {}, other replicas have {used}", worker.budget),
            });
            lines.push(format!(
                "stage {index} on {} {}: layers {}: {weights} weights + {kv} KV + {activations} activations = {} {of}; a step reads {}{}",
                shard.node,
                shard.device,
                stage.layers,
                shard.memory.total(),
                Bytes(step),
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
    lines.push(format!(
        "KV: {} blocks of {BLOCK_TOKENS} tokens = {tokens} tokens at once ({bound}); sequences of up to {} tokens, the model allows {}",
        limits.kv_blocks,
        limits.context_max,
        shape.context_max(),
    ));
    lines.push(format!(
        "limits: {} rows a step, {} sequences at once, {} steps in flight",
        limits.step_rows_max, limits.sequences_max, limits.steps_in_flight_max,
    ));
    lines
}
