//! Traced answers at one head: how long each waited, how its prompt went, how it decoded.
//!
//! ```text
//! attempt (coordinator's) ─► head ─┬─► queue ─► prefill ─► decode       queue again where it is preempted
//!                                  ├─► prefill chunk …                 a step with rows of the prompt,
//!                                  └─► the stages' steps               from its issue until it is back
//! ```
//!
//! The engine knows nothing of it: what it does is read from its actions.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use shoal_protocol::activation::{Open, Step};
use shoal_protocol::id::{Generation, ReplicaId, SequenceId, StepId};
use shoal_protocol::request::{Generate, HeadEvent};
use shoal_protocol::trace::{TraceHeader, TraceMark, Tracer};

use super::{Clocks, STEPS_SHOWN_MAX};
use crate::engine::ClientKey;

/// The traced answers of one head.
#[derive(Debug)]
pub struct HeadTraces {
    tracer: Tracer,
    replica: ReplicaId,
    generation: Generation,
    /// At most as many as the engine has sequences.
    answers: BTreeMap<ClientKey, Answer>,
    /// Whose sequence it is, for those on the stages.
    sequences: BTreeMap<SequenceId, ClientKey>,
    /// Chunks of prompts that are on their way, in order of issue.
    chunks: VecDeque<Chunk>,
}

#[derive(Debug)]
struct Answer {
    /// The coordinator's.
    above: TraceMark,
    /// What the stages' spans hang under.
    mine: TraceMark,
    begun: Instant,
    phase: Phase,
    since: Instant,
    /// When it went off the stages, until it is known whether it is over or waits again.
    left: Option<Instant>,
    /// What `Open` will say of it.
    name: (u64, u32, u32),
    prompt: u32,
    /// Tokens when it was last opened: where decoding begins.
    prefill: u32,
    chunks: u32,
    tokens: u32,
    runs: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Queue,
    Prefill,
    Decode,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Phase::Queue => "queue",
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
        }
    }
}

#[derive(Debug)]
struct Chunk {
    step: StepId,
    issued: Instant,
    under: TraceMark,
    position: u32,
    rows: usize,
}

impl HeadTraces {
    /// A head without traced answers.
    pub fn new(tracer: Tracer, replica: ReplicaId, generation: Generation) -> Self {
        let (answers, sequences) = (BTreeMap::new(), BTreeMap::new());
        Self { tracer, replica, generation, answers, sequences, chunks: VecDeque::new() }
    }

    /// Whether nothing is traced.
    pub fn is_idle(&self) -> bool {
        self.answers.is_empty()
    }

    /// A request came with a mark.
    pub fn submitted(&mut self, key: ClientKey, request: &Generate, above: TraceMark) {
        let now = Instant::now();
        // Where nobody exports here the stages' spans hang under the coordinator's.
        let mine = match self.tracer.is_on() {
            true => TraceMark { span: self.tracer.id(), ..above },
            false => above,
        };
        let answer = Answer {
            above,
            mine,
            begun: now,
            phase: Phase::Queue,
            since: now,
            left: None,
            name: (request.request.0, request.attempt.0, request.choice),
            prompt: request.prompt_len,
            prefill: request.tokens.len() as u32,
            chunks: 0,
            tokens: 0,
            runs: 0,
        };
        self.answers.insert(key, answer);
    }

    /// A sequence goes onto the stages: what they are to be told of it.
    pub fn opened(&mut self, open: &Open) -> Option<TraceHeader> {
        if self.is_idle() {
            return None;
        }
        let name = (open.request.0, open.attempt.0, open.choice);
        let (&key, answer) = self.answers.iter_mut().find(|(_, answer)| answer.name == name)?;
        answer.prefill = open.tokens.len() as u32;
        answer.runs += 1;
        let mark = answer.mine;
        let left = answer.left.take();
        self.sequences.insert(open.sequence, key);
        if let Some(left) = left {
            self.enter(key, Phase::Queue, left);
        }
        self.enter(key, Phase::Prefill, Instant::now());
        Some(TraceHeader::of_sequence(mark, self.generation, open.sequence))
    }

    /// A sequence goes off the stages.
    pub fn closed(&mut self, sequence: SequenceId) {
        let key = self.sequences.remove(&sequence);
        if let Some(answer) = key.and_then(|key| self.answers.get_mut(&key)) {
            answer.left = Some(Instant::now());
        }
    }

