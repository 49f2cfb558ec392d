//! `config.json` → [`ModelSpec`].
//!
//! Read as transformers 4 and 5 write it: `torch_dtype` or `dtype`, `rope_scaling` and `rope_theta`
//! or `rope_parameters`. What is absent gets the default that transformers gives it for that
//! architecture, and only where that default is part of the published format; sizes have none.
//! Whatever would change the arithmetic and is not implemented is refused by name.

use serde_json::{Map, Value};

use crate::model::scheme::Scheme;
use crate::model::spec::{Family, ModelSpec, RopeScaling, SpecError};
use crate::plan::Precision;

/// More layers than any published model, so that a damaged number is no plan of a million tensors.
const LAYERS_MAX: u64 = 1 << 10;
/// Width of the residual stream; 8 times that of the widest published dense model.
const HIDDEN_MAX: u64 = 1 << 17;
/// Attention heads.
const HEADS_MAX: u64 = 1 << 10;
/// Width of one head.
const HEAD_DIM_MAX: u64 = 1 << 10;
/// Width of the MLP.
const INTERMEDIATE_MAX: u64 = 1 << 20;
/// Tokens in the vocabulary.
const VOCAB_MAX: u64 = 1 << 22;
/// Tokens of context.
const CONTEXT_MAX: u64 = 1 << 24;
/// `head_dim` of Qwen3 where the file does not say; transformers' default.
const QWEN3_HEAD_DIM: u64 = 128;
/// `rope_theta` where the file does not say; transformers' default, and that of Llama 2.
const ROPE_THETA: f32 = 10_000.0;
/// Far beyond any published base, and small enough for f32.
const ROPE_THETA_MAX: f64 = 1e15;

impl ModelSpec {
    /// Reads and checks a `config.json`.
    pub fn from_config_json(text: &str) -> Result<ModelSpec, SpecError> {
        let root: Value = serde_json::from_str(text)
            .map_err(|error| SpecError::NotJson { reason: error.to_string() })?;
        let Value::Object(root) = root else {
            return Err(SpecError::NotJson { reason: format!("it holds {}", kind(&root)) });
        };
        let config = Fields(&root);
        let family = family(config)?;
        refuse_unsupported(config, family)?;

        let hidden = config.size("hidden_size", HIDDEN_MAX)?;
        let heads = config.size("num_attention_heads", HEADS_MAX)?;
        let kv_heads = kv_heads(config, family, heads)?;
        let head_dim = head_dim(config, family, hidden, heads)?;
        let (rope_theta, rope_scaling) = rope(config)?;
        let attention_bias = match family {
            Family::Llama | Family::Qwen3 => config.flag("attention_bias", false)?,
            Family::Qwen2 => false,
        };
        Ok(ModelSpec {
            family,
            layers: config.size("num_hidden_layers", LAYERS_MAX)?,
            hidden,
            heads,
            kv_heads,
            head_dim,
            intermediate: config.size("intermediate_size", INTERMEDIATE_MAX)?,
            vocab: config.size("vocab_size", VOCAB_MAX)?,
            context_max: config.size("max_position_embeddings", CONTEXT_MAX)?,
            norm_eps: config.number("rms_norm_eps", 1e-30, 1.0)?,
            rope_theta,
            rope_scaling,
            tied_embeddings: config.flag("tie_word_embeddings", false)?,
            qkv_bias: attention_bias || family == Family::Qwen2,
            o_bias: attention_bias,
            mlp_bias: family == Family::Llama && config.flag("mlp_bias", false)?,
            qk_norm: family == Family::Qwen3,
            stored: stored(config)?,
        })
    }
}

