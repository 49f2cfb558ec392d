//! Products of rows with a packed matrix.
//!
//! Contract n1: an output is one chain of fused multiply-adds over `k` in ascending order, from
//! zero; the bias is added last. Contract n2 has another link in that chain ([`dots`]).
//! Rows, panels and threads are divided freely, `k` never is: where
//! it is cut for the caches, the chain goes on from the sum in `out`.
//!
//! ```text
//! a thread's panels:  for each cut of k            (rows of x stay in the second-level cache)
//!                       for each 4 panels          (weights come from memory once a step)
//!                         for each tile of rows    (sums stay in registers)
//! tile of m rows:     [k = 0: m values][k = 1: m values] …
//! ```
#![allow(clippy::needless_range_loop)] // An index names a register; iterators hide which.

use std::marker::PhantomData;

use super::dots::{self, Dots};
use super::format::{Format, with_format, with_numbers};
use super::isa::{Isa, Kernel};
use super::packed::{PANEL, Packed};
use super::simd::Simd;
use super::{ALONE_STEPS_MAX, ALONE_VALUES_MAX, spread};
use crate::backend::pool::{Pool, Share};
use crate::model::ComputeError;

/// Panels that go through the tiles together; every number of panels of a tile divides it.
const GROUP: usize = 4;

/// How many rows are divided into tiles of nearly the same height.
#[derive(Clone, Copy)]
pub(super) struct Tiling {
    pub(super) tiles: usize,
    rows: usize,
}

impl Tiling {
    fn of(rows: usize, tile_rows_max: usize) -> Self {
        Self { tiles: rows.div_ceil(tile_rows_max), rows }
    }

    /// First row and height of a tile.
    pub(super) fn tile(self, index: usize) -> (usize, usize) {
        let range = Share { index, of: self.tiles }.range(self.rows);
        (range.start, range.len())
    }
}

/// How a chain goes on from one column to the next.
///
/// # Safety
///
/// Implementations go no further than what [`Tile`] promises.
pub(super) unsafe trait Arithmetic: Sized {
    /// See [`Kernel::DOTS`].
    const DOTS: bool;

    /// Where `k` is cut when there are several tiles of rows.
    const CUT: usize;

    /// How high tiles are at most, with 32 registers or 16 halves.
    fn rows_max(wide: bool) -> usize;

    /// The byte at which a tile, of which the first row and the height are given, has column `k`, where a cut may be.
    fn offset(rows: (usize, usize), k: usize, cols: usize) -> usize;

    /// Calls `tile.columns` with its height and as many panels as the registers hold sums for.
    unsafe fn of_height<S: Simd>(tile: &Tile<Self>, height: usize);

    /// Adds the columns of a tile to the sums of `P` panels from `panel` on.
    unsafe fn accumulate<S: Simd, const M: usize, const P: usize>(
        sums: &mut [[S::F; P]; M],
        tile: &Tile<Self>,
        panel: usize,
    );
}

/// Rows laid out in tiles, ready for products.
pub struct Tiles<'a> {
    /// `[tile][column][row]`; or as [`dots`] lays them out.
    x: &'a [f32],
    tiling: Tiling,
    cols: usize,
    /// Whether it is as `dots` lays them out.
    rounded: bool,
}

impl<'a> Tiles<'a> {
    /// How high tiles are at most with these instructions.
    fn rows_max<A: Arithmetic>(isa: Isa) -> usize {
        struct TileRows<A>(PhantomData<A>);
        impl<A: Arithmetic> Kernel for TileRows<A> {
            type Output = usize;
            #[inline(always)]
            unsafe fn run<S: Simd>(self) -> usize {
                A::rows_max(S::WIDE)
            }
        }
        // SAFETY: it computes nothing.
        unsafe { isa.run(TileRows::<A>(PhantomData)) }
    }

