//! Granite 3: Llama with multipliers of embedding, scores, residuals and logits.

use crate::model::config::{Common, full_attention_only};
use crate::model::families::Definition;
use crate::model::fields::Fields;
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::LLAMA;

pub(super) const DEFINITION: Definition =
    Definition { architecture: "GraniteForCausalLM", model_type: "granite", names: LLAMA, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let mut spec = Common::of(Family::Granite).read(config)?;
    full_attention_only(config)?;
    spec.qkv_bias = config.flag("attention_bias", false)?;
    spec.o_bias = spec.qkv_bias;
    spec.mlp_bias = config.flag("mlp_bias", false)?;
    let multiplier = |field| Ok(config.maybe_number(field, 1e-9, 1e9)?.unwrap_or(1.0));
    spec.options.embedding_multiplier = multiplier("embedding_multiplier")?;
    spec.options.residual_multiplier = multiplier("residual_multiplier")?;
    spec.options.attention_scale = Some(multiplier("attention_multiplier")?);
    spec.options.logit_multiplier = 1.0 / multiplier("logits_scaling")?;
    Ok(spec)
}
