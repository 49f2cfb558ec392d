//! What a GGUF file's metadata say of a model, in the words of `config.json`: one place checks both.

use std::f64::consts::TAU;
use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_json::{Value as Json, json};

use super::architectures::{ARCHITECTURES, Architecture, Words};
use super::parts::Parts;
use super::{GgufTensor, Value};
use crate::model::checkpoint::CheckpointError;
use crate::model::config::LAYERS_MAX;
use crate::model::stored::StoredType;

/// The tensor of llama 3's stretched rotation: by how much each frequency is divided.
const ROPE_FACTORS: &str = "rope_freqs.weight";
/// Those of LongRoPE: within the original context, and beyond it.
const SHORT_FACTORS: &str = "rope_factors_short.weight";
const LONG_FACTORS: &str = "rope_factors_long.weight";
/// All tensors that are read with the metadata.
pub(super) const FACTORS: [&str; 3] = [ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS];

/// A file, and what it says it is.
pub(super) struct Source<'a> {
    pub(super) parts: &'a Parts,
    pub(super) architecture: &'static Architecture,
}

impl<'a> Source<'a> {
    pub(super) fn of(parts: &'a Parts) -> Result<Self, String> {
        let name = parts.get("general.architecture").and_then(Value::as_str);
        let name = name.ok_or("it has no `general.architecture`")?;
        let architecture = ARCHITECTURES.iter().find(|known| known.name == name);
        let architecture = architecture.ok_or_else(|| {
            let known: Vec<_> =
                ARCHITECTURES.iter().map(|known| format!("`{}`", known.name)).collect();
            format!("`general.architecture` is `{name}`; supported: {}", known.join(", "))
        })?;
        Ok(Self { parts, architecture })
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.parts.get(&format!("{}.{key}", self.architecture.name))
    }