    /// A step goes to the stages.
    pub fn issued(&mut self, step: &Step) {
        if self.is_idle() || !self.tracer.is_on() {
            return;
        }
        for rows in step.rows.chunk_by(|a, b| a.sequence == b.sequence) {
            let key = self.sequences.get(&SequenceId(rows[0].sequence));
            let Some(answer) = key.and_then(|key| self.answers.get_mut(key)) else { continue };
            if rows[0].position >= answer.prefill || answer.chunks >= STEPS_SHOWN_MAX {
                continue;
            }
            answer.chunks += 1;
            self.chunks.push_back(Chunk {
                step: StepId(step.header.step),
                issued: Instant::now(),
                under: answer.mine,
                position: rows[0].position,
                rows: rows.len(),
            });
        }
    }

    /// A step is back from the stages, and all before it with it.
    pub fn landed(&mut self, step: StepId) {
        while let Some(chunk) = self.chunks.pop_front_if(|chunk| chunk.step <= step) {
            let clocks = Clocks::read();
            let (from, to) = (clocks.wall(chunk.issued), clocks.wall(clocks.at));
            let span = self
                .tracer
                .span(chunk.under, "prefill chunk", from, to)
                .with("shoal.step", chunk.step.0)
                .with("shoal.position", chunk.position)
                .with("shoal.rows", chunk.rows);
            self.tracer.give(span);
        }
    }

    /// A client is told something.
    pub fn told(&mut self, key: ClientKey, event: &HeadEvent) {
        if self.is_idle() {
            return;
        }
        match event {
            HeadEvent::Token { .. } => {
                if let Some(answer) = self.answers.get_mut(&key) {
                    answer.tokens += 1;
                    if answer.phase == Phase::Prefill {
                        self.enter(key, Phase::Decode, Instant::now());
                    }
                }
            }
            HeadEvent::Reused { .. } => {}
            HeadEvent::Done { .. } | HeadEvent::Vector { .. } => self.end(key, "done", None),
            HeadEvent::Failed { code, .. } => self.end(key, "failed", Some(code.label())),
        }
    }

    /// A client went away.
    pub fn cancelled(&mut self, key: ClientKey) {
        self.end(key, "cancelled", None);
    }

    /// Its phase is over, and another one begins.
    fn enter(&mut self, key: ClientKey, next: Phase, at: Instant) {
        let Some(answer) = self.answers.get_mut(&key) else { return };
        let (phase, since) = (answer.phase, std::mem::replace(&mut answer.since, at));
        answer.phase = next;
        if self.tracer.is_on() {
            let clocks = Clocks::read();
            let (from, to) = (clocks.wall(since), clocks.wall(at));
            let span = self.tracer.span(answer.mine, phase.name(), from, to);
            self.tracer.give(span);
        }
    }

    fn end(&mut self, key: ClientKey, outcome: &'static str, error: Option<&'static str>) {
        let Some(left) = self.answers.get(&key).map(|answer| answer.left) else { return };
        let clocks = Clocks::read();
        // The phase that it is in ends with it.
        self.enter(key, Phase::Queue, left.unwrap_or(clocks.at));
        let Some(answer) = self.answers.remove(&key) else { return };
        self.sequences.retain(|_, of| *of != key);
        if !self.tracer.is_on() {
            return;
        }
        let mut span = self
            .tracer
            .span(answer.above, "head", clocks.wall(answer.begun), clocks.wall(clocks.at))
            .with("shoal.replica", self.replica.to_string())
            .with("shoal.generation", self.generation.0)
            .with("shoal.attempt", answer.name.1)
            .with("shoal.choice", answer.name.2)
            .with("shoal.prompt_tokens", answer.prompt)
            .with("shoal.replayed_tokens", answer.prefill.saturating_sub(answer.prompt))
            .with("shoal.tokens", answer.tokens)
            .with("shoal.preemptions", answer.runs.saturating_sub(1))
            .with("shoal.outcome", outcome);
        span.mark = answer.mine;
        span.error = error.map(str::to_owned);
        self.tracer.give(span);
    }
}

/// What a head leaves behind is told, too.
impl Drop for HeadTraces {
    fn drop(&mut self) {
        while let Some((&key, _)) = self.answers.first_key_value() {
            self.end(key, "cut off", None);
        }
    }
}
