//! The compute thread alone: what goes in, what comes out, and where it lies in memory.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use shoal_protocol::activation::{BlockGrant, CloseHeader, Open, RowRecord, StepHeader};
use shoal_protocol::id::{AdapterId, Attempt, Generation, ReplicaId, RequestId, SequenceId};
use shoal_protocol::model::Split;
use shoal_protocol::plan::ReplicaLimits;
use shoal_protocol::request::SamplingRecord;
use shoal_protocol::trace::{SpanId, TraceId, TraceMark, Tracer};

use super::*;
use crate::model::{AdapterLoadError, AdapterSlices};
use crate::stage::{AdapterOrder, Served};

const WIDTH: usize = 8;
const VOCAB: usize = 5;

const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: 4,
    context_max: 64,
    step_rows_max: 4,
    sequences_max: 2,
    steps_in_flight_max: 2,
};

/// Adds one to what it gets, and notes where that lies. Logits rise to the last token.
#[derive(Default)]
struct AddOne {
    seen: Arc<Mutex<Vec<usize>>>,
    fails_at: Option<f32>,
    panics_at: Option<f32>,
    takes: Duration,
    last: bool,
    adapters: Arc<Mutex<Vec<AdapterId>>>,
}

impl ShardModel for AddOne {
    fn hidden(&self) -> usize {
        WIDTH
    }

    fn vocab(&self) -> std::ops::Range<usize> {
        0..if self.last { VOCAB } else { 0 }
    }

    fn round_bytes_max(&self) -> usize {
        0
    }

    fn forward(
        &mut self,
        _batch: &Batch<'_>,
        tokens: Option<&[u32]>,
        hidden: &mut [f32],
        logits: Option<&mut [f32]>,
        _peers: &mut dyn Collective,
    ) -> Result<(), ComputeError> {
        self.seen.lock().unwrap().push(hidden.as_ptr() as usize);
        if let Some(tokens) = tokens {
            let rows = hidden.chunks_exact_mut(WIDTH).zip(tokens);
            rows.for_each(|(row, &token)| row.fill(token as f32));
        }
        if self.fails_at == Some(hidden[0]) {
            return Err(ComputeError::Device("it is too warm".to_owned()));
        }
        assert!(self.panics_at != Some(hidden[0]), "a bug in the model");
        let begun = Instant::now();
        while begun.elapsed() < self.takes {}
        hidden.iter_mut().for_each(|x| *x += 1.0);
        if let Some(logits) = logits {
            logits.iter_mut().zip(0u32..).for_each(|(logit, i)| *logit = (i % VOCAB as u32) as f32);
        }
        Ok(())
    }

    fn load_adapter(
        &mut self,
        id: AdapterId,
        _slices: &AdapterSlices,
    ) -> Result<(), AdapterLoadError> {
        self.adapters.lock().unwrap().push(id);
        Ok(())
    }

    fn unload_adapter(&mut self, id: AdapterId) -> bool {
        self.adapters.lock().unwrap().retain(|loaded| *loaded != id);
        true
    }
}

struct Bench {
    input: mpsc::Sender<StageInput>,
    frames: mpsc::Receiver<LinkFrame>,
    thread: ComputeThread,
    pool: BufferPool,
    counters: Arc<Counters>,
}

fn start(index: u32, model: AddOne) -> Bench {
    start_among(Box::new(crate::collective::Alone), index, model)
}

fn start_among(peers: Box<dyn Collective>, index: u32, model: AddOne) -> Bench {
    let counters = Arc::new(Counters::default());
    let pool = BufferPool::new(WIDTH, LIMITS.step_rows_max as usize, 2);
    let (input, inputs) = mpsc::channel(8);
    let (frame, frames) = mpsc::channel(8);
    let last = model.last;
    let stage = Stage::new(StageParts {
        index: StageIndex(index),
        last,
        table: StageTable::new(Generation(1), LIMITS, last),
        model: Box::new(model),
        vocab: VOCAB as u32,
        pool: pool.clone(),
        outlet: if last { Outlet::Samples(frame) } else { Outlet::Next(vec![frame]) },
        mirrors: Vec::new(),
        peers,
        counters: Arc::clone(&counters),
        work: crate::stage::Work::default().share(),
        traces: StageTraces::new(Tracer::off(), ReplicaId(1), StageIndex(index), last),
    });
    let thread = ComputeThread::start("test".to_owned(), stage, inputs).unwrap();
    Bench { input, frames, thread, pool, counters }
}