    /// Lays out `x`, `rows x cols`, in `scratch`, which is as large. `fresh` says that `scratch`
    /// does not hold these rows already. One row needs no other layout than its own.
    pub fn of(
        (isa, pool): (Isa, &mut Pool),
        x: &'a [f32],
        (rows, cols): (usize, usize),
        (scratch, fresh): (&'a mut [f32], bool),
    ) -> Result<Self, ComputeError> {
        let tiling = Tiling::of(rows, Self::rows_max::<Chains<super::format::F32>>(isa));
        let x = &x[..rows * cols];
        if rows <= 1 {
            return Ok(Self { x, tiling, cols, rounded: false });
        }
        let scratch = &mut scratch[..rows * cols];
        if fresh {
            let to = SharedMut(scratch.as_mut_ptr());
            spread(pool, rows * cols <= ALONE_VALUES_MAX, &|share: Share| {
                for index in share.range(tiling.tiles) {
                    let (first, height) = tiling.tile(index);
                    // SAFETY: tiles are disjoint ranges of rows, and `scratch` has room for all.
                    let tile = unsafe {
                        std::slice::from_raw_parts_mut(to.get().add(first * cols), height * cols)
                    };
                    interleave(&x[first * cols..][..height * cols], height, tile);
                }
            })?;
        }
        Ok(Self { x: scratch, tiling, cols, rounded: false })
    }

    /// Rounds `x` to whole numbers in `scratch`, which has [`dots::scratch_len`] values, for matrices of
    /// [`Precision::has_numbers`](shoal_protocol::plan::Precision::has_numbers).
    pub fn rounded(
        (isa, pool): (Isa, &mut Pool),
        x: &[f32],
        (rows, cols): (usize, usize),
        (scratch, fresh): (&'a mut [f32], bool),
    ) -> Result<Self, ComputeError> {
        let tiling = Tiling::of(rows, Self::rows_max::<Dots<super::blocks::Q8_0>>(isa));
        let scratch = &mut scratch[..dots::scratch_len(rows, cols)];
        if fresh {
            let to = SharedMut(scratch.as_mut_ptr());
            let x = &x[..rows * cols];
            spread(pool, rows * cols <= ALONE_VALUES_MAX, &|share: Share| {
                for index in share.range(tiling.tiles) {
                    let (first, height) = tiling.tile(index);
                    let rows = &x[first * cols..][..height * cols];
                    // SAFETY: tiles are disjoint ranges of rows, and `scratch` has room for all.
                    unsafe {
                        let to = to.get().add(dots::scratch_len(first, cols));
                        isa.run(dots::Round { rows, height, to });
                    }
                }
            })?;
        }
        Ok(Self { x: scratch, tiling, cols, rounded: true })
    }
}

/// `height` rows to one row per column.
fn interleave(rows: &[f32], height: usize, tile: &mut [f32]) {
    /// As many columns of 8 rows as fit a first-level cache with their copies.
    const COLS: usize = 256;
    let cols = rows.len() / height;
    for k0 in (0..cols).step_by(COLS) {
        let k1 = (k0 + COLS).min(cols);
        for (m, row) in rows.chunks_exact(cols).enumerate() {
            let to = tile[k0 * height..k1 * height].chunks_exact_mut(height);
            for (value, to) in row[k0..k1].iter().zip(to) {
                to[m] = *value;
            }
        }
    }
}

/// A pointer that a kernel's threads write disjoint parts through.
#[derive(Clone, Copy)]
pub(super) struct SharedMut(pub *mut f32);

impl SharedMut {
    /// The pointer; a method, so that closures capture the whole.
    pub(super) fn get(self) -> *mut f32 {
        self.0
    }
}

// SAFETY: a plain address; each use says which part is whose.
unsafe impl Sync for SharedMut {}
// SAFETY: as above.
unsafe impl Send for SharedMut {}

/// `out[r] = weight · x[r] + bias`. `out` is `rows x outputs`; `bias` has a whole number of panels.
pub fn product(
    (isa, pool): (Isa, &mut Pool),
    x: &Tiles<'_>,
    weight: &Packed,
    bias: Option<&[f32]>,
    out: &mut [f32],
) -> Result<(), ComputeError> {
    assert_eq!(x.cols, weight.cols(), "checked by the caller");
    assert!(out.len() >= x.tiling.rows * weight.outputs(), "checked by the caller");
    assert!(bias.is_none_or(|b| b.len() >= weight.panels() * PANEL), "checked by the caller");
    let out = SharedMut(out.as_mut_ptr());
    let steps = x.tiling.rows.saturating_mul(weight.outputs()).saturating_mul(weight.cols());
    spread(pool, steps <= ALONE_STEPS_MAX, &|share: Share| {
        // Shares of whole groups, so that no thread is left with the slower small ones.
        let groups = share.range(weight.panels().div_ceil(GROUP));
        let panels =
            (groups.start * GROUP).min(weight.panels())..(groups.end * GROUP).min(weight.panels());
        let out = out.get();
        // SAFETY: sizes were checked above; each share writes the columns of its own panels.
        unsafe {
            if x.rounded {
                with_numbers!(weight.held(), F => {
                    isa.run(Product::<Dots<F>> { x, weight, bias, out, panels, how: PhantomData })
                }, otherwise unreachable!("rows are rounded for whole numbers alone"))
            } else {
                with_format!(weight.held(), F => {
                    isa.run(Product::<Chains<F>> { x, weight, bias, out, panels, how: PhantomData })
                })
            }
        }
    })
}

/// The same of one row on the caller's thread alone, without bias; `x` is as long as the weight has
/// columns, `out` as it has outputs.
pub fn one_row(isa: Isa, x: &[f32], weight: &Packed, out: &mut [f32]) {
    assert_eq!((x.len(), out.len()), (weight.cols(), weight.outputs()), "checked by the caller");
    let x = &Tiles { x, tiling: Tiling::of(1, 1), cols: weight.cols(), rounded: false };
    let (out, panels) = (out.as_mut_ptr(), 0..weight.panels());
    with_format!(weight.held(), F => {
        let product = Product::<Chains<F>> { x, weight, bias: None, out, panels, how: PhantomData };
        // SAFETY: sizes were checked above.
        unsafe { isa.run(product) }
    });
}

/// One thread's share of a product.
struct Product<'a, A> {
    x: &'a Tiles<'a>,
    weight: &'a Packed,
    bias: Option<&'a [f32]>,
    out: *mut f32,
    panels: std::ops::Range<usize>,
    how: PhantomData<A>,
}

impl<A: Arithmetic> Kernel for Product<'_, A> {
    type Output = ();
    const DOTS: bool = A::DOTS;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, weight, bias, out, panels, how: _ } = self;
        let (cols, outputs) = (weight.cols(), weight.outputs());
        let cut = if x.tiling.tiles > 1 { A::CUT } else { cols };
        for k0 in (0..cols).step_by(cut) {
            let depth = cut.min(cols - k0);
            for panel in panels.clone().step_by(GROUP) {
                let column = panel * PANEL;
                for index in 0..x.tiling.tiles {
                    let (row, height) = x.tiling.tile(index);
                    // SAFETY: all offsets are inside `x` (all tiles), the panels
                    // (`panels x cols x 16`), `bias` (whole panels) and `out` (`rows x outputs`).
                    let tile = unsafe {
                        Tile::<A> {
                            k0,
                            depth,
                            x: x.x.as_ptr().cast::<u8>().add(A::offset((row, height), k0, cols)),
                            weights: weight.panel(panel),
                            panel_bytes: weight.panel_bytes(),
                            panels: GROUP.min(panels.end - panel),
                            out: out.add(row * outputs + column),
                            out_stride: outputs,
                            columns: outputs - column,
                            bias: bias
                                .filter(|_| k0 + depth == cols)
                                .map(|bias| bias.as_ptr().add(column)),
                            how: PhantomData,
                        }
                    };
                    // SAFETY: as above, and `height` is that of the tile.
                    unsafe { A::of_height::<S>(&tile, height) };
                }
            }
        }
    }
}

