//! The shape of a model, read from `config.json` and checked at construction.

use serde::{Deserialize, Serialize};

use crate::plan::Precision;
use crate::units::Bytes;

/// The families that this build knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Family {
    /// `LlamaForCausalLM`: Llama 2, 3 and 3.x.
    Llama,
    /// `Qwen2ForCausalLM`: Qwen2 and Qwen2.5.
    Qwen2,
    /// `Qwen3ForCausalLM`.
    Qwen3,
}

/// How rotary frequencies are stretched for contexts longer than those of training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1's: low frequencies divided, high ones kept, those between interpolated.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f32,
        /// Wavelengths over `original_context / low_freq_factor` are low.
        low_freq_factor: f32,
        /// Wavelengths under `original_context / high_freq_factor` are high.
        high_freq_factor: f32,
        /// The context of training, in tokens.
        original_context: u32,
    },
}

/// The shape of a model of one of the families.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// Which layers it is made of.
    pub family: Family,
    /// The number of transformer layers.
    pub layers: u32,
    /// The width of the residual stream.
    pub hidden: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// The width of one head; even.
    pub head_dim: u32,
    /// The width of the gated MLP.
    pub intermediate: u32,
    /// The vocabulary's size.
    pub vocab: u32,
    /// The longest context in tokens.
    pub context_max: u32,
    /// Added to the mean square in RMS norms.
    pub norm_eps: f32,
    /// The base of the rotary frequencies.
    pub rope_theta: f32,
    /// How they are stretched.
    pub rope_scaling: RopeScaling,
    /// Whether the output head is the embedding.
    pub tied_embeddings: bool,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// A bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases on the MLP's projections.
    pub mlp_bias: bool,
    /// RMS norms over each head of q and k.
    pub qk_norm: bool,
    /// The type in which the checkpoint says it is stored.
    pub stored: Precision,
}

impl ModelSpec {
    /// KV bytes of one token in one layer: keys and values as f32.
    pub fn kv_bytes_per_token_layer(&self) -> Bytes {
        Bytes(2 * u64::from(self.kv_heads) * u64::from(self.head_dim) * 4)
    }
}

/// Why a `config.json` is refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SpecError {
    /// A placeholder variant replaced by the reader's own.
    #[error("config.json: {0}")]
    Invalid(String),
}
