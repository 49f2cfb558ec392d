//! The gated MLP: `down(silu(gate(x)) * up(x))`.

use crate::backend::{Linear, Ops};
use crate::collective::Collective;
use crate::model::ComputeError;
use crate::model::layers::{Joined, Scratch};

/// Its three projections.
pub struct Mlp<B: Ops> {
    /// `[intermediate, hidden]`.
    pub gate: Linear<B>,
    /// `[intermediate, hidden]`.
    pub up: Linear<B>,
    /// `[hidden, intermediate]`.
    pub down: Joined<B>,
}

impl<B: Ops> Mlp<B> {
    /// Adds the MLP of the normed rows in `scratch` to the stream.
    pub fn forward(
        &self,
        ops: &mut B,
        rows: usize,
        (scratch, peers): (&mut Scratch<B>, &mut dyn Collective),
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        ops.linear(&scratch.normed, rows, &self.gate, &mut scratch.gate)?;
        ops.linear(&scratch.normed, rows, &self.up, &mut scratch.up)?;
        ops.gate(&mut scratch.gate, &scratch.up, rows)?;
        let Scratch { gate, gated_by_all, normed, .. } = scratch;
        self.down.forward(ops, peers, (gate, rows), gated_by_all, normed)?;
        ops.add(&scratch.normed, rows, stream)
    }
}
