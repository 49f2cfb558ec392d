//! The norm in front of attention and of the MLP.

use crate::backend::{Norm, Ops, RowSet};
use crate::model::ComputeError;
use crate::model::layers::Scratch;

/// Normalises the stream for the layer that follows it.
pub struct PreNorm<B: Ops>(pub Norm<B>);

impl<B: Ops> PreNorm<B> {
    /// Leaves the norm of the stream's first `rows` rows in `scratch`.
    pub fn forward(
        &self,
        ops: &mut B,
        stream: &B::Stream<'_>,
        rows: usize,
        scratch: &mut Scratch<B>,
    ) -> Result<(), ComputeError> {
        ops.rms_norm(stream, RowSet::First(rows), &self.0, &mut scratch.normed)
    }
}
