//! What stands in front of attention and of the MLP.

use crate::backend::{FamilyOps, Norm, RowSet};
use crate::model::ComputeError;
use crate::model::layers::Scratch;

/// Normalises the stream for the layer that follows it; `None` hands it on as it is.
pub struct PreNorm<B: FamilyOps>(pub Option<Norm<B>>);

impl<B: FamilyOps> PreNorm<B> {
    /// Leaves the norm of the stream's first `rows` rows in `scratch`.
    pub fn forward(
        &self,
        ops: &mut B,
        stream: &B::Stream<'_>,
        rows: usize,
        scratch: &mut Scratch<B>,
    ) -> Result<(), ComputeError> {
        match &self.0 {
            Some(norm) => ops.rms_norm(stream, RowSet::First(rows), norm, &mut scratch.normed),
            None => ops.copy_stream(stream, rows, &mut scratch.normed),
        }
    }
}
