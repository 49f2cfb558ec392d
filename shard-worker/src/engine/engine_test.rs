//! The engine as dialogs: in this state, this event, exactly these actions.

use shoal_protocol::activation::{BlockGrant, CloseHeader, RowRecord, Sample, Samples, Step};
use shoal_protocol::id::{Attempt, Generation, ReplicaId, RequestId, SequenceId, StepId};
use shoal_protocol::plan::ReplicaLimits;
use shoal_protocol::request::{
    DoneHeader, FinishReason, Generate, HeadEvent, NO_STOP_TOKEN, SamplingRecord, TokenHeader,
};
use shoal_protocol::units::Instant;

use super::{Action, ClientKey, Engine, EngineConfig, Event};

pub(super) const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: 64,
    context_max: 512,
    step_rows_max: 64,
    sequences_max: 8,
    steps_in_flight_max: 4,
};

pub(super) fn config(stages: u32, limits: ReplicaLimits) -> EngineConfig {
    EngineConfig::new(ReplicaId(1), Generation(2), limits, stages, 1000)
}

pub(super) fn engine(stages: u32) -> Engine {
    Engine::new(config(stages, LIMITS)).unwrap()
}

/// A request whose prompt is 100, 101 … and which has no stop token and no deadline.
pub(super) fn request(prompt_len: u32, max_tokens: u32) -> Generate {
    Generate {
        request: RequestId(77),
        attempt: Attempt(1),
        choice: 0,
        replica: ReplicaId(1),
        deadline_ms: 0,
        prompt_len,
        max_tokens,
        adapter: None,
        sampling: SamplingRecord::GREEDY,
        stop_tokens: vec![],
        tokens: (100..100 + prompt_len).collect(),
    }
}

pub(super) fn submit(engine: &mut Engine, key: u64, request: Generate) {
    let (key, request) = (ClientKey(key), Box::new(request));
    engine.handle(Instant(1000), Event::Submit { key, request, tenant: None });
}

/// All actions, in short words: `open s1 3/3`, `step 0: s1@0..3! +b0`, `close s1`, `c1 token 0=7`.
/// `!` marks rows that sample, `+b` grants, `*` those of blocks that come with their content.
pub(super) fn actions(engine: &mut Engine) -> Vec<String> {
    std::iter::from_fn(|| engine.poll_action()).map(|action| words(&action)).collect()
}

pub(super) fn words(action: &Action) -> String {
    match action {
        Action::Open(open) => {
            format!("open {} {}/{}", open.sequence, open.prompt_len, open.tokens.len())
        }
        Action::Close(CloseHeader { sequence, .. }) => format!("close s{sequence}"),
        Action::Fault { reason } => format!("fault: {reason}"),
        Action::Issue { step, tokens } => {
            assert_eq!(step.rows.len(), tokens.len());
            let mut text = format!("step {}:", step.header.step);
            for run in step.rows.chunk_by(|a, b| a.sequence == b.sequence) {
                let (first, last) = (run[0].position, run[run.len() - 1].position);
                let mark = if run.iter().any(RowRecord::samples) { "!" } else { "" };
                text += &format!(" s{}@{first}..{}{mark}", run[0].sequence, last + 1);
            }
            for grant in &step.grants {
                let mark = if grant.is_shared() { "*" } else { "" };
                text += &format!(" +b{}{mark}", grant.block);
            }
            text
        }
        Action::Emit { key, event } => match event {
            HeadEvent::Token { header, .. } => {
                format!("c{} token {}={}", key.0, header.index, header.token)
            }
            HeadEvent::Done { reason, header, .. } => {
                format!("c{} {reason:?} after {}", key.0, header.tokens)
            }
            HeadEvent::Failed { code, .. } => format!("c{} failed {code}", key.0),
            HeadEvent::Reused { header } => format!("c{} reuses {}", key.0, header.tokens),
            HeadEvent::Vector { values, .. } => format!("c{} vector {values:?}", key.0),
        },
    }
}

/// The last stage draws these (sequence, row position, token) in a step.
pub(super) fn samples(step: u64, drawn: &[(u64, u32, u32)]) -> Samples {
    let sample = |&(sequence, position, token)| Sample {
        sequence: SequenceId(sequence),
        position,
        token,
        logprob: f32::NAN,
        candidates: vec![],
    };
    let samples = drawn.iter().map(sample).collect();
    Samples { generation: Generation(2), step: StepId(step), samples, vectors: vec![] }
}

