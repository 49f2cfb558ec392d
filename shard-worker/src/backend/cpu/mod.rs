//! [`Ops`] on the CPU: packed kernels under numerics contracts n1 and n2.
//!
//! A product output is one chain of fused multiply-adds over `k` ascending from zero, the bias added
//! last ([`linear`]). Sums over a row take 16 lanes and one fold tree ([`rows`]). Softmax is online
//! in blocks of 16 positions aligned to position 0 ([`attention`]). The exponential is our own
//! ([`math`]). So a row's bits depend on no other row, on no chunking, on no number of threads and
//! on no instruction set; `docs/decisions/001-numerics-contract-n1.md` is the contract.
//!
//! ```text
//! isa (found once) ─► Kernel::run::<Simd> ─► the same code for avx512 · avx2 · portable
//! pool (T threads) ─► shares: outputs of a product, rows of a norm, heads of attention; never k
//! ```
#![allow(unsafe_code)] // Vector instructions, and threads that share one output.

mod attention;
mod blocks;
mod check;
mod dots;
mod encode;
mod experts;
mod family;
mod format;
mod isa;
mod kv;
mod kv_format;
mod linear;
mod long_blocks;
mod math;
mod memory;
mod mxfp4;
mod packed;
mod products;
mod rows;
mod simd;
#[cfg(target_arch = "x86_64")]
mod simd_x86;

#[cfg(test)]
mod attention_test;
#[cfg(test)]
mod dots_test;
#[cfg(test)]
mod family_test;
#[cfg(test)]
mod kernels_test;

pub use format::widen;
pub use isa::{ISA_VARIABLE, InstructionSet, Isa};
pub use kv::PagedKv;
pub use memory::held_bytes;
pub use packed::{Packed, PackedBuilder};

use shoal_protocol::model::Activation;
use shoal_protocol::plan::{Activations, KvPrecision, Precision};

use self::check::{bad, expect, expect_rows, heads_of};
use self::family::NormOf;
use self::linear::SharedMut;
use self::memory::Floats;
use self::rows::{Add, Gate, RotateRow, angles_of};
use super::cpus::Cpus;
use super::pool::{Pool, Share};
use super::{Attend, BackendError, KvShape, Linear, Norm, Ops, RowSet, Turn};
use crate::model::{ComputeError, Span};

/// Values up to which an operation on rows is not worth other threads: it takes a microsecond or
/// two, about as long as they need to notice.
const ALONE_VALUES_MAX: usize = 16 * 1024;

/// The same in fused multiply-adds, for products and attention.
const ALONE_STEPS_MAX: usize = 64 * 1024;

/// The CPU. See the module.
pub struct CpuOps {
    isa: Isa,
    pool: Pool,
    /// Rows laid out for products, as large as the largest buffer.
    tiles: Floats,
    /// The contents that `tiles` holds, how many rows of them, and what they are there.
    tiles_hold: (Stamp, usize, Activations),
    stamps: u64,
    /// How caches that are made from now on hold keys and values.
    kv_held: KvPrecision,
    /// What rows are in products with whole numbers.
    activations: Activations,
}

/// What a buffer contains: a number that no other contents ever had on this device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp(u64);

/// No contents.
const NOTHING: (Stamp, usize, Activations) = (Stamp(0), 0, Activations::F32);

/// Scratch rows.
pub struct CpuBuf {
    floats: Floats,
    width: usize,
    contents: Stamp,
}

/// A few values, zeros after them up to a whole number of lanes.
pub struct CpuVector {
    floats: Floats,
    len: usize,
}

/// The caller's residual stream.
pub struct CpuStream<'a> {
    hidden: &'a mut [f32],
    width: usize,
}

impl CpuOps {
    /// A CPU of `threads` compute threads, the caller's included, with these instructions.
    pub fn new(threads: usize, isa: Isa) -> Result<Self, BackendError> {
        Self::bound(threads, isa, &Cpus::default())
    }

    /// The same, each thread bound to one of `cpus`.
    pub fn bound(threads: usize, isa: Isa, cpus: &Cpus) -> Result<Self, BackendError> {
        Ok(Self {
            isa,
            pool: Pool::bound(threads, cpus)?,
            tiles: Floats::zeros(0)?,
            tiles_hold: NOTHING,
            stamps: 0,
            kv_held: KvPrecision::F32,
            activations: Activations::F32,
        })
    }

