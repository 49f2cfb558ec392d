//! What a process knows of its own machine, over all of its links: a new link need not learn it again.

use std::time::Duration;

use super::worst::Worst;
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
    looks: u32,
    first: Option<Instant>,
}

impl Experience {
    /// A timer has fired so late; zero where it was on time.
    pub fn note(&mut self, now: Instant, lateness: Duration) {
        self.first.get_or_insert(now);
        self.looks = self.looks.saturating_add(1);
        if lateness > Duration::ZERO {
            self.own.note(now, lateness);
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
