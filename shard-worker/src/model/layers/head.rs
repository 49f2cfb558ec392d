//! The stream's last rows to logits.

use crate::backend::{FamilyOps, Norm, RowSet};
use crate::model::ComputeError;
use crate::model::layers::Scratch;

/// The norm in front of the output head, and what is done to logits behind it.
pub struct Head<B: FamilyOps> {
    /// Over the stream.
    pub norm: Norm<B>,
    /// Multiplies logits.
    pub multiplier: f32,
    /// Logits are `cap * tanh(logit / cap)`.
    pub softcap: Option<f32>,
}

impl<B: FamilyOps> Head<B> {
    /// Leaves logits as they are.
    pub fn plain(norm: Norm<B>) -> Self {
        Self { norm, multiplier: 1.0, softcap: None }
    }

    /// Logits of the rows that are sampled, `sample_rows.len() x vocab`. `weight` is
    /// `[vocab, hidden]`: the embedding's table where the two are tied.
    pub fn forward(
        &self,
        ops: &mut B,
        weight: &B::Weight,
        stream: &B::Stream<'_>,
        sample_rows: &[usize],
        (scratch, logits): (&mut Scratch<B>, &mut [f32]),
    ) -> Result<(), ComputeError> {
        ops.rms_norm(stream, RowSet::Of(sample_rows), &self.norm, &mut scratch.normed)?;
        ops.logits(&scratch.normed, sample_rows.len(), weight, logits)?;
        if self.multiplier != 1.0 || self.softcap.is_some() {
            ops.shape_logits(logits, self.multiplier, self.softcap)?;
        }
        Ok(())
    }
}
