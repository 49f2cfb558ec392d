//! What one stage knows of its sequences: each one's KV blocks, its length and, on the last stage,
//! what its next draw needs.
//!
//! Every stage owns such a table, so that a new head can ask each what it holds. Nothing in it comes
//! from a map that travels: `Open`, `Step` and `Close` frames build it, and each is checked before it
//! changes anything. After an error the table is as it was.

use std::collections::BTreeMap;

use shoal_protocol::activation::{CloseHeader, Open, RowRecord, Sample, Samples, Step};
use shoal_protocol::id::{AdapterId, Generation, SequenceId, StepId};
use shoal_protocol::plan::{BLOCK_TOKENS, ReplicaLimits};

use super::blocks::{Filled, Refused, Slot, Slots};
use super::draw::sample_of;
pub use super::fault::StageFault;
use crate::model::Span;
use crate::sample::{SamplerState, Scratch};

/// One sequence at this stage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    blocks: Vec<u32>,
    adapter: Option<AdapterId>,
    /// Tokens that it was opened with.
    opened: u32,
    /// How many of the blocks, from the first on, came with their content.
    shared: u32,
    /// Rows that have gone through this stage, and those of shared blocks: the next row stands at this
    /// position.
    length: u32,
    /// On the last stage alone.
    pub(super) sampler: Option<SamplerState>,
}

impl Entry {
    /// As what the next block can come with its content.
    fn share_next(&self) -> Result<Filled, Refused> {
        let index = self.blocks.len();
        if index != self.shared as usize || self.length != self.shared * BLOCK_TOKENS {
            return Err(Refused::NotShareable("rows or blocks of its own came before"));
        }
        // One token at least is computed: the next one is drawn from its row.
        if (self.shared + 1).saturating_mul(BLOCK_TOKENS) >= self.opened {
            return Err(Refused::NotShareable(
                "the sequence was not opened with a token behind it",
            ));
        }
        Ok(Filled { index, adapter: self.adapter })
    }

    fn take(&mut self, block: u32, shared: bool) {
        self.blocks.push(block);
        if shared {
            self.shared += 1;
            self.length += BLOCK_TOKENS;
        }
    }

    /// Undoes `take`.
    fn give_back(&mut self, shared: bool) {
        self.blocks.pop();
        if shared {
            self.shared -= 1;
            self.length -= BLOCK_TOKENS;
        }
    }
}

/// Adjacent rows of one sequence in the current step.
#[derive(Clone, Copy, Debug)]
struct Run {
    sequence: SequenceId,
    first_row: usize,
    rows: usize,
    first_position: u32,
}

/// The sequences of one stage.
#[derive(Debug)]
pub struct StageTable {
    pub(super) generation: Generation,
    limits: ReplicaLimits,
    last: bool,
    pub(super) sequences: BTreeMap<SequenceId, Entry>,
    slots: Slots,
    /// The blocks of the current step's grants as they were before; kept for its memory.
    before: Vec<Slot>,
    /// The current step; kept for its memory.
    runs: Vec<Run>,
    sample_rows: Vec<usize>,
    pub(super) scratch: Scratch,
}

impl StageTable {
    /// A stage without sequences. `last`: whether it draws tokens.
    pub fn new(generation: Generation, limits: ReplicaLimits, last: bool) -> Self {
        let slots = Slots::new(limits.kv_blocks);
        Self {
            generation,
            limits,
            last,
            sequences: BTreeMap::new(),
            slots,
            before: Vec::new(),
            runs: Vec::new(),
            sample_rows: Vec::new(),
            scratch: Scratch::default(),
        }
    }

    /// How many sequences are open.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Each open sequence with its length and its blocks, in order of their ids.
    pub fn sequences(&self) -> impl Iterator<Item = (SequenceId, u32, &[u32])> {
        self.sequences.iter().map(|(id, e)| (*id, e.length, e.blocks.as_slice()))
    }

    /// Whether an open sequence is computed with this adapter.
    pub fn uses(&self, adapter: AdapterId) -> bool {
        self.sequences.values().any(|entry| entry.adapter == Some(adapter))
    }