pub(super) fn absorb(engine: &mut Engine, step: u64, drawn: &[(u64, u32, u32)]) -> Vec<String> {
    engine.handle(Instant(5000), Event::Samples(samples(step, drawn)));
    let actions = actions(engine);
    assert_eq!(engine.check(), Vec::<String>::new());
    actions
}

#[test]
fn one_answer_from_prompt_to_end() {
    let mut engine = engine(2);
    submit(&mut engine, 1, request(3, 2));
    let mut seen = Vec::new();
    while let Some(action) = engine.poll_action() {
        seen.push(action);
    }
    let [Action::Open(open), Action::Issue { step, tokens }] = &seen[..] else {
        panic!("{seen:?}");
    };
    assert_eq!((open.generation, open.sequence), (Generation(2), SequenceId(1)));
    assert_eq!((open.request, open.prompt_len), (RequestId(77), 3));
    assert_eq!(open.tokens, [100, 101, 102]);
    let row = |position, flags| RowRecord { sequence: 1, position, flags };
    let grant = BlockGrant { sequence: 1, block: 0, flags: 0 };
    let rows = vec![row(0, 0), row(1, 0), row(2, 1)];
    assert_eq!((step.header.generation, step.header.step), (2, 0));
    assert_eq!((step.header.rows, step.header.grants, step.header.samples), (3, 1, 1));
    assert_eq!(*step, Step { header: step.header, rows, grants: vec![grant] });
    assert_eq!(*tokens, [100, 101, 102]);

    engine.handle(Instant(1900), Event::Samples(samples(0, &[(1, 2, 7)])));
    let header = TokenHeader {
        request: 77,
        attempt: 1,
        choice: 0,
        index: 0,
        token: 7,
        logprob: f32::NAN,
        candidates: 0,
        queue_us: 0,
        prefill_us: 900,
    };
    let Some(Action::Emit { key: ClientKey(1), event }) = engine.poll_action() else {
        panic!("no token");
    };
    assert_eq!(
        format!("{event:?}"),
        format!("{:?}", HeadEvent::Token { header, candidates: vec![] })
    );
    assert_eq!(actions(&mut engine), ["step 1: s1@3..4!"]);

    engine.handle(Instant(2000), Event::Samples(samples(1, &[(1, 3, 8)])));
    assert_eq!(words(&engine.poll_action().unwrap()), "c1 token 1=8");
    let header = DoneHeader {
        request: 77,
        attempt: 1,
        choice: 0,
        reason: 2,
        tokens: 2,
        preemptions: 0,
        stop_token: NO_STOP_TOKEN,
    };
    let event = HeadEvent::Done { header, reason: FinishReason::Length };
    assert_eq!(engine.poll_action(), Some(Action::Emit { key: ClientKey(1), event }));
    let close = CloseHeader { generation: 2, sequence: 1 };
    assert_eq!(engine.poll_action(), Some(Action::Close(close)));
    assert_eq!(engine.poll_action(), None);
    assert!(engine.is_idle());
    let report = engine.report();
    assert_eq!((report.prompt_tokens, report.generated_tokens, report.steps), (3, 2, 2));
}

#[test]
fn a_stop_token_ends_the_answer_and_is_no_part_of_it() {
    let mut engine = engine(1);
    submit(&mut engine, 1, Generate { stop_tokens: vec![8, 9], ..request(2, 50) });
    assert_eq!(actions(&mut engine), ["open s1 2/2", "step 0: s1@0..2! +b0"]);
    assert_eq!(absorb(&mut engine, 0, &[(1, 1, 7)]), ["c1 token 0=7", "step 1: s1@2..3!"]);
    engine.handle(Instant(5000), Event::Samples(samples(1, &[(1, 2, 9)])));
    let Some(Action::Emit { event: HeadEvent::Done { header, reason }, .. }) = engine.poll_action()
    else {
        panic!("not done");
    };
    assert_eq!((reason, header.stop_token, header.tokens), (FinishReason::Stop, 9, 1));
    assert_eq!(actions(&mut engine), ["close s1"]);
}

