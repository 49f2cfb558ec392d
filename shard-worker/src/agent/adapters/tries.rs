//! ○ When what failed is tried again, and how that is said.

use std::time::Duration;

use shoal_protocol::error::WireError;
use shoal_protocol::units::Instant;

/// The first wait before what failed is tried again: a mount that comes a little later than the worker.
const RETRY_FIRST: Duration = Duration::from_secs(1);

/// The longest: each try may read the whole adapter.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// The time, by the clock of waits and by that of people.
#[derive(Clone, Copy, Debug, Default)]
pub struct Now {
    /// Since the keeper began.
    pub at: Instant,
    /// Seconds since 1970.
    pub unix_s: u64,
}

/// What could not be loaded.
#[derive(Clone, Debug)]
pub struct Failed {
    /// Why.
    pub error: WireError,
    /// How often in a row.
    pub times: u32,
    /// When it is tried again.
    pub next: Now,
}

impl Failed {
    /// Once more.
    pub fn again(before: Option<&Self>, now: Now, error: WireError) -> Self {
        let times = before.map_or(0, |before| before.times) + 1;
        let wait = retry_after(times);
        let next = Now { at: now.at + wait, unix_s: now.unix_s + wait.as_secs() };
        Self { error, times, next }
    }

    /// With what follows, once it has failed again: whoever loads an adapter takes it back at the first.
    pub fn said(&self) -> WireError {
        if self.times < 2 {
            return self.error.clone();
        }
        let [h, m, s] =
            [self.next.unix_s / 3600 % 24, self.next.unix_s / 60 % 60, self.next.unix_s % 60];
        let words = format!(
            "{} (tried {} times; the next try is at {h:02}:{m:02}:{s:02} UTC)",
            self.error.message, self.times
        );
        WireError::new(self.error.code, words)
    }
}

/// Doubles with each time.
fn retry_after(times: u32) -> Duration {
    RETRY_FIRST.saturating_mul(1 << times.saturating_sub(1).min(8)).min(RETRY_MAX)
}
