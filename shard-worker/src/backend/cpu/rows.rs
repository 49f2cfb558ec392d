//! Operations on each row by itself: norms, gate, rotation, sums.
//!
//! Each is a kernel over a contiguous range of rows, so that threads can take shares of them.

use super::isa::Kernel;
use super::math::silu;
use super::simd::{LANES, Simd};

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

/// `to = x / sqrt(mean(x²) + eps) * weight`, for one run of values.
///
/// Contract n1: lane `i` sums the squares of values `i`, `i + 16`, … by fused multiply-adds; the
/// lanes are folded; the mean, its root and the reciprocal are rounded one by one.
pub struct NormRow<'a> {
    /// What is normalised, as wide as `weight`.
    pub x: *const f32,
    /// Where it goes; may be `x`.
    pub to: *mut f32,
    /// One for each value.
    pub weight: &'a [f32],
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
                let (x, to) = (self.x.add(run * width), self.to.add(run * width));
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
                    S::store_first(to.add(at), S::mul(scaled, weight), lanes);
                });
            }
        }
    }
}

/// `to = silu(to) * up`, value by value.
pub struct Gate<'a> {
    /// The gate, replaced by the result.
    pub to: &'a mut [f32],
    /// As long.
    pub up: &'a [f32],
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
                S::store_first(to, S::mul(silu::<S>(S::load_first(to, lanes)), up), lanes);
            });
        }
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
    /// `head_dim / 2` cosines, then as many sines.
    pub angles: &'a [f32],
}

impl Kernel for RotateRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let half = self.angles.len() / 2;
        let (cos, sin) = self.angles.split_at(half);
        for head in self.row.chunks_exact_mut(2 * half) {
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
/// in plain Rust and rounded once, so that they depend on no machine's library.
pub fn angles_of(position: u32, frequencies: &[f32], to: &mut [f32]) {
    let (cos, sin) = to.split_at_mut(frequencies.len());
    for ((frequency, cos), sin) in frequencies.iter().zip(cos).zip(sin) {
        let angle = f64::from(position as f32 * frequency);
        *cos = libm::cos(angle) as f32;
        *sin = libm::sin(angle) as f32;
    }
}