#[test]
fn a_long_prompt_fills_the_pipeline() {
    // 256 rows in steps of 32: three of them in flight on two stages, sampled from the last alone.
    let mut engine = engine(2);
    submit(&mut engine, 1, request(256, 50));
    let first = actions(&mut engine);
    assert_eq!(first.len(), 4, "{first:?}");
    assert!(first[1].starts_with("step 0: s1@0..32 +b0 +b1 "));
    assert_eq!(first[2..], ["step 1: s1@32..64", "step 2: s1@64..96"]);
    for step in 0..5 {
        let (next, from) = (step + 3, 96 + 32 * step);
        let mark = if next == 7 { "!" } else { "" };
        let expected = format!("step {next}: s1@{from}..{}{mark}", from + 32);
        assert_eq!(absorb(&mut engine, step, &[]), [expected]);
    }
    assert_eq!(absorb(&mut engine, 5, &[]), Vec::<String>::new());
    assert_eq!(absorb(&mut engine, 6, &[]), Vec::<String>::new());
    let token = ["c1 token 0=7", "step 8: s1@256..257!"];
    assert_eq!(absorb(&mut engine, 7, &[(1, 255, 7)]), token);
}

#[test]
fn one_stage_takes_a_prompt_in_the_largest_steps() {
    let mut engine = engine(1);
    submit(&mut engine, 1, request(100, 50));
    let first = actions(&mut engine);
    assert!(first[1].starts_with("step 0: s1@0..64 +b0"), "{first:?}");
    assert_eq!(first[2..], ["step 1: s1@64..100!"]);
}

#[test]
fn decoding_sequences_are_divided_over_the_stages() {
    let mut engine = engine(2);
    for key in 1..=5 {
        submit(&mut engine, key, request(1, 50));
    }
    let opened = actions(&mut engine);
    assert_eq!(
        opened[5..],
        ["step 0: s1@0..1! s2@0..1! s3@0..1! s4@0..1! s5@0..1! +b0 +b1 +b2 +b3 +b4"]
    );
    // All five are ready at once: two steps of 3 and 2.
    let drawn: Vec<_> = (1..=5).map(|s| (s, 0, 7)).collect();
    let next = absorb(&mut engine, 0, &drawn);
    assert_eq!(next[5..], ["step 1: s1@1..2! s2@1..2! s3@1..2!", "step 2: s4@1..2! s5@1..2!"]);
    // A sequence that comes does not wait for them, and then joins one of the two.
    submit(&mut engine, 6, request(1, 50));
    assert_eq!(actions(&mut engine), ["open s6 1/1", "step 3: s6@0..1! +b5"]);
    let next = absorb(&mut engine, 1, &[(1, 1, 7), (2, 1, 7), (3, 1, 7)]);
    assert_eq!(next[3..], Vec::<String>::new(), "both stages have a step already");
    let next = absorb(&mut engine, 2, &[(4, 1, 7), (5, 1, 7)]);
    assert_eq!(next[2..], ["step 4: s1@2..3! s2@2..3! s3@2..3!"]);
    let next = absorb(&mut engine, 3, &[(6, 0, 7)]);
    assert_eq!(next[1..], ["step 5: s4@2..3! s5@2..3! s6@1..2!"]);
}

#[test]
fn large_steps_are_divided_into_one_more_than_stages() {
    let limits = ReplicaLimits { sequences_max: 64, ..LIMITS };
    let mut engine = Engine::new(config(2, limits)).unwrap();
    (0..48).for_each(|key| submit(&mut engine, key, request(1, 50)));
    actions(&mut engine);
    let drawn: Vec<_> = (1..=48).map(|s| (s, 0, 7)).collect();
    let next = absorb(&mut engine, 0, &drawn);
    let steps: Vec<usize> = next[48..].iter().map(|step| step.matches('!').count()).collect();
    assert_eq!(steps, [16, 16, 16]);
}

#[test]
fn decode_rows_go_before_rows_of_prompts() {
    let mut engine = engine(1);
    submit(&mut engine, 1, request(1, 50));
    actions(&mut engine);
    submit(&mut engine, 2, request(100, 50));
    let next = actions(&mut engine);
    assert!(next[1].starts_with("step 1: s2@0..64 +b1"), "{next:?}");
    let next = absorb(&mut engine, 0, &[(1, 0, 7)]);
    assert_eq!(next, ["c1 token 0=7", "step 2: s1@1..2! s2@64..100!"]);
}

