//! The layers that families are assembled from, each written once on [`Ops`].
//!
//! ```text
//! tokens ─► embedding ─► stream ─┬─► norm ─► attention ─┬─► + ─┬─► norm ─► mlp ─┬─► + ─► …
//!                                └──────────────────────┘      └────────────────┘
//! stream (sample rows) ─► head: norm ─► logits
//! ```
//!
//! A norm leaves its rows in [`Scratch`]; attention and mlp read them there and add their result to
//! the stream.

mod attention;
mod embedding;
mod head;
mod joined;
mod mlp;
mod norm;
mod rope;

#[cfg(test)]
mod layers_test;

pub use attention::Attention;
pub use embedding::Embedding;
pub use head::Head;
pub use joined::{Cut, Gathered, Joined};
pub use mlp::Mlp;
pub use norm::PreNorm;
pub use rope::{Rope, inverse_frequencies};

use shoal_protocol::model::{ModelSpec, Part};

use crate::backend::{BackendError, Ops};

/// The buffers between the operations of a step, allocated once and shared by all layers of a
/// shard.
pub struct Scratch<B: Ops> {
    rows_max: usize,
    /// `hidden` wide: what a norm leaves, and a layer's result before it is added to the stream.
    normed: B::Buf,
    /// `heads x head_dim` wide.
    query: B::Buf,
    /// `kv_heads x head_dim` wide.
    key: B::Buf,
    /// `kv_heads x head_dim` wide.
    value: B::Buf,
    /// `heads x head_dim` wide.
    attended: B::Buf,
    /// `intermediate` wide.
    gate: B::Buf,
    /// `intermediate` wide.
    up: B::Buf,
    /// `head_dim` wide: cosines, then sines.
    angles: B::Buf,
    /// `attended` of all ranks.
    attended_by_all: Gathered<B>,
    /// The gated input of `down` of all ranks.
    gated_by_all: Gathered<B>,
}

impl<B: Ops> Scratch<B> {
    /// Buffers of one rank for steps of at most `rows_max` rows; they and the device's own scratch for
    /// products with them are counted in [`Part::memory`].
    pub fn new(
        ops: &mut B,
        spec: &ModelSpec,
        part: &Part,
        rows_max: usize,
    ) -> Result<Self, BackendError> {
        let width = Widths::of(&part.widths(spec));
        Ok(Self {
            rows_max,
            normed: ops.buffer(rows_max, width.hidden)?,
            query: ops.buffer(rows_max, width.query)?,
            key: ops.buffer(rows_max, width.key)?,
            value: ops.buffer(rows_max, width.key)?,
            attended: ops.buffer(rows_max, width.query)?,
            gate: ops.buffer(rows_max, width.intermediate)?,
            up: ops.buffer(rows_max, width.intermediate)?,
            angles: ops.buffer(rows_max, width.head)?,
            attended_by_all: Gathered::new(ops, part, spec.query_width(), rows_max)?,
            gated_by_all: Gathered::new(ops, part, spec.intermediate, rows_max)?,
        })
    }

    /// The most rows of a step.
    pub fn rows_max(&self) -> usize {
        self.rows_max
    }
}

/// How wide a row is at each place.
struct Widths {
    hidden: usize,
    query: usize,
    key: usize,
    intermediate: usize,
    head: usize,
}

impl Widths {
    fn of(spec: &ModelSpec) -> Self {
        Self {
            hidden: spec.hidden as usize,
            query: spec.heads as usize * spec.head_dim as usize,
            key: spec.kv_heads as usize * spec.head_dim as usize,
            intermediate: spec.intermediate as usize,
            head: spec.head_dim as usize,
        }
    }
}
