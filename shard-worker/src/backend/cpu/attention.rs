//! Causal attention over paged keys and values.
//!
//! Contract n1, for each query by itself, block after block from position 0:
//!
//! ```text
//! score  = (one chain of fused multiply-adds over the head's dimensions, from zero) * scale
//! m'     = max(m, fold_max of the block's scores)        positions after the query's count nothing
//! p      = exp(score - m')          c = exp(m - m')
//! sum    = fma(sum, c, fold_add of p)
//! out    = fma(p, value, …) over the block's positions in order, from out * c
//! ```
//!
//! and at the end `out / sum`. Queries, heads and threads are divided freely; several blocks are
//! scored at once only to hide the latency of the chains.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::isa::{Isa, Kernel};
use super::kv::{PagedKv, SLOTS};
use super::linear::SharedMut;
use super::math::exp;
use super::simd::{LANES, Simd};
use crate::backend::pool::{Pool, Share};
use crate::model::{ComputeError, Span};

/// Queries of one key head that share each pass over its blocks.
const QUERIES: usize = 32;

/// Blocks that are scored at once: four chains hide the latency of one.
const BLOCKS: usize = 4;

/// 0, 1, … 15.
static LANE: [f32; LANES] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// Attention of all rows of checked spans; `query` and `out` are `rows x (heads x head_dim)`, and
/// `heads` is a multiple of the cache's.
pub fn attend(
    (isa, pool): (Isa, &mut Pool),
    spans: &[Span<'_>],
    (query, heads): (&[f32], usize),
    (kv, scale): (&PagedKv, f32),
    out: &mut [f32],
) -> Result<(), ComputeError> {
    let shape = kv.shape();
    let (kv_heads, dim) = (shape.kv_heads as usize, shape.head_dim as usize);
    let rows = spans.iter().map(|span| span.first_row + span.rows).max().unwrap_or(0);
    assert!(query.len() >= rows * heads * dim && out.len() >= rows * heads * dim, "checked");
    let group = heads / kv_heads;
    let out = SharedMut(out.as_mut_ptr());
    // Tasks differ in length, so threads draw them; who computes one does not matter to its bits.
    let drawn = AtomicUsize::new(0);
    pool.run(&|_: Share| {
        let mut mine = drawn.fetch_add(1, Ordering::Relaxed);
        let mut task = 0;
        for span in spans {
            // The longest rows of a prompt first, so that no thread ends long after the others.
            for first in (0..span.rows * group).step_by(QUERIES).rev() {
                let queries = first..(first + QUERIES).min(span.rows * group);
                for kv_head in 0..kv_heads {
                    if task == mine {
                        let attend = Attend {
                            kv,
                            scale,
                            span,
                            queries: queries.clone(),
                            heads,
                            group,
                            kv_head,
                            query,
                            out: out.get(),
                        };
                        // SAFETY: the spans are checked, sizes asserted above, and tasks write
                        // disjoint heads of rows.
                        unsafe { isa.run(attend) };
                        mine = drawn.fetch_add(1, Ordering::Relaxed);
                    }
                    task += 1;
                }
            }
        }
    })
}

/// Some queries of one span that read the same key head.
struct Attend<'a> {
    kv: &'a PagedKv,
    scale: f32,
    span: &'a Span<'a>,
    /// Of the span's `rows x group` queries.
    queries: Range<usize>,
    heads: usize,
    /// Query heads of a key head.
    group: usize,
    kv_head: usize,
    query: &'a [f32],
    out: *mut f32,
}

/// What a query has gathered so far, its weighted sum aside.
#[derive(Clone, Copy)]
struct Softmax {
    max: f32,
    sum: f32,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let start = Softmax { max: f32::NEG_INFINITY, sum: 0.0 };
        let mut state = [start; QUERIES];
        let last = self.position(self.queries.end - 1);
        // Each pass reads a few blocks for all queries, so that they come from the nearest cache.
        for block in (0..=last / SLOTS).step_by(BLOCKS) {
            for (query, state) in self.queries.clone().zip(&mut state) {
                let blocks = (self.position(query) / SLOTS + 1).saturating_sub(block);
                // SAFETY: the caller's; the blocks are among the span's.
                unsafe {
                    match blocks {
                        0 => {}
                        1 => self.blocks::<S, 1>(query, block, state),
                        2 => self.blocks::<S, 2>(query, block, state),
                        3 => self.blocks::<S, 3>(query, block, state),
                        _ => self.blocks::<S, BLOCKS>(query, block, state),
                    }
                }
            }
        }
        for (query, state) in self.queries.clone().zip(&state) {
            // SAFETY: the caller's.
            unsafe { self.divide::<S>(query, state.sum) };
        }
    }
}

