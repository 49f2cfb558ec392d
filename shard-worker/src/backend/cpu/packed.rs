//! Matrices packed for products: 16 outputs side by side.
//!
//! ```text
//! panel p holds outputs 16p..16p+16:   [k = 0: 16 weights][k = 1: 16 weights] … [k = cols - 1]
//! ```
//!
//! One vector load gives the weights of 16 outputs for one `k`, and a thread that owns panels
//! streams through memory once. The outputs of the last panel that do not exist are zeros.

use std::sync::atomic::{AtomicU64, Ordering};

use shoal_protocol::model::PANEL_OUTPUTS;
use shoal_protocol::plan::Precision;

use super::format::{Format, with_format};
use super::memory::Mapped;
use super::simd::LANES;
use crate::backend::{BackendError, WeightBuilder};

/// Outputs of a panel.
pub const PANEL: usize = LANES;
const _: () = assert!(PANEL as u64 == PANEL_OUTPUTS, "plans count the padding of panels");

/// Columns that are transposed at once: 16 rows of them fit the first-level cache twice over.
const PACK_COLS: usize = 128;

/// A matrix `[outputs, cols]` in panels. See the module.
pub struct Packed {
    memory: Mapped,
    held: Precision,
    outputs: usize,
    cols: usize,
}

impl Packed {
    /// Rows of the matrix.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of the matrix.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The type of its weights.
    pub fn held(&self) -> Precision {
        self.held
    }

    /// How many panels.
    pub fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    /// The first weight; `Element` is that of `held`.
    pub(super) fn as_ptr<E>(&self) -> *const E {
        self.memory.as_ptr()
    }

    /// Writes the exact values of row `row` to `to`, which is `cols` long; `row` is below
    /// `outputs`.
    pub(super) fn copy_row(&self, row: usize, to: &mut [f32]) {
        assert!(row < self.outputs && to.len() == self.cols, "checked by the caller");
        with_format!(self.held, F => {
            let panel = row / PANEL * PANEL * self.cols;
            for (k, to) in to.iter_mut().enumerate() {
                // SAFETY: `row` is below `outputs` and `k` below `cols`, so the index is below
                // `panels * PANEL * cols`, the number of elements that were allocated.
                let element = unsafe {
                    *self.as_ptr::<<F as Format>::Element>().add(panel + k * PANEL + row % PANEL)
                };
                *to = F::decode(element);
            }
        });
    }
}

/// Packs a [`Packed`] while its rows arrive.
pub struct PackedBuilder {
    packed: Packed,
    /// One bit a row: packed, or about to be.
    claimed: Vec<AtomicU64>,
}

// SAFETY: `pack_rows` writes through a shared reference, but only to rows whose claim this call
// made; a claim is made once, and the elements of different rows are different memory.
unsafe impl Sync for PackedBuilder {}

impl PackedBuilder {
    /// Memory for `outputs x cols`, all zeros; pages are taken as they are written.
    pub fn new(held: Precision, outputs: usize, cols: usize) -> Result<Self, BackendError> {
        let bytes = outputs
            .checked_next_multiple_of(PANEL)
            .and_then(|rows| rows.checked_mul(cols))
            .and_then(|elements| elements.checked_mul(held.bytes() as usize))
            .filter(|bytes| *bytes > 0)
            .ok_or_else(|| BackendError::BadShape {
                what: "matrix",
                why: format!("{outputs} x {cols} is empty or larger than any memory"),
            })?;
        let memory = Mapped::new("weights", bytes)?;
        memory.prefer_huge_pages();
        let claimed = (0..outputs.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { packed: Packed { memory, held, outputs, cols }, claimed })
    }

    fn bad_row(&self, row: usize, how: &'static str) -> BackendError {
        BackendError::BadRow { row, rows: self.packed.outputs, how }
    }

    /// Transposes rows into their panels. `S` is the stored type, `H` the held one.
    fn transpose<S: Format, H: Format>(&self, first_row: usize, rows: usize, bytes: &[u8]) {
        let cols = self.packed.cols;
        let size = size_of::<S::Element>();
        let base = self.packed.as_ptr::<H::Element>().cast_mut();
        let mut row = first_row;
        while row < first_row + rows {
            let until = (row / PANEL + 1) * PANEL;
            let until = until.min(first_row + rows);
            for k0 in (0..cols).step_by(PACK_COLS) {
                let k1 = (k0 + PACK_COLS).min(cols);
                for r in row..until {
                    let from = &bytes[((r - first_row) * cols + k0) * size..][..(k1 - k0) * size];
                    let to = r / PANEL * PANEL * cols + k0 * PANEL + r % PANEL;
                    for (k, stored) in from.chunks_exact(size).enumerate() {
                        let element = H::encode(S::decode(S::read(stored)));
                        // SAFETY: `r` is below `outputs` and `k0 + k` below `cols`, so the element
                        // is inside the allocation; row `r` was claimed by this call alone.
                        unsafe { base.add(to + k * PANEL).write(element) };
                    }
                }
            }
            row = until;
        }
    }
}

