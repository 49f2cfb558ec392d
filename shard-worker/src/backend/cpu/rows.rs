//! Operations on each row by itself: norms, gate, rotation, sums.
//!
//! Each is a kernel over a contiguous range of rows, so that threads can take shares of them.

use shoal_protocol::model::Activation;

use super::isa::Kernel;
use super::math::{gelu, gelu_tanh, silu, swish};
use super::simd::{LANES, Simd};
use crate::backend::Turn;

/// Calls `$body` with `$at`, the offset of each run of at most 16 values, and `$lanes`, its length.
macro_rules! by_lanes {
    ($len:expr, |$at:ident, $lanes:ident| $body:block) => {
        let mut $at = 0;
        while $at < $len {
            let $lanes = LANES.min($len - $at);
            $body
            $at += LANES;
        }
    };
}

pub(super) use by_lanes;

/// `to = x / sqrt(mean(x²) + eps) * weight + bias`, for one run of values.
///
/// Contract n1: lane `i` sums the squares of values `i`, `i + 16`, … by fused multiply-adds; the
/// lanes are folded; the mean, its root and the reciprocal are rounded one by one. What is centred
/// has the mean, of lanes summed and folded, taken from each value first.
pub struct NormRow<'a> {
    /// What is normalised, as wide as `weight`.
    pub x: *const f32,
    /// Where it goes; may be `x`.
    pub to: *mut f32,
    /// One for each value.
    pub weight: &'a [f32],
    /// Added at the end, as long as `weight`.
    pub bias: Option<&'a [f32]>,
    /// Whether the mean is taken from the values first.
    pub centred: bool,
    /// Added to the mean square.
    pub eps: f32,
    /// How many runs, one after the other.
    pub runs: usize,
}

impl Kernel for NormRow<'_> {
    type Output = ();

    /// `x` and `to` are valid for `runs x weight.len()` values.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.weight.len();
        for run in 0..self.runs {
            // SAFETY: the offsets are below `runs x width`.
            unsafe {
                let (mut x, to) = (self.x.add(run * width), self.to.add(run * width));
                if self.centred {
                    let mut sums = S::splat(0.0);
                    by_lanes!(width, |at, lanes| {
                        sums = S::add(sums, S::load_first(x.add(at), lanes));
                    });
                    let mean = S::splat(S::fold_add(sums) / width as f32);
                    by_lanes!(width, |at, lanes| {
                        let value = S::sub(S::load_first(x.add(at), lanes), mean);
                        S::store_first(to.add(at), value, lanes);
                    });
                    x = to;
                }
                let mut squares = S::splat(0.0);
                by_lanes!(width, |at, lanes| {
                    let value = S::load_first(x.add(at), lanes);
                    squares = S::fma(value, value, squares);
                });
                let mean = S::fold_add(squares) / width as f32;
                let factor = S::splat(1.0 / (mean + self.eps).sqrt());
                by_lanes!(width, |at, lanes| {
                    let scaled = S::mul(S::load_first(x.add(at), lanes), factor);
                    let weight = S::load_first(self.weight.as_ptr().add(at), lanes);
                    let mut value = S::mul(scaled, weight);
                    if let Some(bias) = self.bias {
                        value = S::add(value, S::load_first(bias.as_ptr().add(at), lanes));
                    }
                    S::store_first(to.add(at), value, lanes);
                });
            }
        }
    }
}

/// `to = act(to) * up`, value by value.
pub struct Gate<'a> {
    /// The gate, replaced by the result.
    pub to: &'a mut [f32],
    /// As long.
    pub up: &'a [f32],
    /// The nonlinearity.
    pub act: Activation,
}

impl Kernel for Gate<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let len = self.to.len().min(self.up.len());
        // SAFETY: the offsets are below `len`.
        unsafe {
            by_lanes!(len, |at, lanes| {
                let to = self.to.as_mut_ptr().add(at);
                let up = S::load_first(self.up.as_ptr().add(at), lanes);
                let gate = S::load_first(to, lanes);
                let gated = match self.act {
                    Activation::Silu => S::mul(silu::<S>(gate), up),
                    Activation::GeluTanh => S::mul(gelu_tanh::<S>(gate), up),
                    Activation::Gelu => S::mul(gelu::<S>(gate), up),
                    Activation::ClampedSwiglu => clamped_swiglu::<S>(gate, up),
                };
                S::store_first(to, gated, lanes);
            });
        }
    }
}

