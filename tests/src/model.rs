//! Model folders that tests make up: of any size, and damaged in any way.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use shoal_protocol::model::ModelSpec;
use shoal_protocol::units::LayerRange;

/// The files that make a folder servable beside config and weights; the demo model's do for any
/// vocabulary of its size.
const TOKENIZER_FILES: [&str; 3] =
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json"];

/// The vocabulary of the demo model's tokenizer.
const VOCAB: usize = 389;

/// A Llama with random weights, stored as f32.
#[derive(Clone, Copy, Debug)]
pub struct RandomLlama {
    /// Layers.
    pub layers: usize,
    /// Width; a multiple of 32, the width of a head.
    pub hidden: usize,
    /// Width inside the feed-forward layers.
    pub intermediate: usize,
}

impl RandomLlama {
    const HEAD: usize = 32;

    /// Writes the folder, with one key/value head.
    pub fn write(self, folder: &Path) -> Result<()> {
        self.write_with_heads(folder, 1)
    }

    /// Writes the folder, with so many key/value heads; tensor ranks share them.
    pub fn write_with_heads(self, folder: &Path, kv_heads: usize) -> Result<()> {
        std::fs::create_dir_all(folder)?;
        for file in TOKENIZER_FILES {
            std::fs::copy(demo().join(file), folder.join(file)).context(file)?;
        }
        std::fs::write(folder.join("config.json"), self.config(kv_heads).to_string())?;
        std::fs::write(folder.join("model.safetensors"), safetensors(&self.tensors(kv_heads))?)?;
        Ok(())
    }

    fn config(self, kv_heads: usize) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden / Self::HEAD,
            "num_key_value_heads": kv_heads,
            "head_dim": Self::HEAD,
            "hidden_act": "silu",
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": true,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "float32",
        })
    }

    /// Names and shapes.
    fn tensors(self, kv_heads: usize) -> Vec<(String, Vec<usize>)> {
        let (hidden, mlp) = (self.hidden, self.intermediate);
        let mut tensors = vec![
            ("model.embed_tokens.weight".to_owned(), vec![VOCAB, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ];
        for layer in 0..self.layers {
            let parts: [(&str, Vec<usize>); 9] = [
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.k_proj", vec![kv_heads * Self::HEAD, hidden]),
                ("self_attn.v_proj", vec![kv_heads * Self::HEAD, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("mlp.gate_proj", vec![mlp, hidden]),
                ("mlp.up_proj", vec![mlp, hidden]),
                ("mlp.down_proj", vec![hidden, mlp]),
            ];
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            tensors.extend(parts.map(|(part, shape)| (name(part), shape)));
        }
        tensors
    }
}

/// Writes the folder of a model with random weights, stored as f32, whose config.json is this; its vocabulary has to be
/// the demo model's.
pub fn write_random(folder: &Path, config: &Value) -> Result<()> {
    ensure!(config["vocab_size"] == VOCAB, "the tokenizer has {VOCAB} tokens");
    std::fs::create_dir_all(folder)?;
    for file in TOKENIZER_FILES {
        std::fs::copy(demo().join(file), folder.join(file)).context(file)?;
    }
    let text = config.to_string();
    let spec = ModelSpec::from_config_json(&text)?;
    let tensors = spec.tensors(LayerRange::new(0, spec.layers)).into_iter();
    let shape = |dims: &[u64]| dims.iter().map(|n| *n as usize).collect();
    let tensors: Vec<_> = tensors.map(|t| (t.name.clone(), shape(t.stored_shape()))).collect();
    std::fs::write(folder.join("config.json"), text)?;
    std::fs::write(folder.join("model.safetensors"), safetensors(&tensors)?)?;
    Ok(())
}

/// The folder of the built-in model.
pub fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../cluster/demo-model")
}

/// A copy of a model folder, to be damaged.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// One file in the safetensors layout, with seeded noise as weights.
fn safetensors(tensors: &[(String, Vec<usize>)]) -> Result<Vec<u8>> {
    let mut header = Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), entry);
    }
    let mut head = serde_json::to_vec(&header)?;
    head.resize(head.len().next_multiple_of(8), b' ');
    let mut file = (head.len() as u64).to_le_bytes().to_vec();
    file.extend(head);
    file.reserve(end);
    let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
    for (name, shape) in tensors {
        // Norms scale by about one, the rest is small enough to keep activations finite.
        let (middle, spread) = if name.contains("norm") { (1.0, 0.1) } else { (0.0, 0.08) };
        for _ in 0..shape.iter().product::<usize>() {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            let unit = (noise >> 40) as f32 / (1 << 24) as f32 - 0.5;
            file.extend((middle + spread * unit).to_le_bytes());
        }
    }
    Ok(file)
}
