//! What each family's file makes of a `config.json`: the options that it sets, and what it refuses.

use crate::model::moe::{Groups, Scoring};
use crate::model::options::{Activation, LayerRope, NormKind, Placement};
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::units::LayerRange;

/// A small model of a family, with `fields` beside the sizes.
fn read(family: Family, fields: &str) -> Result<ModelSpec, SpecError> {
    let mut root = serde_json::json!({
        "architectures": [family.architecture()], "model_type": family.model_type(),
        "hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 4,
        "num_key_value_heads": 4, "num_hidden_layers": 4, "vocab_size": 259,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5
    });
    let fields: serde_json::Value = serde_json::from_str(&format!("{{{fields}}}")).expect("JSON");
    for (key, value) in fields.as_object().expect("an object") {
        root[key] = value.clone();
    }
    ModelSpec::from_config_json(&root.to_string())
}

fn spec(family: Family, fields: &str) -> ModelSpec {
    read(family, fields).expect("a valid config")
}

/// The windows and rotations of a model's layers, `-` for none.
fn layers(spec: &ModelSpec) -> String {
    let layer = |layer| {
        let options = spec.layer(layer);
        let window = options.window.map_or("-".to_owned(), |window| window.to_string());
        let rope = match options.rope {
            LayerRope::Global => 'g',
            LayerRope::Local => 'l',
            LayerRope::None => '-',
        };
        format!("{window}{rope}{}", if options.is_moe { "x" } else { "" })
    };
    (0..spec.layers).map(layer).collect::<Vec<_>>().join(" ")
}

