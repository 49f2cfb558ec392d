//! [`Simd`] on x86-64: AVX-512, and AVX2 with FMA and F16C; each with the instruction for dot products of bytes (VNNI)
//! or without.
//!
//! Every block's `unsafe` rests on the trait's contract: the instructions exist and the pointers
//! are valid.
#![allow(clippy::undocumented_unsafe_blocks)] // One proof for all of them, above.

use std::arch::x86_64::*;

use super::simd::{LANES, Simd};

/// 2^120: what the bits of eight, moved to their places in an `f32`, are too small by.
const E4M3_UNIT: f32 = f32::from_bits((127 + 120) << 23);

/// The four bytes at `x` as one number.
#[inline(always)]
unsafe fn four_bytes(x: *const i8) -> i32 {
    unsafe { x.cast::<i32>().read_unaligned() }
}

/// One 512-bit register a vector.
#[derive(Clone, Copy)]
pub struct Avx512<const VNNI: bool>;

#[inline(always)]
fn first_lanes(lanes: usize) -> __mmask16 {
    (((1_u32 << lanes) - 1) & 0xFFFF) as __mmask16
}

// SAFETY: calls happen only where `Isa` found the instructions.
unsafe impl<const VNNI: bool> Simd for Avx512<VNNI> {
    type F = __m512;
    type Bytes = __m512i;
    type Ints = __m512i;
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, lanes: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps(first_lanes(lanes), from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> __m512 {
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> __m512 {
        unsafe {
            let bits = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            let sign = _mm512_slli_epi32::<24>(_mm512_and_si512(bits, _mm512_set1_epi32(0x80)));
            let rest = _mm512_slli_epi32::<20>(_mm512_and_si512(bits, _mm512_set1_epi32(0x7F)));
            let small = _mm512_castsi512_ps(_mm512_or_si512(sign, rest));
            _mm512_mul_ps(small, _mm512_set1_ps(E4M3_UNIT))
        }
    }
    #[inline(always)]
    unsafe fn load_e2m1(from: *const u8, shift: u32) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(twice_e2m1(from, shift))) }
    }
    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn bits(bytes: __m512i, right: u32, mask: u8) -> __m512i {
        unsafe {
            let moved = _mm512_srl_epi16(bytes, _mm_cvtsi32_si128(right as i32));
            _mm512_and_si512(moved, _mm512_set1_epi8(mask as i8))
        }
    }
    #[inline(always)]
    unsafe fn join(low: __m512i, high: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(low, _mm512_slli_epi16::<4>(high)) }
    }
    #[inline(always)]
    unsafe fn byte(bytes: __m512i, i: usize) -> __m512 {
        unsafe {
            let moved = _mm512_srl_epi32(bytes, _mm_cvtsi32_si128(8 * i as i32));
            _mm512_cvtepi32_ps(_mm512_and_si512(moved, _mm512_set1_epi32(0xFF)))
        }
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    unsafe fn floats(value: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(value) }
    }
    #[inline(always)]
    unsafe fn splat_bytes(from: *const i8) -> __m512i {
        unsafe { _mm512_set1_epi32(four_bytes(from)) }
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(sum: __m512i, bytes: __m512i, x: __m512i) -> __m512i {
        unsafe {
            if VNNI {
                return _mm512_dpbusd_epi32(sum, bytes, x);
            }
            // Pairs of products fit 16 bits as long as bytes are below 128, or are 128.
            let pairs =
                |bytes| _mm512_madd_epi16(_mm512_maddubs_epi16(bytes, x), _mm512_set1_epi16(1));
            if !WIDE {
                return _mm512_add_epi32(sum, pairs(bytes));
            }
            let low = pairs(_mm512_and_si512(bytes, _mm512_set1_epi8(0x7F)));
            let high = pairs(_mm512_and_si512(bytes, _mm512_set1_epi8(0x80_u8 as i8)));
            _mm512_add_epi32(sum, _mm512_add_epi32(low, high))
        }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m512) {
        unsafe { _mm512_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn store_first(to: *mut f32, value: __m512, lanes: usize) {
        unsafe { _mm512_mask_storeu_ps(to, first_lanes(lanes), value) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn select_less(a: __m512, b: __m512, then: __m512, otherwise: __m512) -> __m512 {
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), otherwise, then) }
    }
    #[inline(always)]
    unsafe fn power_of_two(exponent: __m512) -> __m512 {
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(exponent), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }
    #[inline(always)]
    unsafe fn fold_add(a: __m512) -> f32 {
        unsafe {
            let high = _mm512_extractf32x8_ps::<1>(a);
            fold_add_8(_mm256_add_ps(_mm512_castps512_ps256(a), high))
        }
    }
    #[inline(always)]
    unsafe fn fold_max(a: __m512) -> f32 {
        unsafe {
            let high = _mm512_extractf32x8_ps::<1>(a);
            fold_max_8(_mm256_max_ps(_mm512_castps512_ps256(a), high))
        }
    }
}

/// Two 256-bit registers a vector.
#[derive(Clone, Copy)]
pub struct Avx2<const VNNI: bool>;

/// Lanes 0 to 7, lanes 8 to 15.
#[derive(Clone, Copy)]
pub struct Halves(__m256, __m256);

/// The same of bytes and whole numbers.
#[derive(Clone, Copy)]
pub struct IntHalves(__m256i, __m256i);

impl IntHalves {
    #[inline(always)]
    fn map(self, each: impl Fn(__m256i) -> __m256i) -> Self {
        Self(each(self.0), each(self.1))
    }
}

/// A window of this is the mask of the first lanes: 8 set, then 8 clear.
static LANE_MASK: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

/// The mask of the first `lanes` of 8 lanes.
#[inline(always)]
unsafe fn first_lanes_8(lanes: usize) -> __m256i {
    // The window starts at 0 to 8 and is 8 long.
    unsafe { _mm256_loadu_si256(LANE_MASK.as_ptr().add(8 - lanes.min(8)).cast()) }
}

macro_rules! halves {
    ($intrinsic:ident($($arg:ident),+)) => {
        unsafe { Halves($intrinsic($($arg.0),+), $intrinsic($($arg.1),+)) }
    };
}

// SAFETY: calls happen only where `Isa` found the instructions.
unsafe impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type F = Halves;
    type Bytes = IntHalves;
    type Ints = IntHalves;
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Halves {
        unsafe { Halves(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Halves {
        unsafe { Halves(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, lanes: usize) -> Halves {
        // A lane whose mask is clear is not read; `wrapping_add`, since it may lie outside.
        unsafe {
            Halves(
                _mm256_maskload_ps(from, first_lanes_8(lanes)),
                _mm256_maskload_ps(from.wrapping_add(8), first_lanes_8(lanes.saturating_sub(8))),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Halves {
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(LANES / 2).cast()));
            Halves(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Halves {
        unsafe {
            Halves(
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(LANES / 2).cast())),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Halves {
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            Halves(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Halves {
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            Halves(
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Halves {
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            Halves(
                e4m3_8(_mm256_cvtepu8_epi32(bytes)),
                e4m3_8(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_e2m1(from: *const u8, shift: u32) -> Halves {
        unsafe {
            let bytes = twice_e2m1(from, shift);
            Halves(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))),
            )
        }
    }
    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> IntHalves {
        unsafe {
            let half = |at| _mm256_loadu_si256(from.add(at).cast());
            IntHalves(half(0), half(32))
        }
    }
    #[inline(always)]
    unsafe fn bits(bytes: IntHalves, right: u32, mask: u8) -> IntHalves {
        bytes.map(|half| unsafe {
            let moved = _mm256_srl_epi16(half, _mm_cvtsi32_si128(right as i32));
            _mm256_and_si256(moved, _mm256_set1_epi8(mask as i8))
        })
    }
    #[inline(always)]
    unsafe fn join(low: IntHalves, high: IntHalves) -> IntHalves {
        let join = |low, high| unsafe { _mm256_or_si256(low, _mm256_slli_epi16::<4>(high)) };
        IntHalves(join(low.0, high.0), join(low.1, high.1))
    }
    #[inline(always)]
    unsafe fn byte(bytes: IntHalves, i: usize) -> Halves {
        let byte = |half| unsafe {
            let moved = _mm256_srl_epi32(half, _mm_cvtsi32_si128(8 * i as i32));
            _mm256_cvtepi32_ps(_mm256_and_si256(moved, _mm256_set1_epi32(0xFF)))
        };
        Halves(byte(bytes.0), byte(bytes.1))
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> IntHalves {
        let half = unsafe { _mm256_set1_epi32(value) };
        IntHalves(half, half)
    }
    #[inline(always)]
    unsafe fn floats(value: IntHalves) -> Halves {
        unsafe { Halves(_mm256_cvtepi32_ps(value.0), _mm256_cvtepi32_ps(value.1)) }
    }
    #[inline(always)]
    unsafe fn splat_bytes(from: *const i8) -> IntHalves {
        let half = unsafe { _mm256_set1_epi32(four_bytes(from)) };
        IntHalves(half, half)
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(sum: IntHalves, bytes: IntHalves, x: IntHalves) -> IntHalves {
        unsafe {
            let dot = |sum, bytes| dot_8::<VNNI, WIDE>(sum, bytes, x.0);
            IntHalves(dot(sum.0, bytes.0), dot(sum.1, bytes.1))
        }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Halves) {
        unsafe {
            _mm256_storeu_ps(to, value.0);
            _mm256_storeu_ps(to.add(8), value.1);
        }
    }
    #[inline(always)]
    unsafe fn store_first(to: *mut f32, value: Halves, lanes: usize) {
        unsafe {
            _mm256_maskstore_ps(to, first_lanes_8(lanes), value.0);
            let high = first_lanes_8(lanes.saturating_sub(8));
            _mm256_maskstore_ps(to.wrapping_add(8), high, value.1);
        }
    }
    #[inline(always)]
    unsafe fn fma(a: Halves, b: Halves, c: Halves) -> Halves {
        halves!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    unsafe fn add(a: Halves, b: Halves) -> Halves {
        halves!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    unsafe fn sub(a: Halves, b: Halves) -> Halves {
        halves!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    unsafe fn mul(a: Halves, b: Halves) -> Halves {
        halves!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    unsafe fn div(a: Halves, b: Halves) -> Halves {
        halves!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    unsafe fn max(a: Halves, b: Halves) -> Halves {
        halves!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    unsafe fn select_less(a: Halves, b: Halves, then: Halves, otherwise: Halves) -> Halves {
        unsafe {
            Halves(
                _mm256_blendv_ps(otherwise.0, then.0, _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0)),
                _mm256_blendv_ps(otherwise.1, then.1, _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1)),
            )
        }
    }
    #[inline(always)]
    unsafe fn power_of_two(exponent: Halves) -> Halves {
        unsafe { Halves(power_of_two_8(exponent.0), power_of_two_8(exponent.1)) }
    }
    #[inline(always)]
    unsafe fn fold_add(a: Halves) -> f32 {
        unsafe { fold_add_8(_mm256_add_ps(a.0, a.1)) }
    }
    #[inline(always)]
    unsafe fn fold_max(a: Halves) -> f32 {
        unsafe { fold_max_8(_mm256_max_ps(a.0, a.1)) }
    }
}

/// As of [`Avx512`].
#[inline(always)]
unsafe fn dot_8<const VNNI: bool, const WIDE: bool>(
    sum: __m256i,
    bytes: __m256i,
    x: __m256i,
) -> __m256i {
    unsafe {
        if VNNI {
            return _mm256_dpbusd_avx_epi32(sum, bytes, x);
        }
        let pairs = |bytes| _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, x), _mm256_set1_epi16(1));
        if !WIDE {
            return _mm256_add_epi32(sum, pairs(bytes));
        }
        let low = pairs(_mm256_and_si256(bytes, _mm256_set1_epi8(0x7F)));
        let high = pairs(_mm256_and_si256(bytes, _mm256_set1_epi8(0x80_u8 as i8)));
        _mm256_add_epi32(sum, _mm256_add_epi32(low, high))
    }
}

#[inline(always)]
unsafe fn e4m3_8(bits: __m256i) -> __m256 {
    unsafe {
        let sign = _mm256_slli_epi32::<24>(_mm256_and_si256(bits, _mm256_set1_epi32(0x80)));
        let rest = _mm256_slli_epi32::<20>(_mm256_and_si256(bits, _mm256_set1_epi32(0x7F)));
        let small = _mm256_castsi256_ps(_mm256_or_si256(sign, rest));
        _mm256_mul_ps(small, _mm256_set1_ps(E4M3_UNIT))
    }
}

#[inline(always)]
unsafe fn twice_e2m1(from: *const u8, shift: u32) -> __m128i {
    unsafe {
        let table = _mm_loadu_si128(crate::stored::TWICE_E2M1.as_ptr().cast());
        let halves = _mm_srl_epi16(_mm_loadu_si128(from.cast()), _mm_cvtsi32_si128(shift as i32));
        _mm_shuffle_epi8(table, _mm_and_si128(halves, _mm_set1_epi8(0x0F)))
    }
}

#[inline(always)]
unsafe fn power_of_two_8(exponent: __m256) -> __m256 {
    unsafe {
        let biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
    }
}

#[inline(always)]
unsafe fn fold_add_8(a: __m256) -> f32 {
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

#[inline(always)]
unsafe fn fold_max_8(a: __m256) -> f32 {
    unsafe {
        let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }
}
