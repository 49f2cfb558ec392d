//! Blocks of numbers of five and six bits, 16 rows side by side: four bits as in `blocks`, the others
//! beside them.
//!
//! ```text
//! q5_k, 256 columns:   [16 scales][16 least scales] 8 x [16 numbers][16 least numbers][as q4_0][fifth bits]
//! q6_k, 256 columns:   [16 scales] 8 x [16 numbers][16 numbers][as q4_0][upper two bits]
//!
//! further bits of 32 columns: for columns 0..16, then for 16..32
//!                      [16 bytes: one of each row, with the bits of the first columns, the first lowest] …
//! ```
//!
//! Values are those of `blocks`: exact, or rounded once.

use super::blocks::{
    Blocks, LOW, PART, SCALES, SIDE, half_byte, part_at, part_of, place_scale, scale_at,
};
use super::format::Format;
use super::packed::PANEL;
use super::simd::Simd;
use crate::stored::{self, Block};

/// Bytes of the halves of 32 columns.
const HALVES: usize = SIDE * PANEL;
/// Parts of a block.
const PARTS: usize = 8;

/// Bytes of the further bits of 16 columns.
const fn more_bytes(bits: usize) -> usize {
    SIDE * bits / 8 * PANEL
}

/// The byte of a row that has the further bits of a column out of 16, and their place in it.
#[inline(always)]
const fn more_at(bits: usize, i: usize) -> (usize, usize) {
    let in_byte = 8 / bits;
    (i / in_byte * PANEL, i % in_byte * bits)
}

/// Sixteen columns whose values are `number * factor + offset`; numbers have `BITS` bits above four.
#[derive(Clone, Copy)]
pub struct Long<S: Simd, const BITS: usize> {
    numbers: *const u8,
    more: *const u8,
    /// The half of each byte that counts; in a high half all is 16 times as large, and the factor a
    /// sixteenth.
    mask: u8,
    /// What the lowest further bit counts.
    above: f32,
    factor: S::F,
    offset: S::F,
}

impl<S: Simd, const BITS: usize> Long<S, BITS> {
    /// Of the 16 columns on one side of 32, whose halves begin at `numbers`.
    #[inline(always)]
    unsafe fn of(numbers: *const u8, high: bool, factor: S::F, offset: S::F) -> Self {
        let more = numbers.wrapping_add(HALVES);
        if high {
            // SAFETY: the caller's.
            let factor = unsafe { S::mul(factor, S::splat(1.0 / 16.0)) };
            let more = more.wrapping_add(more_bytes(BITS));
            Self { numbers, more, mask: !LOW, above: 256.0, factor, offset }
        } else {
            Self { numbers, more, mask: LOW, above: 16.0, factor, offset }
        }
    }

    /// The number is a whole one below 1,024, so only what is added to it can round.
    #[inline(always)]
    unsafe fn column(&self, i: usize) -> S::F {
        let (byte, place) = more_at(BITS, i);
        let mask = ((1_u8 << BITS) - 1) << place;
        // SAFETY: the caller's.
        unsafe {
            let more = S::load_u8(self.more.add(byte), mask);
            let counts = S::splat(self.above / f32::from(1_u8 << place));
            let number = S::fma(more, counts, S::load_u8(self.numbers.add(i * PANEL), self.mask));
            S::fma(number, self.factor, self.offset)
        }
    }
}

/// The number of column `k` of 32.
#[inline(always)]
unsafe fn long_number(numbers: *const u8, bits: usize, k: usize, lane: usize) -> f32 {
    let (byte, place) = more_at(bits, k % SIDE);
    let side = if k < SIDE { 0 } else { more_bytes(bits) };
    // SAFETY: the caller's: the halves of 32 columns and their further bits begin at `numbers`.
    unsafe {
        let more = *numbers.add(HALVES + side + byte + lane) >> place & ((1 << bits) - 1);
        half_byte(numbers, k, lane) + 16.0 * f32::from(more)
    }
}

/// Writes row `lane` of 32 columns, whose numbers `number` gives.
unsafe fn place_long(numbers: *mut u8, bits: usize, lane: usize, number: impl Fn(usize) -> u8) {
    let in_byte = 8 / bits;
    // SAFETY: the caller's, as of `long_number`.
    unsafe {
        for k in 0..SIDE {
            let halves = number(k) & LOW | (number(k + SIDE) & LOW) << 4;
            numbers.add(k * PANEL + lane).write(halves);
        }
        for side in 0..2 {
            for byte in 0..SIDE / in_byte {
                let first = side * SIDE + byte * in_byte;
                let all =
                    (0..in_byte).fold(0_u8, |all, n| all | (number(first + n) >> 4) << (n * bits));
                let at = HALVES + side * more_bytes(bits) + byte * PANEL;
                numbers.add(at + lane).write(all);
            }
        }
    }
}

/// [`Precision::Q5K`](shoal_protocol::plan::Precision::Q5K).
pub struct Q5K;

/// Bytes of a part of a panel: two numbers a row, and the weights.
const Q5K_PART: usize = 2 * PANEL + HALVES + 2 * more_bytes(1);
/// Bytes of a block of a panel.
const Q5K_BYTES: usize = 2 * SCALES + PARTS * Q5K_PART;
const _: () = assert!(
    Q5K_BYTES == PANEL * shoal_protocol::plan::Precision::Q5K.block().1 as usize,
    "plans count these bytes"
);

