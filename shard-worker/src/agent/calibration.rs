//! ● What this worker's kernels read of weights in a second: the planner's measure of a worker.
//!
//! ```text
//! whoever else measures here is done ─► matrices of zeros (50 ms at most) ─► products of one row with all of them
//! (50 ms at most) ─► undisturbed round x the share of its processors that a group gets
//!                                      ─► the same with all processors, once in a while for all workers of a
//!                                         machine: what they share
//! ```
//!
//! The kernels are the real ones, with the worker's threads; the matrices are taken out of the caches before each
//! round, since decoding reads each weight once a token, and a cache of 32 MiB keeps a fifth of 64 MiB that are read
//! again and again. Memory enough to do without that takes too long to be had: a new page costs a virtual machine
//! as much as reading it thirty times. The median of the undisturbed rounds counts, those that took little longer than
//! the fastest: whatever else runs for a moment says nothing about the worker, and a stroke of luck (two processors'
//! fastest millisecond is a tenth better than their second) as little. What always holds it back, a quota of its
//! control group, is read and counted.

use std::fs::{File, TryLockError};
use std::io::{Read as _, Seek, SeekFrom, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use shoal_protocol::mesh::{Fact, MACHINE};
use shoal_protocol::plan::Precision;
use shoal_protocol::units::Bytes;

use super::inventory::CPU;
use crate::backend::cpu::{CpuOps, Isa};
use crate::backend::cpus::Cpus;
use crate::backend::{Linear, Ops};

/// How long a calibration may take in all: as much as nobody notices at the start of a process.
const CALIBRATION_MAX: Duration = Duration::from_millis(100);

/// Of that, how long to make matrices.
const MAKING_MAX: Duration = Duration::from_millis(50);

/// A matrix of 512 x 1024 in bf16 is 1 MiB: one round looks at the clock often enough.
const SHAPE: (usize, usize) = (512, 1024);

/// The most matrices: 64 MiB are more than most last-level caches hold, where those cannot be emptied.
const MATRICES_MAX: usize = 64;

/// So many are made at once.
const AT_ONCE: usize = 16;

/// Of a worker's memory, one part of so many may be taken for the matrices, for as long as it takes.
const MEMORY_SHARE: u64 = 8;

/// A round that took so many times as long as the fastest was disturbed: who loses a processor for a moment takes
/// twice as long and more, what memory gives differs by less.
const DISTURBED: f64 = 1.25;

/// How long workers of one machine wait for each other's measurements: those of twenty.
const TURN_PATIENCE: Duration = Duration::from_secs(3);

/// Three numbers of at most twenty digits.
const KNOWN_LEN_MAX: u64 = 64;

/// How often it is looked whether it is one's turn.
const TURN_LOOK: Duration = Duration::from_millis(5);

/// Whoever has this file locked is measuring. In it is what the last one found of all processors.
const TURN_FILE: &str = "shoal-calibration.lock";

/// Workers that start within so long of each other believe one measurement of all processors: it holds up
/// whoever computes on any of them, so that a rolling restart should not repeat it.
const MACHINE_FOR: Duration = Duration::from_secs(600);

/// The rate of the CPU with so many threads, and of all processors of the machine where these are more; nothing
/// where it cannot be measured.
pub(crate) fn rates(threads: NonZeroUsize, cpus: &Cpus, memory: Bytes) -> Vec<Fact> {
    // Held until both are measured; without it workers that start together would measure each other.
    let turn = turn();
    let share = share_of(&|path| std::fs::read_to_string(path).ok(), threads.get());
    let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let fact = |device: &str, threads: usize, bytes_per_s: Option<u64>| {
        let bytes_per_s = bytes_per_s.filter(|rate| *rate > 0)?;
        Some(Fact::Rate { device: device.to_owned(), threads: threads as u32, bytes_per_s })
    };
    let own = stream((threads.get(), cpus), memory).map(|rate| (rate * share) as u64);
    let machine = (processors > threads.get() && share >= 1.0).then(|| {
        // Each on one of its own: two threads on one processor for a moment would read what one reads. Where a quota
        // leaves fewer than there are, which ones is the system's to say.
        let all = Some(Cpus::all()).filter(|all| all.count() == processors).unwrap_or_default();
        let measure = || stream((processors, &all), memory).map(|rate| rate as u64);
        of_machine(turn.as_ref(), processors, measure)
    });
    [fact(CPU, threads.get(), own), fact(MACHINE, processors, machine.flatten())]
        .into_iter()
        .flatten()
        .collect()
}

/// What all processors read: measured, or what another worker has found a moment ago and left in the file.
fn of_machine(
    file: Option<&File>,
    processors: usize,
    measure: impl FnOnce() -> Option<u64>,
) -> Option<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    let known = file.and_then(|file| {
        let (mut file, mut text) = (file, String::new());
        file.seek(SeekFrom::Start(0)).ok()?;
        file.take(KNOWN_LEN_MAX).read_to_string(&mut text).ok()?;
        let numbers: Vec<u64> =
            text.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
        let &[at, of, bytes_per_s] = &numbers[..] else { return None };
        let age = now.checked_sub(Duration::from_secs(at))?;
        (age < MACHINE_FOR && of == processors as u64).then_some(bytes_per_s)
    });
    if known.is_some() {
        return known;
    }
    let measured = measure()?;
    if let Some(mut file) = file {
        // Where it cannot be written, the next one measures again.
        let text = format!("{} {processors} {measured}\n", now.as_secs());
        let emptied = file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0)));
        let _ = emptied.and_then(|_| file.write_all(text.as_bytes()));
    }
    Some(measured)
}

