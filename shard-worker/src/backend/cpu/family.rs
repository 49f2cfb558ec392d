//! [`FamilyOps`] on the CPU.

use shoal_protocol::model::Activation;

use super::check::expect_some_rows;
use super::experts::{RouteRow, chosen};
use super::isa::Kernel;
use super::linear::{SharedMut, one_row};
use super::math::{gelu, gelu_tanh, silu, softcap, tanh};
use super::rows::{Add, NormRow, by_lanes};
use super::simd::{LANES, Simd};
use super::{
    ALONE_STEPS_MAX, CpuBuf, CpuOps, CpuStream, Packed, bad, expect, expect_rows, heads_of,
    rows_of, spread,
};
use crate::backend::pool::Share;
use crate::backend::{FamilyOps, HeadColumns, Norm, Router};
use crate::model::ComputeError;

/// A norm whose sizes were checked.
#[derive(Clone, Copy)]
pub(super) struct NormOf<'a> {
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    centred: bool,
    eps: f32,
}

impl<'a> NormOf<'a> {
    pub(super) fn new(norm: &'a Norm<CpuOps>) -> Result<Self, ComputeError> {
        let width = norm.weight.len;
        if let Some(bias) = &norm.bias {
            expect("the bias of a norm", bias.len, width)?;
        }
        Ok(Self {
            weight: &norm.weight.floats.as_slice()[..width],
            bias: norm.bias.as_ref().map(|bias| &bias.floats.as_slice()[..width]),
            centred: norm.centred,
            eps: norm.eps,
        })
    }

    /// The kernel for so many runs of values.
    pub(super) fn row(self, x: *const f32, to: *mut f32, runs: usize) -> NormRow<'a> {
        let Self { weight, bias, centred, eps } = self;
        NormRow { x, to, weight, bias, centred, eps, runs }
    }
}

/// What happens to each value by itself.
#[derive(Clone, Copy)]
enum Each {
    Scale(f32),
    Silu,
    GeluTanh,
    Gelu,
    /// A factor, then a cap.
    Cap(f32, f32),
}

/// Changes values in place.
struct Change<'a> {
    to: &'a mut [f32],
    each: Each,
}

impl Kernel for Change<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the offsets are below the length.
        unsafe {
            by_lanes!(self.to.len(), |at, lanes| {
                let to = self.to.as_mut_ptr().add(at);
                let value = S::load_first(to, lanes);
                let value = match self.each {
                    Each::Scale(factor) => S::mul(value, S::splat(factor)),
                    Each::Silu => silu::<S>(value),
                    Each::GeluTanh => gelu_tanh::<S>(value),
                    Each::Gelu => gelu::<S>(value),
                    Each::Cap(factor, cap) => softcap::<S>(S::mul(value, S::splat(factor)), cap),
                };
                S::store_first(to, value, lanes);
            });
        }
    }
}

/// `sum = fma(weight, x, sum)`, value by value.
struct AddTimes<'a> {
    sum: &'a mut [f32],
    x: &'a [f32],
    weight: f32,
}

impl Kernel for AddTimes<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let len = self.sum.len().min(self.x.len());
        // SAFETY: the offsets are below `len`.
        unsafe {
            let weight = S::splat(self.weight);
            by_lanes!(len, |at, lanes| {
                let to = self.sum.as_mut_ptr().add(at);
                let x = S::load_first(self.x.as_ptr().add(at), lanes);
                S::store_first(to, S::fma(weight, x, S::load_first(to, lanes)), lanes);
            });
        }
    }
}

/// `1 / (1 + e^-x)`, as half of `1 + tanh(x / 2)`.
struct Sigmoid(f32);

impl Kernel for Sigmoid {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let mut lanes = [0.0; LANES];
        // SAFETY: the array has 16 values.
        unsafe {
            let half = S::splat(0.5);
            let value = tanh::<S>(S::splat(self.0 * 0.5));
            S::store(lanes.as_mut_ptr(), S::fma(value, half, half));
        }
        lanes[0]
    }
}

