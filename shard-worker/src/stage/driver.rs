//! The compute thread of one shard: takes what upstream sends in order, keeps the stage's table,
//! computes, and hands on.
//!
//! ```text
//! StageInput ─► StageTable (○) ─► ShardModel::forward, in place ─► LinkFrame to the next stage
//!                                                            └──► draw ─► Samples to the head
//! ```
//!
//! It is a thread, not a task: a step computes for milliseconds. A fault ends the thread with words
//! and gives the model back; it never ends the process, not even by a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bytes::Bytes;
use shoal_protocol::activation::{Samples, Step};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{SequenceId, StageIndex};
use shoal_protocol::trace::TraceHeader;
use tokio::sync::{mpsc, oneshot, watch};

use super::adapters::Leaving;
use super::buffer::{BufferPool, HiddenBuffer};
use super::counters::Counters;
use super::draw::{DrawError, OwnLogits};
use super::table::{SpanBuffer, StageFault, StageTable};
use super::wire::{LinkFrame, StageInput, StepData};
use super::work::WorkShare;
use crate::collective::{Collective, CollectiveError};
use crate::model::{Batch, ComputeError, Output, ShardModel};
use crate::trace::{StageTraces, StepTimes};

/// Where a shard's results go.
#[derive(Debug)]
pub enum Outlet {
    /// Over links: to those ranks of the next stage that this one feeds.
    Next(Vec<mpsc::Sender<LinkFrame>>),
    /// Over a link: from the last stage to the head.
    Samples(mpsc::Sender<LinkFrame>),
    /// To the head of a replica that has one stage.
    Head(mpsc::Sender<Samples>),
    /// Nowhere: rank 0 of this stage speaks for all.
    Nobody,
}

/// A stage that cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// A frame did not fit what the stage knows.
    #[error("a frame for {0} broke the protocol: {1}")]
    Fault(StageIndex, StageFault),
    /// The model could not compute.
    #[error("{0} cannot compute: {1}")]
    Compute(StageIndex, ComputeError),
    /// Token ids where hidden states belong, or not one for each row.
    #[error("{0} got a step with {1}")]
    WrongData(StageIndex, &'static str),
    /// A bug.
    #[error("{0} panicked: {1}")]
    Panic(StageIndex, String),
}

impl From<&StageError> for WireError {
    fn from(error: &StageError) -> Self {
        let code = match error {
            StageError::Fault(..) | StageError::WrongData(..) => ErrorCode::ProtocolViolation,
            StageError::Compute(..) => ErrorCode::ComputeFailed,
            StageError::Panic(..) => ErrorCode::Internal,
        };
        WireError::new(code, error.to_string())
    }
}

/// What a compute thread leaves behind.
pub struct Ended {
    /// The model, unless it panicked.
    pub model: Option<Box<dyn ShardModel>>,
    /// Why, unless it was told to.
    pub outcome: Result<(), StageError>,
}

impl std::fmt::Debug for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ended({:?}, model left: {})", self.outcome, self.model.is_some())
    }
}

/// A compute thread, as its owner sees it.
#[derive(Debug)]
pub struct ComputeThread {
    stop: Arc<AtomicBool>,
    sequences: watch::Receiver<usize>,
    /// Closed without a value where the thread could not even unwind.
    ended: oneshot::Receiver<Ended>,
}

impl ComputeThread {
    /// Starts the thread of `stage`.
    pub fn start(
        name: String,
        mut stage: Stage,
        mut inputs: mpsc::Receiver<StageInput>,
    ) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (done, ended) = oneshot::channel();
        let sequences = stage.sequences.subscribe();
        std::thread::Builder::new().name(name).spawn(move || {
            let index = stage.index;
            let body = || stage.run(&mut inputs, &stopped);
            // The stage is not used after a panic but for dropping it.
            let ended = match catch_unwind(AssertUnwindSafe(body)) {
                Ok(outcome) => Ended { model: Some(stage.model), outcome },
                Err(panic) => {
                    let words = panic_words(panic.as_ref());
                    Ended { model: None, outcome: Err(StageError::Panic(index, words)) }
                }
            };
            // It fails where the owner is gone: then nobody wants the model.
            let _ = done.send(ended);
        })?;
        Ok(Self { stop, sequences, ended })
    }

    /// Asks the thread to end behind the step that it is in. It also needs its queue to close.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// How many sequences are open at the stage, as it changes.
    pub fn sequences(&self) -> watch::Receiver<usize> {
        self.sequences.clone()
    }

    /// Waits for the end; `None` where the thread is gone without a word. Cancel safe.
    pub async fn ended(&mut self) -> Option<Ended> {
        (&mut self.ended).await.ok()
    }
}

