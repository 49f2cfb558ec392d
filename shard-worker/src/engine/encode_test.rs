//! Encoders: whole inputs, several in one step, and a vector as the answer.

use shoal_protocol::activation::Samples;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::request::{HeadEvent, SECOND_TEXT};
use shoal_protocol::units::Instant;

use super::engine_test::{LIMITS, actions, config, request, samples, submit};
use super::{Action, ClientKey, Engine, EngineConfig, Event};

fn encoder(stages: u32) -> Engine {
    Engine::new(EngineConfig { encodes: true, ..config(stages, LIMITS) }).unwrap()
}

/// What a client is told in one line.
fn absorb(engine: &mut Engine, drawn: Samples) -> Vec<String> {
    engine.handle(Instant(5000), Event::Samples(drawn));
    let actions = actions(engine);
    assert_eq!(engine.check(), Vec::<String>::new());
    actions
}

#[test]
fn whole_inputs_share_a_step_and_each_gets_its_vector() {
    let mut engine = encoder(1);
    for (key, tokens) in [(1, 20), (2, 30), (3, 40)] {
        submit(&mut engine, key, request(tokens, 0));
    }
    let seen = actions(&mut engine);
    let steps: Vec<_> = seen.iter().filter(|words| words.starts_with("step")).collect();
    assert_eq!(steps.len(), 2, "{seen:?}");
    assert!(steps[0].starts_with("step 0: s1@0..20! s2@0..30!"), "{seen:?}");
    assert!(steps[1].starts_with("step 1: s3@0..40!"), "not cut to fill the first: {seen:?}");
    let mut drawn = samples(0, &[(1, 19, 0), (2, 29, 0)]);
    drawn.vectors = vec![vec![0.5, 1.0], vec![2.0, -1.0]];
    let expected = ["c1 vector [0.5, 1.0]", "close s1", "c2 vector [2.0, -1.0]", "close s2"];
    assert_eq!(absorb(&mut engine, drawn), expected);
    assert!(!engine.is_idle());
    let mut drawn = samples(1, &[(3, 39, 0)]);
    drawn.vectors = vec![vec![f32::NAN, 0.0]];
    assert_eq!(absorb(&mut engine, drawn), ["c3 failed compute_failed", "close s3"]);
    assert!(engine.is_idle());
}

#[test]
fn the_longest_input_goes_alone_and_a_longer_one_is_refused_with_the_numbers() {
    let mut engine = encoder(3);
    submit(&mut engine, 1, request(64, 0));
    let seen = actions(&mut engine);
    assert!(seen[1].starts_with("step 0: s1@0..64!"), "{seen:?}");
    submit(&mut engine, 2, request(65, 0));
    let Some(Action::Emit { key: ClientKey(2), event }) = engine.poll_action() else {
        panic!("a refusal")
    };
    let HeadEvent::Failed { code, message, .. } = event else { panic!("{event:?}") };
    assert_eq!(code, ErrorCode::ContextTooLong);
    assert!(message.contains("65 tokens") && message.contains("takes 64 at most"), "{message}");
}

#[test]
fn ids_of_a_second_text_are_ids_and_an_encoder_writes_no_text() {
    let mut engine = encoder(1);
    let mut pair = request(4, 0);
    pair.tokens[2] |= SECOND_TEXT;
    pair.tokens[3] |= SECOND_TEXT;
    submit(&mut engine, 1, pair);
    assert!(actions(&mut engine)[1].starts_with("step 0: s1@0..4!"));
    let mut beyond = request(4, 0);
    beyond.tokens[2] = SECOND_TEXT | 1000;
    for (key, request) in [(2, beyond), (3, request(4, 5))] {
        submit(&mut engine, key, request);
        assert_eq!(actions(&mut engine), [format!("c{key} failed invalid_request")]);
    }
}

#[test]
fn samples_without_vectors_end_the_generation() {
    let mut engine = encoder(1);
    submit(&mut engine, 1, request(4, 0));
    actions(&mut engine);
    let seen = absorb(&mut engine, samples(0, &[(1, 3, 7)]));
    assert!(seen.iter().any(|words| words.starts_with("fault: ")), "{seen:?}");
}