    /// A sequence begins.
    pub fn open(&mut self, open: &Open) -> Result<(), StageFault> {
        let sequence = open.sequence;
        self.check_generation(open.generation)?;
        if self.sequences.contains_key(&sequence) {
            return Err(StageFault::AlreadyOpen(sequence));
        }
        let max = self.limits.sequences_max;
        if self.sequences.len() >= max as usize {
            return Err(StageFault::TooManySequences { sequence, max });
        }
        let sampler =
            self.last.then(|| SamplerState::open(open.prompt_len, &open.tokens, open.sampling));
        let (adapter, opened) = (open.adapter, open.tokens.len() as u32);
        let entry = Entry { blocks: Vec::new(), adapter, opened, shared: 0, length: 0, sampler };
        self.sequences.insert(sequence, entry);
        Ok(())
    }

    /// A sequence ends; its blocks may be granted to others by the frames behind this one.
    pub fn close(&mut self, close: &CloseHeader) -> Result<(), StageFault> {
        let sequence = SequenceId(close.sequence);
        self.check_generation(Generation(close.generation))?;
        let entry =
            self.sequences.remove(&sequence).ok_or(StageFault::UnknownSequence(sequence))?;
        entry.blocks.into_iter().for_each(|block| self.slots.release(block));
        Ok(())
    }

