//! Llama-shaped models with random weights, written in the Hugging Face layout.
//!
//! Speed and memory do not depend on what the weights say; small random ones keep every activation
//! finite.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use half::bf16;
use serde_json::{Map, Value, json};

use super::Dice;

/// The shape of a random model, stored in bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Transformer layers.
    pub layers: u32,
    /// The width of the residual stream.
    pub hidden: u32,
    /// The width of the MLP.
    pub intermediate: u32,
    /// Query heads of 64 dimensions.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// The vocabulary.
    pub vocab: u32,
    /// Files that the weights are spread over.
    pub files: u32,
}

impl Shape {
    /// Some 13 M parameters, for looking whether a bench works.
    pub const SMALL: Self = Self {
        layers: 8,
        hidden: 384,
        intermediate: 1024,
        heads: 6,
        kv_heads: 6,
        vocab: 1003,
        files: 1,
    };

    /// About 300 M parameters: 20 to 30 ms a token with one thread in bf16. The vocabulary is small
    /// so that the output head weighs less than one layer and two stages can be even.
    pub const MEDIUM: Self = Self {
        layers: 24,
        hidden: 1024,
        intermediate: 2816,
        heads: 16,
        kv_heads: 8,
        vocab: 4099,
        files: 1,
    };

    /// About 1.2 GiB in bf16, over four files.
    pub const LARGE: Self = Self {
        layers: 24,
        hidden: 1536,
        intermediate: 4096,
        heads: 24,
        kv_heads: 8,
        vocab: 16_001,
        files: 4,
    };

    /// 853 million parameters: a shape of which other engines' figures are known.
    pub const PEERS: Self = Self {
        layers: 16,
        hidden: 2048,
        intermediate: 5632,
        heads: 32,
        kv_heads: 8,
        vocab: 32_000,
        files: 1,
    };

    /// 1.04 billion parameters, 1.94 GiB in bf16: a Llama of real size.
    pub const BILLION: Self = Self {
        layers: 16,
        hidden: 2048,
        intermediate: 8192,
        heads: 32,
        kv_heads: 8,
        vocab: 16_001,
        files: 4,
    };

    /// Parameters.
    pub fn parameters(&self) -> u64 {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<u64>()).sum()
    }

    pub(super) fn tensors(&self) -> Vec<(String, Vec<u64>)> {
        let [hidden, inter, vocab] = [self.hidden, self.intermediate, self.vocab].map(u64::from);
        let (q, kv) = (u64::from(self.heads) * 64, u64::from(self.kv_heads) * 64);
        let mut out = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
        for layer in 0..self.layers {
            let mut push = |name: &str, shape: Vec<u64>| {
                out.push((format!("model.layers.{layer}.{name}.weight"), shape))
            };
            push("input_layernorm", vec![hidden]);
            push("self_attn.q_proj", vec![q, hidden]);
            push("self_attn.k_proj", vec![kv, hidden]);
            push("self_attn.v_proj", vec![kv, hidden]);
            push("self_attn.o_proj", vec![hidden, q]);
            push("post_attention_layernorm", vec![hidden]);
            push("mlp.gate_proj", vec![inter, hidden]);
            push("mlp.up_proj", vec![inter, hidden]);
            push("mlp.down_proj", vec![hidden, inter]);
        }
        out.push(("model.norm.weight".to_owned(), vec![hidden]));
        out.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
        out
    }

    /// Writes the model to `root/<shape>/` where it is not there yet, and returns that folder.
    pub fn write(&self, root: &Path, seed: u64) -> io::Result<PathBuf> {
        let name = format!(
            "llama-{}x{}-{}-{}-{}-v{}-s{seed}",
            self.layers, self.hidden, self.intermediate, self.heads, self.kv_heads, self.vocab
        );
        let folder = root.join(name);
        if folder.join("done").exists() {
            return Ok(folder);
        }
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("config.json"), self.config().to_string())?;
        fs::write(folder.join("tokenizer.json"), self.tokenizer().to_string())?;
        fs::write(
            folder.join("generation_config.json"),
            json!({"eos_token_id": 0, "do_sample": false}).to_string(),
        )?;
        self.write_weights(&folder, seed)?;
        fs::write(folder.join("done"), "")?;
        Ok(folder)
    }

    fn config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "num_hidden_layers": self.layers, "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": 64,
            "vocab_size": self.vocab, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
            "bos_token_id": 1, "eos_token_id": 0
        })
    }

    /// One word a token: prompts and answers of these models are token ids.
    pub(super) fn tokenizer(&self) -> Value {
        let vocab: Map<String, Value> =
            (0..self.vocab).map(|id| (format!("t{id}"), json!(id))).collect();
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
        })
    }

    fn write_weights(&self, folder: &Path, seed: u64) -> io::Result<()> {
        let tensors = self.tensors();
        let per_file = tensors.len().div_ceil(self.files.max(1) as usize);
        let mut index = Map::new();
        let mut dice = Dice::new(seed);
        for (i, tensors) in tensors.chunks(per_file).enumerate() {
            let file = if self.files <= 1 {
                "model.safetensors".to_owned()
            } else {
                format!("model-{:05}-of-{:05}.safetensors", i + 1, self.files)
            };
            tensors.iter().for_each(|(name, _)| drop(index.insert(name.clone(), json!(file))));
            write_safetensors(&folder.join(file), tensors, &mut dice)?;
        }
        if self.files > 1 {
            let index =
                json!({"metadata": {"total_size": 2 * self.parameters()}, "weight_map": index});
            fs::write(folder.join("model.safetensors.index.json"), index.to_string())?;
        }
        Ok(())
    }
}

fn write_safetensors(
    path: &Path,
    tensors: &[(String, Vec<u64>)],
    dice: &mut Dice,
) -> io::Result<()> {
    let mut header = Map::new();
    let mut offset = 0u64;
    for (name, shape) in tensors {
        let end = offset + 2 * shape.iter().product::<u64>();
        header.insert(
            name.clone(),
            json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    for (_, shape) in tensors {
        let mut bytes = Vec::with_capacity(4 << 20);
        for value in values(shape, dice) {
            bytes.extend_from_slice(&bf16::from_f32(value).to_le_bytes());
            if bytes.len() >= 4 << 20 {
                out.write_all(&bytes)?;
                bytes.clear();
            }
        }
        out.write_all(&bytes)?;
    }
    out.into_inner()?.sync_all()
}

/// What a tensor holds, row by row: norm weights are one; matrices keep the variance of what goes through them. Every
/// width is even, so that two values at a time come out right.
pub(super) fn values<'a>(shape: &[u64], dice: &'a mut Dice) -> impl Iterator<Item = f32> + use<'a> {
    let elements: u64 = shape.iter().product();
    let scale = if shape.len() == 1 { 0.0 } else { (3.0 / shape[1] as f32).sqrt() };
    (0..elements / 2).flat_map(move |_| {
        let bits = dice.bits();
        [bits as u32, (bits >> 32) as u32].map(|half| {
            let unit = (half >> 8) as f32 / (1 << 23) as f32 - 1.0;
            if scale == 0.0 { 1.0 } else { unit * scale }
        })
    })
}