fn family(config: Fields<'_>) -> Result<Family, SpecError> {
    let names = || list(Family::ALL.iter().map(|family| family.architecture()));
    let expected = || format!("a list of one architecture out of {}", names());
    let found = config
        .get("architectures")
        .ok_or_else(|| SpecError::Missing { field: "architectures", expected: expected() })?;
    let name = match found.as_array().map(Vec::as_slice) {
        Some([Value::String(name)]) => name,
        _ => return Err(bad("architectures", found, expected())),
    };
    let family = Family::ALL.iter().copied().find(|family| family.architecture() == name).ok_or(
        SpecError::Unsupported {
            field: "architectures",
            value: format!("`{name}`"),
            supported: names(),
        },
    )?;
    // A look-alike: another model that borrows the name of a known architecture.
    match config.get("model_type") {
        Some(Value::String(kind)) if kind != family.model_type() => Err(SpecError::BadValue {
            field: "model_type",
            value: format!("`{kind}`"),
            expected: format!("`{}`, as `architectures` says {name}", family.model_type()),
        }),
        _ => Ok(family),
    }
}

fn refuse_unsupported(config: Fields<'_>, family: Family) -> Result<(), SpecError> {
    let unsupported = |field, value: String, supported: &str| {
        Err(SpecError::Unsupported { field, value, supported: supported.to_owned() })
    };
    if let Some(quantization) = config.get("quantization_config") {
        Scheme::of(quantization)?;
    }
    if let Some(act) = config.get("hidden_act")
        && act.as_str() != Some("silu")
    {
        return unsupported("hidden_act", short(act), "`silu`");
    }
    if family != Family::Llama && config.flag("use_sliding_window", false)? {
        return unsupported("use_sliding_window", "true".into(), "false (full attention)");
    }
    if let Some(types) = config.get("layer_types") {
        let types = types
            .as_array()
            .ok_or_else(|| bad("layer_types", types, "a list of names, one a layer"))?;
        if let Some(other) = types.iter().find(|t| t.as_str() != Some("full_attention")) {
            return unsupported(
                "layer_types",
                format!("a list with {}", short(other)),
                "`full_attention`",
            );
        }
    }
    if let Some(factor) = config.get("partial_rotary_factor")
        && factor.as_f64() != Some(1.0)
    {
        return unsupported("partial_rotary_factor", short(factor), "1");
    }
    Ok(())
}

fn kv_heads(config: Fields<'_>, family: Family, heads: u32) -> Result<u32, SpecError> {
    let field = "num_key_value_heads";
    let kv_heads = match config.get(field) {
        // Models older than grouped queries do not have the field.
        None if family == Family::Llama => heads,
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

fn head_dim(config: Fields<'_>, family: Family, hidden: u32, heads: u32) -> Result<u32, SpecError> {
    let head_dim = match config.get("head_dim") {
        Some(_) => config.size("head_dim", HEAD_DIM_MAX)?,
        None if family == Family::Qwen3 => QWEN3_HEAD_DIM as u32,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
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
            expected: format!("an even number up to {HEAD_DIM_MAX}: rotary embedding turns pairs"),
        });
    }
    Ok(head_dim)
}

