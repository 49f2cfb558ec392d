//! What a GGUF file's metadata say of a model, in the words of `config.json`: one place checks both.

use std::f64::consts::TAU;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Map, json};

use super::{Gguf, GgufTensor, Value, type_name};
use crate::model::checkpoint::{CheckpointError, TensorLocation};
use crate::model::spec::{Family, ModelSpec};
use crate::model::stored::{RowOrder, StoredType};
use crate::model::tensors::{TensorRole, TensorSpec};
use crate::units::LayerRange;

/// The families that are read: what the file calls it, and the family.
const ARCHITECTURES: [(&str, Family); 3] =
    [("llama", Family::Llama), ("qwen2", Family::Qwen2), ("qwen3", Family::Qwen3)];

/// The tensor of llama 3's stretched rotation: by how much each frequency is divided.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// What was found in a file.
pub(in crate::model) struct Found {
    pub(in crate::model) spec: ModelSpec,
    /// By the names that [`ModelSpec::tensors`] uses.
    pub(in crate::model) tensors: Vec<(TensorSpec, TensorLocation)>,
    pub(in crate::model) header: Gguf,
}

/// Reads a file's header and finds the model in it.
pub(in crate::model) fn open(path: &Path) -> Result<Found, CheckpointError> {
    let header = Gguf::read(path)?;
    let bad = |reason: String| CheckpointError::Gguf { file: path.to_owned(), reason };
    let family = header.family().map_err(bad)?;
    let rope_factors = header.rope_factors(path)?;
    let config = header.config(family, rope_factors.as_deref()).map_err(bad)?;
    let config = serde_json::Value::Object(config).to_string();
    let spec = ModelSpec::from_config_json(&config)
        .map_err(|error| bad(format!("its metadata, read as config.json, are refused: {error}")))?;
    let mut tensors = Vec::new();
    for wanted in spec.tensors(LayerRange::new(0, spec.layers)) {
        let location = header.locate(path, &spec, &wanted)?;
        tensors.push((wanted, location));
    }
    Ok(Found { spec, tensors, header })
}

impl Gguf {
    fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    fn family(&self) -> Result<Family, String> {
        if let Some(parts) = self.get("split.count").and_then(Value::as_u64)
            && parts > 1
        {
            return Err(format!(
                "it is one of {parts} parts of a model; merge them first (`gguf-split --merge`)"
            ));
        }
        let name = self.text("general.architecture");
        let name = name.ok_or("it has no `general.architecture`")?;
        let known = ARCHITECTURES.iter().find(|(known, _)| *known == name);
        known.map(|(_, family)| *family).ok_or_else(|| {
            let known: Vec<_> = ARCHITECTURES.iter().map(|(name, _)| format!("`{name}`")).collect();
            format!("`general.architecture` is `{name}`; supported: {}", known.join(", "))
        })
    }

    /// The factors of llama 3's rotation, which are in a tensor.
    fn rope_factors(&self, path: &Path) -> Result<Option<Vec<f32>>, CheckpointError> {
        let Some(tensor) = self.tensor(ROPE_FACTORS) else { return Ok(None) };
        let bad = |reason: String| CheckpointError::Gguf { file: path.to_owned(), reason };
        // As many as a head has pairs.
        const LEN_MAX: u64 = 4 << 10;
        if tensor.dtype != Ok(StoredType::F32) || tensor.len > LEN_MAX {
            return Err(bad(format!("tensor `{ROPE_FACTORS}` is no short list of F32")));
        }
        let mut bytes = vec![0; tensor.len as usize];
        let read = File::open(path).and_then(|file| file.read_exact_at(&mut bytes, tensor.offset));
        read.map_err(|source| CheckpointError::Read { file: path.to_owned(), source })?;
        Ok(Some(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()))
    }