#[test]
fn the_youngest_is_preempted_and_goes_on_where_it_was() {
    // Three blocks; each sequence needs its second block at its 17th row.
    let limits = ReplicaLimits { kv_blocks: 3, ..LIMITS };
    let mut engine = Engine::new(config(1, limits)).unwrap();
    submit(&mut engine, 1, request(15, 50));
    submit(&mut engine, 2, request(15, 50));
    let opened = actions(&mut engine);
    assert_eq!(opened, ["open s1 15/15", "open s2 15/15", "step 0: s1@0..15! s2@0..15! +b0 +b1"]);
    let next = absorb(&mut engine, 0, &[(1, 14, 7), (2, 14, 8)]);
    assert_eq!(next[2..], ["step 1: s1@15..16! s2@15..16!"]);
    // The older one takes the last block; for the younger there is none, so it leaves.
    let next = absorb(&mut engine, 1, &[(1, 15, 7), (2, 15, 8)]);
    assert_eq!(next[2..], ["close s2", "step 2: s1@16..17! +b2"]);
    assert_eq!((engine.report().preemptions, engine.report().waiting), (1, 1));
    assert_eq!(absorb(&mut engine, 2, &[(1, 16, 7)]), ["c1 token 2=7", "step 3: s1@17..18!"]);
    // The older one goes away: the other is opened again with what it has generated.
    engine.handle(Instant(6000), Event::Cancel { key: ClientKey(1) });
    let next = actions(&mut engine);
    assert_eq!(next, ["close s1", "open s3 15/17", "step 4: s3@0..17! +b0 +b2"]);
    assert_eq!(absorb(&mut engine, 3, &[(1, 17, 7)]), Vec::<String>::new());
    assert_eq!(absorb(&mut engine, 4, &[(3, 16, 9)]), ["c2 token 2=9", "step 5: s3@17..18!"]);
}

#[test]
fn a_preempted_sequence_may_still_be_in_flight() {
    let limits = ReplicaLimits { kv_blocks: 3, ..LIMITS };
    let mut engine = Engine::new(config(2, limits)).unwrap();
    submit(&mut engine, 1, request(15, 50));
    submit(&mut engine, 2, request(16, 50));
    let opened = actions(&mut engine);
    assert_eq!(opened[2..], ["step 0: s1@0..15! s2@0..16! +b0 +b1 +b2"]);
    let next = absorb(&mut engine, 0, &[(1, 14, 7), (2, 15, 8)]);
    assert_eq!(next[2..], ["step 1: s1@15..16!", "step 2: s2@16..17!"]);
    // The older one needs a block while a step of the younger one is on its way: `close` goes behind
    // that step, the grant behind `close`, and what the step brings back is dropped.
    let next = absorb(&mut engine, 1, &[(1, 15, 7)]);
    assert_eq!(next, ["c1 token 1=7", "close s2", "step 3: s1@16..17! +b1"]);
    assert_eq!(absorb(&mut engine, 2, &[(2, 16, 9)]), Vec::<String>::new());
    assert_eq!(engine.stray_samples(), 0);
}

#[test]
fn what_comes_back_of_an_earlier_run_is_dropped() {
    let limits = ReplicaLimits { kv_blocks: 3, ..LIMITS };
    let mut engine = Engine::new(config(2, limits)).unwrap();
    submit(&mut engine, 1, request(15, 50));
    submit(&mut engine, 2, request(16, 50));
    actions(&mut engine);
    absorb(&mut engine, 0, &[(1, 14, 7), (2, 15, 8)]);
    absorb(&mut engine, 1, &[(1, 15, 7)]);
    // Preempted, and back under another name, while a step of its first run is still on its way.
    engine.handle(Instant(6000), Event::Cancel { key: ClientKey(1) });
    assert_eq!(actions(&mut engine), ["close s1", "open s3 16/17", "step 4: s3@0..17! +b0 +b1"]);
    assert_eq!(absorb(&mut engine, 2, &[(2, 16, 9)]), Vec::<String>::new());
    assert_eq!(absorb(&mut engine, 3, &[(1, 16, 9)]), Vec::<String>::new());
    assert_eq!(absorb(&mut engine, 4, &[(3, 16, 9)]), ["c2 token 1=9", "step 5: s3@17..18!"]);
}

