//! ○ Leaves a replica alone that fails, and finds out with one request whether it still does.
//!
//! ```text
//! closed ── its link was lost, CONSECUTIVE failures, or half of the last seconds' failed ─► open
//! open ── the back-off is over ─► one probe ── came through ─► closed (slow start)
//!                                          └─ failed ─► open, twice as long
//! ```

use std::time::Duration;

use shoal_protocol::units::Instant;

/// Failures in a row that open it: Envoy's number. One may be the request's own doing.
const CONSECUTIVE: u32 = 5;

/// How long an outcome counts in the share of failures.
const WINDOW: Duration = Duration::from_secs(10);

/// The share of failures that opens it.
const SHARE: f64 = 0.5;

/// Outcomes in the window below which a share says nothing.
const VOLUME: f64 = 10.0;

/// The first back-off: four reports of a head, or what the control plane needs to notice as well.
const BACK_OFF: Duration = Duration::from_secs(1);

/// The longest back-off: linkerd's.
const BACK_OFF_MAX: Duration = Duration::from_secs(60);

/// How long a probe may take before another one is sent: its answer may be long or lost.
const PROBE_PATIENCE: Duration = Duration::from_secs(10);

/// Where a breaker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum State {
    /// Requests go through.
    #[default]
    Closed,
    /// Nothing goes through before this.
    Open {
        /// When the back-off is over.
        until: Instant,
    },
    /// One request goes through; another may follow from this on.
    Probing {
        /// When the probe counts as lost.
        until: Instant,
    },
}

/// The breaker of one replica.
#[derive(Clone, Copy, Debug, Default)]
pub struct Breaker {
    state: State,
    consecutive: u32,
    good: f64,
    bad: f64,
    last: Instant,
    /// How often it opened without a quiet time between.
    trips: u32,
    closed_at: Instant,
}

impl Breaker {
    /// Where it is.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether requests go through.
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// Whether a probe should go now.
    pub fn probe_is_due(&self, now: Instant) -> bool {
        match self.state {
            State::Closed => false,
            State::Open { until } | State::Probing { until } => now >= until,
        }
    }

    /// When a probe may go; the epoch where it is closed.
    pub fn until(&self) -> Instant {
        match self.state {
            State::Closed => Instant(0),
            State::Open { until } | State::Probing { until } => until,
        }
    }

    /// The share of outcomes that were failures, weighed down while there are few.
    pub fn failure_share(&self, now: Instant) -> f64 {
        if self.bad < 0.01 {
            return 0.0;
        }
        let bad = self.bad * keep(now.since(self.last));
        bad / (self.bad + self.good).max(VOLUME)
    }

    /// A request is on its way as a probe.
    pub fn probe(&mut self, now: Instant) {
        self.state = State::Probing { until: now + PROBE_PATIENCE };
    }

    /// A request came through. True where that closed it.
    pub fn success(&mut self, now: Instant) -> bool {
        self.decay(now);
        self.good += 1.0;
        self.consecutive = 0;
        match self.state {
            State::Closed => {
                if now.since(self.closed_at) > BACK_OFF_MAX {
                    self.trips = 0;
                }
                false
            }
            // A request from before it opened proves nothing.
            State::Open { .. } => false,
            State::Probing { .. } => {
                let trips = self.trips;
                *self = Self { trips, closed_at: now, last: now, ..Self::default() };
                true
            }
        }
    }

    /// A request failed by the replica's fault; `lost`: its link is gone, which one failure proves.
    /// The dice spread the probes of several coordinators.
    pub fn failure(&mut self, now: Instant, lost: bool, dice: u64) {
        self.decay(now);
        self.bad += 1.0;
        self.consecutive = self.consecutive.saturating_add(1);
        let total = self.good + self.bad;
        let opens = match self.state {
            State::Closed => {
                lost || self.consecutive >= CONSECUTIVE
                    || (total >= VOLUME && self.bad >= SHARE * total)
            }
            State::Open { .. } => false,
            State::Probing { .. } => true,
        };
        if opens {
            let back_off = (BACK_OFF * (1 << self.trips.min(6))).min(BACK_OFF_MAX);
            // Up to an eighth longer.
            let jitter = back_off.as_micros() as u64 / 8;
            let jitter = Duration::from_micros(dice % jitter.max(1));
            self.trips = self.trips.saturating_add(1);
            self.state = State::Open { until: now + back_off + jitter };
        }
    }

    fn decay(&mut self, now: Instant) {
        let keep = keep(now.since(self.last));
        self.last = self.last.max(now);
        self.good *= keep;
        self.bad *= keep;
    }
}

fn keep(passed: Duration) -> f64 {
    (-passed.as_secs_f64() / WINDOW.as_secs_f64()).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Instant {
        Instant(millis * 1000)
    }

    #[test]
    fn failures_in_a_row_open_it_and_a_success_between_them_does_not_count() {
        let mut breaker = Breaker::default();
        for i in 0..4 {
            breaker.failure(at(i), false, 0);
        }
        assert!(breaker.is_closed());
        breaker.success(at(5));
        for i in 0..4 {
            breaker.failure(at(10 + i), false, 0);
            assert_eq!(breaker.is_closed(), i < 4, "{i}");
        }
        breaker.failure(at(20), false, 0);
        assert!(!breaker.is_closed());
    }

    #[test]
    fn every_other_request_failing_opens_it_too() {
        let mut breaker = Breaker::default();
        for i in 0..10 {
            breaker.success(at(10 * i));
            breaker.failure(at(10 * i + 5), false, 0);
        }
        assert!(!breaker.is_closed());
    }

    #[test]
    fn one_lost_link_opens_it_once_however_many_streams_it_takes_along() {
        let mut breaker = Breaker::default();
        for _ in 0..40 {
            breaker.failure(at(0), true, 0);
        }
        assert_eq!(breaker.state(), State::Open { until: at(1000) });
    }

    #[test]
    fn one_probe_goes_after_the_back_off_which_doubles_until_it_comes_through() {
        let mut breaker = Breaker::default();
        breaker.failure(at(0), true, 0);
        assert!(!breaker.probe_is_due(at(999)));
        assert!(breaker.probe_is_due(at(1000)));
        breaker.probe(at(1000));
        assert!(!breaker.probe_is_due(at(1500)), "one at a time");
        breaker.failure(at(1500), false, 0);
        assert_eq!(breaker.state(), State::Open { until: at(3500) });
        // What was sent before it opened ends well: that is no probe.
        assert!(!breaker.success(at(2000)));
        breaker.probe(at(3500));
        assert!(breaker.success(at(3600)));
        assert!(breaker.is_closed());
        // Soon after, it is left alone for longer still.
        breaker.failure(at(4000), true, 0);
        assert_eq!(breaker.state(), State::Open { until: at(8000) });
    }

    #[test]
    fn a_probe_without_any_answer_is_followed_by_another() {
        let mut breaker = Breaker::default();
        breaker.failure(at(0), true, 0);
        breaker.probe(at(1000));
        assert!(breaker.probe_is_due(at(11_000)));
    }
}