fn open() -> StageInput {
    StageInput::Open(Open {
        generation: Generation(1),
        sequence: SequenceId(1),
        request: RequestId(1),
        attempt: Attempt(1),
        choice: 0,
        prompt_len: 1,
        adapter: None,
        sampling: SamplingRecord::GREEDY,
        tokens: vec![0],
    })
}

/// The row at a position of sequence 1.
fn step(position: u32, data: StepData) -> StageInput {
    let flags = if position == 0 { RowRecord::SAMPLE } else { 0 };
    let samples = u32::from(position == 0);
    let grants = if position.is_multiple_of(16) {
        vec![BlockGrant { sequence: 1, block: position / 16, flags: 0 }]
    } else {
        vec![]
    };
    let header = StepHeader {
        generation: 1,
        step: u64::from(position),
        rows: 1,
        grants: grants.len() as u32,
        samples,
        reserved: 0,
    };
    let step = Step { header, rows: vec![RowRecord { sequence: 1, position, flags }], grants };
    let records = records_of(&step);
    StageInput::Step { step, records, data }
}

#[tokio::test]
async fn a_middle_stage_computes_where_it_received_and_sends_from_there() {
    let model = AddOne::default();
    let seen = Arc::clone(&model.seen);
    let mut bench = start(1, model);
    bench.input.send(open()).await.unwrap();
    assert!(matches!(bench.frames.recv().await, Some(LinkFrame::Open(_))));
    for position in 0..40 {
        let mut buffer = bench.pool.take(1);
        buffer.floats_mut().fill(position as f32);
        let address = buffer.floats().as_ptr() as usize;
        bench.input.send(step(position, StepData::Hidden(buffer))).await.unwrap();
        let Some(LinkFrame::Step { payload, .. }) = bench.frames.recv().await else {
            panic!("no step comes out")
        };
        assert_eq!(payload.as_ptr() as usize, address);
        assert_eq!(seen.lock().unwrap().last(), Some(&address));
        assert_eq!(payload[..4], (position as f32 + 1.0).to_le_bytes());
    }
    assert_eq!(bench.pool.allocations(), 1, "one buffer serves all steps");
    let close = CloseHeader { generation: 1, sequence: 1 };
    bench.input.send(StageInput::Close(close)).await.unwrap();
    assert!(matches!(bench.frames.recv().await, Some(LinkFrame::Close(c)) if c == close));
    drop(bench.input);
    let ended = bench.thread.ended().await.unwrap();
    assert!(ended.outcome.is_ok() && ended.model.is_some());
}

/// Ranks that waited for long before a step began: in the draw of the one before.
struct WaitedBefore(Duration);

impl Collective for WaitedBefore {
    fn split(&self) -> Split {
        Split::WHOLE
    }

    fn exchange(&mut self, _parts: &[Bytes]) -> Result<Vec<Bytes>, CollectiveError> {
        panic!("there is nobody else")
    }

    fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.0)
    }
}

#[tokio::test]
async fn what_a_draw_waited_is_not_taken_off_the_next_step() {
    let takes = Duration::from_millis(2);
    let waited = WaitedBefore(Duration::from_secs(3600));
    let mut bench = start_among(Box::new(waited), 1, AddOne { takes, ..AddOne::default() });
    bench.input.send(open()).await.unwrap();
    assert!(matches!(bench.frames.recv().await, Some(LinkFrame::Open(_))));
    let buffer = bench.pool.take(1);
    bench.input.send(step(0, StepData::Hidden(buffer))).await.unwrap();
    assert!(matches!(bench.frames.recv().await, Some(LinkFrame::Step { .. })));
    assert!(bench.counters.snapshot().compute_us >= 2000);
}

