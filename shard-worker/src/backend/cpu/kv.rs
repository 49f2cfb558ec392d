//! The paged keys and values of one layer.
//!
//! ```text
//! block:  [kv_head][ K: head_dim x 16 slots | V: 16 slots x head_dim ]
//! ```
//!
//! In which type is [`kv_format`](super::kv_format)'s affair.
//!
//! Keys lie dimension by dimension, so that one vector holds a dimension of all 16 positions of a
//! block and the scores of a block are 16 chains in one register; values lie slot by slot, so that
//! a weighted sum runs over whole rows.

use shoal_protocol::plan::{BLOCK_TOKENS, KvPrecision};

use super::kv_format::{KvFormat, part_bytes, with_kv};
use super::memory::Mapped;
use super::simd::LANES;
use crate::backend::{BackendError, KvShape};
use crate::model::{ComputeError, Span};

/// Positions of a block: as many as a vector has lanes.
pub const SLOTS: usize = BLOCK_TOKENS as usize;
const _: () = assert!(SLOTS == LANES, "a block's scores are one vector");

/// See the module.
pub struct PagedKv {
    memory: Mapped,
    shape: KvShape,
    held: KvPrecision,
}

impl PagedKv {
    /// Memory for all blocks; pages are taken when a block is first written.
    pub fn new(shape: KvShape, held: KvPrecision) -> Result<Self, BackendError> {
        if shape.blocks == 0 || shape.kv_heads == 0 || shape.head_dim == 0 {
            return Err(BackendError::BadShape {
                what: "KV cache",
                why: format!("{shape:?} has a zero"),
            });
        }
        let bytes = (shape.blocks as usize)
            .checked_mul(shape.kv_heads as usize)
            // More than any part of a head has, so that its bytes can be counted.
            .filter(|n| n.checked_mul(16 * SLOTS * shape.head_dim as usize).is_some())
            .and_then(|n| n.checked_mul(part_bytes(held, shape.head_dim as usize)))
            // A vector load of the last value's row may reach this far beyond it.
            .and_then(|n| n.checked_add(4 * LANES))
            .ok_or_else(|| BackendError::BadShape {
                what: "KV cache",
                why: format!("{shape:?} is larger than any memory"),
            })?;
        Ok(Self { memory: Mapped::new("KV cache", bytes)?, shape, held })
    }

    /// Its shape.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// How keys and values are held.
    pub fn held(&self) -> KvPrecision {
        self.held
    }

    /// Bytes of a head's part of a block.
    fn part_bytes(&self) -> usize {
        part_bytes(self.held, self.shape.head_dim as usize)
    }

    fn offset(&self, block: u32, head: usize) -> usize {
        assert!(block < self.shape.blocks, "checked by the caller");
        (block as usize * self.shape.kv_heads as usize + head) * self.part_bytes()
    }

    /// The keys of a head in a block, `head_dim x 16`.
    pub(super) fn keys(&self, block: u32, head: usize) -> *const u8 {
        // In bounds: see `offset`; `wrapping_add` leaves the proof to the access.
        self.memory.as_ptr::<u8>().wrapping_add(self.offset(block, head))
    }

    /// The values of a head in a block, `16 x head_dim`, readable for 16 values beyond.
    pub(super) fn values(&self, block: u32, head: usize) -> *const u8 {
        self.keys(block, head).wrapping_add(self.part_bytes() / 2)
    }

    /// Whether the spans' blocks exist and cover their positions.
    pub fn check(&self, spans: &[Span<'_>]) -> Result<(), ComputeError> {
        for span in spans.iter().filter(|span| span.rows > 0) {
            let needed = (span.first_position as usize + span.rows).div_ceil(SLOTS);
            if span.blocks.len() < needed {
                return Err(ComputeError::BadBatch(format!(
                    "{} rows from position {} need {needed} blocks, the span has {}",
                    span.rows,
                    span.first_position,
                    span.blocks.len()
                )));
            }
            if let Some(block) = span.blocks[..needed].iter().find(|b| **b >= self.shape.blocks) {
                return Err(ComputeError::BadBatch(format!(
                    "block {block}; the cache has {}",
                    self.shape.blocks
                )));
            }
        }
        Ok(())
    }

    /// Writes the rows of checked spans; `keys` and `values` are `rows x (kv_heads x head_dim)`.
    pub fn write(&mut self, spans: &[Span<'_>], keys: &[f32], values: &[f32]) {
        let dim = self.shape.head_dim as usize;
        let width = dim * self.shape.kv_heads as usize;
        for span in spans {
            for i in 0..span.rows {
                let position = span.first_position as usize + i;
                let (block, slot) = (span.blocks[position / SLOTS], position % SLOTS);
                let row = (span.first_row + i) * width;
                let heads = keys[row..row + width].chunks_exact(dim);
                let heads = heads.zip(values[row..row + width].chunks_exact(dim));
                for (head, (keys, values)) in heads.enumerate() {
                    let at = self.offset(block, head);
                    let length = self.part_bytes();
                    // SAFETY: `offset` checks the block; a head's part of a block is
                    // `part_bytes` long and inside the memory.
                    let part = unsafe {
                        std::slice::from_raw_parts_mut(
                            self.memory.as_mut_ptr::<u8>().add(at),
                            length,
                        )
                    };
                    with_kv!(self.held, K => K::write(part, slot, keys, values));
                }
            }
        }
    }
}
