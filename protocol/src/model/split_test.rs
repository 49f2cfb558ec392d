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
                .map(|rank| model.part(Split { rank, ranks }, reduction, Precision::Bf16).unwrap())
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
    let part =
        |rank| model.part(Split { rank, ranks: 2 }, Reduction::Sum, Precision::Bf16).unwrap();
    assert_eq!((part(0).kv_heads, part(1).kv_heads), (0..3, 3..7));
    assert_eq!((part(0).heads, part(1).heads), (0..6, 6..14));
    assert_eq!((part(0).intermediate, part(1).intermediate), (0..144, 144..300));
    assert_eq!((part(0).vocab, part(1).vocab), (0..0, 0..1003));
}

#[test]
fn more_ranks_than_heads_are_refused_with_the_arithmetic() {
    let error = model(2, 300, 5000)
        .part(Split { rank: 0, ranks: 3 }, Reduction::Sum, Precision::Bf16)
        .unwrap_err();
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
    let whole = model.part(Split::WHOLE, Reduction::Exact, Precision::Bf16).unwrap();
    let alone = model.shard_memory(layers, Precision::Bf16, &LIMITS);
    assert_eq!(whole.memory(&model, layers, Precision::Bf16, &LIMITS), alone);
    for reduction in [Reduction::Sum, Reduction::Exact] {
        let two = [0, 1].map(|rank| {
            let part = model.part(Split { rank, ranks: 2 }, reduction, Precision::Bf16).unwrap();
            part.memory(&model, layers, Precision::Bf16, &LIMITS)
        });
        let norms = 5 * 224 * 4;
        assert_eq!(two[0].kv + two[1].kv, alone.kv);
        assert_eq!((two[0].weights + two[1].weights).0, alone.weights.0 + norms);
    }
}

/// A DeepSeek: experts, a shared one, a compressed cache.
fn deepseek(experts: u32) -> ModelSpec {
    let text = format!(
        r#"{{"architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 224, "num_hidden_layers": 3,
            "intermediate_size": 300, "num_attention_heads": 8, "num_key_value_heads": 8,
            "vocab_size": 5000, "max_position_embeddings": 512, "kv_lora_rank": 64, "q_lora_rank": 48,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
            "n_routed_experts": {experts}, "n_shared_experts": 2, "num_experts_per_tok": 2,
            "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1}}"#
    );
    ModelSpec::from_config_json(&text).expect("a valid config")
}

#[test]
fn experts_are_whole_heads_are_whole_and_what_compresses_is_everywhere() {
    use TensorRole::*;
    let model = deepseek(5);
    for reduction in [Reduction::Sum, Reduction::Exact] {
        for ranks in 1..=5 {
            let parts: Vec<Part> = (0..ranks)
                .map(|rank| model.part(Split { rank, ranks }, reduction, Precision::Bf16).unwrap())
                .collect();
            for tensor in model.tensors(LayerRange::new(0, 3)) {
                let held: Vec<u64> = parts
                    .iter()
                    .filter_map(|part| part.of(tensor.clone(), &model))
                    .map(|part| part.row_count() * part.column_count())
                    .collect();
                match tensor.role {
                    // One rank has all of it.
                    ExpertGate | ExpertUp | ExpertDown | KeyUp | ValueUp => {
                        assert_eq!(held, [tensor.elements()], "{} on {ranks}", tensor.name);
                    }
                    Query | AttentionOutput | Gate | Up | Down | SharedGate | SharedUp
                    | SharedDown | Embedding | OutputHead => {
                        let sum = held.iter().sum::<u64>();
                        assert_eq!(sum, tensor.elements(), "{} on {ranks}", tensor.name);
                    }
                    _ => {
                        let whole = vec![tensor.elements(); ranks as usize];
                        assert_eq!(held, whole, "{} on {ranks}", tensor.name);
                    }
                }
            }
        }
    }
    let part =
        |rank| model.part(Split { rank, ranks: 3 }, Reduction::Sum, Precision::Bf16).unwrap();
    assert_eq!([0, 1, 2].map(|rank| part(rank).experts), [0..1, 1..3, 3..5]);
    assert_eq!([0, 1, 2].map(|rank| part(rank).heads), [0..2, 2..5, 5..8]);
    assert_eq!([0, 1, 2].map(|rank| part(rank).shared), [0..32, 32..80, 80..128]);
}

#[test]
fn a_compressed_cache_is_on_every_rank_and_experts_take_what_they_hold() {
    let model = deepseek(6);
    let layers = LayerRange::new(1, 2);
    let alone = model.shard_memory(layers, Precision::Bf16, &LIMITS);
    let parts = [0, 1]
        .map(|rank| model.part(Split { rank, ranks: 2 }, Reduction::Sum, Precision::Bf16).unwrap());
    let two = parts.map(|part| part.memory(&model, layers, Precision::Bf16, &LIMITS));
    assert_eq!(two.map(|memory| memory.kv), [alone.kv, alone.kv]);
    // Router with its correction, two norms, the compressions and their norms.
    let doubled =
        16 * 224 * 2 + 6 * 4 + 2 * 224 * 4 + 48 * 224 * 2 + 48 * 4 + 80 * 224 * 2 + 64 * 4;
    assert_eq!((two[0].weights + two[1].weights).0, alone.weights.0 + doubled);
    // The results of two experts a row travel where the sum is exact.
    let exact = model.part(Split { rank: 0, ranks: 2 }, Reduction::Exact, Precision::Bf16).unwrap();
    let exact = exact.memory(&model, layers, Precision::Bf16, &LIMITS);
    let rows = u64::from(LIMITS.step_rows_max);
    assert!(exact.activations.0 > two[0].activations.0 + rows * 2 * 224 * 4);
}

