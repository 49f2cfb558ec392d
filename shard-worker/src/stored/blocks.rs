//! ○ Blocks of 32 weights: GGUF's Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1.

use half::f16;

/// Weights that share a scale, as GGUF files lay them out.
pub trait Block: Send + Sync + 'static {
    /// Weights of one.
    const WEIGHTS: usize;
    /// Bytes of one.
    const BYTES: usize;

    /// The exact values of a block; where they are no `f32`, rounded once.
    fn decode(block: &[u8], values: &mut [f32]);
}

/// A block that values can be rounded to.
pub trait Encode: Block {
    /// Rounds up to `WEIGHTS` values as llama.cpp's reference quantiser does. What is missing at the end
    /// counts nothing.
    fn encode(values: &[f32], block: &mut [u8]);
}

/// The half-precision number at the beginning of `bytes`.
pub(crate) fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// The nearest whole number, of two the even one, as [`f32::round_ties_even`]; of numbers below 2^22. That one is a
/// call for each number on x86-64 without SSE 4.1, which is what this is compiled for.
pub(super) fn nearest(value: f32) -> f32 {
    /// Here whole numbers are next to each other.
    const WHOLE: f32 = 12_582_912.0;
    value + WHOLE - WHOLE
}

/// The same, of two the one that is farther from zero, as [`f32::round`].
pub(super) fn nearest_away(value: f32) -> f32 {
    (value + 0.499_999_97_f32.copysign(value)) as i32 as f32
}

