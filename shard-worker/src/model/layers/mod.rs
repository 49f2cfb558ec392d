//! The layers that families are assembled from, each written once on [`Ops`](crate::backend::Ops).
//!
//! ```text
//! tokens ─► embedding ─► stream ─┬─► norm ─► attention ─┬─► + ─┬─► norm ─► mlp ─┬─► + ─► …
//!                                └──────────────────────┘      └────────────────┘
//! stream (sample rows) ─► head: norm ─► logits
//! ```
//!
//! A norm leaves its rows in [`Scratch`]; attention and mlp read them there and leave their result
//! there, and [`Merge`] adds it to the stream. Some families normalise the result too, or instead, and
//! some have a mixture of experts for the mlp.

mod attention;
mod broad_norm;
mod embedding;
mod head;
mod joined;
mod latent;
mod merge;
mod mlp;
mod moe;
mod norm;
mod rope;

#[cfg(test)]
mod layers_test;

pub use attention::{Attention, Scores};
pub use broad_norm::{BroadNorm, HeadNorms};
pub use embedding::Embedding;
pub use head::Head;
pub use joined::{Cut, Gathered, Joined};
pub use latent::LatentAttention;
pub use merge::Merge;
pub use mlp::Mlp;
pub use moe::{Expert, Holders, Inner, Moe, Shared};
pub use norm::PreNorm;
pub use rope::{Rope, inverse_frequencies};

use shoal_protocol::model::{ModelSpec, Part};

use broad_norm::HeadsOfAll;

use crate::backend::{BackendError, FamilyOps};
use crate::model::adapters::Adapters;

/// The buffers between the operations of a step, allocated once and shared by all layers of a
/// shard.
pub struct Scratch<B: FamilyOps> {
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
    /// As wide as the widest MLP or expert, where that has a gate.
    gate: B::Buf,
    /// As wide.
    up: B::Buf,
    /// One a rotation, as wide as what is rotated of a head: cosines, then sines.
    angles: Vec<B::Buf>,
    /// `experts` wide: the router's logits.
    router: B::Buf,
    /// `2 x top_k` wide: chosen experts and their weights.
    routes: B::Buf,
    /// `hidden` wide: the rows of one expert.
    routed: B::Buf,
    /// `hidden` wide: the sum over experts.
    sum: B::Buf,
    /// Where the cache is compressed.
    latent: Option<Latent<B>>,
    /// `attended` of all ranks.
    attended_by_all: Gathered<B>,
    /// The gated input of `down` of all ranks.
    gated_by_all: Gathered<B>,
    /// Queries and keys of all ranks, where one norm is over all of them.
    heads_of_all: HeadsOfAll<B>,
    /// What is added to projections, and which rows of this step it is added to.
    pub(in crate::model) adapters: Adapters<B>,
}

/// What attention over a compressed cache needs beyond the rest.
struct Latent<B: FamilyOps> {
    /// The compressed query.
    query_down: Option<B::Buf>,
    /// `heads x (kv rank + rope)` wide.
    absorbed: B::Buf,
    /// `heads x value` wide.
    values: B::Buf,
}

impl<B: FamilyOps> Scratch<B> {
    /// Buffers of one rank for steps of at most `rows_max` rows; they and the device's own scratch for
    /// products with them are counted in [`Part::memory`].
    pub fn new(
        ops: &mut B,
        spec: &ModelSpec,
        part: &Part,
        rows_max: usize,
    ) -> Result<Self, BackendError> {
        let joint = part.joint_widths(spec);
        let attended_by_all = Gathered::new(ops, (joint.attended, joint.outputs), rows_max)?;
        let gated_by_all = Gathered::new(ops, (joint.gated, joint.outputs), rows_max)?;
        let heads_of_all = HeadsOfAll::new(ops, (joint.query, joint.key), rows_max)?;
        let width = part.widths(spec).scratch_widths();
        // What a model does not need is one value, which nobody counts.
        let mut buffer = |width: u32| match width {
            0 => ops.buffer(1, 1),
            width => ops.buffer(rows_max, width as usize),
        };
        let latent = if spec.options.mla.is_some() {
            let down = Some(width.query_down).filter(|width| *width > 0);
            Some(Latent {
                query_down: down.map(&mut buffer).transpose()?,
                absorbed: buffer(width.absorbed)?,
                values: buffer(width.values_out)?,
            })
        } else {
            None
        };
        Ok(Self {
            rows_max,
            normed: buffer(width.hidden)?,
            query: buffer(width.query)?,
            key: buffer(width.key)?,
            value: buffer(width.value)?,
            attended: buffer(width.attended)?,
            gate: buffer(width.gate)?,
            up: buffer(width.intermediate)?,
            angles: (0..width.ropes).map(|_| buffer(width.angles)).collect::<Result<_, _>>()?,
            router: buffer(width.router)?,
            routes: buffer(width.routes)?,
            routed: buffer(width.routed)?,
            sum: buffer(width.routed)?,
            latent,
            attended_by_all,
            gated_by_all,
            heads_of_all,
            adapters: Adapters::new(rows_max),
        })
    }

    /// The most rows of a step.
    pub fn rows_max(&self) -> usize {
        self.rows_max
    }
}
