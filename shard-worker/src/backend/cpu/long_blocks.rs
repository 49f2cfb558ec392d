//! Blocks of numbers of five and six bits, 16 rows side by side: four bits as in `blocks`, the others
//! beside them.
//!
//! ```text
//! q5_k, 256 columns:   [16 scales][16 least scales] 8 x [16 numbers][16 least numbers] 8 x [as q4_0][fifth bits]
//! q6_k, 256 columns:   [16 scales] 8 x [16 numbers][16 numbers] 8 x [as q4_0][upper two bits]
//!
//! fifth bits:          a quad of columns 0..4, with those of columns 4..8 one bit higher, and so on to 28..32
//! upper two bits:      a quad of columns 0..4, with those of 4..8 two bits higher, … 12..16; then of 16..32
//! ```
//!
//! Values are those of `blocks`: exact, or rounded once.

use super::blocks::{
    Blocks, HALVES, LOW, Numbers, PART, PARTS, QUAD, QUAD_BYTES, SCALES, SIDE, Scaled,
    numbers_format, part_of, part_offsets, place_scale, quad_at,
};
use super::format::Format;
use super::packed::PANEL;
use super::simd::Simd;
use crate::stored::{self, Block};

/// Writes the lower four bits of row `lane` of a part, whose numbers `number` gives, and then those above:
/// `bits` of them, in quads of so many columns that they fill bytes.
unsafe fn place_long(quads: *mut u8, bits: usize, lane: usize, number: impl Fn(usize) -> u8) {
    // SAFETY: the caller's: the halves of a part and their further bits begin at `quads`.
    unsafe {
        for k in 0..SIDE {
            let halves = number(k) & LOW | (number(k + SIDE) & LOW) << 4;
            quads.add(quad_at(k, lane)).write(halves);
        }
        let columns = QUAD * 8 / bits;
        for first in (0..PART).step_by(columns) {
            for j in 0..QUAD {
                let own = (first + j..first + columns).step_by(QUAD);
                let all = own.zip((0..8).step_by(bits));
                let all = all.fold(0, |all, (k, by)| all | number(k) >> 4 << by);
                quads.add(HALVES + quad_at(first * QUAD / columns + j, lane)).write(all);
            }
        }
    }
}

/// [`Precision::Q5K`](shoal_protocol::plan::Precision::Q5K).
pub struct Q5K;

/// Bytes of the quads of a part.
const Q5K_QUADS: usize = HALVES + QUAD_BYTES;
/// Bytes of a block of a panel.
const Q5K_BYTES: usize = 2 * SCALES + PARTS * (2 * PANEL + Q5K_QUADS);
const _: () = assert!(
    Q5K_BYTES == PANEL * shoal_protocol::plan::Precision::Q5K.block().1 as usize,
    "plans count these bytes"
);

impl Q5K {
    #[inline(always)]
    fn offsets(k: usize) -> (usize, usize, usize) {
        part_offsets(k, (Q5K_BYTES, 2 * SCALES, Q5K_QUADS))
    }
}

numbers_format!(Q5K);

// SAFETY: offsets are those of the layout above, inside the panel for each of its columns.
unsafe impl Numbers for Q5K {
    const SHARE: usize = PART;
    const ZERO: Option<u8> = None;
    const WIDE: bool = false;
    const LINES: usize = 5;

    #[inline(always)]
    unsafe fn share<S: Simd>(panel: *const u8, k: usize) -> Scaled<S> {
        let (block, part, quads) = Self::offsets(k);
        // SAFETY: the caller's.
        unsafe {
            let (factor, offset) = part_of::<S>(panel.add(block), panel.add(part));
            let numbers = panel.add(quads);
            Scaled { numbers, more: numbers.add(HALVES), right: 0, factor, offset }
        }
    }
    #[inline(always)]
    unsafe fn quad<S: Simd>(share: &Scaled<S>, q: usize) -> S::Bytes {
        // SAFETY: the caller's.
        unsafe { S::join(share.half_quad(q), S::bits(S::load_bytes(share.more), q as u32, 1)) }
    }
}

