//! ○ Matrices whose scales are tensors of their own: FP8, GPTQ, AWQ and MXFP4.

use shoal_protocol::model::FourBitPacking;

/// Numbers of four bits in a word.
const IN_WORD: usize = 8;
/// Which row of eight each number of an AWQ word is, the lowest bits first.
const AWQ_ROWS: [usize; IN_WORD] = [0, 2, 4, 6, 1, 3, 5, 7];

/// The scales of the blocks of a row of so many columns, and what follows them. `block` is rows and columns
/// of one, 0 for all there are; `scales` are those of the whole matrix.
pub fn scales_of_row(columns: usize, row: usize, block: (u64, u64), scales: &[f32]) -> &[f32] {
    let width = if block.1 == 0 { columns } else { block.1 as usize };
    let in_row = columns.div_ceil(width);
    let first = if block.0 == 0 { 0 } else { row / block.0 as usize * in_row };
    &scales[first..]
}

/// Twice what four bits of MXFP4 stand for: a sign, two of exponent and one of fraction. Zero has no sign.
pub(crate) const TWICE_E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The numbers of a row of MXFP4, two a byte, the lower half first; its exponents are elsewhere.
pub fn e2m1_row(bytes: &[u8], values: &mut [f32]) {
    let number = |four: u8| f32::from(TWICE_E2M1[usize::from(four)]) * 0.5;
    for (values, byte) in values.chunks_mut(2).zip(bytes) {
        for (value, four) in values.iter_mut().zip([byte & 0xF, byte >> 4]) {
            *value = number(four);
        }
    }
}

/// Two to the power of an exponent that is stored 127 more than it is.
pub fn power_of(stored: u8) -> f32 {
    // The least power is no normal number.
    f32::from_bits(if stored == 0 { 1 << 22 } else { u32::from(stored) << 23 })
}

/// A matrix of numbers of four bits, whole.
pub struct FourBits<'a> {
    /// How `words` are laid out.
    pub packing: FourBitPacking,
    /// Rows and columns of the matrix.
    pub shape: (usize, usize),
    /// The numbers: little-endian words.
    pub words: &'a [u8],
    /// The zeros: words, `[groups, rows / 8]`.
    pub zeros: &'a [u8],
    /// `[groups, rows]`.
    pub scales: &'a [f32],
    /// The group of each column.
    pub groups: &'a [u32],
    /// Added to each zero.
    pub zero_offset: u8,
}

