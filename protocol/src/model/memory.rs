//! What a shard of a model takes of memory, to the byte: the planner promises it, the worker
//! allocates it, and a test compares the two.
//!
//! ```text
//! weights      matrices in the deployment's precision, rows padded to whole panels, their columns to
//!              whole blocks (of 32 or 256 weights where those share a scale); vectors as f32
//! kv           blocks x 16 positions x layers x 2 (K and V) x kv_heads x head_dim x 4
//! activations  scratch of one step + the hidden states of each step in flight + logits
//! ```
//!
//! Worked example, the middle stage `8..16` of an 8B Llama (hidden 4096, 32 heads and 8 KV heads of
//! 128, MLP 14336) in bf16 with 1,024 KV blocks and steps of 256 rows, 4 in flight: weights
//! 8 layers x (2 x 4096x4096 + 2 x 1024x4096 + 3 x 14336x4096) x 2 + 8 x 2 x 4096 x 4 =
//! 3,489,923,072 bytes; KV 1024 x 16 x 8 x 8,192 = 1,073,741,824; activations 4 x 256 x (4096 +
//! 2 x 4096 + 2 x 1024 + 2 x 14336 + 128 + 14336) + 4 x (4 x 256 x 4096) = 75,628,544.

use crate::model::spec::ModelSpec;
use crate::model::tensors::{TensorRole, TensorSpec};
use crate::plan::{BLOCK_TOKENS, KvPrecision, Precision, ReplicaLimits, ShardMemory};
use crate::units::{Bytes, LayerRange};

/// Matrices are packed in panels of so many outputs; the last panel is padded with zeros.
pub const PANEL_OUTPUTS: u64 = 16;

/// Activations are f32.
const F32: u64 = 4;

impl ReplicaLimits {
    /// The largest number of rows of one step of which logits are wanted: one for each sequence.
    pub fn sample_rows_max(&self) -> u32 {
        self.sequences_max.min(self.step_rows_max)
    }

    /// The hidden states of one step, which travel between stages.
    pub fn step_bytes(&self, hidden: u32) -> Bytes {
        Bytes(u64::from(self.step_rows_max) * u64::from(hidden) * F32)
    }

    /// What the steps of a shard take beside the scratch of its layers: the hidden states of each
    /// step in flight, and on the last stage the logits of one step.
    pub fn buffer_bytes(&self, hidden: u32, vocab: u32, is_last: bool) -> Bytes {
        let steps = self.step_bytes(hidden).0 * u64::from(self.steps_in_flight_max);
        let logits = u64::from(self.sample_rows_max()) * u64::from(vocab) * F32;
        Bytes(steps) + Bytes(if is_last { logits } else { 0 })
    }
}

/// How many values a row has in each buffer between the operations of a step; 0 where there is no
/// such buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScratchWidths {
    /// What a norm leaves, and a layer's result before it is added to the stream.
    pub hidden: u32,
    /// Queries.
    pub query: u32,
    /// What is cached of a position as key.
    pub key: u32,
    /// What is cached of it as value, where that is something else.
    pub value: u32,
    /// What attention leaves.
    pub attended: u32,
    /// The widest MLP or expert.
    pub intermediate: u32,
    /// The same of its gate.
    pub gate: u32,
    /// Cosines and sines; one buffer a rotation.
    pub angles: u32,
    /// How many rotations there are.
    pub ropes: u32,
    /// The router's logits.
    pub router: u32,
    /// Chosen experts and their weights.
    pub routes: u32,
    /// Rows of one expert, and the sum over experts: two of these.
    pub routed: u32,
    /// The compressed query.
    pub query_down: u32,
    /// Queries in the space of compressed keys.
    pub absorbed: u32,
    /// Attention's result out of the space of compressed values.
    pub values_out: u32,
}

impl ScratchWidths {
    /// The buffers: how wide, and how many of each.
    fn buffers(&self) -> [(u32, u32); 14] {
        [
            (self.hidden, 1),
            (self.query, 1),
            (self.key, 1),
            (self.value, 1),
            (self.attended, 1),
            (self.intermediate, 1),
            (self.gate, 1),
            (self.angles, self.ropes),
            (self.router, 1),
            (self.routes, 1),
            (self.routed, 2),
            (self.query_down, 1),
            (self.absorbed, 1),
            (self.values_out, 1),
        ]
    }

