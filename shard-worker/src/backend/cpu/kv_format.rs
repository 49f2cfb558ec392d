//! How keys and values are held: one implementation of [`KvFormat`] for each precision of the cache.
//!
//! ```text
//! a head's part of a block:   K [dim][16 slots] │ V [16 slots][dim]          f32, bf16
//! q8_0, by 32 dimensions:     K [16 scales] …, [dim][16 slots] │ V [scales] of each slot, [16 slots][dim]
//! ```
//!
//! Attention reads every key and value back from here, those of the current step too, so what a query
//! sees does not depend on what was computed together with it.

use half::f16;
use shoal_protocol::plan::KvPrecision;

use super::format::{Bf16, Plain};
use super::kv::SLOTS;
use super::simd::{LANES, Simd};
use crate::stored::{Block, Encode, Q8_0, half_at};

/// A type of keys and values.
///
/// # Safety
///
/// `keys` and `values` are the beginnings of a head's two halves of a block (see the module), readable
/// for 16 elements beyond, and `d` is a dimension below `dim`. With a [`Simd`]: as of its methods.
pub unsafe trait KvFormat: Send + Sync + 'static {
    /// Bytes of either half of a head's part of a block.
    fn half_bytes(dim: usize) -> usize;

    /// Rounds a key and a value into slot `slot` of a head's part.
    fn write(part: &mut [u8], slot: usize, key: &[f32], value: &[f32]);

    /// Dimension `d` of the keys of 16 slots.
    unsafe fn keys<S: Simd>(keys: *const u8, d: usize, dim: usize) -> S::F;

    /// Dimensions `d` to `d + 16` of the value of a slot; beyond `dim` they are anything.
    unsafe fn values<S: Simd>(values: *const u8, slot: usize, d: usize, dim: usize) -> S::F;
}

/// Writes element `k` of a key or a value.
fn put<const N: usize>(half: &mut [u8], at: usize, bytes: [u8; N]) {
    half[at * N..][..N].copy_from_slice(&bytes);
}

/// [`KvPrecision::F32`].
pub struct KvF32;

// SAFETY: offsets are those of the layout above.
unsafe impl KvFormat for KvF32 {
    fn half_bytes(dim: usize) -> usize {
        4 * SLOTS * dim
    }
    fn write(part: &mut [u8], slot: usize, key: &[f32], value: &[f32]) {
        let dim = key.len();
        let (keys, values) = part.split_at_mut(Self::half_bytes(dim));
        for (d, (key, value)) in key.iter().zip(value).enumerate() {
            put(keys, d * SLOTS + slot, key.to_ne_bytes());
            put(values, slot * dim + d, value.to_ne_bytes());
        }
    }
    #[inline(always)]
    unsafe fn keys<S: Simd>(keys: *const u8, d: usize, _dim: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::load(keys.cast::<f32>().add(d * SLOTS)) }
    }
    #[inline(always)]
    unsafe fn values<S: Simd>(values: *const u8, slot: usize, d: usize, dim: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::load(values.cast::<f32>().add(slot * dim + d)) }
    }
}

/// [`KvPrecision::Bf16`].
pub struct KvBf16;

// SAFETY: offsets are those of the layout above.
unsafe impl KvFormat for KvBf16 {
    fn half_bytes(dim: usize) -> usize {
        2 * SLOTS * dim
    }
    fn write(part: &mut [u8], slot: usize, key: &[f32], value: &[f32]) {
        let dim = key.len();
        let (keys, values) = part.split_at_mut(Self::half_bytes(dim));
        for (d, (key, value)) in key.iter().zip(value).enumerate() {
            put(keys, d * SLOTS + slot, Bf16::encode(*key).to_ne_bytes());
            put(values, slot * dim + d, Bf16::encode(*value).to_ne_bytes());
        }
    }
    #[inline(always)]
    unsafe fn keys<S: Simd>(keys: *const u8, d: usize, _dim: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::load_bf16(keys.cast::<u16>().add(d * SLOTS)) }
    }
    #[inline(always)]
    unsafe fn values<S: Simd>(values: *const u8, slot: usize, d: usize, dim: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::load_bf16(values.cast::<u16>().add(slot * dim + d)) }
    }
}

/// [`KvPrecision::Q8_0`].
pub struct KvQ8_0;

