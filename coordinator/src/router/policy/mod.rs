//! ○ Which replica: five ways to choose among those that the filters left.

pub mod dynamic_wrr;
pub mod p2c;
pub mod peak_ewma;
pub mod round_robin;
pub mod score;

use std::fmt;
use std::str::FromStr;

use shoal_protocol::units::Instant;

use super::book::Book;

/// How to choose among replicas that could all serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Policy {
    /// The least estimated time until the answer is complete. See `score`.
    #[default]
    Score,
    /// Smooth weighted round robin whose weights follow failures, as dl_inference documents it.
    DynamicWrr,
    /// In turn.
    RoundRobin,
    /// The one with less open of two drawn.
    P2c,
    /// The one with less peak latency times open requests, of two drawn.
    PeakEwma,
}

/// What a policy is told of a request.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// The time.
    pub now: Instant,
    /// Breaks ties, so that several coordinators do not all choose the same one.
    pub dice: u64,
    /// Sequences.
    pub sequences: u32,
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Tokens that each answer will probably have.
    pub answer: f64,
    /// The prompt's blocks, where replicas keep them; else empty.
    pub hashes: &'a [u64],
    /// Picks of the deployment so far.
    pub picks: u64,
    /// The fastest replica's seconds between tokens: at zero rows, and per row.
    pub fastest: (f64, f64),
}

impl Policy {
    /// Each of them.
    pub const ALL: [Policy; 5] =
        [Policy::Score, Policy::DynamicWrr, Policy::RoundRobin, Policy::P2c, Policy::PeakEwma];

    /// Its name in flags and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Score => "score",
            Policy::DynamicWrr => "dynamic_wrr",
            Policy::RoundRobin => "round_robin",
            Policy::P2c => "p2c",
            Policy::PeakEwma => "peak_ewma",
        }
    }

    /// One of the candidates, of which there is at least one. `turn` counts the picks.
    pub fn choose(
        self,
        books: &mut [Book],
        candidates: &[u32],
        ask: &Ask<'_>,
        turn: &mut u64,
    ) -> u32 {
        if let [only] = candidates {
            return *only;
        }
        match self {
            Policy::Score => score::choose(books, candidates, ask),
            Policy::DynamicWrr => dynamic_wrr::choose(books, candidates),
            Policy::RoundRobin => round_robin::choose(candidates, turn),
            Policy::P2c => p2c::choose(books, candidates, ask.dice),
            Policy::PeakEwma => peak_ewma::choose(books, candidates, ask),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A word that names no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no routing policy; there are score (the default), dynamic_wrr, round_robin, p2c and \
     peak_ewma"
)]
pub struct UnknownPolicy(pub String);

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        let found = Policy::ALL.into_iter().find(|policy| policy.name() == text);
        found.ok_or_else(|| UnknownPolicy(text.chars().take(64).collect()))
    }
}

/// Two different candidates, drawn by the dice. There must be two at least.
fn two(candidates: &[u32], dice: u64) -> (u32, u32) {
    let n = candidates.len() as u64;
    let first = (dice >> 32) % n;
    let second = (first + 1 + (dice & 0xffff_ffff) % (n - 1)) % n;
    (candidates[first as usize], candidates[second as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_are_told_the_choice() {
        for policy in Policy::ALL {
            assert_eq!(policy.name().parse(), Ok(policy));
        }
        let error = "wrr".parse::<Policy>().expect_err("no policy");
        assert!(error.to_string().contains("dynamic_wrr"), "{error}");
    }

    #[test]
    fn every_pair_is_drawn_and_none_twice_the_same() {
        let mut dice = super::super::dice::Dice::new(1);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..500 {
            let (a, b) = two(&[3, 5, 9], dice.bits());
            assert_ne!(a, b);
            seen.insert((a, b));
        }
        assert_eq!(seen.len(), 6);
    }
}
