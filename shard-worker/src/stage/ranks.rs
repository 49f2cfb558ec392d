//! [`Collective`] between workers: the compute thread's end of the links to the other ranks of its stage.
//!
//! ```text
//! compute thread ─► told ─► link task ══QUIC: Partial══► link task ─► heard ─► compute thread
//! ```
//!
//! A round is one message to each other rank and one from each. A link that is lost closes its queues,
//! which ends the wait; a rank that is silent is noticed by its link, one that computes for too long by
//! the head, whose steps have a deadline.

use std::time::{Duration, Instant};

use bytes::Bytes;
use shoal_protocol::model::Split;
use tokio::sync::mpsc;

use super::wire::RankEnd;
use crate::collective::{Collective, CollectiveError};

/// Messages that wait for the other rank: it is at most one round behind.
const ROUNDS_MAX: usize = 2;

/// The compute thread's ends of all links to its siblings.
#[derive(Debug)]
pub struct Ranks {
    split: Split,
    /// By rank; none to itself.
    to: Vec<Option<mpsc::Sender<Bytes>>>,
    from: Vec<Option<mpsc::Receiver<Bytes>>>,
    waited: Duration,
}

impl Ranks {
    /// The ends of a rank, and those of its links, in rank order without its own.
    pub fn new(split: Split, bytes_max: usize) -> (Self, Vec<RankEnd>) {
        let mut ranks = Self { split, to: Vec::new(), from: Vec::new(), waited: Duration::ZERO };
        let mut ends = Vec::new();
        for rank in 0..split.ranks {
            let (to, told) = mpsc::channel(ROUNDS_MAX);
            let (heard, from) = mpsc::channel(ROUNDS_MAX);
            let other = rank != split.rank;
            ranks.to.push(other.then_some(to));
            ranks.from.push(other.then_some(from));
            if other {
                ends.push(RankEnd { told, heard, bytes_max });
            }
        }
        (ranks, ends)
    }
}

fn gone(rank: usize) -> CollectiveError {
    CollectiveError::Gone { rank: rank as u32, why: "its link has ended".to_owned() }
}

impl Collective for Ranks {
    fn split(&self) -> Split {
        self.split
    }

    fn exchange(&mut self, parts: &[Bytes]) -> Result<Vec<Bytes>, CollectiveError> {
        for (rank, (to, part)) in self.to.iter().zip(parts).enumerate() {
            if let Some(to) = to {
                to.blocking_send(part.clone()).map_err(|_| gone(rank))?;
            }
        }
        let begun = Instant::now();
        let mut got = Vec::with_capacity(self.from.len());
        for (rank, from) in self.from.iter_mut().enumerate() {
            got.push(match from {
                Some(from) => from.blocking_recv().ok_or_else(|| gone(rank))?,
                None => Bytes::new(),
            });
        }
        self.waited += begun.elapsed();
        Ok(got)
    }

    fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the head takes for a slow worker is one that computes for long, not one that is kept waiting.
    #[test]
    #[allow(clippy::disallowed_methods, reason = "the other rank is late")]
    fn what_a_round_waits_for_is_known_and_counts_once() {
        let split = Split { rank: 0, ranks: 2 };
        let (mut ranks, mut ends) = Ranks::new(split, 16);
        let end = ends.remove(0);
        let late = Duration::from_millis(20);
        let other = std::thread::spawn(move || {
            std::thread::sleep(late);
            end.heard.blocking_send(Bytes::from_static(b"sum"))
        });
        let got = ranks.exchange(&[Bytes::new(), Bytes::from_static(b"part")]);
        assert_eq!(got, Ok(vec![Bytes::new(), Bytes::from_static(b"sum")]));
        assert!(other.join().is_ok_and(|sent| sent.is_ok()));
        let waited = ranks.take_waited();
        assert!(waited >= late / 2, "{waited:?}");
        assert_eq!(ranks.take_waited(), Duration::ZERO);
    }
}