impl Attend<'_> {
    fn dim(&self) -> usize {
        self.kv.shape().head_dim as usize
    }

    fn position(&self, query: usize) -> usize {
        self.span.first_position as usize + query / self.group
    }

    /// Where the query's head begins in `query` and in `out`.
    fn offset(&self, query: usize) -> usize {
        let row = self.span.first_row + query / self.group;
        let head = self.kv_head * self.group + query % self.group;
        (row * self.heads + head) * self.dim()
    }

    /// Takes `N` blocks from `first` on into a query's state and sum; the query sees all of them,
    /// the last perhaps in part.
    #[inline(always)]
    unsafe fn blocks<S: Simd, const N: usize>(
        &self,
        query: usize,
        first: usize,
        state: &mut Softmax,
    ) {
        let dim = self.dim();
        let at = self.offset(query);
        let ids: [u32; N] = std::array::from_fn(|n| self.span.blocks[first + n]);
        let keys: [*const f32; N] = std::array::from_fn(|n| self.kv.keys(ids[n], self.kv_head));
        let mut weights = [[0.0_f32; SLOTS]; N];
        let mut decay = [1.0_f32; N];
        let mut slots = [SLOTS; N];
        // SAFETY: a head's keys are `dim x 16`, its query `dim` long; the caller's for the rest.
        unsafe {
            let mut scores = [S::splat(0.0); N];
            let q = self.query.as_ptr().add(at);
            for d in 0..dim {
                let value = S::splat(*q.add(d));
                for n in 0..N {
                    scores[n] = S::fma(value, S::load(keys[n].add(d * SLOTS)), scores[n]);
                }
            }
            for n in 0..N {
                let mut score = S::mul(scores[n], S::splat(self.scale));
                slots[n] = SLOTS.min(self.position(query) + 1 - (first + n) * SLOTS);
                if slots[n] < SLOTS {
                    let hidden = S::splat(f32::NEG_INFINITY);
                    let lane = S::load(LANE.as_ptr());
                    score = S::select_less(lane, S::splat(slots[n] as f32), score, hidden);
                }
                let block_max = S::fold_max(score);
                let max = if state.max > block_max { state.max } else { block_max };
                let weight = exp::<S>(S::sub(score, S::splat(max)));
                S::store(weights[n].as_mut_ptr(), weight);
                if max != state.max {
                    let mut lanes = [0.0; LANES];
                    S::store(lanes.as_mut_ptr(), exp::<S>(S::splat(state.max - max)));
                    decay[n] = lanes[0];
                }
                state.sum = state.sum.mul_add(decay[n], S::fold_add(weight));
                state.max = max;
            }
        }
        let part = Part {
            values: std::array::from_fn(|n| self.kv.values(ids[n], self.kv_head)),
            weights: &weights,
            decay,
            slots,
            dim,
            fresh: first == 0,
        };
        let mut d = 0;
        while d < dim {
            let left = dim - d;
            // SAFETY: `d` is below `dim`; the caller's for the rest.
            unsafe {
                let out = self.out.add(at + d);
                if S::WIDE && left >= 8 * LANES {
                    part.sum::<S, 8>(d, out);
                    d += 8 * LANES;
                } else if left >= 4 * LANES {
                    part.sum::<S, 4>(d, out);
                    d += 4 * LANES;
                } else {
                    part.sum::<S, 1>(d, out);
                    d += LANES;
                }
            }
        }
    }

    /// The query's weighted sum by the sum of its weights.
    #[inline(always)]
    unsafe fn divide<S: Simd>(&self, query: usize, sum: f32) {
        let dim = self.dim();
        for d in (0..dim).step_by(LANES) {
            let lanes = LANES.min(dim - d);
            // SAFETY: `d + lanes` is at most `dim`; the caller's for the rest.
            unsafe {
                let out = self.out.add(self.offset(query) + d);
                S::store_first(out, S::div(S::load_first(out, lanes), S::splat(sum)), lanes);
            }
        }
    }
}

/// The values of `N` blocks and what they weigh.
struct Part<'a, const N: usize> {
    values: [*const f32; N],
    weights: &'a [[f32; SLOTS]; N],
    /// What the sum so far is multiplied with before each block; 1 often.
    decay: [f32; N],
    /// How many positions of each block count.
    slots: [usize; N],
    dim: usize,
    /// Whether there is no sum so far.
    fresh: bool,
}

impl<const N: usize> Part<'_, N> {
    /// Adds `16 W` dimensions from `d` on to `out`; where `W` is 1 there may be fewer.
    #[inline(always)]
    unsafe fn sum<S: Simd, const W: usize>(&self, d: usize, out: *mut f32) {
        let lanes = LANES.min(self.dim - d);
        // SAFETY: values are `16 x dim` and readable for 16 more (`PagedKv::values`); `out` is
        // valid for `16 W` values, or `lanes`.
        unsafe {
            let mut sums = [S::splat(0.0); W];
            if !self.fresh {
                for (w, sum) in sums.iter_mut().enumerate() {
                    *sum = S::load_first(out.add(w * LANES), lanes);
                }
            }
            for n in 0..N {
                if self.decay[n] != 1.0 {
                    for sum in &mut sums {
                        *sum = S::mul(*sum, S::splat(self.decay[n]));
                    }
                }
                let mut value = self.values[n].add(d);
                for weight in &self.weights[n][..self.slots[n]] {
                    let weight = S::splat(*weight);
                    for (w, sum) in sums.iter_mut().enumerate() {
                        *sum = S::fma(weight, S::load(value.add(w * LANES)), *sum);
                    }
                    value = value.wrapping_add(self.dim);
                }
            }
            for (w, sum) in sums.into_iter().enumerate() {
                S::store_first(out.add(w * LANES), sum, lanes);
            }
        }
    }
}