fn panic_words(panic: &(dyn std::any::Any + Send)) -> String {
    let words = panic.downcast_ref::<&str>().copied();
    let words = words.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    words.unwrap_or("no message").to_owned()
}

/// What a stage is made of.
pub struct StageParts {
    /// Its number.
    pub index: StageIndex,
    /// Whether it draws tokens.
    pub last: bool,
    /// What it knows of its sequences.
    pub table: StageTable,
    /// What it computes with.
    pub model: Box<dyn ShardModel>,
    /// The vocabulary of all ranks of a last stage together.
    pub vocab: u32,
    /// Where the first stage's hidden states come from.
    pub pool: BufferPool,
    /// Where results go.
    pub outlet: Outlet,
    /// The other ranks of the first stage, which take what the head gives this one.
    pub mirrors: Vec<mpsc::Sender<LinkFrame>>,
    /// All other ranks of this stage.
    pub peers: Box<dyn Collective>,
    /// What it counts.
    pub counters: Arc<Counters>,
    /// Its part of what flows at the worker.
    pub work: WorkShare,
    /// The sequences whose steps are told.
    pub traces: StageTraces,
}

/// What the thread owns.
pub struct Stage {
    index: StageIndex,
    last: bool,
    table: StageTable,
    model: Box<dyn ShardModel>,
    vocab: u32,
    pool: BufferPool,
    outlet: Outlet,
    mirrors: Vec<mpsc::Sender<LinkFrame>>,
    peers: Box<dyn Collective>,
    counters: Arc<Counters>,
    /// How many are open.
    sequences: watch::Sender<usize>,
    work: WorkShare,
    traces: StageTraces,
    /// The sequence that was opened last, with its tokens: what a `Trace` behind it is about.
    opened: Option<(SequenceId, u32)>,
    /// Adapters that go behind their last sequence.
    leaving: Leaving,
    /// Kept for their memory.
    spans: SpanBuffer,
    logits: Vec<f32>,
}

/// The other end is gone; its owner knows why.
struct Closed;

impl Stage {
    /// A stage without steps.
    pub fn new(parts: StageParts) -> Self {
        Self {
            index: parts.index,
            last: parts.last,
            table: parts.table,
            model: parts.model,
            vocab: parts.vocab,
            pool: parts.pool,
            outlet: parts.outlet,
            mirrors: parts.mirrors,
            peers: parts.peers,
            counters: parts.counters,
            sequences: watch::Sender::new(0),
            work: parts.work,
            traces: parts.traces,
            opened: None,
            leaving: Leaving::default(),
            spans: SpanBuffer::default(),
            logits: Vec::new(),
        }
    }

    fn run(
        &mut self,
        inputs: &mut mpsc::Receiver<StageInput>,
        stop: &AtomicBool,
    ) -> Result<(), StageError> {
        let mut idle = self.now_if_traced();
        while let Some(input) = inputs.blocking_recv() {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            if let Err(Closed) = self.take(input, idle)? {
                break;
            }
            idle = self.now_if_traced();
        }
        Ok(())
    }

    /// Nothing is timed for sequences that are not traced.
    fn now_if_traced(&self) -> Option<Instant> {
        (!self.traces.is_idle()).then(Instant::now)
    }

