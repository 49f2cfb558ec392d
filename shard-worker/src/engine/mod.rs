//! The head's machine: which rows of which sequences go through the stages next.
//!
//! ```text
//!                      ┌────────────────────────── Engine ──────────────────────────┐
//! Submit ─► intake ──► │ waiting ─► admit ─► running: prefill ─► decode ─► finished │ ─► Emit
//! Cancel               │    ▲                    │                                  │ ─► Open, Close
//! Samples ─► absorb ─► │    └──── preempt ───────┘   scheduler ─► batch ─► pipeline │ ─► Issue
//! Fault                └────────────────────────────────────────────────────────────┘
//! ```
//!
//! The shell tells events with `handle(now, event)`, takes actions with `poll_action` until there is
//! none, and sends `Tick` when `next_deadline` has come. Steps are made when actions are polled, so
//! that requests that arrive together travel together. Actions are to be sent in the order in which
//! they come: `Open`, `Issue` and `Close` on the links are ordered among themselves, and that order is
//! what makes it safe to grant a block again behind the `Close` of the sequence that held it.
//!
//! What is not here: tensors, sockets, clocks, and any knowledge of who computes the stages. An
//! engine lives as long as its generation: after a fault it answers everything with an error, and the
//! next generation has an engine of its own.

mod absorb;
mod batch;
mod blocks;
mod check;
mod config;
mod fault;
mod intake;
mod pipeline;
mod prefixes;
mod scheduler;
mod sequence;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use shoal_protocol::activation::{CloseHeader, Open, Samples, Step};
use shoal_protocol::control::HeadReport;
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::TokenId;
use shoal_protocol::prefix::{PrefixReport, Tenant};
use shoal_protocol::request::{
    DoneHeader, FailedHeader, FinishReason, Generate, HeadEvent, NO_STOP_TOKEN, VectorHeader,
};
use shoal_protocol::units::Instant;

pub use self::blocks::BlockPool;
pub use self::config::{BadEngineConfig, EngineConfig};

use self::pipeline::Pipeline;
use self::sequence::{FirstToken, Sequence};

/// The shell's name for one stream to a client. The shell never uses one twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientKey(pub u64);

/// What happens to an engine.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A coordinator asks for an answer. Legal at any time; what cannot be served is answered with
    /// `Failed`.
    Submit {
        /// Comes back in every `Emit` of this answer.
        key: ClientKey,
        /// What is asked for.
        request: Box<Generate>,
        /// Whose it is. `None`: it shares no blocks, with nobody.
        tenant: Option<Tenant>,
    },
    /// The client went away. Nothing is emitted for this key behind it. A key that is unknown (its
    /// answer has just ended) is ignored.
    Cancel {
        /// Whose.
        key: ClientKey,
    },
    /// The last stage has drawn the tokens of a step.
    Samples(Samples),
    /// A stage or a link was lost: no step of this generation will come back.
    Fault {
        /// What was lost, with names, for people.
        reason: String,
    },
    /// `next_deadline` has come.
    Tick,
}

/// What an engine wants done, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// To every stage: a sequence begins.
    Open(Open),
    /// To stage 0 and from there on: compute these rows.
    Issue {
        /// The step.
        step: Step,
        /// One token id per row, for stage 0.
        tokens: Vec<TokenId>,
    },
    /// To every stage: a sequence ends; frames behind this one may grant its blocks to others.
    Close(CloseHeader),
    /// To a client. `Done` and `Failed` are the last of their key.
    Emit {
        /// Which client.
        key: ClientKey,
        /// What it is told.
        event: HeadEvent,
    },
    /// The engine itself found that this generation cannot go on; all of its answers have been
    /// failed. The shell reports its shard as failed.
    Fault {
        /// Why, for people.
        reason: String,
    },
}

/// Order of arrival: lower came earlier. A sequence keeps it through preemptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Arrival(u64);

