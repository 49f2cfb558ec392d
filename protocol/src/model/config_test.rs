use super::*;
use crate::model::spec::RopeScaling;

/// A small Llama whose fields `changes` replaces; `null` removes one.
fn config(changes: &str) -> String {
    let mut root = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 40,
        "intermediate_size": 77, "num_attention_heads": 5, "num_key_value_heads": 1,
        "num_hidden_layers": 3, "vocab_size": 389, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "torch_dtype": "float32"
    });
    let changes: Value = serde_json::from_str(&format!("{{{changes}}}")).expect("test JSON");
    for (key, value) in changes.as_object().expect("an object") {
        root[key] = value.clone();
    }
    root.to_string()
}

const QWEN2: &str = r#""architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2""#;
const QWEN3: &str = r#""architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3""#;

fn llama() -> ModelSpec {
    ModelSpec {
        family: Family::Llama,
        layers: 3,
        hidden: 40,
        heads: 5,
        kv_heads: 1,
        head_dim: 8,
        intermediate: 77,
        vocab: 389,
        context_max: 512,
        norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        tied_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        options: Options::default(),
        stored: Precision::F32,
    }
}

#[test]
fn both_spellings_of_every_family_are_read() {
    let check = |changes: &str, expected: ModelSpec| {
        assert_eq!(ModelSpec::from_config_json(&config(changes)), Ok(expected), "{changes}");
    };
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 64,
    };
    let llama3_fields = r#""factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4,
                           "original_max_position_embeddings": 64"#;
    check("", llama());
    check(r#""num_key_value_heads": null"#, ModelSpec { kv_heads: 5, ..llama() });
    check(r#""head_dim": 12"#, ModelSpec { head_dim: 12, ..llama() });
    check(
        r#""attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true"#,
        ModelSpec {
            qkv_bias: true,
            o_bias: true,
            mlp_bias: true,
            tied_embeddings: true,
            ..llama()
        },
    );
    check(
        r#""torch_dtype": null, "dtype": "bfloat16""#,
        ModelSpec { stored: Precision::Bf16, ..llama() },
    );
    check(
        &format!(
            r#""rope_theta": 500000.0, "rope_scaling": {{"rope_type": "llama3", {llama3_fields}}}"#
        ),
        ModelSpec { rope_theta: 500_000.0, rope_scaling: llama3, ..llama() },
    );
    check(
        &format!(
            r#""rope_parameters":
               {{"rope_theta": 500000, "rope_type": "llama3", {llama3_fields}}}"#
        ),
        ModelSpec { rope_theta: 500_000.0, rope_scaling: llama3, ..llama() },
    );
    check(
        r#""rope_scaling": {"type": "linear", "factor": 4}"#,
        ModelSpec { rope_scaling: RopeScaling::Linear { factor: 4.0 }, ..llama() },
    );
    check(
        r#""rope_parameters": {"rope_theta": 100.0}"#,
        ModelSpec { rope_theta: 100.0, ..llama() },
    );
    check(
        &format!(r#"{QWEN2}, "sliding_window": 32, "use_sliding_window": false"#),
        ModelSpec { family: Family::Qwen2, qkv_bias: true, ..llama() },
    );
    check(QWEN3, ModelSpec { family: Family::Qwen3, qk_norm: true, head_dim: 128, ..llama() });
    check(
        &format!(
            r#"{QWEN3}, "head_dim": 8, "attention_bias": true,
               "layer_types": ["full_attention", "full_attention", "full_attention"]"#
        ),
        ModelSpec { family: Family::Qwen3, qk_norm: true, qkv_bias: true, o_bias: true, ..llama() },
    );
}

#[test]
fn what_cannot_be_right_is_refused_with_field_value_and_expectation() {
    let all = list(Family::ALL.iter().map(|family| family.architecture()));
    for (changes, message) in [
        (
            r#""hidden_size": 0"#,
            "config.json: `hidden_size` is 0; expected a whole number from 1 to 131072",
        ),
        (
            r#""hidden_size": null"#,
            "config.json: `hidden_size` is missing; expected a whole number from 1 to 131072",
        ),
        (
            r#""vocab_size": 99999999999"#,
            "config.json: `vocab_size` is 99999999999; expected a whole number from 1 to 4194304",
        ),
        (
            r#""num_hidden_layers": "3""#,
            "config.json: `num_hidden_layers` is `3`; expected a whole number from 1 to 1024",
        ),
        (
            r#""num_hidden_layers": 2.5"#,
            "config.json: `num_hidden_layers` is 2.5; expected a whole number from 1 to 1024",
        ),
        (
            r#""num_key_value_heads": 2"#,
            "config.json: `num_key_value_heads` is 2; \
             expected a divisor of `num_attention_heads`, which is 5",
        ),
        (
            r#""num_attention_heads": 3, "num_key_value_heads": 3"#,
            "config.json: `hidden_size` is 40; \
             expected a multiple of `num_attention_heads`, which is 3, or a `head_dim`",
        ),
        (
            r#""head_dim": 7"#,
            "config.json: `head_dim` is 7 (hidden_size 40, num_attention_heads 5); \
             expected an even number up to 1024: rotary embedding turns pairs",
        ),
        (
            r#""rms_norm_eps": 0"#,
            "config.json: `rms_norm_eps` is 0; \
             expected a number from 1e-30 to 1.0",
        ),
        (
            r#""tie_word_embeddings": 1"#,
            "config.json: `tie_word_embeddings` is 1; expected true or false",
        ),
        (
            r#""rope_theta": -1"#,
            "config.json: `rope_theta` is -1; expected a number over 1 and up to 1e15",
        ),
        (
            r#""rope_theta": 5, "rope_parameters": {"rope_theta": 6}"#,
            "config.json: `rope_theta` is 5; \
             expected the same as `rope_theta` in `rope_parameters`, which is 6",
        ),
        (
            r#""rope_scaling": {"factor": 2}"#,
            "config.json: `rope_type` is missing; \
             expected it in `rope_scaling`: one of default, linear, llama3, yarn, longrope",
        ),
        (
            r#""rope_scaling": {"rope_type": "linear", "factor": 0}"#,
            "config.json: `factor` is 0; expected a number from 1.0 to 1000000.0",
        ),
        (
            r#""rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
               "high_freq_factor": 4, "original_max_position_embeddings": 64}"#,
            "config.json: `high_freq_factor` is 4; expected more than `low_freq_factor`, which is 4",
        ),
        (
            r#""model_type": "mistral""#,
            "config.json: `model_type` is `mistral`; \
             expected `llama`, as `architectures` says LlamaForCausalLM",
        ),
        (
            r#""architectures": []"#,
            "config.json: `architectures` is []; expected a list of one architecture out of \
             ARCHITECTURES",
        ),
    ] {
        let error = ModelSpec::from_config_json(&config(changes)).expect_err(changes);
        assert_eq!(error.to_string(), message.replace("ARCHITECTURES", &all), "{changes}");
        assert!(!matches!(error, SpecError::Unsupported { .. }), "{changes}");
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name_with_what_is() {
    let all = list(Family::ALL.iter().map(|family| family.architecture()));
    for (changes, message) in [
        (
            r#""architectures": ["MambaForCausalLM"]"#,
            "config.json: `architectures` is `MambaForCausalLM`, which is not supported; \
             supported: ARCHITECTURES",
        ),
        (
            r#""rope_scaling": {"rope_type": "dynamic", "factor": 4.0}"#,
            "config.json: `rope_type` is `dynamic`, which is not supported; \
             supported: `default`, `linear`, `llama3`, `yarn`, `longrope`",
        ),
        (
            r#""hidden_act": "gelu""#,
            "config.json: `hidden_act` is `gelu`, which is not supported; supported: `silu`",
        ),
        (
            r#""quantization_config": {"quant_method": "gptq", "bits": 3}"#,
            "config.json: `quantization_config` is `gptq` with bits 3, which is not supported; \
             supported: `fp8` (e4m3), `compressed-tensors` with float-quantized weights of 8 bits, \
             `gptq` and `awq` (gemm) with 4 bits, `mxfp4` as GPT-OSS has it; or weights stored as f32, \
             bf16 or f16 without `quantization_config`",
        ),
        (
            r#""torch_dtype": "float64""#,
            "config.json: `torch_dtype` is `float64`, which is not supported; \
             supported: `float32`, `bfloat16`, `float16`",
        ),
        (
            r#""layer_types": ["full_attention", "sliding_attention"]"#,
            "config.json: `layer_types` is a list with `sliding_attention`, which is not \
             supported; supported: `full_attention`",
        ),
        (
            r#""partial_rotary_factor": 0.5"#,
            "config.json: `partial_rotary_factor` is 0.5, which is not supported; supported: 1",
        ),
    ] {
        let error = ModelSpec::from_config_json(&config(changes)).expect_err(changes);
        assert_eq!(error.to_string(), message.replace("ARCHITECTURES", &all), "{changes}");
    }
    for family in [QWEN2, QWEN3] {
        let changes = format!(r#"{family}, "use_sliding_window": true"#);
        let error = ModelSpec::from_config_json(&config(&changes)).expect_err("a window");
        assert_eq!(
            error.to_string(),
            "config.json: `use_sliding_window` is true, which is not supported; \
             supported: false (full attention)"
        );
    }
}

#[test]
fn what_is_no_json_object_is_refused() {
    for text in ["", "{", "[]", "3", "{\"a\": NaN}", &"[".repeat(100_000)] {
        let error = ModelSpec::from_config_json(text).expect_err("no object");
        assert!(matches!(error, SpecError::NotJson { .. }), "{error}");
    }
}

#[test]
fn a_mutated_config_never_panics() {
    let text = config(
        r#""rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 64}"#,
    );
    let mut state = 1u64;
    for _ in 0..4000 {
        let mut bytes = text.clone().into_bytes();
        for _ in 0..3 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let at = (state >> 33) as usize % bytes.len();
            bytes[at] = b"0123456789-.eE\",:{}[]ntf "[(state >> 20) as usize % 25];
        }
        if let Ok(spec) = ModelSpec::from_config_json(&String::from_utf8_lossy(&bytes)) {
            assert!(spec.heads % spec.kv_heads == 0 && spec.head_dim % 2 == 0);
        }
    }
}
