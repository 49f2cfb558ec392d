//! ○ How files store weights: blocks of numbers that share a scale, and what they stand for.
//!
//! ```text
//! file's bytes ─► decode_row ─► f32 ─► encode (as llama.cpp's reference quantisers round) ─► a block
//! ```
//!
//! A block has one byte layout, that of GGUF files. How a device lays blocks out is its own affair.

mod blocks;
mod k_quants;
mod mxfp4;
mod scaled;

pub(crate) use blocks::half_at;
pub use blocks::{Block, Encode, Fp8, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, e4m3, to_e4m3};
pub(crate) use k_quants::six_bits;
pub use k_quants::{Q4K, Q5K, Q6K};
pub use mxfp4::Mxfp4;
pub(crate) use mxfp4::{EXPONENT_MAX, Halves};
pub(crate) use scaled::TWICE_E2M1;
pub use scaled::{FourBits, e2m1_row, power_of, scales_of_row};

use half::{bf16, f16};
use shoal_protocol::model::StoredType;

/// The most weights of a block.
pub const BLOCK_MAX: usize = 256;

/// The values of the first so many elements of a row whose bytes are whole blocks. Types whose values
/// need more than their own bytes (a scale elsewhere) are decoded as if that scale were 1.
pub fn decode_row(stored: StoredType, bytes: &[u8], values: &mut [f32]) {
    match stored {
        StoredType::F32 => plain(bytes, values, |&b| f32::from_le_bytes(b)),
        StoredType::Bf16 => plain(bytes, values, |&b| bf16::from_le_bytes(b).to_f32()),
        StoredType::F16 => plain(bytes, values, |&b| f16::from_le_bytes(b).to_f32()),
        StoredType::I32 => plain(bytes, values, |&b| i32::from_le_bytes(b) as f32),
        StoredType::U8 => plain(bytes, values, |&[b]: &[u8; 1]| f32::from(b)),
        StoredType::Mxfp4 => e2m1_row(bytes, values),
        StoredType::F8E4M3 => plain(bytes, values, |&[b]: &[u8; 1]| e4m3(b)),
        StoredType::Q4_0 => decode::<Q4_0>(bytes, values),
        StoredType::Q4_1 => decode::<Q4_1>(bytes, values),
        StoredType::Q5_0 => decode::<Q5_0>(bytes, values),
        StoredType::Q5_1 => decode::<Q5_1>(bytes, values),
        StoredType::Q8_0 => decode::<Q8_0>(bytes, values),
        StoredType::Q4K => decode::<Q4K>(bytes, values),
        StoredType::Q5K => decode::<Q5K>(bytes, values),
        StoredType::Q6K => decode::<Q6K>(bytes, values),
        StoredType::Mxfp4Block => decode::<Halves>(bytes, values),
    }
}

fn plain<const N: usize>(bytes: &[u8], values: &mut [f32], value: impl Fn(&[u8; N]) -> f32) {
    for (to, from) in values.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *to = value(from);
    }
}

fn decode<B: Block>(bytes: &[u8], values: &mut [f32]) {
    let mut whole = [0.0; BLOCK_MAX];
    for (to, block) in values.chunks_mut(B::WEIGHTS).zip(bytes.chunks_exact(B::BYTES)) {
        B::decode(block, &mut whole[..B::WEIGHTS]);
        to.copy_from_slice(&whole[..to.len()]);
    }
}

#[cfg(test)]
#[path = "stored_test.rs"]
mod tests;