/// Waits for whoever measures on this machine; for as long as this is there, others wait. Nothing where that
/// cannot be: then it is measured beside them.
#[allow(
    clippy::disallowed_methods,
    reason = "the system waits for a lock, but not until a deadline"
)]
fn turn() -> Option<File> {
    let path = std::env::temp_dir().join(TURN_FILE);
    // Anybody may put something there: no link is followed, and nothing of somebody else's is written to.
    let mut open = File::options();
    open.create(true).read(true).append(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = open.open(path).ok().filter(is_ours)?;
    let until = Instant::now() + TURN_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Some(file),
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                std::thread::sleep(TURN_LOOK);
            }
            Err(_) => return None,
        }
    }
}

/// Whether it is a file of this process's user under one name.
fn is_ours(file: &File) -> bool {
    let own = std::fs::metadata("/proc/self").map(|process| process.uid()).ok();
    file.metadata().is_ok_and(|at| at.is_file() && Some(at.uid()) == own && at.nlink() == 1)
}

/// Bytes of weights in a second, in an undisturbed round over all matrices. Measured on a thread of its own, since
/// whoever computes with a pool is bound as the pool is, and stays so.
fn stream(on: (usize, &Cpus), memory: Bytes) -> Option<f64> {
    std::thread::scope(|scope| scope.spawn(|| streamed(on, memory)).join().ok().flatten())
}

fn streamed((threads, cpus): (usize, &Cpus), memory: Bytes) -> Option<f64> {
    let start = Instant::now();
    let (outputs, cols) = SHAPE;
    let each = outputs as u64 * Precision::Bf16.row_bytes(cols as u64);
    let most = (memory.0 / MEMORY_SHARE / each).clamp(1, MATRICES_MAX as u64) as usize;
    let mut ops = CpuOps::bound(threads, Isa::from_environment().ok()?, cpus).ok()?;
    let mut matrices: Vec<Linear<CpuOps>> = Vec::new();
    while matrices.len() < most && (matrices.is_empty() || start.elapsed() < MAKING_MAX) {
        let shapes = vec![SHAPE; AT_ONCE.min(most - matrices.len())];
        let builders = ops.weight_builders(Precision::Bf16, &shapes).ok()?.into_iter();
        matrices.extend(builders.map(|builder| Linear { weight: builder.zeros(), bias: None }));
    }
    let input = ops.buffer(1, cols).ok()?;
    let mut output = ops.buffer(1, outputs).ok()?;
    let mut rounds = Vec::new();
    // The first round brings the instructions in; one more is measured even where time is up.
    for round in 0.. {
        for Linear { weight, .. } in &matrices {
            weight.leave_caches();
        }
        let begun = Instant::now();
        for matrix in &matrices {
            ops.linear(&input, 1, matrix, &mut output).ok()?;
        }
        if round > 0 {
            rounds.push(begun.elapsed());
        }
        if round > 0 && start.elapsed() >= CALIBRATION_MAX {
            break;
        }
    }
    let round = undisturbed(rounds)?.as_secs_f64();
    Some((matrices.len() as u64 * each) as f64 / round.max(1e-9))
}

/// The median of the rounds that took less than [`DISTURBED`] times as long as the fastest.
fn undisturbed(mut rounds: Vec<Duration>) -> Option<Duration> {
    rounds.sort_unstable();
    let longest = rounds.first()?.mul_f64(DISTURBED);
    let count = rounds.partition_point(|round| *round <= longest);
    rounds.get(count / 2).copied()
}

/// Reads a file; nothing where there is none.
type Read<'a> = &'a dyn Fn(&Path) -> Option<String>;