/// Writes a half-precision number.
pub(super) fn put_half(bytes: &mut [u8], at: usize, value: f32) {
    bytes[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// `d`, 32 signed bytes: `d * q`.
pub struct Q8_0;

impl Block for Q8_0 {
    const WEIGHTS: usize = 32;
    const BYTES: usize = 34;

    fn decode(block: &[u8], values: &mut [f32]) {
        let d = half_at(block, 0);
        for (value, q) in values.iter_mut().zip(&block[2..Self::BYTES]) {
            *value = d * f32::from(*q as i8);
        }
    }
}

impl Encode for Q8_0 {
    fn encode(values: &[f32], block: &mut [u8]) {
        let most = values.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
        let d = most / 127.0;
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        put_half(block, 0, d);
        let (given, missing) = block[2..Self::BYTES].split_at_mut(values.len());
        for (q, value) in given.iter_mut().zip(values) {
            *q = nearest_away(value * inverse) as i8 as u8;
        }
        missing.fill(0);
    }
}

/// `d`, 32 numbers of four bits, the first 16 in the low halves: `d * (q - 8)`.
pub struct Q4_0;

impl Block for Q4_0 {
    const WEIGHTS: usize = 32;
    const BYTES: usize = 18;

    fn decode(block: &[u8], values: &mut [f32]) {
        let d = half_at(block, 0);
        for (j, q) in block[2..Self::BYTES].iter().enumerate() {
            values[j] = d * (f32::from(q & 0xF) - 8.0);
            values[j + 16] = d * (f32::from(q >> 4) - 8.0);
        }
    }
}

impl Encode for Q4_0 {
    fn encode(values: &[f32], block: &mut [u8]) {
        // The value farthest from zero, with its sign: it becomes -8 exactly.
        let (mut farthest, mut most) = (0.0_f32, 0.0_f32);
        for value in values {
            if value.abs() > most {
                (farthest, most) = (*value, value.abs());
            }
        }
        let d = farthest / -8.0;
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        put_half(block, 0, d);
        let number = |k: usize| {
            let value = values.get(k).map_or(0.0, |value| value * inverse);
            ((value + 8.5) as i8).clamp(0, 15) as u8
        };
        for (j, q) in block[2..Self::BYTES].iter_mut().enumerate() {
            *q = number(j) | number(j + 16) << 4;
        }
    }
}

/// `d`, `m`, 32 numbers of four bits: `d * q + m`.
pub struct Q4_1;

impl Block for Q4_1 {
    const WEIGHTS: usize = 32;
    const BYTES: usize = 20;

    fn decode(block: &[u8], values: &mut [f32]) {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        for (j, q) in block[4..Self::BYTES].iter().enumerate() {
            values[j] = d * f32::from(q & 0xF) + m;
            values[j + 16] = d * f32::from(q >> 4) + m;
        }
    }
}

/// The fifth bits of 32 numbers.
fn fifth_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Number `j` and number `j + 16` of five bits.
fn five_bits(q: u8, high: u32, j: usize) -> [f32; 2] {
    let low = u32::from(q & 0xF) | (high >> j & 1) << 4;
    let upper = u32::from(q >> 4) | (high >> (j + 16) & 1) << 4;
    [low as f32, upper as f32]
}

/// `d`, 32 numbers of five bits, their fifth bits first: `d * (q - 16)`.
pub struct Q5_0;

impl Block for Q5_0 {
    const WEIGHTS: usize = 32;
    const BYTES: usize = 22;

    fn decode(block: &[u8], values: &mut [f32]) {
        let (d, high) = (half_at(block, 0), fifth_bits(block, 2));
        for (j, q) in block[6..Self::BYTES].iter().enumerate() {
            let [low, upper] = five_bits(*q, high, j);
            values[j] = d * (low - 16.0);
            values[j + 16] = d * (upper - 16.0);
        }
    }
}

/// `d`, `m`, 32 numbers of five bits: `d * q + m`.
pub struct Q5_1;

impl Block for Q5_1 {
    const WEIGHTS: usize = 32;
    const BYTES: usize = 24;

    fn decode(block: &[u8], values: &mut [f32]) {
        let (d, m, high) = (half_at(block, 0), half_at(block, 2), fifth_bits(block, 4));
        for (j, q) in block[8..Self::BYTES].iter().enumerate() {
            let [low, upper] = five_bits(*q, high, j);
            values[j] = d * low + m;
            values[j + 16] = d * upper + m;
        }
    }
}

/// A scale of four bytes, 128 numbers of eight bits with a fraction: `scale * number`. No file has such
/// blocks; an FP8 checkpoint's rows are laid out so.
pub struct Fp8;

impl Fp8 {
    /// Where the numbers are.
    pub(crate) const NUMBERS_AT: usize = 4;
}

impl Block for Fp8 {
    const WEIGHTS: usize = 128;
    const BYTES: usize = 132;

    fn decode(block: &[u8], values: &mut [f32]) {
        let scale = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        for (value, number) in values.iter_mut().zip(&block[Self::NUMBERS_AT..Self::BYTES]) {
            *value = scale * e4m3(*number);
        }
    }
}

impl Encode for Fp8 {
    fn encode(values: &[f32], block: &mut [u8]) {
        let most = values.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
        let scale = most / E4M3_MAX;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        // The inverse of a scale that small is infinite.
        let (scale, inverse) = if inverse.is_finite() { (scale, inverse) } else { (0.0, 0.0) };
        block[..Self::NUMBERS_AT].copy_from_slice(&scale.to_le_bytes());
        let (given, missing) = block[Self::NUMBERS_AT..Self::BYTES].split_at_mut(values.len());
        for (number, value) in given.iter_mut().zip(values) {
            *number = to_e4m3(value * inverse);
        }
        missing.fill(0);
    }
}

/// The largest number of [`e4m3`].
const E4M3_MAX: f32 = 448.0;

/// The value of eight bits: sign, four of exponent, three of fraction; no infinities, and all bits of
/// the magnitude set is no number.
pub fn e4m3(bits: u8) -> f32 {
    let magnitude = bits & 0x7F;
    if magnitude == 0x7F {
        return f32::NAN;
    }
    // The exponent's bias is 7 here and 127 there; subnormal numbers come out right, too.
    let value = f32::from_bits(u32::from(magnitude) << 20) * f32::from_bits((127 + 120) << 23);
    if bits & 0x80 == 0 { value } else { -value }
}

/// The nearest number, ties to even; beyond the largest, that.
pub fn to_e4m3(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs().min(E4M3_MAX);
    // Adding a number 2^20 times as large as the last bit that is kept rounds there; below 2^-6 that is
    // always 2^-9.
    let exponent = (magnitude.to_bits() >> 23).max(127 - 6);
    let rounder = f32::from_bits((exponent + 20) << 23);
    let rounded = (magnitude + rounder) - rounder;
    // The way back of `e4m3`.
    let bits = (rounded * f32::from_bits((127 - 120) << 23)).to_bits() >> 20;
    sign | bits as u8
}