    /// The metadata in the words of `config.json`.
    fn config(
        &self,
        family: Family,
        rope_factors: Option<&[f32]>,
    ) -> Result<Map<String, serde_json::Value>, String> {
        let name = self.text("general.architecture").unwrap_or_default();
        let value = |key: &str| self.get(&format!("{name}.{key}"));
        let whole = |key: &str| {
            let found = value(key).and_then(Value::as_u64);
            found.ok_or_else(|| format!("`{name}.{key}` is missing or no whole number"))
        };
        for key in ["expert_count", "attention.sliding_window"] {
            if value(key).and_then(Value::as_u64).unwrap_or(0) > 0 {
                return Err(format!("`{name}.{key}` is given: not supported in a GGUF file"));
            }
        }
        let heads = whole("attention.head_count")?;
        let hidden = whole("embedding_length")?;
        let head_dim = match value("attention.key_length") {
            Some(_) => whole("attention.key_length")?,
            None => hidden.checked_div(heads).unwrap_or(0),
        };
        for key in ["rope.dimension_count", "attention.value_length"] {
            let other = value(key).and_then(Value::as_u64).filter(|found| *found != head_dim);
            if let Some(other) = other {
                return Err(format!("`{name}.{key}` is {other}; expected a head's {head_dim}"));
            }
        }
        let embedding = self.tensor("token_embd.weight");
        let rows = embedding.and_then(|tensor| tensor.shape.first());
        let vocab = rows.ok_or("tensor `token_embd.weight` is missing")?;
        let has = |tensor: &str| self.tensor(tensor).is_some();
        let eps = "attention.layer_norm_rms_epsilon";
        let eps = value(eps).and_then(Value::as_f64);
        let mut config = Map::new();
        let mut set = |key: &str, value: serde_json::Value| {
            config.insert(key.to_owned(), value);
        };
        set("architectures", json!([family.architecture()]));
        set("num_hidden_layers", json!(whole("block_count")?));
        set("hidden_size", json!(hidden));
        set("num_attention_heads", json!(heads));
        let kv_heads = value("attention.head_count_kv").map_or(Ok(heads), |value| {
            value
                .as_u64()
                .ok_or_else(|| format!("`{name}.attention.head_count_kv` differs by layer"))
        })?;
        set("num_key_value_heads", json!(kv_heads));
        set("head_dim", json!(head_dim));
        set("intermediate_size", json!(whole("feed_forward_length")?));
        set("vocab_size", json!(vocab));
        set("max_position_embeddings", json!(whole("context_length")?));
        set("rms_norm_eps", json!(eps));
        set("tie_word_embeddings", json!(!has("output.weight")));
        let biases = match family {
            Family::Llama => has("blk.0.attn_q.bias"),
            // Qwen2 has them always, and nothing else has them.
            _ => family != Family::Qwen2 && has("blk.0.attn_q.bias"),
        };
        set("attention_bias", json!(biases));
        set("mlp_bias", json!(has("blk.0.ffn_up.bias")));
        let theta = value("rope.freq_base").and_then(Value::as_f64).unwrap_or(10_000.0);
        set("rope_theta", json!(theta));
        let scaling = self.rope_scaling(name, (theta, head_dim), rope_factors)?;
        set("rope_scaling", scaling);
        Ok(config)
    }

    fn rope_scaling(
        &self,
        name: &str,
        (theta, head_dim): (f64, u64),
        factors: Option<&[f32]>,
    ) -> Result<serde_json::Value, String> {
        let key = |key: &str| self.get(&format!("{name}.rope.scaling.{key}"));
        if let Some(factors) = factors {
            let original = key("original_context_length").and_then(Value::as_u64);
            return llama3(factors, theta, head_dim, original);
        }
        match key("type").and_then(Value::as_str) {
            None | Some("none") => Ok(serde_json::Value::Null),
            Some("linear") => {
                let factor = key("factor").and_then(Value::as_f64);
                Ok(json!({"rope_type": "linear", "factor": factor}))
            }
            Some(other) => Err(format!(
                "`{name}.rope.scaling.type` is `{other}`; supported: `none`, `linear`, and llama 3's"
            )),
        }
    }

