//! Qwen2 and Qwen2.5: Llama with biases on queries, keys and values.

use crate::model::config::{Common, full_attention_only};
use crate::model::families::Definition;
use crate::model::fields::Fields;
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::LLAMA;

pub(super) const DEFINITION: Definition =
    Definition { architecture: "Qwen2ForCausalLM", model_type: "qwen2", names: LLAMA, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let common = Common { kv_optional: false, ..Common::of(Family::Qwen2) };
    let mut spec = common.read(config)?;
    full_attention_only(config)?;
    spec.qkv_bias = true;
    Ok(spec)
}
