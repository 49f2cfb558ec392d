//! MXFP4, 16 rows side by side: numbers of four bits that are no whole steps, and so are looked up.
//!
//! ```text
//! mxfp4, 32 columns:   [16 exponents][16 x (16 bytes: column j low, column j + 16 high)]
//! ```
//!
//! Twice a number is a whole one, and half a power of two is exact: so values are those of the format.

use super::blocks::{Blocks, LOW, SIDE};
use super::format::Format;
use super::packed::PANEL;
use super::simd::Simd;
use crate::stored::{self, Block};

/// [`Precision::Mxfp4`](shoal_protocol::plan::Precision::Mxfp4).
pub struct Mxfp4;

/// Bytes of a block of a panel.
const MXFP4_BYTES: usize = PANEL * stored::Mxfp4::BYTES;
const _: () = assert!(
    MXFP4_BYTES == PANEL * shoal_protocol::plan::Precision::Mxfp4.block().1 as usize,
    "plans count these bytes"
);

/// Sixteen columns of half-bytes.
#[derive(Clone, Copy)]
pub struct Looked<S: Simd> {
    numbers: *const u8,
    /// How far right the half that counts is moved.
    shift: u32,
    /// Half of each row's power of two.
    half: S::F,
}

// SAFETY: offsets are those of the layout above, inside the panel for each of its columns.
unsafe impl Format for Mxfp4 {
    const RUN: usize = SIDE;
    type Run<S: Simd> = Looked<S>;

    #[inline(always)]
    unsafe fn open<S: Simd>(panel: *const u8, k: usize) -> Looked<S> {
        // SAFETY: the caller's.
        unsafe {
            let block = panel.add(k / stored::Mxfp4::WEIGHTS * MXFP4_BYTES);
            // Half of the least power is no normal number, so it is found in two steps.
            let exponent = S::sub(S::load_u8(block), S::splat(126.0));
            let half = S::mul(S::power_of_two(exponent), S::splat(0.25));
            let shift = if k % stored::Mxfp4::WEIGHTS >= SIDE { 4 } else { 0 };
            Looked { numbers: block.add(PANEL), shift, half }
        }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(run: &Looked<S>, i: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::mul(run.half, S::load_e2m1(run.numbers.add(i * PANEL), run.shift)) }
    }
}

impl Blocks for Mxfp4 {
    type Stored = stored::Mxfp4;

    unsafe fn place(panel: *mut u8, block: usize, lane: usize, stored: &[u8]) {
        let numbers = &stored[stored::Mxfp4::NUMBERS_AT..Self::Stored::BYTES];
        // In a stored block neighbours share a byte; here the two sides do.
        let number = |k: usize| numbers[k / 2] >> (k % 2 * 4) & LOW;
        // SAFETY: the caller's.
        unsafe {
            let block = panel.add(block * MXFP4_BYTES);
            block.add(lane).write(stored[0]);
            for j in 0..SIDE {
                let halves = number(j) | number(j + SIDE) << 4;
                block.add((1 + j) * PANEL + lane).write(halves);
            }
        }
    }
}
