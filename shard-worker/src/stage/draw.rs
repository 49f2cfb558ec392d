//! Draws of a last stage whose vocabulary is cut over its ranks: a round in which each tells the others
//! what it knows of every row, and for the rows that this does not decide one round each with the row
//! itself. Every rank draws, so that all know what their sequences have seen; rank 0 tells the head.

use std::ops::Range;

use bytes::Bytes;
use shoal_protocol::activation::{RowRecord, Sample, Samples, Step};
use shoal_protocol::id::{SequenceId, StepId, TokenId};
use shoal_protocol::model::Split;
use shoal_protocol::plan::ReplicaLimits;

use super::table::{StageFault, StageTable};
use crate::collective::{Collective, CollectiveError, expect_bytes};
use crate::sample::ranks::Summary;
use crate::sample::{Drawn, SampleError, SamplerState};

/// What a row's summary takes at most beside its sums by block: `ranks::TOLD_MAX` tokens and the
/// alternatives, as they are encoded.
const SUMMARY_BYTES_MAX: usize = 24 << 10;

/// What the sums by block take for each token of the vocabulary: two pairs of f64 for 1,024 tokens,
/// generously; and a row that is gathered, four bytes a token.
const TOKEN_BYTES_MAX: usize = 5;

/// The longest message of a draw.
pub fn round_bytes_max(limits: &ReplicaLimits, vocab: usize) -> usize {
    let summaries = limits.sample_rows_max() as usize * (SUMMARY_BYTES_MAX + vocab / 16);
    summaries.max(vocab * TOKEN_BYTES_MAX)
}

/// A draw that came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum DrawError {
    /// The step does not fit what the stage knows.
    #[error(transparent)]
    Fault(#[from] StageFault),
    /// Another rank is gone, or said what it may not.
    #[error(transparent)]
    Peers(#[from] CollectiveError),
}

/// This rank's part of the rows that sample.
pub struct OwnLogits<'a> {
    /// The first token of the part.
    pub first: TokenId,
    /// How many tokens.
    pub width: usize,
    /// How many the parts of all ranks are.
    pub vocab: u32,
    /// A row after the other.
    pub logits: &'a [f32],
}

impl OwnLogits<'_> {
    /// The part of another rank.
    fn part_of(&self, rank: usize, ranks: u32) -> Range<TokenId> {
        Split { rank: rank as u32, ranks }.vocab(self.vocab)
    }

    fn row(&self, index: usize) -> &[f32] {
        self.logits.get(index * self.width..(index + 1) * self.width).unwrap_or_default()
    }

    /// A whole row out of the parts of all ranks. A part of another length would shift all tokens behind it.
    fn gather_row(
        &self,
        index: usize,
        peers: &mut dyn Collective,
    ) -> Result<Vec<f32>, CollectiveError> {
        let (own, rank) = (self.row(index), peers.split().rank as usize);
        let got = peers.share(Bytes::copy_from_slice(bytemuck::cast_slice(own)))?;
        let mut whole = Vec::with_capacity(self.vocab as usize);
        for (r, part) in got.iter().enumerate() {
            if r == rank {
                whole.extend_from_slice(own);
            } else {
                expect_bytes(r, part, size_of::<f32>() * self.part_of(r, got.len() as u32).len())?;
                whole.extend(part.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)));
            }
        }
        Ok(whole)
    }
}

impl StageTable {
    /// Draws one token for each row of the step that samples, together with the other ranks.
    pub fn draw_cut(
        &mut self,
        step: &Step,
        own: &OwnLogits<'_>,
        peers: &mut dyn Collective,
    ) -> Result<Samples, DrawError> {
        let rows: Vec<RowRecord> = step.rows.iter().filter(|row| row.samples()).copied().collect();
        let (found, expected) = (own.logits.len(), rows.len() * own.width);
        if found != expected {
            let (rows, vocab) = (rows.len(), own.width);
            return Err(StageFault::WrongLogits { found, rows, vocab }.into());
        }
        let told = self.tell(&rows, own, peers)?;
        let mut samples = Vec::with_capacity(rows.len());
        for (index, row) in rows.iter().enumerate() {
            let of_row: Vec<Summary> =
                told.iter().filter_map(|rank| rank.get(index).cloned()).collect();
            let sample = match self.decide(row, &of_row)? {
                Some(sample) => sample,
                // All ranks find the same, so all gather the same rows.
                None => {
                    let whole = own.gather_row(index, peers)?;
                    self.draw_row(row, &whole)?
                }
            };
            samples.push(sample);
        }
        let (generation, step) = (self.generation, StepId(step.header.step));
        Ok(Samples { generation, step, samples, vectors: Vec::new() })
    }

