use super::*;

fn model(kv_heads: u32, intermediate: u32, vocab: u32) -> ModelSpec {
    let text = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "hidden_size": 224, "head_dim": 16,
            "intermediate_size": {intermediate}, "num_attention_heads": {heads},
            "num_key_value_heads": {kv_heads}, "num_hidden_layers": 2, "vocab_size": {vocab},
            "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "attention_bias": true,
            "mlp_bias": true}}"#,
        heads = 2 * kv_heads
    );
    ModelSpec::from_config_json(&text).expect("a valid config")
}

const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: 8,
    context_max: 128,
    step_rows_max: 16,
    sequences_max: 4,
    steps_in_flight_max: 2,
};

#[test]
fn shares_cover_everything_once_also_where_they_are_not_equal() {
    // 7 groups on 2 ranks, a vocabulary of 1003: one block, which the last rank has.
    let model = model(7, 300, 1003);
    for ranks in 1..=7 {
        for reduction in [Reduction::Sum, Reduction::Exact] {
            let parts: Vec<Part> = (0..ranks)
                .map(|rank| model.part(Split { rank, ranks }, reduction).unwrap())
                .collect();
            for tensor in model.tensors(LayerRange::new(0, 2)) {
                let held: u64 = parts
                    .iter()
                    .filter_map(|part| part.of(tensor.clone(), &model))
                    .map(|part| part.row_count() * part.column_count())
                    .sum();
                let copies = match tensor.role {
                    TensorRole::AttentionNorm | TensorRole::MlpNorm | TensorRole::FinalNorm => {
                        u64::from(ranks)
                    }
                    _ => 1,
                };
                assert_eq!(held, copies * tensor.elements(), "{} on {ranks}", tensor.name);
            }
        }
    }
    let part = |rank| model.part(Split { rank, ranks: 2 }, Reduction::Sum).unwrap();
    assert_eq!((part(0).kv_heads, part(1).kv_heads), (0..3, 3..7));
    assert_eq!((part(0).heads, part(1).heads), (0..6, 6..14));
    assert_eq!((part(0).intermediate, part(1).intermediate), (0..144, 144..300));
    assert_eq!((part(0).vocab, part(1).vocab), (0..0, 0..1003));
}

#[test]
fn more_ranks_than_heads_are_refused_with_the_arithmetic() {
    let error = model(2, 300, 5000).part(Split { rank: 0, ranks: 3 }, Reduction::Sum).unwrap_err();
    assert_eq!(
        error.to_string(),
        "3 tensor ranks: the model has 2 key/value heads, so that a rank would hold none; \
         possible: 1 to 2 ranks"
    );
}

#[test]
fn one_rank_takes_what_a_whole_shard_takes_and_ranks_share_the_weights() {
    let model = model(4, 640, 4096);
    let layers = LayerRange::new(0, 2);
    let whole = model.part(Split::WHOLE, Reduction::Exact).unwrap();
    let alone = model.shard_memory(layers, Precision::Bf16, &LIMITS);
    assert_eq!(whole.memory(&model, layers, Precision::Bf16, &LIMITS), alone);
    for reduction in [Reduction::Sum, Reduction::Exact] {
        let two = [0, 1].map(|rank| {
            let part = model.part(Split { rank, ranks: 2 }, reduction).unwrap();
            part.memory(&model, layers, Precision::Bf16, &LIMITS)
        });
        let norms = 5 * 224 * 4;
        assert_eq!(two[0].kv + two[1].kv, alone.kv);
        assert_eq!((two[0].weights + two[1].weights).0, alone.weights.0 + norms);
    }
}