#[test]
fn a_waiting_sequence_takes_no_block_that_a_running_one_needs_now() {
    let limits = ReplicaLimits { kv_blocks: 2, ..LIMITS };
    let mut engine = Engine::new(config(1, limits)).unwrap();
    submit(&mut engine, 1, request(15, 50));
    actions(&mut engine);
    absorb(&mut engine, 0, &[(1, 14, 7)]);
    // One block is free, and the next row of the first sequence begins it.
    submit(&mut engine, 2, request(3, 50));
    engine.handle(Instant(5000), Event::Samples(samples(1, &[(1, 15, 7)])));
    assert_eq!(actions(&mut engine), ["c1 token 1=7", "step 2: s1@16..17! +b1"]);
    assert_eq!((engine.report().preemptions, engine.report().waiting), (0, 1));
}

#[test]
fn the_first_token_of_an_attempt_says_how_long_it_took() {
    let limits = ReplicaLimits { sequences_max: 1, ..LIMITS };
    let mut engine = Engine::new(config(1, limits)).unwrap();
    let times = |engine: &mut Engine| {
        std::iter::from_fn(|| engine.poll_action()).find_map(|action| match action {
            Action::Emit { event: HeadEvent::Token { header, .. }, .. } => {
                Some((header.index, header.queue_us, header.prefill_us))
            }
            _ => None,
        })
    };
    submit(&mut engine, 1, request(3, 1));
    submit(&mut engine, 2, Generate { prompt_len: 1, ..request(3, 9) });
    actions(&mut engine);
    engine.handle(Instant(1500), Event::Samples(samples(0, &[(1, 2, 7)])));
    assert_eq!(times(&mut engine), Some((0, 0, 500)));
    actions(&mut engine);
    engine.handle(Instant(1700), Event::Samples(samples(1, &[(2, 2, 7)])));
    assert_eq!(times(&mut engine), Some((2, 500, 200)));
    actions(&mut engine);
    engine.handle(Instant(1900), Event::Samples(samples(2, &[(2, 3, 7)])));
    assert_eq!(times(&mut engine), Some((3, 0, 0)));
}

#[test]
fn a_resumed_answer_goes_on_with_the_next_index() {
    let mut engine = engine(2);
    let resumed = Generate { attempt: Attempt(2), prompt_len: 3, ..request(5, 4) };
    submit(&mut engine, 1, resumed);
    assert_eq!(actions(&mut engine), ["open s1 3/5", "step 0: s1@0..5! +b0"]);
    assert_eq!(absorb(&mut engine, 0, &[(1, 4, 7)]), ["c1 token 2=7", "step 1: s1@5..6!"]);
    let end = ["c1 token 3=8", "c1 Length after 4", "close s1"];
    assert_eq!(absorb(&mut engine, 1, &[(1, 5, 8)]), end);
    assert_eq!(engine.report().prompt_tokens, 3);
    // Only its end was not told.
    submit(&mut engine, 2, Generate { prompt_len: 1, ..request(5, 4) });
    assert_eq!(actions(&mut engine), ["c2 Length after 4"]);
}

#[test]
fn the_context_ends_an_answer() {
    let limits = ReplicaLimits { context_max: 20, ..LIMITS };
    let mut engine = Engine::new(config(1, limits)).unwrap();
    submit(&mut engine, 1, request(18, 50));
    assert_eq!(actions(&mut engine), ["open s1 18/18", "step 0: s1@0..18! +b0 +b1"]);
    assert_eq!(absorb(&mut engine, 0, &[(1, 17, 7)])[1..], ["step 1: s1@18..19!"]);
    let end = ["c1 token 1=8", "c1 Length after 2", "close s1"];
    assert_eq!(absorb(&mut engine, 1, &[(1, 18, 8)]), end);
}

#[test]
fn sequences_wait_in_order_for_blocks() {
    let limits = ReplicaLimits { kv_blocks: 4, ..LIMITS };
    let mut engine = Engine::new(config(1, limits)).unwrap();
    submit(&mut engine, 1, request(40, 5));
    submit(&mut engine, 2, request(30, 5));
    submit(&mut engine, 3, request(3, 5));
    // The third would fit, but the second came first.
    assert_eq!(actions(&mut engine), ["open s1 40/40", "step 0: s1@0..40! +b0 +b1 +b2"]);
    engine.handle(Instant(2000), Event::Cancel { key: ClientKey(2) });
    assert_eq!(actions(&mut engine), ["open s2 3/3", "step 1: s2@0..3! +b3"]);
}