/// At most [`GROUP`] panels, one tile of rows, one cut of `k`.
pub(super) struct Tile<A> {
    /// The first column; the chains begin at 0.
    pub(super) k0: usize,
    pub(super) depth: usize,
    /// The tile from its first column on, in the layout of its arithmetic, aligned to four bytes.
    pub(super) x: *const u8,
    /// The first panel.
    pub(super) weights: *const u8,
    pub(super) panel_bytes: usize,
    panels: usize,
    /// `[height of out_stride][columns]`.
    out: *mut f32,
    out_stride: usize,
    /// Columns of `out` from here on; the last panel may have fewer than 16.
    columns: usize,
    /// Where the chains end here and there is one.
    bias: Option<*const f32>,
    how: PhantomData<A>,
}

/// Calls the kernel for a height with so many panels at once.
macro_rules! by_height {
    ($tile:ident, $height:ident, $simd:ident: $($m:literal x $p:literal),+) => {
        match $height {
            // SAFETY: the caller's; the tile is `$m` rows high.
            $($m => unsafe { $tile.columns::<$simd, $m, $p>() },)+
            // Tiles are no higher than `Arithmetic::rows_max`.
            _ => unreachable!("a tile of {} rows", $height),
        }
    };
}
pub(super) use by_height;

impl<A: Arithmetic> Tile<A> {
    #[inline(always)]
    pub(super) unsafe fn columns<S: Simd, const M: usize, const P: usize>(&self) {
        let mut panel = 0;
        while panel + P <= self.panels {
            // SAFETY: the caller's; the panels are there.
            unsafe { self.multiply::<S, M, P>(panel) };
            panel += P;
        }
        while panel < self.panels {
            // SAFETY: as above.
            unsafe { self.multiply::<S, M, 1>(panel) };
            panel += 1;
        }
    }

