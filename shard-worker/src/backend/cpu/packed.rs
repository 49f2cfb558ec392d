//! Matrices packed for products: 16 outputs side by side.
//!
//! ```text
//! panel p holds outputs 16p..16p+16:   [k = 0: 16 weights][k = 1: 16 weights] … [k = cols - 1]
//! ```
//!
//! One vector load gives the weights of 16 outputs for one `k`, and a thread that owns panels
//! streams through memory once. The outputs of the last panel that do not exist are zeros.
//!
//! Matrices that are asked for together lie side by side in one memory, which is freed with the last
//! of them: huge pages then hold all of them but the end of the last.

use std::sync::Arc;
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

/// Matrices begin at multiples of so many bytes: at a cache line.
const ALIGN: usize = 64;

/// A matrix `[outputs, cols]` in panels. See the module.
pub struct Packed {
    /// What it shares with the matrices beside it.
    memory: Arc<Mapped>,
    /// The first byte of it in `memory`: its `panels * PANEL * cols` elements from here on are its
    /// alone.
    start: usize,
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
        // In bounds: see `start`; `wrapping_add` leaves the proof to the access.
        self.memory.as_ptr::<u8>().wrapping_add(self.start).cast()
    }

    /// The same, to write while a builder has it.
    fn as_mut_ptr<E>(&self) -> *mut E {
        // As above.
        self.memory.as_mut_ptr::<u8>().wrapping_add(self.start).cast()
    }

    /// Writes the exact values of row `row` to `to`, which is `cols` long; `row` is below
    /// `outputs`.
    pub(super) fn copy_row(&self, row: usize, to: &mut [f32]) {
        assert!(row < self.outputs && to.len() == self.cols, "checked by the caller");
        with_format!(self.held, F => {
            let panel = row / PANEL * PANEL * self.cols;
            for (k, to) in to.iter_mut().enumerate() {
                // SAFETY: `row` is below `outputs` and `k` below `cols`, so the index is below
                // `panels * PANEL * cols`, the number of elements that are this matrix's. Nobody
                // writes them: the builder is gone.
                let element = unsafe {
                    *self.as_ptr::<<F as Format>::Element>().add(panel + k * PANEL + row % PANEL)
                };
                *to = F::decode(element);
            }
        });
    }
}

/// Packs a [`Packed`] while its rows arrive.
///
/// Threads share it and write through what they share. They never meet: a row is written by the one
/// call that claimed it, and the elements of different rows, as those of different matrices, are
/// different memory. Nobody reads before [`WeightBuilder::finish`], which owns the builder: all calls
/// have returned by then, and whoever ended the sharing has ordered their writes before it.
pub struct PackedBuilder {
    packed: Packed,
    /// One bit a row: packed, or about to be.
    claimed: Vec<AtomicU64>,
}

impl PackedBuilder {
    /// Memory for matrices of `outputs x cols`, side by side, all zeros; pages are taken as they are
    /// written.
    pub fn all(held: Precision, shapes: &[(usize, usize)]) -> Result<Vec<Self>, BackendError> {
        let mut starts = Vec::with_capacity(shapes.len());
        let mut bytes = 0_usize;
        for &(outputs, cols) in shapes {
            starts.push(bytes);
            bytes = bytes_of(held, outputs, cols)
                .and_then(|own| bytes.checked_add(own))
                .and_then(|end| end.checked_next_multiple_of(ALIGN))
                .ok_or_else(|| BackendError::BadShape {
                    what: "matrix",
                    why: format!("{outputs} x {cols} is empty or larger than any memory"),
                })?;
        }
        let memory = Arc::new(Mapped::on_huge_pages("weights", bytes)?);
        let builder = |(&(outputs, cols), start)| Self {
            packed: Packed { memory: Arc::clone(&memory), start, held, outputs, cols },
            claimed: (0..outputs.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        };
        Ok(shapes.iter().zip(starts).map(builder).collect())
    }

    fn bad_row(&self, row: usize, how: &'static str) -> BackendError {
        BackendError::BadRow { row, rows: self.packed.outputs, how }
    }

    /// Transposes rows into their panels. `S` is the stored type, `H` the held one.
    fn transpose<S: Format, H: Format>(&self, first_row: usize, rows: usize, bytes: &[u8]) {
        let cols = self.packed.cols;
        let size = size_of::<S::Element>();
        let base = self.packed.as_mut_ptr::<H::Element>();
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
                        // is this matrix's; `start` and so `base` are aligned to a cache line, the
                        // pointer may write, and row `r` was claimed by this call alone.
                        unsafe { base.add(to + k * PANEL).write(element) };
                    }
                }
            }
            row = until;
        }
    }
}

