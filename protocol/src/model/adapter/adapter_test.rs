use std::fs;

use super::*;
use crate::mesh::Reduction;
use crate::model::split::Split;

const BASE: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "head_dim": 8,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 50, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "torch_dtype": "float32"
}"#;

const PLAIN: &str = r#"{"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": 4,
    "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_dora": false,
    "modules_to_save": null, "rank_pattern": {}, "alpha_pattern": {}}"#;

fn base() -> ModelSpec {
    ModelSpec::from_config_json(BASE).expect("a valid config")
}

/// Name, shape.
type Entry = (String, Vec<u64>);

/// The two matrices of a module.
fn pair(module: &str, inputs: u64, outputs: u64, rank: u64) -> [Entry; 2] {
    let name = |end: &str| format!("base_model.model.model.layers.{module}.{end}.weight");
    [(name("lora_A"), vec![rank, inputs]), (name("lora_B"), vec![outputs, rank])]
}

fn entries() -> Vec<Entry> {
    let of = |layer: u32| {
        let query = pair(&format!("{layer}.self_attn.q_proj"), 32, 32, 4);
        query.into_iter().chain(pair(&format!("{layer}.mlp.down_proj"), 48, 32, 4))
    };
    (0..2).flat_map(of).collect()
}

fn write(folder: &Path, config: &str, entries: &[Entry]) {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in entries {
        let start = end;
        end += shape.iter().product::<u64>() * 2;
        let info = serde_json::json!(
            {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), info);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + end as usize, 7);
    fs::write(folder.join("adapter_config.json"), config).expect("written");
    fs::write(folder.join("adapter_model.safetensors"), bytes).expect("written");
}

fn open(config: &str, entries: &[Entry]) -> Result<Adapter, AdapterError> {
    let folder = tempfile::tempdir().expect("a folder");
    write(folder.path(), config, entries);
    Adapter::open(folder.path(), &base())
}

fn refusal(config: &str, entries: &[Entry]) -> String {
    open(config, entries).expect_err("it is refused").to_string()
}

#[test]
fn an_adapter_says_what_it_changes_and_by_how_much() {
    let adapter = open(PLAIN, &entries()).expect("an adapter");
    let found: Vec<_> =
        adapter.deltas().iter().map(|d| (d.layer, d.role, d.rank, d.scaling)).collect();
    use TensorRole::{Down, Query};
    assert_eq!(
        found,
        [(0, Query, 4, 1.5), (0, Down, 4, 1.5), (1, Query, 4, 1.5), (1, Down, 4, 1.5)]
    );
    assert_eq!(adapter.rank_max(), 4);
    assert_eq!(adapter.fingerprint(), open(PLAIN, &entries()).expect("the same").fingerprint());
    let other = PLAIN.replace("\"lora_alpha\": 6", "\"lora_alpha\": 7");
    assert_ne!(adapter.fingerprint(), open(&other, &entries()).expect("another").fingerprint());
}

#[test]
fn patterns_and_the_stabilised_scaling_count() {
    let mut entries: Vec<Entry> = pair("0.self_attn.q_proj", 32, 32, 4).to_vec();
    entries.extend(pair("1.self_attn.q_proj", 32, 32, 9));
    entries.extend(pair("1.mlp.down_proj", 48, 32, 16));
    let config = PLAIN
        .replace(
            r#""rank_pattern": {}"#,
            r#""rank_pattern": {"layers.1.self_attn.q_proj": 9, "down_proj": 16}"#,
        )
        .replace(
            r#""alpha_pattern": {}"#,
            r#""alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2}"#,
        );
    let scalings = |config: &str| -> Vec<f32> {
        open(config, &entries).expect("an adapter").deltas().iter().map(|d| d.scaling).collect()
    };
    let third = (6.0_f64 / 9.0) as f32;
    assert_eq!(scalings(&config), [0.5, third, 0.375]);
    let stabilised = config.replace("\"r\": 4", "\"r\": 4, \"use_rslora\": true");
    assert_eq!(scalings(&stabilised), [1.0, 2.0, 1.5]);
}

#[test]
fn what_is_not_served_is_refused_by_name() {
    let with = |from: &str, to: &str| PLAIN.replace(from, to);
    for (config, expected) in [
        (with("\"LORA\"", "\"IA3\""), "`peft_type` is \"IA3\", which is not supported"),
        (with("\"CAUSAL_LM\"", "\"SEQ_CLS\""), "`task_type` is \"SEQ_CLS\""),
        (with("\"none\"", "\"all\""), "`bias` is \"all\""),
        (with("\"use_dora\": false", "\"use_dora\": true"), "`use_dora` is true"),
        (
            with("\"modules_to_save\": null", "\"modules_to_save\": [\"lm_head\"]"),
            "`modules_to_save`",
        ),
        (
            with("\"r\": 4", "\"r\": 4, \"trainable_token_indices\": [1]"),
            "`trainable_token_indices`",
        ),
        (
            with("\"r\": 4", "\"r\": 4, \"init_lora_weights\": \"pissa_niter_4\""),
            "`init_lora_weights`",
        ),
        (
            with("\"rank_pattern\": {}", "\"rank_pattern\": {\"q.*|k\": 2}"),
            "`rank_pattern` is q.*|k",
        ),
        (with("\"r\": 4", "\"r\": 0"), "`r` is 0; expected a rank of 1 to 512"),
        (with("\"r\": 4", "\"r\": 513"), "`r` is 513"),
        (
            with("\"lora_alpha\": 6", "\"lora_alpha\": \"x\""),
            "`lora_alpha` is \"x\"; expected a number",
        ),
        (with("[\"q_proj\", \"down_proj\"]", "7"), "`target_modules` is 7"),
        ("[]".to_owned(), "adapter_config.json is not readable"),
    ] {
        let found = refusal(&config, &entries());
        assert!(found.contains(expected), "{found}");
    }
    // What merges, or nothing here, depends on.
    let harmless = with("\"r\": 4", "\"r\": 4, \"fan_in_fan_out\": true, \"lora_dropout\": 0.1");
    assert!(open(&harmless, &entries()).is_ok());
}

