//! Blocks of weights that share a scale, 16 rows side by side.
//!
//! ```text
//! a quad, four columns:   [row 0: 4 bytes] … [row 15: 4 bytes]
//! q8_0, 32 columns:       [16 scales][8 quads of numbers + 128]
//! q4_0, 32 columns:       [16 scales][4 quads: low halves are columns 0..16, high halves 16..32]
//! q4_k, 256 columns:      [16 scales][16 least scales] 8 x [16 numbers][16 least numbers] 8 x [as q4_0]
//! q5_k, q6_k:             `long_blocks`
//! fp8, 128 columns:       [16 scales of four bytes][128 x (16 bytes: a column)]
//! ```
//!
//! A weight's value is the `f32` that its block stands for, found exactly (with one rounding where it is
//! none), and then multiplied like any other weight: a product has the bits that it has with these
//! values held as `f32`. The numbers themselves are what products of whole numbers take ([`Numbers`],
//! [`dots`](super::dots)): four columns of a row side by side are what the instruction for those takes.

use super::format::Format;
use super::packed::PANEL;
use super::simd::Simd;
use crate::stored::{self, Block, Encode};

/// Bytes of 16 scales of two bytes.
pub(super) const SCALES: usize = 2 * PANEL;

/// The low half of each byte.
pub(super) const LOW: u8 = 0x0F;

/// Columns of a quad, and its bytes.
pub(super) const QUAD: usize = 4;
pub(super) const QUAD_BYTES: usize = QUAD * PANEL;

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

/// Blocks of whole numbers below 256: a value is `number * factor + offset`.
///
/// # Safety
///
/// As of [`Format`].
pub unsafe trait Numbers: Blocks {
    /// Columns with one factor and offset; a whole number of quads.
    const SHARE: usize;
    /// The number that stands for zero: an offset is so many times the factor below it. `None` where blocks
    /// have an offset of their own.
    const ZERO: Option<u8>;
    /// Whether a number may be 128 or more.
    const WIDE: bool;
    /// Cache lines of the quads in which its columns are.
    const LINES: usize;

    /// The columns from `k` on, a multiple of `SHARE`.
    unsafe fn share<S: Simd>(panel: *const u8, k: usize) -> Scaled<S>;

    /// The numbers of its columns `4q..4q+4`.
    unsafe fn quad<S: Simd>(share: &Scaled<S>, q: usize) -> S::Bytes;
}

/// Columns of 16 rows with one factor and offset a row.
#[derive(Clone, Copy)]
pub struct Scaled<S: Simd> {
    /// The quads in which their numbers are.
    pub(super) numbers: *const u8,
    /// Further bits of these.
    pub(super) more: *const u8,
    /// How far right the halves are moved that count.
    pub(super) right: u32,
    /// Of each row.
    pub(super) factor: S::F,
    /// Of each row.
    pub(super) offset: S::F,
}

impl<S: Simd> Scaled<S> {
    /// Whose numbers are whole bytes or halves from `numbers` on, one of which stands for zero.
    #[inline(always)]
    pub(super) unsafe fn around(numbers: *const u8, factor: S::F, zero: Option<u8>) -> Self {
        let zero = -f32::from(zero.unwrap_or(0));
        // SAFETY: the caller's.
        let offset = unsafe { S::mul(factor, S::splat(zero)) };
        Self { numbers, more: numbers, right: 0, factor, offset }
    }

    /// Numbers of four bits, 32 columns.
    #[inline(always)]
    pub(super) unsafe fn half_quad(&self, q: usize) -> S::Bytes {
        // SAFETY: the caller's.
        unsafe {
            let quad = S::load_bytes(self.numbers.add(q % QUAD * QUAD_BYTES));
            S::bits(quad, (q / QUAD * 4) as u32, LOW)
        }
    }
}

