//! The head's engine: what scheduling and absorbing cost, and the block pool beneath.

use std::hint::black_box;

use anyhow::{Context, Result};
use shoal_protocol::activation::{Sample, Samples};
use shoal_protocol::id::{Attempt, Generation, ReplicaId, RequestId, SequenceId, StepId};
use shoal_protocol::plan::ReplicaLimits;
use shoal_protocol::request::{Generate, SamplingRecord};
use shoal_protocol::units::Instant;
use shoal_shard_worker::engine::{Action, BlockPool, ClientKey, Engine, EngineConfig, Event};

use super::nanoseconds;
use crate::measure::report::Section;

const VOCAB: u32 = 32_000;

const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: 1 << 16,
    context_max: 1 << 20,
    step_rows_max: 512,
    sequences_max: 256,
    steps_in_flight_max: 4,
};

/// Runs it.
pub fn run() -> Result<Section> {
    let mut section = Section::new(
        "Scheduler and blocks",
        "Nanoseconds, one thread. A decode step: make the step, absorb its samples, emit the tokens, with all \
         sequences decoding over 3 stages.",
    );
    for sequences in [1, 16, 256] {
        let mut rig = Rig::new(sequences)?;
        let step = nanoseconds(|| rig.step());
        let rows = rig.rows_per_step();
        section.seen(
            format!("a decode step, {sequences} sequences ({rows:.0} rows a step)"),
            step.to_string(),
        );
        section.seen(
            format!("the same a row, {sequences} sequences"),
            step.map(|ns| ns / rows).to_string(),
        );
    }
    let mut pool = BlockPool::new(LIMITS.kv_blocks);
    let pair = nanoseconds(|| {
        let block = pool.take();
        block.map(|block| pool.release(black_box(block)))
    });
    section.seen("take and release a block", pair.to_string());
    Ok(section)
}

/// An engine with sequences that decode for ever, and the stages' answers.
struct Rig {
    engine: Engine,
    now: u64,
    in_flight: std::collections::VecDeque<Samples>,
    steps: u64,
    rows: u64,
}

impl Rig {
    fn new(sequences: u64) -> Result<Self> {
        let config = EngineConfig::new(ReplicaId(1), Generation(1), LIMITS, 3, VOCAB);
        let engine = Engine::new(config).context("the bench's settings")?;
        let mut rig = Self { engine, now: 0, in_flight: Default::default(), steps: 0, rows: 0 };
        for key in 0..sequences {
            let request = Generate {
                request: RequestId(key),
                attempt: Attempt(1),
                choice: 0,
                replica: ReplicaId(1),
                deadline_ms: 0,
                prompt_len: 8,
                max_tokens: LIMITS.context_max - 8,
                adapter: None,
                sampling: SamplingRecord::GREEDY,
                stop_tokens: vec![],
                tokens: vec![1; 8],
            };
            let (key, request, tenant) = (ClientKey(key), Box::new(request), None);
            rig.engine.handle(Instant(0), Event::Submit { key, request, tenant });
        }
        // Past the prompts.
        for _ in 0..64 + sequences {
            rig.step();
        }
        (rig.steps, rig.rows) = (0, 0);
        Ok(rig)
    }

    /// Takes all actions, then answers the oldest step.
    fn step(&mut self) {
        while let Some(action) = self.engine.poll_action() {
            if let Action::Issue { step, .. } = action {
                self.steps += 1;
                self.rows += step.rows.len() as u64;
                let drawn = step.rows.iter().filter(|row| row.samples()).map(|row| Sample {
                    sequence: SequenceId(row.sequence),
                    position: row.position,
                    token: 5,
                    logprob: f32::NAN,
                    candidates: vec![],
                });
                self.in_flight.push_back(Samples {
                    generation: Generation(1),
                    step: StepId(step.header.step),
                    samples: drawn.collect(),
                    vectors: vec![],
                });
            }
        }
        if let Some(samples) = self.in_flight.pop_front() {
            self.now += 1;
            self.engine.handle(Instant(self.now), Event::Samples(samples));
        }
    }

    fn rows_per_step(&self) -> f64 {
        self.rows as f64 / self.steps.max(1) as f64
    }
}
