//! ○ What the planner has to know of a model: how many layers, and what a range of them costs.

use serde::{Deserialize, Serialize};
use shoal_protocol::model::{ModelSpec, Part, TensorRole, TensorSpec};
use shoal_protocol::plan::{Precision, PretendSpec, ReplicaLimits, ShardMemory};
use shoal_protocol::units::{Bytes, LayerRange};

/// The shape of a model, of either kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant)] // One per deployment.
pub enum ModelShape {
    /// A checkpoint's.
    Checkpoint(ModelSpec),
    /// A pretend model's: its weights are a number.
    Pretend(PretendSpec),
}

impl ModelShape {
    /// The number of layers to split; at least 1.
    pub fn layers(&self) -> u32 {
        match self {
            ModelShape::Checkpoint(spec) => spec.layers,
            ModelShape::Pretend(spec) => spec.layers,
        }
    }

    /// The vocabulary's size.
    pub fn vocab(&self) -> u32 {
        match self {
            ModelShape::Checkpoint(spec) => spec.vocab,
            ModelShape::Pretend(spec) => spec.vocab,
        }
    }

    /// The longest context that the model was made for, in tokens.
    pub fn context_max(&self) -> u32 {
        match self {
            ModelShape::Checkpoint(spec) => spec.context_max,
            ModelShape::Pretend(spec) => spec.max_context,
        }
    }

    /// The precision in which the weights are stored.
    pub fn stored(&self) -> Precision {
        match self {
            ModelShape::Checkpoint(spec) => spec.stored,
            ModelShape::Pretend(_) => Precision::F32,
        }
    }

    /// The memory of a shard with these layers, to the byte.
    pub fn memory(
        &self,
        layers: LayerRange,
        precision: Precision,
        limits: &ReplicaLimits,
    ) -> ShardMemory {
        match self {
            ModelShape::Checkpoint(spec) => spec.shard_memory(layers, precision, limits),
            ModelShape::Pretend(spec) => spec.shard_memory(layers, limits),
        }
    }

    /// The weight bytes that every decode step reads in one layer, and after the last layer those of
    /// the output head. The embedding is not among them: a step looks up a row per token there. This
    /// is what a stage's time is proportional to, for decode by memory bandwidth and for prefill by
    /// arithmetic.
    pub fn step_bytes(&self, layer: u32, precision: Precision) -> Bytes {
        self.step_bytes_of(layer, None, precision)
    }

    /// The same of one tensor rank; `None`: of all.
    pub fn step_bytes_of(&self, layer: u32, part: Option<&Part>, precision: Precision) -> Bytes {
        let range = LayerRange::new(layer, layer + 1);
        // A tied head is the embedding, which the last stage reads whole.
        let is_read = |spec: &ModelSpec, tensor: &TensorSpec| {
            tensor.role != TensorRole::Embedding
                || (spec.tied_embeddings && layer + 1 == spec.layers)
        };
        if let (ModelShape::Checkpoint(spec), Some(part)) = (self, part) {
            let tensors = part.tensors(spec, range);
            let read = tensors.iter().filter(|tensor| is_read(spec, &tensor.spec));
            return read.map(|tensor| tensor.held_bytes(precision)).sum();
        }
        match self {
            ModelShape::Pretend(spec) => {
                // Modelled time is all there is of a pretend model, and it is the same per layer.
                Bytes(spec.layer_weight_bytes.max(1))
            }
            ModelShape::Checkpoint(spec) => spec
                .tensors(range)
                .iter()
                .filter(|tensor| is_read(spec, tensor))
                .map(|tensor| tensor.held_bytes(precision))
                .sum(),
        }
    }
}

/// A small pretend model, for the tests of whatever deploys one.
#[cfg(test)]
pub(super) fn small_pretend(layers: u32, layer_weight_bytes: u64) -> PretendSpec {
    PretendSpec {
        layers,
        hidden: 8,
        vocab: 32,
        max_context: 64,
        seed: 1,
        layer_step_ns: 0,
        layer_row_ns: 0,
        layer_weight_bytes,
    }
}