impl Q5K {
    /// Where the block of column `k` begins, and where its part does.
    #[inline(always)]
    fn offsets(k: usize) -> (usize, usize) {
        let block = k / stored::Q5K::WEIGHTS * Q5K_BYTES;
        (block, block + 2 * SCALES + k % stored::Q5K::WEIGHTS / PART * Q5K_PART)
    }
}

// SAFETY: offsets are those of the layout above, inside the panel for each of its columns.
unsafe impl Format for Q5K {
    const RUN: usize = SIDE;
    type Run<S: Simd> = Long<S, 1>;

    #[inline(always)]
    unsafe fn open<S: Simd>(panel: *const u8, k: usize) -> Long<S, 1> {
        let (block, part) = Self::offsets(k);
        // SAFETY: the caller's.
        unsafe {
            let (block, part) = (panel.add(block), panel.add(part));
            let (scale, offset) = part_of::<S>(block, part);
            Long::of(part.add(2 * PANEL), k % PART >= SIDE, scale, offset)
        }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(run: &Long<S, 1>, i: usize) -> S::F {
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
            long_number(part.add(2 * PANEL), 1, k % PART, lane).mul_add(scale, offset)
        }
    }
}

impl Blocks for Q5K {
    type Stored = stored::Q5K;

    unsafe fn place(panel: *mut u8, block: usize, lane: usize, stored: &[u8]) {
        let first = block * stored::Q5K::WEIGHTS;
        for j in 0..PARTS {
            let (block, part) = Self::offsets(first + j * PART);
            let (scale, least) = stored::six_bits(&stored[stored::Q4K::PARTS_AT..], j);
            // SAFETY: the caller's.
            unsafe {
                place_scale(panel.add(block), lane, stored, 0);
                place_scale(panel.add(block + SCALES), lane, stored, 2);
                let part = panel.add(part);
                part.add(lane).write(scale);
                part.add(PANEL + lane).write(least);
                let number = |k: usize| stored::Q5K::number(stored, j, k);
                place_long(part.add(2 * PANEL), 1, lane, number);
            }
        }
    }
}

/// [`Precision::Q6K`](shoal_protocol::plan::Precision::Q6K).
pub struct Q6K;

/// Bytes of 32 columns of a panel: a number a row for each side, and the weights.
const Q6K_PART: usize = 2 * PANEL + HALVES + 2 * more_bytes(2);
/// Bytes of a block of a panel.
const Q6K_BYTES: usize = SCALES + PARTS * Q6K_PART;
const _: () = assert!(
    Q6K_BYTES == PANEL * shoal_protocol::plan::Precision::Q6K.block().1 as usize,
    "plans count these bytes"
);
/// The number that stands for zero.
const ZERO: f32 = 32.0;

impl Q6K {
    /// Where the block of column `k` begins, and where its 32 columns do.
    #[inline(always)]
    fn offsets(k: usize) -> (usize, usize) {
        let block = k / stored::Q6K::WEIGHTS * Q6K_BYTES;
        (block, block + SCALES + k % stored::Q6K::WEIGHTS / PART * Q6K_PART)
    }
}

// SAFETY: as above.
unsafe impl Format for Q6K {
    const RUN: usize = SIDE;
    type Run<S: Simd> = Long<S, 2>;

    #[inline(always)]
    unsafe fn open<S: Simd>(panel: *const u8, k: usize) -> Long<S, 2> {
        let (block, part) = Self::offsets(k);
        let high = k % PART >= SIDE;
        // SAFETY: the caller's.
        unsafe {
            let part = panel.add(part);
            let own = part.add(if high { PANEL } else { 0 });
            let scale = S::mul(S::load_f16(panel.add(block).cast()), S::load_i8(own.cast()));
            let offset = S::mul(scale, S::splat(-ZERO));
            Long::of(part.add(2 * PANEL), high, scale, offset)
        }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(run: &Long<S, 2>, i: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { run.column(i) }
    }
    #[inline(always)]
    unsafe fn value(panel: *const u8, k: usize, lane: usize) -> f32 {
        let (block, part) = Self::offsets(k);
        let side = if k % PART >= SIDE { PANEL } else { 0 };
        // SAFETY: the caller's.
        unsafe {
            let part = panel.add(part);
            let scale = scale_at(panel.add(block), lane) * f32::from(*part.add(side + lane) as i8);
            long_number(part.add(2 * PANEL), 2, k % PART, lane).mul_add(scale, scale * -ZERO)
        }
    }
}

impl Blocks for Q6K {
    type Stored = stored::Q6K;

    unsafe fn place(panel: *mut u8, block: usize, lane: usize, stored: &[u8]) {
        let first = block * stored::Q6K::WEIGHTS;
        for j in 0..PARTS {
            let (block, part) = Self::offsets(first + j * PART);
            let scales = &stored[stored::Q6K::SCALES_AT + 2 * j..];
            // SAFETY: the caller's.
            unsafe {
                place_scale(panel.add(block), lane, stored, stored::Q6K::SCALE_AT);
                let part = panel.add(part);
                part.add(lane).write(scales[0]);
                part.add(PANEL + lane).write(scales[1]);
                let number = |k: usize| stored::Q6K::number(stored, j * PART + k);
                place_long(part.add(2 * PANEL), 2, lane, number);
            }
        }
    }
}