/// What GPT-OSS clamps gate and up to.
const SWIGLU_LIMIT: f32 = 7.0;
/// The slope of its gate.
const SWIGLU_SLOPE: f32 = 1.702;

/// `swish(min(gate, 7)) * (clamp(up, -7, 7) + 1)`.
#[inline(always)]
unsafe fn clamped_swiglu<S: Simd>(gate: S::F, up: S::F) -> S::F {
    // SAFETY: the caller's.
    unsafe {
        let (low, high) = (S::splat(-SWIGLU_LIMIT), S::splat(SWIGLU_LIMIT));
        let gate = S::select_less(high, gate, high, gate);
        let up = S::select_less(high, up, high, up);
        let up = S::select_less(up, low, low, up);
        S::mul(swish::<S>(gate, SWIGLU_SLOPE), S::add(up, S::splat(1.0)))
    }
}

/// `to += x`, value by value.
pub struct Add<'a> {
    /// What is added to.
    pub to: &'a mut [f32],
    /// As long.
    pub x: &'a [f32],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let len = self.to.len().min(self.x.len());
        // SAFETY: the offsets are below `len`.
        unsafe {
            by_lanes!(len, |at, lanes| {
                let to = self.to.as_mut_ptr().add(at);
                let x = S::load_first(self.x.as_ptr().add(at), lanes);
                S::store_first(to, S::add(S::load_first(to, lanes), x), lanes);
            });
        }
    }
}

/// Rotates the heads of one row by the row's angles.
///
/// Contract n1: `low' = fma(-high, sin, low * cos)`, `high' = fma(low, sin, high * cos)`.
pub struct RotateRow<'a> {
    /// `heads x head_dim`.
    pub row: &'a mut [f32],
    /// Cosines, then as many sines, one a pair.
    pub angles: &'a [f32],
    /// Which dimensions are pairs.
    pub turn: Turn,
}

impl Kernel for RotateRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let half = self.angles.len() / 2;
        let (cos, sin) = self.angles.split_at(half);
        for head in self.row.chunks_exact_mut(self.turn.head_dim) {
            let head = &mut head[self.turn.first..][..2 * half];
            if self.turn.interleaved {
                for ((pair, cos), sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                    let [low, high] = *pair;
                    *pair = [(0.0 - high).mul_add(*sin, low * cos), low.mul_add(*sin, high * cos)];
                }
                continue;
            }
            let (low, high) = head.split_at_mut(half);
            // SAFETY: the offsets are below `half`, the length of all four.
            unsafe {
                by_lanes!(half, |at, lanes| {
                    let cos = S::load_first(cos.as_ptr().add(at), lanes);
                    let sin = S::load_first(sin.as_ptr().add(at), lanes);
                    let (to_low, to_high) = (low.as_mut_ptr().add(at), high.as_mut_ptr().add(at));
                    let low = S::load_first(to_low, lanes);
                    let high = S::load_first(to_high, lanes);
                    let minus_high = S::sub(S::splat(0.0), high);
                    S::store_first(to_low, S::fma(minus_high, sin, S::mul(low, cos)), lanes);
                    S::store_first(to_high, S::fma(low, sin, S::mul(high, cos)), lanes);
                });
            }
        }
    }
}

/// The cosines, then the sines, of one position's angles.
///
/// The angle is rounded to `f32`, as `transformers` does; its cosine and sine are computed in `f64`
/// in plain Rust and rounded once, so that they depend on no machine's library. Both are multiplied
/// with `factor`.
pub fn angles_of(position: u32, frequencies: &[f32], factor: f32, to: &mut [f32]) {
    let (cos, sin) = to.split_at_mut(frequencies.len());
    for ((frequency, cos), sin) in frequencies.iter().zip(cos).zip(sin) {
        let angle = f64::from(position as f32 * frequency);
        *cos = libm::cos(angle) as f32 * factor;
        *sin = libm::sin(angle) as f32 * factor;
    }
}
