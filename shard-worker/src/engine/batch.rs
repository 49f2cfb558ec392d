//! A step under construction: rows, grants and ids side by side.

use shoal_protocol::activation::{BlockGrant, RowRecord, Step, StepHeader};
use shoal_protocol::id::{Generation, SequenceId, StepId, TokenId};

use super::Arrival;
use super::pipeline::Part;
use super::sequence::Issued;

/// What goes into one step.
#[derive(Debug, Default)]
pub(super) struct Batch {
    rows: Vec<RowRecord>,
    grants: Vec<BlockGrant>,
    tokens: Vec<TokenId>,
    parts: Vec<Part>,
}

impl Batch {
    /// Rows so far.
    pub fn rows(&self) -> u32 {
        self.rows.len() as u32
    }

    /// Grants so far.
    pub fn grants(&self) -> u32 {
        self.grants.len() as u32
    }

    /// Adds the rows of one sequence.
    pub fn add(&mut self, arrival: Arrival, issued: &Issued<'_>) {
        let sequence = issued.id;
        let last = issued.tokens.len().saturating_sub(1);
        for i in 0..issued.tokens.len() {
            let flags = if issued.sample && i == last { RowRecord::SAMPLE } else { 0 };
            let position = issued.first_position + i as u32;
            self.rows.push(RowRecord { sequence: sequence.0, position, flags });
        }
        self.tokens.extend_from_slice(issued.tokens);
        let grants = issued.grants.iter().enumerate().map(|(i, &block)| {
            let flags = if i < issued.shared { BlockGrant::SHARED } else { 0 };
            BlockGrant { sequence: sequence.0, block, flags }
        });
        self.grants.extend(grants);
        self.parts.push(Part {
            arrival,
            sequence: SequenceId(sequence.0),
            first_position: issued.first_position,
            rows: issued.tokens.len() as u32,
            sample: issued.sample,
        });
    }

    /// The step, its ids, and what is to be remembered of it.
    pub fn finish(self, generation: Generation, step: StepId) -> (Step, Vec<TokenId>, Vec<Part>) {
        let header = StepHeader {
            generation: generation.0,
            step: step.0,
            rows: self.rows.len() as u32,
            grants: self.grants.len() as u32,
            samples: self.parts.iter().filter(|part| part.sample).count() as u32,
            reserved: 0,
        };
        (Step { header, rows: self.rows, grants: self.grants }, self.tokens, self.parts)
    }
}
