//! What is told of answers that are traced, and how little of long ones.

use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use shoal_protocol::activation::{Open, RowRecord, Step, StepHeader};
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{
    Attempt, Generation, ReplicaId, RequestId, SequenceId, StageIndex, StepId,
};
use shoal_protocol::request::{DoneHeader, FinishReason, Generate, HeadEvent, SamplingRecord};
use shoal_protocol::request::{FailedHeader, TokenHeader};
use shoal_protocol::trace::{Given, Span, SpanId, TraceId, TraceMark, Tracer, Value};

use super::*;
use crate::engine::ClientKey;

const MARK: TraceMark = TraceMark { trace: TraceId(77), span: SpanId(5) };
const KEY: ClientKey = ClientKey(1);

fn tracer() -> (Tracer, Receiver<Given>) {
    Tracer::new(9, 1.0, 10_000)
}

fn given(queue: &Receiver<Given>) -> Vec<Span> {
    let spans = queue.try_iter().map(|given| match given {
        Given::Span(span) => span,
        Given::Close => panic!("nobody closed it"),
    });
    spans.collect()
}

fn names(spans: &[Span]) -> Vec<&'static str> {
    spans.iter().map(|span| span.name).collect()
}

fn attribute(span: &Span, key: &str) -> Value {
    let found = span.attributes.iter().find(|(name, _)| *name == key);
    found.unwrap_or_else(|| panic!("{} has no {key}", span.name)).1.clone()
}

/// Rows of these sequences, each with its first position and their number.
fn step(number: u64, parts: &[(u64, u32, u32)]) -> Step {
    let row = |sequence, position| RowRecord { sequence, position, flags: 0 };
    let rows: Vec<RowRecord> = parts
        .iter()
        .flat_map(|&(sequence, first, count)| (first..first + count).map(move |p| row(sequence, p)))
        .collect();
    let header = StepHeader { step: number, rows: rows.len() as u32, ..StepHeader::default() };
    Step { header, rows, grants: Vec::new() }
}

/// A step of 1 ms of waiting, 2 of computing, 3 of drawing and 4 of sending.
fn times() -> StepTimes {
    let sent = Instant::now();
    let before = |ms| sent - Duration::from_millis(ms);
    StepTimes { idle: before(10), taken: before(9), computed: before(7), drawn: before(4), sent }
}

#[test]
fn a_step_of_a_traced_sequence_shows_its_parts_under_it_and_others_show_nothing() {
    let (tracer, queue) = tracer();
    let mut traces = StageTraces::new(tracer, ReplicaId(1), StageIndex(2), true);
    assert!(traces.is_idle());
    traces.begin(SequenceId(4), MARK, 3);
    assert!(!traces.is_idle());
    traces.step(&step(0, &[(8, 0, 2)]), &times());
    assert_eq!(given(&queue), [], "another one's step");
    traces.step(&step(1, &[(8, 2, 1), (4, 0, 3)]), &times());
    let spans = given(&queue);
    assert_eq!(names(&spans), ["receive", "compute", "sample", "send", "stage step"]);
    let whole = &spans[4];
    assert_eq!((whole.parent, whole.mark.trace), (Some(MARK.span), MARK.trace));
    assert_eq!(attribute(whole, "shoal.stage"), Value::Int(2));
    assert_eq!(attribute(whole, "shoal.rows"), Value::Int(3));
    assert_eq!(attribute(whole, "shoal.step.rows"), Value::Int(4));
    for part in &spans[..4] {
        assert_eq!(part.parent, Some(whole.mark.span), "{}", part.name);
    }
    traces.end(SequenceId(4));
    assert!(traces.is_idle());
    assert_eq!(given(&queue), []);
}

#[test]
fn a_long_answer_makes_tens_of_spans_and_none_of_its_steps_is_lost() {
    const DECODES: u32 = 20_000;
    let (tracer, queue) = tracer();
    let mut traces = StageTraces::new(tracer, ReplicaId(1), StageIndex(0), false);
    traces.begin(SequenceId(4), MARK, 200);
    for chunk in 0..50 {
        traces.step(&step(u64::from(chunk), &[(4, chunk * 4, 4)]), &times());
    }
    for decode in 0..DECODES {
        traces.step(&step(u64::from(decode) + 50, &[(4, 200 + decode, 1)]), &times());
    }
    drop(traces);
    let spans = given(&queue);
    let of = |name| spans.iter().filter(move |span| span.name == name);
    assert_eq!(of("stage step").count(), 32 + 8);
    assert_eq!(of("sample").count(), 0, "only the last stage draws");
    assert!(spans.len() < 200, "{} spans", spans.len());
    let sum = |key| -> i64 {
        let of_each = of("stage steps").map(|span| match attribute(span, key) {
            Value::Int(value) => value,
            other => panic!("{other:?}"),
        });
        of_each.sum()
    };
    let left_out = i64::from(50 - 32 + DECODES - 8);
    assert_eq!(sum("shoal.steps"), left_out);
    assert_eq!(sum("shoal.compute_us"), left_out * 2000);
    assert_eq!(sum("shoal.send_us"), left_out * 4000);
}