/// The bytes of a matrix in whole panels; `None` where there are none, or too many to count.
fn bytes_of(held: Precision, outputs: usize, cols: usize) -> Option<usize> {
    let elements = outputs.checked_next_multiple_of(PANEL)?.checked_mul(cols)?;
    elements.checked_mul(held.bytes() as usize).filter(|bytes| *bytes > 0)
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

    fn le_bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn builder(held: Precision, outputs: usize, cols: usize) -> PackedBuilder {
        PackedBuilder::all(held, &[(outputs, cols)]).unwrap().remove(0)
    }

    #[test]
    fn pieces_in_any_order_from_threads_give_the_matrix() {
        let (outputs, cols) = (37, 201);
        let value = |row: usize, col: usize| (row * cols + col) as f32;
        let builder = builder(Precision::F32, outputs, cols);
        std::thread::scope(|scope| {
            for (first, rows) in [(20, 17), (3, 1), (0, 3), (4, 16)] {
                let builder = &builder;
                let piece: Vec<f32> = (first..first + rows)
                    .flat_map(|row| (0..cols).map(move |col| value(row, col)))
                    .collect();
                scope.spawn(move || {
                    builder.pack_rows(first, Precision::F32, &le_bytes(&piece)).unwrap();
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
    fn matrices_side_by_side_leave_each_other_alone_and_outlive_each_other() {
        for held in [Precision::F32, Precision::Bf16] {
            let shapes = [(1, 1), (17, 3), (16, 5), (33, 2)];
            let builders = PackedBuilder::all(held, &shapes).unwrap();
            std::thread::scope(|scope| {
                for (i, builder) in builders.iter().enumerate() {
                    let (outputs, cols) = shapes[i];
                    let all = le_bytes(&vec![1.0 + i as f32; outputs * cols]);
                    scope.spawn(move || builder.pack_rows(0, Precision::F32, &all).unwrap());
                }
            });
            for (i, builder) in builders.into_iter().enumerate() {
                // Those before it are gone.
                let packed = builder.finish().unwrap();
                assert_eq!(packed.as_ptr::<u8>().addr() % ALIGN, 0, "matrix {i}");
                let mut row = vec![0.0; packed.cols()];
                for r in 0..packed.outputs() {
                    packed.copy_row(r, &mut row);
                    assert!(
                        row.iter().all(|v| *v == 1.0 + i as f32),
                        "matrix {i}, row {r}: {row:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn stored_and_held_types_are_converted() {
        let values = [1.0_f32, -0.333_333_34, 65_504.0, 1e-7];
        for held in [Precision::F32, Precision::Bf16, Precision::F16] {
            let builder = builder(held, 1, 4);
            builder.pack_rows(0, Precision::F32, &le_bytes(&values)).unwrap();
            let mut row = [0.0; 4];
            builder.finish().unwrap().copy_row(0, &mut row);
            let expected = values.map(|v| with_format!(held, H => H::decode(H::encode(v))));
            assert_eq!(row, expected, "{held}");
        }
    }

    #[test]
    fn rows_that_do_not_fit_are_refused_by_number() {
        let builder = builder(Precision::Bf16, 2, 3);
        let row = le_bytes(&[1.0, 2.0, 3.0]);
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
            let result = PackedBuilder::all(Precision::F32, &[(1, 1), (outputs, cols)]);
            assert!(matches!(result.err(), Some(BackendError::BadShape { .. })));
        }
    }
}
