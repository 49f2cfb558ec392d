//! What an engine is told once.

use std::time::Duration;

use shoal_protocol::id::{Generation, ReplicaId};
use shoal_protocol::plan::{BLOCK_TOKENS, ReplicaLimits, ReplicaPlan};

/// Sequences that may wait beyond those that may run. A few seconds of work for a small replica; the
/// coordinator's admission keeps the longer queue and can still choose another replica from there.
pub const QUEUE_MAX: u32 = 256;

/// How long a step may take before the generation is given up. Far above any real step (thousands of
/// rows on a slow CPU): a dead or frozen peer is noticed by its link within 2 s, so this ends only what
/// no link can notice, such as a stage that swallows a frame.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(60);

/// Into how many steps the prompts that are there are cut, per stage. A pipeline of s stages that k
/// steps go through is busy for k / (k + s - 1) of the time: 8 s keep it above 8/9.
pub const PREFILL_STEPS_PER_STAGE: u32 = 8;

/// No prompt is cut into steps of fewer rows: below, reading the weights costs more than computing.
pub const PREFILL_ROWS_MIN: u32 = 32;

/// Rows of a decode step from which one more micro-batch than stages is worth it: below, each step
/// costs about the same however few rows it has, so that more steps are more time.
pub const SPLIT_ROWS_MIN: u32 = 16;

/// The settings of an engine.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// The replica, for its report.
    pub replica: ReplicaId,
    /// The layout that all frames carry.
    pub generation: Generation,
    /// The plan's bounds.
    pub limits: ReplicaLimits,
    /// Pipeline stages; at least 1.
    pub stages: u32,
    /// The vocabulary's size: a request with an id outside of it is refused.
    pub vocab: u32,
    /// See `QUEUE_MAX`.
    pub queue_max: u32,
    /// See `STEP_TIMEOUT`.
    pub step_timeout: Duration,
    /// See `PREFILL_STEPS_PER_STAGE`.
    pub prefill_steps_per_stage: u32,
    /// See `PREFILL_ROWS_MIN`.
    pub prefill_rows_min: u32,
    /// See `SPLIT_ROWS_MIN`.
    pub split_rows_min: u32,
    /// What the hashes of known blocks begin with: 32 random bytes of this process. `None`: sequences
    /// share no blocks.
    pub prefix_key: Option<[u8; 32]>,
    /// Whether the model is an encoder: an input goes through in one step, and its vector is the answer.
    pub encodes: bool,
}

/// A setting with which an engine cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the engine's `{field}` is {value}; it must be at least {min}")]
pub struct BadEngineConfig {
    /// Which.
    pub field: &'static str,
    /// What it is.
    pub value: u32,
    /// What it may be.
    pub min: u32,
}

impl EngineConfig {
    /// The settings for a replica of this plan, with the defaults of the constants above.
    pub fn of_plan(plan: &ReplicaPlan, vocab: u32) -> Self {
        Self::new(plan.id, plan.generation, plan.limits.clone(), plan.stages.len() as u32, vocab)
    }

    /// The defaults.
    pub fn new(
        replica: ReplicaId,
        generation: Generation,
        limits: ReplicaLimits,
        stages: u32,
        vocab: u32,
    ) -> Self {
        Self {
            replica,
            generation,
            limits,
            stages,
            vocab,
            queue_max: QUEUE_MAX,
            step_timeout: STEP_TIMEOUT,
            prefill_steps_per_stage: PREFILL_STEPS_PER_STAGE,
            prefill_rows_min: PREFILL_ROWS_MIN,
            split_rows_min: SPLIT_ROWS_MIN,
            prefix_key: None,
            encodes: false,
        }
    }

    /// The longest sequence: what the plan allows, and no more than all blocks together hold, so
    /// that a sequence that runs alone never lacks a block.
    pub fn context(&self) -> u32 {
        let blocks = self.limits.kv_blocks.saturating_mul(BLOCK_TOKENS);
        if self.encodes {
            // A whole input, and one position more for the answer that takes none.
            return self.input_max().saturating_add(1).min(blocks);
        }
        self.limits.context_max.min(blocks)
    }

    /// The longest input of an encoder: all of it goes into one step.
    pub fn input_max(&self) -> u32 {
        self.limits.context_max.min(self.limits.step_rows_max)
    }

    /// Checks that something can be served at all.
    pub fn check(&self) -> Result<(), BadEngineConfig> {
        for (field, value, min) in [
            ("stages", self.stages, 1),
            ("vocab", self.vocab, 1),
            ("kv_blocks", self.limits.kv_blocks, 1),
            ("context_max", self.limits.context_max, 2),
            ("step_rows_max", self.limits.step_rows_max, 1),
            ("sequences_max", self.limits.sequences_max, 1),
            ("steps_in_flight_max", self.limits.steps_in_flight_max, 1),
            ("prefill_steps_per_stage", self.prefill_steps_per_stage, 1),
            ("prefill_rows_min", self.prefill_rows_min, 1),
            ("split_rows_min", self.split_rows_min, 1),
        ] {
            if value < min {
                return Err(BadEngineConfig { field, value, min });
            }
        }
        Ok(())
    }
}
