//! Matrices packed for products: 16 outputs side by side.
//!
//! ```text
//! panel p holds outputs 16p..16p+16:   [k = 0: 16 weights][k = 1: 16 weights] … [k = cols - 1]
//! ```
//!
//! One vector load gives the weights of 16 outputs for one `k`, and a thread that owns panels
//! streams through memory once. The outputs of the last panel that do not exist are zeros. Where weights
//! share a scale, a panel is a row of whole blocks ([`super::blocks`]); columns that its last one
//! has beyond those of the matrix count nothing.
//!
//! Matrices that are asked for together lie side by side in one memory, which is freed with the last
//! of them: huge pages then hold all of them but the end of the last.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use shoal_protocol::model::PANEL_OUTPUTS;
use shoal_protocol::plan::Precision;

use super::blocks::Blocks;
use super::format::{Format, Plain, with_blocks, with_format, with_plain};
use super::isa::{Isa, Kernel};
use super::memory::Mapped;
use super::simd::{LANES, Simd};
use crate::backend::{BackendError, WeightBuilder};
use crate::stored::{BLOCK_MAX, Block, Encode};

/// Outputs of a panel.
pub const PANEL: usize = LANES;
const _: () = assert!(PANEL as u64 == PANEL_OUTPUTS, "plans count the padding of panels");

/// Columns that are transposed at once: 16 rows of them fit the first-level cache twice over.
const PACK_COLS: usize = 128;

/// The smallest page of any system that this runs on.
const PAGE: usize = 4 << 10;

/// Matrices begin at multiples of so many bytes: at a cache line.
const ALIGN: usize = 64;

/// A matrix `[outputs, cols]` in panels. See the module.
pub struct Packed {
    /// What it shares with the matrices beside it.
    memory: Arc<Mapped>,
    /// The first byte of it in `memory`: its `panels * panel_bytes` from here on are its alone.
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

    /// Bytes of a panel.
    pub(super) fn panel_bytes(&self) -> usize {
        PANEL * self.held.row_bytes(self.cols as u64) as usize
    }

    /// A panel, one below `panels`.
    pub(super) fn panel(&self, panel: usize) -> *const u8 {
        self.panel_mut(panel).cast_const()
    }

    /// The same, to write while a builder has it.
    fn panel_mut(&self, panel: usize) -> *mut u8 {
        // In bounds: see `start`; `wrapping_add` leaves the proof to the access.
        self.memory.as_mut_ptr::<u8>().wrapping_add(self.start + panel * self.panel_bytes())
    }

    /// Nothing of it is in a cache after this, where the processor can be told so: what is read next comes from
    /// memory.
    pub(crate) fn leave_caches(&self) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        for at in (0..self.panels() * self.panel_bytes()).step_by(ALIGN) {
            let line = self.panel(0).wrapping_add(at);
            // SAFETY: the instruction is one of every x86-64, and changes no memory; the line is one of this matrix.
            unsafe { std::arch::x86_64::_mm_clflush(line) };
        }
    }

    /// Writes the exact values of row `row` to `to`, which is `cols` long; `row` is below
    /// `outputs`.
    pub(super) fn copy_row(&self, isa: Isa, row: usize, to: &mut [f32]) {
        assert!(row < self.outputs && to.len() == self.cols, "checked by the caller");
        let (panel, lane) = (self.panel(row / PANEL), row % PANEL);
        with_format!(self.held, F => {
            let kernel = CopyRow { panel, lane, to, format: PhantomData::<F> };
            // SAFETY: `row` is below `outputs` and `to` as long as there are columns, so the panel is one of
            // this matrix and has them; matrices are aligned to cache lines and panels to two bytes. Nobody
            // writes: the builder is gone.
            unsafe { isa.run(kernel) }
        });
    }
}

/// One row's values, out of its panel.
struct CopyRow<'a, F> {
    panel: *const u8,
    lane: usize,
    to: &'a mut [f32],
    format: PhantomData<F>,
}

