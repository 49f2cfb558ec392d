//! Llama 2, 3 and 3.x.

use crate::model::config::{Common, full_attention_only};
use crate::model::families::Definition;
use crate::model::fields::Fields;
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::LLAMA;

pub(super) const DEFINITION: Definition =
    Definition { architecture: "LlamaForCausalLM", model_type: "llama", names: LLAMA, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let mut spec = Common::of(Family::Llama).read(config)?;
    full_attention_only(config)?;
    spec.qkv_bias = config.flag("attention_bias", false)?;
    spec.o_bias = spec.qkv_bias;
    spec.mlp_bias = config.flag("mlp_bias", false)?;
    Ok(spec)
}