impl WeightBuilder for PackedBuilder {
    type Weight = Packed;

    fn pack_rows(
        &self,
        first_row: usize,
        stored: Precision,
        bytes: &[u8],
    ) -> Result<(), BackendError> {
        let Packed { held, outputs, cols, .. } = self.packed;
        let row_bytes = cols * stored.bytes() as usize;
        let rows = bytes.len() / row_bytes;
        if rows * row_bytes != bytes.len() {
            return Err(BackendError::BadShape {
                what: "rows of a matrix",
                why: format!("{} bytes; a row of {cols} {stored} has {row_bytes}", bytes.len()),
            });
        }
        if first_row > outputs || rows > outputs - first_row {
            return Err(self.bad_row(first_row.saturating_add(rows) - 1, "beyond the last"));
        }
        for row in first_row..first_row + rows {
            let bit = 1 << (row % 64);
            if self.claimed[row / 64].fetch_or(bit, Ordering::Relaxed) & bit != 0 {
                return Err(self.bad_row(row, "packed twice"));
            }
        }
        with_format!(stored, S => with_format!(held, H => {
            self.transpose::<S, H>(first_row, rows, bytes)
        }));
        Ok(())
    }

    fn finish(self) -> Result<Packed, BackendError> {
        for row in 0..self.packed.outputs {
            if self.claimed[row / 64].load(Ordering::Relaxed) & (1 << (row % 64)) == 0 {
                return Err(self.bad_row(row, "not packed"));
            }
        }
        Ok(self.packed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn pieces_in_any_order_from_threads_give_the_matrix() {
        let (outputs, cols) = (37, 201);
        let value = |row: usize, col: usize| (row * cols + col) as f32;
        let builder = PackedBuilder::new(Precision::F32, outputs, cols).unwrap();
        std::thread::scope(|scope| {
            for (first, rows) in [(20, 17), (3, 1), (0, 3), (4, 16)] {
                let builder = &builder;
                let piece: Vec<f32> = (first..first + rows)
                    .flat_map(|row| (0..cols).map(move |col| value(row, col)))
                    .collect();
                scope.spawn(move || {
                    builder.pack_rows(first, Precision::F32, &bytes_of(&piece)).unwrap();
                });
            }
        });
        let packed = builder.finish().unwrap();
        let mut row = vec![0.0; cols];
        for r in 0..outputs {
            packed.copy_row(r, &mut row);
            assert!(row.iter().enumerate().all(|(col, v)| *v == value(r, col)), "row {r}");
        }
    }

    #[test]
    fn stored_and_held_types_are_converted() {
        let values = [1.0_f32, -0.333_333_34, 65_504.0, 1e-7];
        for held in [Precision::F32, Precision::Bf16, Precision::F16] {
            let builder = PackedBuilder::new(held, 1, 4).unwrap();
            builder.pack_rows(0, Precision::F32, &bytes_of(&values)).unwrap();
            let mut row = [0.0; 4];
            builder.finish().unwrap().copy_row(0, &mut row);
            let expected = values.map(|v| with_format!(held, H => H::decode(H::encode(v))));
            assert_eq!(row, expected, "{held}");
        }
    }

    #[test]
    fn rows_that_do_not_fit_are_refused_by_number() {
        let builder = PackedBuilder::new(Precision::Bf16, 2, 3).unwrap();
        let row = bytes_of(&[1.0, 2.0, 3.0]);
        let pack = |first, bytes: &[u8]| builder.pack_rows(first, Precision::F32, bytes);
        assert_eq!(pack(0, &row), Ok(()));
        let twice = Err(BackendError::BadRow { row: 0, rows: 2, how: "packed twice" });
        assert_eq!(pack(0, &row), twice);
        let beyond = Err(BackendError::BadRow { row: 2, rows: 2, how: "beyond the last" });
        assert_eq!(pack(2, &row), beyond);
        assert!(matches!(pack(1, &row[1..]), Err(BackendError::BadShape { .. })));
        let missing = Some(BackendError::BadRow { row: 1, rows: 2, how: "not packed" });
        assert_eq!(builder.finish().err(), missing);
    }

    #[test]
    fn impossible_shapes_are_refused() {
        for (outputs, cols) in [(0, 4), (4, 0), (usize::MAX, 2), (usize::MAX / 64, 64)] {
            let result = PackedBuilder::new(Precision::F32, outputs, cols);
            assert!(matches!(result.err(), Some(BackendError::BadShape { .. })));
        }
    }
}