/// What an engine counted. All grow for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
struct Counters {
    preemptions: u64,
    prompt_tokens: u64,
    generated_tokens: u64,
    stray_samples: u64,
    lookups: u64,
    hits: u64,
    tokens_asked: u64,
    tokens_found: u64,
}

/// The head's machine of one generation of one replica.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    now: Instant,
    /// Every sequence that has not ended.
    sequences: BTreeMap<Arrival, Sequence>,
    keys: BTreeMap<ClientKey, Arrival>,
    /// Waiting and running are disjoint and together are `sequences`. Both are in order of arrival,
    /// so that a preempted sequence, which is older than all that wait, is the first of them again.
    waiting: BTreeSet<Arrival>,
    running: BTreeSet<Arrival>,
    deadlines: BTreeSet<(Instant, Arrival)>,
    blocks: BlockPool,
    pipeline: Pipeline,
    /// Rows of prompts in one step, so that the prompts that are there fill the pipeline.
    prefill_rows: u32,
    next_arrival: u64,
    next_sequence: u64,
    counters: Counters,
    /// Why this generation cannot go on.
    fault: Option<String>,
    actions: VecDeque<Action>,
}

impl Engine {
    /// An engine without sequences.
    pub fn new(config: EngineConfig) -> Result<Self, BadEngineConfig> {
        config.check()?;
        Ok(Self {
            now: Instant::default(),
            sequences: BTreeMap::new(),
            keys: BTreeMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            blocks: BlockPool::new(config.limits.kv_blocks),
            pipeline: Pipeline::new(&config),
            prefill_rows: config.limits.step_rows_max,
            next_arrival: 0,
            next_sequence: 1,
            counters: Counters::default(),
            fault: None,
            actions: VecDeque::new(),
            config,
        })
    }

    /// Takes an event. `now` never goes back.
    pub fn handle(&mut self, now: Instant, event: Event) {
        self.now = self.now.max(now);
        match event {
            Event::Submit { key, request, tenant } => self.submit(key, *request, tenant),
            Event::Cancel { key } => self.cancel(key),
            Event::Samples(samples) => self.absorb(&samples),
            Event::Fault { reason } => self.fail_generation(reason),
            Event::Tick => {}
        }
        self.expire();
    }

    /// The next thing to do; `None` until the next event. Makes steps while the pipeline has room.
    pub fn poll_action(&mut self) -> Option<Action> {
        if self.actions.is_empty() {
            self.schedule();
        }
        self.actions.pop_front()
    }

    /// When `Tick` is due at the latest: a request's deadline or that of the oldest step in flight.
    pub fn next_deadline(&self) -> Option<Instant> {
        let request = self.deadlines.first().map(|(at, _)| *at);
        let step = if self.fault.is_none() { self.pipeline.deadline() } else { None };
        request.into_iter().chain(step).min()
    }

    /// Whether no sequence waits or runs.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// What a worker reports of its head.
    pub fn report(&self) -> HeadReport {
        HeadReport {
            replica: self.config.replica,
            generation: self.config.generation,
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            blocks_used: self.blocks.used(),
            blocks_total: self.blocks.total(),
            preemptions: self.counters.preemptions,
            prompt_tokens: self.counters.prompt_tokens,
            generated_tokens: self.counters.generated_tokens,
            steps: self.pipeline.issued(),
        }
    }

    /// What a worker reports of the blocks whose content its head knows.
    pub fn prefixes(&self) -> PrefixReport {
        let prefixes = self.blocks.prefixes();
        PrefixReport {
            replica: self.config.replica,
            generation: self.config.generation,
            blocks_known: prefixes.len(),
            blocks_idle: prefixes.idle(),
            hits: self.counters.hits,
            lookups: self.counters.lookups,
            tokens_asked: self.counters.tokens_asked,
            tokens_found: self.counters.tokens_found,
            evictions: prefixes.evictions(),
        }
    }

    /// `Samples` that belonged to no step in flight, since the engine began.
    pub fn stray_samples(&self) -> u64 {
        self.counters.stray_samples
    }

