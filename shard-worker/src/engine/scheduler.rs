//! Who goes next.
//!
//! **Order.** First come, first served: sequences are admitted in order of arrival, and rows are
//! given in that order. A step has decode rows first, then rows of prompts up to the step's room, so
//! that running answers do not wait for new prompts.
//!
//! **Micro-batches.** A sequence has one decode row in flight at most, so to keep d stages busy the
//! decoding sequences are divided into d steps: with n of them a step takes at most ceil(n/d) rows.
//! d is the number of stages, or one more where the steps stay large (`SPLIT_ROWS_MIN`), which hides
//! the way back to the head. While d steps are in flight no further step is made of decode rows alone:
//! each stage has work, and a sequence that has just become ready joins the next step that returns
//! instead of making the steps smaller for good. A lone sequence never waits, as nothing is in flight
//! when it is ready.
//!
//! **Prompts.** The prompts that are there when one is admitted are cut into equal steps
//! (`PREFILL_STEPS_PER_STAGE`) so that they fill the pipeline; stages process in order, so the steps of
//! one prompt go back to back. With one stage there is nothing to fill and a step takes all the rows it
//! can.
//!
//! An encoder's inputs are prompts that are not cut; several travel in one step.
//!
//! **Prefixes.** A sequence is admitted with the longest beginning that is known (`prefixes`), and its
//! prefill begins behind it. Blocks that nobody holds are free, whatever is known of them.
//!
//! **Blocks.** A sequence is admitted when there are blocks for all of its tokens and one more, beside
//! what the running ones need next and a small reserve. A decode row without a block takes a free one;
//! where there is none the youngest running sequence is preempted: its blocks are freed, it waits as
//! the first again, and is computed anew from its tokens. The oldest is never preempted by another, and
//! alone it always has enough (`EngineConfig::context`), so the engine cannot stall.

use shoal_protocol::id::SequenceId;
use shoal_protocol::plan::BLOCK_TOKENS;
use shoal_protocol::prefix::ReusedHeader;
use shoal_protocol::request::HeadEvent;

use super::batch::Batch;
use super::{Action, Arrival, Engine};

/// One block in this many stays free when a sequence is admitted beside others, so that it is not
/// preempted again right away.
const RESERVE: u32 = 64;

/// What the running sequences want.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Demand {
    /// Sequences past their prefill.
    decoding: u32,
    /// Those of them whose next row can go.
    ready: u32,
    /// Those of them that need a block first.
    without_block: u32,
    /// Rows of prompts.
    prefill: u64,
}

impl Engine {
    /// Makes steps while the pipeline has room for them.
    pub(super) fn schedule(&mut self) {
        if self.fault.is_some() {
            return;
        }
        while self.pipeline.has_room() {
            self.admit();
            let preemptions = self.counters.preemptions;
            let batch = self.next_batch();
            if batch.rows() > 0 {
                self.issue(batch);
            } else if self.counters.preemptions == preemptions {
                return;
            }
        }
    }

    /// Lets waiting sequences onto the stages, in order, while there is room for them.
    fn admit(&mut self) {
        let mut admitted = false;
        while let Some(&arrival) = self.waiting.first()
            && self.running.len() < self.config.limits.sequences_max as usize
        {
            let beside = if self.running.is_empty() {
                0
            } else {
                self.demand().without_block + self.blocks.total() / RESERVE
            };
            let Some(sequence) = self.sequences.get_mut(&arrival) else { break };
            let (prefix, needed) = (sequence.prefix(), sequence.blocks_to_enter());
            let Some(taken) = self.blocks.take_for(prefix, needed, beside) else { break };
            let (asked, shared) = (prefix.len() as u32, taken.shared);
            let id = SequenceId(self.next_sequence);
            self.next_sequence += 1;
            let open = sequence.enter(self.config.generation, id, taken);
            self.waiting.remove(&arrival);
            self.running.insert(arrival);
            self.actions.push_back(Action::Open(open));
            self.note_reuse(arrival, asked, shared);
            admitted = true;
        }
        if admitted {
            self.prefill_rows = self.prefill_rows_for(self.demand().prefill);
        }
    }

