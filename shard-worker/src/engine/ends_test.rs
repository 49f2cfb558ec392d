//! How things end that do not go well: refusals, cancellations, deadlines, faults.

use std::time::Duration;

use shoal_protocol::activation::{Sample, Samples};
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::Generation;
use shoal_protocol::plan::ReplicaLimits;
use shoal_protocol::request::{Generate, HeadEvent, SamplingRecord};
use shoal_protocol::units::Instant;

use super::engine_test::{
    LIMITS, absorb, actions, config, engine, request, samples, submit, words,
};
use super::{Action, ClientKey, Engine, EngineConfig, Event};

#[test]
fn what_cannot_be_served_is_refused() {
    let limits = ReplicaLimits { kv_blocks: 2, sequences_max: 1, ..LIMITS };
    let config = EngineConfig { queue_max: 1, ..config(2, limits) };
    let bad_sampling = SamplingRecord { temperature: -1.0, ..SamplingRecord::GREEDY };
    let mut engine = Engine::new(config).unwrap();
    for (request, code, words) in [
        (request(32, 5), ErrorCode::ContextTooLong, "2 KV blocks x 16 = 32"),
        (Generate { prompt_len: 0, ..request(4, 5) }, ErrorCode::InvalidRequest, "at least one"),
        (Generate { prompt_len: 5, ..request(4, 5) }, ErrorCode::InvalidRequest, "out of 4"),
        (
            Generate { tokens: vec![1000], ..request(1, 5) },
            ErrorCode::InvalidRequest,
            "token id 1000",
        ),
        (
            Generate { sampling: bad_sampling, ..request(1, 5) },
            ErrorCode::InvalidRequest,
            "temperature",
        ),
    ] {
        submit(&mut engine, 9, request);
        let Some(Action::Emit { event: HeadEvent::Failed { header, code: c, message }, .. }) =
            engine.poll_action()
        else {
            panic!("not refused: {words}");
        };
        assert_eq!((c, header.code), (code, u32::from(code.number())));
        assert!(message.contains(words), "{message}");
        assert_eq!(engine.poll_action(), None);
    }
    submit(&mut engine, 1, request(4, 5));
    submit(&mut engine, 2, request(4, 5));
    submit(&mut engine, 3, request(4, 5));
    submit(&mut engine, 2, request(4, 5));
    let told = actions(&mut engine);
    assert_eq!(
        told,
        ["c3 failed overloaded", "c2 failed internal", "open s1 4/4", "step 0: s1@0..4! +b0"]
    );
}

#[test]
fn a_cancelled_sequence_is_closed_and_its_samples_are_dropped() {
    let mut engine = engine(2);
    submit(&mut engine, 1, request(3, 5));
    submit(&mut engine, 2, request(3, 5));
    actions(&mut engine);
    engine.handle(Instant(2000), Event::Cancel { key: ClientKey(1) });
    engine.handle(Instant(2000), Event::Cancel { key: ClientKey(1) });
    engine.handle(Instant(2000), Event::Cancel { key: ClientKey(99) });
    assert_eq!(actions(&mut engine), ["close s1"]);
    let next = absorb(&mut engine, 0, &[(1, 2, 7), (2, 2, 8)]);
    assert_eq!(next, ["c2 token 0=8", "step 1: s2@3..4!"]);
}

#[test]
fn a_deadline_ends_what_waits_and_what_runs() {
    let limits = ReplicaLimits { sequences_max: 1, ..LIMITS };
    let mut engine = Engine::new(config(2, limits)).unwrap();
    submit(&mut engine, 1, Generate { deadline_ms: 9, ..request(3, 5) });
    submit(&mut engine, 2, Generate { deadline_ms: 5, ..request(3, 5) });
    assert_eq!(actions(&mut engine).len(), 2);
    assert_eq!(engine.next_deadline(), Some(Instant(6000)));
    engine.handle(Instant(5999), Event::Tick);
    assert_eq!(actions(&mut engine), Vec::<String>::new());
    engine.handle(Instant(6000), Event::Tick);
    assert_eq!(actions(&mut engine), ["c2 failed deadline_exceeded"]);
    engine.handle(Instant(10_000), Event::Tick);
    assert_eq!(actions(&mut engine), ["c1 failed deadline_exceeded", "close s1"]);
    assert_eq!(engine.check(), Vec::<String>::new());
}

