//! ● The spans of a worker: what a head and its stages did for an answer that is traced.
//!
//! Both are told what happens and when; neither holds anything up. Spans carry this machine's wall time,
//! so those of two machines are as far apart as their clocks are.

mod head;
mod stage;

pub use head::HeadTraces;
pub use stage::{STEPS_SHOWN_MAX, StageTraces, StepTimes};

use std::time::{Instant, SystemTime};

use shoal_protocol::trace::UnixNanos;

/// Both clocks, read together: what is told by one reading is in order to the nanosecond.
#[derive(Clone, Copy, Debug)]
struct Clocks {
    wall: SystemTime,
    at: Instant,
}

impl Clocks {
    fn read() -> Self {
        Self { wall: SystemTime::now(), at: Instant::now() }
    }

    /// The wall time of something that happened a moment ago.
    fn wall(&self, at: Instant) -> UnixNanos {
        UnixNanos::before(self.wall, self.at.saturating_duration_since(at))
    }
}

#[cfg(test)]
mod trace_test;
