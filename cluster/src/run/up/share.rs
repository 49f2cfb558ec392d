//! What each of several workers on one machine may take of it.

use std::num::NonZeroU32;

use shoal_protocol::units::Bytes;

/// Of the memory that is free, how much the workers may take together, in percent. The rest is for
/// the coordinator, for page cache while weights are read, and for everybody else.
const MEMORY_PERCENT: u64 = 80;

/// An even share of the memory that is free.
pub fn memory(free: Bytes, workers: NonZeroU32) -> Bytes {
    Bytes(free.0 / 100 * MEMORY_PERCENT / u64::from(workers.get()))
}

/// An even share of the cores, at least one.
pub fn threads(cores: NonZeroU32, workers: NonZeroU32) -> NonZeroU32 {
    NonZeroU32::new(cores.get() / workers.get()).unwrap_or(NonZeroU32::MIN)
}

/// The memory that is free on this machine, where the system tells.
pub fn free_memory() -> Option<Bytes> {
    parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse_meminfo(text: &str) -> Option<Bytes> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bytes(kib << 10))
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

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:       24 kB\nMemAvailable:   16384 kB\n";
        assert_eq!(parse_meminfo(text), Some(Bytes::mib(16)));
        assert_eq!(parse_meminfo("MemTotal: 1 kB\n"), None);
    }
}
