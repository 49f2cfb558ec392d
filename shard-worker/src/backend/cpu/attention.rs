//! Attention over paged keys and values: causal, or over positions ahead too.
//!
//! Contract n1, for each query by itself, block after block from position 0:
//!
//! ```text
//! score  = (one chain of fused multiply-adds over the head's dimensions, from zero) * scale
//! m'     = max(m, fold_max of the block's scores)        positions after the last that it sees count nothing
//! p      = exp(score - m')          c = exp(m - m')
//! sum    = fma(sum, c, fold_add of p)
//! out    = fma(p, value, …) over the block's positions in order, from out * c
//! ```
//!
//! and at the end `out / sum`. With a cap, `score = cap * tanh(score / cap)` follows the scale. With a
//! window, a query begins at the block of the first position that it sees, and positions before that
//! one count nothing. With a sink, `m` begins as the head's sink and `sum` as 1. Queries, heads and
//! threads are divided freely; several blocks are scored at once only to hide the latency of the
//! chains.
#![allow(clippy::needless_range_loop)] // An index names a register; iterators hide which.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::isa::{Isa, Kernel};
use super::kv::{PagedKv, SLOTS};
use super::kv_format::{KvFormat, with_kv};
use super::linear::SharedMut;
use super::math::{exp, softcap};
use super::simd::{LANES, Simd};
use super::{ALONE_STEPS_MAX, spread};
use crate::backend::pool::{Pool, Share};
use crate::model::{ComputeError, Span};

/// Queries of one key head that share each pass over its blocks.
const QUERIES: usize = 32;

/// Blocks that are scored at once: four chains hide the latency of one.
const BLOCKS: usize = 4;

/// 0, 1, … 15.
static LANE: [f32; LANES] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// How scores become weights; see [`crate::backend::Attend`].
#[derive(Clone, Copy)]
pub struct How<'a> {
    pub scale: f32,
    pub softcap: Option<f32>,
    pub window: Option<u32>,
    /// How many positions behind its own a query sees, of those that the span has.
    pub ahead: u32,
    /// One for each query head.
    pub sinks: Option<&'a [f32]>,
}

