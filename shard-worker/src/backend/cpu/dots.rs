//! Contract n2: rows are rounded to whole numbers too, and products are of whole numbers.
//!
//! ```text
//! a block of a row, 32 values:  scale = largest magnitude / 127; number = the nearest of value * (127 / largest), of
//!                               two the even one; a block whose largest is below 2^-100 is zeros
//! a product, for each share of columns of one factor in ascending order:
//!     whole = sum over the share of number * (weight's number - the one that stands for zero), exactly
//!     y = fma(whole, factor * scale, y)
//!     y = fma(sum of the share's numbers, offset * scale, y)     where weights have an offset of their own
//! ```
//!
//! Sums of whole numbers are exact in any order, so that every instruction gives the same bits. A row is rounded
//! by itself: what is in the batch beside it changes nothing. That is how llama.cpp multiplies these formats.
//!
//! ```text
//! tile of m rows, each block:   8 x [m x 4 numbers] [m scales] [m x 2 sums of 16 numbers]
//! ```
#![allow(clippy::needless_range_loop)] // As in `linear`.

use std::marker::PhantomData;

use super::blocks::{Numbers, QUAD, QUAD_BYTES, SIDE};
use super::isa::Kernel;
use super::linear::{Arithmetic, Tile, by_height};
use super::simd::Simd;

/// Values that share a scale.
const BLOCK: usize = 32;

/// How far ahead weights are asked of the memory: some 50 ns of what a thread reads of it.
const AHEAD: usize = 2048;

/// Bytes of a row's block: its numbers, its scale and its two sums.
const BLOCK_BYTES: usize = BLOCK + 4 + 2 * 4;

/// Blocks whose largest magnitude is below this are zeros: 127 by it is a number.
const LEAST: f32 = f32::from_bits((127 - 100) << 23);

/// Adding this makes the nearest whole number, of two the even one, the last bits of the sum.
const WHOLE: f32 = 12_582_912.0;

/// How many `f32` the rounded rows take.
pub fn scratch_len(rows: usize, cols: usize) -> usize {
    rows * cols.div_ceil(BLOCK) * (BLOCK_BYTES / size_of::<f32>())
}

/// Rounds the rows of a tile.
pub struct Round<'a> {
    /// `height x cols`.
    pub rows: &'a [f32],
    /// How many.
    pub height: usize,
    /// As many values as [`scratch_len`] says.
    pub to: *mut f32,
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { rows, height, to } = self;
        let to = to.cast::<u8>();
        for (m, row) in rows.chunks_exact(rows.len() / height).enumerate() {
            for (b, values) in row.chunks(BLOCK).enumerate() {
                let mut block = [0.0; BLOCK];
                block[..values.len()].copy_from_slice(values);
                let (numbers, scale, sums) = round(&block);
                let to = to.wrapping_add(b * height * BLOCK_BYTES);
                let behind = to.wrapping_add(height * BLOCK);
                // SAFETY: the tile has room for this block of all its rows, and all parts of it are aligned to
                // four bytes.
                unsafe {
                    for (q, four) in numbers.as_chunks::<QUAD>().0.iter().enumerate() {
                        to.add((q * height + m) * QUAD).cast::<[i8; QUAD]>().write(*four);
                    }
                    behind.cast::<f32>().add(m).write(scale);
                    behind.cast::<i32>().add(height + 2 * m).write(sums[0]);
                    behind.cast::<i32>().add(height + 2 * m + 1).write(sums[1]);
                }
            }
        }
    }
}

/// The numbers of a block, their scale, and the sums of each half.
#[inline(always)]
fn round(values: &[f32; BLOCK]) -> ([i8; BLOCK], f32, [i32; 2]) {
    // Magnitudes order as their bits do; what is no number is the largest.
    let largest = values.iter().fold(0, |most, value| most.max(value.to_bits() & 0x7FFF_FFFF));
    let largest = f32::from_bits(largest);
    if largest < LEAST {
        return ([0; BLOCK], 0.0, [0; 2]);
    }
    let inverse = 127.0 / largest;
    let mut numbers = [0; BLOCK];
    for (number, value) in numbers.iter_mut().zip(values) {
        let bits = (value * inverse + WHOLE).to_bits();
        *number = bits.wrapping_sub(WHOLE.to_bits()) as i8;
    }
    let sum = |half: &[i8]| half.iter().map(|number| i32::from(*number)).sum();
    let (low, high) = numbers.split_at(SIDE);
    (numbers, largest / 127.0, [sum(low), sum(high)])
}

