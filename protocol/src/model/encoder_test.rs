use serde_json::json;

use super::*;
use crate::units::LayerRange;

fn bert(more: Value) -> Value {
    with(
        json!({"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 24,
               "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 40,
               "vocab_size": 99, "max_position_embeddings": 64, "type_vocab_size": 2,
               "hidden_act": "gelu", "layer_norm_eps": 1e-12}),
        more,
    )
}

fn modern(more: Value) -> Value {
    with(
        json!({"architectures": ["ModernBertModel"], "model_type": "modernbert", "hidden_size": 24,
               "num_attention_heads": 3, "num_hidden_layers": 4, "intermediate_size": 40,
               "vocab_size": 99, "max_position_embeddings": 64, "hidden_activation": "gelu"}),
        more,
    )
}

fn with(mut config: Value, more: Value) -> Value {
    for (name, value) in more.as_object().into_iter().flatten() {
        config[name] = value.clone();
    }
    config
}

fn read(config: &Value) -> EncoderSpec {
    EncoderSpec::from_config(config).expect("a good config")
}

#[test]
fn a_model_with_a_head_scores_and_one_without_embeds() {
    let output = |more| read(&bert(more)).output;
    let mean = EncoderOutput::Embedding { pooling: Pooling::Mean, normalize: false };
    assert_eq!(output(json!({})), mean);
    let scores = |labels, sigmoid| EncoderOutput::Scores { labels, pooling: Pooling::Cls, sigmoid };
    let head = "BertForSequenceClassification";
    assert_eq!(output(json!({"architectures": [head]})), scores(2, false));
    let one = json!({"architectures": [head], "id2label": {"0": "LABEL_0"}});
    assert_eq!(output(one.clone()), scores(1, true));
    let identity = "torch.nn.modules.linear.Identity";
    for own in [
        json!({"sentence_transformers": {"activation_fn": identity}}),
        json!({"sbert_ce_default_activation_function": identity}),
    ] {
        assert_eq!(output(with(one.clone(), own)), scores(1, false));
    }
}

#[test]
fn robertas_positions_begin_behind_the_padding() {
    let config = bert(json!({"architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta",
                             "max_position_embeddings": 66, "pad_token_id": 1}));
    let spec = read(&config);
    assert_eq!(
        (spec.family, spec.context_max, spec.pad_token),
        (EncoderFamily::Roberta, 64, Some(1))
    );
}

