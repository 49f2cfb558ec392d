//! What the tensor ranks of a stage tell each other in the middle of a step.
//!
//! ```text
//! layer: partial sums ─► all_reduce ─► every rank has rank 0's + rank 1's + … , the same bits everywhere
//!        own columns  ─► all_gather ─► every rank has all columns
//! ```
//!
//! [`Collective`] is the seam: bytes to every other rank, bytes from every other rank, in lock-step. Who
//! carries them is another matter: threads of one process here ([`local`]), QUIC between workers
//! (`stage::ranks`), NCCL between GPUs (`backend::nccl`, compiled only). The arithmetic stands above it
//! once, in fixed rank order, so that a mesh repeats itself bit for bit whoever carries its messages and however long they are.

pub mod local;

use std::time::Duration;

use bytes::Bytes;
use shoal_protocol::model::Split;

/// Messages up to so many bytes go from every rank to every rank: one hop. Longer ones of more than two
/// ranks are cut: each rank adds one piece for all, which moves 2(R-1)/R of the bytes instead of R-1.
pub const DIRECT_BYTES_MAX: usize = 64 << 10;

/// Carries bytes between the ranks of a stage. All ranks call it the same number of times, in the same
/// order: each call is one round.
pub trait Collective: Send {
    /// Which rank this is.
    fn split(&self) -> Split;

    /// Sends `parts[r]` to each other rank `r` and waits for what they sent in this round: one entry a
    /// rank, in rank order, the own one empty. The length of what came is not checked here.
    fn exchange(&mut self, parts: &[Bytes]) -> Result<Vec<Bytes>, CollectiveError>;

    /// How long rounds have waited for other ranks since this was last asked: a rank that waits is not slow.
    fn take_waited(&mut self) -> Duration {
        Duration::ZERO
    }
}

/// A round that was not completed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// Another rank is gone.
    #[error("rank {rank} of this stage is gone: {why}")]
    Gone {
        /// Which.
        rank: u32,
        /// What is known.
        why: String,
    },
    /// What carries messages has failed, and does not say at which rank.
    #[error("the ranks of this stage do not reach each other: {why}")]
    Carrier {
        /// What is known.
        why: String,
    },
    /// Another rank sent something of another length than the plan says.
    #[error("rank {rank} of this stage sent {found} bytes where the plan has {expected}")]
    WrongLength {
        /// Which.
        rank: u32,
        /// Its bytes.
        found: usize,
        /// What this rank worked out.
        expected: usize,
    },
    /// Another rank told of a draw what does not fit the rows that are drawn.
    #[error("rank {rank} of this stage told of a draw what it may not: {why}")]
    NotTold {
        /// Which.
        rank: u32,
        /// What does not fit.
        why: String,
    },
}

/// The one rank of a stage that is not cut: it has nobody to talk to.
#[derive(Clone, Copy, Debug)]
pub struct Alone;

impl Collective for Alone {
    fn split(&self) -> Split {
        Split::WHOLE
    }

    fn exchange(&mut self, _parts: &[Bytes]) -> Result<Vec<Bytes>, CollectiveError> {
        Ok(vec![Bytes::new()])
    }
}

impl dyn Collective + '_ {
    /// Sends the same bytes to every other rank.
    pub fn share(&mut self, own: Bytes) -> Result<Vec<Bytes>, CollectiveError> {
        let parts = vec![own; self.split().ranks as usize];
        self.exchange(&parts)
    }

    /// Makes `values` the sum over all ranks, added in rank order. All ranks give as many.
    pub fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let ranks = self.split().ranks as usize;
        if ranks <= 1 {
            return Ok(());
        }
        if ranks == 2 || size_of_val(values) <= DIRECT_BYTES_MAX {
            let got = self.share(bytes_of(values))?;
            return self.add_in_order(values, &got);
        }
        self.all_reduce_in_pieces(values)
    }

    /// Piece `r` goes to rank `r`, which adds what all have sent it; then the sums are gathered. Each
    /// number is still added in rank order.
    fn all_reduce_in_pieces(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let Split { rank, ranks } = self.split();
        let border = |r: u32| values.len() * r as usize / ranks as usize;
        let borders: Vec<_> = (0..ranks).map(|r| border(r)..border(r + 1)).collect();
        let parts: Vec<Bytes> = borders.iter().map(|b| bytes_of(&values[b.clone()])).collect();
        let got = self.exchange(&parts)?;
        let own = borders[rank as usize].clone();
        self.add_in_order(&mut values[own.clone()], &got)?;
        let sums = self.share(bytes_of(&values[own]))?;
        for (r, (border, sums)) in borders.into_iter().zip(&sums).enumerate() {
            if r != rank as usize {
                copy_floats(r, sums, &mut values[border])?;
            }
        }
        Ok(())
    }

    /// `values` is this rank's summand; `got` has the others'.
    fn add_in_order(&self, values: &mut [f32], got: &[Bytes]) -> Result<(), CollectiveError> {
        let Split { rank, .. } = self.split();
        let own = values.to_vec();
        let mut first = true;
        for (r, got) in got.iter().enumerate() {
            let mut add = |summand: &mut dyn Iterator<Item = f32>| {
                if std::mem::take(&mut first) {
                    values.iter_mut().zip(summand).for_each(|(to, x)| *to = x);
                } else {
                    values.iter_mut().zip(summand).for_each(|(to, x)| *to += x);
                }
            };
            if r == rank as usize {
                add(&mut own.iter().copied());
            } else {
                expect_bytes(r, got, size_of_val(own.as_slice()))?;
                add(&mut floats(got));
            }
        }
        Ok(())
    }

    /// Puts the columns of all ranks side by side: each has `rows` rows of `widths[r]` values, `own` are
    /// this rank's; `all` is `rows x (sum of widths)`.
    pub fn all_gather(
        &mut self,
        own: &[f32],
        widths: &[usize],
        rows: usize,
        all: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let rank = self.split().rank as usize;
        let got = self.share(bytes_of(own))?;
        let width_all: usize = widths.iter().sum();
        let mut first = 0;
        for (r, (&width, got)) in widths.iter().zip(&got).enumerate() {
            let to = all.chunks_exact_mut(width_all.max(1)).take(rows);
            let to = to.map(|row| &mut row[first..first + width]);
            if r == rank {
                to.zip(own.chunks_exact(width.max(1))).for_each(|(to, x)| to.copy_from_slice(x));
            } else {
                expect_bytes(r, got, rows * width * size_of::<f32>())?;
                let mut values = floats(got);
                for to in to {
                    to.iter_mut().zip(&mut values).for_each(|(to, x)| *to = x);
                }
            }
            first += width;
        }
        Ok(())
    }
}

fn bytes_of(values: &[f32]) -> Bytes {
    Bytes::copy_from_slice(bytemuck::cast_slice(values))
}

/// What came need not be aligned.
fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value))
}

fn copy_floats(rank: usize, from: &Bytes, to: &mut [f32]) -> Result<(), CollectiveError> {
    expect_bytes(rank, from, size_of_val(to))?;
    to.iter_mut().zip(floats(from)).for_each(|(to, x)| *to = x);
    Ok(())
}

pub(crate) fn expect_bytes(
    rank: usize,
    got: &Bytes,
    expected: usize,
) -> Result<(), CollectiveError> {
    if got.len() == expected {
        return Ok(());
    }
    Err(CollectiveError::WrongLength { rank: rank as u32, found: got.len(), expected })
}

#[cfg(test)]
mod collective_test;
