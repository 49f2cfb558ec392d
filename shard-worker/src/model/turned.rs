//! Parts of stored tensors: where a value of one is in its file, and tensors that lie the other way round
//! there, whose rows are columns.
//!
//! ```text
//! stored rows, some MiB at once ─► one column of them ─► a stretch of one row of the part
//! ```
//!
//! Every stored row that the part crosses is read once, whole.

use shoal_protocol::model::{Columns, Excerpt, StoredScales};

use super::{PIECE_BYTES, Source, WeightsError};
use crate::stored::{Block, Fp8, scales_of_row};

/// The scales of a matrix of eight bits, and of how many rows and columns each is; 0 for all.
#[derive(Clone, Copy)]
pub(super) struct Scales<'a> {
    pub(super) block: (u64, u64),
    pub(super) values: &'a [f32],
}

impl Source<'_> {
    /// How the tensor lies the other way round, where it does. Blocks of MXFP4 lie the right way.
    pub(super) fn turned(&self) -> Option<(&Excerpt, Columns)> {
        if matches!(self.location.scales.as_deref(), Some(StoredScales::Exponents { .. })) {
            return None;
        }
        let excerpt = self.part.spec.excerpt.as_ref()?;
        excerpt.columns.map(|columns| (excerpt, columns))
    }

    /// Row and column in the stored tensor of a value of this one.
    fn stored_at(&self, row: u64, column: u64) -> (u64, u64) {
        let first = self.part.spec.excerpt.as_ref().map_or(0, |excerpt| excerpt.first_row);
        match self.turned() {
            Some((_, columns)) => (first + column, columns.first + row * columns.step),
            None => (first + row, column),
        }
    }

    /// Columns of the stored tensor.
    fn stored_width(&self) -> u64 {
        let excerpt = self.part.spec.excerpt.as_ref();
        excerpt.and_then(|e| e.stored.last().copied()).unwrap_or(self.part.columns_stored())
    }

    /// The scale of a value.
    pub(super) fn scale_at(&self, scales: Scales<'_>, (row, column): (u64, u64)) -> f32 {
        let (row, column) = self.stored_at(row, column);
        let all = self.stored_width();
        let width = if scales.block.1 == 0 { all } else { scales.block.1 };
        let of_row = scales_of_row(all as usize, row as usize, scales.block, scales.values);
        of_row[(column / width) as usize]
    }

    /// Whether the values of each block of the precision fp8 have one scale in the file.
    pub(super) fn has_fp8_blocks(&self, block: (u64, u64)) -> bool {
        let whole = |n: u64| n.is_multiple_of(Fp8::WEIGHTS as u64);
        let (first_row, _) = self.stored_at(0, self.part.columns.start);
        match self.turned() {
            Some(_) => whole(block.0) && (block.0 == 0 || whole(first_row)),
            None => whole(block.1) && whole(self.part.columns.start),
        }
    }

    /// How many values of a row, from this column on, have one scale.
    fn same_scale(&self, block: (u64, u64), column: u64) -> usize {
        let (size, at) = match self.turned() {
            Some(_) => (block.0, self.stored_at(0, column).0),
            None => (block.1, column),
        };
        if size == 0 { usize::MAX } else { (size - at % size) as usize }
    }

    /// Multiplies the values of a row with their scales.
    pub(super) fn scale(&self, scales: Scales<'_>, row: u64, mut values: &mut [f32]) {
        let mut column = self.part.columns.start;
        while !values.is_empty() {
            let count = self.same_scale(scales.block, column).min(values.len());
            let (same, rest) = values.split_at_mut(count);
            let scale = self.scale_at(scales, (row, column));
            same.iter_mut().for_each(|value| *value *= scale);
            (column, values) = (column + count as u64, rest);
        }
    }

    /// Reads rows of a tensor that are columns of the stored one, from row `first` of it on. A vector is
    /// one value of each of its rows.
    pub(super) fn read_turned(
        &self,
        (excerpt, columns): (&Excerpt, Columns),
        first: u64,
        to: &mut [u8],
    ) -> Result<(), WeightsError> {
        // Such a tensor has no blocks, or the checkpoint would have been refused.
        let element = self.bytes_of(1) as usize;
        let row_bytes = self.stored_width() as usize * element;
        let height = self.part.column_count() as usize;
        let at_once = (PIECE_BYTES as usize / row_bytes).clamp(1, height.max(1));
        let mut crossed = vec![0; at_once * row_bytes];
        let first_row = excerpt.first_row + self.part.columns.start;
        for done in (0..height).step_by(at_once) {
            let crossed = &mut crossed[..at_once.min(height - done) * row_bytes];
            self.read((first_row + done as u64) * row_bytes as u64, crossed)?;
            for (row, to) in (first..).zip(to.chunks_exact_mut(height * element)) {
                let column = (columns.first + row * columns.step) as usize * element;
                let (from, to) = (crossed.chunks_exact(row_bytes), &mut to[done * element..]);
                let from = from.map(|row| &row[column..]);
                match element {
                    1 => turn::<1>(from, to),
                    2 => turn::<2>(from, to),
                    _ => turn::<4>(from, to),
                }
            }
        }
        Ok(())
    }
}

/// Puts the first value of each side by side.
fn turn<'a, const N: usize>(from: impl Iterator<Item = &'a [u8]>, to: &mut [u8]) {
    for (to, from) in to.as_chunks_mut::<N>().0.iter_mut().zip(from) {
        to.copy_from_slice(&from[..N]);
    }
}
