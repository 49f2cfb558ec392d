//! The shape of a model. [`config`](super::config) reads it from `config.json` and checks it.

use serde::{Deserialize, Serialize};

use crate::model::options::Options;
use crate::plan::Precision;
use crate::units::Bytes;

/// The families that this build knows. What each is stands in its file under `families/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// `LlamaForCausalLM`: Llama 2, 3 and 3.x.
    Llama,
    /// `Qwen2ForCausalLM`: Qwen2 and Qwen2.5.
    Qwen2,
    /// `Qwen3ForCausalLM`.
    Qwen3,
    /// `MistralForCausalLM`.
    Mistral,
    /// `Phi3ForCausalLM`: Phi-3, 3.5 and 4, mini ones too.
    Phi3,
    /// `Olmo2ForCausalLM`.
    Olmo2,
    /// `GraniteForCausalLM`.
    Granite,
    /// `SmolLM3ForCausalLM`.
    SmolLm3,
    /// `Gemma2ForCausalLM`.
    Gemma2,
    /// `Gemma3ForCausalLM`: the text models.
    Gemma3,
    /// `CohereForCausalLM`: Command R, Aya.
    Cohere,
    /// `Cohere2ForCausalLM`: Command R7B, Command A.
    Cohere2,
    /// `Starcoder2ForCausalLM`.
    StarCoder2,
    /// `MixtralForCausalLM`.
    Mixtral,
    /// `Qwen2MoeForCausalLM`.
    Qwen2Moe,
    /// `Qwen3MoeForCausalLM`.
    Qwen3Moe,
    /// `GptOssForCausalLM`.
    GptOss,
    /// `DeepseekV2ForCausalLM`.
    DeepSeek2,
    /// `DeepseekV3ForCausalLM`: V3 and R1.
    DeepSeek3,
    /// None of these but an encoder: its own shape is an [`EncoderSpec`](super::EncoderSpec), whose
    /// layers are said in a [`ModelSpec`]'s words. It never crosses a wire as one.
    Encoder,
}

impl Family {
    /// Every family, in the order in which messages list them; a reference model shows each.
    pub const ALL: &'static [Family] = &[
        Family::Llama,
        Family::Qwen2,
        Family::Qwen3,
        Family::Mistral,
        Family::Phi3,
        Family::Olmo2,
        Family::Granite,
        Family::SmolLm3,
        Family::Gemma2,
        Family::Gemma3,
        Family::Cohere,
        Family::Cohere2,
        Family::StarCoder2,
        Family::Mixtral,
        Family::Qwen2Moe,
        Family::Qwen3Moe,
        Family::GptOss,
        Family::DeepSeek2,
        Family::DeepSeek3,
    ];

    /// What `architectures` in `config.json` calls it.
    pub fn architecture(self) -> &'static str {
        self.definition().architecture
    }

    /// What `model_type` in `config.json` calls it.
    pub fn model_type(self) -> &'static str {
        self.definition().model_type
    }
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
    /// YaRN: high frequencies kept, low ones divided, those between mixed along a ramp.
    Yarn {
        /// The divisor.
        factor: f32,
        /// The context of training, in tokens.
        original_context: u32,
        /// Pairs that turn more often than this within it are kept.
        beta_fast: f32,
        /// Those that turn less often are divided.
        beta_slow: f32,
        /// Multiplies cosines and sines.
        attention_factor: f32,
        /// Whether the ramp's ends are whole pairs.
        truncate: bool,
    },
    /// Each frequency divided by a factor of its own ([`RopeFactors`](super::RopeFactors)): one list
    /// for replicas whose context is the original one at most, another for longer ones.
    LongRope {
        /// The context of training, in tokens.
        original_context: u32,
        /// Multiplies cosines and sines.
        attention_factor: f32,
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
    /// Norms over q and k: over each head, or as [`Options::qk_norm_whole`] says.
    pub qk_norm: bool,
    /// What tells it from Llama.
    pub options: Options,
    /// The type of the stored weights: what `config.json` says, and after
    /// [`Checkpoint::open`](super::Checkpoint::open) what the matrices in the files are.
    pub stored: Precision,
}

impl ModelSpec {
    /// The width of all query heads together.
    pub fn query_width(&self) -> u32 {
        self.heads * self.head_dim
    }

    /// The width of all key (or value) heads together.
    pub fn kv_width(&self) -> u32 {
        self.kv_heads * self.head_dim
    }

    /// KV bytes of one token in one layer: keys and values as f32.
    pub fn kv_bytes_per_token_layer(&self) -> Bytes {
        Bytes(2 * u64::from(self.cache_heads()) * u64::from(self.cache_dim()) * 4)
    }
}

/// Why a `config.json` is refused. Every variant names the field.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SpecError {
    /// It is no JSON object.
    #[error("config.json is not readable: {reason}; expected one JSON object")]
    NotJson {
        /// Where and what.
        reason: String,
    },
    /// A field that has no default is absent.
    #[error("config.json: `{field}` is missing; expected {expected}")]
    Missing {
        /// The field.
        field: &'static str,
        /// What should stand there.
        expected: String,
    },
    /// A field has a value that cannot be right.
    #[error("config.json: `{field}` is {value}; expected {expected}")]
    BadValue {
        /// The field.
        field: &'static str,
        /// What stands there.
        value: String,
        /// What should stand there.
        expected: String,
    },
    /// A field asks for something that exists but that this build cannot do.
    #[error("config.json: `{field}` is {value}, which is not supported; supported: {supported}")]
    Unsupported {
        /// The field.
        field: &'static str,
        /// What it asks for.
        value: String,
        /// What this build can do.
        supported: String,
    },
    /// A file of sentence-transformers beside it asks for what is not there or cannot be done.
    #[error("{file}: {why}")]
    Sentence {
        /// The file.
        file: String,
        /// What is wrong and what could stand there.
        why: String,
    },
}
