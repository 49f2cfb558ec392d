//! What a product with a matrix costs, in every format, for one row and for many.

use std::time::Instant;

use anyhow::Result;
use half::bf16;
use shoal_protocol::plan::{Activations, Precision};
use shoal_shard_worker::backend::cpu::{CpuOps, Isa};
use shoal_shard_worker::backend::{Linear, Ops, WeightBuilder};

use crate::measure::Series;
use crate::measure::machine::read_bandwidth;
use crate::measure::report::Section;
use crate::measure::stats::significant;

const COLS: usize = 2048;
/// So many that no format's matrix fits a cache.
const OUTPUTS: usize = 49_152;
/// Rows of the same matrix that are packed at once.
const PIECE: usize = 1024;
/// Rows that are multiplied at once: one stream, several, and prompts.
const ROWS: [usize; 5] = [1, 4, 8, 16, 64];

/// Runs it.
pub fn run(pairs: usize) -> Result<Section> {
    let mut section = Section::new(
        "Products",
        format!(
            "A matrix of {OUTPUTS} x {COLS} by some rows, one thread, {}: nanoseconds for each million weights and \
             row; of one row, what is read of the matrix in a second, as a share of what a thread reads.",
            Isa::best()
        ),
    );
    let kinds = [
        (Precision::F32, Activations::F32),
        (Precision::Bf16, Activations::F32),
        (Precision::Q8_0, Activations::F32),
        (Precision::Q8_0, Activations::Int8),
        (Precision::Q4_0, Activations::F32),
        (Precision::Q4_0, Activations::Int8),
        (Precision::Q4K, Activations::F32),
        (Precision::Q4K, Activations::Int8),
        (Precision::Q5K, Activations::Int8),
        (Precision::Q6K, Activations::F32),
        (Precision::Q6K, Activations::Int8),
    ];
    for (held, activations) in kinds {
        let mut ops = CpuOps::new(1, Isa::best())?;
        ops.multiply(activations)?;
        let builder = ops.weight_builders(held, &[(OUTPUTS, COLS)])?.remove(0);
        let bytes = rows_of(held);
        for first in (0..OUTPUTS).step_by(PIECE) {
            builder.pack_rows(first, held, &bytes)?;
        }
        let linear = Linear { weight: builder.finish()?, bias: None };
        for rows in ROWS {
            let mut x = ops.buffer(rows, COLS)?;
            let mut out = ops.buffer(rows, OUTPUTS)?;
            let read = read_bandwidth(1);
            let mut seconds = Series::default();
            for _ in 0..pairs {
                // New rows each time, as in a step.
                let mut value = 1.0_f32;
                for x in ops.host(&mut x, rows)? {
                    value = (value * 16_807.0) % 2_147_483.0;
                    *x = value / 1_073_741.0 - 1.0;
                }
                let start = Instant::now();
                ops.linear(&x, rows, &linear, &mut out)?;
                seconds.push(start.elapsed().as_secs_f64());
            }
            let weights = (OUTPUTS * COLS) as f64;
            let each = seconds.map(|s| s * 1e9 / (weights / 1e6) / rows as f64);
            let what = format!("{held}, activations {activations}, {rows} rows");
            let seen = match rows {
                1 => {
                    let bytes = OUTPUTS as f64 * held.row_bytes(COLS as u64) as f64;
                    let share = bytes / seconds.median() / read;
                    format!("{each} ns ({} of {:.1} GB/s)", significant(share), read / 1e9)
                }
                _ => format!("{each} ns"),
            };
            section.seen(what, seen);
        }
    }
    Ok(section)
}

/// Some rows as files store them: whole blocks of bytes that are in no order, but scales, which are the numbers of two
/// bytes at a block's beginning or end. Rounding so many weights would take minutes.
fn rows_of(held: Precision) -> Vec<u8> {
    let (weights, bytes) = match held {
        Precision::F32 => (1, 4),
        Precision::Bf16 | Precision::F16 => (1, 2),
        Precision::Q8_0 => (32, 34),
        Precision::Q4_0 => (32, 18),
        Precision::Q4K => (256, 144),
        Precision::Q5K => (256, 176),
        Precision::Q6K => (256, 210),
        Precision::Fp8 => (128, 132),
        Precision::Mxfp4 => (32, 17),
    };
    let mut bits = 0x9E37_79B9_7F4A_7C15_u64;
    let mut block = || {
        let mut block: Vec<u8> = (0..bytes)
            .map(|_| {
                bits ^= bits << 13;
                bits ^= bits >> 7;
                bits ^= bits << 17;
                (bits >> 40) as u8
            })
            .collect();
        // Small numbers of either format.
        let scale = [0x00, 0x1C];
        match held {
            Precision::F32 => block.copy_from_slice(&0.7_f32.to_le_bytes()),
            Precision::Q6K => block[bytes - 2..].copy_from_slice(&scale),
            Precision::Q4K | Precision::Q5K => {
                block[..2].copy_from_slice(&scale);
                block[2..4].copy_from_slice(&scale);
            }
            Precision::Bf16 => block.copy_from_slice(&bf16::from_f32(0.7).to_le_bytes()),
            _ => block[..2].copy_from_slice(&scale),
        }
        block
    };
    (0..PIECE * COLS / weights).flat_map(|_| block()).collect()
}
