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

/// The wall time of something that happened a moment ago.
fn wall(at: Instant) -> UnixNanos {
    UnixNanos::before(SystemTime::now(), at.elapsed())
}

#[cfg(test)]
mod trace_test;