    /// Counts what a sequence looked for and found, and tells its client: of its first time on the stages
    /// alone, since a preempted one finds what it has computed itself.
    fn note_reuse(&mut self, arrival: Arrival, asked: u32, shared: u32) {
        let Some(sequence) = self.sequences.get(&arrival) else { return };
        if !sequence.shares() || sequence.preemptions() > 0 {
            return;
        }
        self.counters.lookups += 1;
        self.counters.tokens_asked += u64::from(asked * BLOCK_TOKENS);
        if shared == 0 {
            return;
        }
        let tokens = shared * BLOCK_TOKENS;
        self.counters.hits += 1;
        self.counters.tokens_found += u64::from(tokens);
        let (key, (request, attempt, choice)) = (sequence.key(), sequence.names());
        let header = ReusedHeader {
            request: request.0,
            attempt: attempt.0,
            choice,
            tokens: tokens.min(sequence.prompt_len()),
            reserved: 0,
        };
        self.actions.push_back(Action::Emit { key, event: HeadEvent::Reused { header } });
    }

    /// Rows of prompts in one step, so that `prefill` of them fill the pipeline.
    fn prefill_rows_for(&self, prefill: u64) -> u32 {
        let max = self.config.limits.step_rows_max;
        if self.config.stages == 1 {
            return max;
        }
        let steps_max = u64::from(self.config.stages)
            .saturating_mul(u64::from(self.config.prefill_steps_per_stage));
        let steps = (prefill / u64::from(self.config.prefill_rows_min)).clamp(1, steps_max);
        let rows = prefill.div_ceil(steps).next_multiple_of(u64::from(BLOCK_TOKENS));
        u32::try_from(rows).unwrap_or(u32::MAX).min(max)
    }

    fn demand(&self) -> Demand {
        let mut demand = Demand::default();
        for sequence in self.running.iter().filter_map(|arrival| self.sequences.get(arrival)) {
            let Some(run) = sequence.run() else { continue };
            demand.prefill += u64::from(run.prefill_left());
            demand.decoding += u32::from(run.is_decoding());
            if run.is_ready(sequence.len()) {
                demand.ready += 1;
                demand.without_block += u32::from(run.lacks_block());
            }
        }
        demand
    }

    /// The next step; empty where there is nothing to do or nothing that would not better wait.
    fn next_batch(&mut self) -> Batch {
        let demand = self.demand();
        let depth = self.depth(demand.decoding);
        let in_flight = self.pipeline.len() as u32;
        let mut batch = Batch::default();
        if in_flight < depth || demand.prefill > 0 {
            let rows = decode_rows(demand, depth, in_flight);
            self.add_decode_rows(&mut batch, rows.min(self.config.limits.step_rows_max));
            self.add_prefill_rows(&mut batch);
        }
        batch
    }

    /// Into how many steps the decoding sequences are divided.
    fn depth(&self, decoding: u32) -> u32 {
        let stages = self.config.stages;
        let more = stages.saturating_add(1);
        let large = decoding >= more.saturating_mul(self.config.split_rows_min);
        if stages > 1 && large { more } else { stages }
    }

    /// Adds the next row of each ready sequence, oldest first, up to `rows`.
    fn add_decode_rows(&mut self, batch: &mut Batch, rows: u32) {
        let ready: Vec<Arrival> = self
            .running
            .iter()
            .copied()
            .filter(|arrival| {
                let sequence = self.sequences.get(arrival);
                sequence.is_some_and(|s| s.run().is_some_and(|run| run.is_ready(s.len())))
            })
            .take(rows as usize)
            .collect();
        // A preemption takes the youngest of all, so it never takes one whose row is in the batch.
        for arrival in ready {
            if self.ensure_block(arrival) {
                self.add_rows(batch, arrival, 1);
            }
        }
    }