/// [`Format`] of [`Numbers`]: values are rounded once, if at all.
macro_rules! numbers_format {
    ($name:ident) => {
        // SAFETY: that of `Numbers`.
        unsafe impl Format for $name {
            const RUN: usize = <Self as Numbers>::SHARE;
            type Run<S: Simd> = Scaled<S>;

            #[inline(always)]
            unsafe fn open<S: Simd>(panel: *const u8, k: usize) -> Scaled<S> {
                // SAFETY: the caller's.
                unsafe { Self::share::<S>(panel, k) }
            }
            #[inline(always)]
            unsafe fn load<S: Simd>(run: &Scaled<S>, i: usize) -> S::F {
                // SAFETY: the caller's.
                unsafe {
                    let number = S::byte(Self::quad::<S>(run, i / QUAD), i % QUAD);
                    S::fma(number, run.factor, run.offset)
                }
            }
        }
    };
}
pub(super) use numbers_format;

/// Where the byte of row `lane` and column `k` is, from the first quad on.
#[inline(always)]
pub(super) const fn quad_at(k: usize, lane: usize) -> usize {
    k / QUAD * QUAD_BYTES + lane * QUAD + k % QUAD
}

/// Writes the scale that stands at `at` in a stored block.
#[inline(always)]
pub(super) unsafe fn place_scale(to: *mut u8, lane: usize, stored: &[u8], at: usize) {
    // SAFETY: the caller's: 16 scales begin at `to`, which is aligned to two bytes.
    unsafe { to.cast::<u16>().add(lane).write(u16::from_le_bytes([stored[at], stored[at + 1]])) }
}

/// [`Precision::Q8_0`](shoal_protocol::plan::Precision::Q8_0).
pub struct Q8_0;

/// Bytes of a block of a panel.
const Q8_0_BYTES: usize = PANEL * stored::Q8_0::BYTES;
/// What is added to a number, so that it has no sign.
const Q8_0_ZERO: u8 = 128;

numbers_format!(Q8_0);

// SAFETY: offsets are those of the layout above, inside the panel for each of its columns.
unsafe impl Numbers for Q8_0 {
    const SHARE: usize = stored::Q8_0::WEIGHTS;
    const ZERO: Option<u8> = Some(Q8_0_ZERO);
    const WIDE: bool = true;
    const LINES: usize = 8;

