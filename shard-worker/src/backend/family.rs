//! Operations that the layers of some families need beyond [`Ops`]: shaping, mixtures of experts, and
//! attention over a compressed cache.

use shoal_protocol::model::{Activation, Moe};

use super::{Norm, Ops};
use crate::model::ComputeError;

/// See the module. The rules of [`Ops`] hold: nothing is allocated, and what does not fit is
/// [`ComputeError::BadBatch`].
pub trait FamilyOps: Ops {
    /// `x[r] = act(x[r])`; refused for activations that are made of two.
    fn activate(
        &mut self,
        x: &mut Self::Buf,
        rows: usize,
        act: Activation,
    ) -> Result<(), ComputeError>;

    /// `x[r] *= factor`.
    fn scale(&mut self, x: &mut Self::Buf, rows: usize, factor: f32) -> Result<(), ComputeError>;

    /// The same of the stream's first `rows` rows.
    fn scale_stream(
        &mut self,
        x: &mut Self::Stream<'_>,
        rows: usize,
        factor: f32,
    ) -> Result<(), ComputeError>;

    /// `out[r] = x[r]` of the stream's first `rows` rows.
    fn copy_stream(
        &mut self,
        x: &Self::Stream<'_>,
        rows: usize,
        out: &mut Self::Buf,
    ) -> Result<(), ComputeError>;

    /// `logits = cap * tanh(logits * factor / cap)`, or `logits * factor` without a cap.
    fn shape_logits(
        &mut self,
        logits: &mut [f32],
        factor: f32,
        cap: Option<f32>,
    ) -> Result<(), ComputeError>;

    // --- Mixtures of experts.

    /// Makes a buffer one of rows of another width, as many as fit. What it holds is lost.
    fn reshape(&mut self, buf: &mut Self::Buf, width: usize) -> Result<(), ComputeError>;

    /// Chooses each row's experts by its router logits, `rows x experts`, which are overwritten.
    /// `routes` is `rows x (2 x top_k)`: the ids, ascending, then their weights in the same order.
    fn route(
        &mut self,
        logits: &mut Self::Buf,
        rows: usize,
        how: &Router<'_, Self>,
        routes: &mut Self::Buf,
    ) -> Result<(), ComputeError>;

    /// Copies the rows that chose an expert to `out`, in order; how many they are. `chosen` is what
    /// [`FamilyOps::route`] left, and the expert's id.
    fn gather(
        &mut self,
        x: &Self::Buf,
        rows: usize,
        chosen: (&Self::Buf, u32),
        out: &mut Self::Buf,
    ) -> Result<usize, ComputeError>;

    /// `sum[r] = fma(weight, x[i], sum[r])` for each row `r` that chose the expert, the
    /// `i`-th of them.
    fn scatter_add(
        &mut self,
        x: &Self::Buf,
        rows: usize,
        chosen: (&Self::Buf, u32),
        sum: &mut Self::Buf,
    ) -> Result<(), ComputeError>;

    /// Makes the first `rows` rows zero.
    fn clear(&mut self, x: &mut Self::Buf, rows: usize) -> Result<(), ComputeError>;

    /// `sum[r] += x[r]`, or `sum[r] = fma(sigmoid(gate[r]), x[r], sum[r])`; `gate` is one value a row.
    fn add_gated(
        &mut self,
        x: &Self::Buf,
        rows: usize,
        gate: Option<&Self::Buf>,
        sum: &mut Self::Buf,
    ) -> Result<(), ComputeError>;

    // --- Attention over a compressed cache.

    /// A product for each head: `out[r][h][to..] = weights[h] · x[r][h][..]`. A head of `x` and of
    /// `out` is as wide as their rows by the number of weights; what is beside the columns and the
    /// outputs of a weight is left alone.
    fn linear_heads(
        &mut self,
        x: &Self::Buf,
        rows: usize,
        weights: &[Self::Weight],
        out: &mut Self::Buf,
    ) -> Result<(), ComputeError>;

    /// Copies `width` values from `from` on of each of `heads` heads to the same number of them from
    /// `to` on.
    fn copy_heads(
        &mut self,
        x: &Self::Buf,
        rows: usize,
        columns: HeadColumns,
        out: &mut Self::Buf,
    ) -> Result<(), ComputeError>;

    /// Normalises the first values of each row, as many as the norm's weight has, in place.
    fn norm_first(
        &mut self,
        x: &mut Self::Buf,
        rows: usize,
        norm: &Norm<Self>,
    ) -> Result<(), ComputeError>;

    // --- Adapters.

    /// `out[i] = x[rows[i]]`.
    fn take_rows(
        &mut self,
        x: &Self::Buf,
        rows: &[usize],
        out: &mut Self::Buf,
    ) -> Result<(), ComputeError>;

    /// `out[rows[i]] += x[i]`; no row stands in the list twice.
    fn add_to_rows(
        &mut self,
        x: &Self::Buf,
        rows: &[usize],
        out: &mut Self::Buf,
    ) -> Result<(), ComputeError>;
}

/// How rows choose experts.
pub struct Router<'a, B: Ops> {
    /// The shape of the mixture.
    pub moe: Moe,
    /// What is added to scores for the choice.
    pub correction: Option<&'a B::Vector>,
}

/// Which values of each head are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadColumns {
    /// How many heads both have.
    pub heads: usize,
    /// The first value of a head of the input.
    pub from: usize,
    /// The first value of a head of the output.
    pub to: usize,
    /// How many values.
    pub width: usize,
}
