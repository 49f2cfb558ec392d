//! How long to wait before a process that died is started again.

use std::time::Duration;

/// The first wait: a death by accident should cost a user no more than a pause.
const FIRST: Duration = Duration::from_millis(250);

/// The longest wait: a process that dies at each start must not keep the machine busy.
const LONGEST: Duration = Duration::from_secs(10);

/// Who lived this long was well; its next death is a first one again.
const WELL: Duration = Duration::from_secs(30);

/// Who lived so many times the wait before it does not wait longer the next time: somebody kills it, or
/// it is rarely unlucky. The machine is busy with its starts for a small share of the time either way.
const LIVED_WAITS: u32 = 8;

/// Doubles the wait with each death that comes soon after a start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    last: Duration,
}

impl Backoff {
    /// The wait after a death, given how long the process had lived.
    pub fn after(&mut self, lived: Duration) -> Duration {
        let wait = match self.last {
            Duration::ZERO => FIRST,
            _ if lived >= WELL => FIRST,
            last if lived >= last * LIVED_WAITS => last,
            last => (last * 2).min(LONGEST),
        };
        self.last = wait;
        wait
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

    #[test]
    fn who_is_killed_again_and_again_while_it_is_well_is_there_again_at_once() {
        // Eight kills in half a minute.
        let mut backoff = Backoff::default();
        let waits: Vec<Duration> =
            (0..8).map(|_| backoff.after(Duration::from_millis(3750))).collect();
        assert_eq!(waits, [FIRST; 8]);
        // It grows as soon as the lives are short, and stays where they are long enough for it.
        assert_eq!(backoff.after(Duration::from_secs(1)), 2 * FIRST);
        assert_eq!(backoff.after(Duration::from_secs(4)), 2 * FIRST);
        assert_eq!(backoff.after(Duration::from_secs(3)), 4 * FIRST);
    }
}
