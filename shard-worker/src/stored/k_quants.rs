//! ○ Blocks of 256 weights: GGUF's Q4_K, Q5_K and Q6_K.
//!
//! Eight parts of 32 weights (sixteen of 16 in Q6_K) have a small whole number each that, times the
//! block's own scale, is theirs.

use super::blocks::{Block, Encode, half_at, nearest, put_half};

/// Weights of a part.
const PART: usize = 32;
/// Parts of a block.
const PARTS: usize = 8;

/// The scale and the least value of part `j`, six bits each, out of 12 bytes.
pub(crate) fn six_bits(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let scale = packed[j + 4] & 0xF | packed[j - 4] >> 6 << 4;
        let least = packed[j + 4] >> 4 | packed[j] >> 6 << 4;
        (scale, least)
    }
}

/// Writes them.
fn put_six_bits(packed: &mut [u8], j: usize, scale: u8, least: u8) {
    if j < 4 {
        packed[j] |= scale;
        packed[j + 4] |= least;
    } else {
        packed[j + 4] |= scale & 0xF | least << 4;
        packed[j - 4] |= scale >> 4 << 6;
        packed[j] |= least >> 4 << 6;
    }
}

/// `d`, `least`, 12 bytes of parts, 256 numbers of four bits: `d * scale * q - least * l`.
pub struct Q4K;

impl Q4K {
    /// Where the parts' numbers are.
    pub(crate) const PARTS_AT: usize = 4;
    /// Where the weights' numbers are: 32 bytes for two parts, the first of the two in the low halves.
    pub(crate) const NUMBERS_AT: usize = 16;
}

impl Block for Q4K {
    const WEIGHTS: usize = 256;
    const BYTES: usize = 144;

    fn decode(block: &[u8], values: &mut [f32]) {
        let (d, least) = (half_at(block, 0), half_at(block, 2));
        for (part, values) in values.chunks_exact_mut(PART).enumerate() {
            let (scale, m) = six_bits(&block[Self::PARTS_AT..], part);
            let (scale, m) = (d * f32::from(scale), least * f32::from(m));
            let numbers = &block[Self::NUMBERS_AT + part / 2 * PART..][..PART];
            for (value, q) in values.iter_mut().zip(numbers) {
                *value = scale * f32::from(q >> (part % 2 * 4) & 0xF) - m;
            }
        }
    }
}

impl Encode for Q4K {
    fn encode(values: &[f32], block: &mut [u8]) {
        block[..Self::BYTES].fill(0);
        let numbers =
            round_parts(values, block, &Search { number_max: 15.0, first: -1.0, steps: 20 });
        for (k, number) in numbers.into_iter().enumerate() {
            let j = k / PART;
            block[Self::NUMBERS_AT + j / 2 * PART + k % PART] |= number << (j % 2 * 4);
        }
    }
}

/// Which scales are tried.
struct Search {
    /// The largest number.
    number_max: f32,
    /// How far the first scale's largest number is from it.
    first: f32,
    /// How many more scales, each a tenth further.
    steps: u8,
}

/// Writes the scales of Q4_K and Q5_K into the first 16 bytes of a block, which are zeros; the numbers.
fn round_parts(values: &[f32], block: &mut [u8], search: &Search) -> [u8; PART * PARTS] {
    let mut parts = [Part::default(); PARTS];
    for (part, values) in parts.iter_mut().zip(values.chunks(PART)) {
        *part = Part::of(values, search);
    }
    let most = |of: fn(&Part) -> f32| parts.iter().map(of).fold(0.0_f32, f32::max);
    let (scale_max, least_max) = (most(|part| part.scale), most(|part| part.least));
    let inverse = |most: f32| if most > 0.0 { 63.0 / most } else { 0.0 };
    put_half(block, 0, scale_max / 63.0);
    put_half(block, 2, least_max / 63.0);
    for (j, part) in parts.iter().enumerate() {
        let scale = nearest(inverse(scale_max) * part.scale).min(63.0) as u8;
        let least = nearest(inverse(least_max) * part.least).min(63.0) as u8;
        put_six_bits(&mut block[Q4K::PARTS_AT..], j, scale, least);
    }
    let (d, least) = (half_at(block, 0), half_at(block, 2));
    let mut numbers = [0; PART * PARTS];
    for (j, (values, numbers)) in values.chunks(PART).zip(numbers.chunks_mut(PART)).enumerate() {
        let (scale, m) = six_bits(&block[Q4K::PARTS_AT..], j);
        let (scale, m) = (d * f32::from(scale), least * f32::from(m));
        for (number, value) in numbers.iter_mut().zip(values).filter(|_| scale != 0.0) {
            let q = nearest((value + m) / scale).clamp(0.0, search.number_max);
            *number = q as u8;
        }
    }
    numbers
}

