//! Ranks that are threads of one process: for tests, and to see what a mesh computes without workers.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;
use shoal_protocol::model::Split;

use super::{Collective, CollectiveError};

/// Messages that wait for the other rank: it is at most one round behind.
const ROUNDS_MAX: usize = 2;

/// One rank's end of channels to all others.
#[derive(Debug)]
pub struct Local {
    split: Split,
    /// By rank; none to itself.
    to: Vec<Option<SyncSender<Bytes>>>,
    from: Vec<Option<Receiver<Bytes>>>,
}

impl Local {
    /// The ends of all ranks of a stage, in rank order.
    pub fn stage(ranks: u32) -> Vec<Self> {
        let mut ends: Vec<Self> = (0..ranks)
            .map(|rank| Self {
                split: Split { rank, ranks },
                to: (0..ranks).map(|_| None).collect(),
                from: (0..ranks).map(|_| None).collect(),
            })
            .collect();
        for a in 0..ranks as usize {
            for b in (0..ranks as usize).filter(|b| *b != a) {
                let (to, from) = sync_channel(ROUNDS_MAX);
                ends[a].to[b] = Some(to);
                ends[b].from[a] = Some(from);
            }
        }
        ends
    }
}

fn gone(rank: usize) -> CollectiveError {
    CollectiveError::Gone { rank: rank as u32, why: "its thread has ended".to_owned() }
}

impl Collective for Local {
    fn split(&self) -> Split {
        self.split
    }

    fn exchange(&mut self, parts: &[Bytes]) -> Result<Vec<Bytes>, CollectiveError> {
        for (rank, (to, part)) in self.to.iter().zip(parts).enumerate() {
            if let Some(to) = to {
                to.send(part.clone()).map_err(|_| gone(rank))?;
            }
        }
        let take = |(rank, from): (usize, &Option<Receiver<Bytes>>)| match from {
            Some(from) => from.recv().map_err(|_| gone(rank)),
            None => Ok(Bytes::new()),
        };
        self.from.iter().enumerate().map(take).collect()
    }
}