#[test]
fn what_bounds_the_ranks_of_a_mixture_is_named() {
    let error = deepseek(4)
        .part(Split { rank: 0, ranks: 5 }, Reduction::Exact, Precision::Bf16)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "5 tensor ranks: the model has 4 experts, so that a rank would hold none; possible: 1 to 4 \
         ranks"
    );
    let error = deepseek(64)
        .part(Split { rank: 0, ranks: 9 }, Reduction::Exact, Precision::Bf16)
        .unwrap_err();
    assert_eq!((error.units, error.what), (8, "heads"));
}

#[test]
fn no_border_of_columns_is_inside_of_a_block() {
    // A group of heads has 32 columns, 8 of them a block of 256; the MLP has 43 of these.
    let model = model(32, 11_008, 5000);
    for held in Precision::ALL {
        for ranks in 2..=4 {
            let parts: Vec<Part> = (0..ranks)
                .map(|rank| model.part(Split { rank, ranks }, Reduction::Sum, held).unwrap())
                .collect();
            for tensor in parts.iter().flat_map(|part| part.tensors(&model, LayerRange::new(0, 2)))
            {
                let (block, _) = held.of(tensor.spec.role).block();
                let (columns, stored) = (tensor.columns.clone(), tensor.columns_stored());
                let ends = columns.end.is_multiple_of(block) || columns.end == stored;
                let name = &tensor.spec.name;
                assert!(columns.start.is_multiple_of(block) && ends, "{name} {held} {columns:?}");
            }
            let covered: u32 = parts.iter().map(|part| part.intermediate.len() as u32).sum();
            let heads: u32 = parts.iter().map(|part| part.kv_heads.len() as u32).sum();
            assert_eq!((covered, heads), (11_008, 32), "{held} on {ranks}");
        }
    }
    let first = |reduction, held| {
        model.part(Split { rank: 0, ranks: 2 }, reduction, held).unwrap().intermediate
    };
    assert_eq!(first(Reduction::Sum, Precision::Q4K), 0..21 * 256);
    // Rows are cut where they were, whatever they are held in.
    assert_eq!(first(Reduction::Exact, Precision::Q4K), 0..5504);
    assert_eq!(first(Reduction::Sum, Precision::Bf16), 0..5504);
}

#[test]
fn ranks_that_no_block_is_left_for_are_refused_with_the_way_out() {
    let model = model(2, 300, 5000);
    let two = Split { rank: 0, ranks: 2 };
    let error = model.part(two, Reduction::Sum, Precision::Q4K).unwrap_err();
    assert_eq!(
        error.to_string(),
        "2 tensor ranks: the model has 1 runs of key/value heads that end where a block of this \
         precision does, so that a rank would hold none; possible: 1 to 1 ranks, or up to 2 with \
         --reduction exact, which cuts no blocks"
    );
    for (reduction, held) in [(Reduction::Exact, Precision::Q4K), (Reduction::Sum, Precision::Q8_0)]
    {
        assert!(model.part(two, reduction, held).is_ok(), "{held}");
    }
    // Eight heads of 12 values are the fewest that end with a block of 32.
    assert_eq!(deepseek(8).ranks_max_held(Reduction::Sum, Precision::Q8_0), (1, HEAD_RUNS));
    let error = deepseek(8).part(two, Reduction::Sum, Precision::Fp8).unwrap_err();
    assert!(error.to_string().contains("has 1 "), "{error}");
}

#[test]
fn kinds_of_tensors_sum_up_to_the_tensors() {
    for model in [deepseek(6), model(7, 300, 5000)] {
        for (ranks, reduction) in
            [(1, Reduction::Exact), (2, Reduction::Sum), (4, Reduction::Exact)]
        {
            for rank in 0..ranks {
                let part = model.part(Split { rank, ranks }, reduction, Precision::F32).unwrap();
                for layers in [(0, 1), (1, 2), (0, model.layers)] {
                    let layers = LayerRange::new(layers.0, layers.1);
                    let all = part.tensors(&model, layers);
                    let kinds = part.tensor_kinds(&model, layers);
                    assert!(kinds.len() < all.len() || kinds.iter().all(|(_, count)| *count == 1));
                    let bytes = |part: &TensorPart| part.held_bytes(Precision::Q8_0).0;
                    let counted: u64 = kinds.iter().map(|(part, count)| bytes(part) * count).sum();
                    assert_eq!(counted, all.iter().map(bytes).sum::<u64>(), "{ranks} {layers}");
                    assert_eq!(kinds.iter().map(|(_, count)| count).sum::<u64>(), all.len() as u64);
                }
            }
        }
    }
}
