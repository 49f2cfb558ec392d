//! What a client sees when something dies, and what a head sees when a client goes.

use std::time::Duration;

use serde_json::{Value, json};
use shoal_coordinator::api::Limits;
use shoal_protocol::error::ErrorCode;

use super::client::{get, open, post};
use super::head::{End, Script};
use super::setup::Setup;

const COMPLETIONS: &str = "/v1/completions";

fn body(stream: bool) -> Value {
    json!({"model": "demo", "prompt": "x", "max_tokens": 64, "stream": stream})
}

fn script(tokens: Vec<u32>, end: End) -> Script {
    Script { tokens, pace: Duration::ZERO, end }
}

#[tokio::test]
async fn a_failure_before_the_first_token_has_a_status_of_its_own() {
    let setup = Setup::new().await;
    for (code, status) in [
        (ErrorCode::Overloaded, 429),
        (ErrorCode::ComputeFailed, 500),
        (ErrorCode::InvalidRequest, 400),
    ] {
        setup.head.set(script(Vec::new(), End::Failed(code, "because of the script")));
        for stream in [false, true] {
            let response = post(setup.http, COMPLETIONS, &body(stream)).await;
            assert_eq!(response.status, status, "{code}: {}", response.body);
            assert_eq!(response.json()["error"]["message"], "because of the script");
            assert_eq!(response.header("retry-after").is_some(), code.retryable(), "{code}");
        }
    }
}

#[tokio::test]
async fn a_failure_in_the_middle_ends_the_stream_with_an_error_event() {
    let setup = Setup::new().await;
    let tokens = setup.says("1 plus");
    for (end, code, part) in [
        (End::Failed(ErrorCode::ComputeFailed, "it is NaN"), "compute_failed", "it is NaN"),
        (End::Cut, "protocol_violation", "before the answer was complete"),
        (End::Gap, "protocol_violation", "was expected"),
    ] {
        setup.head.set(script(tokens.clone(), end));
        let (events, done) = post(setup.http, COMPLETIONS, &body(true)).await.events();
        assert!(!done, "an answer that failed is not done");
        let error = &events.last().expect("events")["error"];
        assert_eq!(error["code"], code);
        assert!(error["message"].as_str().is_some_and(|text| text.contains(part)), "{error}");
        let text: String =
            events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
        assert_eq!(text, "1 plus");
    }
    let metrics = get(setup.http, "/metrics").await.body;
    let line = "shoal_answers_failed_total{model_name=\"demo\",reason=\"compute_failed\"} 1";
    assert!(metrics.contains(line), "{metrics}");
}

#[tokio::test]
async fn one_failed_choice_fails_the_request_and_cancels_the_others() {
    let setup = Setup::new().await;
    setup.head.set(script(vec![40], End::Silence));
    let request = json!({"model": "demo", "prompt": "x", "n": 2, "stream": true});
    let http = setup.http;
    let running = tokio::spawn(async move { post(http, COMPLETIONS, &request).await });
    setup.head.sees(|seen| seen.requests.len() == 2).await;
    running.abort();
    setup.head.sees(|seen| seen.cancelled == 2).await;
}

#[tokio::test]
async fn tokens_that_come_twice_are_dropped_and_counted() {
    let setup = Setup::new().await;
    let tokens = setup.says("1 plus 2");
    setup.head.set(script(tokens, End::Twice));
    let whole = post(setup.http, COMPLETIONS, &body(false)).await.json();
    assert_eq!(whole["choices"][0]["text"], "1 plus 2");
    let metrics = get(setup.http, "/metrics").await.body;
    assert!(metrics.contains("shoal_stale_events_total 2"), "{metrics}");
}

#[tokio::test]
async fn a_client_that_hangs_up_cancels_all_its_answers() {
    let setup = Setup::new().await;
    setup.head.set(script(vec![40, 41], End::Silence));
    let mut cancelled = 0;
    for stream in [true, false] {
        let request = json!({"model": "demo", "prompt": ["x", "y"], "n": 2, "stream": stream});
        let socket = open(setup.http, COMPLETIONS, &request).await;
        cancelled += 4;
        setup.head.sees(|seen| seen.requests.len() == cancelled).await;
        drop(socket);
        setup.head.sees(|seen| seen.cancelled == cancelled).await;
    }
    let metrics = get(setup.http, "/metrics").await.body;
    let line = "vllm:request_success_total{finished_reason=\"abort\",model_name=\"demo\"} 8";
    assert!(metrics.contains(line), "{metrics}");
}

#[tokio::test]
async fn an_answer_that_takes_too_long_is_ended() {
    let limits = Limits { request_deadline: Duration::from_millis(200), ..Limits::default() };
    let setup = Setup::with(limits).await;
    setup.head.set(script(vec![40], End::Silence));
    let response = post(setup.http, COMPLETIONS, &body(false)).await;
    assert_eq!(response.status, 504, "{}", response.body);
    assert_eq!(response.json()["error"]["code"], "deadline_exceeded");
    setup.head.sees(|seen| seen.cancelled == 1).await;
    let (events, done) = post(setup.http, COMPLETIONS, &body(true)).await.events();
    assert!(!done);
    assert_eq!(events.last().expect("events")["error"]["code"], "deadline_exceeded");
}

#[tokio::test]
async fn a_stop_ends_with_words_what_does_not_finish_in_time() {
    let limits = Limits { drain: Duration::from_millis(100), ..Limits::default() };
    let setup = Setup::with(limits).await;
    setup.head.set(script(vec![40], End::Silence));
    let http = setup.http;
    let streamed = tokio::spawn(async move { post(http, COMPLETIONS, &body(true)).await });
    let whole = tokio::spawn(async move { post(http, COMPLETIONS, &body(false)).await });
    setup.head.sees(|seen| seen.requests.len() == 2).await;
    setup.draining.send_replace(true);
    let (events, done) = streamed.await.expect("no panic").events();
    assert!(!done);
    assert_eq!(events.last().expect("events")["error"]["code"], "draining");
    let whole = whole.await.expect("no panic");
    assert_eq!((whole.status, &whole.json()["error"]["code"]), (503, &json!("draining")));
    setup.head.sees(|seen| seen.cancelled == 2).await;
}

/// All answers of a head share one connection's credit, a hundred KiB where the kernel grants little.
#[tokio::test]
async fn a_client_that_reads_nothing_loses_its_answer_and_costs_nobody_else_theirs() {
    let setup = Setup::new().await;
    setup.change(|demo| demo.context_max = 1 << 18);
    let token = setup.text.encode("7", false).expect("plain text")[0];
    // More than any socket's buffers and the queue hold.
    let endless = Script { tokens: vec![token; 200_000], pace: Duration::ZERO, end: End::Done(1) };
    setup.head.set_first([endless]);
    let greedy = json!({
        "model": "demo", "prompt": "x", "max_tokens": 200_000, "stream": true,
        "logprobs": 5, "return_token_ids": true,
    });
    let _unread = open(setup.http, COMPLETIONS, &greedy).await;
    setup.head.sees(|seen| seen.requests.len() == 1).await;
    setup.says("1 plus 2 is 3.");
    for _ in 0..20 {
        let response = post(setup.http, COMPLETIONS, &body(true)).await;
        assert!(response.events().1, "{}", response.body);
    }
    setup.head.sees(|seen| seen.cancelled == 1).await;
}
