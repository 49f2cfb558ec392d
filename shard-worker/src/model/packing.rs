//! From a piece's bytes to packed rows: as they are where the device holds them so, by way of `f32`
//! where it does not.

use shoal_protocol::model::{RowOrder, StoredPart, StoredScales, StoredType};
use shoal_protocol::plan::Precision;

use super::turned::Scales;
use super::{Matrix, Piece, Source, WeightsError};
use crate::backend::{BackendError, Ops, WeightBuilder};
use crate::stored::{self, Block, FourBits};

impl<B: Ops> Matrix<'_, B> {
    /// Reads and packs some rows.
    pub(super) fn pack(&self, piece: &Piece, buffer: &mut Vec<u8>) -> Result<(), WeightsError> {
        let source = &self.source;
        if source.is_read_whole() {
            buffer.resize(source.location.len as usize, 0);
            source.read(0, buffer)?;
        } else {
            buffer.resize((piece.rows * self.row_bytes()) as usize, 0);
            source.read_rows(piece.first_row, buffer)?;
        }
        let packed = match source.location.scales.as_deref() {
            None => {
                if source.location.dtype == StoredType::Mxfp4Block {
                    let exponents = buffer.iter().step_by(stored::Mxfp4::BYTES);
                    check_exponents(exponents).map_err(|error| source.device(error))?;
                }
                self.pack_alone(piece, buffer)
            }
            Some(StoredScales::Blocks { scales, block }) => {
                check_numbers(buffer).map_err(|error| source.device(error))?;
                let scales = source.read_values(scales)?;
                let scales = Scales { block: *block, values: &scales };
                match self.held == Precision::Fp8 && source.has_fp8_blocks(*block) {
                    true => self.pack_fp8(piece, buffer, scales),
                    false => self.pack_scaled(piece, buffer, scales),
                }
            }
            Some(StoredScales::Exponents { scales }) => {
                let exponents = source.read_exponents(piece, scales)?;
                check_exponents(exponents.iter()).map_err(|error| source.device(error))?;
                self.pack_mxfp4(piece, buffer, &exponents)
            }
            Some(four_bits @ StoredScales::FourBits { .. }) => {
                self.pack_four_bits(piece, buffer, four_bits)?
            }
        };
        packed.map_err(|error| source.device(error))
    }

    /// Packs rows whose bytes say their values.
    fn pack_alone(&self, piece: &Piece, bytes: &[u8]) -> Result<(), BackendError> {
        let (stored, order) = (self.source.location.dtype, self.source.location.order);
        let (read, part) = (self.source.columns_read(), &self.source.part);
        let mut rows = bytes.chunks_exact(self.row_bytes() as usize);
        let held = stored.held().filter(|held| stored.is_plain() || *held == self.held);
        match held.filter(|_| read == part.columns) {
            Some(precision) if stored == StoredType::Mxfp4Block => {
                let mut blocks = vec![0; self.row_bytes() as usize];
                for (row, bytes) in (piece.first_row..).zip(rows) {
                    let to = blocks.chunks_exact_mut(stored::Mxfp4::BYTES);
                    for (to, from) in to.zip(bytes.chunks_exact(stored::Mxfp4::BYTES)) {
                        stored::Halves::held(from, to);
                    }
                    self.builder.pack_rows(self.held_row(row), precision, &blocks)?;
                }
                Ok(())
            }
            Some(precision) if order == RowOrder::AsIs => {
                self.builder.pack_rows(piece.first_row as usize, precision, bytes)
            }
            Some(precision) => {
                for (row, bytes) in (piece.first_row..).zip(rows) {
                    self.builder.pack_rows(self.held_row(row), precision, bytes)?;
                }
                Ok(())
            }
            None => {
                let mut wide = vec![0.0; (read.end - read.start) as usize];
                let first = (part.columns.start - read.start) as usize;
                self.pack_each(piece, |_, values| {
                    stored::decode_row(stored, rows.next().unwrap_or_default(), &mut wide);
                    values.copy_from_slice(&wide[first..first + values.len()]);
                })
            }
        }
    }

    /// Packs rows of eight bits by way of their values.
    fn pack_scaled(
        &self,
        piece: &Piece,
        bytes: &[u8],
        scales: Scales<'_>,
    ) -> Result<(), BackendError> {
        let source = &self.source;
        let mut rows = bytes.chunks_exact(source.part.column_count() as usize);
        self.pack_each(piece, |row, values| {
            stored::decode_row(source.location.dtype, rows.next().unwrap_or_default(), values);
            source.scale(scales, row as u64, values);
        })
    }

    /// Packs rows of eight bits as they are, a scale before each block.
    fn pack_fp8(
        &self,
        piece: &Piece,
        bytes: &[u8],
        scales: Scales<'_>,
    ) -> Result<(), BackendError> {
        let (source, part) = (&self.source, &self.source.part);
        let columns = part.column_count() as usize;
        let mut blocks = vec![0; columns.div_ceil(stored::Fp8::WEIGHTS) * stored::Fp8::BYTES];
        for (row, bytes) in (piece.first_row..).zip(bytes.chunks_exact(columns)) {
            let to = blocks.chunks_exact_mut(stored::Fp8::BYTES);
            let starts = (part.columns.start..).step_by(stored::Fp8::WEIGHTS);
            for ((to, from), column) in to.zip(bytes.chunks(stored::Fp8::WEIGHTS)).zip(starts) {
                let scale = source.scale_at(scales, (part.rows.start + row, column));
                let (before, numbers) = to.split_at_mut(stored::Fp8::NUMBERS_AT);
                before.copy_from_slice(&scale.to_le_bytes());
                numbers[..from.len()].copy_from_slice(from);
            }
            self.builder.pack_rows(self.held_row(row), Precision::Fp8, &blocks)?;
        }
        Ok(())
    }

    /// Packs rows of MXFP4 as they are, an exponent before each block, or by way of their values, which bf16
    /// holds exactly.
    fn pack_mxfp4(
        &self,
        piece: &Piece,
        bytes: &[u8],
        exponents: &[u8],
    ) -> Result<(), BackendError> {
        let (read, part) = (self.source.columns_read(), &self.source.part);
        let (weights, bytes_of_block) = StoredType::Mxfp4.block();
        let width = (read.end - read.start) as usize;
        let mut rows = bytes.chunks_exact(self.row_bytes() as usize);
        let mut exponents = exponents.chunks_exact(width / weights as usize);
        if self.held == Precision::Mxfp4 && read == part.columns {
            let mut blocks = vec![0; width / weights as usize * stored::Mxfp4::BYTES];
            for (row, (numbers, exponents)) in (piece.first_row..).zip(rows.zip(exponents)) {
                let numbers = numbers.chunks_exact(bytes_of_block as usize);
                let to = blocks.chunks_exact_mut(stored::Mxfp4::BYTES);
                for (to, (exponent, numbers)) in to.zip(exponents.iter().zip(numbers)) {
                    to[0] = *exponent;
                    to[stored::Mxfp4::NUMBERS_AT..].copy_from_slice(numbers);
                }
                self.builder.pack_rows(self.held_row(row), Precision::Mxfp4, &blocks)?;
            }
            return Ok(());
        }
        let mut wide = vec![0.0; width];
        let first = (part.columns.start - read.start) as usize;
        self.pack_each(piece, |_, values| {
            stored::e2m1_row(rows.next().unwrap_or_default(), &mut wide);
            let scales = exponents.next().unwrap_or_default();
            for (block, scale) in wide.chunks_mut(weights as usize).zip(scales) {
                block.iter_mut().for_each(|value| *value *= stored::power_of(*scale));
            }
            values.copy_from_slice(&wide[first..first + values.len()]);
        })
    }

    /// Packs rows out of words of four-bit numbers, those of the whole matrix. What belongs to them is
    /// read first.
    fn pack_four_bits(
        &self,
        piece: &Piece,
        words: &[u8],
        scales: &StoredScales,
    ) -> Result<Result<(), BackendError>, WeightsError> {
        let StoredScales::FourBits { packing, group, zeros, scales, groups, zero_offset } = scales
        else {
            return Ok(Ok(()));
        };
        let part = &self.source.part;
        let (rows, columns) = (part.spec.shape[0] as usize, part.columns_stored() as usize);
        let zeros = self.source.read_part(zeros)?;
        let scales = self.source.read_values(scales)?;
        let groups = match groups {
            // Negative numbers become too large, and are refused.
            Some(part) => {
                let bytes = self.source.read_part(part)?;
                bytes.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect()
            }
            None => FourBits::groups_in_order(columns, *group as usize),
        };
        let matrix = FourBits {
            packing: *packing,
            shape: (rows, columns),
            words,
            zeros: &zeros,
            scales: &scales,
            groups: &groups,
            zero_offset: *zero_offset,
        };
        if !matrix.groups_exist() {
            return Ok(Err(BackendError::BadShape {
                what: "g_idx",
                why: format!("a column is in a group beyond the last of {}", scales.len() / rows),
            }));
        }
        let mut whole = vec![0.0; columns];
        let own = part.columns.start as usize..part.columns.end as usize;
        Ok(self.pack_each(piece, |row, values| {
            matrix.decode_row(row, &mut whole);
            values.copy_from_slice(&whole[own.clone()]);
        }))
    }

    /// Packs rows one by one, each out of the values that `decode` gives for the file's row.
    fn pack_each(
        &self,
        piece: &Piece,
        mut decode: impl FnMut(usize, &mut [f32]),
    ) -> Result<(), BackendError> {
        let part = &self.source.part;
        let mut values = vec![0.0_f32; part.column_count() as usize];
        let mut bytes = vec![0; 4 * values.len()];
        for row in piece.first_row..piece.first_row + piece.rows {
            decode((part.rows.start + row) as usize, &mut values);
            for (to, value) in bytes.as_chunks_mut().0.iter_mut().zip(&values) {
                *to = value.to_le_bytes();
            }
            self.builder.pack_rows(self.held_row(row), Precision::F32, &bytes)?;
        }
        Ok(())
    }

    /// Where a row of the part, as the file counts them, is held. Parts are whole heads, inside of which
    /// rows are turned.
    fn held_row(&self, row: u64) -> usize {
        let first = self.source.part.rows.start;
        (self.source.location.order.model_row(first + row) - first) as usize
    }
}

