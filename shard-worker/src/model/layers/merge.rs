//! How a layer's result comes into the stream: the one place where it is added.

use crate::backend::{FamilyOps, Norm};
use crate::model::ComputeError;
use crate::model::layers::Scratch;

/// What happens to the result of attention or MLP on its way. Partial results of tensor ranks are
/// summed before.
pub struct Merge<B: FamilyOps> {
    /// Normalises it first.
    pub norm: Option<Norm<B>>,
    /// Multiplies it.
    pub multiplier: f32,
}

impl<B: FamilyOps> Merge<B> {
    /// Adds it as it is.
    pub fn plain() -> Self {
        Self { norm: None, multiplier: 1.0 }
    }

    /// Adds the result that was left in `scratch` to the stream.
    pub fn forward(
        &self,
        ops: &mut B,
        rows: usize,
        scratch: &mut Scratch<B>,
        stream: &mut B::Stream<'_>,
    ) -> Result<(), ComputeError> {
        if let Some(norm) = &self.norm {
            ops.head_norm(&mut scratch.normed, rows, norm)?;
        }
        if self.multiplier != 1.0 {
            ops.scale(&mut scratch.normed, rows, self.multiplier)?;
        }
        ops.add(&scratch.normed, rows, stream)
    }
}