    fn locate(
        &self,
        path: &Path,
        spec: &ModelSpec,
        wanted: &TensorSpec,
    ) -> Result<TensorLocation, CheckpointError> {
        let file = path.to_path_buf();
        let unknown = || CheckpointError::Gguf {
            file: path.to_owned(),
            reason: format!("`{}` has no name in GGUF files that this build knows", wanted.name),
        };
        let name = tensor_name(spec, wanted).ok_or_else(unknown)?;
        let Some(found) = self.tensor(&name) else {
            let expected = wanted.stored_shape().to_vec();
            return Err(CheckpointError::MissingTensor { file, tensor: name, expected });
        };
        let GgufTensor { shape, dtype, offset, len, .. } = found.clone();
        let dtype = dtype.map_err(|number| CheckpointError::UnsupportedType {
            file: file.clone(),
            tensor: name.clone(),
            found: type_name(number),
        })?;
        if !wanted.is_matrix && !dtype.is_plain() {
            let found = format!("{dtype}, a vector");
            return Err(CheckpointError::UnsupportedType { file, tensor: name, found });
        }
        if shape != wanted.stored_shape() {
            let expected = wanted.stored_shape().to_vec();
            return Err(CheckpointError::WrongShape { file, tensor: name, found: shape, expected });
        }
        let turned =
            [TensorRole::Query, TensorRole::QueryBias, TensorRole::Key, TensorRole::KeyBias];
        let order = if spec.family == Family::Llama && turned.contains(&wanted.role) {
            RowOrder::PairsTogether { head_dim: spec.head_dim }
        } else {
            RowOrder::AsIs
        };
        let found =
            TensorLocation { file: file.into(), offset, len, dtype, shape, order, scales: None };
        found.check_excerpt(wanted)?;
        Ok(found)
    }
}

/// Llama 3's rotation out of its factors: published files have the factors alone. What it would give is
/// compared with them, so nothing is guessed.
fn llama3(
    factors: &[f32],
    theta: f64,
    head_dim: u64,
    original: Option<u64>,
) -> Result<serde_json::Value, String> {
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    let factor = factors.iter().copied().fold(1.0_f32, f32::max);
    let gives = |original: u64| {
        let one = |i: usize| {
            let frequency = theta.powf(-(2.0 * i as f64) / head_dim as f64);
            let turns = original as f64 * frequency / TAU;
            let smooth = ((turns - LOW) / (HIGH - LOW)).clamp(0.0, 1.0);
            1.0 / ((1.0 - smooth) / f64::from(factor) + smooth)
        };
        let near = |i: usize| (one(i) - f64::from(factors[i])).abs() <= 1e-4 * one(i);
        factors.len() as u64 * 2 == head_dim && (0..factors.len()).all(near)
    };
    // Contexts of training are powers of two.
    let mut candidates = original.into_iter().chain((4..=20).map(|bits| 1 << bits));
    let found = candidates.rfind(|original| gives(*original));
    let original = found.ok_or_else(|| {
        format!(
            "the factors in `{ROPE_FACTORS}` are not those of llama 3's rotation: not supported"
        )
    })?;
    Ok(json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": LOW,
        "high_freq_factor": HIGH, "original_max_position_embeddings": original,
    }))
}

/// What a tensor is called in GGUF files.
fn tensor_name(spec: &ModelSpec, tensor: &TensorSpec) -> Option<String> {
    use TensorRole::*;
    let name = match tensor.role {
        Embedding => "token_embd.weight",
        OutputHead if spec.tied_embeddings => "token_embd.weight",
        OutputHead => "output.weight",
        FinalNorm => "output_norm.weight",
        AttentionNorm => "attn_norm.weight",
        Query => "attn_q.weight",
        QueryBias => "attn_q.bias",
        Key => "attn_k.weight",
        KeyBias => "attn_k.bias",
        Value => "attn_v.weight",
        ValueBias => "attn_v.bias",
        QueryNorm => "attn_q_norm.weight",
        KeyNorm => "attn_k_norm.weight",
        AttentionOutput => "attn_output.weight",
        AttentionOutputBias => "attn_output.bias",
        MlpNorm => "ffn_norm.weight",
        Gate => "ffn_gate.weight",
        GateBias => "ffn_gate.bias",
        Up => "ffn_up.weight",
        UpBias => "ffn_up.bias",
        Down => "ffn_down.weight",
        DownBias => "ffn_down.bias",
        // Families that GGUF is not read for have others.
        _ => return None,
    };
    Some(match tensor.layer {
        Some(layer) => format!("blk.{layer}.{name}"),
        None => name.to_owned(),
    })
}
