//! A compute pool: the same few threads for every operation of every step.
//!
//! ```text
//! caller: publish job ─► own share ─► wait until none is left ─► Ok | a share panicked
//! worker: wait for a job ─► its share ─► one less is left ─► …
//! ```
//!
//! A wait spins for at most [`SPIN`], since the next operation of a step usually follows within
//! microseconds and a wake-up through the kernel costs 25 µs, and then parks. A pool of one thread
//! starts no other and never waits. Dispatching allocates nothing.
#![allow(unsafe_code)] // A job borrows from the caller's stack; see `Job`.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread, ThreadId};
use std::time::{Duration, Instant};

use super::cpus::{Cpus, bind};
use crate::backend::BackendError;
use crate::model::ComputeError;

/// How long a thread spins before it parks: about one wake-up, so that a wait never costs more than
/// twice what the better choice would have cost.
pub const SPIN: Duration = Duration::from_micros(30);

/// The most threads of a pool: more than a socket has, few enough for one thread each.
pub const THREADS_MAX: usize = 256;

/// Spins between two looks at the clock.
const SPINS_PER_LOOK: u32 = 16;

/// `threads` threads of which the caller is one. See the module.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Where the caller is to compute.
    caller: Option<usize>,
    /// The one that was bound: a pool may go over to another thread, as the shard of a new layout does.
    bound: Option<ThreadId>,
}

/// What a job is called with: which share of how many.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// From 0; the caller's is 0.
    pub index: usize,
    /// How many shares there are.
    pub of: usize,
}

impl Share {
    /// This share's part of `items`: contiguous, in order, and as even as can be.
    pub fn range(self, items: usize) -> std::ops::Range<usize> {
        let each = items / self.of;
        let more = items % self.of;
        let start = self.index * each + self.index.min(more);
        start..start + each + usize::from(self.index < more)
    }
}

/// The job of an epoch: a borrow that outlives the epoch, its lifetime erased.
type Job = *const (dyn Fn(Share) + Sync);

struct Shared {
    threads: usize,
    /// Odd numbers never occur; 0 is "no job yet", each dispatch adds 2, `STOP` ends the workers.
    epoch: AtomicU64,
    /// Written by the caller while no worker reads: before `epoch` is raised, after `left` is 0.
    job: UnsafeCell<Option<(Job, Thread)>>,
    /// Workers that have not finished the epoch's job.
    left: AtomicUsize,
    /// Whether the caller is parked or about to.
    caller_parked: AtomicBool,
    /// The same for each worker.
    worker_parked: Vec<AtomicBool>,
    /// A share of the epoch's job panicked.
    panicked: AtomicBool,
}

/// The epoch that ends the workers.
const STOP: u64 = u64::MAX;

// SAFETY: `job` is the only part that is not `Sync` by itself. It is written by `Pool::run` alone,
// which has `&mut Pool`, while `left` is 0, so no worker reads; workers read it only after they
// have seen (acquire) the epoch that was raised (release) after the write, and before they lower
// `left`. The function in it is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it belongs to a thread.
unsafe impl Send for Shared {}

impl Pool {
    /// Starts `threads - 1` threads.
    pub fn new(threads: usize) -> Result<Self, BackendError> {
        Self::bound(threads, &Cpus::default())
    }

