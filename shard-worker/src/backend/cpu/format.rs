//! How a weight is held: one implementation of [`Format`] for each precision.
//!
//! A panel has the weights of 16 rows side by side, so that one vector holds a column of it. Where each
//! weight stands for itself that is all ([`Plain`]); blocks whose weights share a scale are in
//! [`blocks`](super::blocks).

use half::{bf16, f16};
use shoal_protocol::plan::Precision;

use super::packed::PANEL;
use super::simd::Simd;

/// A type in which weights are held.
///
/// # Safety
///
/// Of all methods that take a panel: it is one of a matrix that is held so, aligned to two bytes, and
/// `k` is a column of it. With a [`Simd`]: as of its methods.
pub unsafe trait Format: Send + Sync + 'static {
    /// Columns from a multiple of this on share what [`Format::open`] finds; it divides every place
    /// where a product cuts `k`.
    const RUN: usize;

    /// What the weights of a run have in common, and where they are.
    type Run<S: Simd>: Copy;

    /// The run that begins at column `k`.
    unsafe fn open<S: Simd>(panel: *const u8, k: usize) -> Self::Run<S>;

    /// The exact values of column `i` of a run.
    unsafe fn load<S: Simd>(run: &Self::Run<S>, i: usize) -> S::F;
}

/// A type of which each element stands for itself, in memory as in files.
pub trait Plain: Format {
    /// One weight.
    type Element: Copy + Send + Sync + 'static;

    /// The nearest weight, ties to even.
    fn encode(value: f32) -> Self::Element;

    /// Its exact value.
    fn decode(element: Self::Element) -> f32;

    /// A weight from its little-endian bytes, as many as it is long.
    fn read(bytes: &[u8]) -> Self::Element;
}

/// [`Format`] of a [`Plain`] type.
macro_rules! plain_format {
    ($name:ident, $element:ty, $load:ident) => {
        // SAFETY: offsets are those of `[k][lane]`, inside the panel for each of its columns.
        unsafe impl Format for $name {
            /// Nothing is shared, so a run has no end.
            const RUN: usize = usize::MAX;
            type Run<S: Simd> = *const $element;

            #[inline(always)]
            unsafe fn open<S: Simd>(panel: *const u8, k: usize) -> *const $element {
                // SAFETY: the caller's.
                unsafe { panel.cast::<$element>().add(k * PANEL) }
            }
            #[inline(always)]
            unsafe fn load<S: Simd>(run: &*const $element, i: usize) -> S::F {
                // SAFETY: the caller's.
                unsafe { S::$load(run.add(i * PANEL)) }
            }
        }
    };
}

plain_format!(F32, f32, load);
plain_format!(Bf16, u16, load_bf16);
plain_format!(F16, u16, load_f16);

/// [`Precision::F32`].
pub struct F32;

impl Plain for F32 {
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
}

/// [`Precision::Bf16`].
pub struct Bf16;

impl Plain for Bf16 {
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
}

/// [`Precision::F16`].
pub struct F16;

impl Plain for F16 {
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
}

/// Runs `$body` with `$format` naming the [`Format`] of a [`Precision`].
macro_rules! with_format {
    ($precision:expr, $format:ident => $body:expr) => {
        $crate::backend::cpu::format::with_plain!($precision, $format => $body, otherwise {
            $crate::backend::cpu::format::with_blocks!($precision, $format => $body)
        })
    };
}
pub(crate) use with_format;

/// The same for those that are [`Plain`], and `$otherwise` for the others.
macro_rules! with_plain {
    ($precision:expr, $format:ident => $body:expr, otherwise $otherwise:expr) => {
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
            _ => $otherwise,
        }
    };
}
pub(crate) use with_plain;

/// The same for those of [`Blocks`](super::blocks::Blocks): all others.
macro_rules! with_blocks {
    ($precision:expr, $format:ident => $body:expr) => {
        $crate::backend::cpu::format::with_numbers!($precision, $format => $body, otherwise {
            match $precision {
                shoal_protocol::plan::Precision::Fp8 => {
                    type $format = $crate::backend::cpu::blocks::Fp8;
                    $body
                }
                shoal_protocol::plan::Precision::Mxfp4 => {
                    type $format = $crate::backend::cpu::mxfp4::Mxfp4;
                    $body
                }
                // Written out, so that a new one is not forgotten.
                shoal_protocol::plan::Precision::F32
                | shoal_protocol::plan::Precision::Bf16
                | shoal_protocol::plan::Precision::F16
                | shoal_protocol::plan::Precision::Q8_0
                | shoal_protocol::plan::Precision::Q4_0
                | shoal_protocol::plan::Precision::Q4K
                | shoal_protocol::plan::Precision::Q5K
                | shoal_protocol::plan::Precision::Q6K => {
                    unreachable!("plain, or of whole numbers")
                }
            }
        })
    };
}
pub(crate) use with_blocks;

/// The same for those whose blocks are [`Numbers`](super::blocks::Numbers), as
/// [`Precision::has_numbers`] says, and `$otherwise` for the others.
macro_rules! with_numbers {
    ($precision:expr, $format:ident => $body:expr, otherwise $otherwise:expr) => {
        match $precision {
            shoal_protocol::plan::Precision::Q8_0 => {
                type $format = $crate::backend::cpu::blocks::Q8_0;
                $body
            }
            shoal_protocol::plan::Precision::Q4_0 => {
                type $format = $crate::backend::cpu::blocks::Q4_0;
                $body
            }
            shoal_protocol::plan::Precision::Q4K => {
                type $format = $crate::backend::cpu::blocks::Q4K;
                $body
            }
            shoal_protocol::plan::Precision::Q5K => {
                type $format = $crate::backend::cpu::long_blocks::Q5K;
                $body
            }
            shoal_protocol::plan::Precision::Q6K => {
                type $format = $crate::backend::cpu::long_blocks::Q6K;
                $body
            }
            _ => $otherwise,
        }
    };
}
pub(crate) use with_numbers;

/// The exact values of little-endian `bytes` of type `stored`; a torn last value is left out. Types
/// whose values are not bytes of their own have none.
pub fn widen(stored: Precision, bytes: &[u8]) -> Vec<f32> {
    with_plain!(stored, S => {
        bytes.chunks_exact(size_of::<<S as Plain>::Element>())
            .map(|chunk| S::decode(S::read(chunk)))
            .collect()
    }, otherwise Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every 16-bit pattern comes back from a widening and a narrowing.
    fn round_trips<F: Plain<Element = u16>>(is_nan: impl Fn(u16) -> bool) {
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
    fn rounds_to_even<F: Plain<Element = u16>>(largest: u16) {
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
