//! ○ A simulated deployment with one bad replica: what each policy makes of it.
//!
//! ```text
//! Poisson arrivals (open loop) ─► router ─► heads with continuous batching ─► tokens ─► router
//!                                   ▲ a report of every head each 250 ms, as in the cluster
//! ```
//!
//! Discrete events under a seed: the same scenario and seed give the same figures. What is not here:
//! the network, which is the same for every policy. The tests hold the bounds; `shoal-bench route`
//! prints the tables.

mod head;
mod run;
pub mod scenarios;

pub use head::Service;
pub use run::run;

use super::policy::Policy;

/// Who chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chooser {
    /// Our router.
    Router(Policy),
    /// Somebody who knows how fast every replica is, what it has open and how long each answer
    /// becomes, and takes the replica that completes the request first.
    Oracle,
}

impl Chooser {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Chooser::Router(policy) => policy.name(),
            Chooser::Oracle => "oracle",
        }
    }
}

/// What happens to a replica.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// It takes so many times as long as it should from now on; 1: it is well again.
    Slow(f64),
    /// It takes requests and says nothing.
    Freeze,
    /// It refuses every request with an error after a millisecond; or no longer.
    FailFast(bool),
}

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Its name in tables.
    pub name: &'static str,
    /// What steps take.
    pub service: Service,
    /// How much slower each replica is from the start.
    pub slow: Vec<f64>,
    /// The mean tokens of a prompt; exponential, at most four times as many.
    pub prompt: f64,
    /// The mean tokens of an answer; likewise.
    pub answer: f64,
    /// Answers a second, over what the replicas carry as they are at the start.
    pub load: f64,
    /// Seconds before anything is measured.
    pub warm_up: f64,
    /// Seconds of arrivals that are measured.
    pub measured: f64,
    /// When, which replica, what.
    pub faults: Vec<(f64, usize, Fault)>,
    /// Seconds of silence after which a try counts as lost and is made elsewhere.
    pub patience: Option<f64>,
    /// Routers that do not know of each other, each with an equal share of the requests.
    pub routers: usize,
}

/// What came out.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Seconds from arrival to the last token of each measured request, sorted.
    pub times: Vec<f64>,
    /// Measured requests that failed.
    pub errors: usize,
    /// Tries that were repetitions.
    pub retries: usize,
    /// Per second of simulated time: requests, and of these to replica 0, the bad one.
    pub shares: Vec<(u32, u32)>,
}

impl Figures {
    /// A quantile of the times, 0 to 1.
    pub fn quantile(&self, q: f64) -> f64 {
        let last = self.times.len().saturating_sub(1);
        self.times.get((q * last as f64).round() as usize).copied().unwrap_or(f64::NAN)
    }

    /// Percent of measured requests that failed.
    pub fn error_percent(&self) -> f64 {
        100.0 * self.errors as f64 / (self.errors + self.times.len()).max(1) as f64
    }

    /// The bad replica's share of the requests in these seconds.
    pub fn share(&self, from: usize, to: usize) -> f64 {
        let seconds = self.shares.iter().take(to).skip(from);
        let (all, bad) = seconds.fold((0, 0), |sum, s| (sum.0 + s.0, sum.1 + s.1));
        f64::from(bad) / f64::from(all.max(1))
    }

    /// Seconds from `start` until the share over two seconds passes the test for the first time.
    pub fn until(&self, start: usize, passes: impl Fn(f64) -> bool) -> Option<usize> {
        (start..self.shares.len().saturating_sub(1))
            .find(|from| passes(self.share(*from, from + 2)))
            .map(|from| from - start)
    }
}

/// The median of figures of several seeds.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
#[path = "sim_test.rs"]
mod tests;