    #[inline(always)]
    unsafe fn share<S: Simd>(panel: *const u8, k: usize) -> Scaled<S> {
        // SAFETY: the caller's.
        unsafe {
            let block = panel.add(k / Self::SHARE * Q8_0_BYTES);
            Scaled::around(block.add(SCALES), S::load_f16(block.cast()), Self::ZERO)
        }
    }
    #[inline(always)]
    unsafe fn quad<S: Simd>(share: &Scaled<S>, q: usize) -> S::Bytes {
        // SAFETY: the caller's.
        unsafe { S::load_bytes(share.numbers.add(q * QUAD_BYTES)) }
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
                block.add(SCALES + quad_at(k, lane)).write(number ^ Q8_0_ZERO);
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

numbers_format!(Q4_0);

// SAFETY: as above.
unsafe impl Numbers for Q4_0 {
    const SHARE: usize = stored::Q4_0::WEIGHTS;
    const ZERO: Option<u8> = Some(8);
    const WIDE: bool = false;
    const LINES: usize = 4;

    #[inline(always)]
    unsafe fn share<S: Simd>(panel: *const u8, k: usize) -> Scaled<S> {
        // SAFETY: the caller's.
        unsafe {
            let block = panel.add(k / Self::SHARE * Q4_0_BYTES);
            Scaled::around(block.add(SCALES), S::load_f16(block.cast()), Self::ZERO)
        }
    }
    #[inline(always)]
    unsafe fn quad<S: Simd>(share: &Scaled<S>, q: usize) -> S::Bytes {
        // SAFETY: the caller's.
        unsafe { share.half_quad(q) }
    }
}

impl Blocks for Q4_0 {
    type Stored = stored::Q4_0;

    unsafe fn place(panel: *mut u8, block: usize, lane: usize, stored: &[u8]) {
        // SAFETY: the caller's.
        unsafe {
            let block = panel.add(block * Q4_0_BYTES);
            place_scale(block, lane, stored, 0);
            for (k, halves) in stored[2..Self::Stored::BYTES].iter().enumerate() {
                block.add(SCALES + quad_at(k, lane)).write(*halves);
            }
        }
    }
}

/// Factor and offset of a part of 32 columns, of all rows: two small numbers by two scales of its block.
#[inline(always)]
pub(super) unsafe fn part_of<S: Simd>(block: *const u8, part: *const u8) -> (S::F, S::F) {
    // SAFETY: the caller's: a block's two rows of scales, and a part's two rows of numbers, begin there.
    unsafe {
        let scale = S::mul(S::load_f16(block.cast()), S::load_u8(part));
        let least = S::mul(S::load_f16(block.add(SCALES).cast()), S::load_u8(part.add(PANEL)));
        (scale, S::sub(S::splat(0.0), least))
    }
}

/// [`Precision::Q4K`](shoal_protocol::plan::Precision::Q4K).
pub struct Q4K;

/// Columns of a part.
pub(super) const PART: usize = 32;
/// Parts of a block.
pub(super) const PARTS: usize = 8;
/// Bytes of the halves of a part.
pub(super) const HALVES: usize = SIDE * PANEL;
/// Bytes of a block of a panel.
const Q4K_BYTES: usize = 2 * SCALES + PARTS * (2 * PANEL + HALVES);
const _: () = assert!(
    Q4K_BYTES == PANEL * shoal_protocol::plan::Precision::Q4K.block().1 as usize,
    "plans count these bytes"
);

/// Where, in a panel with blocks of `block_bytes` that begin with `scales` bytes, column `k` has its block, its part's
/// numbers, and its part's quads of `quads` bytes.
#[inline(always)]
pub(super) const fn part_offsets(
    k: usize,
    (block_bytes, scales, quads): (usize, usize, usize),
) -> (usize, usize, usize) {
    let block = k / (PARTS * PART) * block_bytes;
    let part = k / PART % PARTS;
    let first = block + scales;
    (block, first + part * 2 * PANEL, first + PARTS * 2 * PANEL + part * quads)
}

impl Q4K {
    #[inline(always)]
    fn offsets(k: usize) -> (usize, usize, usize) {
        part_offsets(k, (Q4K_BYTES, 2 * SCALES, HALVES))
    }
}

numbers_format!(Q4K);

// SAFETY: as above.
unsafe impl Numbers for Q4K {
    const SHARE: usize = PART;
    const ZERO: Option<u8> = None;
    const WIDE: bool = false;
    const LINES: usize = 4;

    #[inline(always)]
    unsafe fn share<S: Simd>(panel: *const u8, k: usize) -> Scaled<S> {
        let (block, part, quads) = Self::offsets(k);
        // SAFETY: the caller's.
        unsafe {
            let (factor, offset) = part_of::<S>(panel.add(block), panel.add(part));
            let numbers = panel.add(quads);
            Scaled { numbers, more: numbers, right: 0, factor, offset }
        }
    }
    #[inline(always)]
    unsafe fn quad<S: Simd>(share: &Scaled<S>, q: usize) -> S::Bytes {
        // SAFETY: the caller's.
        unsafe { share.half_quad(q) }
    }
}

impl Blocks for Q4K {
    type Stored = stored::Q4K;

    unsafe fn place(panel: *mut u8, block: usize, lane: usize, stored: &[u8]) {
        let first = block * stored::Q4K::WEIGHTS;
        for j in 0..PARTS {
            let (block, part, quads) = Self::offsets(first + j * PART);
            let (scale, least) = stored::six_bits(&stored[stored::Q4K::PARTS_AT..], j);
            // In a stored block two parts share bytes; here the halves of a part do.
            let numbers = &stored[stored::Q4K::NUMBERS_AT + j / 2 * PART..][..PART];
            let number = |k: usize| numbers[k] >> (j % 2 * 4) & LOW;
            // SAFETY: the caller's.
            unsafe {
                place_scale(panel.add(block), lane, stored, 0);
                place_scale(panel.add(block + SCALES), lane, stored, 2);
                panel.add(part + lane).write(scale);
                panel.add(part + PANEL + lane).write(least);
                for k in 0..SIDE {
                    let halves = number(k) | number(k + SIDE) << 4;
                    panel.add(quads + quad_at(k, lane)).write(halves);
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