impl Blocks for Q5K {
    type Stored = stored::Q5K;

    unsafe fn place(panel: *mut u8, block: usize, lane: usize, stored: &[u8]) {
        let first = block * stored::Q5K::WEIGHTS;
        for j in 0..PARTS {
            let (block, part, quads) = Self::offsets(first + j * PART);
            let (scale, least) = stored::six_bits(&stored[stored::Q4K::PARTS_AT..], j);
            // SAFETY: the caller's.
            unsafe {
                place_scale(panel.add(block), lane, stored, 0);
                place_scale(panel.add(block + SCALES), lane, stored, 2);
                panel.add(part + lane).write(scale);
                panel.add(part + PANEL + lane).write(least);
                let number = |k: usize| stored::Q5K::number(stored, j, k);
                place_long(panel.add(quads), 1, lane, number);
            }
        }
    }
}

/// [`Precision::Q6K`](shoal_protocol::plan::Precision::Q6K).
pub struct Q6K;

/// Bytes of the quads of a part.
const Q6K_QUADS: usize = HALVES + 2 * QUAD_BYTES;
/// Bytes of a block of a panel.
const Q6K_BYTES: usize = SCALES + PARTS * (2 * PANEL + Q6K_QUADS);
const _: () = assert!(
    Q6K_BYTES == PANEL * shoal_protocol::plan::Precision::Q6K.block().1 as usize,
    "plans count these bytes"
);

impl Q6K {
    #[inline(always)]
    fn offsets(k: usize) -> (usize, usize, usize) {
        part_offsets(k, (Q6K_BYTES, SCALES, Q6K_QUADS))
    }
}

numbers_format!(Q6K);

// SAFETY: as above.
unsafe impl Numbers for Q6K {
    /// One side of a part.
    const SHARE: usize = SIDE;
    const ZERO: Option<u8> = Some(32);
    const WIDE: bool = false;
    const LINES: usize = 6;

    #[inline(always)]
    unsafe fn share<S: Simd>(panel: *const u8, k: usize) -> Scaled<S> {
        let (block, part, quads) = Self::offsets(k);
        let side = k % PART / SIDE;
        // SAFETY: the caller's.
        unsafe {
            let own = panel.add(part + side * PANEL);
            let scale = S::mul(S::load_f16(panel.add(block).cast()), S::load_i8(own.cast()));
            let numbers = panel.add(quads);
            let share = Scaled::around(numbers, scale, Self::ZERO);
            let more = numbers.add(HALVES + side * QUAD_BYTES);
            Scaled { more, right: 4 * side as u32, ..share }
        }
    }
    #[inline(always)]
    unsafe fn quad<S: Simd>(share: &Scaled<S>, q: usize) -> S::Bytes {
        // SAFETY: the caller's.
        unsafe {
            let low = S::bits(S::load_bytes(share.numbers.add(q * QUAD_BYTES)), share.right, LOW);
            S::join(low, S::bits(S::load_bytes(share.more), 2 * q as u32, 3))
        }
    }
}

impl Blocks for Q6K {
    type Stored = stored::Q6K;

    unsafe fn place(panel: *mut u8, block: usize, lane: usize, stored: &[u8]) {
        let first = block * stored::Q6K::WEIGHTS;
        for j in 0..PARTS {
            let (block, part, quads) = Self::offsets(first + j * PART);
            let scales = &stored[stored::Q6K::SCALES_AT + 2 * j..];
            // SAFETY: the caller's.
            unsafe {
                place_scale(panel.add(block), lane, stored, stored::Q6K::SCALE_AT);
                panel.add(part + lane).write(scales[0]);
                panel.add(part + PANEL + lane).write(scales[1]);
                let number = |k: usize| stored::Q6K::number(stored, j * PART + k);
                place_long(panel.add(quads), 2, lane, number);
            }
        }
    }
}
