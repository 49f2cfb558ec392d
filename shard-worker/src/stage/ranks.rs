//! [`Collective`] between workers: the compute thread's end of the links to the other ranks of its stage.
//!
//! ```text
//! compute thread ─► told ─► link task ══QUIC: Partial══► link task ─► heard ─► compute thread
//! compute thread ═══════════ a socket, where both are on one machine ([`near`](super::near)) ═══════════► compute thread
//! ```
//!
//! A round is one message to each other rank and one from each. A link that is lost closes its queues,
//! which ends the wait; a rank that is silent is noticed by its link, one that computes for too long by
//! the head, whose steps have a deadline.

use std::time::{Duration, Instant};

use bytes::Bytes;
use shoal_protocol::model::Split;
use tokio::sync::{mpsc, oneshot};

use super::near::{Near, Round, carry};
use super::wire::RankEnd;
use crate::collective::{Collective, CollectiveError};

/// Messages that wait for the other rank: it is at most one round behind.
const ROUNDS_MAX: usize = 2;

/// The compute thread's ends of all ways to its siblings.
#[derive(Debug)]
pub struct Ranks {
    split: Split,
    /// By rank; none to itself.
    others: Vec<Option<Other>>,
    waited: Duration,
}

/// The ways to one of them.
#[derive(Debug)]
struct Other {
    /// Until their link is up, which says whether there is a shorter way.
    coming: Option<oneshot::Receiver<Near>>,
    near: Option<Near>,
    /// The link's queues.
    to: mpsc::Sender<Bytes>,
    from: mpsc::Receiver<Bytes>,
}

impl Ranks {
    /// The ends of a rank, and those of its links, in rank order without its own.
    pub fn new(split: Split, bytes_max: usize) -> (Self, Vec<RankEnd>) {
        let mut ranks = Self { split, others: Vec::new(), waited: Duration::ZERO };
        let mut ends = Vec::new();
        for rank in 0..split.ranks {
            if rank == split.rank {
                ranks.others.push(None);
                continue;
            }
            let (to, told) = mpsc::channel(ROUNDS_MAX);
            let (heard, from) = mpsc::channel(ROUNDS_MAX);
            let (near, coming) = oneshot::channel();
            ranks.others.push(Some(Other { coming: Some(coming), near: None, to, from }));
            ends.push(RankEnd { told, heard, near, bytes_max });
        }
        (ranks, ends)
    }

    /// How many of the others are reached over a socket of this machine: known from the first round on.
    pub fn beside(&self) -> usize {
        self.others.iter().flatten().filter(|other| other.near.is_some()).count()
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
        for (rank, other) in self.others.iter_mut().enumerate() {
            let Some(other) = other else { continue };
            if let Some(coming) = other.coming.take() {
                // Nothing comes of a link that is the way, or of one that is lost, as its queues will tell.
                other.near = coming.blocking_recv().ok();
            }
            if other.near.is_none() {
                other.to.blocking_send(parts[rank].clone()).map_err(|_| gone(rank))?;
            }
        }
        let begun = Instant::now();
        let mut got = vec![Bytes::new(); self.others.len()];
        let mut rounds = Vec::new();
        for (rank, other) in self.others.iter_mut().enumerate() {
            if let Some(Other { near: Some(near), .. }) = other {
                rounds.push(Round::begin(rank, near, &parts[rank]));
            }
        }
        for (rank, message) in carry(rounds)? {
            got[rank] = message;
        }
        for (rank, other) in self.others.iter_mut().enumerate() {
            if let Some(Other { near: None, from, .. }) = other {
                got[rank] = from.blocking_recv().ok_or_else(|| gone(rank))?;
            }
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
        let RankEnd { heard, near, told: _told, .. } = ends.remove(0);
        // There is no shorter way.
        drop(near);
        let late = Duration::from_millis(20);
        let other = std::thread::spawn(move || {
            std::thread::sleep(late);
            heard.blocking_send(Bytes::from_static(b"sum"))
        });
        let got = ranks.exchange(&[Bytes::new(), Bytes::from_static(b"part")]);
        assert_eq!(got, Ok(vec![Bytes::new(), Bytes::from_static(b"sum")]));
        assert!(other.join().is_ok_and(|sent| sent.is_ok()));
        let waited = ranks.take_waited();
        assert!(waited >= late / 2, "{waited:?}");
        assert_eq!(ranks.take_waited(), Duration::ZERO);
    }
}