    /// A whole number, where it is given.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        self.value(key).and_then(Value::as_u64)
    }

    /// A whole number that must be given.
    pub(super) fn whole(&self, key: &str) -> Result<u64, String> {
        let name = self.architecture.name;
        self.number(key).ok_or_else(|| format!("`{name}.{key}` is missing or no whole number"))
    }

    /// A number, where it is given.
    pub(super) fn real(&self, key: &str) -> Option<f64> {
        self.value(key).and_then(Value::as_f64)
    }

    /// A number that must be given: without it the arithmetic is not known.
    pub(super) fn needed(&self, key: &str) -> Result<Json, String> {
        let name = self.architecture.name;
        let found = self.real(key);
        found.map(|n| json!(n)).ok_or_else(|| format!("`{name}.{key}` is missing or no number"))
    }

    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        self.value(key).and_then(Value::as_bool)
    }

    pub(super) fn has(&self, tensor: &str) -> bool {
        self.parts.tensor(tensor).is_some()
    }

    /// How many layers it says that it has: few enough to look at each.
    pub(super) fn layers(&self) -> Result<u64, String> {
        let layers = self.whole("block_count")?;
        match layers <= LAYERS_MAX {
            true => Ok(layers),
            false => Err(format!(
                "`{}.block_count` is {layers}; at most {LAYERS_MAX} are supported",
                self.architecture.name
            )),
        }
    }

    /// The rows of such a tensor in the first layer that has it; of each expert's where it has several.
    pub(super) fn rows_of(&self, tensor: &str) -> Option<u64> {
        let layers = self.layers().ok()?;
        let mut found =
            (0..layers).map(|layer| self.parts.tensor(&format!("blk.{layer}.{tensor}")));
        let (_, tensor) = found.find_map(|found| found)?;
        tensor.shape.iter().rev().nth(1).copied()
    }

    /// The width of an expert; older files do not say it.
    pub(super) fn expert_width(&self) -> Result<u64, String> {
        let said = self.number("expert_feed_forward_length");
        let found = said.or_else(|| self.rows_of("ffn_up_exps.weight"));
        let key = format!("{}.expert_feed_forward_length", self.architecture.name);
        found.ok_or_else(|| format!("`{key}` is missing, and no layer has `ffn_up_exps.weight`"))
    }

    /// The width of a head.
    pub(super) fn head_dim(&self) -> Result<u64, String> {
        match self.value("attention.key_length") {
            Some(_) => self.whole("attention.key_length"),
            None => {
                let heads = self.whole("attention.head_count")?;
                Ok(self.whole("embedding_length")?.checked_div(heads).unwrap_or(0))
            }
        }
    }

    /// How many positions a query sees, where that is not all.
    pub(super) fn window(&self) -> Option<u64> {
        self.number("attention.sliding_window").filter(|window| *window > 0)
    }

    /// Which layers have the window: as the file lists them, or all but every so-many-th.
    pub(super) fn window_pattern(&self, layers: u64, every: u64) -> Result<Vec<bool>, String> {
        let key = "attention.sliding_window_pattern";
        let every = match self.value(key) {
            None => every,
            Some(Value::List(listed)) => {
                let one = |value: &Value| value.as_bool().or(value.as_u64().map(|n| n != 0));
                let listed: Option<Vec<bool>> = listed.iter().map(one).collect();
                return listed.filter(|listed| listed.len() as u64 == layers).ok_or_else(|| {
                    format!(
                        "`{}.{key}` is no list of {layers} times yes or no",
                        self.architecture.name
                    )
                });
            }
            Some(_) => self.whole(key)?,
        };
        Ok((0..layers).map(|layer| every == 0 || layer % every < every - 1).collect())
    }

    /// A short list of numbers that is stored as a tensor.
    fn list(&self, name: &str) -> Result<Option<Vec<f32>>, CheckpointError> {
        let Some((file, tensor)) = self.parts.tensor(name) else { return Ok(None) };
        // As many as a head has pairs.
        const LEN_MAX: u64 = 4 << 10;
        if tensor.dtype != Ok(StoredType::F32) || tensor.len > LEN_MAX {
            let reason = format!("tensor `{name}` is no short list of F32");
            return Err(CheckpointError::Gguf { file: file.to_path_buf(), reason });
        }
        let mut bytes = vec![0; tensor.len as usize];
        let read = File::open(file).and_then(|file| file.read_exact_at(&mut bytes, tensor.offset));
        read.map_err(|source| CheckpointError::Read { file: file.to_path_buf(), source })?;
        Ok(Some(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()))
    }

    /// The metadata in the words of `config.json`.
    pub(super) fn config(&self) -> Result<Words, CheckpointError> {
        let lists = Lists {
            llama3: self.list(ROPE_FACTORS)?,
            short: self.list(SHORT_FACTORS)?,
            long: self.list(LONG_FACTORS)?,
        };
        let file = self.parts.path().to_owned();
        self.words(&lists).map_err(|reason| CheckpointError::Gguf { file, reason })
    }

    fn words(&self, lists: &Lists) -> Result<Words, String> {
        let Architecture { name, family, eps: (eps, eps_word), bias, more, .. } = self.architecture;
        let heads = self.whole("attention.head_count")?;
        let kv_heads = match self.value("attention.head_count_kv") {
            None => heads,
            Some(Value::List(_)) => {
                return Err(format!("`{name}.attention.head_count_kv` differs by layer"));
            }
            Some(_) => self.whole("attention.head_count_kv")?,
        };
        let embedding = self.parts.tensor("token_embd.weight").map(|(_, tensor)| tensor);
        let vocab = embedding.and_then(|tensor: &GgufTensor| tensor.shape.first());
        let vocab = vocab.ok_or("tensor `token_embd.weight` is missing")?;
        let theta = self.real("rope.freq_base").unwrap_or(10_000.0);
        // Layers that predict further tokens are behind the others; they are not read.
        let further = self.number("nextn_predict_layers").unwrap_or(0);
        let layers = self.layers()?.saturating_sub(further);
        let mut words = Words::new();
        for (word, value) in [
            ("architectures", json!([family(self).architecture()])),
            ("num_hidden_layers", json!(layers)),
            ("hidden_size", json!(self.whole("embedding_length")?)),
            ("num_attention_heads", json!(heads)),
            ("num_key_value_heads", json!(kv_heads)),
            ("vocab_size", json!(vocab)),
            ("max_position_embeddings", json!(self.whole("context_length")?)),
            (*eps_word, self.needed(eps)?),
            ("tie_word_embeddings", json!(!self.has("output.weight"))),
            ("mlp_bias", json!(self.has("blk.0.ffn_up.bias"))),
            ("rope_theta", json!(theta)),
        ] {
            words.insert(word.into(), value);
        }
        if !bias.is_empty() {
            words.insert((*bias).to_owned(), json!(self.has("blk.0.attn_q.bias")));
        }
        if let Some(width) = self.number("feed_forward_length") {
            words.insert("intermediate_size".into(), json!(width));
        }
        // Attention over a compressed cache has no such heads.
        let head_dim = match self.value("attention.kv_lora_rank") {
            Some(_) => self.whole("rope.dimension_count")?,
            None => {
                let head_dim = self.plain_head_dim()?;
                words.insert("head_dim".into(), json!(head_dim));
                head_dim
            }
        };
        let scaling = self.rope_scaling((theta, head_dim), lists)?;
        words.insert("rope_scaling".into(), scaling);
        more(self, &mut words)?;
        Ok(words)
    }

    /// The width of a head, all of it or (Phi-3) a part of it rotated.
    fn plain_head_dim(&self) -> Result<u64, String> {
        let (name, head_dim) = (self.architecture.name, self.head_dim()?);
        let keys = ["attention.value_length", "rope.dimension_count"];
        for key in keys.iter().take(if name == "phi3" { 1 } else { 2 }) {
            if let Some(other) = self.number(key).filter(|found| *found != head_dim) {
                return Err(format!("`{name}.{key}` is {other}; expected a head's {head_dim}"));
            }
        }
        Ok(head_dim)
    }

    fn rope_scaling(&self, (theta, head_dim): (f64, u64), lists: &Lists) -> Result<Json, String> {
        let key = |key: &str| self.real(&format!("rope.scaling.{key}"));
        let original = self.number("rope.scaling.original_context_length");
        if let Some(factors) = &lists.llama3 {
            return llama3(factors, theta, head_dim, original);
        }
        if let (Some(short), Some(long)) = (&lists.short, &lists.long) {
            return Ok(json!({
                "rope_type": "longrope", "short_factor": short, "long_factor": long,
                "attention_factor": key("attn_factor"),
            }));
        }
        let kind = self.value("rope.scaling.type").and_then(Value::as_str);
        match kind {
            None | Some("none") => Ok(Json::Null),
            Some("linear") => Ok(json!({"rope_type": "linear", "factor": key("factor")})),
            Some("yarn") => {
                let mut yarn = Words::new();
                for (word, value) in [
                    ("rope_type", json!("yarn")),
                    ("factor", json!(key("factor"))),
                    ("original_max_position_embeddings", json!(original)),
                    ("beta_fast", json!(key("yarn_beta_fast"))),
                    ("beta_slow", json!(key("yarn_beta_slow"))),
                    ("attention_factor", json!(key("yarn_attn_factor"))),
                ] {
                    yarn.insert(word.into(), value);
                }
                Ok(yarn.into())
            }
            Some(other) => Err(format!(
                "`{}.rope.scaling.type` is `{other}`; supported: `none`, `linear`, `yarn`, llama 3's \
                 and, with its factors, `longrope`",
                self.architecture.name
            )),
        }
    }
}

/// Factors of rotations that are stored as tensors.
struct Lists {
    llama3: Option<Vec<f32>>,
    short: Option<Vec<f32>>,
    long: Option<Vec<f32>>,
}

/// Refuses a window, for families whose published models have none.
pub(super) fn no_window(source: &Source<'_>) -> Result<(), String> {
    match source.window() {
        None => Ok(()),
        Some(window) => Err(format!(
            "`{}.attention.sliding_window` is {window}: not supported of this architecture",
            source.architecture.name
        )),
    }
}

/// The window, or that there is none.
pub(super) fn turn_window(source: &Source<'_>, words: &mut Words) -> Result<(), String> {
    words.insert("sliding_window".into(), json!(source.window()));
    Ok(())
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