#[test]
fn an_adapter_for_another_base_is_refused_with_the_tensor_and_both_shapes() {
    let with = |extra: [Entry; 2]| entries().into_iter().chain(extra).collect::<Vec<_>>();
    let mut wider = entries();
    wider[0].1 = vec![4, 64];
    let mut higher = entries();
    higher[1].1 = vec![32, 5];
    let lone: Vec<Entry> = entries().into_iter().skip(1).collect();
    for (entries, expected) in [
        (
            wider,
            "q_proj.lora_A.weight` has shape [4, 64], but beside this base model it should be [4, 32]",
        ),
        (
            higher,
            "q_proj.lora_B.weight` has shape [32, 5], but beside this base model it should be [32, 4]",
        ),
        (
            with(pair("7.self_attn.q_proj", 32, 32, 4)),
            "the base model of 2 layers has no `model.layers.7",
        ),
        (
            with(pair("0.input_layernorm", 32, 32, 4)),
            "`model.layers.0.input_layernorm` cannot have an adapter",
        ),
        (
            lone,
            "tensor `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` is missing",
        ),
        (Vec::new(), "every low-rank matrix is missing"),
        (pair("0.self_attn.q_proj", 32, 32, 4).to_vec(), "target module `down_proj` is missing"),
        (
            vec![("base_model.model.lm_head.weight".to_owned(), vec![50, 32])],
            "expected names that end with",
        ),
    ] {
        let found = refusal(PLAIN, &entries);
        assert!(found.contains(expected), "{found}");
    }
    let empty = tempfile::tempdir().expect("a folder");
    let found = Adapter::open(empty.path(), &base()).expect_err("nothing there").to_string();
    assert!(found.contains("no adapter: expected adapter_config.json"), "{found}");
}

#[test]
fn a_rank_holds_what_its_part_of_the_projection_needs() {
    let adapter = open(PLAIN, &entries()).expect("an adapter");
    let base = base();
    let cut = |reduction| -> Vec<_> {
        let part =
            base.part(Split { rank: 1, ranks: 2 }, reduction, base.stored).expect("two ranks");
        let parts = adapter.parts(&base, &part, LayerRange::new(1, 2));
        parts.map(|part| (part.inputs, part.outputs)).collect()
    };
    assert_eq!(cut(Reduction::Exact), [(0..32, 16..32), (0..48, 16..32)]);
    assert_eq!(cut(Reduction::Sum), [(0..32, 16..32), (16..48, 0..32)]);
    let whole = base.part(Split::WHOLE, Reduction::Exact, base.stored).expect("one rank");
    // A: 4 rows are a panel of 16; B: 4 columns of two bytes.
    let bytes = adapter.held_bytes(&base, &whole, LayerRange::new(0, 1));
    assert_eq!(bytes.0, 16 * 32 * 2 + 32 * 4 * 2 + 16 * 48 * 2 + 32 * 4 * 2);
}

#[test]
fn a_fused_projection_gives_each_of_its_parts_the_same_a_and_its_rows_of_b() {
    let config = r#"{"architectures": ["Phi3ForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 50,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
        "original_max_position_embeddings": 64, "rope_theta": 10000.0}"#;
    let base = ModelSpec::from_config_json(config).expect("a valid config");
    let folder = tempfile::tempdir().expect("a folder");
    let json = PLAIN.replace(r#"["q_proj", "down_proj"]"#, "\"all-linear\"");
    write(folder.path(), &json, &pair("0.self_attn.qkv_proj", 32, 64, 4));
    let adapter = Adapter::open(folder.path(), &base).expect("an adapter");
    let whole = base.part(Split::WHOLE, Reduction::Exact, base.stored).expect("one rank");
    let parts: Vec<_> = adapter
        .parts(&base, &whole, LayerRange::new(0, 1))
        .map(|part| (part.delta.role, part.inputs, part.outputs))
        .collect();
    use TensorRole::{Key, Query, Value};
    assert_eq!(parts, [(Query, 0..32, 0..32), (Key, 0..32, 32..48), (Value, 0..32, 48..64)]);
}
