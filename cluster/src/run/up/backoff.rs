//! How long to wait before a process that died is started again.

use std::time::Duration;

/// The first wait: a death by accident should cost a user no more than a pause.
const FIRST: Duration = Duration::from_millis(250);

/// The longest wait: a process that dies at each start must not keep the machine busy.
const LONGEST: Duration = Duration::from_secs(10);

/// Who lived this long was well; its next death is a first one again.
const WELL: Duration = Duration::from_secs(30);

/// Doubles the wait with each death that comes soon after a start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    deaths: u32,
}

impl Backoff {
    /// The wait after a death, given how long the process had lived.
    pub fn after(&mut self, lived: Duration) -> Duration {
        if lived >= WELL {
            self.deaths = 0;
        }
        // Beyond the longest wait the exponent does not matter, but it must not overflow.
        let wait = FIRST.saturating_mul(1 << self.deaths.min(16));
        self.deaths += 1;
        wait.min(LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_bound_and_begin_anew_after_a_good_life() {
        let mut backoff = Backoff::default();
        let soon = Duration::from_secs(1);
        let waits: Vec<u128> = (0..8).map(|_| backoff.after(soon).as_millis()).collect();
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 8000, 10_000, 10_000]);
        assert_eq!(backoff.after(Duration::from_secs(31)), FIRST);
        assert_eq!(backoff.after(soon), 2 * FIRST);
    }
}