impl FourBits<'_> {
    /// The group of each column, where they are in order.
    pub fn groups_in_order(columns: usize, group: usize) -> Vec<u32> {
        (0..columns).map(|column| (column / group) as u32).collect()
    }

    /// Whether every column's group exists.
    pub fn groups_exist(&self) -> bool {
        let (rows, columns) = self.shape;
        let groups = self.scales.len() / rows;
        self.groups.len() == columns && self.groups.iter().all(|group| (*group as usize) < groups)
    }

    fn number(words: &[u8], word: usize, nth: usize) -> f32 {
        // The lowest bits of a little-endian word are in its first byte.
        let byte = words[4 * word + nth / 2];
        f32::from(byte >> (nth % 2 * 4) & 0xF)
    }

    /// The number of the word in which a row's numbers are, among those of eight rows.
    fn nth_of_row(&self, row: usize) -> usize {
        let nth = row % IN_WORD;
        match self.packing {
            FourBitPacking::Gptq => nth,
            FourBitPacking::Awq => AWQ_ROWS.iter().position(|r| *r == nth).unwrap_or(nth),
        }
    }

    /// The values of one row: (number - zero) x scale.
    pub fn decode_row(&self, row: usize, values: &mut [f32]) {
        let (rows, _) = self.shape;
        let nth = self.nth_of_row(row);
        for (column, value) in values.iter_mut().enumerate() {
            let group = self.groups[column] as usize;
            let number = match self.packing {
                FourBitPacking::Gptq => {
                    Self::number(self.words, column / IN_WORD * rows + row, column % IN_WORD)
                }
                FourBitPacking::Awq => {
                    Self::number(self.words, column * (rows / IN_WORD) + row / IN_WORD, nth)
                }
            };
            let zero = Self::number(self.zeros, group * (rows / IN_WORD) + row / IN_WORD, nth);
            let zero = zero + f32::from(self.zero_offset);
            *value = (number - zero) * self.scales[group * rows + row];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_those_of_a_tensor_a_row_or_a_block() {
        assert_eq!(scales_of_row(5, 3, (0, 0), &[2.0]), [2.0]);
        assert_eq!(scales_of_row(5, 1, (1, 0), &[2.0, 10.0]), [10.0]);
        // Rows 2 and 3 are the second row of blocks, 2 columns wide.
        let blocks = [0.0, 0.0, 0.0, 1.0, 2.0, 3.0];
        assert_eq!(scales_of_row(5, 3, (2, 2), &blocks), [1.0, 2.0, 3.0]);
    }

    #[test]
    fn numbers_of_mxfp4_are_those_of_its_definition() {
        let mut values = [f32::NAN; 16];
        e2m1_row(&[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], &mut values);
        let positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        assert_eq!(values[..8], positive);
        assert_eq!(values[8..], positive.map(|value: f32| -value));
        for (stored, power) in [(127, 1.0), (130, 8.0), (120, 0.007_812_5), (1, 2.0_f32.powi(-126))]
        {
            assert_eq!(power_of(stored), power);
        }
        assert_eq!(power_of(0) * 2.0, power_of(1));
    }

    /// Packs by the words' definition, and reads back.
    #[test]
    fn both_packings_give_back_their_numbers() {
        let (rows, columns, group) = (16_usize, 24_usize, 8_usize);
        let number = |row: usize, column: usize| ((row * 7 + column * 5) % 16) as u32;
        let zero = |group: usize, row: usize| ((row * 3 + group) % 15) as u32;
        let scale = |group: usize, row: usize| 0.5 + group as f32 + row as f32 / 64.0;
        let groups = columns / group;
        let scales: Vec<f32> =
            (0..groups).flat_map(|g| (0..rows).map(move |r| scale(g, r))).collect();
        for packing in [FourBitPacking::Gptq, FourBitPacking::Awq] {
            // Which of eight rows a word's n-th number is.
            let row_of = |nth: usize| match packing {
                FourBitPacking::Gptq => nth,
                FourBitPacking::Awq => AWQ_ROWS[nth],
            };
            let word = |of: &dyn Fn(usize) -> u32| {
                (0..IN_WORD).fold(0_u32, |word, nth| word | of(nth) << (4 * nth)).to_le_bytes()
            };
            let mut words = Vec::new();
            match packing {
                FourBitPacking::Gptq => {
                    for block in 0..columns / IN_WORD {
                        for row in 0..rows {
                            words.extend(word(&|nth| number(row, block * IN_WORD + nth)));
                        }
                    }
                }
                FourBitPacking::Awq => {
                    for column in 0..columns {
                        for block in 0..rows / IN_WORD {
                            let row = |nth| block * IN_WORD + row_of(nth);
                            words.extend(word(&|nth| number(row(nth), column)));
                        }
                    }
                }
            }
            let mut zeros = Vec::new();
            for group in 0..groups {
                for block in 0..rows / IN_WORD {
                    zeros.extend(word(&|nth| zero(group, block * IN_WORD + row_of(nth))));
                }
            }
            // The groups of a matrix whose columns were sorted before it was quantised.
            let order: Vec<u32> = (0..columns).map(|column| (column % groups) as u32).collect();
            let matrix = FourBits {
                packing,
                shape: (rows, columns),
                words: &words,
                zeros: &zeros,
                scales: &scales,
                groups: &order,
                zero_offset: 1,
            };
            assert!(matrix.groups_exist());
            let mut values = vec![f32::NAN; columns];
            for row in 0..rows {
                matrix.decode_row(row, &mut values);
                for (column, value) in values.iter().enumerate() {
                    let group = order[column] as usize;
                    let zero = zero(group, row) as f32 + 1.0;
                    let expected = (number(row, column) as f32 - zero) * scale(group, row);
                    assert_eq!(*value, expected, "{packing:?} {row} {column}");
                }
            }
            let beyond = FourBits { groups: &[groups as u32; 24], ..matrix };
            assert!(!beyond.groups_exist());
        }
        assert_eq!(FourBits::groups_in_order(5, 2), [0, 0, 1, 1, 2]);
    }
}
