//! How long a worker takes new work without a word from any coordinator.

use std::time::Duration;

use crate::units::Instant;

/// The length of a lease: a coordinator that is restarted is back well before, and a worker that
/// nobody could plan around for so long may have been planned away.
pub const LEASE: Duration = Duration::from_secs(5);

/// A worker's lease. It guards resources, not correctness: what a worker sends late is refused by
/// those who receive it, whatever it believes. Any coordinator renews it, without asking others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Lease {
    until: Option<Instant>,
}

impl Lease {
    /// A coordinator was heard at `now`.
    pub fn renew(&mut self, now: Instant) {
        self.until = self.until.max(Some(now + LEASE));
    }

    /// Whether new work may be taken. A worker that has not heard of any coordinator has none.
    pub fn holds(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_holds_until_no_coordinator_was_heard_for_its_length() {
        let mut lease = Lease::default();
        assert!(!lease.holds(Instant(0)), "nobody has been heard");
        lease.renew(Instant(7));
        lease.renew(Instant(3));
        assert!(lease.holds(Instant(6) + LEASE));
        assert!(!lease.holds(Instant(7) + LEASE));
        lease.renew(Instant(9) + LEASE);
        assert!(lease.holds(Instant(9) + LEASE), "one that is back renews it");
    }
}
