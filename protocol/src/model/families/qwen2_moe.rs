//! Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, one of them shared behind a gate.

use crate::model::config::{Common, INTERMEDIATE_MAX, full_attention_only};
use crate::model::families::Definition;
use crate::model::families::experts::{
    EXPERTS, Experts, SHARED_EXPERT, expert_width, qwen_layers, set_experts,
};
use crate::model::fields::Fields;
use crate::model::moe::Moe;
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::{
    ATTENTION_END, EMBEDDING, HEAD, INPUT_NORM, MLP, MLP_NORM, QUERY_KEY_VALUE, Row,
};

pub(super) const DEFINITION: Definition =
    Definition { architecture: "Qwen2MoeForCausalLM", model_type: "qwen2_moe", names: NAMES, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let mut spec = Common::of(Family::Qwen2Moe).read(config)?;
    full_attention_only(config)?;
    spec.qkv_bias = config.flag("qkv_bias", true)?;
    let moe = Experts::QWEN.read(config, expert_width(config)?)?;
    let shared = config.size("shared_expert_intermediate_size", INTERMEDIATE_MAX)?;
    let layers = qwen_layers(config)?;
    set_experts(&mut spec, Moe { shared: Some(shared), shared_gate: true, ..moe }, layers);
    Ok(spec)
}

const NAMES: &[&[Row]] = &[
    EMBEDDING,
    INPUT_NORM,
    QUERY_KEY_VALUE,
    ATTENTION_END,
    MLP_NORM,
    MLP,
    EXPERTS,
    SHARED_EXPERT,
    HEAD,
];