    /// Takes what came, for which the stage has waited since `idle`.
    fn take(
        &mut self,
        input: StageInput,
        idle: Option<Instant>,
    ) -> Result<Result<(), Closed>, StageError> {
        let index = self.index;
        let fault = |fault| StageError::Fault(index, fault);
        match input {
            StageInput::Open(open) => {
                self.table.open(&open).map_err(fault)?;
                self.count();
                self.opened = Some((open.sequence, open.tokens.len() as u32));
                Ok(self.hand_on(LinkFrame::Open(open)))
            }
            StageInput::Trace(trace) => {
                self.begin_trace(&trace).map_err(fault)?;
                Ok(self.hand_on(LinkFrame::Trace(trace)))
            }
            StageInput::Close(close) => {
                self.table.close(&close).map_err(fault)?;
                self.count();
                self.traces.end(SequenceId(close.sequence));
                self.leaving.look(&self.table, &mut *self.model);
                Ok(self.hand_on(LinkFrame::Close(close)))
            }
            StageInput::Adapter(order) => {
                self.leaving.take(order, &self.table, &mut *self.model);
                Ok(Ok(()))
            }
            StageInput::Step { step, records, data } => {
                let taken = idle.map(|idle| (idle, Instant::now()));
                if let Err(Closed) = self.mirror(&step, &records, &data) {
                    return Ok(Err(Closed));
                }
                let Some(hidden) = self.compute(&step, data)? else { return Ok(Err(Closed)) };
                let ready = Instant::now();
                let (drawn, sent) = if self.last {
                    drop(hidden);
                    let Some(samples) = self.draw(&step)? else { return Ok(Err(Closed)) };
                    let drawn = taken.map(|_| Instant::now());
                    (drawn, self.give_samples(samples, ready))
                } else {
                    let (header, payload) = (step.header, hidden.into_bytes());
                    (None, self.hand_on(LinkFrame::Step { header, records, payload, ready }))
                };
                if let Some((idle, taken)) = taken {
                    let (drawn, sent) = (drawn.unwrap_or(ready), Instant::now());
                    let times = StepTimes { idle, taken, computed: ready, drawn, sent };
                    self.traces.step(&step, &times);
                }
                Ok(sent)
            }
        }
    }

    /// A `Trace` stands right behind the `Open` of its sequence.
    fn begin_trace(&mut self, trace: &TraceHeader) -> Result<(), StageFault> {
        let sequence = SequenceId(trace.sequence);
        match self.opened.take() {
            Some((opened, tokens)) if opened == sequence => {
                // A mark of zeros marks nothing, and hurts nobody.
                if let Ok(mark) = trace.mark() {
                    self.traces.begin(sequence, mark, tokens);
                }
                Ok(())
            }
            _ => Err(StageFault::UnknownSequence(sequence)),
        }
    }

    /// Sends what was drawn to the head.
    fn give_samples(&self, samples: Samples, ready: Instant) -> Result<(), Closed> {
        match &self.outlet {
            Outlet::Samples(to) => {
                to.blocking_send(LinkFrame::Samples { samples, ready }).map_err(|_| Closed)
            }
            Outlet::Head(to) => to.blocking_send(samples).map_err(|_| Closed),
            Outlet::Next(_) | Outlet::Nobody => Ok(()),
        }
    }

    fn count(&mut self) {
        let open = self.table.len();
        self.sequences.send_replace(open);
        self.work.set(open);
    }

    /// Sends a frame to the next stage; behind the last one there is none. What is no step goes to the
    /// other ranks beside the head too, which have had the steps already.
    fn hand_on(&self, frame: LinkFrame) -> Result<(), Closed> {
        if !matches!(frame, LinkFrame::Step { .. }) {
            send_to_all(&self.mirrors, frame.clone())?;
        }
        match &self.outlet {
            Outlet::Next(next) => send_to_all(next, frame),
            Outlet::Samples(_) | Outlet::Head(_) | Outlet::Nobody => Ok(()),
        }
    }

    /// Gives the other ranks beside the head what it gave this one, before any of them computes.
    fn mirror(&self, step: &Step, records: &Bytes, data: &StepData) -> Result<(), Closed> {
        let StepData::Tokens(tokens) = data else { return Ok(()) };
        if self.mirrors.is_empty() {
            return Ok(());
        }
        let payload = Bytes::copy_from_slice(bytemuck::cast_slice(tokens));
        let (header, records, ready) = (step.header, records.clone(), Instant::now());
        send_to_all(&self.mirrors, LinkFrame::Step { header, records, payload, ready })
    }