impl CpuOps {
    /// Changes the first `rows` rows of `values` in place.
    fn change(
        &mut self,
        values: &mut [f32],
        (rows, width): (usize, usize),
        each: Each,
    ) -> Result<(), ComputeError> {
        expect_rows("what is changed in place", rows * width, values.len())?;
        let to = SharedMut(values.as_mut_ptr());
        self.by_rows((rows, width), |isa, range| {
            // SAFETY: the rows exist, as checked, and are this share's alone.
            unsafe { isa.run(Change { to: rows_of(to, &range, width), each }) };
        })
    }

    fn change_buf(&mut self, x: &mut CpuBuf, rows: usize, each: Each) -> Result<(), ComputeError> {
        x.contents = self.stamp();
        let width = x.width;
        self.change(x.floats.as_mut_slice(), (rows, width), each)
    }
}

impl FamilyOps for CpuOps {
    fn activate(
        &mut self,
        x: &mut CpuBuf,
        rows: usize,
        act: Activation,
    ) -> Result<(), ComputeError> {
        match act {
            Activation::Silu => self.change_buf(x, rows, Each::Silu),
            Activation::GeluTanh => self.change_buf(x, rows, Each::GeluTanh),
            Activation::Gelu => self.change_buf(x, rows, Each::Gelu),
            Activation::ClampedSwiglu => Err(bad(format!("{act:?} without a gate"))),
        }
    }

    fn scale(&mut self, x: &mut CpuBuf, rows: usize, factor: f32) -> Result<(), ComputeError> {
        self.change_buf(x, rows, Each::Scale(factor))
    }

    fn scale_stream(
        &mut self,
        x: &mut CpuStream<'_>,
        rows: usize,
        factor: f32,
    ) -> Result<(), ComputeError> {
        self.change(x.hidden, (rows, x.width), Each::Scale(factor))
    }

    fn copy_stream(
        &mut self,
        x: &CpuStream<'_>,
        rows: usize,
        out: &mut CpuBuf,
    ) -> Result<(), ComputeError> {
        expect("a copy of the stream", out.width, x.width)?;
        expect_rows("a copy of the stream", rows, out.rows_max().min(x.rows()))?;
        out.contents = self.stamp();
        let len = rows * x.width;
        out.floats.as_mut_slice()[..len].copy_from_slice(&x.hidden[..len]);
        Ok(())
    }

    fn shape_logits(
        &mut self,
        logits: &mut [f32],
        factor: f32,
        cap: Option<f32>,
    ) -> Result<(), ComputeError> {
        let each = cap.map_or(Each::Scale(factor), |cap| Each::Cap(factor, cap));
        // Cut where lanes are, so that threads share a row.
        let rows = logits.len() / LANES;
        let (whole, rest) = logits.split_at_mut(rows * LANES);
        self.change(whole, (rows, LANES), each)?;
        let rows = rest.len();
        self.change(rest, (rows, 1), each)
    }

    fn reshape(&mut self, buf: &mut CpuBuf, width: usize) -> Result<(), ComputeError> {
        if buf.width == width {
            return Ok(());
        }
        if width == 0 || width > buf.floats.len() {
            return Err(bad(format!("rows of {width} in a buffer of {}", buf.floats.len())));
        }
        buf.width = width;
        buf.contents = self.stamp();
        Ok(())
    }

    fn route(
        &mut self,
        logits: &mut CpuBuf,
        rows: usize,
        how: &Router<'_, Self>,
        routes: &mut CpuBuf,
    ) -> Result<(), ComputeError> {
        let (experts, width) = (how.moe.experts as usize, 2 * how.moe.top_k as usize);
        expect("the logits of a router", logits.width, experts)?;
        expect("routes", routes.width, width)?;
        expect_rows("routes", rows, logits.rows_max().min(routes.rows_max()))?;
        let correction = how.correction.map(|c| &c.floats.as_slice()[..c.len]);
        expect("a router's correction", correction.map_or(experts, <[f32]>::len), experts)?;
        logits.contents = self.stamp();
        routes.contents = self.stamp();
        let from = logits.floats.as_mut_slice().chunks_exact_mut(experts).take(rows);
        let to = routes.floats.as_mut_slice().chunks_exact_mut(width);
        for (scores, routes) in from.zip(to) {
            let row = RouteRow { scores, moe: &how.moe, correction, routes };
            // SAFETY: the slices are as long as the mixture says.
            unsafe { self.isa.run(row) };
        }
        Ok(())
    }

