//! What a step may be: checked once at a shard's door, so that nothing behind it has to.

use shoal_protocol::plan::{BLOCK_TOKENS, ReplicaLimits};

use crate::model::{Batch, ComputeError, Span};

/// The bounds of one shard's steps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepBounds {
    /// The most rows of a step.
    pub(crate) rows_max: usize,
    /// The longest sequence, in tokens.
    pub(crate) context_max: u32,
    /// Blocks of the cache.
    pub(crate) kv_blocks: u32,
    /// The width of the residual stream.
    pub(crate) hidden: usize,
    /// The width of a row of logits; `None` on a stage without output head.
    pub(crate) vocab: Option<usize>,
    /// Whether steps begin with tokens.
    pub(crate) takes_tokens: bool,
}

impl StepBounds {
    /// The bounds that a plan gives a shard.
    pub(crate) fn new(
        limits: &ReplicaLimits,
        hidden: u32,
        vocab: Option<u32>,
        takes_tokens: bool,
    ) -> Self {
        Self {
            rows_max: limits.step_rows_max as usize,
            context_max: limits.context_max,
            kv_blocks: limits.kv_blocks,
            hidden: hidden as usize,
            vocab: vocab.map(|vocab| vocab as usize),
            takes_tokens,
        }
    }

    /// Refuses a step that does not fit; says which part of it.
    pub(crate) fn check(
        &self,
        batch: &Batch<'_>,
        tokens: Option<&[u32]>,
        hidden: &[f32],
        logits: Option<&[f32]>,
    ) -> Result<(), ComputeError> {
        let bad = |what: String| Err(ComputeError::BadBatch(what));
        let rows = batch.rows;
        if rows == 0 || rows > self.rows_max {
            return bad(format!("{rows} rows; expected 1 to {}", self.rows_max));
        }
        if hidden.len() != rows * self.hidden {
            return bad(format!(
                "{} floats of hidden states; expected {rows} rows of {}",
                hidden.len(),
                self.hidden
            ));
        }
        match (tokens, self.takes_tokens) {
            (Some(tokens), true) if tokens.len() == rows => {}
            (Some(tokens), true) => return bad(format!("{} tokens for {rows} rows", tokens.len())),
            (None, true) => return bad("no tokens at the first stage".into()),
            (Some(_), false) => return bad("tokens at a stage that is not the first".into()),
            (None, false) => {}
        }
        let mut next = 0;
        for span in batch.spans {
            if span.first_row != next || span.rows == 0 {
                return bad(format!(
                    "a span of rows {}+{} after {next}",
                    span.first_row, span.rows
                ));
            }
            next += span.rows;
            self.check_span(span)?;
        }
        if next != rows {
            return bad(format!("spans of {next} rows in a batch of {rows}"));
        }
        let ascending = batch.sample_rows.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || batch.sample_rows.last().is_some_and(|&row| row >= rows) {
            return bad(format!("sample rows {:?} of {rows} rows", batch.sample_rows));
        }
        match (logits, self.vocab) {
            (Some(_), None) => bad("logits asked of a stage without output head".into()),
            (Some(logits), Some(vocab)) if logits.len() != batch.sample_rows.len() * vocab => {
                bad(format!(
                    "room for {} logits; expected {} rows of {vocab}",
                    logits.len(),
                    batch.sample_rows.len()
                ))
            }
            _ => Ok(()),
        }
    }

    fn check_span(&self, span: &Span<'_>) -> Result<(), ComputeError> {
        let bad = |what: String| Err(ComputeError::BadBatch(what));
        let end = span.first_position as usize + span.rows;
        if end > self.context_max as usize {
            return bad(format!("positions up to {end} of a context of {}", self.context_max));
        }
        let needed = end.div_ceil(BLOCK_TOKENS as usize);
        let Some(used) = span.blocks.get(..needed) else {
            return bad(format!("{} blocks for {end} positions", span.blocks.len()));
        };
        match used.iter().find(|&&block| block >= self.kv_blocks) {
            Some(block) => bad(format!("block {block} of a cache of {}", self.kv_blocks)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_does_not_fit_is_refused_with_the_part_that_does_not() {
        const BOUNDS: StepBounds = StepBounds {
            rows_max: 8,
            context_max: 40,
            kv_blocks: 4,
            hidden: 2,
            vocab: Some(3),
            takes_tokens: true,
        };
        let span = |first_row, rows, first_position, blocks: &'static [u32]| Span {
            first_row,
            rows,
            first_position,
            blocks,
            adapter: None,
        };
        let check = |spans: &[Span<'static>], rows, sample_rows: &[usize], expected: &str| {
            let batch = Batch { spans, rows, sample_rows };
            let (tokens, hidden) = (vec![0; rows], vec![0.0; 2 * rows]);
            let logits = vec![0.0; 3 * sample_rows.len()];
            let found = BOUNDS.check(&batch, Some(&tokens), &hidden, Some(&logits));
            let found = found.err().map(|error| error.to_string()).unwrap_or_default();
            assert!(found.contains(expected) && found.is_empty() == expected.is_empty(), "{found}");
        };
        check(&[span(0, 2, 0, &[3]), span(2, 1, 38, &[0, 1, 2])], 3, &[1, 2], "");
        check(&[], 0, &[], "0 rows; expected 1 to 8");
        check(&[span(0, 9, 0, &[0])], 9, &[], "9 rows; expected 1 to 8");
        check(&[span(1, 1, 0, &[0])], 2, &[], "a span of rows 1+1 after 0");
        check(&[span(0, 0, 0, &[0])], 1, &[], "a span of rows 0+0 after 0");
        check(&[span(0, 1, 0, &[0])], 2, &[], "spans of 1 rows in a batch of 2");
        check(&[span(0, 2, 39, &[0, 1, 2])], 2, &[], "positions up to 41 of a context of 40");
        check(&[span(0, 1, 16, &[0])], 1, &[], "1 blocks for 17 positions");
        check(&[span(0, 1, 0, &[4])], 1, &[], "block 4 of a cache of 4");
        check(&[span(0, 1, 0, &[0])], 1, &[1], "sample rows [1] of 1 rows");
        check(&[span(0, 2, 0, &[0])], 2, &[1, 0], "sample rows [1, 0]");
    }
}
