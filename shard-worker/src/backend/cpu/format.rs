//! How a weight is held: one implementation of [`Format`] for each type.

use half::{bf16, f16};
use shoal_protocol::plan::Precision;

use super::simd::Simd;

/// A type of stored weights.
pub trait Format: Send + Sync + 'static {
    /// One weight.
    type Element: Copy + Send + Sync + 'static;

    /// The nearest weight, ties to even.
    fn encode(value: f32) -> Self::Element;

    /// Its exact value.
    fn decode(element: Self::Element) -> f32;

    /// A weight from its little-endian bytes, as many as it is long.
    fn read(bytes: &[u8]) -> Self::Element;

    /// The exact values of 16 weights.
    ///
    /// # Safety
    ///
    /// As of [`Simd::load`].
    unsafe fn load<S: Simd>(from: *const Self::Element) -> S::F;
}

/// [`Precision::F32`].
pub struct F32;

impl Format for F32 {
    type Element = f32;

    #[inline(always)]
    fn encode(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn decode(element: f32) -> f32 {
        element
    }
    #[inline(always)]
    fn read(bytes: &[u8]) -> f32 {
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const f32) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::load(from) }
    }
}

/// [`Precision::Bf16`].
pub struct Bf16;

impl Format for Bf16 {
    type Element = u16;

    #[inline(always)]
    fn encode(value: f32) -> u16 {
        bf16::from_f32(value).to_bits()
    }
    #[inline(always)]
    fn decode(element: u16) -> f32 {
        bf16::from_bits(element).to_f32()
    }
    #[inline(always)]
    fn read(bytes: &[u8]) -> u16 {
        u16::from_le_bytes([bytes[0], bytes[1]])
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u16) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::load_bf16(from) }
    }
}

/// [`Precision::F16`].
pub struct F16;

impl Format for F16 {
    type Element = u16;

    #[inline(always)]
    fn encode(value: f32) -> u16 {
        f16::from_f32(value).to_bits()
    }
    #[inline(always)]
    fn decode(element: u16) -> f32 {
        f16::from_bits(element).to_f32()
    }
    #[inline(always)]
    fn read(bytes: &[u8]) -> u16 {
        u16::from_le_bytes([bytes[0], bytes[1]])
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u16) -> S::F {
        // SAFETY: the caller's.
        unsafe { S::load_f16(from) }
    }
}

/// Runs `$body` with `$format` naming the [`Format`] of a [`Precision`].
macro_rules! with_format {
    ($precision:expr, $format:ident => $body:expr) => {
        match $precision {
            shoal_protocol::plan::Precision::F32 => {
                type $format = $crate::backend::cpu::format::F32;
                $body
            }
            shoal_protocol::plan::Precision::Bf16 => {
                type $format = $crate::backend::cpu::format::Bf16;
                $body
            }
            shoal_protocol::plan::Precision::F16 => {
                type $format = $crate::backend::cpu::format::F16;
                $body
            }
        }
    };
}
pub(crate) use with_format;

/// The exact values of little-endian `bytes` of type `stored`; a torn last value is left out.
pub fn widen(stored: Precision, bytes: &[u8]) -> Vec<f32> {
    with_format!(stored, S => {
        bytes.chunks_exact(size_of::<<S as Format>::Element>())
            .map(|chunk| S::decode(S::read(chunk)))
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every 16-bit pattern comes back from a widening and a narrowing.
    fn round_trips<F: Format<Element = u16>>(is_nan: impl Fn(u16) -> bool) {
        for bits in 0..=u16::MAX {
            let back = F::encode(F::decode(bits));
            assert!(back == bits || is_nan(bits), "{bits:#06x} became {back:#06x}");
        }
    }

    #[test]
    fn sixteen_bit_weights_widen_exactly() {
        round_trips::<Bf16>(|bits| bf16::from_bits(bits).is_nan());
        round_trips::<F16>(|bits| f16::from_bits(bits).is_nan());
    }

    /// Between each two neighbours: the midpoint goes to the even one, its sides to the nearer one.
    fn rounds_to_even<F: Format<Element = u16>>(largest: u16) {
        for bits in 0..largest {
            let (low, high) = (F::decode(bits), F::decode(bits + 1));
            let middle = ((f64::from(low) + f64::from(high)) / 2.0) as f32;
            let even = if bits % 2 == 0 { bits } else { bits + 1 };
            assert_eq!(F::encode(middle), even, "{middle:e}");
            assert_eq!(F::encode(middle.next_down()), bits, "below {middle:e}");
            assert_eq!(F::encode(middle.next_up()), bits + 1, "above {middle:e}");
        }
    }

    #[test]
    fn narrowing_rounds_to_nearest_even() {
        rounds_to_even::<F16>(f16::MAX.to_bits());
        rounds_to_even::<Bf16>(bf16::MAX.to_bits());
    }

    #[test]
    fn widen_reads_little_endian() {
        assert_eq!(widen(Precision::F32, &1.5_f32.to_le_bytes()), [1.5]);
        assert_eq!(widen(Precision::Bf16, &[0x80, 0x3F, 0xFF]), [1.0]);
        assert_eq!(widen(Precision::F16, &[0x00, 0x3C, 0x00, 0xC0]), [1.0, -2.0]);
    }
}