/// The scale of a part and how far its least value is below zero.
#[derive(Clone, Copy, Default)]
struct Part {
    scale: f32,
    least: f32,
}

impl Part {
    /// Values are `scale * q - least`; larger values weigh more. Some scales are tried, each followed by
    /// the best line through the numbers that it gives.
    fn of(values: &[f32], search: &Search) -> Self {
        let number_max = search.number_max;
        let mean_square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        let usual = mean_square.sqrt();
        let weight = |value: f32| usual + value.abs();
        let min = values.iter().copied().fold(values[0], f32::min).min(0.0);
        let max = values.iter().copied().fold(values[0], f32::max);
        if max == min {
            return Self { scale: 0.0, least: -min };
        }
        let number =
            |value: f32, inverse: f32| nearest(inverse * (value - min)).clamp(0.0, number_max);
        let error = |inverse: f32, scale: f32, least: f32| {
            let one = |value: &f32| {
                let distance = scale * number(*value, inverse) + least - value;
                weight(*value) * distance * distance
            };
            values.iter().map(one).sum::<f32>()
        };
        let (sum_w, sum_x) = values.iter().fold((0.0, 0.0), |(w, x), value| {
            let weight = weight(*value);
            (w + weight, x + weight * value)
        });
        let first = number_max / (max - min);
        let (mut scale, mut least) = (1.0 / first, min);
        let mut best = error(first, scale, least);
        for step in 0..=search.steps {
            let inverse = (search.first + 0.1 * f32::from(step) + number_max) / (max - min);
            let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0_f32, 0.0_f32, 0.0_f32);
            for value in values {
                let (w, l) = (weight(*value), number(*value, inverse));
                sum_l += w * l;
                sum_l2 += w * l * l;
                sum_xl += w * l * value;
            }
            let determinant = sum_w * sum_l2 - sum_l * sum_l;
            if determinant <= 0.0 {
                continue;
            }
            let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut this_least = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if this_least > 0.0 {
                (this_scale, this_least) = (sum_xl / sum_l2, 0.0);
            }
            let this = error(inverse, this_scale, this_least);
            if this < best {
                (best, scale, least) = (this, this_scale, this_least);
            }
        }
        Self { scale, least: -least }
    }
}

/// As [`Q4K`] with a fifth bit of each number, 32 bytes of them before the other four.
pub struct Q5K;

impl Q5K {
    /// Where the fifth bits are: a byte has those of one column of all parts.
    pub(crate) const FIFTH_AT: usize = 16;
    /// Where the other four are, as in [`Q4K`].
    pub(crate) const NUMBERS_AT: usize = 48;

    /// Number `k` of part `j`.
    pub(crate) fn number(block: &[u8], j: usize, k: usize) -> u8 {
        let low = block[Self::NUMBERS_AT + j / 2 * PART + k] >> (j % 2 * 4) & 0xF;
        low | (block[Self::FIFTH_AT + k] >> j & 1) << 4
    }
}

impl Encode for Q5K {
    fn encode(values: &[f32], block: &mut [u8]) {
        block[..Self::BYTES].fill(0);
        let numbers =
            round_parts(values, block, &Search { number_max: 31.0, first: -0.5, steps: 15 });
        for (at, number) in numbers.into_iter().enumerate() {
            let (j, k) = (at / PART, at % PART);
            block[Self::NUMBERS_AT + j / 2 * PART + k] |= (number & 0xF) << (j % 2 * 4);
            block[Self::FIFTH_AT + k] |= number >> 4 << j;
        }
    }
}

impl Block for Q5K {
    const WEIGHTS: usize = 256;
    const BYTES: usize = 176;

    fn decode(block: &[u8], values: &mut [f32]) {
        let (d, least) = (half_at(block, 0), half_at(block, 2));
        let (fifth, rest) = block[16..Self::BYTES].split_at(PART);
        for (part, values) in values.chunks_exact_mut(PART).enumerate() {
            let (scale, m) = six_bits(&block[4..], part);
            let (scale, m) = (d * f32::from(scale), least * f32::from(m));
            let numbers = &rest[part / 2 * PART..][..PART];
            for ((value, q), fifth) in values.iter_mut().zip(numbers).zip(fifth) {
                let q = q >> (part % 2 * 4) & 0xF | (fifth >> part & 1) << 4;
                *value = scale * f32::from(q) - m;
            }
        }
    }
}