    fn gather(
        &mut self,
        x: &CpuBuf,
        rows: usize,
        (routes, expert): (&CpuBuf, u32),
        out: &mut CpuBuf,
    ) -> Result<usize, ComputeError> {
        let width = x.width;
        expect("an expert's input", out.width, width)?;
        let rows_max = x.rows_max().min(routes.rows_max()).min(out.rows_max());
        expect_rows("an expert's input", rows, rows_max)?;
        out.contents = self.stamp();
        let mut count = 0;
        let to = out.floats.as_mut_slice();
        for (row, _) in chosen(routes.floats.as_slice(), (rows, routes.width), expert) {
            let from = &x.floats.as_slice()[row * width..][..width];
            to[count * width..][..width].copy_from_slice(from);
            count += 1;
        }
        Ok(count)
    }

    fn scatter_add(
        &mut self,
        x: &CpuBuf,
        rows: usize,
        (routes, expert): (&CpuBuf, u32),
        sum: &mut CpuBuf,
    ) -> Result<(), ComputeError> {
        let width = x.width;
        expect("the sum over experts", sum.width, width)?;
        let rows_max = x.rows_max().min(routes.rows_max()).min(sum.rows_max());
        expect_rows("the sum over experts", rows, rows_max)?;
        sum.contents = self.stamp();
        let chosen = chosen(routes.floats.as_slice(), (rows, routes.width), expert);
        for (i, (row, weight)) in chosen.enumerate() {
            let x = &x.floats.as_slice()[i * width..][..width];
            let sum = &mut sum.floats.as_mut_slice()[row * width..][..width];
            // SAFETY: the kernel demands nothing more.
            unsafe { self.isa.run(AddTimes { sum, x, weight }) };
        }
        Ok(())
    }

    fn clear(&mut self, x: &mut CpuBuf, rows: usize) -> Result<(), ComputeError> {
        expect_rows("what is cleared", rows, x.rows_max())?;
        x.contents = self.stamp();
        let len = rows * x.width;
        x.floats.as_mut_slice()[..len].fill(0.0);
        Ok(())
    }

    fn add_gated(
        &mut self,
        x: &CpuBuf,
        rows: usize,
        gate: Option<&CpuBuf>,
        sum: &mut CpuBuf,
    ) -> Result<(), ComputeError> {
        let width = x.width;
        expect("the sum over experts", sum.width, width)?;
        expect_rows("the sum over experts", rows, x.rows_max().min(sum.rows_max()))?;
        if let Some(gate) = gate {
            expect("the gate of a shared expert", gate.width, 1)?;
            expect_rows("the gate of a shared expert", rows, gate.rows_max())?;
        }
        sum.contents = self.stamp();
        for row in 0..rows {
            let x = &x.floats.as_slice()[row * width..][..width];
            let sum = &mut sum.floats.as_mut_slice()[row * width..][..width];
            // SAFETY: the kernels demand nothing more.
            unsafe {
                let gate = gate.map(|gate| self.isa.run(Sigmoid(gate.floats.as_slice()[row])));
                // Times one and rounded once is a plain sum.
                self.isa.run(AddTimes { sum, x, weight: gate.unwrap_or(1.0) });
            }
        }
        Ok(())
    }

