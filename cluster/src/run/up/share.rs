//! What each of several workers on one machine may take of it.

use std::num::NonZeroU32;

use shoal_protocol::units::Bytes;
use shoal_shard_worker::agent;

/// An even share of what workers may take of the memory that is free.
pub fn memory(free: Bytes, workers: NonZeroU32) -> Bytes {
    Bytes(agent::memory::for_workers(free).0 / u64::from(workers.get()))
}

/// An even share of the cores, at least one.
pub fn threads(cores: NonZeroU32, workers: NonZeroU32) -> NonZeroU32 {
    let share = (cores.get() / workers.get()).min(agent::inventory::THREADS_MAX as u32);
    NonZeroU32::new(share).unwrap_or(NonZeroU32::MIN)
}

/// The memory that is free for the processes of this one, where the system tells.
pub fn free_memory() -> Option<Bytes> {
    agent::memory::free().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_even_and_never_nothing() {
        let n = |n| NonZeroU32::new(n).unwrap();
        assert_eq!(memory(Bytes(3000), n(3)), Bytes(800));
        for (cores, workers, threads_each) in [(8, 3, 2), (2, 3, 1), (1, 1, 1), (16, 2, 8)] {
            assert_eq!(threads(n(cores), n(workers)), n(threads_each), "{cores} / {workers}");
        }
    }
}