    /// By rank and by row: what it knows.
    fn tell(
        &mut self,
        rows: &[RowRecord],
        own: &OwnLogits<'_>,
        peers: &mut dyn Collective,
    ) -> Result<Vec<Vec<Summary>>, DrawError> {
        let mut mine = Vec::with_capacity(rows.len());
        for (index, row) in rows.iter().enumerate() {
            mine.push(self.summarise(row, (own.first, own.row(index)))?);
        }
        let rank = peers.split().rank as usize;
        let got = peers.share(Bytes::from(Summary::encode(&mine)))?;
        let mut told = Vec::with_capacity(got.len());
        for (r, bytes) in got.iter().enumerate() {
            if r == rank {
                told.push(std::mem::take(&mut mine));
                continue;
            }
            let bad = |why: String| CollectiveError::NotTold { rank: r as u32, why };
            let of_rank = Summary::decode(bytes, rows.len()).ok_or_else(|| {
                bad(format!("{} bytes that are not a summary of {} rows", bytes.len(), rows.len()))
            })?;
            let part = own.part_of(r, got.len() as u32);
            for (row, summary) in rows.iter().zip(&of_rank) {
                self.sampler(row)?.check_told(summary, part.clone()).map_err(bad)?;
            }
            told.push(of_rank);
        }
        Ok(told)
    }

    fn summarise(
        &mut self,
        row: &RowRecord,
        own: (TokenId, &[f32]),
    ) -> Result<Summary, StageFault> {
        let sequence = SequenceId(row.sequence);
        let sampler = self.sequences.get(&sequence).and_then(|entry| entry.sampler.as_ref());
        let sampler = sampler.ok_or(StageFault::UnknownSequence(sequence))?;
        match sampler.summarise(&mut self.scratch, own, row.position) {
            Ok(summary) => Ok(summary),
            Err(SampleError::Position { found, expected }) => {
                Err(StageFault::NotLastToken { sequence, found, expected })
            }
            // It is told as part of the summary.
            Err(SampleError::NonFinite { token, value }) => {
                Ok(Summary::of_non_finite(own.0 + token, value))
            }
            Err(SampleError::NoLogits) => Ok(Summary::default()),
        }
    }

    fn sampler(&self, row: &RowRecord) -> Result<&SamplerState, StageFault> {
        let sequence = SequenceId(row.sequence);
        let sampler = self.sequences.get(&sequence).and_then(|entry| entry.sampler.as_ref());
        sampler.ok_or(StageFault::UnknownSequence(sequence))
    }

    fn decide(&mut self, row: &RowRecord, told: &[Summary]) -> Result<Option<Sample>, StageFault> {
        let sequence = SequenceId(row.sequence);
        let sampler = self.sequences.get_mut(&sequence).and_then(|e| e.sampler.as_mut());
        let sampler = sampler.ok_or(StageFault::UnknownSequence(sequence))?;
        let drawn = sampler.decide(&mut self.scratch, told).transpose();
        drawn.map(|drawn| sample_of(row, drawn)).transpose()
    }
}

/// What the head is told of a draw: of one without a number, that there is no token.
pub(super) fn sample_of(
    row: &RowRecord,
    drawn: Result<Drawn, SampleError>,
) -> Result<Sample, StageFault> {
    let sequence = SequenceId(row.sequence);
    let (token, logprob, candidates) = match drawn {
        Ok(drawn) => (drawn.token, drawn.logprob, drawn.candidates),
        Err(SampleError::NonFinite { .. } | SampleError::NoLogits) => {
            (Sample::NO_TOKEN, f32::NAN, Vec::new())
        }
        Err(SampleError::Position { found, expected }) => {
            return Err(StageFault::NotLastToken { sequence, found, expected });
        }
    };
    Ok(Sample { sequence, position: row.position, token, logprob, candidates })
}

#[cfg(test)]
#[path = "draw_test.rs"]
mod tests;
