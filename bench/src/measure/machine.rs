//! What the machine is and what it can do at the moment of the measurement.

use std::hint::black_box;
use std::time::Instant;

use super::Series;

/// Bytes that each thread reads: far over any cache.
const READ_BYTES: usize = 256 << 20;

/// The machine's facts at one moment.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The processor's name.
    pub processor: String,
    /// Processors.
    pub cores: usize,
    /// The one-minute load average before the run.
    pub load: f64,
    /// Bytes per second that one thread reads from memory.
    pub read_1: f64,
    /// Bytes per second that two threads read from memory together.
    pub read_2: f64,
}

impl Machine {
    /// Looks and measures; takes about a second.
    pub fn measure() -> Self {
        let load = read_file("/proc/loadavg");
        let load = load.split_whitespace().next().and_then(|v| v.parse().ok()).unwrap_or(f64::NAN);
        let cpuinfo = read_file("/proc/cpuinfo");
        let processor = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name").and_then(|rest| rest.split_once(": ")))
            .map_or("unknown", |(_, name)| name.trim())
            .to_owned();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { processor, cores, load, read_1: read_bandwidth(1), read_2: read_bandwidth(2) }
    }

    /// One line for the report.
    pub fn line(&self) -> String {
        format!(
            "{} cores of {}, load {:.2}; memory read {:.1} GB/s with 1 thread, {:.1} GB/s with 2",
            self.cores,
            self.processor,
            self.load,
            self.read_1 / 1e9,
            self.read_2 / 1e9
        )
    }
}

fn read_file(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Bytes per second that `threads` threads read together: the median of five rounds, as what is held against it is a
/// median.
pub fn read_bandwidth(threads: usize) -> f64 {
    let buffers: Vec<Vec<u64>> = (0..threads).map(|t| vec![t as u64 + 1; READ_BYTES / 8]).collect();
    let mut rounds = Series::default();
    for _ in 0..5 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for buffer in &buffers {
                scope.spawn(move || {
                    // Sixteen sums at once keep the loop bound by memory, not by the adder.
                    let mut sums = [0u64; 16];
                    for chunk in black_box(buffer).chunks_exact(16) {
                        for (sum, value) in sums.iter_mut().zip(chunk) {
                            *sum = sum.wrapping_add(*value);
                        }
                    }
                    black_box(sums)
                });
            }
        });
        rounds.push((threads * READ_BYTES) as f64 / start.elapsed().as_secs_f64());
    }
    rounds.median()
}