#[test]
fn windows_and_rotations_are_those_of_the_published_patterns() {
    let mistral = r#""sliding_window": 21"#;
    for (family, fields, expected) in [
        (Family::Mistral, mistral, "21g 21g 21g 21g"),
        (Family::Mistral, "", "4096g 4096g 4096g 4096g"),
        (Family::Mistral, r#""sliding_window": null"#, "-g -g -g -g"),
        (Family::Phi3, "", "-g -g -g -g"),
        (Family::SmolLm3, "", "-g -g -g --"),
        (Family::SmolLm3, r#""no_rope_layers": [0, 1, 1, 0]"#, "-- -g -g --"),
        (Family::Gemma2, r#""sliding_window": 8"#, "8g -g 8g -g"),
        (Family::Gemma3, r#""sliding_window": 8, "sliding_window_pattern": 3"#, "8l 8l -g 8l"),
        (Family::Cohere2, r#""sliding_window": 8"#, "8g 8g 8g --"),
        (Family::StarCoder2, r#""sliding_window": 8"#, "8g 8g 8g 8g"),
    ] {
        assert_eq!(layers(&spec(family, fields)), expected, "{family:?} {fields}");
    }
    let types = r#""sliding_window": 8, "layer_types": ["full_attention", "sliding_attention",
                   "full_attention", "full_attention"]"#;
    assert_eq!(layers(&spec(Family::Gemma2, types)), "-g 8g -g -g");
}

#[test]
fn options_are_those_of_the_family() {
    let gemma = spec(Family::Gemma2, r#""query_pre_attn_scalar": 16, "hidden_size": 64"#).options;
    assert_eq!((gemma.norm, gemma.placement), (NormKind::RmsOnePlus, Placement::Both));
    assert_eq!((gemma.attention_softcap, gemma.logit_softcap), (Some(50.0), Some(30.0)));
    assert_eq!((gemma.attention_scale, gemma.embedding_multiplier), (Some(0.25), 8.0));
    assert_eq!(gemma.activation, Activation::GeluTanh);
    let none = r#""attn_logit_softcapping": null, "final_logit_softcapping": null"#;
    assert_eq!(spec(Family::Gemma2, none).options.attention_softcap, None);

    let granite = r#""embedding_multiplier": 12, "residual_multiplier": 0.5,
                     "attention_multiplier": 0.25, "logits_scaling": 8"#;
    let granite = spec(Family::Granite, granite).options;
    assert_eq!((granite.embedding_multiplier, granite.residual_multiplier), (12.0, 0.5));
    assert_eq!((granite.attention_scale, granite.logit_multiplier), (Some(0.25), 0.125));

    let cohere = spec(Family::Cohere, r#""logit_scale": 0.5"#).options;
    assert_eq!((cohere.norm, cohere.placement), (NormKind::Layer, Placement::Parallel));
    assert!(cohere.interleaved && cohere.logit_multiplier == 0.5);

    let olmo = spec(Family::Olmo2, "");
    assert!(olmo.qk_norm && olmo.options.qk_norm_whole);
    assert_eq!(olmo.options.placement, Placement::After);

    let starcoder = spec(Family::StarCoder2, "");
    assert!(starcoder.qkv_bias && starcoder.mlp_bias && !starcoder.options.gated);
    assert!(starcoder.options.norm_bias && starcoder.tied_embeddings);
}

#[test]
fn mixtures_of_experts_are_read_with_their_layers() {
    let moe = r#""num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20"#;
    let dense = format!(
        r#"{moe}, "shared_expert_intermediate_size": 52, "decoder_sparse_step": 2,
           "mlp_only_layers": [3]"#
    );
    let qwen = spec(Family::Qwen2Moe, &dense);
    assert_eq!(layers(&qwen), "-g -gx -g -g");
    let shape = qwen.options.moe.expect("experts");
    assert_eq!((shape.experts, shape.top_k, shape.intermediate), (6, 3, 20));
    assert!(shape.shared == Some(52) && shape.shared_gate && !shape.normalise);
    // Router, routes, two buffers of rows and the widest MLP, which is the dense one.
    let widths = qwen.scratch_widths();
    assert_eq!((widths.router, widths.routes, widths.routed, widths.intermediate), (6, 6, 40, 72));
    assert_eq!(widths.floats(), 5 * 40 + 2 * 72 + 10 + 6 + 6 + 2 * 40 + 72);
    let names = |layer| {
        let tensors = qwen.tensors(LayerRange::new(layer, layer + 1));
        tensors.into_iter().map(|tensor| tensor.name).collect::<Vec<_>>()
    };
    assert!(names(1).contains(&"model.layers.1.mlp.experts.5.down_proj.weight".to_owned()));
    assert!(!names(1).contains(&"model.layers.1.mlp.down_proj.weight".to_owned()));
    assert!(names(2).contains(&"model.layers.2.mlp.down_proj.weight".to_owned()));

    let deepseek = r#""qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
        "kv_lora_rank": 24, "moe_intermediate_size": 20, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 2"#;
    let spec = spec(Family::DeepSeek3, deepseek);
    assert_eq!(layers(&spec), "-g -g -g -gx");
    assert_eq!((spec.head_dim, spec.rotary_dim()), (20, 8));
    assert_eq!((spec.cache_heads(), spec.cache_dim()), (1, 32));
    let moe = spec.options.moe.expect("experts");
    assert_eq!(moe.groups, Some(Groups { groups: 4, kept: 2, best: 2 }));
    assert_eq!((moe.scoring, moe.shared), (Scoring::Sigmoid, Some(40)));
    // 4 heads of 12 + 8 would take 2 x 80 values a token and layer uncompressed; keys and values are 2 x 32.
    assert_eq!(spec.kv_bytes_per_token_layer().0, 2 * 32 * 4);
}

#[test]
fn what_a_family_cannot_do_is_refused_by_name() {
    let moe = r#""moe_intermediate_size": 20, "num_experts_per_tok": 3"#;
    let v3 = r#""qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
        "kv_lora_rank": 24, "moe_intermediate_size": 20, "n_routed_experts": 8,
        "num_experts_per_tok": 3"#;
    for (family, fields, message) in [
        (
            Family::Cohere,
            r#""use_qk_norm": true"#.to_owned(),
            "config.json: `use_qk_norm` is true, which is not supported; supported: false",
        ),
        (
            Family::Gemma2,
            r#""hidden_activation": "gelu""#.to_owned(),
            "config.json: `hidden_activation` is `gelu`, which is not supported; \
             supported: `gelu_pytorch_tanh`",
        ),
        (
            Family::Gemma3,
            r#""use_bidirectional_attention": true"#.to_owned(),
            "config.json: `use_bidirectional_attention` is true, which is not supported; \
             supported: false",
        ),
        (
            Family::Qwen3Moe,
            format!(r#"{moe}, "num_experts": 2"#),
            "config.json: `num_experts_per_tok` is 3; expected at most `num_experts`, which is 2",
        ),
        (
            Family::Gemma2,
            r#""layer_types": ["chunked_attention"]"#.to_owned(),
            "config.json: `layer_types` is [\"chunked_attention\"]; expected a list of 4: \
             `sliding_attention` or `full_attention`, one a layer",
        ),
        (
            Family::DeepSeek3,
            format!(r#"{v3}, "n_group": 3, "topk_group": 1"#),
            "config.json: `n_group` is 3; expected a divisor of the number of experts, which is 8",
        ),
        (
            Family::DeepSeek2,
            format!(r#"{v3}, "topk_method": "noaux_tc""#),
            "config.json: `topk_method` is `noaux_tc`, which is not supported; \
             supported: `greedy`, `group_limited_greedy`",
        ),
        (
            Family::Phi3,
            r#""rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}"#
                .to_owned(),
            "config.json: `short_factor` is a list of 1; \
             expected 5 numbers, one for each pair of rotated dimensions",
        ),
        (
            Family::GptOss,
            r#""quantization_config": {"quant_method": "quark"}"#.to_owned(),
            "config.json: `quantization_config` is a quantisation with `quark`, which is not \
             supported; supported: `fp8` (e4m3), `compressed-tensors` with float-quantized weights \
             of 8 bits, `gptq` and `awq` (gemm) with 4 bits, `mxfp4` as GPT-OSS has it; or weights \
             stored as f32, bf16 or f16 without `quantization_config`",
        ),
    ] {
        let error = read(family, &fields).expect_err(&fields);
        assert_eq!(error.to_string(), message, "{family:?} {fields}");
    }
}

#[test]
fn every_family_has_one_architecture_and_one_model_type() {
    for family in Family::ALL {
        let same = |other: &&Family| {
            other.architecture() == family.architecture()
                || other.model_type() == family.model_type()
        };
        assert_eq!(Family::ALL.iter().filter(same).count(), 1, "{family:?}");
    }
}

#[test]
fn a_few_numbers_do_not_make_a_list_of_millions_of_tensors() {
    let sizes = r#""moe_intermediate_size": 8, "num_experts_per_tok": 2"#;
    let moe = |layers: u32, experts: u32| {
        read(
            Family::Qwen3Moe,
            &format!(r#"{sizes}, "num_hidden_layers": {layers}, "num_experts": {experts}"#),
        )
    };
    let widest = moe(61, 384).expect("as wide as the widest that is published");
    assert_eq!(widest.tensor_count(), widest.tensors(LayerRange::new(0, 61)).len() as u64);
    let refusal = moe(1024, 2048).unwrap_err().to_string();
    assert!(
        refusal.contains("num_hidden_layers") && refusal.contains("1024, which makes 63"),
        "{refusal}"
    );
    for family in [Family::Llama, Family::Gemma2, Family::Phi3, Family::Cohere] {
        let spec = spec(family, "");
        let all = spec.tensors(LayerRange::new(0, spec.layers)).len() as u64;
        let shared = u64::from(spec.tied_embeddings);
        assert_eq!(spec.tensor_count(), all + shared, "{:?}", spec.family);
    }
}

#[test]
fn a_flat_rotation_of_gemma_3_is_refused_and_not_taken_for_the_default() {
    let flat = r#""rope_parameters": {"rope_type": "linear", "factor": 8, "rope_theta": 1e6}"#;
    let refusal = read(Family::Gemma3, flat).unwrap_err().to_string();
    assert!(refusal.contains("rope_parameters") && refusal.contains("full_attention"), "{refusal}");
    let both = r#""rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8,
                  "rope_theta": 5e5}, "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}"#;
    let spec = spec(Family::Gemma3, both);
    assert_eq!((spec.rope_theta, spec.options.local_rope.map(|rope| rope.0)), (5e5, Some(2e4)));
}
