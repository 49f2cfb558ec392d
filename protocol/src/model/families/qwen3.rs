//! Qwen3: Llama with norms over the heads of queries and keys.

use crate::model::config::{Common, full_attention_only};
use crate::model::families::Definition;
use crate::model::fields::Fields;
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::LLAMA;

/// `head_dim` where the file does not say; transformers' default.
pub(super) const HEAD_DIM: u32 = 128;

pub(super) const DEFINITION: Definition =
    Definition { architecture: "Qwen3ForCausalLM", model_type: "qwen3", names: LLAMA, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let common =
        Common { kv_optional: false, head_dim: Some(HEAD_DIM), ..Common::of(Family::Qwen3) };
    let mut spec = common.read(config)?;
    full_attention_only(config)?;
    spec.qkv_bias = config.flag("attention_bias", false)?;
    spec.o_bias = spec.qkv_bias;
    spec.qk_norm = true;
    Ok(spec)
}