    /// The widest of them.
    pub fn widest(&self) -> u64 {
        self.buffers().iter().map(|(width, _)| u64::from(*width)).max().unwrap_or(0)
    }

    /// Values of a row in all buffers together, and in the device's copy of the widest input of a
    /// product, laid out for it.
    pub fn floats(&self) -> u64 {
        let buffers = self.buffers();
        let all = buffers.iter().map(|(width, count)| u64::from(*width) * u64::from(*count));
        all.sum::<u64>() + self.widest()
    }
}

impl Precision {
    /// What a matrix of this role is held in: MXFP4 is for experts alone.
    pub const fn of(self, role: TensorRole) -> Precision {
        match self {
            Precision::Mxfp4 if !role.is_expert_matrix() => Precision::Bf16,
            held => held,
        }
    }
}

impl TensorSpec {
    /// Bytes in memory when matrices are held in this precision, padding included.
    pub fn held_bytes(&self, precision: Precision) -> Bytes {
        match self.shape.as_slice() {
            [rows, columns] if self.is_matrix => Bytes(
                rows.next_multiple_of(PANEL_OUTPUTS) * precision.of(self.role).row_bytes(*columns),
            ),
            _ => Bytes(self.elements() * F32),
        }
    }
}

impl ModelSpec {
    /// The weights of a stage as they are held.
    pub fn weight_bytes(&self, layers: LayerRange, precision: Precision) -> Bytes {
        let held = |(tensor, count): &(TensorSpec, u32)| {
            Bytes(tensor.held_bytes(precision).0 * u64::from(*count))
        };
        self.tensor_kinds(layers).iter().map(held).sum()
    }

    /// The KV cache of a stage.
    pub fn kv_bytes(&self, layers: LayerRange, blocks: u32) -> Bytes {
        let positions = u64::from(blocks) * u64::from(BLOCK_TOKENS);
        Bytes(positions * u64::from(layers.len()) * self.kv_bytes_per_token_layer().0)
    }

    /// How wide the buffers between operations are.
    pub fn scratch_widths(&self) -> ScratchWidths {
        let any = |is_moe: bool| (0..self.layers).any(|layer| self.layer(layer).is_moe == is_moe);
        let moe = self.options.moe.filter(|_| any(true));
        let mla = self.options.mla;
        let attended = self.heads * self.cache_dim();
        let key = self.cache_heads() * self.cache_dim();
        let dense = if any(false) { self.intermediate } else { 0 };
        let experts = moe.map_or(0, |moe| moe.intermediate.max(moe.shared.unwrap_or(0)));
        ScratchWidths {
            hidden: self.hidden,
            query: self.query_width(),
            key,
            value: if mla.is_some() { 0 } else { key },
            attended,
            intermediate: dense.max(experts),
            gate: if self.options.gated { dense.max(experts) } else { 0 },
            angles: self.rotary_dim(),
            ropes: self.ropes().len() as u32,
            router: moe.map_or(0, |moe| moe.experts),
            routes: moe.map_or(0, |moe| 2 * moe.top_k),
            routed: if moe.is_some() { self.hidden } else { 0 },
            query_down: mla.and_then(|mla| mla.q_rank).unwrap_or(0),
            absorbed: if mla.is_some() { attended } else { 0 },
            values_out: mla.map_or(0, |mla| self.heads * mla.value),
        }
    }

    /// The same where keys and values are held in another precision.
    pub fn kv_bytes_held(&self, layers: LayerRange, blocks: u32, held: KvPrecision) -> Bytes {
        let positions = u64::from(blocks) * u64::from(BLOCK_TOKENS);
        let heads = 2 * u64::from(self.cache_heads()) * u64::from(layers.len());
        Bytes(positions * heads * held.vector_bytes(u64::from(self.cache_dim())))
    }

    /// The scratch between the operations of one step of at most `rows` rows; all layers of a shard
    /// share it.
    pub fn scratch_bytes(&self, rows: u32) -> Bytes {
        Bytes(u64::from(rows) * self.scratch_widths().floats() * F32)
    }

