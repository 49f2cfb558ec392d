//! ○ How much may be tried again: a cluster that fails must not be buried under repetitions.
//!
//! Finagle's and linkerd's rule: a share of the requests of the last seconds, and a few a second
//! whatever the traffic, so that a lone client's request is tried again too.

use std::time::Duration;

use shoal_protocol::units::Instant;

/// Retries per request.
const SHARE: f64 = 0.2;

/// Retries a second that need no requests.
const FLOOR_PER_SECOND: f64 = 10.0;

/// How long requests and retries count.
const WINDOW: Duration = Duration::from_secs(10);

/// A budget of retries. One for all requests of a coordinator, or one per deployment.
#[derive(Clone, Copy, Debug, Default)]
pub struct RetryBudget {
    requests: f64,
    retries: f64,
    last: Instant,
}

impl RetryBudget {
    /// A request came, which is no retry.
    pub fn request(&mut self, now: Instant) {
        self.decay(now);
        self.requests += 1.0;
    }

    /// Takes one retry; false where the budget is used up: wait, and ask again.
    pub fn retry(&mut self, now: Instant) -> bool {
        self.decay(now);
        let allowed = SHARE * self.requests + FLOOR_PER_SECOND * WINDOW.as_secs_f64();
        let granted = self.retries + 1.0 <= allowed;
        if granted {
            self.retries += 1.0;
        }
        granted
    }

    fn decay(&mut self, now: Instant) {
        let keep = (-now.since(self.last).as_secs_f64() / WINDOW.as_secs_f64()).exp();
        self.last = self.last.max(now);
        self.requests *= keep;
        self.retries *= keep;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifth_of_the_requests_and_a_floor_may_be_tried_again() {
        // A minute in which every request fails and is tried again.
        for (per_second, share) in [(1000u64, 0.21), (20, 0.71)] {
            let mut budget = RetryBudget::default();
            let (mut requests, mut retries) = (0u32, 0u32);
            for i in 0..60 * per_second {
                let now = Instant(i * 1_000_000 / per_second);
                budget.request(now);
                requests += 1;
                retries += u32::from(budget.retry(now));
            }
            let seen = f64::from(retries) / f64::from(requests);
            assert!(seen <= share + 0.1, "{per_second}/s: {seen}");
            assert!(seen >= share - 0.01, "{per_second}/s: {seen}");
        }
    }

    #[test]
    fn a_lone_request_may_be_tried_again() {
        assert!(RetryBudget::default().retry(Instant(5)));
    }
}
