//! Blocks of weights that share a scale, 16 rows side by side.
//!
//! ```text
//! q8_0, 32 columns:    [16 scales][32 x (16 bytes: a column)]
//! q4_0, 32 columns:    [16 scales][16 x (16 bytes: column j low, column j + 16 high)]
//! q4_k, 256 columns:   [16 scales][16 least scales] 8 x [16 numbers][16 least numbers][as q4_0]
//! q5_k, q6_k:          `long_blocks`
//! fp8, 128 columns:    [16 scales of four bytes][128 x (16 bytes: a column)]
//! ```
//!
//! A weight's value is the `f32` that its block stands for, found exactly (with one rounding where it is
//! none), and then multiplied like any other weight: a product has the bits that it has with these
//! values held as `f32`.

use half::f16;

use super::format::Format;
use super::packed::PANEL;
use super::simd::Simd;
use crate::stored::{self, Block, Encode};

/// Bytes of 16 scales of two bytes.
pub(super) const SCALES: usize = 2 * PANEL;

/// The low half of each byte, the high half of each byte.
pub(super) const LOW: u8 = 0x0F;
const HIGH: u8 = 0xF0;

/// A [`Format`] of blocks.
pub trait Blocks: Format {
    /// How a file would store one row of such a block.
    type Stored: Encode;

    /// Puts a block of one row into its panel.
    ///
    /// # Safety
    ///
    /// As of [`Format`], and nobody else reads or writes this row of the panel.
    unsafe fn place(panel: *mut u8, block: usize, lane: usize, stored: &[u8]);
}

/// Writes the scale that stands at `at` in a stored block.
#[inline(always)]
pub(super) unsafe fn place_scale(to: *mut u8, lane: usize, stored: &[u8], at: usize) {
    // SAFETY: the caller's: 16 scales begin at `to`, which is aligned to two bytes.
    unsafe { to.cast::<u16>().add(lane).write(u16::from_le_bytes([stored[at], stored[at + 1]])) }
}

/// The value of scale `lane`.
#[inline(always)]
pub(super) unsafe fn scale_at(from: *const u8, lane: usize) -> f32 {
    // SAFETY: the caller's: 16 scales begin at `from`, which is aligned to two bytes.
    f16::from_bits(unsafe { *from.cast::<u16>().add(lane) }).to_f32()
}

/// Sixteen columns of bytes or half-bytes whose values are `number * factor + offset`.
#[derive(Clone, Copy)]
pub struct Halves<S: Simd> {
    numbers: *const u8,
    /// The half of each byte that counts. In a high half the number is 16 times as large, and the factor
    /// a sixteenth: both are exact.
    mask: u8,
    factor: S::F,
    offset: S::F,
}

impl<S: Simd> Halves<S> {
    #[inline(always)]
    unsafe fn of(numbers: *const u8, high: bool, factor: S::F, offset: S::F) -> Self {
        // SAFETY: the caller's.
        let sixteenth = unsafe { S::mul(factor, S::splat(1.0 / 16.0)) };
        if high {
            Self { numbers, mask: HIGH, factor: sixteenth, offset }
        } else {
            Self { numbers, mask: LOW, factor, offset }
        }
    }

    /// Rounded once, if at all.
    #[inline(always)]
    unsafe fn column(&self, i: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe {
            let numbers = S::load_u8(self.numbers.add(i * PANEL), self.mask);
            S::fma(numbers, self.factor, self.offset)
        }
    }
}

/// [`Precision::Q8_0`](shoal_protocol::plan::Precision::Q8_0).
pub struct Q8_0;

/// Bytes of a block of a panel.
const Q8_0_BYTES: usize = PANEL * stored::Q8_0::BYTES;

// SAFETY: offsets are those of the layout above, inside the panel for each of its columns.
unsafe impl Format for Q8_0 {
    const RUN: usize = stored::Q8_0::WEIGHTS;
    type Run<S: Simd> = (S::F, *const u8);

    #[inline(always)]
    unsafe fn open<S: Simd>(panel: *const u8, k: usize) -> (S::F, *const u8) {
        // SAFETY: the caller's.
        unsafe {
            let block = panel.add(k / Self::RUN * Q8_0_BYTES);
            (S::load_f16(block.cast()), block.add(SCALES))
        }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>((scale, numbers): &(S::F, *const u8), i: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::mul(*scale, S::load_i8(numbers.add(i * PANEL).cast())) }
    }
    #[inline(always)]
    unsafe fn value(panel: *const u8, k: usize, lane: usize) -> f32 {
        // SAFETY: the caller's.
        unsafe {
            let block = panel.add(k / Self::RUN * Q8_0_BYTES);
            let number = *block.add(SCALES + k % Self::RUN * PANEL + lane) as i8;
            scale_at(block, lane) * f32::from(number)
        }
    }
}

