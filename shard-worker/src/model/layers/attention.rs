//! Self-attention with grouped heads over a paged cache.

use shoal_protocol::model::TensorRole;

use crate::backend::{Attend, FamilyOps, Linear, Turn};
use crate::collective::Collective;
use crate::model::layers::{HeadNorms, Joined, Merge, Scratch};
use crate::model::{Batch, ComputeError};

/// Projections, the optional norms of queries and keys, the rotation, and how scores become weights.
///
/// How many heads there are follows from the widths of the projections and of the cache.
pub struct Attention<B: FamilyOps> {
    /// `[heads x head_dim, hidden]`.
    pub query: Linear<B>,
    /// `[kv_heads x head_dim, hidden]`.
    pub key: Linear<B>,
    /// `[kv_heads x head_dim, hidden]`.
    pub value: Linear<B>,
    /// Before the rotation.
    pub norms: HeadNorms<B>,
    /// `[hidden, heads x head_dim]`.
    pub output: Joined<B>,
    /// Which of the step's rotations, and how it turns a head; `None` for a layer without positions.
    pub rope: Option<(usize, Turn)>,
    /// How scores become weights.
    pub scores: Scores<B>,
    /// How its result comes into the stream.
    pub merge: Merge<B>,
}

/// How scores become weights; see [`Attend`].
pub struct Scores<B: FamilyOps> {
    /// Multiplies each score.
    pub scale: f32,
    /// Caps it.
    pub softcap: Option<f32>,
    /// How many positions a query sees.
    pub window: Option<u32>,
    /// How many positions behind its own it sees: 0 in decoders.
    pub ahead: u32,
    /// One for each head.
    pub sinks: Option<B::Vector>,
}

impl<B: FamilyOps> Scores<B> {
    /// Nothing but a scale.
    pub fn plain(scale: f32) -> Self {
        Self { scale, softcap: None, window: None, ahead: 0, sinks: None }
    }

    pub(super) fn attend(&self) -> Attend<'_, B> {
        let Self { scale, softcap, window, ahead, .. } = *self;
        Attend { scale, softcap, window, ahead, sinks: self.sinks.as_ref() }
    }
}

impl<B: FamilyOps> Attention<B> {
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
        let Scratch { normed, query, key, value, adapters, .. } = &mut *scratch;
        for (role, linear, out) in [
            (TensorRole::Query, &self.query, query),
            (TensorRole::Key, &self.key, key),
            (TensorRole::Value, &self.value, value),
        ] {
            ops.linear(normed, rows, linear, out)?;
            adapters.add(ops, role, normed, out)?;
        }
        let Scratch { query, key, heads_of_all, .. } = &mut *scratch;
        self.norms.forward(ops, peers, rows, (query, key), heads_of_all)?;
        if let Some((rope, turn)) = self.rope {
            let angles = scratch.angles.get(rope).ok_or_else(|| no_rope(rope))?;
            ops.rope(&mut scratch.query, rows, angles, turn)?;
            ops.rope(&mut scratch.key, rows, angles, turn)?;
        }
        ops.kv_write(batch.spans, &scratch.key, &scratch.value, kv)?;
        let how = self.scores.attend();
        ops.attend(batch.spans, &scratch.query, kv, &how, &mut scratch.attended)?;
        let Scratch { attended, attended_by_all, normed, adapters, .. } = &mut *scratch;
        let adapted = Some((adapters, TensorRole::AttentionOutput));
        self.output.forward_with(
            ops,
            peers,
            (attended, rows),
            (attended_by_all, adapted),
            normed,
        )?;
        self.merge.forward(ops, rows, scratch, stream)
    }
}

/// A layer asked for a rotation that its model does not have; assembling it was a bug.
pub(super) fn no_rope(rope: usize) -> ComputeError {
    ComputeError::BadBatch(format!("rotation {rope} is not among those of the step"))
}
