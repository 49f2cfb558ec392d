//! What a process knows of its own machine, over all of its links: a new link need not learn it again.

use std::time::Duration;

use super::worst::{ROUGH, Worst};
use crate::units::Instant;

/// Looks after which a process knows its machine: as many as a busy link takes in ten seconds. Looks at
/// idle links count as well. They are fewer, and find a stall by chance: a long one the more likely.
const LOOKS_KNOWN: u32 = 1000;

/// And so long it has to have run at least: a burst of looks at many links sees one moment.
const TIME_KNOWN: Duration = Duration::from_secs(20);

/// What is known of our own timers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// How late they were at worst of late.
    pub worst: Duration,
    /// How often of late they were as late as only a machine's is whose cores are fought for.
    pub rough: u32,
    /// Whether enough was seen to rely on that.
    pub enough: bool,
}

/// One process's looks at all of its links.
#[derive(Debug, Default)]
pub struct Experience {
    own: Worst,
    /// When the last long stall was noticed: whatever began before that is the same one.
    stalled: Instant,
    looks: u32,
    first: Option<Instant>,
}

impl Experience {
    /// A timer has fired so late; zero where it was on time. A stall of the machine is noticed at each of
    /// its links, and counts once.
    pub fn note(&mut self, now: Instant, lateness: Duration) {
        self.first.get_or_insert(now);
        self.looks = self.looks.saturating_add(1);
        let late = u64::try_from(lateness.as_micros()).unwrap_or(u64::MAX);
        if lateness >= ROUGH && now.0.saturating_sub(late) < self.stalled.0 {
            self.own.see(now, lateness);
        } else if lateness > Duration::ZERO {
            self.own.note(now, lateness);
            if lateness >= ROUGH {
                self.stalled = now;
            }
        }
    }

    /// What is known now.
    pub fn known(&mut self, now: Instant) -> Known {
        self.own.turn(now);
        let seen = self.first.is_some_and(|first| now.since(first) >= TIME_KNOWN);
        Known {
            worst: self.own.get(),
            rough: self.own.rough(),
            enough: seen && self.looks >= LOOKS_KNOWN,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1000;

    #[test]
    fn a_stall_that_is_noticed_at_twenty_links_is_one() {
        let mut experience = Experience::default();
        let ms = Duration::from_millis;
        // Their timers were due one after the other, and fire together.
        let notice = |experience: &mut Experience, at: u64| {
            for link in 0..20 {
                experience.note(Instant(at + link * 50), ms(30 - link / 2));
            }
            experience.known(Instant(at + MS))
        };
        let known = notice(&mut experience, 100 * MS);
        assert_eq!((known.rough, known.worst), (1, ms(30)));
        assert_eq!(notice(&mut experience, 200 * MS).rough, 2, "another stall is another one");
        // Whoever noticed it later may have been late for longer.
        experience.note(Instant(201 * MS), ms(45));
        let known = experience.known(Instant(201 * MS));
        assert_eq!((known.rough, known.worst), (2, ms(45)));
    }

    #[test]
    fn a_short_stall_hides_no_long_one() {
        let mut experience = Experience::default();
        experience.note(Instant(100 * MS), Duration::from_millis(5));
        experience.note(Instant(100 * MS + 50), Duration::from_millis(20));
        assert_eq!(experience.known(Instant(101 * MS)).rough, 1);
    }
}