impl Blocks for Q8_0 {
    type Stored = stored::Q8_0;

    unsafe fn place(panel: *mut u8, block: usize, lane: usize, stored: &[u8]) {
        // SAFETY: the caller's.
        unsafe {
            let block = panel.add(block * Q8_0_BYTES);
            place_scale(block, lane, stored, 0);
            for (k, number) in stored[2..Self::Stored::BYTES].iter().enumerate() {
                block.add(SCALES + k * PANEL + lane).write(*number);
            }
        }
    }
}

/// [`Precision::Q4_0`](shoal_protocol::plan::Precision::Q4_0).
pub struct Q4_0;

/// Bytes of a block of a panel.
const Q4_0_BYTES: usize = PANEL * stored::Q4_0::BYTES;
/// Columns that are halves of the same side.
pub(super) const SIDE: usize = 16;

// SAFETY: as above.
unsafe impl Format for Q4_0 {
    const RUN: usize = SIDE;
    type Run<S: Simd> = Halves<S>;

    #[inline(always)]
    unsafe fn open<S: Simd>(panel: *const u8, k: usize) -> Halves<S> {
        // SAFETY: the caller's.
        unsafe {
            let block = panel.add(k / stored::Q4_0::WEIGHTS * Q4_0_BYTES);
            let scale = S::load_f16(block.cast());
            let offset = S::mul(scale, S::splat(-8.0));
            Halves::of(block.add(SCALES), k % stored::Q4_0::WEIGHTS >= SIDE, scale, offset)
        }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(run: &Halves<S>, i: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { run.column(i) }
    }
    #[inline(always)]
    unsafe fn value(panel: *const u8, k: usize, lane: usize) -> f32 {
        // SAFETY: the caller's.
        unsafe {
            let block = panel.add(k / stored::Q4_0::WEIGHTS * Q4_0_BYTES);
            let number = half_byte(block.add(SCALES), k % stored::Q4_0::WEIGHTS, lane);
            let scale = scale_at(block, lane);
            number.mul_add(scale, scale * -8.0)
        }
    }
}

/// The number of column `k` of 32.
#[inline(always)]
pub(super) unsafe fn half_byte(numbers: *const u8, k: usize, lane: usize) -> f32 {
    // SAFETY: the caller's: 16 times 16 bytes begin at `numbers`.
    let byte = unsafe { *numbers.add(k % SIDE * PANEL + lane) };
    f32::from(if k < SIDE { byte & LOW } else { byte >> 4 })
}

impl Blocks for Q4_0 {
    type Stored = stored::Q4_0;

    unsafe fn place(panel: *mut u8, block: usize, lane: usize, stored: &[u8]) {
        // SAFETY: the caller's.
        unsafe {
            let block = panel.add(block * Q4_0_BYTES);
            place_scale(block, lane, stored, 0);
            for (j, halves) in stored[2..Self::Stored::BYTES].iter().enumerate() {
                block.add(SCALES + j * PANEL + lane).write(*halves);
            }
        }
    }
}

/// Scale and offset of a part of 32 columns, of all rows: two small numbers by two scales of its block.
#[inline(always)]
pub(super) unsafe fn part_of<S: Simd>(block: *const u8, part: *const u8) -> (S::F, S::F) {
    // SAFETY: the caller's: a block's two rows of scales, and a part's two rows of numbers, begin there.
    unsafe {
        let scale = S::mul(S::load_f16(block.cast()), S::load_u8(part, u8::MAX));
        let least = S::load_f16(block.add(SCALES).cast());
        let least = S::mul(least, S::load_u8(part.add(PANEL), u8::MAX));
        (scale, S::sub(S::splat(0.0), least))
    }
}

/// The same of one row.
#[inline(always)]
pub(super) unsafe fn part_at(block: *const u8, part: *const u8, lane: usize) -> (f32, f32) {
    // SAFETY: as of `part_of`.
    unsafe {
        let scale = scale_at(block, lane) * f32::from(*part.add(lane));
        let least = scale_at(block.add(SCALES), lane) * f32::from(*part.add(PANEL + lane));
        (scale, 0.0 - least)
    }
}

/// [`Precision::Q4K`](shoal_protocol::plan::Precision::Q4K).
pub struct Q4K;

/// Columns of a part.
pub(super) const PART: usize = 32;
/// Bytes of a part of a panel: two numbers a row, and the weights.
const PART_BYTES: usize = 2 * PANEL + SIDE * PANEL;
/// Bytes of a block of a panel.
const Q4K_BYTES: usize = 2 * SCALES + stored::Q4K::WEIGHTS / PART * PART_BYTES;
const _: () = assert!(
    Q4K_BYTES == PANEL * shoal_protocol::plan::Precision::Q4K.block().1 as usize,
    "plans count these bytes"
);

impl Q4K {
    /// Where the block of column `k` begins, and where its part does.
    #[inline(always)]
    fn offsets(k: usize) -> (usize, usize) {
        let block = k / stored::Q4K::WEIGHTS * Q4K_BYTES;
        (block, block + 2 * SCALES + k % stored::Q4K::WEIGHTS / PART * PART_BYTES)
    }
}

// SAFETY: as above.
unsafe impl Format for Q4K {
    const RUN: usize = SIDE;
    type Run<S: Simd> = Halves<S>;