    /// The instructions in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// How many threads compute.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// A number for new contents.
    fn stamp(&mut self) -> Stamp {
        self.stamps += 1;
        Stamp(self.stamps)
    }

    /// Calls `work` with ranges that cover `rows`, on all threads if there is enough to do.
    fn by_rows(
        &mut self,
        (rows, width): (usize, usize),
        work: impl Fn(Isa, std::ops::Range<usize>) + Sync,
    ) -> Result<(), ComputeError> {
        let isa = self.isa;
        let job = |share: Share| work(isa, share.range(rows));
        spread(&mut self.pool, rows * width <= ALONE_VALUES_MAX, &job)
    }
}

/// Runs a job on the caller's thread, or on all.
fn spread(pool: &mut Pool, alone: bool, job: &(dyn Fn(Share) + Sync)) -> Result<(), ComputeError> {
    if alone { pool.run_alone(job) } else { pool.run(job) }
}

impl CpuBuf {
    fn rows_max(&self) -> usize {
        self.floats.len() / self.width
    }
}

impl CpuStream<'_> {
    fn rows(&self) -> usize {
        self.hidden.len() / self.width
    }
}

/// Rows `range` of a buffer that threads share.
///
/// # Safety
///
/// The rows exist, and nobody else uses them meanwhile.
unsafe fn rows_of<'a>(
    to: SharedMut,
    range: &std::ops::Range<usize>,
    width: usize,
) -> &'a mut [f32] {
    // SAFETY: the caller's.
    unsafe {
        std::slice::from_raw_parts_mut(to.get().add(range.start * width), range.len() * width)
    }
}

impl Ops for CpuOps {
    type Weight = Packed;
    type WeightBuilder = PackedBuilder;
    type Vector = CpuVector;
    type Buf = CpuBuf;
    type Kv = PagedKv;
    type Stream<'a> = CpuStream<'a>;

    fn weight_builders(
        &self,
        held: Precision,
        shapes: &[(usize, usize)],
    ) -> Result<Vec<PackedBuilder>, BackendError> {
        PackedBuilder::all(held, shapes)
    }

    fn vector(&self, values: &[f32]) -> Result<CpuVector, BackendError> {
        Ok(CpuVector { floats: Floats::copy_of(values)?, len: values.len() })
    }

    fn buffer(&mut self, rows_max: usize, width: usize) -> Result<CpuBuf, BackendError> {
        let len = rows_max.checked_mul(width).filter(|len| *len > 0).ok_or_else(|| {
            BackendError::BadShape { what: "buffer", why: format!("{rows_max} x {width}") }
        })?;
        // Of narrow rows the rounded ones are longer.
        let tiles = len.max(dots::scratch_len(rows_max, width));
        if tiles > self.tiles.len() {
            self.tiles = Floats::zeros(tiles)?;
            self.tiles_hold = NOTHING;
        }
        Ok(CpuBuf { floats: Floats::zeros(len)?, width, contents: self.stamp() })
    }

    fn hold_kv(&mut self, held: KvPrecision) -> Result<(), BackendError> {
        self.kv_held = held;
        Ok(())
    }

    fn multiply(&mut self, activations: Activations) -> Result<(), BackendError> {
        self.activations = activations;
        Ok(())
    }

    fn kv(&mut self, shape: KvShape) -> Result<PagedKv, BackendError> {
        PagedKv::new(shape, self.kv_held)
    }

