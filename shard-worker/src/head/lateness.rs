//! ○ Which step is late: a suspicion, long before the engine gives a generation up.
//!
//! A step may take microseconds or seconds, so lateness is measured against the steps before it. It is
//! for the log alone: a peer whose steps are late and whose beats come is slow, not dead. What ends a
//! generation is a link whose other end is silent beyond doubt (`shoal_protocol::liveness`, at most 1.2 s),
//! or the engine's step time-out.

use std::collections::VecDeque;
use std::time::Duration;

use shoal_protocol::id::StepId;
use shoal_protocol::units::Instant;

/// No step is suspect before this.
const SUSPECT_AFTER_MIN: Duration = Duration::from_secs(1);

/// A step is suspect after this many times the usual time. A step of a long prompt has as many times
/// the rows of a decode step, and may come right behind one.
const SUSPECT_FACTOR: u32 = 20;

/// How much of the average the newest step is: 1/8, as in TCP's smoothed round-trip time.
const NEWEST_SHARE: u32 = 8;

/// The steps in flight and how long they usually take.
#[derive(Debug, Default)]
pub(super) struct Lateness {
    in_flight: VecDeque<(StepId, Instant)>,
    usual: Option<Duration>,
    /// The oldest step has been reported.
    suspected: bool,
}

impl Lateness {
    /// A step is on its way.
    pub fn issued(&mut self, step: StepId, now: Instant) {
        self.in_flight.push_back((step, now));
    }

    /// A step is back.
    pub fn landed(&mut self, step: StepId, now: Instant) {
        let Some(&(oldest, issued)) = self.in_flight.front() else { return };
        if oldest != step {
            return;
        }
        self.in_flight.pop_front();
        self.suspected = false;
        let took = now.since(issued);
        self.usual = Some(match self.usual {
            None => took,
            Some(usual) => usual - usual / NEWEST_SHARE + took / NEWEST_SHARE,
        });
    }

    /// No step will come back.
    pub fn clear(&mut self) {
        self.in_flight.clear();
        self.suspected = false;
    }

    /// When to look again.
    pub fn next_check(&self) -> Option<Instant> {
        let (_, issued) = self.in_flight.front().filter(|_| !self.suspected)?;
        Some(*issued + self.bound()?)
    }

    /// Words about the oldest step, once, where it is late.
    pub fn check(&mut self, now: Instant) -> Option<String> {
        if self.next_check().is_none_or(|at| now < at) {
            return None;
        }
        self.suspected = true;
        let (step, issued) = self.in_flight.front()?;
        let (took, usual) = (now.since(*issued), self.usual?);
        Some(format!("{step} is late: {took:.1?} in flight, where {usual:.1?} is usual"))
    }

    /// Unknown until a first step is back: the first one may load pages, or be a long prompt.
    fn bound(&self) -> Option<Duration> {
        self.usual.map(|usual| (usual * SUSPECT_FACTOR).max(SUSPECT_AFTER_MIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Instant {
        Instant(ms * 1000)
    }

    #[test]
    fn a_step_is_late_against_those_before_it() {
        let mut lateness = Lateness::default();
        lateness.issued(StepId(0), ms(0));
        assert_eq!(lateness.next_check(), None, "nothing is known yet");
        lateness.landed(StepId(0), ms(100));

        lateness.issued(StepId(1), ms(100));
        lateness.issued(StepId(2), ms(150));
        assert_eq!(lateness.next_check(), Some(ms(2100)));
        assert_eq!(lateness.check(ms(2099)), None);
        let words = lateness.check(ms(2100)).expect("it is late");
        assert_eq!(words, "step 1 is late: 2.0s in flight, where 100.0ms is usual");
        assert_eq!(lateness.check(ms(9000)), None, "said once");

        lateness.landed(StepId(1), ms(9000));
        assert!(lateness.next_check().is_some_and(|at| at > ms(20_000)), "it is slow, not late");
    }

    #[test]
    fn quick_steps_have_a_second() {
        let mut lateness = Lateness::default();
        lateness.issued(StepId(0), ms(0));
        lateness.landed(StepId(0), ms(1));
        lateness.issued(StepId(1), ms(10));
        assert_eq!(lateness.next_check(), Some(ms(1010)));
        lateness.clear();
        assert_eq!(lateness.next_check(), None);
    }
}
