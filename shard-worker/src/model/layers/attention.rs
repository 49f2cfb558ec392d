//! Causal self-attention with grouped heads over a paged cache.

use crate::backend::{Linear, Norm, Ops};
use crate::collective::Collective;
use crate::model::layers::{Joined, Scratch};
use crate::model::{Batch, ComputeError};

/// Projections, the optional norms over heads, and the scale of the scores.
///
/// How many heads there are follows from the widths of the projections and of the cache.
pub struct Attention<B: Ops> {
    /// `[heads x head_dim, hidden]`.
    pub query: Linear<B>,
    /// `[kv_heads x head_dim, hidden]`.
    pub key: Linear<B>,
    /// `[kv_heads x head_dim, hidden]`.
    pub value: Linear<B>,
    /// Over each query head, before the rotation.
    pub query_norm: Option<Norm<B>>,
    /// Over each key head, before the rotation.
    pub key_norm: Option<Norm<B>>,
    /// `[hidden, heads x head_dim]`.
    pub output: Joined<B>,
    /// Multiplies each score: see [`Attention::scale_of`].
    pub scale: f32,
}

impl<B: Ops> Attention<B> {
    /// `1 / sqrt(head_dim)`, rounded once.
    pub fn scale_of(head_dim: u32) -> f32 {
        (1.0 / f64::from(head_dim).sqrt()) as f32
    }

    /// Adds the attention of the normed rows in `scratch` to the stream. The rows' keys and values
    /// are in the cache afterwards; the angles must have been left in `scratch` by
    /// [`super::Rope::prepare`] in this step.
    pub fn forward(
        &self,
        ops: &mut B,
        batch: &Batch<'_>,
        kv: &mut B::Kv,
        (scratch, peers): (&mut Scratch<B>, &mut dyn Collective),
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        let rows = batch.rows;
        ops.linear(&scratch.normed, rows, &self.query, &mut scratch.query)?;
        ops.linear(&scratch.normed, rows, &self.key, &mut scratch.key)?;
        ops.linear(&scratch.normed, rows, &self.value, &mut scratch.value)?;
        if let Some(norm) = &self.query_norm {
            ops.head_norm(&mut scratch.query, rows, norm)?;
        }
        if let Some(norm) = &self.key_norm {
            ops.head_norm(&mut scratch.key, rows, norm)?;
        }
        ops.rope(&mut scratch.query, rows, &scratch.angles)?;
        ops.rope(&mut scratch.key, rows, &scratch.angles)?;
        ops.kv_write(batch.spans, &scratch.key, &scratch.value, kv)?;
        ops.attend(batch.spans, &scratch.query, kv, self.scale, &mut scratch.attended)?;
        let Scratch { attended, attended_by_all, normed, .. } = scratch;
        self.output.forward(ops, peers, (attended, rows), attended_by_all, normed)?;
        ops.add(&scratch.normed, rows, stream)
    }
}
