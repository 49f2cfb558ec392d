//! The gated MLP: `down(silu(gate(x)) * up(x))`.

use crate::backend::{Linear, Ops};
use crate::model::ComputeError;
use crate::model::layers::Scratch;

/// Its three projections.
pub struct Mlp<B: Ops> {
    /// `[intermediate, hidden]`.
    pub gate: Linear<B>,
    /// `[intermediate, hidden]`.
    pub up: Linear<B>,
    /// `[hidden, intermediate]`.
    pub down: Linear<B>,
}

impl<B: Ops> Mlp<B> {
    /// Adds the MLP of the normed rows in `scratch` to the stream.
    pub fn forward(
        &self,
        ops: &mut B,
        rows: usize,
        scratch: &mut Scratch<B>,
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        ops.linear(&scratch.normed, rows, &self.gate, &mut scratch.gate)?;
        ops.linear(&scratch.normed, rows, &self.up, &mut scratch.up)?;
        ops.gate(&mut scratch.gate, &scratch.up, rows)?;
        ops.linear(&scratch.gate, rows, &self.down, &mut scratch.normed)?;
        ops.add(&scratch.normed, rows, stream)
    }
}
