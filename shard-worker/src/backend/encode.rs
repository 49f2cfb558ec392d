//! What encoders ask of a device beyond [`FamilyOps`]: tables of positions and types, norms of the stream
//! in place, pooling.

use super::{FamilyOps, Norm};
use crate::model::{ComputeError, Span};

/// Which row of a sequence stands for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// The first.
    First,
    /// The last.
    Last,
    /// Their mean, summed in f64 in order of position and rounded once.
    Mean,
}

/// See the module. A row's bits depend on its own sequence alone, as everywhere.
pub trait EncodeOps: FamilyOps {
    /// `out[r] += table[rows[r]]`. A row beyond the table is refused.
    fn add_rows(
        &mut self,
        rows: &[u32],
        table: &Self::Weight,
        out: &mut Self::Stream<'_>,
    ) -> Result<(), ComputeError>;

    /// `x[r] = norm(x[r])`.
    fn norm_stream(
        &mut self,
        x: &mut Self::Stream<'_>,
        rows: usize,
        norm: &Norm<Self>,
    ) -> Result<(), ComputeError>;

    /// `x[r] = tanh(x[r])`.
    fn tanh(&mut self, x: &mut Self::Buf, rows: usize) -> Result<(), ComputeError>;

    /// One row for each span.
    fn pool(
        &mut self,
        x: &Self::Stream<'_>,
        spans: &[Span<'_>],
        pool: Pool,
        out: &mut Self::Buf,
    ) -> Result<(), ComputeError>;
}
