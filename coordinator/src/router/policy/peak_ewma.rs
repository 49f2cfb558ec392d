//! ○ Peak-EWMA with two choices, as finagle and linkerd have it: the cost of a replica is its latency,
//! which rises at once and falls slowly, times the requests that are open there. A failure counts as
//! a long latency, as in linkerd's load-biaser: else failing fast would attract traffic.

use shoal_protocol::units::Instant;

use super::super::book::Book;
use super::{Ask, two};

/// Seconds over which a cost falls: finagle's and linkerd's default.
const DECAY: f64 = 10.0;

/// What a failure counts as, in seconds: linkerd's.
const FAILURE: f64 = 5.0;

/// The cost of a replica without history that has a request open already: it gets exactly one.
const UNKNOWN: f64 = 1e6;

/// The moving latency of a replica.
#[derive(Clone, Copy, Debug, Default)]
pub struct PeakCost {
    cost: f64,
    last: Instant,
}

impl PeakCost {
    /// A request took so many seconds.
    pub fn seen(&mut self, now: Instant, seconds: f64) {
        if seconds > self.cost {
            self.cost = seconds;
        } else {
            let keep = self.keep(now);
            self.cost = self.cost * keep + seconds * (1.0 - keep);
        }
        self.last = now;
    }

    /// A request failed.
    pub fn failed(&mut self, now: Instant) {
        self.seen(now, FAILURE);
    }

    /// Its cost with so many open.
    pub fn load(&self, now: Instant, open: u32) -> f64 {
        let cost = self.cost * self.keep(now);
        if cost == 0.0 && open > 0 {
            return UNKNOWN + f64::from(open);
        }
        cost * f64::from(open + 1)
    }

    fn keep(&self, now: Instant) -> f64 {
        (-now.since(self.last).as_secs_f64() / DECAY).exp()
    }
}

/// One of two.
pub fn choose(books: &[Book], candidates: &[u32], ask: &Ask<'_>) -> u32 {
    let (a, b) = two(candidates, ask.dice);
    let load = |i: u32| {
        let book = &books[i as usize];
        book.peak.load(ask.now, book.load)
    };
    if load(b) < load(a) { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_rises_at_once_and_falls_slowly() {
        let mut peak = PeakCost::default();
        assert_eq!(peak.load(Instant(0), 0), 0.0);
        assert!(peak.load(Instant(0), 1) > UNKNOWN, "one probe");
        peak.seen(Instant(0), 0.1);
        peak.seen(Instant(0), 0.4);
        assert_eq!(peak.load(Instant(0), 1), 0.8);
        peak.seen(Instant(10_000_000), 0.1);
        let expected = 0.4 * (-1.0f64).exp() + 0.1 * (1.0 - (-1.0f64).exp());
        assert!((peak.load(Instant(10_000_000), 0) - expected).abs() < 1e-9);
    }
}