    /// Adds rows of prompts, oldest first, up to the share of a step and the room in this one.
    fn add_prefill_rows(&mut self, batch: &mut Batch) {
        let room = self.config.limits.step_rows_max.saturating_sub(batch.rows());
        let mut left = self.prefill_rows.min(room);
        let prefilling: Vec<(Arrival, u32, u32)> = self
            .running
            .iter()
            .filter_map(|&arrival| {
                let run = self.sequences.get(&arrival)?.run()?;
                let rows = run.prefill_left();
                (rows > 0).then_some((arrival, rows, run.to_grant()))
            })
            .collect();
        for (arrival, rows, grants) in prefilling {
            // Blocks that several share are granted to each, and a step has room for one grant of every
            // block. The first one's always fit: no other of the step holds them.
            if batch.grants() + grants > self.blocks.total() {
                return;
            }
            let rows = match self.config.encodes {
                // An input is not cut: the first of a step goes whatever its share is.
                true if rows <= left || (batch.rows() == 0 && rows <= room) => rows,
                true => 0,
                false => rows.min(left),
            };
            if rows == 0 {
                return;
            }
            self.add_rows(batch, arrival, rows);
            left = left.saturating_sub(rows);
        }
    }

    fn add_rows(&mut self, batch: &mut Batch, arrival: Arrival, rows: u32) {
        let issued = self.sequences.get_mut(&arrival).and_then(|s| s.issue(rows, self.now));
        if let Some(issued) = issued {
            batch.add(arrival, &issued);
        }
    }

    /// Sees to it that the next row of this sequence has a block, at the cost of the youngest where
    /// none is free. False: the sequence does not run any more, or was that youngest itself.
    fn ensure_block(&mut self, arrival: Arrival) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(&arrival) else { return false };
            let Some(run) = sequence.run() else { return false };
            if !run.lacks_block() {
                return true;
            }
            if let Some(block) = self.blocks.take() {
                sequence.add_block(block);
                continue;
            }
            let Some(&youngest) = self.running.last() else { return false };
            self.preempt(youngest);
        }
    }

    /// Takes a running sequence off the stages; it waits as the first of those that wait.
    fn preempt(&mut self, arrival: Arrival) {
        let Some(mut sequence) = self.sequences.remove(&arrival) else { return };
        self.leave_stages(&mut sequence);
        sequence.note_preemption();
        self.counters.preemptions += 1;
        self.running.remove(&arrival);
        self.waiting.insert(arrival);
        self.sequences.insert(arrival, sequence);
    }

    fn issue(&mut self, batch: Batch) {
        let step = self.pipeline.next_step();
        let (step, tokens, parts) = batch.finish(self.config.generation, step);
        self.pipeline.issue(parts, self.now);
        self.actions.push_back(Action::Issue { step, tokens });
    }
}

/// Decode rows of the next step: an equal share of all that decode, and where fewer are ready, an
/// equal share of those for the steps that may still go.
fn decode_rows(demand: Demand, depth: u32, in_flight: u32) -> u32 {
    let steps_left = depth.saturating_sub(in_flight).max(1);
    demand.decoding.div_ceil(depth).min(demand.ready.div_ceil(steps_left))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The steps that are made at once where all of `decoding` are ready.
    fn split(decoding: u32, depth: u32) -> Vec<u32> {
        let (mut ready, mut steps) = (decoding, Vec::new());
        while ready > 0 && (steps.len() as u32) < depth {
            let demand = Demand { decoding, ready, without_block: 0, prefill: 0 };
            let rows = decode_rows(demand, depth, steps.len() as u32);
            ready -= rows;
            steps.push(rows);
        }
        assert_eq!(ready, 0, "{decoding} over {depth}: {steps:?}");
        steps
    }

    #[test]
    fn what_is_ready_is_divided_equally() {
        assert_eq!(split(10, 4), [3, 3, 2, 2]);
        assert_eq!(split(5, 2), [3, 2]);
        assert_eq!(split(2, 3), [1, 1]);
        assert_eq!(split(7, 1), [7]);
        assert_eq!(split(1, 4), [1]);
    }

    #[test]
    fn a_step_takes_no_more_than_its_share() {
        // Seven come back at once while one more is on its way: four go, so that the next four do.
        let demand = Demand { decoding: 8, ready: 7, without_block: 0, prefill: 0 };
        assert_eq!(decode_rows(demand, 2, 1), 4);
        // A step of prompt rows beyond the depth takes its share along.
        assert_eq!(decode_rows(demand, 2, 3), 4);
    }
}
