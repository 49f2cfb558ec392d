//! A part of one tensor: its rows and columns that a rank holds.

use std::ops::Range;

use crate::model::tensors::TensorSpec;
use crate::plan::Precision;
use crate::units::Bytes;

/// The part of a tensor that a rank holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPart {
    /// The whole tensor.
    pub spec: TensorSpec,
    /// Its rows; of a vector its elements.
    pub rows: Range<u64>,
    /// Its columns; `0..1` of a vector.
    pub columns: Range<u64>,
}

impl TensorPart {
    /// How many rows.
    pub fn row_count(&self) -> u64 {
        self.rows.end - self.rows.start
    }

    /// How many columns.
    pub fn column_count(&self) -> u64 {
        self.columns.end - self.columns.start
    }

    /// Columns of the whole tensor.
    pub fn columns_stored(&self) -> u64 {
        if self.spec.is_matrix { self.spec.shape[1] } else { 1 }
    }

    /// Bytes in memory when matrices are held in this precision, padding included.
    pub fn held_bytes(&self, precision: Precision) -> Bytes {
        let shape = match self.spec.is_matrix {
            true => vec![self.row_count(), self.column_count()],
            false => vec![self.row_count()],
        };
        TensorSpec { shape, ..self.spec.clone() }.held_bytes(precision)
    }
}