#[test]
fn where_nobody_exports_a_stage_keeps_and_times_nothing() {
    let mut traces = StageTraces::new(Tracer::off(), ReplicaId(1), StageIndex(0), false);
    traces.begin(SequenceId(4), MARK, 3);
    assert!(traces.is_idle());
}

fn request() -> Generate {
    Generate {
        request: RequestId(3),
        attempt: Attempt(2),
        choice: 1,
        replica: ReplicaId(1),
        deadline_ms: 0,
        prompt_len: 3,
        max_tokens: 9,
        adapter: None,
        sampling: SamplingRecord::GREEDY,
        stop_tokens: Vec::new(),
        tokens: vec![1, 2, 3, 4],
    }
}

fn open(sequence: u64, tokens: usize) -> Open {
    Open {
        generation: Generation(6),
        sequence: SequenceId(sequence),
        request: RequestId(3),
        attempt: Attempt(2),
        choice: 1,
        prompt_len: 3,
        adapter: None,
        sampling: SamplingRecord::GREEDY,
        tokens: vec![1; tokens],
    }
}

fn token() -> HeadEvent {
    HeadEvent::Token { header: TokenHeader::default(), candidates: Vec::new() }
}

fn done() -> HeadEvent {
    HeadEvent::Done { header: DoneHeader::default(), reason: FinishReason::Length }
}

#[test]
fn a_head_shows_the_queue_the_prompts_chunks_and_the_answer_also_over_a_preemption() {
    let (tracer, queue) = tracer();
    let mut traces = HeadTraces::new(tracer, ReplicaId(1), Generation(6));
    traces.submitted(KEY, &request(), MARK);
    assert_eq!(traces.opened(&Open { choice: 0, ..open(9, 4) }), None, "another choice");
    let header = traces.opened(&open(10, 4)).unwrap();
    let head = header.mark().unwrap();
    assert_eq!((header.generation, header.sequence, head.trace), (6, 10, MARK.trace));
    assert_ne!(head.span, MARK.span);
    traces.issued(&step(0, &[(9, 0, 4), (10, 0, 2)]));
    traces.issued(&step(1, &[(10, 2, 2)]));
    traces.landed(StepId(0));
    traces.landed(StepId(1));
    traces.told(KEY, &token());
    traces.issued(&step(2, &[(10, 4, 1)]));
    // It is preempted, and the token of its last step is heard of behind that.
    traces.closed(SequenceId(10));
    traces.told(KEY, &token());
    traces.opened(&open(11, 6)).unwrap();
    traces.told(KEY, &token());
    traces.closed(SequenceId(11));
    traces.told(KEY, &done());
    assert!(traces.is_idle());
    let spans = given(&queue);
    let order = ["queue", "prefill chunk", "prefill chunk", "prefill", "decode", "queue"];
    assert_eq!(names(&spans)[..6], order);
    assert_eq!(names(&spans)[6..], ["prefill", "decode", "head"]);
    let last = &spans[8];
    assert_eq!((last.mark, last.parent), (head, Some(MARK.span)));
    assert!(spans[..8].iter().all(|span| span.parent == Some(head.span)));
    for (key, value) in [
        ("shoal.tokens", 3),
        ("shoal.replayed_tokens", 3),
        ("shoal.preemptions", 1),
        ("shoal.attempt", 2),
    ] {
        assert_eq!(attribute(last, key), Value::Int(value), "{key}");
    }
    assert_eq!(attribute(&spans[1], "shoal.rows"), Value::Int(2));
}

#[test]
fn answers_that_fail_or_are_let_go_say_so() {
    let (tracer, queue) = tracer();
    let mut traces = HeadTraces::new(tracer, ReplicaId(1), Generation(6));
    let code = ErrorCode::WorkerLost;
    let header = FailedHeader::default();
    let failed = HeadEvent::Failed { header, code, message: "w2 is gone".to_owned() };
    traces.submitted(KEY, &request(), MARK);
    traces.told(KEY, &failed);
    traces.submitted(KEY, &request(), MARK);
    traces.cancelled(KEY);
    traces.submitted(KEY, &request(), MARK);
    drop(traces);
    let spans: Vec<Span> = given(&queue).into_iter().filter(|span| span.name == "head").collect();
    let outcomes: Vec<_> = spans.iter().map(|span| attribute(span, "shoal.outcome")).collect();
    assert_eq!(outcomes, ["failed", "cancelled", "cut off"].map(Value::from));
    assert_eq!(spans[0].error.as_deref(), Some(code.label()));
}

#[test]
fn a_head_that_does_not_export_hands_the_coordinators_mark_on() {
    let mut traces = HeadTraces::new(Tracer::off(), ReplicaId(1), Generation(6));
    traces.submitted(KEY, &request(), MARK);
    assert_eq!(traces.opened(&open(10, 4)).unwrap().mark(), Ok(MARK));
    traces.told(KEY, &done());
    assert!(traces.is_idle());
}
