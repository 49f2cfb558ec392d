//! What this machine has.

use std::num::NonZeroUsize;

use shoal_protocol::control::DeviceInfo;
use shoal_protocol::units::Bytes;

use crate::agent::memory;

/// The only device of this version.
pub const CPU: &str = "cpu";

/// The least that a worker joins with. One layer of the built-in demo model, which is 96 wide, takes about as much
/// with the cache of its context and the buffers of steps of 128 rows; a worker with less would stand in every list
/// and in no plan.
pub const MEMORY_MIN: Bytes = Bytes::mib(1);

/// The most compute threads of a worker.
pub const THREADS_MAX: usize = crate::backend::pool::THREADS_MAX;

/// What a worker cannot be.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// No such device.
    #[error("there is no device `{0}` here; this version computes on `cpu`")]
    Device(String),
    /// The system does not say how much memory is free.
    #[error("cannot read the free memory from /proc/meminfo ({0}); give the budget with --memory")]
    Memory(std::io::Error),
    /// Nothing is free.
    #[error(
        "no memory is free here, by /proc/meminfo or by the limit of this process's control group; \
         free some, raise the limit, or give the budget with --memory"
    )]
    NoMemory,
    /// What there is holds nothing.
    #[error(
        "{0} of memory hold nothing: a layer with its cache and its buffers takes about {MEMORY_MIN} even of the \
         built-in demo model, so a worker needs as much; give the budget with --memory, such as 600MiB, or free as \
         much"
    )]
    TooLittle(Bytes),
}

/// The device, with what the operator said or what the system has.
pub fn device(
    name: &str,
    budget: Option<Bytes>,
    threads: Option<NonZeroUsize>,
) -> Result<DeviceInfo, InventoryError> {
    if name != CPU {
        return Err(InventoryError::Device(name.to_owned()));
    }
    let threads = threads.map_or_else(threads_of_machine, NonZeroUsize::get);
    let memory = match budget {
        Some(budget) => budget,
        None => memory::for_workers(memory::free().map_err(InventoryError::Memory)?),
    };
    if memory.0 == 0 {
        return Err(InventoryError::NoMemory);
    }
    if memory < MEMORY_MIN {
        return Err(InventoryError::TooLittle(memory));
    }
    // It may be right: memory that is taken now may be free when it is needed, and more may be plugged in.
    if let Some(all) = memory::of_machine().filter(|all| memory > *all) {
        tracing::warn!(
            "a budget of {memory} on a machine with {all}: layouts will be planned that it has no room for; \
             give --memory less than it has"
        );
    }
    Ok(DeviceInfo {
        name: CPU.to_owned(),
        description: format!("{}, {threads} threads", instruction_set()),
        memory,
        threads: threads as u32,
    })
}

fn threads_of_machine() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(THREADS_MAX)
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
    fn what_the_operator_says_wins() {
        let info = device("cpu", Some(Bytes::mib(600)), NonZeroUsize::new(3)).unwrap();
        assert_eq!((info.memory, info.threads), (Bytes::mib(600), 3));
        assert!(info.description.ends_with("3 threads"), "{}", info.description);
        for bytes in [1, 1 << 10, (1 << 20) - 1] {
            let error = device("cpu", Some(Bytes(bytes)), None).unwrap_err();
            assert!(error.to_string().contains("takes about 1.0 MiB"), "{error}");
        }
        assert_eq!(device("cpu", Some(MEMORY_MIN), None).unwrap().memory, MEMORY_MIN);
        let error = device("cuda:0", None, None).unwrap_err();
        assert!(error.to_string().contains("cuda:0"), "{error}");
    }
}