/// Refuses numbers of eight bits that are none: what is computed with one would depend on how each
/// instruction set widens it.
fn check_numbers(bytes: &[u8]) -> Result<(), BackendError> {
    let is_none = |byte: &u8| byte & 0x7F == 0x7F;
    match bytes.iter().position(is_none) {
        None => Ok(()),
        Some(at) => Err(BackendError::BadShape {
            what: "an FP8 weight",
            why: format!("{:#04x} is not a number; the file is damaged, or not e4m3", bytes[at]),
        }),
    }
}

/// Refuses exponents that no weight has; one of them stands for no number at all.
fn check_exponents<'a>(mut exponents: impl Iterator<Item = &'a u8>) -> Result<(), BackendError> {
    match exponents.find(|exponent| **exponent > stored::EXPONENT_MAX) {
        None => Ok(()),
        Some(exponent) => Err(BackendError::BadShape {
            what: "an exponent of MXFP4",
            why: format!("{exponent} stands for no size that a weight has; the file is damaged"),
        }),
    }
}

impl Source<'_> {
    /// The number of a row among those of a turned tensor's blocks, `[.., columns, rows / 32]`.
    fn row_of_blocks(&self, row: u64) -> u64 {
        let row = self.part.rows.start + row;
        let Some(excerpt) = &self.part.spec.excerpt else { return row };
        let Some(columns) = excerpt.columns else { return excerpt.first_row + row };
        // As many rows of the stored tensor are an expert as it has columns here.
        let expert = excerpt.first_row / self.part.columns_stored().max(1);
        let width = excerpt.stored.last().copied().unwrap_or(1);
        expert * width + columns.first + row * columns.step
    }

    /// Reads rows of whole blocks, `first` counted from the part's first one.
    pub(super) fn read_blocks(&self, first: u64, buffer: &mut [u8]) -> Result<(), WeightsError> {
        let stored = self.bytes_of(self.part.columns_stored());
        let skipped = self.bytes_of(self.columns_read().start);
        let rows = buffer.chunks_exact_mut(self.row_bytes() as usize);
        (first..)
            .zip(rows)
            .try_for_each(|(row, to)| self.read(self.row_of_blocks(row) * stored + skipped, to))
    }

    /// The exponents of a piece's blocks, row by row.
    fn read_exponents(&self, piece: &Piece, scales: &StoredPart) -> Result<Vec<u8>, WeightsError> {
        let (weights, _) = StoredType::Mxfp4.block();
        let (stored, read) = (self.part.columns_stored() / weights, self.columns_read());
        let own = ((read.end - read.start) / weights) as usize;
        let mut exponents = vec![0; piece.rows as usize * own];
        for (row, to) in (piece.first_row..).zip(exponents.chunks_exact_mut(own.max(1))) {
            let at = self.row_of_blocks(row) * stored + read.start / weights;
            self.read_at(&scales.file, scales.offset + at, to)?;
        }
        Ok(exponents)
    }

    /// Reads a vector in the model's order.
    pub(super) fn read_vector(&self) -> Result<Vec<f32>, WeightsError> {
        let mut bytes = vec![0; (self.part.row_count() * self.row_bytes()) as usize];
        self.read_rows(0, &mut bytes)?;
        let mut found = vec![0.0; self.part.row_count() as usize];
        stored::decode_row(self.location.dtype, &bytes, &mut found);
        let mut values = vec![0.0; found.len()];
        let first = self.part.rows.start;
        for (row, value) in (first..).zip(found) {
            values[(self.location.order.model_row(row) - first) as usize] = value;
        }
        Ok(values)
    }

    /// Reads a tensor that belongs to this one.
    fn read_part(&self, part: &StoredPart) -> Result<Vec<u8>, WeightsError> {
        let mut bytes = vec![0; part.len as usize];
        self.read_at(&part.file, part.offset, &mut bytes)?;
        Ok(bytes)
    }

    fn read_values(&self, part: &StoredPart) -> Result<Vec<f32>, WeightsError> {
        let bytes = self.read_part(part)?;
        let mut values = vec![0.0; part.shape.iter().product::<u64>() as usize];
        stored::decode_row(part.dtype, &bytes, &mut values);
        Ok(values)
    }
}
