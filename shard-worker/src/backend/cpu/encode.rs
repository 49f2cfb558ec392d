//! [`EncodeOps`] on the CPU.
//!
//! Contract n1: GELU is `x / 2 * erfc(-x / sqrt 2)` with the complementary error function of `math`; what is
//! pooled is summed in order of position in f64. A row's bits depend on no other sequence, on no number of
//! threads and on no instruction set.

use super::family::NormOf;
use super::linear::SharedMut;
use super::packed::Packed;
use super::{CpuBuf, CpuOps, CpuStream, NOTHING, bad, expect, expect_rows, rows_of};
use crate::backend::{EncodeOps, Norm, Pool};
use crate::model::{ComputeError, Span};

impl EncodeOps for CpuOps {
    fn add_rows(
        &mut self,
        rows: &[u32],
        table: &Packed,
        out: &mut CpuStream<'_>,
    ) -> Result<(), ComputeError> {
        expect("the stream", out.width, table.cols())?;
        expect_rows("the stream", rows.len(), out.rows())?;
        expect_rows("the device's scratch", out.width, self.tiles.len())?;
        // Its contents are gone.
        self.tiles_hold = NOTHING;
        let values = &mut self.tiles.as_mut_slice()[..out.width];
        for (row, to) in rows.iter().zip(out.hidden.chunks_exact_mut(out.width)) {
            if *row as usize >= table.outputs() {
                return Err(bad(format!("row {row} of a table of {}", table.outputs())));
            }
            table.copy_row(self.isa, *row as usize, values);
            to.iter_mut().zip(&*values).for_each(|(to, value)| *to += value);
        }
        Ok(())
    }

    fn norm_stream(
        &mut self,
        x: &mut CpuStream<'_>,
        rows: usize,
        norm: &Norm<Self>,
    ) -> Result<(), ComputeError> {
        expect("the stream of a norm", x.width, norm.weight.len)?;
        expect_rows("the stream of a norm", rows, x.rows())?;
        let norm = NormOf::new(norm)?;
        let width = x.width;
        let to = SharedMut(x.hidden.as_mut_ptr());
        self.by_rows((rows, width), |isa, range| {
            // SAFETY: the rows are in the stream, as checked, and this share's alone.
            unsafe {
                let rows = rows_of(to, &range, width).as_mut_ptr();
                isa.run(norm.row(rows, rows, range.len()));
            }
        })
    }

    fn tanh(&mut self, x: &mut CpuBuf, rows: usize) -> Result<(), ComputeError> {
        expect_rows("an activation", rows, x.rows_max())?;
        x.contents = self.stamp();
        // A row for each input: too few to be worth a kernel.
        let values = &mut x.floats.as_mut_slice()[..rows * x.width];
        values.iter_mut().for_each(|value| *value = libm::tanh(f64::from(*value)) as f32);
        Ok(())
    }

    fn pool(
        &mut self,
        x: &CpuStream<'_>,
        spans: &[Span<'_>],
        pool: Pool,
        out: &mut CpuBuf,
    ) -> Result<(), ComputeError> {
        let width = x.width;
        expect("what is pooled", out.width, width)?;
        expect_rows("what is pooled", spans.len(), out.rows_max())?;
        out.contents = self.stamp();
        let to = out.floats.as_mut_slice().chunks_exact_mut(width);
        for (span, to) in spans.iter().zip(to) {
            expect_rows("the stream", span.first_row + span.rows, x.rows())?;
            let rows = &x.hidden[span.first_row * width..][..span.rows * width];
            match pool {
                Pool::First => to.copy_from_slice(&rows[..width]),
                Pool::Last => to.copy_from_slice(&rows[(span.rows - 1) * width..]),
                Pool::Mean => {
                    for (column, to) in to.iter_mut().enumerate() {
                        let values = rows[column..].iter().step_by(width);
                        let sum: f64 = values.map(|value| f64::from(*value)).sum();
                        *to = (sum / span.rows as f64) as f32;
                    }
                }
            }
        }
        Ok(())
    }
}