    /// Everything that one shard takes.
    pub fn shard_memory(
        &self,
        layers: LayerRange,
        precision: Precision,
        limits: &ReplicaLimits,
    ) -> ShardMemory {
        let is_last = layers.end == self.layers;
        ShardMemory {
            weights: self.weight_bytes(layers, precision),
            kv: self.kv_bytes(layers, limits.kv_blocks),
            activations: self.scratch_bytes(limits.step_rows_max)
                + limits.buffer_bytes(self.hidden, self.vocab, is_last),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: ReplicaLimits = ReplicaLimits {
        kv_blocks: 1024,
        context_max: 8192,
        step_rows_max: 256,
        sequences_max: 64,
        steps_in_flight_max: 4,
    };

    fn llama_8b() -> ModelSpec {
        ModelSpec::from_config_json(
            r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
                "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
                "num_hidden_layers": 32, "vocab_size": 128256, "rms_norm_eps": 1e-5,
                "max_position_embeddings": 131072}"#,
        )
        .expect("a valid config")
    }

    #[test]
    fn the_worked_example_is_right() {
        let memory = llama_8b().shard_memory(LayerRange::new(8, 16), Precision::Bf16, &LIMITS);
        assert_eq!(
            memory,
            ShardMemory {
                weights: Bytes(3_489_923_072),
                kv: Bytes(1_073_741_824),
                activations: Bytes(75_628_544),
            }
        );
    }

    #[test]
    fn the_last_stage_pays_for_logits_and_the_parts_add_up() {
        let spec = llama_8b();
        let memory =
            |start, end| spec.shard_memory(LayerRange::new(start, end), Precision::F16, &LIMITS);
        let logits = 64 * 128_256 * 4;
        assert_eq!(memory(30, 32).activations.0 - memory(0, 2).activations.0, logits);
        let parts = memory(0, 1).weights + memory(1, 31).weights + memory(31, 32).weights;
        assert_eq!(parts, memory(0, 32).weights);
    }

    #[test]
    fn a_cache_in_fewer_bits_takes_what_its_vectors_take() {
        let (spec, layers) = (llama_8b(), LayerRange::new(8, 16));
        let bytes = |held| spec.kv_bytes_held(layers, 1024, held).0;
        assert_eq!(bytes(KvPrecision::F32), spec.kv_bytes(layers, 1024).0);
        assert_eq!(bytes(KvPrecision::Bf16), 1_073_741_824 / 2);
        // 128 numbers and four scales of two bytes.
        assert_eq!(bytes(KvPrecision::Q8_0), 1024 * 16 * 8 * 8 * 2 * (128 + 8));
    }

    #[test]
    fn blocks_are_whole_and_rows_are_padded() {
        let matrix = |shape: [u64; 2]| TensorSpec {
            role: TensorRole::Up,
            layer: Some(0),
            index: 0,
            name: "up".into(),
            shape: shape.to_vec(),
            is_matrix: true,
            excerpt: None,
        };
        let held = |shape, precision| matrix(shape).held_bytes(precision).0;
        assert_eq!(held([17, 64], Precision::Q8_0), 32 * 2 * 34);
        assert_eq!(held([16, 65], Precision::Q4_0), 16 * 3 * 18);
        assert_eq!(held([16, 257], Precision::Q4K), 16 * 2 * 148);
        assert_eq!(held([16, 256], Precision::Q5K), 16 * 180);
        assert_eq!(held([16, 256], Precision::Q6K), 16 * 210);
        // MXFP4 is for experts alone.
        assert_eq!(held([16, 256], Precision::Mxfp4), 16 * 256 * 2);
        let expert = TensorSpec { role: TensorRole::ExpertUp, ..matrix([17, 40]) };
        assert_eq!(expert.held_bytes(Precision::Mxfp4).0, 32 * 2 * 17);
    }

    #[test]
    fn rows_are_padded_to_panels_and_a_tied_head_is_held_once() {
        let spec = ModelSpec { vocab: 259, hidden: 40, tied_embeddings: true, ..llama_8b() };
        let head = 272 * 40 * 2;
        let bytes = |start, end| spec.weight_bytes(LayerRange::new(start, end), Precision::Bf16).0;
        assert_eq!(bytes(0, 16) + bytes(16, 32), bytes(0, 32) + head);
    }
}