#[test]
fn a_fault_fails_everything_once_and_for_ever() {
    let limits = ReplicaLimits { sequences_max: 1, ..LIMITS };
    let mut engine = Engine::new(config(2, limits)).unwrap();
    submit(&mut engine, 1, request(3, 5));
    submit(&mut engine, 2, request(3, 5));
    assert_eq!(actions(&mut engine).len(), 2);
    let fault = || Event::Fault { reason: "the link to w2 (stage 1) is lost".to_owned() };
    engine.handle(Instant(2000), fault());
    let Some(Action::Emit { key: ClientKey(1), event: HeadEvent::Failed { code, message, .. } }) =
        engine.poll_action()
    else {
        panic!("not failed");
    };
    assert_eq!(code, ErrorCode::WorkerLost);
    assert_eq!(message, "the link to w2 (stage 1) is lost");
    assert_eq!(actions(&mut engine), ["c2 failed worker_lost"]);
    engine.handle(Instant(2000), fault());
    engine.handle(Instant(2000), Event::Samples(samples(0, &[(1, 2, 7)])));
    submit(&mut engine, 3, request(3, 5));
    assert_eq!(actions(&mut engine), ["c3 failed worker_lost"]);
    assert_eq!((engine.stray_samples(), engine.next_deadline()), (1, None));
    assert_eq!(engine.check(), Vec::<String>::new());
    assert_eq!(engine.report().blocks_used, 0);
}

#[test]
fn frames_that_were_not_sent_go_with_their_links() {
    let mut engine = engine(2);
    submit(&mut engine, 1, request(3, 5));
    // Makes the step, takes `open` alone.
    assert_eq!(words(&engine.poll_action().unwrap()), "open s1 3/3");
    engine.handle(Instant(2000), Event::Fault { reason: "gone".to_owned() });
    assert_eq!(actions(&mut engine), ["c1 failed worker_lost"]);
}

#[test]
fn samples_out_of_place_are_counted_or_a_fault() {
    let running = || {
        let mut engine = engine(2);
        submit(&mut engine, 1, request(200, 5));
        assert_eq!(actions(&mut engine).len(), 4);
        engine
    };
    // Another generation, a step that is back already, one that was never issued.
    let mut strays = running();
    let other = Samples { generation: Generation(1), ..samples(0, &[]) };
    strays.handle(Instant(2000), Event::Samples(other));
    assert_eq!(absorb(&mut strays, 99, &[]), Vec::<String>::new());
    absorb(&mut strays, 0, &[]);
    assert_eq!(absorb(&mut strays, 0, &[]), Vec::<String>::new());
    assert_eq!(strays.stray_samples(), 3);
    // A step before the one that went first; tokens that nobody asked for.
    for (step, drawn, words) in [
        (1, vec![], "fault: step 1 came back from the stages before step 0"),
        (
            0,
            vec![(1, 31, 7)],
            "fault: the samples of step 0 are not of the rows that were asked for",
        ),
    ] {
        let told = absorb(&mut running(), step, &drawn);
        assert_eq!(told, ["c1 failed worker_lost", words]);
    }
}

#[test]
fn a_step_that_does_not_come_back_is_a_fault() {
    let mut engine = engine(2);
    assert_eq!(engine.next_deadline(), None);
    submit(&mut engine, 1, request(64, 5));
    assert_eq!(actions(&mut engine)[2..], ["step 1: s1@32..64!"]);
    assert_eq!(engine.next_deadline(), Some(Instant(1000) + Duration::from_secs(60)));
    // The time runs anew for each step that becomes the oldest.
    absorb(&mut engine, 0, &[]);
    let late = Instant(5000) + Duration::from_secs(60);
    assert_eq!(engine.next_deadline(), Some(late));
    engine.handle(Instant(late.0 - 1), Event::Tick);
    assert_eq!(actions(&mut engine), Vec::<String>::new());
    engine.handle(late, Event::Tick);
    let told = actions(&mut engine);
    let words = "fault: step 1 (rows: 32) has not come back from the stages within 60 s";
    assert_eq!(told, ["c1 failed worker_lost", words]);
}

#[test]
fn logits_that_are_no_numbers_fail_their_sequence() {
    let mut engine = engine(1);
    submit(&mut engine, 1, request(3, 5));
    submit(&mut engine, 2, request(3, 5));
    actions(&mut engine);
    let next = absorb(&mut engine, 0, &[(1, 2, Sample::NO_TOKEN), (2, 2, 8)]);
    let expected = ["c1 failed compute_failed", "close s1", "c2 token 0=8", "step 1: s2@3..4!"];
    assert_eq!(next, expected);
}

#[test]
fn a_config_that_can_serve_nothing_is_refused() {
    for (config, field) in [
        (config(0, LIMITS), "stages"),
        (config(1, ReplicaLimits { kv_blocks: 0, ..LIMITS }), "kv_blocks"),
        (config(1, ReplicaLimits { steps_in_flight_max: 0, ..LIMITS }), "steps_in_flight_max"),
        (EngineConfig { vocab: 0, ..config(1, LIMITS) }, "vocab"),
    ] {
        assert_eq!(Engine::new(config).err().map(|e| e.field), Some(field));
    }
}
