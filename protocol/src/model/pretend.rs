//! What a pretend model is: checked numbers, and the memory that it says it takes.

use crate::model::spec::SpecError;
use crate::plan::{BLOCK_TOKENS, PretendSpec, ReplicaLimits, ShardMemory};
use crate::units::{Bytes, LayerRange};

/// A row of activations carries 64 bits, 16 in each of its first floats.
pub const PRETEND_HIDDEN_MIN: u32 = 4;
/// Bytes that the cache of one layer keeps of one position.
const KV_BYTES: u64 = 8;

impl PretendSpec {
    /// Checks the numbers; errors name the field.
    pub fn check(&self) -> Result<(), SpecError> {
        for (field, value, min, max) in [
            ("layers", self.layers, 1, 1 << 10),
            ("hidden", self.hidden, PRETEND_HIDDEN_MIN, 1 << 17),
            ("vocab", self.vocab, 2, 1 << 22),
            ("max_context", self.max_context, 1, 1 << 24),
        ] {
            if !(min..=max).contains(&value) {
                return Err(SpecError::BadValue {
                    field,
                    value: value.to_string(),
                    expected: format!("a whole number from {min} to {max}"),
                });
            }
        }
        Ok(())
    }

    /// What a plan pins where a model with files has that of its checkpoint.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("shoal pretend model 1");
        for word in [self.layers, self.hidden, self.vocab, self.max_context] {
            hasher.update(&word.to_le_bytes());
        }
        for word in [self.seed, self.layer_step_ns, self.layer_row_ns, self.layer_weight_bytes] {
            hasher.update(&word.to_le_bytes());
        }
        *hasher.finalize().as_bytes()
    }

    /// What its cache takes.
    pub fn kv_bytes(&self, layers: LayerRange, blocks: u32) -> Bytes {
        let positions = u64::from(blocks) * u64::from(BLOCK_TOKENS);
        Bytes(positions * u64::from(layers.len()) * KV_BYTES)
    }

    /// What a stage takes; the weights are modelled, the rest is real.
    pub fn shard_memory(&self, layers: LayerRange, limits: &ReplicaLimits) -> ShardMemory {
        let count = u64::from(layers.len());
        ShardMemory {
            weights: Bytes(self.layer_weight_bytes.saturating_mul(count)),
            kv: self.kv_bytes(layers, limits.kv_blocks),
            activations: limits.buffer_bytes(self.hidden, self.vocab, layers.end == self.layers),
        }
    }
}
