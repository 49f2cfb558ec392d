//! ○ A head that is simulated: continuous batching with prompts in chunks.
//!
//! A step takes a fixed time, a time per stream that gets a token, and a time per prompt token; all
//! of it times how slow the replica is. At most so many sequences run; the others wait in turn.

use std::collections::VecDeque;

/// What a step takes, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Service {
    /// Whatever it has.
    pub step: f64,
    /// Per sequence that gets a token.
    pub row: f64,
    /// Per token of a prompt.
    pub prompt_token: f64,
    /// Sequences that run at a time.
    pub slots: usize,
    /// Prompt tokens of one step.
    pub chunk: u32,
}

impl Service {
    /// Answers a second that a replica carries with every slot in use.
    pub fn capacity(&self, prompt: f64, answer: f64) -> f64 {
        let slots = self.slots as f64;
        let prompts = prompt * slots / answer;
        let step = self.step + self.row * slots + self.prompt_token * prompts;
        slots / (answer * step)
    }
}

/// A sequence at a head.
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
    /// The request.
    pub request: usize,
    /// Which try.
    pub attempt: u32,
    /// Prompt tokens that are still to be computed.
    pub prompt: u32,
    /// Tokens that are still to come.
    pub answer: u32,
    /// When its prompt began, in seconds.
    pub began: f64,
}

/// What a step did for a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// The request.
    pub request: usize,
    /// Which try.
    pub attempt: u32,
    /// Where it was the first token: seconds from its first step.
    pub first: Option<f64>,
    /// Whether it was the last one.
    pub done: bool,
}

/// A head.
#[derive(Clone, Debug)]
pub struct Head {
    service: Service,
    /// How much slower than it should be.
    pub slow: f64,
    /// Takes requests and never says anything.
    pub frozen: bool,
    /// Sequences that run.
    pub running: Vec<Sequence>,
    /// Sequences that wait.
    pub waiting: VecDeque<Sequence>,
    /// Prompt tokens of each running sequence in the step that is under way; 0: a token comes.
    chunks: Vec<u32>,
    /// Whether a step is under way.
    pub busy: bool,
}

impl Head {
    /// An idle head.
    pub fn new(service: Service, slow: f64) -> Self {
        Self {
            service,
            slow,
            frozen: false,
            running: Vec::new(),
            waiting: VecDeque::new(),
            chunks: Vec::new(),
            busy: false,
        }
    }

    /// Begins the next step and says how long it takes; `None` where there is nothing to do.
    pub fn begin(&mut self, now: f64) -> Option<f64> {
        while self.running.len() < self.service.slots
            && let Some(mut next) = self.waiting.pop_front()
        {
            next.began = now;
            self.running.push(next);
        }
        self.busy = !self.running.is_empty() && !self.frozen;
        if !self.busy {
            return None;
        }
        let mut left = self.service.chunk;
        let (mut rows, mut prompts) = (0u32, 0u32);
        self.chunks.clear();
        for sequence in &self.running {
            let chunk = sequence.prompt.min(left);
            left -= chunk;
            prompts += chunk;
            rows += u32::from(sequence.prompt == 0);
            self.chunks.push(chunk);
        }
        let service = &self.service;
        let time = service.step
            + service.row * f64::from(rows)
            + service.prompt_token * f64::from(prompts);
        Some(time * self.slow)
    }

    /// Ends the step: which sequences got a token.
    pub fn end(&mut self, now: f64, out: &mut Vec<Progress>) {
        out.clear();
        for (sequence, chunk) in self.running.iter_mut().zip(&self.chunks) {
            let prefilled = sequence.prompt > 0;
            sequence.prompt -= chunk;
            if sequence.prompt > 0 {
                continue;
            }
            // The last chunk of a prompt gives the first token.
            sequence.answer -= 1;
            out.push(Progress {
                request: sequence.request,
                attempt: sequence.attempt,
                first: prefilled.then_some(now - sequence.began),
                done: sequence.answer == 0,
            });
        }
        self.running.retain(|sequence| sequence.answer > 0);
        self.busy = false;
    }

    /// Takes a sequence off, wherever it is.
    pub fn cancel(&mut self, request: usize, attempt: u32) {
        let other = |s: &Sequence| s.request != request || s.attempt != attempt;
        if let Some(i) = self.running.iter().position(|s| !other(s)) {
            self.running.remove(i);
            if i < self.chunks.len() {
                self.chunks.remove(i);
            }
        }
        self.waiting.retain(other);
    }

    /// When a new sequence would be complete if nothing else came, in seconds from now: what an
    /// omniscient router knows. Tokens flow evenly between two ends of sequences.
    pub fn foresee(&self, prompt: u32, answer: u32, scratch: &mut Vec<f64>) -> f64 {
        if self.frozen {
            return f64::INFINITY;
        }
        // Remaining tokens: those that run first, then those that wait in turn, then ours.
        scratch.clear();
        let all = self.running.iter().chain(&self.waiting);
        scratch.extend(all.map(|sequence| f64::from(sequence.answer)));
        scratch.push(f64::from(answer));
        let ours = scratch.len() - 1;
        let prompts: u32 = self.running.iter().chain(&self.waiting).map(|s| s.prompt).sum();
        let service = &self.service;
        let prompt_time = service.prompt_token * f64::from(prompts + prompt);
        let mut time = 0.0;
        let mut next = service.slots.min(scratch.len());
        let mut active: Vec<usize> = (0..next).collect();
        while let Some(least) = active.iter().map(|i| scratch[*i]).min_by(f64::total_cmp) {
            time += least * (service.step + service.row * active.len() as f64);
            active.iter().for_each(|i| scratch[*i] -= least);
            if scratch[ours] <= 0.0 {
                break;
            }
            active.retain(|i| scratch[*i] > 0.0);
            while active.len() < service.slots && next < scratch.len() {
                active.push(next);
                next += 1;
            }
        }
        (time + prompt_time) * self.slow
    }
}