/// 128 bytes of low halves, 64 of two more bits, 16 signed scales, `d`: `d * scale * (q - 32)`.
pub struct Q6K;

impl Q6K {
    /// Weights that share a scale.
    const SHARE: usize = 16;
    /// Where the scales are.
    pub(crate) const SCALES_AT: usize = 192;
    /// Where the block's own scale is.
    pub(crate) const SCALE_AT: usize = 208;
    /// The number that stands for zero.
    const ZERO: f32 = 32.0;

    /// Where the lower four and the upper two bits of number `i` are, and how far each is shifted: two
    /// halves of 128 weights, each of four runs of 32.
    fn places(i: usize) -> [(usize, usize); 2] {
        let (half, run, l) = (i / 128, i % 128 / 32, i % 32);
        [(half * 64 + run % 2 * 32 + l, run / 2 * 4), (128 + half * 32 + l, run * 2)]
    }

    /// Number `i`.
    pub(crate) fn number(block: &[u8], i: usize) -> u8 {
        let [(low, low_by), (high, high_by)] = Self::places(i);
        block[low] >> low_by & 0xF | (block[high] >> high_by & 3) << 4
    }
}

impl Block for Q6K {
    const WEIGHTS: usize = 256;
    const BYTES: usize = 210;

    fn decode(block: &[u8], values: &mut [f32]) {
        let d = half_at(block, Self::SCALE_AT);
        for (i, value) in values[..Self::WEIGHTS].iter_mut().enumerate() {
            let scale = f32::from(block[Self::SCALES_AT + i / Self::SHARE] as i8);
            *value = d * scale * (f32::from(Self::number(block, i)) - Self::ZERO);
        }
    }
}

impl Encode for Q6K {
    fn encode(values: &[f32], block: &mut [u8]) {
        block[..Self::BYTES].fill(0);
        let scales: Vec<f32> = values.chunks(Self::SHARE).map(scale_around_zero).collect();
        // The scale farthest from zero, with its sign: it becomes -128 exactly.
        let farthest = |far: f32, scale: &f32| if scale.abs() > far.abs() { *scale } else { far };
        let most = scales.iter().fold(0.0_f32, farthest);
        if most.abs() < 1e-15 {
            return;
        }
        let inverse = -128.0 / most;
        put_half(block, Self::SCALE_AT, 1.0 / inverse);
        let d = half_at(block, Self::SCALE_AT);
        for (j, (scale, values)) in scales.iter().zip(values.chunks(Self::SHARE)).enumerate() {
            let scale = nearest(inverse * scale).clamp(-128.0, 127.0) as i8;
            block[Self::SCALES_AT + j] = scale as u8;
            let step = d * f32::from(scale);
            for (k, value) in values.iter().enumerate() {
                let number = if step == 0.0 {
                    Self::ZERO
                } else {
                    nearest(value / step).clamp(-32.0, 31.0) + Self::ZERO
                };
                let [(low, low_by), (high, high_by)] = Self::places(j * Self::SHARE + k);
                block[low] |= (number as u8 & 0xF) << low_by;
                block[high] |= (number as u8 >> 4) << high_by;
            }
        }
    }
}

/// The scale with which numbers of -32 to 31 come nearest to these values; larger ones weigh more.
fn scale_around_zero(values: &[f32]) -> f32 {
    let farthest = |far: f32, value: &f32| if value.abs() > far.abs() { *value } else { far };
    let most = values.iter().fold(0.0_f32, farthest);
    if most.abs() < 1e-15 {
        return 0.0;
    }
    let (mut best, mut scale) = (0.0_f32, 0.0);
    for step in -9..=9_i8 {
        let inverse = -(32.0 + 0.1 * f32::from(step)) / most;
        let (mut sum_xl, mut sum_l2) = (0.0_f32, 0.0_f32);
        for value in values {
            let l = nearest(inverse * value).clamp(-32.0, 31.0);
            let weight = value * value;
            sum_xl += weight * value * l;
            sum_l2 += weight * l * l;
        }
        if sum_l2 > 0.0 && sum_xl * sum_xl > best * sum_l2 {
            scale = sum_xl / sum_l2;
            best = scale * sum_xl;
        }
    }
    scale
}