    /// The same, each bound to one of `cpus`.
    pub fn bound(threads: usize, cpus: &Cpus) -> Result<Self, BackendError> {
        if !(1..=THREADS_MAX).contains(&threads) {
            return Err(BackendError::BadShape {
                what: "compute threads",
                why: format!("{threads} asked for, 1 to {THREADS_MAX} are possible"),
            });
        }
        let shared = Arc::new(Shared {
            threads,
            epoch: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            left: AtomicUsize::new(0),
            caller_parked: AtomicBool::new(false),
            worker_parked: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            panicked: AtomicBool::new(false),
        });
        // Built first, so that dropping it ends the threads that did start.
        let workers = Vec::with_capacity(threads - 1);
        let mut pool = Self { shared, workers, caller: cpus.of_thread(0), bound: None };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let cpu = cpus.of_thread(index);
            let worker = std::thread::Builder::new()
                .name(format!("compute-{index}"))
                .spawn(move || {
                    cpu.into_iter().for_each(bind);
                    shared.work(index);
                })
                .map_err(|error| BackendError::Thread { thread: index, why: error.to_string() })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// How many threads compute, the caller's included.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Calls `job` once for each share, each on a thread of its own, and returns when all have
    /// returned. A panic in a share is an error once the others are done.
    pub fn run(&mut self, job: &(dyn Fn(Share) + Sync)) -> Result<(), ComputeError> {
        self.run_on(self.shared.threads, job)
    }

    /// Calls `job` for one share that is everything, on the caller's thread.
    pub fn run_alone(&mut self, job: &(dyn Fn(Share) + Sync)) -> Result<(), ComputeError> {
        self.run_on(1, job)
    }

    /// Once for each thread that calls.
    fn bind_caller(&mut self) {
        let Some(cpu) = self.caller else { return };
        let own = std::thread::current().id();
        if self.bound != Some(own) {
            bind(cpu);
            self.bound = Some(own);
        }
    }

    /// `threads` is 1 or all.
    fn run_on(&mut self, threads: usize, job: &(dyn Fn(Share) + Sync)) -> Result<(), ComputeError> {
        self.bind_caller();
        let shared = &*self.shared;
        let share = Share { index: 0, of: threads };
        if threads > 1 {
            let erased: *const (dyn Fn(Share) + Sync + '_) = job;
            // SAFETY: the lifetime alone changes. Workers call the job only between the raise of
            // `epoch` below and their lowering of `left`, and this function does not return, by
            // panic either, before `left` is 0.
            let erased: Job = unsafe { std::mem::transmute(erased) };
            // SAFETY: no worker reads `job` now: `left` is 0 and the epoch not yet raised.
            unsafe { *shared.job.get() = Some((erased, std::thread::current())) };
            shared.left.store(shared.threads - 1, Ordering::Relaxed);
            shared.epoch.fetch_add(2, Ordering::SeqCst);
            for (worker, parked) in self.workers.iter().zip(&shared.worker_parked) {
                if parked.load(Ordering::SeqCst) {
                    worker.thread().unpark();
                }
            }
        }
        shared.call(job, share);
        if threads > 1 {
            wait(&shared.caller_parked, || shared.left.load(Ordering::SeqCst) == 0);
        }
        if shared.panicked.swap(false, Ordering::Relaxed) {
            return Err(ComputeError::Device("a compute thread panicked in a kernel".into()));
        }
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.epoch.store(STOP, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of jobs and has none of its own.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// A worker's life.
    fn work(&self, index: usize) {
        let share = Share { index, of: self.threads };
        let mut done = 0;
        loop {
            wait(&self.worker_parked[index - 1], || self.epoch.load(Ordering::SeqCst) != done);
            done = self.epoch.load(Ordering::SeqCst);
            if done == STOP {
                return;
            }
            // SAFETY: the epoch was raised after the job was written, and the next write waits
            // until `left`, which counts this worker, is 0.
            let Some((job, caller)) = (unsafe { &*self.job.get() }) else { return };
            let caller = caller.clone();
            // SAFETY: `run` keeps the borrow alive until `left` is 0.
            self.call(unsafe { &**job }, share);
            if self.left.fetch_sub(1, Ordering::SeqCst) == 1
                && self.caller_parked.load(Ordering::SeqCst)
            {
                caller.unpark();
            }
        }
    }

    fn call(&self, job: &(dyn Fn(Share) + Sync), share: Share) {
        if catch_unwind(AssertUnwindSafe(|| job(share))).is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
    }
}

/// Returns when `ready`; spins, then parks. Whoever makes it ready looks at `parked` afterwards, in
/// the one order of `SeqCst`, so that either it sees `parked` or `ready` is seen here.
fn wait(parked: &AtomicBool, ready: impl Fn() -> bool) {
    if ready() {
        return;
    }
    let start = Instant::now();
    while start.elapsed() < SPIN {
        for _ in 0..SPINS_PER_LOOK {
            if ready() {
                return;
            }
            std::hint::spin_loop();
        }
    }
    parked.store(true, Ordering::SeqCst);
    while !ready() {
        std::thread::park();
    }
    parked.store(false, Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_share_runs_once_a_job() {
        for threads in 1..=4 {
            let mut pool = Pool::new(threads).unwrap();
            let calls: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            // An interpreter is a thousand times slower.
            let (rounds, park_every) = if cfg!(miri) { (8, 4) } else { (200, 50) };
            for round in 1..=rounds {
                pool.run(&|share| {
                    assert_eq!(share.of, threads);
                    calls[share.index].fetch_add(1, Ordering::Relaxed);
                })
                .unwrap();
                assert!(calls.iter().all(|c| c.load(Ordering::Relaxed) == round));
                if round % park_every == 0 {
                    // Long enough for the workers to park.
                    std::thread::park_timeout(4 * SPIN);
                }
            }
        }
    }

    #[cfg(all(target_os = "linux", not(miri)))]
    #[test]
    fn threads_compute_where_they_are_bound() {
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        let cpu = (0..1024).find(|cpu| allowed.is_set(*cpu)).unwrap();
        let cpus = cpu.to_string().parse().unwrap();
        let mut pool = Pool::bound(3, &cpus).unwrap();
        // Threads of their own, which stay bound; the second one takes over.
        for _ in 0..2 {
            let computes = std::thread::spawn(move || {
                let done = pool.run(&|_| {
                    let own = rustix::thread::sched_getaffinity(None).unwrap();
                    assert!(own.is_set(cpu) && own.count() == 1);
                });
                (pool, done)
            });
            let (back, done) = computes.join().unwrap();
            assert_eq!(done, Ok(()));
            pool = back;
        }
    }

    #[test]
    fn a_panic_is_an_error_and_the_pool_goes_on() {
        for guilty in 0..3 {
            let mut pool = Pool::new(3).unwrap();
            let result = pool.run(&|share| assert_ne!(share.index, guilty, "as the test wants"));
            assert!(matches!(result, Err(ComputeError::Device(_))), "{result:?}");
            pool.run(&|_| ()).unwrap();
        }
    }

    #[test]
    fn shares_cover_all_items_in_order() {
        for of in 1..=5 {
            for items in 0..20 {
                let all: Vec<usize> =
                    (0..of).flat_map(|index| Share { index, of }.range(items)).collect();
                assert_eq!(all, (0..items).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn an_impossible_number_of_threads_is_refused() {
        for threads in [0, THREADS_MAX + 1] {
            assert!(matches!(Pool::new(threads), Err(BackendError::BadShape { .. })));
        }
    }
}
