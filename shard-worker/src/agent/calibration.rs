//! ● What this worker's kernels read of weights in a second: the planner's measure of a worker.
//!
//! ```text
//! pack matrices (30 ms at most) ─► products of one row with all of them (50 ms at most) ─► fastest round
//!                                                       x the share of its processors that a group gets
//! ```
//!
//! The kernels are the real ones, with the worker's threads; the matrices are larger than caches where
//! there is time to make them so, since decoding reads each weight once a token. The fastest round counts:
//! whatever else runs for a moment says nothing about the worker. What always holds it back, a quota of its
//! control group, is read and counted.

use std::num::NonZeroUsize;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use shoal_protocol::mesh::Fact;
use shoal_protocol::plan::Precision;
use shoal_protocol::units::Bytes;

use super::inventory::CPU;
use crate::backend::cpu::{CpuOps, Isa};
use crate::backend::{Linear, Ops, WeightBuilder};

/// How long a calibration may take in all: as much as nobody notices at the start of a process.
const CALIBRATION_MAX: Duration = Duration::from_millis(80);

/// Of that, how long to make matrices.
const PACKING_MAX: Duration = Duration::from_millis(30);

/// A matrix of 512 x 1024 in bf16 is 1 MiB: one round looks at the clock often enough.
const SHAPE: (usize, usize) = (512, 1024);

/// The most matrices: 64 MiB are more than most last-level caches hold.
const MATRICES_MAX: usize = 64;

/// Of a worker's memory, one part of so many may be taken for the matrices, for as long as it takes.
const MEMORY_SHARE: u64 = 8;

/// The rate of the CPU with so many threads; nothing where it cannot be measured.
pub(crate) fn rate(threads: NonZeroUsize, memory: Bytes) -> Option<Fact> {
    let measured = stream(threads.get(), memory)?;
    let share = share_of(&|path| std::fs::read_to_string(path).ok(), threads.get());
    let bytes_per_s = (measured * share) as u64;
    (bytes_per_s > 0).then(|| Fact::Rate {
        device: CPU.to_owned(),
        threads: threads.get() as u32,
        bytes_per_s,
    })
}

/// Bytes of weights in a second, in the fastest round over all matrices.
fn stream(threads: usize, memory: Bytes) -> Option<f64> {
    let start = Instant::now();
    let (outputs, cols) = SHAPE;
    let each = outputs as u64 * Precision::Bf16.row_bytes(cols as u64);
    let most = (memory.0 / MEMORY_SHARE / each).clamp(1, MATRICES_MAX as u64) as usize;
    let mut ops = CpuOps::new(threads, Isa::from_environment().ok()?).ok()?;
    let zeros = vec![0; each as usize];
    let mut matrices = Vec::new();
    while matrices.len() < most && (matrices.is_empty() || start.elapsed() < PACKING_MAX) {
        let builder = ops.weight_builders(Precision::Bf16, &[SHAPE]).ok()?.pop()?;
        builder.pack_rows(0, Precision::Bf16, &zeros).ok()?;
        matrices.push(Linear { weight: builder.finish().ok()?, bias: None });
    }
    let input = ops.buffer(1, cols).ok()?;
    let mut output = ops.buffer(1, outputs).ok()?;
    let mut fastest = Duration::MAX;
    // The first round brings the pages in; one more is measured even where time is up.
    for round in 0.. {
        let begun = Instant::now();
        for matrix in &matrices {
            ops.linear(&input, 1, matrix, &mut output).ok()?;
        }
        if round > 0 {
            fastest = fastest.min(begun.elapsed());
        }
        if round > 0 && start.elapsed() >= CALIBRATION_MAX {
            break;
        }
    }
    Some((matrices.len() as u64 * each) as f64 / fastest.as_secs_f64().max(1e-9))
}

/// Reads a file; nothing where there is none.
type Read<'a> = &'a dyn Fn(&Path) -> Option<String>;

/// Which part of so many threads' time the control group lets this process have (version 2: `cpu.max`).
fn share_of(read: Read<'_>, threads: usize) -> f64 {
    const MOUNT: &str = "/sys/fs/cgroup";
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    let mut folder = PathBuf::from(MOUNT);
    for part in Path::new(own).components() {
        match part {
            Component::Normal(name) => folder.push(name),
            Component::ParentDir => return 1.0,
            _ => {}
        }
    }
    let above = folder.ancestors().take_while(|folder| folder.starts_with(MOUNT));
    let quotas = above.filter_map(|folder| {
        let text = read(&folder.join("cpu.max"))?;
        let (quota, period) = text.trim().split_once(' ')?;
        Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok().filter(|p| *p > 0.0)?)
    });
    quotas.map(|processors| processors / threads as f64).fold(1.0, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_measures_itself_in_a_moment() {
        let start = Instant::now();
        let fact = rate(NonZeroUsize::MIN, Bytes::mib(64)).unwrap();
        let Fact::Rate { threads: 1, bytes_per_s, .. } = fact else { panic!("{fact:?}") };
        assert!(bytes_per_s > 1 << 20, "{bytes_per_s}");
        // Without optimisation a round alone takes longer than the calibration should.
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    }

    #[test]
    fn the_tightest_quota_counts() {
        let share = |files: &[(&str, &str)], threads| {
            let read = |path: &Path| {
                let found = files.iter().find(|(name, _)| Path::new(name) == path);
                found.map(|(_, text)| (*text).to_owned())
            };
            share_of(&read, threads)
        };
        let own = ("/proc/self/cgroup", "0::/a.slice/b\n");
        let half = ("/sys/fs/cgroup/a.slice/b/cpu.max", "50000 100000\n");
        let two = ("/sys/fs/cgroup/a.slice/cpu.max", "200000 100000\n");
        assert_eq!(share(&[], 4), 1.0);
        assert_eq!(share(&[own, ("/sys/fs/cgroup/a.slice/b/cpu.max", "max 100000\n")], 4), 1.0);
        assert_eq!(share(&[own, half, two], 1), 0.5);
        assert_eq!(share(&[own, two], 4), 0.5);
        assert_eq!(share(&[own, two], 1), 1.0);
        assert_eq!(share(&[("/proc/self/cgroup", "0::/../x\n"), half], 1), 1.0);
    }
}