/// Attention of all rows of checked spans; `query` and `out` are `rows x (heads x head_dim)`, and
/// `heads` is a multiple of the cache's.
pub fn attend(
    (isa, pool): (Isa, &mut Pool),
    spans: &[Span<'_>],
    (query, heads): (&[f32], usize),
    (kv, how): (&PagedKv, How<'_>),
    out: &mut [f32],
) -> Result<(), ComputeError> {
    let shape = kv.shape();
    let (kv_heads, dim) = (shape.kv_heads as usize, shape.head_dim as usize);
    let rows = spans.iter().map(|span| span.first_row + span.rows).max().unwrap_or(0);
    assert!(how.sinks.is_none_or(|sinks| sinks.len() >= heads), "checked");
    assert!(query.len() >= rows * heads * dim && out.len() >= rows * heads * dim, "checked");
    let group = heads / kv_heads;
    let out = SharedMut(out.as_mut_ptr());
    // Tasks differ in length, so threads draw them; who computes one does not matter to its bits.
    let drawn = AtomicUsize::new(0);
    let pairs = |span: &Span<'_>| span.rows * (span.first_position as usize + span.rows);
    let steps = 2 * heads * dim * spans.iter().map(pairs).sum::<usize>();
    spread(pool, steps <= ALONE_STEPS_MAX, &|_: Share| {
        let mut mine = drawn.fetch_add(1, Ordering::Relaxed);
        let mut task = 0;
        for span in spans {
            // The longest rows of a prompt first, so that no thread ends long after the others.
            for first in (0..span.rows * group).step_by(QUERIES).rev() {
                let queries = first..(first + QUERIES).min(span.rows * group);
                for kv_head in 0..kv_heads {
                    if task == mine {
                        with_kv!(kv.held(), K => {
                            let attend = Attend::<K> {
                                held: PhantomData,
                                kv,
                                how,
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
                        });
                        mine = drawn.fetch_add(1, Ordering::Relaxed);
                    }
                    task += 1;
                }
            }
        }
    })
}

/// Some queries of one span that read the same key head.
struct Attend<'a, K> {
    /// How `kv` is held.
    held: PhantomData<K>,
    kv: &'a PagedKv,
    how: How<'a>,
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

impl<K: KvFormat> Kernel for Attend<'_, K> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let start = Softmax { max: f32::NEG_INFINITY, sum: 0.0 };
        let mut state = [start; QUERIES];
        if let Some(sinks) = self.how.sinks {
            for (query, state) in self.queries.clone().zip(&mut state) {
                *state = Softmax { max: sinks[self.head(query)], sum: 1.0 };
            }
        }
        let last = self.end(self.queries.end - 1) - 1;
        // Each pass reads a few blocks for all queries, so that they come from the nearest cache.
        let begin = self.first_block(self.queries.start) / BLOCKS * BLOCKS;
        for block in (begin..=last / SLOTS).step_by(BLOCKS) {
            let mut query = self.queries.start;
            while query < self.queries.end {
                let (first, blocks) = self.blocks_from(query, block);
                let state = &mut state[query - self.queries.start..];
                // SAFETY: the caller's; the blocks are among the span's and the queries are ours.
                unsafe {
                    if query + 1 < self.queries.end && self.pair(query, block) {
                        self.some_blocks::<S, 2>(query, first, blocks, state);
                        query += 2;
                    } else {
                        self.some_blocks::<S, 1>(query, first, blocks, state);
                        query += 1;
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

impl<K: KvFormat> Attend<'_, K> {
    fn dim(&self) -> usize {
        self.kv.shape().head_dim as usize
    }

    fn position(&self, query: usize) -> usize {
        self.span.first_position as usize + query / self.group
    }

    /// The query's head.
    fn head(&self, query: usize) -> usize {
        self.kv_head * self.group + query % self.group
    }

    /// Where the query's head begins in `query` and in `out`.
    fn offset(&self, query: usize) -> usize {
        let row = self.span.first_row + query / self.group;
        (row * self.heads + self.head(query)) * self.dim()
    }

    /// The first position that the query sees.
    fn start(&self, query: usize) -> usize {
        let window = |window: u32| (self.position(query) + 1).saturating_sub(window as usize);
        self.how.window.map_or(0, window)
    }

    /// One past the last position that the query sees.
    fn end(&self, query: usize) -> usize {
        let end = self.position(query) + 1;
        match self.how.ahead {
            0 => end,
            ahead => {
                let all = self.span.first_position as usize + self.span.rows;
                end.saturating_add(ahead as usize).min(all)
            }
        }
    }

    /// The first block that the query sees.
    fn first_block(&self, query: usize) -> usize {
        self.start(query) / SLOTS
    }

    /// Which of the [`BLOCKS`] blocks from `first` on the query sees: the first of them, and how many.
    fn blocks_from(&self, query: usize, first: usize) -> (usize, usize) {
        let end = self.end(query).div_ceil(SLOTS).min(first + BLOCKS);
        let first = first.max(self.first_block(query));
        (first, end.saturating_sub(first))
    }

    /// Whether a query and the next see the same positions of the blocks from `first` on, and begin
    /// at the same block.
    fn pair(&self, query: usize, first: usize) -> bool {
        if self.position(query) == self.position(query + 1) {
            return true;
        }
        let (begin, end) = (first * SLOTS, (first + BLOCKS) * SLOTS);
        let until = |query| self.end(query).min(end);
        let from = |query| self.start(query).max(begin);
        until(query) == until(query + 1)
            && from(query) == from(query + 1)
            && self.first_block(query) == self.first_block(query + 1)
    }

    /// Takes `blocks` blocks into the states and sums of `Q` queries that see the same of them.
    #[inline(always)]
    unsafe fn some_blocks<S: Simd, const Q: usize>(
        &self,
        query: usize,
        first: usize,
        blocks: usize,
        states: &mut [Softmax],
    ) {
        // SAFETY: the caller's.
        unsafe {
            match blocks {
                0 => {}
                1 => self.blocks::<S, Q, 1>(query, first, states),
                2 => self.blocks::<S, Q, 2>(query, first, states),
                3 => self.blocks::<S, Q, 3>(query, first, states),
                _ => self.blocks::<S, Q, BLOCKS>(query, first, states),
            }
        }
    }

    #[inline(always)]
    unsafe fn blocks<S: Simd, const Q: usize, const N: usize>(
        &self,
        query: usize,
        first: usize,
        states: &mut [Softmax],
    ) {
        let dim = self.dim();
        let ids: [u32; N] = std::array::from_fn(|n| self.span.blocks[first + n]);
        let keys: [*const u8; N] = std::array::from_fn(|n| self.kv.keys(ids[n], self.kv_head));
        let at: [usize; Q] = std::array::from_fn(|q| self.offset(query + q));
        let mut part = Part::<K, Q, N> {
            held: PhantomData,
            values: std::array::from_fn(|n| self.kv.values(ids[n], self.kv_head)),
            weights: [[[0.0_f32; SLOTS]; N]; Q],
            decay: [[1.0_f32; N]; Q],
            from: [0; N],
            slots: [SLOTS; N],
            dim,
            fresh: first == self.first_block(query),
        };
        for n in 0..N {
            let block = (first + n) * SLOTS;
            part.from[n] = self.start(query).saturating_sub(block);
            part.slots[n] = SLOTS.min(self.end(query) - block);
        }
        // SAFETY: a head's keys are `dim x 16`, its query `dim` long; the caller's for the rest.
        unsafe {
            let queries: [*const f32; Q] = std::array::from_fn(|q| self.query.as_ptr().add(at[q]));
            let scores = scores::<S, K, Q, N>(&queries, &keys, dim);
            for q in 0..Q {
                for n in 0..N {
                    let mut score = S::mul(scores[q][n], S::splat(self.how.scale));
                    if let Some(cap) = self.how.softcap {
                        score = softcap::<S>(score, cap);
                    }
                    if part.slots[n] < SLOTS {
                        let seen = S::splat(part.slots[n] as f32);
                        let hidden = S::splat(f32::NEG_INFINITY);
                        score = S::select_less(S::load(LANE.as_ptr()), seen, score, hidden);
                    }
                    if part.from[n] > 0 {
                        let unseen = S::splat(part.from[n] as f32);
                        let hidden = S::splat(f32::NEG_INFINITY);
                        score = S::select_less(S::load(LANE.as_ptr()), unseen, hidden, score);
                    }
                    let decay = states[q].take::<S>(score, &mut part.weights[q][n]);
                    part.decay[q][n] = decay;
                }
            }
        }
        let mut d = 0;
        while d < dim {
            let left = dim - d;
            // SAFETY: `d` is below `dim`; the caller's for the rest.
            unsafe {
                let out: [*mut f32; Q] = std::array::from_fn(|q| self.out.add(at[q] + d));
                // As many sums as there are registers for, in whole vectors.
                if S::WIDE && left >= 4 * LANES {
                    part.sum::<S, 4>(d, &out);
                    d += 4 * LANES;
                } else if left >= 2 * LANES {
                    part.sum::<S, 2>(d, &out);
                    d += 2 * LANES;
                } else {
                    part.sum::<S, 1>(d, &out);
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

impl Softmax {
    /// Takes a block's scores: their weights go to `weights`; what was gathered before is to be
    /// multiplied with the result.
    #[inline(always)]
    unsafe fn take<S: Simd>(&mut self, score: S::F, weights: &mut [f32; SLOTS]) -> f32 {
        // SAFETY: the caller's; the arrays are 16 long.
        unsafe {
            let block_max = S::fold_max(score);
            let max = if self.max > block_max { self.max } else { block_max };
            let weight = exp::<S>(S::sub(score, S::splat(max)));
            S::store(weights.as_mut_ptr(), weight);
            let mut decay = 1.0;
            if max != self.max {
                let mut lanes = [0.0; LANES];
                S::store(lanes.as_mut_ptr(), exp::<S>(S::splat(self.max - max)));
                decay = lanes[0];
            }
            self.sum = self.sum.mul_add(decay, S::fold_add(weight));
            self.max = max;
            decay
        }
    }
}

/// The products of `Q` queries with the keys of `N` blocks.
#[inline(always)]
unsafe fn scores<S: Simd, K: KvFormat, const Q: usize, const N: usize>(
    queries: &[*const f32; Q],
    keys: &[*const u8; N],
    dim: usize,
) -> [[S::F; N]; Q] {
    // SAFETY: the caller's: queries are `dim` long and keys `dim x 16`.
    unsafe {
        let mut scores = [[S::splat(0.0); N]; Q];
        let mut n = 0;
        while n < N {
            // As many chains as there are registers for.
            if S::WIDE && n + 4 <= N {
                chains::<S, K, Q, N, 4>(queries, keys, dim, n, &mut scores);
                n += 4;
            } else if n + 2 <= N {
                chains::<S, K, Q, N, 2>(queries, keys, dim, n, &mut scores);
                n += 2;
            } else {
                chains::<S, K, Q, N, 1>(queries, keys, dim, n, &mut scores);
                n += 1;
            }
        }
        scores
    }
}

/// The scores of blocks `n` to `n + P`.
#[inline(always)]
unsafe fn chains<S: Simd, K: KvFormat, const Q: usize, const N: usize, const P: usize>(
    queries: &[*const f32; Q],
    keys: &[*const u8; N],
    dim: usize,
    n: usize,
    scores: &mut [[S::F; N]; Q],
) {
    // SAFETY: the caller's.
    unsafe {
        let keys: [*const u8; P] = std::array::from_fn(|p| keys[n + p]);
        let mut sums = [[S::splat(0.0); P]; Q];
        for d in 0..dim {
            let mut key = [S::splat(0.0); P];
            for p in 0..P {
                key[p] = K::keys::<S>(keys[p], d, dim);
            }
            for q in 0..Q {
                let value = S::splat(*queries[q].add(d));
                for p in 0..P {
                    sums[q][p] = S::fma(value, key[p], sums[q][p]);
                }
            }
        }
        for q in 0..Q {
            for p in 0..P {
                scores[q][n + p] = sums[q][p];
            }
        }
    }
}

/// The values of `N` blocks and what they weigh for `Q` queries.
struct Part<K, const Q: usize, const N: usize> {
    /// How `values` are held.
    held: PhantomData<K>,
    values: [*const u8; N],
    weights: [[[f32; SLOTS]; N]; Q],
    /// What the sum so far is multiplied with before each block; 1 often.
    decay: [[f32; N]; Q],
    /// The first position of each block that counts.
    from: [usize; N],
    /// One past the last one.
    slots: [usize; N],
    dim: usize,
    /// Whether there is no sum so far.
    fresh: bool,
}

impl<K: KvFormat, const Q: usize, const N: usize> Part<K, Q, N> {
    /// Adds `16 W` dimensions from `d` on to each `out`; where `W` is 1 there may be fewer.
    #[inline(always)]
    unsafe fn sum<S: Simd, const W: usize>(&self, d: usize, out: &[*mut f32; Q]) {
        let lanes = LANES.min(self.dim - d);
        // SAFETY: values are `16 x dim` and readable for 16 more (`PagedKv::values`); each `out`
        // is valid for `16 W` values, or `lanes`.
        unsafe {
            let mut sums = [[S::splat(0.0); W]; Q];
            if !self.fresh {
                for q in 0..Q {
                    for w in 0..W {
                        sums[q][w] = S::load_first(out[q].add(w * LANES), lanes);
                    }
                }
            }
            for n in 0..N {
                for q in 0..Q {
                    if self.decay[q][n] != 1.0 {
                        for w in 0..W {
                            sums[q][w] = S::mul(sums[q][w], S::splat(self.decay[q][n]));
                        }
                    }
                }
                for slot in self.from[n]..self.slots[n] {
                    let mut values = [S::splat(0.0); W];
                    for w in 0..W {
                        values[w] = K::values::<S>(self.values[n], slot, d + w * LANES, self.dim);
                    }
                    for q in 0..Q {
                        let weight = S::splat(self.weights[q][n][slot]);
                        for w in 0..W {
                            sums[q][w] = S::fma(weight, values[w], sums[q][w]);
                        }
                    }
                }
            }
            for q in 0..Q {
                for w in 0..W {
                    S::store_first(out[q].add(w * LANES), sums[q][w], lanes);
                }
            }
        }
    }
}
