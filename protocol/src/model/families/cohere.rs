//! Command R and Aya: attention and MLP side by side behind one norm, rotation of adjacent pairs.

use crate::model::config::{Common, full_attention_only};
use crate::model::families::Definition;
use crate::model::fields::{Fields, unsupported};
use crate::model::options::{NormKind, Placement};
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::{ATTENTION_END, EMBEDDING, HEAD, INPUT_NORM, MLP, QUERY_KEY_VALUE, Row};

pub(super) const DEFINITION: Definition =
    Definition { architecture: "CohereForCausalLM", model_type: "cohere", names: NAMES, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let spec = read_cohere(config, Family::Cohere)?;
    full_attention_only(config)?;
    Ok(spec)
}

/// One norm a layer.
pub(super) const NAMES: &[&[Row]] =
    &[EMBEDDING, INPUT_NORM, QUERY_KEY_VALUE, ATTENTION_END, MLP, HEAD];

/// What both generations share.
pub(super) fn read_cohere(config: Fields<'_>, family: Family) -> Result<ModelSpec, SpecError> {
    let common = Common {
        eps_field: "layer_norm_eps",
        eps: Some(1e-5),
        theta: if matches!(family, Family::Cohere) { 500_000.0 } else { 10_000.0 },
        tied: true,
        ..Common::of(family)
    };
    let mut spec = common.read(config)?;
    if config.flag("use_qk_norm", false)? {
        return Err(unsupported("use_qk_norm", "true", "false"));
    }
    spec.qkv_bias = config.flag("attention_bias", false)?;
    spec.o_bias = spec.qkv_bias;
    spec.options.norm = NormKind::Layer;
    spec.options.placement = Placement::Parallel;
    spec.options.interleaved = true;
    spec.options.logit_multiplier =
        config.maybe_number("logit_scale", 1e-9, 1e9)?.unwrap_or(0.0625);
    Ok(spec)
}
