//! Qwen3-MoE: Qwen3 with experts.

use crate::model::config::{Common, full_attention_only};
use crate::model::families::Definition;
use crate::model::families::experts::{EXPERTS, Experts, expert_width, qwen_layers, set_experts};
use crate::model::families::qwen3::HEAD_DIM;
use crate::model::fields::Fields;
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::{
    ATTENTION_END, EMBEDDING, HEAD, INPUT_NORM, MLP, MLP_NORM, QUERY_KEY_VALUE, Row,
};

pub(super) const DEFINITION: Definition =
    Definition { architecture: "Qwen3MoeForCausalLM", model_type: "qwen3_moe", names: NAMES, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let common =
        Common { kv_optional: false, head_dim: Some(HEAD_DIM), ..Common::of(Family::Qwen3Moe) };
    let mut spec = common.read(config)?;
    full_attention_only(config)?;
    spec.qkv_bias = config.flag("attention_bias", false)?;
    spec.o_bias = spec.qkv_bias;
    spec.qk_norm = true;
    let moe = Experts::QWEN.read(config, expert_width(config)?)?;
    set_experts(&mut spec, moe, qwen_layers(config)?);
    Ok(spec)
}

const NAMES: &[&[Row]] =
    &[EMBEDDING, INPUT_NORM, QUERY_KEY_VALUE, ATTENTION_END, MLP_NORM, MLP, EXPERTS, HEAD];
