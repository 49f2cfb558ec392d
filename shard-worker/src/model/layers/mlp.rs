//! The MLP: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))`.

use shoal_protocol::model::{Activation, TensorRole};

use crate::backend::{FamilyOps, Linear};
use crate::collective::Collective;
use crate::model::ComputeError;
use crate::model::layers::{Joined, Merge, Scratch};

/// Its projections.
pub struct Mlp<B: FamilyOps> {
    /// `[intermediate, hidden]`, where it is gated.
    pub gate: Option<Linear<B>>,
    /// `[intermediate, hidden]`.
    pub up: Linear<B>,
    /// `[hidden, intermediate]`.
    pub down: Joined<B>,
    /// The intermediate width.
    pub width: usize,
    /// The nonlinearity.
    pub act: Activation,
    /// How its result comes into the stream.
    pub merge: Merge<B>,
}

impl<B: FamilyOps> Mlp<B> {
    /// Adds the MLP of the normed rows in `scratch` to the stream.
    pub fn forward(
        &self,
        ops: &mut B,
        rows: usize,
        (scratch, peers): (&mut Scratch<B>, &mut dyn Collective),
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        self.first_half(ops, rows, scratch)?;
        self.second_half(ops, rows, (scratch, peers), stream)
    }

    /// The first half alone: what attention leaves in `scratch` afterwards may replace the normed rows.
    pub fn first_half(
        &self,
        ops: &mut B,
        rows: usize,
        scratch: &mut Scratch<B>,
    ) -> Result<(), ComputeError> {
        let Scratch { normed, gate, up, adapters, .. } = &mut *scratch;
        ops.reshape(up, self.width)?;
        ops.linear(normed, rows, &self.up, up)?;
        adapters.add(ops, TensorRole::Up, normed, up)?;
        let Some(linear) = &self.gate else {
            return ops.activate(up, rows, self.act);
        };
        ops.reshape(gate, self.width)?;
        ops.linear(normed, rows, linear, gate)?;
        adapters.add(ops, TensorRole::Gate, normed, gate)?;
        ops.gate(gate, up, rows, self.act)
    }

    /// The second half, out of what the first one left.
    pub fn second_half(
        &self,
        ops: &mut B,
        rows: usize,
        (scratch, peers): (&mut Scratch<B>, &mut dyn Collective),
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        let Scratch { gate, up, gated_by_all, normed, adapters, .. } = &mut *scratch;
        let inner = if self.gate.is_some() { gate } else { up };
        let adapted = Some((adapters, TensorRole::Down));
        self.down.forward_with(ops, peers, (inner, rows), (gated_by_all, adapted), normed)?;
        self.merge.forward(ops, rows, scratch, stream)
    }
}