    /// `M` rows by `P` panels, the sums in registers.
    #[inline(always)]
    unsafe fn multiply<S: Simd, const M: usize, const P: usize>(&self, panel: usize) {
        // SAFETY: the pointers are valid for the sizes in the fields' docs, which is the caller's
        // promise; nothing below goes beyond them.
        unsafe {
            let mut sums = [[S::splat(0.0); P]; M];
            if self.k0 > 0 {
                for m in 0..M {
                    for p in 0..P {
                        let (at, lanes) = self.place(m, panel + p);
                        sums[m][p] = S::load_first(at, lanes);
                    }
                }
            }
            A::accumulate::<S, M, P>(&mut sums, self, panel);
            for m in 0..M {
                for p in 0..P {
                    let (at, lanes) = self.place(m, panel + p);
                    let mut sum = sums[m][p];
                    if let Some(bias) = self.bias {
                        sum = S::add(sum, S::load(bias.add((panel + p) * PANEL)));
                    }
                    S::store_first(at, sum, lanes);
                }
            }
        }
    }

    /// Where a row's sums of a panel go, and how many of them exist.
    #[inline(always)]
    fn place(&self, row: usize, panel: usize) -> (*mut f32, usize) {
        let column = panel * PANEL;
        // In bounds, as the fields' docs say; `wrapping_add` leaves the proof to the access.
        let at = self.out.wrapping_add(row * self.out_stride + column);
        (at, PANEL.min(self.columns - column))
    }
}

/// Contract n1: `sum = fma(x, w, sum)` for each column.
pub(super) struct Chains<F>(PhantomData<F>);

// SAFETY: a tile has `depth` columns of `M` values, and its panels have the columns, which is what `Tile` promises.
unsafe impl<F: Format> Arithmetic for Chains<F> {
    const DOTS: bool = false;
    /// 8 rows of so many values are 16 KiB, half of the smallest first-level cache.
    const CUT: usize = 512;

    fn rows_max(wide: bool) -> usize {
        if wide { 8 } else { 6 }
    }

    #[inline(always)]
    fn offset((row, height): (usize, usize), k: usize, cols: usize) -> usize {
        (row * cols + k * height) * size_of::<f32>()
    }

    #[inline(always)]
    unsafe fn of_height<S: Simd>(tile: &Tile<Self>, height: usize) {
        if S::WIDE {
            by_height!(tile, height, S:
                1 x 4, 2 x 4, 3 x 4, 4 x 4, 5 x 2, 6 x 2, 7 x 2, 8 x 2)
        } else {
            by_height!(tile, height, S: 1 x 4, 2 x 2, 3 x 2, 4 x 1, 5 x 1, 6 x 1)
        }
    }

    #[inline(always)]
    unsafe fn accumulate<S: Simd, const M: usize, const P: usize>(
        sums: &mut [[S::F; P]; M],
        tile: &Tile<Self>,
        panel: usize,
    ) {
        const {
            let whole = F::RUN > Self::CUT || Self::CUT.is_multiple_of(F::RUN);
            assert!(whole, "a cut of k begins a run");
        };
        // SAFETY: the caller's.
        unsafe {
            // A copy, which stays in registers.
            let mut chains = *sums;
            let mut x = tile.x.cast::<f32>();
            let weights = tile.weights.add(panel * tile.panel_bytes);
            let mut done = 0;
            while done < tile.depth {
                let mut runs = [F::open::<S>(weights, tile.k0 + done); P];
                for p in 1..P {
                    runs[p] = F::open::<S>(weights.add(p * tile.panel_bytes), tile.k0 + done);
                }
                let long = F::RUN.min(tile.depth - done);
                let mut i = 0;
                // Formats find four columns at once.
                while i + 4 <= long {
                    for j in 0..4 {
                        step::<S, F, M, P>(&mut chains, &runs, i + j, x.add(j * M));
                    }
                    x = x.add(4 * M);
                    i += 4;
                }
                while i < long {
                    step::<S, F, M, P>(&mut chains, &runs, i, x);
                    x = x.add(M);
                    i += 1;
                }
                done += long;
            }
            *sums = chains;
        }
    }
}

/// One column: `M` values of rows by `P` panels.
#[inline(always)]
unsafe fn step<S: Simd, F: Format, const M: usize, const P: usize>(
    sums: &mut [[S::F; P]; M],
    runs: &[F::Run<S>; P],
    i: usize,
    x: *const f32,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut w = [S::splat(0.0); P];
        for p in 0..P {
            w[p] = F::load::<S>(&runs[p], i);
        }
        for m in 0..M {
            let value = S::splat(*x.add(m));
            for p in 0..P {
                sums[m][p] = S::fma(value, w[p], sums[m][p]);
            }
        }
    }
}
