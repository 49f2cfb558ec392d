//! Products, which keep what they have laid out of their rows: queries, keys and values are products of the same ones.

use shoal_protocol::plan::Activations;

use super::check::{expect, expect_rows};
use super::linear::{self, Tiles};
use super::packed::Packed;
use super::{CpuBuf, CpuOps, CpuVector, NOTHING};
use crate::model::ComputeError;

impl CpuOps {
    /// `out[r] = weight · x[r] + bias` with sizes checked.
    pub(super) fn product(
        &mut self,
        (x, rows): (&CpuBuf, usize),
        weight: &Packed,
        bias: Option<&CpuVector>,
        out: &mut [f32],
    ) -> Result<(), ComputeError> {
        expect("the input of a product", x.width, weight.cols())?;
        expect_rows("the input of a product", rows, x.rows_max())?;
        expect_rows("the output of a product", rows * weight.outputs(), out.len())?;
        if let Some(bias) = bias {
            expect("a bias", bias.len, weight.outputs())?;
        }
        if rows == 0 {
            return Ok(());
        }
        let activations = match weight.held().has_numbers() {
            true => self.activations,
            false => Activations::F32,
        };
        let holds = (x.contents, rows, activations);
        let fresh = self.tiles_hold != holds;
        if fresh {
            // Nothing, should this fail half-way.
            self.tiles_hold = NOTHING;
        }
        let with = (self.isa, &mut self.pool);
        let scratch = (self.tiles.as_mut_slice(), fresh);
        let (x, shape) = (x.floats.as_slice(), (rows, x.width));
        let tiles = match activations {
            Activations::F32 => Tiles::of(with, x, shape, scratch)?,
            Activations::Int8 => Tiles::rounded(with, x, shape, scratch)?,
        };
        if rows > 1 || activations == Activations::Int8 {
            self.tiles_hold = holds;
        }
        let with = (self.isa, &mut self.pool);
        linear::product(with, &tiles, weight, bias.map(|b| b.floats.as_slice()), out)
    }
}