    /// Takes a step's grants and rows into the table and says where the rows go. On the last stage
    /// `draw` follows once there are logits.
    pub fn begin_step(&mut self, step: &Step) -> Result<StepRows<'_>, StageFault> {
        self.check_generation(Generation(step.header.generation))?;
        let max = self.limits.step_rows_max;
        if step.rows.len() > max as usize {
            return Err(StageFault::TooManyRows { rows: step.rows.len(), max });
        }
        // Whether the blocks suffice is known only with the grants applied; where the rows turn out
        // wrong they are taken back.
        let fit = self.grant(step).and_then(|()| self.collect_runs(&step.rows));
        if let Err(fault) = fit {
            self.take_back(step);
            return Err(fault);
        }
        for run in &self.runs {
            let Some(entry) = self.sequences.get_mut(&run.sequence) else { continue };
            let first = entry.length / BLOCK_TOKENS;
            entry.length += run.rows as u32;
            for index in first as usize..(entry.length / BLOCK_TOKENS) as usize {
                let filled = Filled { index, adapter: entry.adapter };
                self.slots.fill(entry.blocks[index], filled);
            }
        }
        Ok(StepRows { table: self, rows: step.rows.len() })
    }

    /// Draws one token for each row of the step that samples. `logits` has a row of `vocab` numbers
    /// for each, in row order.
    ///
    /// A sequence whose logits are not finite gets `Sample::NO_TOKEN`: the others go on.
    pub fn draw(
        &mut self,
        step: &Step,
        logits: &[f32],
        vocab: usize,
    ) -> Result<Samples, StageFault> {
        let rows = step.header.samples as usize;
        if vocab == 0 || logits.len() != rows * vocab {
            return Err(StageFault::WrongLogits { found: logits.len(), rows, vocab });
        }
        let mut samples = Vec::with_capacity(rows);
        let sampled = step.rows.iter().filter(|row| row.samples());
        for (row, logits) in sampled.zip(logits.chunks_exact(vocab)) {
            samples.push(self.draw_row(row, logits)?);
        }
        let (generation, step) = (self.generation, StepId(step.header.step));
        Ok(Samples { generation, step, samples, vectors: Vec::new() })
    }

    /// An encoder's vectors, one of `width` numbers for each row of the step that samples.
    pub fn give_vectors(
        &self,
        step: &Step,
        vectors: &[f32],
        width: usize,
    ) -> Result<Samples, StageFault> {
        let rows = step.header.samples as usize;
        if width == 0 || vectors.len() != rows * width {
            return Err(StageFault::WrongLogits { found: vectors.len(), rows, vocab: width });
        }
        let sample = |row: &RowRecord| Sample {
            sequence: SequenceId(row.sequence),
            position: row.position,
            token: 0,
            logprob: f32::NAN,
            candidates: Vec::new(),
        };
        let samples = step.rows.iter().filter(|row| row.samples()).map(sample).collect();
        let vectors = vectors.chunks_exact(width).map(<[f32]>::to_vec).collect();
        let (generation, step) = (self.generation, StepId(step.header.step));
        Ok(Samples { generation, step, samples, vectors })
    }

    pub(super) fn draw_row(
        &mut self,
        row: &RowRecord,
        logits: &[f32],
    ) -> Result<Sample, StageFault> {
        let sequence = SequenceId(row.sequence);
        let sampler = self.sequences.get_mut(&sequence).and_then(|e| e.sampler.as_mut());
        let sampler = sampler.ok_or(StageFault::UnknownSequence(sequence))?;
        sample_of(row, sampler.draw(&mut self.scratch, logits, row.position))
    }

    /// Every invariant that does not hold, in words; for tests and debugging.
    pub fn check(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut held = 0;
        for (id, entry) in &self.sequences {
            held += entry.blocks.len();
            for &block in &entry.blocks {
                if self.slots.get(block).is_none_or(|slot| slot.holders == 0) {
                    wrong.push(format!("{id} lists block {block}, which nobody holds"));
                }
            }
            let own = entry.blocks.iter().skip((entry.length / BLOCK_TOKENS) as usize);
            for block in own {
                if self.slots.get(*block).is_some_and(|slot| slot.holders > 1) {
                    wrong.push(format!("{id} writes to block {block}, which others hold"));
                }
            }
            if entry.length < entry.shared * BLOCK_TOKENS {
                wrong.push(format!("{id} is shorter than the blocks that it shares"));
            }
            if entry.blocks.len() < blocks_for(entry.length) {
                wrong.push(format!("{id} has {} tokens in too few blocks", entry.length));
            }
            if entry.length > self.limits.context_max {
                wrong.push(format!("{id} is longer than the context: {}", entry.length));
            }
            if entry.sampler.is_some() != self.last {
                wrong.push(format!("{id} has a sampler where none belongs, or none"));
            }
        }
        let counted = self.slots.holders();
        if counted != held {
            wrong.push(format!("blocks are held {counted} times and listed {held} times"));
        }
        wrong
    }

    fn check_generation(&self, found: Generation) -> Result<(), StageFault> {
        let expected = self.generation;
        if found == expected {
            Ok(())
        } else {
            Err(StageFault::StaleGeneration { found, expected })
        }
    }

    /// Appends the granted blocks. What they were before stands in `before`, also where an error follows.
    fn grant(&mut self, step: &Step) -> Result<(), StageFault> {
        self.before.clear();
        for grant in &step.grants {
            let (sequence, block) = (SequenceId(grant.sequence), grant.block);
            let entry = self.sequences.get(&sequence);
            let entry = entry.ok_or(StageFault::UnknownSequence(sequence))?;
            let granted = match grant.is_shared() {
                true => entry.share_next().and_then(|as_what| self.slots.share(block, as_what)),
                false => self.slots.grant(block),
            };
            let before = granted.map_err(|refused| self.refusal(sequence, block, refused))?;
            self.before.push(before);
            if let Some(entry) = self.sequences.get_mut(&sequence) {
                entry.take(block, grant.is_shared());
            }
        }
        Ok(())
    }

    /// Undoes the grants of a step that were made.
    fn take_back(&mut self, step: &Step) {
        for (grant, before) in step.grants.iter().zip(&self.before).rev() {
            self.slots.put_back(grant.block, *before);
            if let Some(entry) = self.sequences.get_mut(&SequenceId(grant.sequence)) {
                entry.give_back(grant.is_shared());
            }
        }
    }

    fn refusal(&self, sequence: SequenceId, block: u32, refused: Refused) -> StageFault {
        let max = self.limits.kv_blocks;
        match refused {
            Refused::OutOfRange => StageFault::BlockOutOfRange { sequence, block, max },
            Refused::Held => {
                let holds = |(_, entry): &(&SequenceId, &Entry)| entry.blocks.contains(&block);
                let owner = self.sequences.iter().find(holds).map_or(sequence, |(id, _)| *id);
                StageFault::BlockOwned { sequence, block, owner }
            }
            Refused::NotShareable(why) => {
                let index = self.sequences.get(&sequence).map_or(0, |entry| entry.shared);
                StageFault::NotShareable { sequence, block, index, why }
            }
        }
    }

    /// Splits the rows into runs of one sequence each, and checks each run.
    fn collect_runs(&mut self, rows: &[RowRecord]) -> Result<(), StageFault> {
        self.runs.clear();
        self.sample_rows.clear();
        let mut first_row = 0;
        for chunk in rows.chunk_by(|a, b| a.sequence == b.sequence) {
            let sequence = SequenceId(chunk[0].sequence);
            let first_position = chunk[0].position;
            self.runs.push(Run { sequence, first_row, rows: chunk.len(), first_position });
            first_row += chunk.len();
        }
        // A sequence with two runs: in a sorted list of ids the second stands beside the first.
        self.runs.sort_unstable_by_key(|run| run.sequence);
        if let Some(pair) = self.runs.windows(2).find(|p| p[0].sequence == p[1].sequence) {
            return Err(StageFault::NotAdjacent(pair[0].sequence));
        }
        self.runs.sort_unstable_by_key(|run| run.first_row);
        (0..self.runs.len()).try_for_each(|i| self.check_run(self.runs[i], rows))
    }

    /// Checks the adjacent rows of one sequence and notes those that sample.
    fn check_run(&mut self, run: Run, rows: &[RowRecord]) -> Result<(), StageFault> {
        let sequence = run.sequence;
        let entry = self.sequences.get(&sequence).ok_or(StageFault::UnknownSequence(sequence))?;
        let max = self.limits.context_max;
        for (i, row) in rows.iter().enumerate().skip(run.first_row).take(run.rows) {
            let expected = entry.length.saturating_add((i - run.first_row) as u32);
            let found = row.position;
            if found != expected {
                return Err(StageFault::PositionGap { sequence, found, expected });
            }
            if found >= max {
                let length = found.saturating_add(1);
                return Err(StageFault::ContextExceeded { sequence, length, max });
            }
            if !row.samples() {
                continue;
            }
            if let Some(sampler) = &entry.sampler {
                let expected = sampler.tokens().saturating_sub(1);
                if found != expected {
                    return Err(StageFault::NotLastToken { sequence, found, expected });
                }
            }
            self.sample_rows.push(i);
        }
        let (held, needed) = (entry.blocks.len(), blocks_for(entry.length + run.rows as u32));
        if held < needed {
            return Err(StageFault::BlocksMissing { sequence, held, needed });
        }
        Ok(())
    }
}

