//! `config.json` → [`ModelSpec`].
//!
//! Read as transformers 4 and 5 write it: `torch_dtype` or `dtype`, `rope_scaling` and `rope_theta`
//! or `rope_parameters`. What is absent gets the default that transformers gives it for that
//! architecture, and only where that default is part of the published format; sizes have none.
//! Whatever would change the arithmetic and is not implemented is refused by name.
//!
//! What all families have is read here; a family's own file under `families/` says how it differs.

use serde_json::Value;

use crate::model::families::Definition;
use crate::model::fields::{Fields, bad, kind, list, short, unsupported};
use crate::model::options::{Activation, LayerOptions, Options};
use crate::model::rope::{self, Rope};
use crate::model::scheme::Scheme;
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::plan::Precision;

/// More layers than any published model.
pub(in crate::model) const LAYERS_MAX: u64 = 1 << 10;
/// Tensors of all layers: three times those of the widest published mixture (61 layers of 384 experts). A
/// list of them is made before the first is looked up, so a kilobyte of JSON must not mean gigabytes.
const TENSORS_MAX: u64 = 1 << 18;
/// Width of the residual stream; 8 times that of the widest published dense model.
pub(super) const HIDDEN_MAX: u64 = 1 << 17;
/// Attention heads.
pub(super) const HEADS_MAX: u64 = 1 << 10;
/// Width of one head.
pub(super) const HEAD_DIM_MAX: u64 = 1 << 10;
/// Width of the MLP.
pub(super) const INTERMEDIATE_MAX: u64 = 1 << 20;
/// Tokens in the vocabulary.
pub(super) const VOCAB_MAX: u64 = 1 << 22;
/// Tokens of context.
pub(super) const CONTEXT_MAX: u64 = 1 << 24;

impl ModelSpec {
    /// Reads and checks a `config.json`.
    pub fn from_config_json(text: &str) -> Result<ModelSpec, SpecError> {
        let root: Value = serde_json::from_str(text)
            .map_err(|error| SpecError::NotJson { reason: error.to_string() })?;
        let Value::Object(root) = root else {
            return Err(SpecError::NotJson { reason: format!("it holds {}", kind(&root)) });
        };
        let config = Fields(&root);
        let definition = family(config)?;
        refuse_unsupported(config)?;
        let spec = (definition.read)(config)?;
        let tensors = spec.tensor_count();
        if tensors > TENSORS_MAX {
            return Err(SpecError::BadValue {
                field: "num_hidden_layers",
                value: format!("{}, which makes {tensors} tensors", spec.layers),
                expected: format!(
                    "layers, experts and heads that make at most {TENSORS_MAX} tensors"
                ),
            });
        }
        Ok(spec)
    }
}

