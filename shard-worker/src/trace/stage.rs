//! The steps of traced sequences at one stage.
//!
//! ```text
//! stage step   each step of a prompt and the first of the answer:  receive · compute · sample · send
//! stage steps  those behind them, 16, 32, … up to 1,024 in one span: how many, and the sums
//! ```
//!
//! An answer of thousands of tokens so makes tens of spans at each stage, not tens of thousands, and
//! its beginning, where most that is unusual happens, is there step by step.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use shoal_protocol::activation::{RowRecord, Step};
use shoal_protocol::id::{ReplicaId, SequenceId, StageIndex};
use shoal_protocol::trace::{Span, TraceMark, Tracer};

use super::Clocks;

/// Steps of a prompt that are shown one by one: the chunks of most prompts. Longer ones go on in sums.
pub const STEPS_SHOWN_MAX: u32 = 32;

/// Steps behind the prompt that are shown one by one: enough to see how they interleave with others.
const DECODES_SHOWN_MAX: u32 = 8;

/// Steps in the first sum; each further one has twice as many.
const SUM_MIN: u32 = 16;

/// The most steps in one sum: about every ten seconds of a stream something is to be seen.
const SUM_MAX: u32 = 1024;

/// When a step was where.
#[derive(Clone, Copy, Debug)]
pub struct StepTimes {
    /// Since when the stage had nothing to do.
    pub idle: Instant,
    /// The step was there.
    pub taken: Instant,
    /// It was computed.
    pub computed: Instant,
    /// The last stage had drawn its tokens; elsewhere as `computed`.
    pub drawn: Instant,
    /// The link, or the head, had taken what came out.
    pub sent: Instant,
}

/// The traced sequences of one stage.
#[derive(Debug)]
pub struct StageTraces {
    tracer: Tracer,
    replica: ReplicaId,
    stage: StageIndex,
    last: bool,
    /// At most as many as the stage has sequences.
    open: BTreeMap<SequenceId, Traced>,
}

#[derive(Debug)]
struct Traced {
    mark: TraceMark,
    /// Where its prompt ends.
    prompt: u32,
    prompts_shown: u32,
    decodes_shown: u32,
    sum_max: u32,
    sum: Option<Sum>,
}

#[derive(Debug)]
struct Sum {
    begun: Instant,
    ended: Instant,
    first_position: u32,
    steps: u32,
    rows: u32,
    receive: Duration,
    compute: Duration,
    sample: Duration,
    send: Duration,
}

impl StageTraces {
    /// A stage without traced sequences.
    pub fn new(tracer: Tracer, replica: ReplicaId, stage: StageIndex, last: bool) -> Self {
        Self { tracer, replica, stage, last, open: BTreeMap::new() }
    }

    /// Whether nothing is traced here: then nothing needs to be timed.
    pub fn is_idle(&self) -> bool {
        self.open.is_empty()
    }

    /// A sequence that has just been opened with so many tokens is traced.
    pub fn begin(&mut self, sequence: SequenceId, mark: TraceMark, prompt: u32) {
        if self.tracer.is_on() {
            let (prompts_shown, decodes_shown, sum_max) = (0, 0, SUM_MIN);
            let traced = Traced { mark, prompt, prompts_shown, decodes_shown, sum_max, sum: None };
            self.open.insert(sequence, traced);
        }
    }

    /// A sequence has ended.
    pub fn end(&mut self, sequence: SequenceId) {
        if let Some(mut traced) = self.open.remove(&sequence) {
            self.give_sum(&mut traced);
        }
    }

    /// A step is through.
    pub fn step(&mut self, step: &Step, times: &StepTimes) {
        for rows in step.rows.chunk_by(|a, b| a.sequence == b.sequence) {
            let sequence = SequenceId(rows[0].sequence);
            // Taken out for a moment, since its spans need the rest of the stage.
            let Some(mut traced) = self.open.remove(&sequence) else { continue };
            if traced.is_shown(rows[0].position) {
                self.give_step(traced.mark, step, rows, times);
            } else {
                traced.add(rows, times);
                if traced.sum.as_ref().is_some_and(|sum| sum.steps >= traced.sum_max) {
                    self.give_sum(&mut traced);
                    traced.sum_max = (traced.sum_max * 2).min(SUM_MAX);
                }
            }
            self.open.insert(sequence, traced);
        }
    }

    fn give_step(
        &self,
        under: TraceMark,
        step: &Step,
        rows: &[RowRecord],
        StepTimes { idle, taken, computed, drawn, sent }: &StepTimes,
    ) {
        let clocks = Clocks::read();
        let span = self.span(under, "stage step", clocks, (*idle, *sent));
        let part = |name, from: &Instant, to: &Instant| {
            let part = self.tracer.span(span.mark, name, clocks.wall(*from), clocks.wall(*to));
            self.tracer.give(part);
        };
        part("receive", idle, taken);
        part("compute", taken, computed);
        if self.last {
            part("sample", computed, drawn);
        }
        part("send", drawn, sent);
        let span = span
            .with("shoal.step", step.header.step)
            .with("shoal.position", rows[0].position)
            .with("shoal.rows", rows.len())
            .with("shoal.step.rows", step.header.rows)
            .with("shoal.samples", rows.iter().any(RowRecord::samples));
        self.tracer.give(span);
    }

    fn give_sum(&self, traced: &mut Traced) {
        let Some(sum) = traced.sum.take() else { return };
        let span = self
            .span(traced.mark, "stage steps", Clocks::read(), (sum.begun, sum.ended))
            .with("shoal.steps", sum.steps)
            .with("shoal.position", sum.first_position)
            .with("shoal.rows", sum.rows)
            .with("shoal.receive_us", sum.receive)
            .with("shoal.compute_us", sum.compute)
            .with("shoal.sample_us", sum.sample)
            .with("shoal.send_us", sum.send);
        self.tracer.give(span);
    }

    fn span(
        &self,
        under: TraceMark,
        name: &'static str,
        clocks: Clocks,
        (from, to): (Instant, Instant),
    ) -> Span {
        self.tracer
            .span(under, name, clocks.wall(from), clocks.wall(to))
            .with("shoal.replica", self.replica.to_string())
            .with("shoal.stage", self.stage.0)
    }
}

/// What a stage leaves behind is told, too.
impl Drop for StageTraces {
    fn drop(&mut self) {
        for mut traced in std::mem::take(&mut self.open).into_values() {
            self.give_sum(&mut traced);
        }
    }
}

impl Traced {
    /// Whether the step with a row at this position is shown on its own; counts it where it is.
    fn is_shown(&mut self, position: u32) -> bool {
        let (shown, max) = match position < self.prompt {
            true => (&mut self.prompts_shown, STEPS_SHOWN_MAX),
            false => (&mut self.decodes_shown, DECODES_SHOWN_MAX),
        };
        let is = *shown < max;
        *shown += u32::from(is);
        is
    }

    fn add(&mut self, rows: &[RowRecord], times: &StepTimes) {
        let sum = self.sum.get_or_insert_with(|| Sum {
            begun: times.idle,
            ended: times.sent,
            first_position: rows[0].position,
            steps: 0,
            rows: 0,
            receive: Duration::ZERO,
            compute: Duration::ZERO,
            sample: Duration::ZERO,
            send: Duration::ZERO,
        });
        sum.steps += 1;
        sum.rows += rows.len() as u32;
        sum.ended = times.sent;
        sum.receive += times.taken - times.idle;
        sum.compute += times.computed - times.taken;
        sum.sample += times.drawn - times.computed;
        sum.send += times.sent - times.drawn;
    }
}