    fn host<'a>(
        &mut self,
        buf: &'a mut CpuBuf,
        rows: usize,
    ) -> Result<&'a mut [f32], ComputeError> {
        expect_rows("what ranks exchange", rows, buf.rows_max())?;
        buf.contents = self.stamp();
        Ok(&mut buf.floats.as_mut_slice()[..rows * buf.width])
    }

    fn host_stream<'a>(&mut self, stream: &'a mut CpuStream<'_>) -> &'a mut [f32] {
        stream.hidden
    }

    fn enter<'a>(
        &mut self,
        hidden: &'a mut [f32],
        width: usize,
    ) -> Result<CpuStream<'a>, ComputeError> {
        heads_of("the stream", hidden.len(), width)?;
        Ok(CpuStream { hidden, width })
    }

    fn leave(&mut self, _stream: CpuStream<'_>) -> Result<(), ComputeError> {
        Ok(())
    }

    fn embed(
        &mut self,
        tokens: &[u32],
        table: &Packed,
        out: &mut CpuStream<'_>,
    ) -> Result<(), ComputeError> {
        expect("the stream", out.width, table.cols())?;
        expect_rows("the stream", tokens.len(), out.rows())?;
        for (token, row) in tokens.iter().zip(out.hidden.chunks_exact_mut(out.width)) {
            if *token as usize >= table.outputs() {
                let vocab = table.outputs();
                return Err(bad(format!("token {token} in a vocabulary of {vocab}")));
            }
            table.copy_row(self.isa, *token as usize, row);
        }
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: &CpuStream<'_>,
        rows: RowSet<'_>,
        norm: &Norm<Self>,
        out: &mut CpuBuf,
    ) -> Result<(), ComputeError> {
        let width = norm.weight.len;
        expect("the stream of a norm", x.width, width)?;
        expect("the output of a norm", out.width, width)?;
        expect_rows("the output of a norm", rows.len(), out.rows_max())?;
        for i in 0..rows.len() {
            expect_rows("the stream of a norm", rows.index(i) + 1, x.rows())?;
        }
        out.contents = self.stamp();
        let to = SharedMut(out.floats.as_mut_slice().as_mut_ptr());
        let norm = NormOf::new(norm)?;
        let hidden: &[f32] = x.hidden;
        self.by_rows((rows.len(), width), |isa, range| {
            for i in range {
                let from = &hidden[rows.index(i) * width..][..width];
                // SAFETY: row `i` is in `out`, as checked, and this share's alone.
                unsafe {
                    let to = to.get().add(i * width);
                    isa.run(norm.row(from.as_ptr(), to, 1));
                }
            }
        })
    }

    fn head_norm(
        &mut self,
        x: &mut CpuBuf,
        rows: usize,
        norm: &Norm<Self>,
    ) -> Result<(), ComputeError> {
        let heads = heads_of("the input of a head norm", x.width, norm.weight.len)?;
        expect_rows("the input of a head norm", rows, x.rows_max())?;
        x.contents = self.stamp();
        let width = x.width;
        let to = SharedMut(x.floats.as_mut_slice().as_mut_ptr());
        let norm = NormOf::new(norm)?;
        self.by_rows((rows, width), |isa, range| {
            // SAFETY: the rows are in `x`, as checked, and this share's alone.
            unsafe {
                let to = to.get().add(range.start * width);
                let runs = range.len() * heads;
                isa.run(norm.row(to, to, runs));
            }
        })
    }

    fn linear(
        &mut self,
        x: &CpuBuf,
        rows: usize,
        linear: &Linear<Self>,
        out: &mut CpuBuf,
    ) -> Result<(), ComputeError> {
        expect("the output of a product", out.width, linear.weight.outputs())?;
        out.contents = self.stamp();
        self.product((x, rows), &linear.weight, linear.bias.as_ref(), out.floats.as_mut_slice())
    }

    fn logits(
        &mut self,
        x: &CpuBuf,
        rows: usize,
        weight: &Packed,
        out: &mut [f32],
    ) -> Result<(), ComputeError> {
        self.product((x, rows), weight, None, out)
    }

    fn add(
        &mut self,
        x: &CpuBuf,
        rows: usize,
        out: &mut CpuStream<'_>,
    ) -> Result<(), ComputeError> {
        let width = out.width;
        expect("what is added to the stream", x.width, width)?;
        expect_rows("what is added to the stream", rows, x.rows_max())?;
        expect_rows("the stream", rows, out.rows())?;
        let to = SharedMut(out.hidden.as_mut_ptr());
        let x = x.floats.as_slice();
        self.by_rows((rows, width), |isa, range| {
            // SAFETY: the rows are in the stream, as checked, and this share's alone.
            unsafe {
                let x = &x[range.start * width..range.end * width];
                isa.run(Add { to: rows_of(to, &range, width), x });
            }
        })
    }

    fn gate(
        &mut self,
        gate: &mut CpuBuf,
        up: &CpuBuf,
        rows: usize,
        act: Activation,
    ) -> Result<(), ComputeError> {
        let width = gate.width;
        expect("the gated input", up.width, width)?;
        expect_rows("a gate", rows, gate.rows_max().min(up.rows_max()))?;
        gate.contents = self.stamp();
        let to = SharedMut(gate.floats.as_mut_slice().as_mut_ptr());
        let up = up.floats.as_slice();
        self.by_rows((rows, width), |isa, range| {
            // SAFETY: the rows are in `gate`, as checked, and this share's alone.
            unsafe {
                let up = &up[range.start * width..range.end * width];
                isa.run(Gate { to: rows_of(to, &range, width), up, act });
            }
        })
    }

    fn rope_angles(
        &mut self,
        spans: &[Span<'_>],
        frequencies: &CpuVector,
        factor: f32,
        out: &mut CpuBuf,
    ) -> Result<(), ComputeError> {
        expect("the buffer of angles", out.width, 2 * frequencies.len)?;
        out.contents = self.stamp();
        let frequencies = &frequencies.floats.as_slice()[..frequencies.len];
        for span in spans {
            expect_rows("the buffer of angles", span.first_row + span.rows, out.rows_max())?;
            let rows = &mut out.floats.as_mut_slice()[span.first_row * out.width..];
            let rows = rows.chunks_exact_mut(out.width).take(span.rows);
            for (position, row) in (span.first_position..).zip(rows) {
                angles_of(position, frequencies, factor, row);
            }
        }
        Ok(())
    }

    fn rope(
        &mut self,
        x: &mut CpuBuf,
        rows: usize,
        angles: &CpuBuf,
        turn: Turn,
    ) -> Result<(), ComputeError> {
        let (width, head) = (x.width, angles.width);
        heads_of("what is rotated", width, turn.head_dim)?;
        expect_rows("the rotated part of a head", turn.first + head, turn.head_dim)?;
        expect_rows("what is rotated", rows, x.rows_max().min(angles.rows_max()))?;
        x.contents = self.stamp();
        let to = SharedMut(x.floats.as_mut_slice().as_mut_ptr());
        let angles = angles.floats.as_slice();
        self.by_rows((rows, width), |isa, range| {
            for row in range {
                // SAFETY: the row is in `x`, as checked, and this share's alone.
                unsafe {
                    let angles = &angles[row * head..][..head];
                    let row = rows_of(to, &(row..row + 1), width);
                    isa.run(RotateRow { row, angles, turn });
                }
            }
        })
    }

    fn kv_write(
        &mut self,
        spans: &[Span<'_>],
        keys: &CpuBuf,
        values: &CpuBuf,
        kv: &mut PagedKv,
    ) -> Result<(), ComputeError> {
        let width = kv.shape().kv_heads as usize * kv.shape().head_dim as usize;
        expect("keys", keys.width, width)?;
        expect("values", values.width, width)?;
        let rows = spans.iter().map(|span| span.first_row + span.rows).max().unwrap_or(0);
        expect_rows("keys and values", rows, keys.rows_max().min(values.rows_max()))?;
        kv.check(spans)?;
        kv.write(spans, keys.floats.as_slice(), values.floats.as_slice());
        Ok(())
    }

    fn attend(
        &mut self,
        spans: &[Span<'_>],
        query: &CpuBuf,
        kv: &PagedKv,
        how: &Attend<'_, Self>,
        out: &mut CpuBuf,
    ) -> Result<(), ComputeError> {
        let shape = kv.shape();
        let heads = heads_of("the query", query.width, shape.head_dim as usize)?;
        heads_of("the number of query heads", heads, shape.kv_heads as usize)?;
        expect("the output of attention", out.width, query.width)?;
        let rows = spans.iter().map(|span| span.first_row + span.rows).max().unwrap_or(0);
        expect_rows("attention", rows, query.rows_max().min(out.rows_max()))?;
        kv.check(spans)?;
        out.contents = self.stamp();
        let with = (self.isa, &mut self.pool);
        let query = (query.floats.as_slice(), heads);
        let sinks = how.sinks.map(|sinks| &sinks.floats.as_slice()[..sinks.len]);
        expect("the sinks of attention", sinks.map_or(heads, <[f32]>::len), heads)?;
        let Attend { scale, softcap, window, ahead, .. } = *how;
        let how = attention::How { scale, softcap, window, ahead, sinks };
        attention::attend(with, spans, query, (kv, how), out.floats.as_mut_slice())
    }
}
