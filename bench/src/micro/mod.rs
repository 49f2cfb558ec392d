//! Micro benches of single parts, in this process.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::measure::{Report, Series};

pub mod election;
mod engine;
pub mod families;
mod frames;
mod hop;
pub mod planner;
pub mod products;
pub mod quality;
pub mod route;
mod whole;

/// All of them, in order.
pub fn run(report: &mut Report) -> Result<()> {
    report.sections.push(frames::run());
    report.sections.push(hop::run()?);
    report.sections.push(engine::run()?);
    report.sections.push(planner::run()?);
    Ok(())
}

/// Nanoseconds that one call of `f` takes: figures of several rounds of about 20 ms each.
fn nanoseconds<T>(mut f: impl FnMut() -> T) -> Series {
    const ROUND: Duration = Duration::from_millis(20);
    let start = Instant::now();
    let mut calls = 0u64;
    while start.elapsed() < ROUND {
        black_box(f());
        calls += 1;
    }
    let calls = calls.max(1);
    (0..9)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..calls {
                black_box(f());
            }
            start.elapsed().as_nanos() as f64 / calls as f64
        })
        .collect()
}
