//! How fast the CPU kernels are here, beside the bandwidth and the peak of the moment.
//!
//! `cargo run --release -p shoal-shard-worker --example kernel_speed -- [threads] [instruction set]`

use std::time::Instant;

use shoal_protocol::plan::Precision;
use shoal_shard_worker::backend::cpu::{CpuOps, Isa};
use shoal_shard_worker::backend::{Attend, KvShape, Linear, Ops, WeightBuilder};
use shoal_shard_worker::model::Span;

/// A matrix larger than the caches: 128 MiB as f32.
const OUTPUTS: usize = 8192;
const COLS: usize = 4096;

/// Each figure is the best of the runs of so many seconds: what disturbs a run only makes it slower.
const SECONDS: f64 = 0.3;

/// A run with many rows takes only so many outputs, so that it is too short to be disturbed often.
const MANY_ROWS_OUTPUTS: usize = 512;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(Ok(1), |word| word.parse())?;
    let isa = match arguments.next() {
        Some(word) => Isa::of(word.parse()?)?,
        None => Isa::best(),
    };
    let mut ops = CpuOps::new(threads, isa)?;
    println!("{isa}, {threads} threads; memory {:.1} GB/s with 1 thread", bandwidth());
    for held in Precision::ALL {
        products(&mut ops, held)?;
    }
    attention(&mut ops)
}

/// Seconds of the best run.
fn best(mut run: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let mut best = f64::INFINITY;
    let begin = Instant::now();
    while begin.elapsed().as_secs_f64() < SECONDS {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Gigabytes a second that one thread reads.
fn bandwidth() -> f64 {
    let data = vec![1_u64; 32 << 20];
    let read = || {
        std::hint::black_box(data.iter().fold(0_u64, |sum, v| sum.wrapping_add(*v)));
        Ok(())
    };
    best(read).map_or(0.0, |seconds| size_of_val(&*data) as f64 / seconds / 1e9)
}

fn matrix(ops: &CpuOps, held: Precision, outputs: usize) -> anyhow::Result<Linear<CpuOps>> {
    let rows: Vec<u8> = (0..64 * COLS)
        .flat_map(|k| half::bf16::from_f32((k % 13) as f32 - 6.0).to_le_bytes())
        .collect();
    let builder = ops.weight_builders(held, &[(outputs, COLS)])?.remove(0);
    for first in (0..outputs).step_by(64) {
        builder.pack_rows(first, Precision::Bf16, &rows)?;
    }
    Ok(Linear { weight: builder.finish()?, bias: None })
}

fn products(ops: &mut CpuOps, held: Precision) -> anyhow::Result<()> {
    let seconds = best(|| matrix(ops, held, MANY_ROWS_OUTPUTS).map(|_| ()))?;
    let packed = (2 * MANY_ROWS_OUTPUTS * COLS) as f64 / seconds / 1e9;
    println!("{held}: packed from bf16 at {packed:.2} GB/s");
    let (all, some) = (matrix(ops, held, OUTPUTS)?, matrix(ops, held, MANY_ROWS_OUTPUTS)?);
    for rows in [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 64] {
        let linear = if rows <= 4 { &all } else { &some };
        let outputs = linear.weight.outputs();
        let x = ops.buffer(rows, COLS)?;
        let mut out = ops.buffer(rows, outputs)?;
        let seconds = best(|| Ok(ops.linear(&x, rows, linear, &mut out)?))?;
        let weights = (outputs * COLS) as f64;
        println!(
            "  {rows:3} rows: {:7.2} ms {:6.1} GB/s {:6.1} GFLOP/s",
            1e3 * seconds,
            held.row_bytes((outputs * COLS) as u64) as f64 / seconds / 1e9,
            2.0 * rows as f64 * weights / seconds / 1e9
        );
    }
    Ok(())
}

/// 8 query and 2 key heads of 64.
fn attention(ops: &mut CpuOps) -> anyhow::Result<()> {
    const CONTEXT: usize = 2048;
    let (heads, kv_heads, dim) = (8, 2, 64);
    let blocks: Vec<u32> = (0..CONTEXT as u32 / 16).collect();
    let shape = KvShape { blocks: blocks.len() as u32, kv_heads, head_dim: dim as u32 };
    let mut kv = ops.kv(shape)?;
    for rows in [64, 8, 1] {
        let query = ops.buffer(rows, heads * dim)?;
        let key = ops.buffer(rows, kv_heads as usize * dim)?;
        let mut out = ops.buffer(rows, heads * dim)?;
        let first_position = (CONTEXT - rows) as u32;
        let spans = [Span { first_row: 0, rows, first_position, blocks: &blocks, adapter: None }];
        let write = best(|| Ok(ops.kv_write(&spans, &key, &key, &mut kv)?))?;
        let seconds =
            best(|| Ok(ops.attend(&spans, &query, &kv, &Attend::plain(0.125), &mut out)?))?;
        let pairs = rows as f64 * (CONTEXT as f64 - (rows as f64 - 1.0) / 2.0);
        println!(
            "attention, last {rows:4} rows of {CONTEXT}: {:8.3} ms {:6.1} GFLOP/s, KV written in {:.3} ms",
            1e3 * seconds,
            4.0 * pairs * (heads * dim) as f64 / seconds / 1e9,
            1e3 * write
        );
    }
    Ok(())
}