/// Which part of so many threads' time the control groups let this process have: `cpu.max` of version 2,
/// `cpu.cfs_quota_us` of version 1.
fn share_of(read: Read<'_>, threads: usize) -> f64 {
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let number = |text: &str| text.trim().parse::<f64>().ok().filter(|number| *number > 0.0);
    let quotas = groups.lines().flat_map(|line| {
        let (mount, own) = match line.splitn(3, ':').collect::<Vec<_>>()[..] {
            ["0", "", own] => ("/sys/fs/cgroup", own),
            [_, controllers, own] if controllers.split(',').any(|name| name == "cpu") => {
                ("/sys/fs/cgroup/cpu", own)
            }
            _ => return Vec::new(),
        };
        let of = |folder: &PathBuf| {
            if let Some(text) = read(&folder.join("cpu.max")) {
                let (quota, period) = text.trim().split_once(' ')?;
                return Some(number(quota)? / number(period)?);
            }
            let quota = number(&read(&folder.join("cpu.cfs_quota_us"))?)?;
            Some(quota / number(&read(&folder.join("cpu.cfs_period_us"))?)?)
        };
        folders(mount, own).iter().filter_map(of).collect()
    });
    quotas.map(|processors| processors / threads as f64).fold(1.0, f64::min)
}

/// The folder of a group and of each above it; none where it is outside of what this process sees.
fn folders(mount: &str, group: &str) -> Vec<PathBuf> {
    let mut folder = PathBuf::from(mount);
    for part in Path::new(group).components() {
        match part {
            Component::Normal(name) => folder.push(name),
            Component::ParentDir => return Vec::new(),
            _ => {}
        }
    }
    let above = folder.ancestors().take_while(|folder| folder.starts_with(mount));
    above.map(Path::to_path_buf).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_that_start_soon_after_each_other_measure_the_machine_once() {
        let file = tempfile::tempfile().expect("a file");
        let rate = |file, processors, rate| of_machine(file, processors, || Some(rate));
        let write = |text: &str| {
            file.set_len(0).expect("emptied");
            (&file).seek(SeekFrom::Start(0)).expect("from its start");
            (&file).write_all(text.as_bytes()).expect("written");
        };
        assert_eq!(rate(Some(&file), 8, 100), Some(100));
        assert_eq!(rate(Some(&file), 8, 70), Some(100), "it is known");
        assert_eq!(rate(Some(&file), 16, 200), Some(200), "of as many processors alone");
        assert_eq!(rate(Some(&file), 16, 70), Some(200));
        write("1 16 5");
        assert_eq!(rate(Some(&file), 16, 30), Some(30), "that was long ago");
        write("garbage");
        assert_eq!(rate(Some(&file), 16, 40), Some(40));
        assert_eq!(rate(None, 16, 50), Some(50));
    }

    #[test]
    fn what_disturbs_a_round_and_a_stroke_of_luck_do_not_count() {
        let of = |rounds: &[u64]| {
            undisturbed(rounds.iter().copied().map(Duration::from_millis).collect())
        };
        assert_eq!(of(&[110, 100, 120]), Some(Duration::from_millis(110)));
        assert_eq!(of(&[900, 112, 100, 800, 110, 700, 600]), Some(Duration::from_millis(110)));
        assert_eq!(of(&[100]), Some(Duration::from_millis(100)));
        assert_eq!(of(&[]), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn who_measures_is_not_bound_afterwards() {
        let may = || Cpus::all().count();
        let before = may();
        let first = rustix::thread::sched_getaffinity(None).unwrap();
        let first = (0..1024).find(|cpu| first.is_set(*cpu)).unwrap();
        assert!(stream((1, &first.to_string().parse().unwrap()), Bytes::mib(64)).is_some());
        assert_eq!(may(), before);
    }

    #[test]
    fn a_worker_measures_itself_in_a_moment() {
        let start = Instant::now();
        let facts = rates(NonZeroUsize::MIN, &Cpus::default(), Bytes::mib(64));
        let Fact::Rate { threads: 1, bytes_per_s, .. } = facts[0] else { panic!("{facts:?}") };
        assert!(bytes_per_s > 1 << 20, "{bytes_per_s}");
        let processors = std::thread::available_parallelism().unwrap().get();
        let more = facts.get(1).is_none_or(|fact| {
            matches!(fact, Fact::Rate { device, threads, .. }
                if device == MACHINE && *threads as usize == processors)
        });
        assert!(more && facts.len() <= 2, "{facts:?}");
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
        let old = ("/proc/self/cgroup", "9:name=systemd:/x\n3:cpuacct,cpu:/a\n0::/\n");
        let quota = ("/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "50000\n");
        let period = ("/sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n");
        assert_eq!(share(&[old, quota, period], 1), 0.5);
        let none = ("/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1\n");
        assert_eq!(share(&[old, none, period], 1), 1.0);
        assert_eq!(share(&[("/proc/self/cgroup", "0::/../x\n"), half], 1), 1.0);
    }
}
