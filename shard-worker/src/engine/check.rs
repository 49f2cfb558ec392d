//! What must hold in an engine between any two calls.

use shoal_protocol::plan::BLOCK_TOKENS;

use super::Engine;

impl Engine {
    /// Every invariant that does not hold, in words; for tests, simulation and debugging.
    pub fn check(&self) -> Vec<String> {
        let mut wrong = self.blocks.check();
        self.check_indexes(&mut wrong);
        self.check_blocks(&mut wrong);
        self.check_flights(&mut wrong);
        wrong
    }

    /// The indexes name the sequences that there are, in the phase that they are in.
    fn check_indexes(&self, wrong: &mut Vec<String>) {
        for (arrival, sequence) in &self.sequences {
            let runs = sequence.run().is_some();
            if self.running.contains(arrival) != runs || self.waiting.contains(arrival) == runs {
                wrong.push(format!("{arrival:?} is not listed in the phase that it is in"));
            }
            if self.keys.get(&sequence.key()) != Some(arrival) {
                wrong.push(format!("{:?} does not lead to {arrival:?}", sequence.key()));
            }
            let listed =
                sequence.deadline().is_none_or(|at| self.deadlines.contains(&(at, *arrival)));
            if !listed {
                wrong.push(format!("the deadline of {arrival:?} is not listed"));
            }
            if sequence.is_used_up(self.config.context()) {
                wrong.push(format!("{arrival:?} goes on although it is used up"));
            }
        }
        let listed = self.running.len() + self.waiting.len();
        if listed != self.sequences.len() || self.keys.len() != self.sequences.len() {
            wrong.push(format!("{listed} of {} sequences are listed", self.sequences.len()));
        }
        if self.deadlines.iter().any(|(_, arrival)| !self.sequences.contains_key(arrival)) {
            wrong.push("a deadline belongs to no sequence".to_owned());
        }
        if self.running.len() > self.config.limits.sequences_max as usize {
            wrong.push(format!("{} sequences run", self.running.len()));
        }
        if let (Some(youngest), Some(first)) = (self.running.last(), self.waiting.first())
            && youngest > first
        {
            wrong.push(format!("{youngest:?} runs while {first:?} waits, which came first"));
        }
    }

    /// Each block is held as often as running sequences have it, each of these has enough for its rows,
    /// and nobody writes, now or later, to a block that another has too.
    fn check_blocks(&self, wrong: &mut Vec<String>) {
        let mut holders = vec![0u32; self.blocks.total() as usize];
        let runs = || self.sequences.values().filter_map(|sequence| sequence.run());
        for block in runs().flat_map(|run| &run.blocks) {
            match holders.get_mut(*block as usize) {
                Some(holders) => *holders += 1,
                None => wrong.push(format!("block {block} is held but not of the pool")),
            }
        }
        if holders != self.blocks.holders() {
            let counted = self.blocks.holders();
            wrong.push(format!("blocks are held {holders:?} times and counted {counted:?} times"));
        }
        for run in runs() {
            if (run.blocks.len() as u32) * BLOCK_TOKENS < run.issued() {
                wrong.push(format!("{} has issued more rows than its blocks hold", run.id));
            }
            if run.issued() < run.shared() * BLOCK_TOKENS {
                wrong.push(format!("{} writes to blocks that it took full", run.id));
            }
            // Rows that have come back are not written again.
            let writable = run.blocks.iter().skip((run.computed() / BLOCK_TOKENS) as usize);
            for block in writable {
                if holders.get(*block as usize).is_some_and(|holders| *holders > 1) {
                    wrong.push(format!("{} may write to block {block}, which others have", run.id));
                }
            }
        }
    }

    /// Rows in flight are those that their sequences have issued, each once, in order.
    fn check_flights(&self, wrong: &mut Vec<String>) {
        if self.pipeline.len() as u32 > self.config.limits.steps_in_flight_max {
            wrong.push(format!("{} steps are in flight", self.pipeline.len()));
        }
        for (arrival, sequence) in &self.sequences {
            let Some(run) = sequence.run() else { continue };
            let parts = || {
                self.pipeline
                    .parts()
                    .filter(|part| part.arrival == *arrival && part.sequence == run.id)
            };
            if parts().count() as u32 != run.in_flight() {
                wrong.push(format!("{} is in {} flights", run.id, parts().count()));
            }
            let rows: u32 = parts().map(|part| part.rows).sum();
            if run.computed() + rows != run.issued() {
                wrong.push(format!("{} lost count of what came back", run.id));
            }
            let mut next = run.issued().saturating_sub(rows);
            for part in parts() {
                if part.first_position != next {
                    wrong.push(format!("{} has a gap in flight before {next}", run.id));
                }
                next = part.first_position + part.rows;
            }
            if parts().filter(|part| part.sample).count() > 1 {
                wrong.push(format!("{} is sampled twice at once", run.id));
            }
        }
    }
}