/// Dimensions that share a scale.
const BLOCK: usize = Q8_0::WEIGHTS;
const _: () = assert!(BLOCK.is_multiple_of(LANES), "one scale for each vector of a value");

impl KvQ8_0 {
    /// Bytes of the scales of either half.
    #[inline(always)]
    fn scales(dim: usize) -> usize {
        2 * SLOTS * dim.div_ceil(BLOCK)
    }
}

// SAFETY: offsets are those of the layout above.
unsafe impl KvFormat for KvQ8_0 {
    fn half_bytes(dim: usize) -> usize {
        Self::scales(dim) + SLOTS * dim
    }
    fn write(part: &mut [u8], slot: usize, key: &[f32], value: &[f32]) {
        let dim = key.len();
        let blocks = dim.div_ceil(BLOCK);
        let (keys, values) = part.split_at_mut(Self::half_bytes(dim));
        let (key_scales, keys) = keys.split_at_mut(Self::scales(dim));
        let (value_scales, values) = values.split_at_mut(Self::scales(dim));
        let mut rounded = [0; Q8_0::BYTES];
        for (b, (key, value)) in key.chunks(BLOCK).zip(value.chunks(BLOCK)).enumerate() {
            Q8_0::encode(key, &mut rounded);
            put(key_scales, b * SLOTS + slot, f16::from_f32(half_at(&rounded, 0)).to_ne_bytes());
            for (i, number) in rounded[2..][..key.len()].iter().enumerate() {
                keys[(b * BLOCK + i) * SLOTS + slot] = *number;
            }
            Q8_0::encode(value, &mut rounded);
            let scale = f16::from_f32(half_at(&rounded, 0)).to_ne_bytes();
            put(value_scales, slot * blocks + b, scale);
            values[slot * dim + b * BLOCK..][..value.len()]
                .copy_from_slice(&rounded[2..][..value.len()]);
        }
    }
    #[inline(always)]
    unsafe fn keys<S: Simd>(keys: *const u8, d: usize, dim: usize) -> S::F {
        // SAFETY: the caller's; half bytes of a block are even, so scales are aligned.
        unsafe {
            let scales = S::load_f16(keys.cast::<u16>().add(d / BLOCK * SLOTS));
            let numbers = keys.add(Self::scales(dim) + d * SLOTS);
            S::mul(scales, S::load_i8(numbers.cast()))
        }
    }
    #[inline(always)]
    unsafe fn values<S: Simd>(values: *const u8, slot: usize, d: usize, dim: usize) -> S::F {
        // SAFETY: as above; 16 dimensions from a multiple of 16 on have one scale.
        unsafe {
            let blocks = dim.div_ceil(BLOCK);
            let scale = *values.cast::<u16>().add(slot * blocks + d / BLOCK);
            let scale = S::splat(f16::from_bits(scale).to_f32());
            let numbers = values.add(Self::scales(dim) + slot * dim + d);
            S::mul(scale, S::load_i8(numbers.cast()))
        }
    }
}

/// Runs `$body` with `$format` naming the [`KvFormat`] of a [`KvPrecision`].
macro_rules! with_kv {
    ($precision:expr, $format:ident => $body:expr) => {
        match $precision {
            shoal_protocol::plan::KvPrecision::F32 => {
                type $format = $crate::backend::cpu::kv_format::KvF32;
                $body
            }
            shoal_protocol::plan::KvPrecision::Bf16 => {
                type $format = $crate::backend::cpu::kv_format::KvBf16;
                $body
            }
            shoal_protocol::plan::KvPrecision::Q8_0 => {
                type $format = $crate::backend::cpu::kv_format::KvQ8_0;
                $body
            }
        }
    };
}
pub(crate) use with_kv;

/// Bytes of a head's part of a block.
pub(super) fn part_bytes(held: KvPrecision, dim: usize) -> usize {
    with_kv!(held, K => 2 * K::half_bytes(dim))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_takes_what_the_planner_counts() {
        for held in KvPrecision::ALL {
            for dim in [1, 31, 32, 64, 80, 96, 128, 576] {
                let counted = 2 * SLOTS as u64 * held.vector_bytes(dim as u64);
                assert_eq!(part_bytes(held, dim) as u64, counted, "{held}, {dim} dimensions");
            }
        }
    }
}