    /// Ends a sequence: frees its blocks, closes it at the stages, and tells its client.
    fn end(&mut self, arrival: Arrival, told: Option<Ending>) {
        let Some(mut sequence) = self.sequences.remove(&arrival) else { return };
        self.keys.remove(&sequence.key());
        self.waiting.remove(&arrival);
        self.running.remove(&arrival);
        if let Some(deadline) = sequence.deadline() {
            self.deadlines.remove(&(deadline, arrival));
        }
        if let Some(told) = told {
            let (key, event) = (sequence.key(), told.event(&sequence));
            self.actions.push_back(Action::Emit { key, event });
        }
        self.leave_stages(&mut sequence);
    }

    /// Takes a sequence off the stages, if it is there, and frees its blocks.
    ///
    /// The blocks are free at once although steps that write to them may still be in flight: `Close`
    /// stands behind those steps on every link, and any grant of the same blocks stands behind
    /// `Close`. A stage computes frames in order, so it has finished the old rows before it computes
    /// the first row of the new holder, and no row reads a slot that its own sequence has not written
    /// before. The samples of the old steps come back under an id that is never used again.
    fn leave_stages(&mut self, sequence: &mut Sequence) {
        let Some(run) = sequence.leave() else { return };
        self.blocks.release_all(&run.blocks);
        // After a fault there is nobody to tell.
        if self.fault.is_none() {
            self.actions.push_back(Action::Close(CloseHeader {
                generation: self.config.generation.0,
                sequence: run.id.0,
            }));
        }
    }

    /// Fails the sequences whose deadline has passed, and the generation where a step's has.
    fn expire(&mut self) {
        while let Some(&(deadline, arrival)) = self.deadlines.first()
            && deadline <= self.now
        {
            self.deadlines.pop_first();
            let text = match self.sequences.get(&arrival) {
                Some(sequence) => sequence.expired_text(self.now),
                None => continue,
            };
            let error = WireError::new(ErrorCode::DeadlineExceeded, text);
            self.end(arrival, Some(Ending::Failed(error)));
        }
        if self.fault.is_none()
            && let Some(late) = self.pipeline.late(self.now)
        {
            self.find_fault(late);
        }
    }
}

/// The last thing that a client is told.
#[derive(Clone, Debug, PartialEq)]
enum Ending {
    Done {
        reason: FinishReason,
        stop_token: Option<TokenId>,
    },
    Failed(WireError),
    /// An encoder's.
    Vector {
        values: Vec<f32>,
        times: FirstToken,
    },
}

impl Ending {
    fn event(self, sequence: &Sequence) -> HeadEvent {
        let (request, attempt, choice) = sequence.names();
        match self {
            Ending::Done { reason, stop_token } => HeadEvent::Done {
                header: DoneHeader {
                    request: request.0,
                    attempt: attempt.0,
                    choice,
                    reason: reason as u32,
                    tokens: sequence.generated(),
                    preemptions: sequence.preemptions(),
                    stop_token: stop_token.unwrap_or(NO_STOP_TOKEN),
                },
                reason,
            },
            Ending::Failed(error) => failed(&error, request.0, attempt.0, choice),
            Ending::Vector { values, times } => HeadEvent::Vector {
                header: VectorHeader {
                    request: request.0,
                    attempt: attempt.0,
                    choice,
                    width: values.len() as u32,
                    queue_us: times.queue_us,
                    encode_us: times.prefill_us,
                    reserved: 0,
                },
                values,
            },
        }
    }
}

/// A `Failed` event.
fn failed(error: &WireError, request: u64, attempt: u32, choice: u32) -> HeadEvent {
    let code = error.code;
    let header =
        FailedHeader { request, attempt, choice, code: u32::from(code.number()), reserved: 0 };
    HeadEvent::Failed { header, code, message: error.message.clone() }
}

#[cfg(test)]
mod encode_test;
#[cfg(test)]
mod ends_test;
#[cfg(test)]
mod engine_test;
#[cfg(test)]
mod prefix_test;
#[cfg(test)]
mod random_test;
