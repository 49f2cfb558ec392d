//! The stream's last rows to logits.

use crate::backend::{Norm, Ops, RowSet};
use crate::model::ComputeError;
use crate::model::layers::Scratch;

/// The norm in front of the output head.
pub struct Head<B: Ops> {
    /// Over the stream.
    pub norm: Norm<B>,
}

impl<B: Ops> Head<B> {
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
        ops.logits(&scratch.normed, sample_rows.len(), weight, logits)
    }
}