impl<F: Format> Kernel for CopyRow<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut column = [0.0; PANEL];
        let cols = self.to.len();
        for first in (0..cols).step_by(F::RUN.min(cols)) {
            // SAFETY: the caller's: the panel has a column for each place of `to`.
            unsafe {
                let run = F::open::<S>(self.panel, first);
                for (i, to) in self.to[first..].iter_mut().take(F::RUN).enumerate() {
                    S::store(column.as_mut_ptr(), F::load::<S>(&run, i));
                    *to = column[self.lane];
                }
            }
        }
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

    /// The matrix with zeros in all rows that were not packed, and all its pages there: what is only measured
    /// with needs no values, and packing takes longer than measuring.
    pub(crate) fn zeros(self) -> Packed {
        let packed = self.packed;
        for at in (0..packed.panels() * packed.panel_bytes()).step_by(PAGE) {
            let byte = packed.panel_mut(0).wrapping_add(at);
            // SAFETY: inside of this matrix, of which there is no other owner. It is the byte that is there.
            unsafe { byte.write_volatile(byte.read_volatile()) };
        }
        packed
    }

    fn bad_row(&self, row: usize, how: &'static str) -> BackendError {
        BackendError::BadRow { row, rows: self.packed.outputs, how }
    }

    /// Transposes rows into their panels. `S` is the stored type, `H` the held one.
    fn transpose<S: Plain, H: Plain>(&self, first_row: usize, rows: usize, bytes: &[u8]) {
        let cols = self.packed.cols;
        let size = size_of::<S::Element>();
        let base = self.packed.panel_mut(0).cast::<H::Element>();
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

    /// Rounds rows of type `S` to blocks, and puts those into their panels.
    fn quantise<S: Plain, H: Blocks>(&self, first_row: usize, rows: usize, bytes: &[u8]) {
        let size = size_of::<S::Element>();
        let row_bytes = self.packed.cols * size;
        let mut values = [0.0; BLOCK_MAX];
        let mut block = [0; BLOCK_MAX];
        for (r, from) in (first_row..first_row + rows).zip(bytes.chunks_exact(row_bytes)) {
            let panel = self.packed.panel_mut(r / PANEL);
            for (b, from) in from.chunks(H::Stored::WEIGHTS * size).enumerate() {
                let values = &mut values[..from.len() / size];
                for (value, stored) in values.iter_mut().zip(from.chunks_exact(size)) {
                    *value = S::decode(S::read(stored));
                }
                H::Stored::encode(values, &mut block[..H::Stored::BYTES]);
                // SAFETY: row `r` is of this panel and was claimed by this call alone; the panel has a
                // block for each so many columns that are begun, and is aligned as its matrix.
                unsafe { H::place(panel, b, r % PANEL, &block) };
            }
        }
    }

    /// Puts rows that are blocks already into their panels.
    fn place<H: Blocks>(&self, first_row: usize, rows: usize, bytes: &[u8]) {
        let row_bytes = self.packed.held.stored_row_bytes(self.packed.cols);
        for (r, from) in (first_row..first_row + rows).zip(bytes.chunks_exact(row_bytes)) {
            let panel = self.packed.panel_mut(r / PANEL);
            for (b, block) in from.chunks_exact(H::Stored::BYTES).enumerate() {
                // SAFETY: as in `quantise`.
                unsafe { H::place(panel, b, r % PANEL, block) };
            }
        }
    }

    /// Writes rows that were claimed. `stored` is plain, or what is held.
    fn write(&self, first_row: usize, rows: usize, stored: Precision, bytes: &[u8]) {
        let held = self.packed.held;
        with_plain!(stored, S => with_plain!(held, H => {
            self.transpose::<S, H>(first_row, rows, bytes)
        }, otherwise with_blocks!(held, H => {
            self.quantise::<S, H>(first_row, rows, bytes)
        })), otherwise with_blocks!(held, H => {
            self.place::<H>(first_row, rows, bytes)
        }));
    }
}

/// Bytes of a row of so many columns as files store it: of whole blocks.
trait StoredRow {
    fn stored_row_bytes(self, cols: usize) -> usize;
}

impl StoredRow for Precision {
    fn stored_row_bytes(self, cols: usize) -> usize {
        with_plain!(self, S => cols * size_of::<<S as Plain>::Element>(), otherwise {
            with_blocks!(self, H => {
                type Stored = <H as Blocks>::Stored;
                cols.div_ceil(Stored::WEIGHTS) * Stored::BYTES
            })
        })
    }
}

/// The bytes of a matrix in whole panels; `None` where there are none, or too many to count.
fn bytes_of(held: Precision, outputs: usize, cols: usize) -> Option<usize> {
    let (weights, bytes) = held.block();
    let row = cols.div_ceil(weights as usize).checked_mul(bytes as usize)?;
    let all = outputs.checked_next_multiple_of(PANEL)?.checked_mul(row)?;
    // More than any memory has, but less than what additions overflow at.
    all.checked_mul(2).map(|_| all).filter(|bytes| *bytes > 0)
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
        if stored.is_quantised() && stored != held {
            return Err(BackendError::BadShape {
                what: "rows of a matrix",
                why: format!("blocks of {stored}, and {held} is to be held"),
            });
        }
        let row_bytes = stored.stored_row_bytes(cols);
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
        self.write(first_row, rows, stored, bytes);
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
            packed.copy_row(Isa::best(), r, &mut row);
            assert!(row.iter().enumerate().all(|(col, v)| *v == value(r, col)), "row {r}");
        }
    }

    #[test]
    fn matrices_side_by_side_leave_each_other_alone_and_outlive_each_other() {
        for held in Precision::ALL {
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
                assert_eq!(packed.panel(0).addr() % ALIGN, 0, "matrix {i}");
                let mut row = vec![0.0; packed.cols()];
                for r in 0..packed.outputs() {
                    packed.copy_row(Isa::best(), r, &mut row);
                    assert!(
                        // Blocks are near it.
                        row.iter().all(|v| (*v / (1.0 + i as f32) - 1.0).abs() < 0.01),
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
            builder.finish().unwrap().copy_row(Isa::best(), 0, &mut row);
            let expected =
                values.map(|v| with_plain!(held, H => H::decode(H::encode(v)), otherwise f32::NAN));
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
