//! Gemma 2: norms around attention and MLP, capped scores and logits, every other layer sees a window.

use crate::model::config::{Common, window, windowed, windowed_layers};
use crate::model::families::Definition;
use crate::model::fields::{Fields, unsupported};
use crate::model::options::{Activation, NormKind, Placement};
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::{
    ATTENTION_END, EMBEDDING, HEAD, INPUT_NORM, MLP, POST_ATTENTION_NORM, POST_MLP_NORM,
    PRE_MLP_NORM, QUERY_KEY_VALUE, Row,
};

/// `head_dim` and `query_pre_attn_scalar` where the file does not say; transformers' default.
const HEAD_DIM: u32 = 256;
/// `sliding_window` where the file does not say; `null` means none.
pub(super) const WINDOW: u32 = 4096;

pub(super) const DEFINITION: Definition =
    Definition { architecture: "Gemma2ForCausalLM", model_type: "gemma2", names: NAMES, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let mut spec = read_gemma(config, Family::Gemma2)?;
    let types = windowed_layers(config, spec.layers, |layer| layer.is_multiple_of(2))?;
    let size = window(config, Some(WINDOW))?;
    spec.options.layers = windowed(spec.layers, size, |layer| types[layer as usize]);
    spec.options.attention_softcap = cap(config, "attn_logit_softcapping", Some(50.0))?;
    spec.options.logit_softcap = cap(config, "final_logit_softcapping", Some(30.0))?;
    Ok(spec)
}

/// Gemma's table: four norms a layer.
pub(super) const NAMES: &[&[Row]] = &[
    EMBEDDING,
    INPUT_NORM,
    QUERY_KEY_VALUE,
    ATTENTION_END,
    POST_ATTENTION_NORM,
    PRE_MLP_NORM,
    MLP,
    POST_MLP_NORM,
    HEAD,
];

/// What Gemma 2 and 3 share.
pub(super) fn read_gemma(config: Fields<'_>, family: Family) -> Result<ModelSpec, SpecError> {
    let common = Common {
        kv_optional: false,
        head_dim: Some(HEAD_DIM),
        eps: Some(1e-6),
        activation: ("hidden_activation", "gelu_pytorch_tanh", Activation::GeluTanh),
        tied: true,
        ..Common::of(family)
    };
    let mut spec = common.read(config)?;
    if config.flag("use_bidirectional_attention", false)? {
        return Err(unsupported("use_bidirectional_attention", "true", "false"));
    }
    spec.qkv_bias = config.flag("attention_bias", false)?;
    spec.o_bias = spec.qkv_bias;
    let scalar = config.maybe_number("query_pre_attn_scalar", 1e-6, 1e6)?.unwrap_or(256.0);
    let options = &mut spec.options;
    options.norm = NormKind::RmsOnePlus;
    options.placement = Placement::Both;
    options.attention_scale = Some((1.0 / f64::from(scalar).sqrt()) as f32);
    options.embedding_multiplier = f64::from(spec.hidden).sqrt() as f32;
    Ok(spec)
}

/// A cap; `null` for none, `default` where the file does not say.
pub(super) fn cap(
    config: Fields<'_>,
    field: &'static str,
    default: Option<f32>,
) -> Result<Option<f32>, SpecError> {
    if config.is_null(field) {
        return Ok(None);
    }
    Ok(config.maybe_number(field, 1e-3, 1e6)?.or(default))
}
