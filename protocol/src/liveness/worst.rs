//! The worst of the last minute.

use std::time::Duration;

use crate::units::Instant;

/// How long one of the buckets lasts.
const BUCKET: Duration = Duration::from_secs(10);

/// So many buckets are remembered: a minute, so that a compiler's next burst finds that of half a
/// minute ago still known, and a link is quick again a minute after it.
const BUCKETS: usize = 6;

/// From so much on a value is counted as well: a virtual machine's own stalls are shorter, those of a
/// machine whose cores are fought for are not.
pub const ROUGH: Duration = Duration::from_millis(10);

/// The largest value of the last fifty to sixty seconds. A mean forgets in a second what a heavy tail
/// brings once in ten; a maximum does not.
#[derive(Clone, Debug, Default)]
pub struct Worst {
    buckets: [Duration; BUCKETS],
    /// How many values of each bucket were `ROUGH`.
    rough: [u32; BUCKETS],
    /// The number of the bucket that is being filled, counted from the origin of time.
    newest: u64,
}

impl Worst {
    /// Takes a value.
    pub fn note(&mut self, now: Instant, value: Duration) {
        let index = self.see(now, value);
        self.rough[index] = self.rough[index].saturating_add(u32::from(value >= ROUGH));
    }

    /// Takes a value that was counted already; says in which bucket it is.
    pub fn see(&mut self, now: Instant, value: Duration) -> usize {
        self.turn(now);
        let index = (self.newest % BUCKETS as u64) as usize;
        let bucket = &mut self.buckets[index];
        *bucket = value.max(*bucket);
        index
    }

    /// How many were `ROUGH`.
    pub fn rough(&self) -> u32 {
        self.rough.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// The largest one.
    pub fn get(&self) -> Duration {
        self.buckets.into_iter().max().unwrap_or_default()
    }

    /// Forgets what is too old.
    pub fn turn(&mut self, now: Instant) {
        let bucket = now.0 / BUCKET.as_micros() as u64;
        while self.newest < bucket {
            // After a long pause all of it is old; a loop over the pause would be long, too.
            self.newest = (self.newest + 1).max(bucket.saturating_sub(BUCKETS as u64));
            let index = (self.newest % BUCKETS as u64) as usize;
            (self.buckets[index], self.rough[index]) = (Duration::ZERO, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_known_for_most_of_a_minute_and_then_forgotten() {
        let s = |s: u64| Instant(s * 1_000_000);
        let ms = Duration::from_millis;
        let mut worst = Worst::default();
        worst.note(s(3), ms(40));
        worst.note(s(4), ms(2));
        worst.turn(s(59));
        assert_eq!((worst.get(), worst.rough()), (ms(40), 1));
        worst.note(s(60), ms(1));
        assert_eq!((worst.get(), worst.rough()), (ms(1), 0));
        worst.turn(s(1_000_000));
        assert_eq!(worst.get(), ms(0));
    }
}
