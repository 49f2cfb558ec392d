//! What this machine has.

use std::num::NonZeroUsize;

use shoal_protocol::control::DeviceInfo;
use shoal_protocol::units::Bytes;

/// The share of the memory that is free at start, in percent, that a worker takes where nobody says
/// otherwise: the rest is for the page cache that loads go through, and for everybody else.
const MEMORY_SHARE_PERCENT: u64 = 80;

/// The only device of this version.
pub const CPU: &str = "cpu";

/// What a worker cannot be.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// No such device.
    #[error("there is no device `{0}` here; this version computes on `cpu`")]
    Device(String),
    /// The system does not say how much memory is free.
    #[error("cannot read the free memory from /proc/meminfo ({0}); give the budget with --memory")]
    Memory(String),
}

/// The device, with what the operator said or what the system has.
pub fn device(
    name: &str,
    memory: Option<Bytes>,
    threads: Option<NonZeroUsize>,
) -> Result<DeviceInfo, InventoryError> {
    if name != CPU {
        return Err(InventoryError::Device(name.to_owned()));
    }
    let threads = threads.map_or_else(threads_of_machine, NonZeroUsize::get);
    let memory = match memory {
        Some(memory) => memory,
        None => Bytes(memory_available()?.0 / 100 * MEMORY_SHARE_PERCENT),
    };
    Ok(DeviceInfo {
        name: CPU.to_owned(),
        description: format!("{}, {threads} threads", instruction_set()),
        memory,
        threads: threads as u32,
    })
}

fn threads_of_machine() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

fn memory_available() -> Result<Bytes, InventoryError> {
    let text = std::fs::read_to_string("/proc/meminfo")
        .map_err(|error| InventoryError::Memory(error.to_string()))?;
    parse_available(&text)
        .ok_or_else(|| InventoryError::Memory("it has no line `MemAvailable: … kB`".to_owned()))
}

fn parse_available(meminfo: &str) -> Option<Bytes> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bytes(kib.checked_mul(1024)?))
}

/// The widest instructions that the kernels use here, as people call them.
fn instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return "x86-64 with AVX-512";
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            return "x86-64 with AVX2";
        }
    }
    std::env::consts::ARCH
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_read_as_the_system_writes_it() {
        let text = "MemTotal:       16 kB\nMemFree:        2 kB\nMemAvailable:   12345 kB\n";
        assert_eq!(parse_available(text), Some(Bytes(12345 * 1024)));
        for text in ["", "MemAvailable: 12", "MemAvailable: x kB"] {
            assert_eq!(parse_available(text), None, "{text:?}");
        }
    }

    #[test]
    fn what_the_operator_says_wins() {
        let info = device("cpu", Some(Bytes::mib(600)), NonZeroUsize::new(3)).unwrap();
        assert_eq!((info.memory, info.threads), (Bytes::mib(600), 3));
        assert!(info.description.ends_with("3 threads"), "{}", info.description);
        let error = device("cuda:0", None, None).unwrap_err();
        assert!(error.to_string().contains("cuda:0"), "{error}");
    }
}