fn family(config: Fields<'_>) -> Result<&'static Definition, SpecError> {
    let names = || list(Family::ALL.iter().map(|family| family.architecture()));
    let expected = || format!("a list of one architecture out of {}", names());
    let found = config
        .get("architectures")
        .ok_or_else(|| SpecError::Missing { field: "architectures", expected: expected() })?;
    let name = match found.as_array().map(Vec::as_slice) {
        Some([Value::String(name)]) => name,
        _ => return Err(bad("architectures", found, expected())),
    };
    let family = Family::ALL
        .iter()
        .copied()
        .find(|family| family.architecture() == name)
        .ok_or_else(|| unsupported("architectures", format!("`{name}`"), names()))?;
    // A look-alike: another model that borrows the name of a known architecture.
    match config.get("model_type") {
        Some(Value::String(kind)) if kind != family.model_type() => Err(SpecError::BadValue {
            field: "model_type",
            value: format!("`{kind}`"),
            expected: format!("`{}`, as `architectures` says {name}", family.model_type()),
        }),
        _ => Ok(family.definition()),
    }
}

/// What no family can do.
fn refuse_unsupported(config: Fields<'_>) -> Result<(), SpecError> {
    if let Some(quantization) = config.get("quantization_config") {
        Scheme::of(quantization)?;
    }
    Ok(())
}

/// What families call the same thing, and what they take where a file does not say.
pub(super) struct Common {
    pub(super) family: Family,
    /// Whether the number of key/value heads may be missing, which means as many as query heads.
    pub(super) kv_optional: bool,
    /// The default of `head_dim`; `None` for `hidden_size / num_attention_heads`.
    pub(super) head_dim: Option<u32>,
    /// The field with what norms add.
    pub(super) eps_field: &'static str,
    pub(super) eps: Option<f32>,
    /// The default rotary base.
    pub(super) theta: f32,
    /// The field that names the MLP's nonlinearity, and the one name that it may have.
    pub(super) activation: (&'static str, &'static str, Activation),
    /// Whether the embedding is the head where the file does not say.
    pub(super) tied: bool,
    /// Whether a part of a head's dimensions may be rotated alone.
    pub(super) partial_rotary: bool,
}

impl Common {
    /// What Llama does.
    pub(super) const fn of(family: Family) -> Self {
        Self {
            family,
            kv_optional: true,
            head_dim: None,
            eps_field: "rms_norm_eps",
            eps: None,
            theta: rope::THETA,
            activation: ("hidden_act", "silu", Activation::Silu),
            tied: false,
            partial_rotary: false,
        }
    }

    /// Reads what all families have. Layers are plain; the caller says what differs.
    pub(super) fn read(&self, config: Fields<'_>) -> Result<ModelSpec, SpecError> {
        let (field, name, activation) = self.activation;
        config.only(field, &Value::String(name.to_owned()))?;
        let hidden = config.size("hidden_size", HIDDEN_MAX)?;
        let heads = config.size("num_attention_heads", HEADS_MAX)?;
        let kv_heads = self.kv_heads(config, heads)?;
        let head_dim = self.head_dim(config, hidden, heads)?;
        let context_max = config.size("max_position_embeddings", CONTEXT_MAX)?;
        let rope = rope::read(config, self.theta, context_max)?;
        let rotary_dim = self.rotary_dim(&rope, head_dim)?;
        rope.check_factors(rotary_dim.unwrap_or(head_dim))?;
        let norm_eps = match (config.get(self.eps_field), self.eps) {
            (None, Some(eps)) => eps,
            _ => config.number(self.eps_field, 1e-30, 1.0)?,
        };
        Ok(ModelSpec {
            family: self.family,
            layers: config.size("num_hidden_layers", LAYERS_MAX)?,
            hidden,
            heads,
            kv_heads,
            head_dim,
            intermediate: config.size("intermediate_size", INTERMEDIATE_MAX)?,
            vocab: config.size("vocab_size", VOCAB_MAX)?,
            context_max,
            norm_eps,
            rope_theta: rope.theta,
            rope_scaling: rope.scaling,
            tied_embeddings: config.flag("tie_word_embeddings", self.tied)?,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            options: Options {
                activation,
                rotary_dim,
                rope_factors: rope.factors,
                ..Options::default()
            },
            stored: stored(config)?,
        })
    }

    fn kv_heads(&self, config: Fields<'_>, heads: u32) -> Result<u32, SpecError> {
        let field = "num_key_value_heads";
        let kv_heads = match config.get(field) {
            // Models older than grouped queries do not have the field.
            None if self.kv_optional => heads,
            _ => config.size(field, HEADS_MAX)?,
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(SpecError::BadValue {
                field,
                value: kv_heads.to_string(),
                expected: format!("a divisor of `num_attention_heads`, which is {heads}"),
            });
        }
        Ok(kv_heads)
    }

    fn head_dim(&self, config: Fields<'_>, hidden: u32, heads: u32) -> Result<u32, SpecError> {
        let head_dim = match (config.get("head_dim"), self.head_dim) {
            (Some(_), _) => config.size("head_dim", HEAD_DIM_MAX)?,
            (None, Some(head_dim)) => head_dim,
            (None, None) if hidden.is_multiple_of(heads) => hidden / heads,
            (None, None) => {
                return Err(SpecError::BadValue {
                    field: "hidden_size",
                    value: hidden.to_string(),
                    expected: format!(
                        "a multiple of `num_attention_heads`, which is {heads}, or a `head_dim`"
                    ),
                });
            }
        };
        if !head_dim.is_multiple_of(2) || u64::from(head_dim) > HEAD_DIM_MAX {
            return Err(SpecError::BadValue {
                field: "head_dim",
                value: format!("{head_dim} (hidden_size {hidden}, num_attention_heads {heads})"),
                expected: format!(
                    "an even number up to {HEAD_DIM_MAX}: rotary embedding turns pairs"
                ),
            });
        }
        Ok(head_dim)
    }

    fn rotary_dim(&self, rope: &Rope, head_dim: u32) -> Result<Option<u32>, SpecError> {
        let field = "partial_rotary_factor";
        let value = rope.partial.to_string();
        if rope.partial == 1.0 {
            return Ok(None);
        }
        if !self.partial_rotary {
            return Err(unsupported(field, value, "1"));
        }
        let dim = (f64::from(head_dim) * rope.partial) as u32;
        if dim == 0 || dim > head_dim || !dim.is_multiple_of(2) {
            let expected = format!("an even number of the {head_dim} dimensions of a head");
            return Err(SpecError::BadValue { field, value, expected });
        }
        Ok(Some(dim))
    }
}

/// Refuses layers that see less than everything, for families whose published models do not.
pub(super) fn full_attention_only(config: Fields<'_>) -> Result<(), SpecError> {
    if let Some(types) = config.get("layer_types") {
        let types = types
            .as_array()
            .ok_or_else(|| bad("layer_types", types, "a list of names, one a layer"))?;
        if let Some(other) = types.iter().find(|t| t.as_str() != Some("full_attention")) {
            return Err(unsupported(
                "layer_types",
                format!("a list with {}", short(other)),
                "`full_attention`",
            ));
        }
    }
    if config.flag("use_sliding_window", false)? {
        return Err(unsupported("use_sliding_window", "true", "false (full attention)"));
    }
    Ok(())
}

/// Which layers see a window alone: as `layer_types` says, else as `default` does.
pub(super) fn windowed_layers(
    config: Fields<'_>,
    layers: u32,
    default: impl Fn(u32) -> bool,
) -> Result<Vec<bool>, SpecError> {
    let read = |value: &Value| match value.as_str() {
        Some("sliding_attention") => Some(true),
        Some("full_attention") => Some(false),
        _ => None,
    };
    let expected = "`sliding_attention` or `full_attention`, one a layer";
    let listed = config.list("layer_types", layers as usize, expected, read)?;
    Ok(listed.unwrap_or_else(|| (0..layers).map(default).collect()))
}

/// The window of a model: `null` for none, `default` where the file does not say.
pub(super) fn window(config: Fields<'_>, default: Option<u32>) -> Result<Option<u32>, SpecError> {
    let field = "sliding_window";
    if config.is_null(field) {
        return Ok(None);
    }
    Ok(config.maybe_size(field, CONTEXT_MAX)?.or(default))
}

/// The layers' windows: `size` where `is_windowed` says so. Empty where there is none.
pub(super) fn windowed(
    layers: u32,
    size: Option<u32>,
    is_windowed: impl Fn(u32) -> bool,
) -> Vec<LayerOptions> {
    if size.is_none() && !(0..layers).any(&is_windowed) {
        return Vec::new();
    }
    let window = |layer| size.filter(|_| is_windowed(layer));
    (0..layers).map(|layer| LayerOptions { window: window(layer), ..LayerOptions::PLAIN }).collect()
}

pub(super) fn stored(config: Fields<'_>) -> Result<Precision, SpecError> {
    let (field, value) = match (config.get("dtype"), config.get("torch_dtype")) {
        (Some(value), _) => ("dtype", value),
        (None, Some(value)) => ("torch_dtype", value),
        // Torch's default type; the files have the last word.
        (None, None) => return Ok(Precision::F32),
    };
    let name = value.as_str().ok_or_else(|| bad(field, value, "the name of a type"))?;
    match name.strip_prefix("torch.").unwrap_or(name) {
        "float32" => Ok(Precision::F32),
        "bfloat16" => Ok(Precision::Bf16),
        "float16" => Ok(Precision::F16),
        other => Err(unsupported(field, format!("`{other}`"), "`float32`, `bfloat16`, `float16`")),
    }
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