    fn linear_heads(
        &mut self,
        x: &CpuBuf,
        rows: usize,
        weights: &[Packed],
        out: &mut CpuBuf,
    ) -> Result<(), ComputeError> {
        let heads = weights.len();
        let from_width = heads_of("the heads of a product", x.width, heads)?;
        let to_width = heads_of("the heads of a product's output", out.width, heads)?;
        expect_rows("a product of heads", rows, x.rows_max().min(out.rows_max()))?;
        for weight in weights {
            expect_rows("a head of a product", weight.cols(), from_width)?;
            expect_rows("a head of a product's output", weight.outputs(), to_width)?;
        }
        out.contents = self.stamp();
        let to = SharedMut(out.floats.as_mut_slice().as_mut_ptr());
        let from = x.floats.as_slice();
        let (x_width, out_width) = (x.width, out.width);
        let steps = rows * weights.iter().map(|w| w.cols() * w.outputs()).sum::<usize>();
        let isa = self.isa;
        // Head by head, so that a head's weights are read once for all rows.
        spread(&mut self.pool, steps <= ALONE_STEPS_MAX, &|share: Share| {
            for head in share.range(heads) {
                let weight = &weights[head];
                for row in 0..rows {
                    let x = &from[row * x_width + head * from_width..][..weight.cols()];
                    // SAFETY: the head of this row is in `out`, as checked, and this share's alone.
                    let out = unsafe {
                        let to = to.get().add(row * out_width + head * to_width);
                        std::slice::from_raw_parts_mut(to, weight.outputs())
                    };
                    one_row(isa, x, weight, out);
                }
            }
        })
    }

    fn copy_heads(
        &mut self,
        x: &CpuBuf,
        rows: usize,
        columns: HeadColumns,
        out: &mut CpuBuf,
    ) -> Result<(), ComputeError> {
        let HeadColumns { heads, from, to, width } = columns;
        let from_width = heads_of("the heads of a copy", x.width, heads)?;
        let to_width = heads_of("the heads of a copy's output", out.width, heads)?;
        expect_rows("a head of a copy", from + width, from_width)?;
        expect_rows("a head of a copy's output", to + width, to_width)?;
        expect_rows("a copy of heads", rows, x.rows_max().min(out.rows_max()))?;
        out.contents = self.stamp();
        for head in 0..rows * heads {
            let x = &x.floats.as_slice()[head * from_width + from..][..width];
            out.floats.as_mut_slice()[head * to_width + to..][..width].copy_from_slice(x);
        }
        Ok(())
    }

    fn norm_first(
        &mut self,
        x: &mut CpuBuf,
        rows: usize,
        norm: &Norm<Self>,
    ) -> Result<(), ComputeError> {
        expect_rows("the first values of a row", norm.weight.len, x.width)?;
        expect_rows("what is normalised", rows, x.rows_max())?;
        x.contents = self.stamp();
        let norm = NormOf::new(norm)?;
        for row in x.floats.as_mut_slice().chunks_exact_mut(x.width).take(rows) {
            let row = row.as_mut_ptr();
            // SAFETY: the row is at least as long as the norm's weight.
            unsafe { self.isa.run(norm.row(row, row, 1)) };
        }
        Ok(())
    }

    fn take_rows(
        &mut self,
        x: &CpuBuf,
        rows: &[usize],
        out: &mut CpuBuf,
    ) -> Result<(), ComputeError> {
        let width = expect_some_rows("an adapter's input", out, rows, x)?;
        out.contents = self.stamp();
        for (row, to) in rows.iter().zip(out.floats.as_mut_slice().chunks_exact_mut(width)) {
            to.copy_from_slice(&x.floats.as_slice()[row * width..][..width]);
        }
        Ok(())
    }

    fn add_to_rows(
        &mut self,
        x: &CpuBuf,
        rows: &[usize],
        out: &mut CpuBuf,
    ) -> Result<(), ComputeError> {
        let width = expect_some_rows("an adapter's output", x, rows, out)?;
        out.contents = self.stamp();
        for (row, x) in rows.iter().zip(x.floats.as_slice().chunks_exact(width)) {
            let to = &mut out.floats.as_mut_slice()[row * width..][..width];
            // SAFETY: both are as long.
            unsafe { self.isa.run(Add { to, x }) };
        }
        Ok(())
    }
}
