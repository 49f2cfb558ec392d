//! What each of two workers holds of a model, by the sums of its plan: half, and what cannot be halved.

use super::*;
use shoal_protocol::mesh::Reduction;

/// Of the weights and the cache of one worker that holds all, what each of two may hold.
const MOST_PERCENT: u64 = 52;

/// The shapes of published models: untied embeddings of a billion weights, and tied ones.
fn published() -> [ModelSpec; 2] {
    let ModelShape::Checkpoint(dense) = dense(1, 8) else { panic!("it has tensors") };
    let eight = ModelSpec {
        layers: 32,
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        intermediate: 14336,
        vocab: 128_256,
        context_max: 8192,
        stored: Precision::Bf16,
        ..dense.clone()
    };
    let one = ModelSpec {
        layers: 16,
        hidden: 2048,
        head_dim: 64,
        intermediate: 8192,
        tied_embeddings: true,
        ..eight.clone()
    };
    [eight, one]
}

#[test]
fn each_of_two_workers_holds_half_of_weights_and_cache_by_every_plan() {
    let exact = MeshAsk { reduction: Some(Reduction::Exact), ..mesh("1x2") };
    let sum = MeshAsk { reduction: Some(Reduction::Sum), ..mesh("1x2") };
    for spec in published() {
        let shape = ModelShape::Checkpoint(spec.clone());
        // Stages are balanced by what a step reads: where a head weighs as much as several layers, as of the
        // small model, the other stage has these, where there is room for them.
        let by_stages = [MeshAsk::default(), mesh("2x1")];
        let by_stages = by_stages.into_iter().filter(|_| !spec.tied_embeddings);
        for ask in by_stages.chain([exact, sum]) {
            let plan = planned(&inventory(&[10 * GIB, 10 * GIB]), &shape, ask, None).unwrap();
            let all = LayerRange::new(0, spec.layers);
            let alone = spec.shard_memory(all, plan.precision, &plan.limits);
            let alone = alone.weights.0 + alone.kv.0;
            // A table of embeddings is on one stage whole.
            let table = u64::from(spec.vocab) * u64::from(spec.hidden) * 2;
            let more = if plan.stages.len() > 1 { table } else { 0 };
            let shards: Vec<_> = plan.stages.iter().flat_map(|stage| &stage.shards).collect();
            assert_eq!(shards.len(), 2, "{ask}");
            for shard in &shards {
                let held = shard.memory.weights.0 + shard.memory.kv.0;
                println!("{ask}: {:.4} of {alone} bytes", held as f64 / alone as f64);
                assert!(
                    held * 100 <= alone * MOST_PERCENT + more * 100,
                    "{ask}: {held} of {alone}"
                );
            }
            let held: u64 = shards.iter().map(|s| s.memory.weights.0 + s.memory.kv.0).sum();
            assert!(held * 100 <= alone * 101, "{ask}: {held} of {alone} together");
        }
    }
}
