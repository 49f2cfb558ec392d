//! Many seeds on all cores, and what came of them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Bug, COUNTS, Report, run};

/// What many seeds came to.
#[derive(Debug, Default)]
pub struct Catch {
    /// Seeds that were run.
    pub seeds: u64,
    /// The failure with the lowest seed of those that were found.
    pub first: Option<Report>,
    /// How many failed.
    pub failed: u64,
    /// Time that passed in them.
    pub simulated: Duration,
    /// Time that passed here.
    pub took: Duration,
    /// As in `Report`.
    pub counts: [u64; COUNTS],
    /// The longest of them.
    pub longest: (Duration, u64),
}

/// Runs `seeds` from `from` on; ends early after `enough` failures.
pub fn hunt(from: u64, seeds: u64, bug: Option<Bug>, enough: u64) -> Catch {
    let begun = Instant::now();
    let next = AtomicU64::new(from);
    let caught = Mutex::new(Catch::default());
    let failed = AtomicU64::new(0);
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while failed.load(Ordering::Relaxed) < enough {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + seeds {
                        return;
                    }
                    let report = run(seed, bug);
                    if report.violation.is_some() {
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                    if let Ok(mut caught) = caught.lock() {
                        caught.add(report);
                    }
                }
            });
        }
    });
    let mut caught = caught.into_inner().unwrap_or_default();
    caught.took = begun.elapsed();
    caught
}

impl Catch {
    fn add(&mut self, report: Report) {
        self.seeds += 1;
        self.simulated += report.simulated;
        self.longest = self.longest.max((report.simulated, report.seed));
        for (sum, count) in self.counts.iter_mut().zip(report.counts) {
            *sum += count;
        }
        if report.violation.is_some() {
            self.failed += 1;
            if self.first.as_ref().is_none_or(|first| report.seed < first.seed) {
                self.first = Some(report);
            }
        }
    }
}

/// The line that runs a seed again.
pub fn replay(seed: u64, bug: Option<Bug>) -> String {
    let planted = bug.map_or(String::new(), |bug| format!(" --bug {}", bug.label()));
    format!("cargo run -p shoal-tests --bin shoal-sim -- --seed {seed}{planted}")
}
