//! What must hold in an engine between any two calls.

use std::collections::BTreeMap;

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

    /// Each used block is in exactly one running sequence, and each has enough for its rows.
    fn check_blocks(&self, wrong: &mut Vec<String>) {
        let mut holders: BTreeMap<u32, u32> = BTreeMap::new();
        for run in self.sequences.values().filter_map(|sequence| sequence.run()) {
            run.blocks.iter().for_each(|block| *holders.entry(*block).or_default() += 1);
            if (run.blocks.len() as u32) * shoal_protocol::plan::BLOCK_TOKENS < run.issued() {
                wrong.push(format!("{} has issued more rows than its blocks hold", run.id));
            }
        }
        if holders.values().any(|holders| *holders != 1) {
            wrong.push("a block is in two sequences".to_owned());
        }
        if holders.len() as u32 != self.blocks.used() {
            let used = self.blocks.used();
            wrong.push(format!("{used} blocks are used, sequences hold {}", holders.len()));
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
