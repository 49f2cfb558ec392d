//! ○ How much may wait: what is over the bound is refused at once, while the client can still go
//! elsewhere.

use std::time::Duration;

/// Bounds on what a deployment may have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdmissionLimits {
    /// Sequences that run or wait, per ready replica. More than a head's own queue takes would only
    /// be refused there.
    pub sequences_per_replica: u32,
}

impl Default for AdmissionLimits {
    fn default() -> Self {
        Self { sequences_per_replica: 256 }
    }
}

/// A second per this many waiting sequences is what a client is told to wait.
const SEQUENCES_PER_SECOND: u32 = 32;

/// The longest wait that a client is told.
const RETRY_AFTER_MAX: u32 = 30;

impl AdmissionLimits {
    /// The bound of a deployment with so many ready replicas.
    pub fn bound(&self, replicas: usize) -> u32 {
        self.sequences_per_replica.saturating_mul(replicas as u32)
    }
}

/// When to try again at a deployment with this load.
pub fn retry_after(load: u32) -> Duration {
    Duration::from_secs(u64::from((load / SEQUENCES_PER_SECOND).clamp(1, RETRY_AFTER_MAX)))
}
