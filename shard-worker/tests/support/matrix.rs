//! Family x mesh x precision: what is compared with the uncut model, and how near it has to be. `tests/matrix.rs` runs all
//! of it, `tests/models_page.rs` writes it down.

use serde_json::{Value, json};
use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{Family, ModelSpec};
use shoal_protocol::plan::Precision;

use super::{Case, fixtures, stands_for_family};

/// Ranks of each stage, how they come to one result, and what the page calls it.
pub struct Mesh {
    pub name: &'static str,
    pub ranks: &'static [u32],
    pub reduction: Reduction,
}

const fn mesh(name: &'static str, ranks: &'static [u32], reduction: Reduction) -> Mesh {
    Mesh { name, ranks, reduction }
}

/// The columns of the matrix.
pub const MESHES: [Mesh; 8] = [
    mesh("2x1", &[1, 1], Reduction::Exact),
    mesh("1x2 exact", &[2], Reduction::Exact),
    mesh("1x2 sum", &[2], Reduction::Sum),
    mesh("1x3 exact", &[3], Reduction::Exact),
    mesh("2x2 exact", &[2, 2], Reduction::Exact),
    mesh("2x2 sum", &[2, 2], Reduction::Sum),
    mesh("1 rank, then 2, exact", &[1, 2], Reduction::Exact),
    mesh("2 ranks, then 1, sum", &[2, 1], Reduction::Sum),
];

/// The precisions in which a family is compared: all of them for a dense one, and for one with a compressed cache, experts
/// and a shared expert; of the others those that are number by number, and two in blocks.
pub fn precisions(family: Family) -> Vec<Precision> {
    match family {
        Family::Llama | Family::DeepSeek3 => Precision::ALL.to_vec(),
        _ => vec![Precision::F32, Precision::Bf16, Precision::Q8_0, Precision::Q4_0],
    }
}

/// How near a mesh comes to the uncut model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parity {
    /// The same bits.
    Same,
    /// Log-probabilities within `LOGPROB_TOLERANCE` and the same greedy tokens, where rows are not rounded; every run and every
    /// chunking the same bits.
    Close,
    /// It cannot be cut so.
    Refused,
}

impl Mesh {
    /// What is expected of a model that is held so.
    pub fn parity(&self, spec: &ModelSpec, held: Precision) -> Parity {
        let (most, _) = spec.ranks_max_held(self.reduction, held);
        match self.reduction {
            _ if self.ranks.iter().any(|ranks| *ranks > most) => Parity::Refused,
            Reduction::Exact => Parity::Same,
            Reduction::Sum => Parity::Close,
        }
    }

    /// The borders of its stages.
    pub fn cuts(&self, layers: u32) -> Vec<u32> {
        match self.ranks.len() {
            1 => vec![0, layers],
            _ => vec![0, 1, layers],
        }
    }
}

/// The models of the matrix: for each family the config.json of one of two layers, with what its first reference model has
/// beside Llama, so wide that whole blocks of any precision, and heads, are shared by two ranks.
pub fn models(cases: &[Case]) -> Vec<(ModelSpec, String)> {
    let own = cases.iter().filter(|case| stands_for_family(case, cases));
    let of = |case: &Case| {
        let config = wide(&case.name).to_string();
        (ModelSpec::from_config_json(&config).unwrap(), config)
    };
    let mut models: Vec<_> = own.map(of).collect();
    let place = |family| Family::ALL.iter().position(|other| *other == family);
    models.sort_by_key(|(spec, _)| place(spec.family));
    models
}

/// The config.json of a reference model with other sizes.
fn wide(name: &str) -> Value {
    let file = fixtures().join("models").join(name).join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let has_mla = config.get("kv_lora_rank").is_some();
    // Experts are whole on their ranks, so that they may be narrow.
    let of_experts = config.get("num_local_experts").is_some();
    for (key, size) in [
        ("num_hidden_layers", json!(2)),
        ("vocab_size", json!(1307)),
        ("hidden_size", json!(512)),
        ("intermediate_size", json!(if of_experts { 64 } else { 512 })),
        ("num_attention_heads", json!(4)),
        ("num_key_value_heads", json!(if has_mla { 4 } else { 2 })),
        ("head_dim", json!(128)),
        ("moe_intermediate_size", json!(64)),
        ("n_shared_experts", json!(8)),
        ("shared_expert_intermediate_size", json!(512)),
        ("kv_lora_rank", json!(64)),
        ("q_lora_rank", json!(64)),
        ("qk_nope_head_dim", json!(48)),
        ("qk_rope_head_dim", json!(16)),
        ("v_head_dim", json!(128)),
        // Of five layers.
        ("no_rope_layers", json!([1, 0])),
        // Plain weights.
        ("torch_dtype", json!("float32")),
        ("dtype", json!("float32")),
    ] {
        if let Some(known) = config.get_mut(key) {
            *known = size;
        }
    }
    // Its factors are as many as a small head has.
    if config["model_type"] == "phi3" {
        config["rope_scaling"] = Value::Null;
    }
    config
}
