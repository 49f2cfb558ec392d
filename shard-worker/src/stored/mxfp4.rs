//! ○ Blocks of MXFP4: 32 numbers of four bits that share an exponent.

use super::blocks::{Block, Encode};
use super::scaled::{e2m1_row, power_of};

/// An exponent (two to the power of it, less 127), 32 numbers of four bits (e2m1), two a byte, the lower
/// half first. Files have exponents and numbers in tensors of their own; a row is laid out so on its way.
pub struct Mxfp4;

impl Mxfp4 {
    /// Where the numbers are.
    pub(crate) const NUMBERS_AT: usize = 1;
}

/// The largest exponent that is taken: weights of 2^125 are none, and the format's 255 is no number.
pub(crate) const EXPONENT_MAX: u8 = 250;

/// Half-way between the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6.
const MIDDLES: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];

impl Block for Mxfp4 {
    const WEIGHTS: usize = 32;
    const BYTES: usize = 17;

    fn decode(block: &[u8], values: &mut [f32]) {
        e2m1_row(&block[Self::NUMBERS_AT..Self::BYTES], &mut values[..Self::WEIGHTS]);
        let power = power_of(block[0]);
        values.iter_mut().for_each(|value| *value *= power);
    }
}

impl Encode for Mxfp4 {
    /// As the format's definition has it: the power of two of the farthest value becomes 4, the largest power
    /// among the numbers; what is beyond 6 then becomes 6.
    fn encode(values: &[f32], block: &mut [u8]) {
        let most = values.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
        let exponent = (most.to_bits() >> 23).saturating_sub(2).min(EXPONENT_MAX.into()) as u8;
        let inverse = 1.0 / power_of(exponent);
        block[0] = exponent;
        block[Self::NUMBERS_AT..Self::BYTES].fill(0);
        for (k, value) in values.iter().enumerate() {
            block[Self::NUMBERS_AT + k / 2] |= to_e2m1(value * inverse) << (k % 2 * 4);
        }
    }
}

/// A block as GGUF files have it: the second half of the numbers lies in the upper halves of the bytes.
pub(crate) struct Halves;

impl Halves {
    /// The same block as it is held.
    pub(crate) fn held(block: &[u8], to: &mut [u8]) {
        let numbers = &block[Mxfp4::NUMBERS_AT..Mxfp4::BYTES];
        let number = |k: usize| numbers[k % 16] >> (k / 16 * 4) & 15;
        to[0] = block[0];
        for (k, to) in to[Mxfp4::NUMBERS_AT..Mxfp4::BYTES].iter_mut().enumerate() {
            *to = number(2 * k) | number(2 * k + 1) << 4;
        }
    }
}

impl Block for Halves {
    const WEIGHTS: usize = Mxfp4::WEIGHTS;
    const BYTES: usize = Mxfp4::BYTES;

    fn decode(block: &[u8], values: &mut [f32]) {
        let mut held = [0; Mxfp4::BYTES];
        Self::held(block, &mut held);
        Mxfp4::decode(&held, values);
    }
}

/// The nearest number, ties to even; beyond the largest, that. No zero has a sign.
fn to_e2m1(value: f32) -> u8 {
    let magnitude = value.abs();
    let is_above = |(i, middle): &(usize, &f32)| {
        magnitude > **middle || (magnitude == **middle && !i.is_multiple_of(2))
    };
    let number = MIDDLES.iter().enumerate().filter(is_above).count() as u8;
    if value < 0.0 && number > 0 { number | 8 } else { number }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_become_the_nearest_number_and_their_block_the_power_of_the_farthest() {
        for (value, number) in [
            (0.0, 0),
            (-0.1, 0),
            (0.25, 0),
            (0.26, 1),
            (0.75, 2),
            (-1.25, 8 + 2),
            (1.75, 4),
            (2.5, 4),
            (3.5, 6),
            (5.0, 6),
            (5.1, 7),
            (-9.0, 15),
        ] {
            assert_eq!(to_e2m1(value), number, "{value}");
        }
        let mut values = [0.0; 32];
        (values[0], values[1], values[31]) = (0.011, -0.02, 0.1);
        let mut block = [0xAA; 17];
        Mxfp4::encode(&values, &mut block);
        // 0.1 is 1.6 times a sixteenth, so a 64th is one.
        assert_eq!(block[0], 127 - 6);
        let mut back = [f32::NAN; 32];
        Mxfp4::decode(&block, &mut back);
        assert_eq!([back[0], back[1], back[31]], [0.5 / 64.0, -1.5 / 64.0, 6.0 / 64.0]);
        assert!(back[2..31].iter().all(|value| *value == 0.0));
    }

    #[test]
    fn a_block_of_halves_has_the_same_numbers() {
        let values: [f32; 32] = std::array::from_fn(|k| [0.0, 0.5, -1.0, 6.0, 3.0][k % 5] / 8.0);
        let (mut held, mut halves) = ([0; 17], [0; 17]);
        Mxfp4::encode(&values, &mut held);
        halves[0] = held[0];
        for k in 0..32 {
            halves[1 + k % 16] |= (held[1 + k / 2] >> (k % 2 * 4) & 15) << (k / 16 * 4);
        }
        let (mut back, mut again) = ([f32::NAN; 32], [0xAA; 17]);
        Halves::decode(&halves, &mut back);
        Halves::held(&halves, &mut again);
        assert_eq!((back, again), (values, held));
        assert_ne!(halves, held);
    }

    #[test]
    fn a_block_of_nothing_is_nothing() {
        let (mut block, mut back) = ([0xAA; 17], [f32::NAN; 32]);
        Mxfp4::encode(&[0.0; 5], &mut block);
        Mxfp4::decode(&block, &mut back);
        assert_eq!(back, [0.0; 32]);
    }
}
