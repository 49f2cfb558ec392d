//! Causal self-attention over a compressed cache (multi-head latent attention).
//!
//! ```text
//! x ─► (compress ─► norm ─►) query ─► each head: [ nope | rope ] ─► rotate rope, take nope to where keys
//!                                                                   are compressed ─► absorbed query
//! x ─► compress ─► [ latent | rope ] ─► norm the latent, rotate rope ─► cache: key and value in one
//! absorbed query · cache ─► attend ─► each head: take the latent part out ─► output
//! ```
//!
//! The cache holds one vector a position for all heads. It is written as key and as value: the value's
//! rotated part is weighed with the rest and then not used. Every tensor rank holds all of it, and
//! computes its own heads.

use crate::backend::{FamilyOps, HeadColumns, Linear, Norm, Turn};
use crate::collective::Collective;
use crate::model::layers::attention::no_rope;
use crate::model::layers::{Joined, Merge, Scores, Scratch};
use crate::model::{Batch, ComputeError};

/// The projections and their sizes.
pub struct LatentAttention<B: FamilyOps> {
    /// `[q rank, hidden]` and its norm, where queries are compressed.
    pub query_down: Option<(Linear<B>, Norm<B>)>,
    /// `[heads x (nope + rope), hidden or q rank]`.
    pub query: Linear<B>,
    /// `[kv rank + rope, hidden]`.
    pub kv_down: Linear<B>,
    /// Over the compressed part.
    pub kv_norm: Norm<B>,
    /// `[kv rank, nope]` for each head.
    pub key_up: Vec<B::Weight>,
    /// `[value, kv rank]` for each head.
    pub value_up: Vec<B::Weight>,
    /// `[hidden, heads x value]`.
    pub output: Joined<B>,
    /// The width of the compressed part.
    pub kv_rank: usize,
    /// The width of a query head without rotation, and of the rotated part.
    pub parts: (usize, usize),
    /// Which of the step's rotations, and whether adjacent dimensions are pairs.
    pub rope: (usize, bool),
    /// How scores become weights.
    pub scores: Scores<B>,
    /// How its result comes into the stream.
    pub merge: Merge<B>,
}

impl<B: FamilyOps> LatentAttention<B> {
    /// Adds the attention of the normed rows in `scratch` to the stream, as
    /// [`super::Attention::forward`] does.
    pub fn forward(
        &self,
        ops: &mut B,
        batch: &Batch<'_>,
        kv: &mut B::Kv,
        (scratch, peers): (&mut Scratch<B>, &mut dyn Collective),
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        let rows = batch.rows;
        let (heads, (nope, rotated)) = (self.key_up.len(), self.parts);
        let (rope, interleaved) = self.rope;
        let Scratch { normed, query, key, attended, attended_by_all, angles, latent, .. } =
            &mut *scratch;
        let angles = angles.get(rope).ok_or_else(|| no_rope(rope))?;
        let Some(latent) = latent else {
            return Err(ComputeError::BadBatch("no scratch for a compressed cache".into()));
        };
        match (&self.query_down, &mut latent.query_down) {
            (Some((down, norm)), Some(compressed)) => {
                ops.linear(normed, rows, down, compressed)?;
                ops.head_norm(compressed, rows, norm)?;
                ops.linear(compressed, rows, &self.query, query)?;
            }
            _ => ops.linear(normed, rows, &self.query, query)?,
        }
        let turn = Turn { head_dim: nope + rotated, first: nope, interleaved };
        ops.rope(query, rows, angles, turn)?;
        ops.linear(normed, rows, &self.kv_down, key)?;
        ops.norm_first(key, rows, &self.kv_norm)?;
        let turn = Turn { head_dim: self.kv_rank + rotated, first: self.kv_rank, interleaved };
        ops.rope(key, rows, angles, turn)?;
        ops.linear_heads(query, rows, &self.key_up, &mut latent.absorbed)?;
        let columns = HeadColumns { heads, from: nope, to: self.kv_rank, width: rotated };
        ops.copy_heads(query, rows, columns, &mut latent.absorbed)?;
        ops.kv_write(batch.spans, key, key, kv)?;
        ops.attend(batch.spans, &latent.absorbed, kv, &self.scores.attend(), attended)?;
        ops.linear_heads(attended, rows, &self.value_up, &mut latent.values)?;
        let values = (&mut latent.values, rows);
        self.output.forward(ops, peers, values, attended_by_all, normed)?;
        self.merge.forward(ops, rows, scratch, stream)
    }
}