/// The base and the scaling, from `rope_parameters` (transformers 5) or `rope_scaling` and
/// `rope_theta` (transformers 4).
fn rope(config: Fields<'_>) -> Result<(f32, RopeScaling), SpecError> {
    let outer = config.get("rope_theta");
    let (field, value) = match (config.get("rope_parameters"), config.get("rope_scaling")) {
        (Some(parameters), _) => ("rope_parameters", parameters),
        (None, Some(scaling)) => ("rope_scaling", scaling),
        (None, None) => {
            return Ok((theta(outer)?, RopeScaling::None));
        }
    };
    let Value::Object(map) = value else {
        return Err(bad(field, value, "an object, or null"));
    };
    let rope = Fields(map);
    let inner = rope.get("rope_theta");
    if let (Some(inner), Some(outer)) = (inner, outer)
        && inner.as_f64() != outer.as_f64()
    {
        return Err(bad(
            "rope_theta",
            outer,
            format!("the same as `rope_theta` in `{field}`, which is {}", short(inner)),
        ));
    }
    let theta = theta(inner.or(outer))?;
    if let Some(factor) = rope.get("partial_rotary_factor")
        && factor.as_f64() != Some(1.0)
    {
        return Err(SpecError::Unsupported {
            field: "partial_rotary_factor",
            value: short(factor),
            supported: "1".into(),
        });
    }
    // Before transformers 4.43 the key was `type`.
    let rope_type = match rope.get("rope_type").or_else(|| rope.get("type")) {
        Some(name) => name.as_str().ok_or_else(|| bad("rope_type", name, "a name"))?,
        // With nothing but a base it is the plain kind; anything else is a kind we would guess.
        None if map.keys().all(|key| key == "rope_theta" || key == "partial_rotary_factor") => {
            "default"
        }
        None => {
            return Err(SpecError::Missing {
                field: "rope_type",
                expected: format!("it in `{field}`: one of default, linear, llama3"),
            });
        }
    };
    // Below 1 the context would shrink; above a million a frequency is 0.
    let factor = || rope.number("factor", 1.0, 1e6);
    let scaling = match rope_type {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "llama3" => {
            let low_freq_factor = rope.number("low_freq_factor", 1e-6, 1e6)?;
            let high_freq_factor = rope.number("high_freq_factor", 1e-6, 1e6)?;
            if high_freq_factor <= low_freq_factor {
                return Err(SpecError::BadValue {
                    field: "high_freq_factor",
                    value: high_freq_factor.to_string(),
                    expected: format!("more than `low_freq_factor`, which is {low_freq_factor}"),
                });
            }
            RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor,
                high_freq_factor,
                original_context: rope.size("original_max_position_embeddings", CONTEXT_MAX)?,
            }
        }
        other => {
            return Err(SpecError::Unsupported {
                field: "rope_type",
                value: format!("`{other}`"),
                supported: "`default`, `linear`, `llama3`".into(),
            });
        }
    };
    Ok((theta, scaling))
}

fn stored(config: Fields<'_>) -> Result<Precision, SpecError> {
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
        other => Err(SpecError::Unsupported {
            field,
            value: format!("`{other}`"),
            supported: "`float32`, `bfloat16`, `float16`".into(),
        }),
    }
}

/// The members of a JSON object; `null` counts as absent, as it does in transformers.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn get(self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    /// A whole number from 1 to `max`; there is no default.
    fn size(self, field: &'static str, max: u64) -> Result<u32, SpecError> {
        let expected = || format!("a whole number from 1 to {max}");
        let value =
            self.get(field).ok_or_else(|| SpecError::Missing { field, expected: expected() })?;
        match value.as_u64().filter(|n| (1..=max).contains(n)).map(u32::try_from) {
            Some(Ok(n)) => Ok(n),
            _ => Err(bad(field, value, expected())),
        }
    }

    /// A finite number from `min` to `max`; there is no default.
    fn number(self, field: &'static str, min: f64, max: f64) -> Result<f32, SpecError> {
        let expected = || format!("a number from {min:?} to {max:?}");
        let value =
            self.get(field).ok_or_else(|| SpecError::Missing { field, expected: expected() })?;
        match value.as_f64().filter(|n| (min..=max).contains(n)) {
            Some(number) => Ok(number as f32),
            None => Err(bad(field, value, expected())),
        }
    }

    fn flag(self, field: &'static str, default: bool) -> Result<bool, SpecError> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| bad(field, value, "true or false")),
        }
    }
}

/// The rotary base, out of whichever place gave it.
fn theta(value: Option<&Value>) -> Result<f32, SpecError> {
    let Some(value) = value else { return Ok(ROPE_THETA) };
    match value.as_f64().filter(|n| *n > 1.0 && *n <= ROPE_THETA_MAX) {
        Some(theta) => Ok(theta as f32),
        None => {
            Err(bad("rope_theta", value, format!("a number over 1 and up to {ROPE_THETA_MAX:e}")))
        }
    }
}

fn bad(field: &'static str, value: &Value, expected: impl Into<String>) -> SpecError {
    SpecError::BadValue { field, value: short(value), expected: expected.into() }
}

/// A value as an error shows it: whole where it is small, else what kind of thing it is.
fn short(value: &Value) -> String {
    const SHOWN_MAX: usize = 80;
    match value {
        Value::String(text) if text.len() <= SHOWN_MAX => format!("`{text}`"),
        Value::Object(_) => kind(value).to_owned(),
        other => {
            let text = other.to_string();
            if text.len() <= SHOWN_MAX { text } else { kind(other).to_owned() }
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