#[test]
fn modernberts_rotary_is_read_as_both_transformers_write_it() {
    let old = json!({"global_attn_every_n_layers": 2, "local_attention": 16,
                     "global_rope_theta": 160000.0, "local_rope_theta": 10000.0});
    let new = json!({"global_attn_every_n_layers": 2, "local_attention": 16,
                     "layer_types": ["full_attention", "sliding_attention", "full_attention",
                                     "sliding_attention"],
                     "rope_parameters": {
                         "full_attention": {"rope_theta": 160000.0, "rope_type": "default"},
                         "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}}});
    let expected =
        Rotary { global_every: 2, reach: 8, global_theta: 160_000.0, local_theta: 10_000.0 };
    for more in [old, new] {
        assert_eq!(read(&modern(more)).rotary, Some(expected));
    }
}

#[test]
fn what_would_change_the_arithmetic_is_refused_by_name() {
    let check = |config: Value, part: &str| {
        let error = EncoderSpec::from_config(&config).expect_err("a refusal").to_string();
        assert!(error.contains(part), "{error}");
    };
    check(bert(json!({"hidden_act": "relu"})), "`hidden_act` is `relu`");
    check(bert(json!({"position_embedding_type": "relative_key"})), "`relative_key`");
    check(bert(json!({"is_decoder": true})), "`is_decoder`");
    check(bert(json!({"model_type": "mpnet"})), "`model_type` is `mpnet`");
    check(bert(json!({"num_attention_heads": 5})), "`hidden_size` is 24");
    check(bert(json!({"type_vocab_size": null})), "`type_vocab_size` is missing");
    check(bert(json!({"hidden_size": 65536})), "`hidden_size` is 65536");
    check(modern(json!({"layer_types": ["sliding_attention"]})), "`layer_types`");
    let yarn = json!({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}});
    check(modern(yarn), "`yarn`");
}

#[test]
fn stages_have_their_layers_and_the_ends_their_own() {
    let names = |spec: &EncoderSpec, start, end| -> Vec<String> {
        let tensors = spec.tensors(LayerRange::new(start, end));
        tensors.into_iter().map(|tensor| tensor.name).collect()
    };
    let mut spec = read(&bert(json!({"architectures": ["BertForSequenceClassification"]})));
    spec.prefixed = true;
    let all = names(&spec, 0, 2);
    assert_eq!(all.len(), 5 + 2 * 16 + 4);
    assert_eq!([names(&spec, 0, 1), names(&spec, 1, 2)].concat(), all);
    assert_eq!(all[0], "bert.embeddings.word_embeddings.weight");
    assert_eq!(all[all.len() - 4], "bert.pooler.dense.weight");
    assert_eq!(all[all.len() - 1], "classifier.bias");
    let modern = read(&modern(json!({})));
    let layer =
        ["attn_norm", "attn.Wqkv", "attn.Wo", "mlp_norm", "mlp.Wi", "mlp.Wo"].map(str::to_owned);
    let of = |i: u32| {
        let mut names = names(&modern, i, i + 1);
        // Query, key and value are parts of one, as are gate and up.
        names.dedup();
        names
    };
    assert_eq!(of(1), layer.map(|name| format!("layers.1.{name}.weight")));
    let rows = |role| {
        let tensors = modern.tensors(LayerRange::new(1, 2));
        let tensor = tensors.into_iter().find(|tensor| tensor.role == role).expect("it is there");
        let excerpt = tensor.excerpt.expect("it is a part");
        (tensor.shape, excerpt.stored, excerpt.first_row)
    };
    use crate::model::TensorRole::{Gate, Up, Value};
    assert_eq!(rows(Value), (vec![24, 24], vec![72, 24], 48));
    assert_eq!(rows(Gate), (vec![40, 24], vec![80, 24], 0));
    assert_eq!(rows(Up), (vec![40, 24], vec![80, 24], 40));
    assert!(!of(0).iter().any(|name| name.contains("attn_norm")), "{:?}", of(0));
    assert_eq!(of(3).last().map(String::as_str), Some("final_norm.weight"));
}

#[test]
fn ranks_take_their_share_of_memory_and_all_of_what_is_small() {
    use crate::mesh::Reduction;
    use crate::model::Split;
    use crate::plan::{Precision, ReplicaLimits};

    let limits = ReplicaLimits {
        kv_blocks: 64,
        context_max: 64,
        step_rows_max: 64,
        sequences_max: 4,
        steps_in_flight_max: 2,
    };
    let spec = read(&bert(json!({"hidden_size": 64, "num_attention_heads": 4,
                                 "intermediate_size": 128, "vocab_size": 4096})));
    let layers = LayerRange::new(0, spec.layers);
    let whole = spec.shard_memory(layers, Precision::F32, &limits);
    for reduction in [Reduction::Sum, Reduction::Exact] {
        let mut weights = 0;
        for rank in 0..2 {
            let part =
                spec.part(Split { rank, ranks: 2 }, reduction, spec.stored).expect("it can be cut");
            let own = spec.part_memory(&part, layers, Precision::F32, &limits);
            assert!(own.weights.0 < whole.weights.0 * 6 / 10, "{own:?} of {whole:?}");
            assert_eq!(own.kv.0, 0);
            weights += own.weights.0;
        }
        assert!(weights >= whole.weights.0, "{weights} of {whole:?}");
    }
    let error = spec
        .part(Split { rank: 0, ranks: 5 }, Reduction::Sum, spec.stored)
        .expect_err("too many ranks");
    assert!(error.to_string().contains("4 key/value heads"), "{error}");
}