/// Products of whole numbers.
pub(super) struct Dots<F>(PhantomData<F>);

// SAFETY: a tile has a record of each block that its columns begin, as `Round` writes them, and its panels have the
// shares of these, which is what `Tile` promises.
unsafe impl<F: Numbers> Arithmetic for Dots<F> {
    const DOTS: bool = true;
    /// 6 rows of so many numbers are 16 KiB. Sums are written and read again at each cut.
    const CUT: usize = 2048;

    fn rows_max(wide: bool) -> usize {
        if wide { 6 } else { 3 }
    }

    #[inline(always)]
    fn offset((row, height): (usize, usize), k: usize, cols: usize) -> usize {
        (row * cols.div_ceil(BLOCK) + height * (k / BLOCK)) * BLOCK_BYTES
    }

    #[inline(always)]
    unsafe fn of_height<S: Simd>(tile: &Tile<Self>, height: usize) {
        if S::WIDE {
            by_height!(tile, height, S: 1 x 4, 2 x 4, 3 x 2, 4 x 2, 5 x 2, 6 x 2)
        } else {
            by_height!(tile, height, S: 1 x 2, 2 x 1, 3 x 1)
        }
    }

    #[inline(always)]
    unsafe fn accumulate<S: Simd, const M: usize, const P: usize>(
        sums: &mut [[S::F; P]; M],
        tile: &Tile<Self>,
        panel: usize,
    ) {
        const { assert!(BLOCK.is_multiple_of(F::SHARE), "a share is in one block") };
        // SAFETY: the caller's.
        unsafe {
            // A copy, which stays in registers.
            let mut chains = *sums;
            let weights = tile.weights.add(panel * tile.panel_bytes);
            for block in 0..tile.depth.div_ceil(BLOCK) {
                let record = tile.x.add(block * M * BLOCK_BYTES);
                let scales = record.add(M * BLOCK).cast::<f32>();
                let halves = scales.add(M).cast::<i32>();
                for first in (0..BLOCK).step_by(F::SHARE) {
                    let k = tile.k0 + block * BLOCK + first;
                    let mut shares = [F::share::<S>(weights, k); P];
                    for p in 1..P {
                        shares[p] = F::share::<S>(weights.add(p * tile.panel_bytes), k);
                    }
                    let sum_of = |m: usize| match F::SHARE {
                        SIDE => *halves.add(2 * m + first / SIDE),
                        _ => *halves.add(2 * m) + *halves.add(2 * m + 1),
                    };
                    let mut wholes = [[S::splat_int(0); P]; M];
                    if let Some(zero) = F::ZERO {
                        for m in 0..M {
                            wholes[m] = [S::splat_int(-i32::from(zero) * sum_of(m)); P];
                        }
                    }
                    for share in &shares {
                        // Both sides of numbers that share lines ask for them once.
                        let lines = if share.right == 0 { F::LINES } else { 0 };
                        for line in 0..lines {
                            S::prefetch(share.numbers.wrapping_add(AHEAD + line * QUAD_BYTES));
                        }
                    }
                    let numbers = record.add(first * M).cast::<i8>();
                    for q in 0..F::SHARE / QUAD {
                        let mut quads = [F::quad::<S>(&shares[0], q); P];
                        for p in 1..P {
                            quads[p] = F::quad::<S>(&shares[p], q);
                        }
                        for m in 0..M {
                            let x = S::splat_bytes(numbers.add((q * M + m) * QUAD));
                            for p in 0..P {
                                wholes[m][p] = match F::WIDE {
                                    true => S::dot::<true>(wholes[m][p], quads[p], x),
                                    false => S::dot::<false>(wholes[m][p], quads[p], x),
                                };
                            }
                        }
                    }
                    for m in 0..M {
                        let scale = S::splat(*scales.add(m));
                        for p in 0..P {
                            let factor = S::mul(shares[p].factor, scale);
                            chains[m][p] = S::fma(S::floats(wholes[m][p]), factor, chains[m][p]);
                            if F::ZERO.is_none() {
                                let offset = S::mul(shares[p].offset, scale);
                                let all = S::splat(sum_of(m) as f32);
                                chains[m][p] = S::fma(all, offset, chains[m][p]);
                            }
                        }
                    }
                }
            }
            *sums = chains;
        }
    }
}