#[tokio::test]
async fn an_adapter_goes_behind_the_last_sequence_that_uses_it() {
    let model = AddOne::default();
    let loaded = Arc::clone(&model.adapters);
    let bench = start(1, model);
    let now = || loaded.lock().unwrap().clone();
    let mut answers = Vec::new();
    for id in [AdapterId(4), AdapterId(5)] {
        let (done, answer) = oneshot::channel();
        let slices = AdapterSlices { deltas: Vec::new(), held: Default::default() };
        let order = AdapterOrder::Load { id, slices, done };
        bench.input.send(StageInput::Adapter(order)).await.unwrap();
        answer.await.unwrap().unwrap();
    }
    let StageInput::Open(open) = open() else { unreachable!("it is one") };
    let open = Open { adapter: Some(AdapterId(4)), ..open };
    bench.input.send(StageInput::Open(open)).await.unwrap();
    for id in [AdapterId(4), AdapterId(5)] {
        let (done, answer) = oneshot::channel();
        let order = AdapterOrder::Unload { id, done };
        bench.input.send(StageInput::Adapter(order)).await.unwrap();
        answers.push(answer);
    }
    // Nobody uses the second one.
    answers.remove(1).await.unwrap();
    assert_eq!(now(), [AdapterId(4)]);
    assert!(answers[0].try_recv().is_err(), "a sequence uses it still");
    let close = CloseHeader { generation: 1, sequence: 1 };
    bench.input.send(StageInput::Close(close)).await.unwrap();
    answers.remove(0).await.unwrap();
    assert!(now().is_empty());
}

#[test]
fn a_head_takes_requests_for_what_is_loaded_and_for_the_base() {
    let served = Served::default();
    assert_eq!(served.refusal(None), None);
    let refused = served.refusal(Some(AdapterId(2))).unwrap();
    assert!(refused.message.contains("adapter 2 is not loaded at this replica"), "{refused:?}");
    served.set(AdapterId(2), true);
    assert_eq!(served.refusal(Some(AdapterId(2))), None);
    served.set(AdapterId(2), false);
    assert!(served.refusal(Some(AdapterId(2))).is_some());
}

#[tokio::test]
async fn a_mark_behind_its_open_is_handed_on_and_one_that_stands_elsewhere_is_a_fault() {
    let mark = TraceMark { trace: TraceId(5), span: SpanId(6) };
    let trace = |sequence| {
        StageInput::Trace(TraceHeader::of_sequence(mark, Generation(1), SequenceId(sequence)))
    };
    let mut bench = start(1, AddOne::default());
    bench.input.send(open()).await.unwrap();
    bench.input.send(trace(1)).await.unwrap();
    assert!(matches!(bench.frames.recv().await, Some(LinkFrame::Open(_))));
    let Some(LinkFrame::Trace(header)) = bench.frames.recv().await else { panic!("no mark") };
    assert_eq!((header.sequence, header.mark()), (1, Ok(mark)));
    assert!(ends_with(1, AddOne::default(), vec![open(), trace(2)], "not open").await);
    assert!(ends_with(1, AddOne::default(), vec![trace(1)], "not open").await);
}

#[tokio::test]
async fn a_last_stage_draws_and_sends_nothing_else() {
    let mut bench = start(1, AddOne { last: true, ..AddOne::default() });
    bench.input.send(open()).await.unwrap();
    let buffer = bench.pool.take(1);
    bench.input.send(step(0, StepData::Hidden(buffer))).await.unwrap();
    let Some(LinkFrame::Samples { samples, .. }) = bench.frames.recv().await else {
        panic!("no samples come out")
    };
    assert_eq!(samples.samples.len(), 1);
    assert_eq!(samples.samples[0].token, VOCAB as u32 - 1);
}

async fn ends_with(index: u32, model: AddOne, inputs: Vec<StageInput>, words: &str) -> bool {
    let mut bench = start(index, model);
    for input in inputs {
        bench.input.send(input).await.unwrap();
    }
    let ended = bench.thread.ended().await.unwrap();
    let error = ended.outcome.unwrap_err();
    assert!(error.to_string().contains(words), "{words:?} is not in {error}");
    ended.model.is_some()
}

#[tokio::test]
async fn a_fault_ends_the_thread_with_words_and_gives_the_model_back() {
    let tokens = || StepData::Tokens(vec![7]);
    let warm = AddOne { fails_at: Some(7.0), ..AddOne::default() };
    assert!(ends_with(0, warm, vec![open(), step(0, tokens())], "it is too warm").await);
    let plain = AddOne::default;
    assert!(ends_with(0, plain(), vec![step(0, tokens())], "not open").await);
    assert!(ends_with(1, plain(), vec![open(), step(0, tokens())], "tokens").await);
    let many = StepData::Tokens(vec![7, 8]);
    assert!(ends_with(0, plain(), vec![open(), step(0, many)], "one for each row").await);
}

#[tokio::test]
async fn a_panic_ends_the_thread_alone() {
    let model = AddOne { panics_at: Some(7.0), ..AddOne::default() };
    let inputs = vec![open(), step(0, StepData::Tokens(vec![7]))];
    assert!(!ends_with(0, model, inputs, "a bug in the model").await, "the model is not trusted");
}