    #[inline(always)]
    unsafe fn open<S: Simd>(panel: *const u8, k: usize) -> Halves<S> {
        let (block, part) = Self::offsets(k);
        // SAFETY: the caller's.
        unsafe {
            let (block, part) = (panel.add(block), panel.add(part));
            let (scale, offset) = part_of::<S>(block, part);
            Halves::of(part.add(2 * PANEL), k % PART >= SIDE, scale, offset)
        }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(run: &Halves<S>, i: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { run.column(i) }
    }
    #[inline(always)]
    unsafe fn value(panel: *const u8, k: usize, lane: usize) -> f32 {
        let (block, part) = Self::offsets(k);
        // SAFETY: the caller's.
        unsafe {
            let (block, part) = (panel.add(block), panel.add(part));
            let (scale, offset) = part_at(block, part, lane);
            half_byte(part.add(2 * PANEL), k % PART, lane).mul_add(scale, offset)
        }
    }
}

impl Blocks for Q4K {
    type Stored = stored::Q4K;

    unsafe fn place(panel: *mut u8, block: usize, lane: usize, stored: &[u8]) {
        let first = block * stored::Q4K::WEIGHTS;
        for j in 0..stored::Q4K::WEIGHTS / PART {
            let (block, part) = Self::offsets(first + j * PART);
            let (scale, least) = stored::six_bits(&stored[stored::Q4K::PARTS_AT..], j);
            // In a stored block two parts share bytes; here the halves of a part do.
            let numbers = &stored[stored::Q4K::NUMBERS_AT + j / 2 * PART..][..PART];
            let number = |k: usize| numbers[k] >> (j % 2 * 4) & LOW;
            // SAFETY: the caller's.
            unsafe {
                place_scale(panel.add(block), lane, stored, 0);
                place_scale(panel.add(block + SCALES), lane, stored, 2);
                let part = panel.add(part);
                part.add(lane).write(scale);
                part.add(PANEL + lane).write(least);
                for k in 0..SIDE {
                    let halves = number(k) | number(k + SIDE) << 4;
                    part.add((2 + k) * PANEL + lane).write(halves);
                }
            }
        }
    }
}

/// [`Precision::Fp8`](shoal_protocol::plan::Precision::Fp8).
pub struct Fp8;

/// Bytes of a block of a panel.
const FP8_BYTES: usize = PANEL * stored::Fp8::BYTES;
/// Bytes of its scales.
const FP8_SCALES: usize = 4 * PANEL;

// SAFETY: as above; blocks are multiples of four bytes, as matrices are, so that scales are aligned.
unsafe impl Format for Fp8 {
    const RUN: usize = stored::Fp8::WEIGHTS;
    type Run<S: Simd> = (S::F, *const u8);

    #[inline(always)]
    unsafe fn open<S: Simd>(panel: *const u8, k: usize) -> (S::F, *const u8) {
        // SAFETY: the caller's.
        unsafe {
            let block = panel.add(k / Self::RUN * FP8_BYTES);
            (S::load(block.cast()), block.add(FP8_SCALES))
        }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>((scale, numbers): &(S::F, *const u8), i: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::mul(*scale, S::load_e4m3(numbers.add(i * PANEL))) }
    }
    #[inline(always)]
    unsafe fn value(panel: *const u8, k: usize, lane: usize) -> f32 {
        // SAFETY: the caller's.
        unsafe {
            let block = panel.add(k / Self::RUN * FP8_BYTES);
            let number = *block.add(FP8_SCALES + k % Self::RUN * PANEL + lane);
            *block.cast::<f32>().add(lane) * stored::e4m3(number)
        }
    }
}

impl Blocks for Fp8 {
    type Stored = stored::Fp8;

    unsafe fn place(panel: *mut u8, block: usize, lane: usize, stored: &[u8]) {
        let scale = f32::from_le_bytes([stored[0], stored[1], stored[2], stored[3]]);
        let numbers = &stored[stored::Fp8::NUMBERS_AT..Self::Stored::BYTES];
        // SAFETY: the caller's.
        unsafe {
            let block = panel.add(block * FP8_BYTES);
            block.cast::<f32>().add(lane).write(scale);
            for (k, number) in numbers.iter().enumerate() {
                block.add(FP8_SCALES + k * PANEL + lane).write(*number);
            }
        }
    }
}