    /// Draws; `None`: another rank is gone, its link says why.
    fn draw(&mut self, step: &Step) -> Result<Option<Samples>, StageError> {
        let index = self.index;
        let own = self.model.vocab();
        let (whole, output) = (self.peers.split().is_whole(), self.model.output());
        if whole || output == Output::Vectors {
            let drawn = match output {
                Output::Logits => self.table.draw(step, &self.logits, own.len()),
                // Each rank has them whole.
                Output::Vectors => self.table.give_vectors(step, &self.logits, own.len()),
            };
            return drawn.map(Some).map_err(|fault| StageError::Fault(index, fault));
        }
        let (first, width) = (own.start as u32, own.len());
        let own = OwnLogits { first, width, vocab: self.vocab, logits: &self.logits };
        match self.table.draw_cut(step, &own, &mut *self.peers) {
            Ok(samples) => Ok(Some(samples)),
            Err(DrawError::Peers(CollectiveError::Gone { .. })) => Ok(None),
            Err(DrawError::Peers(error)) => Err(StageError::Compute(index, error.into())),
            Err(DrawError::Fault(fault)) => Err(StageError::Fault(index, fault)),
        }
    }

    /// Takes the rows through the layers; the logits of a last stage are in `self.logits` then. `None`:
    /// another rank is gone, its link says why.
    fn compute(&mut self, step: &Step, data: StepData) -> Result<Option<HiddenBuffer>, StageError> {
        let index = self.index;
        let rows = self.table.begin_step(step).map_err(|f| StageError::Fault(index, f))?;
        let first = index.0 == 0;
        let (mut hidden, tokens) = match data {
            StepData::Hidden(hidden) if !first => (hidden, None),
            StepData::Tokens(tokens) if first && tokens.len() == rows.rows() => {
                (self.pool.take(rows.rows()), Some(tokens))
            }
            StepData::Hidden(_) => {
                return Err(StageError::WrongData(index, "hidden states, not tokens"));
            }
            StepData::Tokens(_) => {
                return Err(StageError::WrongData(index, "tokens that are not one for each row"));
            }
        };
        let logits = self.last.then(|| {
            self.logits.resize(rows.sample_rows().len() * self.model.vocab().len(), 0.0);
            self.logits.as_mut_slice()
        });
        let spans = self.spans.take(&rows);
        let batch = Batch { spans: &spans, rows: rows.rows(), sample_rows: rows.sample_rows() };
        // What the draw of the step before waited is no part of this one.
        self.peers.take_waited();
        let begun = Instant::now();
        let (tokens, peers) = (tokens.as_deref(), &mut *self.peers);
        let computed = self.model.forward(&batch, tokens, hidden.floats_mut(), logits, peers);
        // All ranks of a stage are in lock-step: only without its waits does one show that it is slow.
        let computing = begun.elapsed().saturating_sub(self.peers.take_waited());
        self.counters.computed(batch.rows, computing);
        self.spans.give_back(spans);
        match computed {
            Ok(()) => Ok(Some(hidden)),
            Err(ComputeError::Peers(CollectiveError::Gone { .. })) => Ok(None),
            Err(error) => Err(StageError::Compute(index, error)),
        }
    }
}

/// Nothing of the frame stays here once it is sent: who has read it finds its buffer free.
fn send_to_all(to: &[mpsc::Sender<LinkFrame>], frame: LinkFrame) -> Result<(), Closed> {
    let send = |to: &mpsc::Sender<LinkFrame>, frame| to.blocking_send(frame).map_err(|_| Closed);
    let Some((last, others)) = to.split_last() else { return Ok(()) };
    others.iter().try_for_each(|to| send(to, frame.clone()))?;
    send(last, frame)
}

/// The records of a step that begins here, as they stand on the wire.
pub fn records_of(step: &Step) -> Bytes {
    step.encode_records().into()
}

#[cfg(test)]
#[path = "driver_test.rs"]
mod driver_test;
