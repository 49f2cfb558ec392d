//! The types in which checkpoints store tensors. A device holds weights in a
//! [`Precision`]; files know more types than that.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::plan::Precision;

/// The type of a tensor's elements in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StoredType {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// Eight bits: four of exponent, three of fraction, no infinities.
    F8E4M3,
    /// Bytes.
    U8,
    /// 32 numbers of four bits (e2m1: one of fraction) in 16 bytes, the even ones in the low halves; the
    /// exponent that they share lies elsewhere.
    Mxfp4,
    /// Signed bytes of 32 bits, in which four-bit numbers are packed.
    I32,
    /// GGUF: 32 four-bit numbers, one scale.
    Q4_0,
    /// GGUF: 32 four-bit numbers, a scale and a least value.
    Q4_1,
    /// GGUF: 32 five-bit numbers, one scale.
    Q5_0,
    /// GGUF: 32 five-bit numbers, a scale and a least value.
    Q5_1,
    /// GGUF: 32 signed bytes, one scale.
    Q8_0,
    /// GGUF: 256 four-bit numbers, scales and least values in eight parts.
    Q4K,
    /// GGUF: the same with five bits.
    Q5K,
    /// GGUF: 256 six-bit numbers, sixteen scales.
    Q6K,
    /// GGUF: an exponent and the 32 numbers of four bits that share it, the first half of them in the low
    /// halves of the bytes.
    Mxfp4Block,
}

impl StoredType {
    /// Elements of one row that lie together, and the bytes that they take.
    pub const fn block(self) -> (u64, u64) {
        match self {
            StoredType::F32 | StoredType::I32 => (1, 4),
            StoredType::Bf16 | StoredType::F16 => (1, 2),
            StoredType::F8E4M3 | StoredType::U8 => (1, 1),
            StoredType::Mxfp4 => (32, 16),
            StoredType::Q4_0 => (32, 18),
            StoredType::Q4_1 => (32, 20),
            StoredType::Q5_0 => (32, 22),
            StoredType::Q5_1 => (32, 24),
            StoredType::Q8_0 => (32, 34),
            StoredType::Q4K => (256, 144),
            StoredType::Q5K => (256, 176),
            StoredType::Q6K => (256, 210),
            StoredType::Mxfp4Block => (32, 17),
        }
    }

    /// Bytes of a row of so many elements; `None` where that is no whole number of blocks, or too
    /// many to count.
    pub const fn row_bytes(self, columns: u64) -> Option<u64> {
        let (elements, bytes) = self.block();
        if !columns.is_multiple_of(elements) {
            return None;
        }
        (columns / elements).checked_mul(bytes)
    }

    /// The precision that holds these weights as they are stored, where there is one.
    pub const fn held(self) -> Option<Precision> {
        match self {
            StoredType::F32 => Some(Precision::F32),
            StoredType::Bf16 => Some(Precision::Bf16),
            StoredType::F16 => Some(Precision::F16),
            StoredType::Q8_0 => Some(Precision::Q8_0),
            StoredType::Q4_0 => Some(Precision::Q4_0),
            StoredType::Q4K => Some(Precision::Q4K),
            StoredType::Q5K => Some(Precision::Q5K),
            StoredType::Q6K => Some(Precision::Q6K),
            StoredType::Mxfp4Block => Some(Precision::Mxfp4),
            _ => None,
        }
    }

    /// Whether each element stands for itself.
    pub const fn is_plain(self) -> bool {
        matches!(self, StoredType::F32 | StoredType::Bf16 | StoredType::F16)
    }

    /// What files call it.
    pub const fn as_str(self) -> &'static str {
        match self {
            StoredType::F32 => "F32",
            StoredType::Bf16 => "BF16",
            StoredType::F16 => "F16",
            StoredType::F8E4M3 => "F8_E4M3",
            StoredType::U8 => "U8",
            StoredType::Mxfp4 | StoredType::Mxfp4Block => "MXFP4",
            StoredType::I32 => "I32",
            StoredType::Q4_0 => "Q4_0",
            StoredType::Q4_1 => "Q4_1",
            StoredType::Q5_0 => "Q5_0",
            StoredType::Q5_1 => "Q5_1",
            StoredType::Q8_0 => "Q8_0",
            StoredType::Q4K => "Q4_K",
            StoredType::Q5K => "Q5_K",
            StoredType::Q6K => "Q6_K",
        }
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// In which order a file has the rows of a matrix, or the elements of a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// As the model counts them.
    AsIs,
    /// In each head, rows `i` and `i + head_dim / 2` beside each other: llama's q and k in GGUF files,
    /// whose rotation turns neighbours.
    PairsTogether {
        /// The width of a head; even.
        head_dim: u32,
    },
}

impl RowOrder {
    /// The model's number of a file's row.
    pub const fn model_row(self, row: u64) -> u64 {
        match self {
            RowOrder::AsIs => row,
            RowOrder::PairsTogether { head_dim } => {
                let dim = head_dim as u64;
                let (head, i) = (row / dim, row % dim);
                head * dim + i % 2 * (dim / 2) + i / 2
            }
        }
    }
}

/// A tensor that another one needs to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredPart {
    /// The file.
    pub file: Arc<Path>,
    /// The first byte of the data, from the file's beginning.
    pub offset: u64,
    /// Bytes of data.
    pub len: u64,
    /// The type of its elements.
    pub dtype: StoredType,
    /// Its shape, rows first.
    pub shape: Vec<u64>,
}

/// What the bytes of a tensor alone do not say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredScales {
    /// A value is its element times the scale of its block.
    Blocks {
        /// `[rows / block rows, columns / block columns]`, rounded up, or what has as many elements.
        scales: StoredPart,
        /// Rows and columns of a block; 0: all there are.
        block: (u64, u64),
    },
    /// MXFP4: the tensor lies turned, so that what its spec calls columns are rows of whole blocks, and a
    /// value is its number times two to the power of its block's exponent.
    Exponents {
        /// A byte for each block, 127 more than the exponent: `[.., rows, columns / 32]`.
        scales: StoredPart,
    },
    /// Eight numbers of four bits in a word; a value is (number - zero) x scale of its group.
    FourBits {
        /// Which of the two layouts.
        packing: FourBitPacking,
        /// Columns of a group.
        group: u64,
        /// `[groups, rows / 8]` words.
        zeros: StoredPart,
        /// `[groups, rows]`.
        scales: StoredPart,
        /// The group of each column, where they are not in order.
        groups: Option<StoredPart>,
        /// Added to each zero.
        zero_offset: u8,
    },
}

impl StoredScales {
    /// The other tensors that are read with such a one.
    pub fn parts(&self) -> Vec<&StoredPart> {
        match self {
            StoredScales::Blocks { scales, .. } | StoredScales::Exponents { scales } => {
                vec![scales]
            }
            StoredScales::FourBits { zeros, scales, groups, .. } => {
                [zeros, scales].into_iter().chain(groups).collect()
            }
        }
    }
}

/// How words hold eight numbers of four bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FourBitPacking {
    /// `[columns / 8, rows]`: a word has eight columns of one row, in order.
    Gptq,
    /// `[columns, rows / 8]`: a word has eight rows of one column, the even ones first.
    Awq,
}