/// Blocks that hold this many positions.
pub fn blocks_for(tokens: u32) -> usize {
    tokens.div_ceil(BLOCK_TOKENS) as usize
}

/// Where the rows of a step go: what `model::Batch` is made of.
#[derive(Clone, Copy, Debug)]
pub struct StepRows<'a> {
    table: &'a StageTable,
    rows: usize,
}

impl<'a> StepRows<'a> {
    /// Rows in all.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The rows that sample, ascending.
    pub fn sample_rows(&self) -> &'a [usize] {
        &self.table.sample_rows
    }

    /// The sequences, in row order, without gaps.
    pub fn spans(&self) -> impl Iterator<Item = Span<'a>> {
        let table = self.table;
        table.runs.iter().map(|run| Span {
            first_row: run.first_row,
            rows: run.rows,
            first_position: run.first_position,
            blocks: table.sequences.get(&run.sequence).map_or(&[], |e| e.blocks.as_slice()),
            adapter: table.sequences.get(&run.sequence).and_then(|e| e.adapter),
        })
    }
}

/// Keeps the memory of a list of spans from one step to the next: the spans themselves borrow from
/// the table and cannot stay.
#[derive(Debug, Default)]
pub struct SpanBuffer(Vec<Span<'static>>);

impl SpanBuffer {
    /// The step's spans, in memory that `give_back` returns.
    pub fn take<'a>(&mut self, rows: &StepRows<'a>) -> Vec<Span<'a>> {
        let mut spans: Vec<Span<'a>> = std::mem::take(&mut self.0);
        spans.extend(rows.spans());
        spans
    }

    /// Takes the memory back.
    pub fn give_back(&mut self, mut spans: Vec<Span<'_>>) {
        spans.clear();
        // Collecting an emptied vector into one of the same layout keeps its allocation; should the
        // standard library stop doing so, a step allocates once and nothing else changes.
        self.0 = spans.into_iter().map(|span| Span { blocks: &[], ..span }).collect();
    }
}

#[cfg(test)]
#[path = "table_test.rs"]
mod table_test;
