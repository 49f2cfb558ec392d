//! Answers that go on when their head, its layout or its workers are lost.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use shoal_coordinator::api::Limits;
use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{Attempt, Generation, NodeId};
use shoal_protocol::request::Generate;
use tokio::io::AsyncReadExt;

use super::client::{Response, get, open, post};
use super::head::{End, Head, Script};
use super::setup::Setup;

const COMPLETIONS: &str = "/v1/completions";

/// The text of all tests: long enough to be lost in many places.
const TEXT: &str = "1 plus 2 is 3. 3 plus 4 is 7.";

fn body(stream: bool) -> Value {
    json!({
        "model": "demo", "prompt": "x", "max_tokens": 64, "stream": stream, "logprobs": 2,
        "return_token_ids": true, "temperature": 1.0, "seed": 5, "presence_penalty": 0.5,
    })
}

fn script(tokens: &[u32], end: End) -> Script {
    Script { tokens: tokens.to_vec(), pace: Duration::ZERO, end }
}

fn lost() -> End {
    End::Failed(ErrorCode::WorkerLost, "the link to w2 is lost")
}

/// An answer without what differs between any two: its name and its time.
fn whole(response: &Response) -> Value {
    assert_eq!(response.status, 200, "{}", response.body);
    let mut json = response.json();
    json["id"] = Value::Null;
    json["created"] = Value::Null;
    json
}

/// The same of a stream.
fn events(response: &Response) -> Vec<Value> {
    let (mut events, done) = response.events();
    assert!(done, "{events:?}");
    for event in &mut events {
        event["id"] = Value::Null;
        event["created"] = Value::Null;
    }
    events
}

fn error_of(response: &Response) -> Value {
    let (events, done) = response.events();
    assert!(!done, "an answer that failed is not done");
    events.last().expect("events")["error"].clone()
}

/// What is known of an attempt: its number, the tokens that it was told, and all of the rest.
fn attempts(head: &Head) -> Vec<(u32, usize)> {
    let known = |request: &Generate| request.tokens.len() - request.prompt_len as usize;
    head.requests().iter().map(|request| (request.attempt.0, known(request))).collect()
}

#[tokio::test]
async fn an_answer_that_is_lost_at_any_token_comes_out_the_same() {
    let setup = Setup::new().await;
    let tokens = setup.says(TEXT);
    let streamed = events(&post(setup.http, COMPLETIONS, &body(true)).await);
    let undisturbed = whole(&post(setup.http, COMPLETIONS, &body(false)).await);
    for k in 0..=tokens.len() {
        for end in [lost(), End::Reset, End::Cut, End::Failed(ErrorCode::Draining, "it drains")] {
            setup.head.set_first([script(&tokens[..k], end.clone())]);
            let again = post(setup.http, COMPLETIONS, &body(true)).await;
            assert_eq!(events(&again), streamed, "after {k} tokens: {end:?}");
            let request = setup.head.last_request();
            assert_eq!(request.attempt, Attempt(1));
            // What a stream's reset overtakes is lost, and comes again.
            let known = &request.tokens[request.prompt_len as usize..];
            assert_eq!(known, &tokens[..known.len()]);
            assert!(known.len() == k || matches!(end, End::Reset), "{known:?} of {k}");
        }
        setup.head.set_first([script(&tokens[..k], lost())]);
        assert_eq!(whole(&post(setup.http, COMPLETIONS, &body(false)).await), undisturbed);
    }
    let metrics = get(setup.http, "/metrics").await.body;
    let resumed = format!(
        "shoal_resumed_attempts_total{{model_name=\"demo\",reason=\"turned_away\"}} {}",
        tokens.len() + 1
    );
    assert!(metrics.contains(&resumed), "{metrics}");
    let stalls =
        format!("shoal_stall_seconds_count{{model_name=\"demo\"}} {}", 5 * tokens.len() + 5);
    assert!(metrics.contains(&stalls), "{metrics}");
}

#[tokio::test]
async fn an_answer_may_be_lost_again_and_again_while_it_gets_further() {
    let setup = Setup::new().await;
    let tokens = setup.says(TEXT);
    let undisturbed = whole(&post(setup.http, COMPLETIONS, &body(false)).await);
    setup.head.set_first((1..tokens.len()).map(|k| script(&tokens[..k], lost())));
    assert_eq!(whole(&post(setup.http, COMPLETIONS, &body(false)).await), undisturbed);
    let expected: Vec<_> = (0..tokens.len()).map(|k| (k as u32, k)).collect();
    assert_eq!(attempts(&setup.head)[1..], expected);
}

#[tokio::test]
async fn one_choices_loss_does_not_disturb_the_others() {
    let setup = Setup::new().await;
    let tokens = setup.says(TEXT);
    let mut request = body(false);
    request["prompt"] = json!(["x", "y"]);
    request["n"] = json!(2);
    request["stop"] = json!(["4 is"]);
    let undisturbed = whole(&post(setup.http, COMPLETIONS, &request).await);
    assert_eq!(undisturbed["choices"][3]["stop_reason"], "4 is");
    let before = setup.head.requests().len();
    setup.head.set_first([
        script(&tokens[..2], lost()),
        script(&tokens, End::Done(1)),
        script(&tokens[..5], End::Reset),
    ]);
    assert_eq!(whole(&post(setup.http, COMPLETIONS, &request).await), undisturbed);
    let requests = &setup.head.requests()[before..];
    let resumed: Vec<_> = requests.iter().filter(|r| r.attempt == Attempt(1)).collect();
    assert_eq!((requests.len(), resumed.len()), (6, 2));
    for again in resumed {
        let first = requests.iter().find(|r| r.attempt == Attempt(0) && r.choice == again.choice);
        let first = first.expect("its first attempt");
        assert_eq!((again.sampling, again.max_tokens), (first.sampling, first.max_tokens));
        assert_eq!(again.prompt_len, first.prompt_len);
    }
}

#[tokio::test]
async fn a_head_that_vanishes_is_followed_to_the_next_one() {
    let mut setup = Setup::new().await;
    let tokens = setup.says(TEXT);
    let undisturbed = events(&post(setup.http, COMPLETIONS, &body(true)).await);
    setup.head.set(script(&tokens[..4], End::Silence));
    let http = setup.http;
    let running = tokio::spawn(async move { post(http, COMPLETIONS, &body(true)).await });
    setup.head.sees(|seen| seen.requests.len() == 2).await;
    setup.head.vanish();
    let w2 = NodeId::worker(2);
    let other = setup.another_head(w2, script(&tokens, End::Done(1)));
    setup.change(|demo| {
        demo.replicas[0].head = w2;
        demo.replicas[0].generation = Generation(2);
        demo.replicas[0].requests = Some(other.address);
    });
    assert_eq!(events(&running.await.expect("no panic")), undisturbed);
    assert_eq!(attempts(&other).len(), 1);
    // A new request finds it at once.
    let since = Instant::now();
    assert_eq!(events(&post(setup.http, COMPLETIONS, &body(true)).await), undisturbed);
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
}

#[tokio::test]
async fn a_frozen_head_is_left_as_soon_as_there_is_another_layout() {
    let setup = Setup::new().await;
    let tokens = setup.says(TEXT);
    let undisturbed = events(&post(setup.http, COMPLETIONS, &body(true)).await);
    setup.head.set_first([script(&tokens[..4], End::Silence)]);
    let http = setup.http;
    let running = tokio::spawn(async move { post(http, COMPLETIONS, &body(true)).await });
    setup.head.sees(|seen| seen.requests.len() == 2).await;
    let since = Instant::now();
    setup.change(|demo| demo.replicas[0].generation = Generation(2));
    assert_eq!(events(&running.await.expect("no panic")), undisturbed);
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    // The old attempt is cancelled, so that a head that wakes up knows that nobody waits.
    setup.head.sees(|seen| seen.cancelled == 1).await;
}

/// The old layout waits for its answers before it retires: one whose model is slow is not frozen.
#[tokio::test]
async fn a_head_whose_tokens_come_slowly_may_finish_beside_a_newer_layout() {
    let setup = Setup::new().await;
    let tokens = setup.says(TEXT)[..10].to_vec();
    let pace = Duration::from_millis(120);
    setup.head.set(Script { tokens, pace, end: End::Done(1) });
    let mut stream = open(setup.http, COMPLETIONS, &body(true)).await;
    let mut read = Vec::new();
    while String::from_utf8_lossy(&read).matches("data: ").count() < 4 {
        assert_ne!(stream.read_buf(&mut read).await.expect("a stream"), 0);
    }
    setup.change(|demo| demo.replicas[0].generation = Generation(2));
    stream.read_to_end(&mut read).await.expect("a stream");
    assert!(String::from_utf8_lossy(&read).contains("data: [DONE]"));
    assert_eq!(attempts(&setup.head), [(0, 0)], "it was begun again elsewhere");
}

#[tokio::test]
async fn an_answer_waits_for_a_full_head_where_a_new_request_does_not() {
    let setup = Setup::new().await;
    let tokens = setup.says(TEXT);
    let full = || script(&[], End::Failed(ErrorCode::Overloaded, "the queue is full"));
    setup.head.set_first([script(&tokens[..3], lost()), full(), full(), full()]);
    let response = post(setup.http, COMPLETIONS, &body(false)).await;
    assert_eq!(response.status, 200, "{}", response.body);
    assert_eq!(attempts(&setup.head), [(0, 0), (1, 3), (2, 3), (3, 3), (4, 3)]);
    setup.head.set_first([full()]);
    assert_eq!(post(setup.http, COMPLETIONS, &body(false)).await.status, 429);
}

#[tokio::test]
async fn another_replica_takes_over_where_there_is_one() {
    let setup = Setup::new().await;
    let tokens = setup.says(TEXT);
    let undisturbed = events(&post(setup.http, COMPLETIONS, &body(true)).await);
    let other = setup.another_replica(script(&tokens, End::Done(1)));
    setup.head.set(script(&tokens[..4], lost()));
    for _ in 0..8 {
        assert_eq!(events(&post(setup.http, COMPLETIONS, &body(true)).await), undisturbed);
    }
    // Whoever began at the first one has gone on at the second, and not waited for the first.
    assert!(attempts(&setup.head)[1..].iter().all(|(attempt, _)| *attempt == 0));
    assert_eq!(other.requests().len(), 8);
}

#[tokio::test]
async fn who_turns_a_request_away_is_not_asked_again_at_once() {
    let setup = Setup::new().await;
    let tokens = setup.says(TEXT);
    let undisturbed = whole(&post(setup.http, COMPLETIONS, &body(false)).await);
    let other = setup.another_replica(script(&tokens, End::Done(1)));
    // It says so at once, so its queue is always the shorter one, and no breaker opens for it.
    setup.head.set(script(&[], End::Failed(ErrorCode::NotReady, "its links are being made")));
    let before = setup.head.requests().len();
    const REQUESTS: usize = 12;
    for _ in 0..REQUESTS {
        assert_eq!(whole(&post(setup.http, COMPLETIONS, &body(false)).await), undisturbed);
    }
    assert!(attempts(&setup.head)[before..].iter().all(|(attempt, _)| *attempt == 0));
    assert!(attempts(&other).iter().all(|(attempt, _)| *attempt <= 1));
    assert_eq!(other.requests().len(), REQUESTS);
}

/// Without a budget each of the requests would ask the head some fifty times in these two seconds.
#[tokio::test]
async fn a_head_that_turns_all_away_is_not_buried_under_repetitions() {
    const REQUESTS: usize = 60;
    let limits = Limits { request_deadline: Duration::from_secs(2), ..Limits::default() };
    let setup = Setup::with(limits).await;
    setup.head.set(script(&[], End::Failed(ErrorCode::NotReady, "its links are being made")));
    let http = setup.http;
    let running: Vec<_> = (0..REQUESTS)
        .map(|_| tokio::spawn(async move { post(http, COMPLETIONS, &body(false)).await.status }))
        .collect();
    for one in running {
        assert_eq!(one.await.expect("no panic"), 504, "it waits, and hears what is missing");
    }
    // Once each, a fifth of them again, and ten a second over ten seconds at once.
    let asked = setup.head.requests().len();
    let most = REQUESTS + REQUESTS / 5 + 100 + 2 * 10;
    assert!(asked <= most + 5, "{asked} attempts of {REQUESTS} requests; {most} are granted");
    assert!(asked > REQUESTS, "nobody tried again");
}

#[tokio::test]
async fn a_request_that_kills_its_worker_twice_is_quarantined() {
    let setup = Setup::new().await;
    setup.head.set(script(&[], lost()));
    let response = post(setup.http, COMPLETIONS, &body(false)).await;
    assert_eq!(response.status, 422, "{}", response.body);
    let error = &response.json()["error"];
    assert_eq!(error["code"], "quarantined");
    for words in ["2 times in a row", "the link to w2 is lost", "not tried again"] {
        assert!(error["message"].as_str().is_some_and(|text| text.contains(words)), "{error}");
    }
    assert_eq!(attempts(&setup.head), [(0, 0), (1, 0)]);
    let metrics = get(setup.http, "/metrics").await.body;
    assert!(metrics.contains("shoal_quarantined_total{model_name=\"demo\"} 1"), "{metrics}");
}

#[tokio::test]
async fn suspects_are_tried_one_after_the_other() {
    let setup = Setup::new().await;
    let tokens = setup.says(TEXT);
    // Four are lost together before any has a token. The first of them to be tried again says nothing.
    setup.head.set_first((0..4).map(|_| script(&[], lost())).chain([script(&[], End::Silence)]));
    setup.head.set(script(&tokens, End::Done(1)));
    let request = json!({"model": "demo", "prompt": ["a", "b", "c", "d"], "max_tokens": 8});
    let http = setup.http;
    let running = tokio::spawn(async move { post(http, COMPLETIONS, &request).await });
    setup.head.sees(|seen| seen.requests.len() == 5).await;
    let more = setup.head.sees(|seen| seen.requests.len() > 5);
    let alone = tokio::time::timeout(Duration::from_millis(150), more).await;
    alone.expect_err("one suspect at a time");
    // Its layout is replaced: it goes on, has a token, and lets the others pass.
    setup.change(|demo| demo.replicas[0].generation = Generation(2));
    let response = running.await.expect("no panic");
    assert_eq!(response.status, 200, "{}", response.body);
    let attempts: Vec<u32> = attempts(&setup.head).iter().map(|(attempt, _)| *attempt).collect();
    assert_eq!(attempts, [0, 0, 0, 0, 1, 2, 1, 1, 1]);
}

#[tokio::test]
async fn an_answer_that_nobody_can_take_on_says_at_its_deadline_what_is_missing() {
    let limits = Limits { request_deadline: Duration::from_millis(400), ..Limits::default() };
    let setup = Setup::with(limits).await;
    let tokens = setup.says(TEXT);
    for stream in [true, false] {
        setup.change(|demo| {
            demo.replicas[0].ready = true;
            demo.phase = DeploymentPhase::Ready;
        });
        let paced = Duration::from_millis(30);
        setup.head.set(Script { tokens: tokens[..4].to_vec(), pace: paced, end: lost() });
        let (http, before) = (setup.http, setup.head.requests().len());
        let running = tokio::spawn(async move { post(http, COMPLETIONS, &body(stream)).await });
        setup.head.sees(|seen| seen.requests.len() > before).await;
        setup.change(|demo| {
            demo.replicas[0].ready = false;
            demo.phase = DeploymentPhase::Waiting;
            demo.reason = "stage 1 needs 20 MiB, w3 has 16 MiB".to_owned();
        });
        let response = running.await.expect("no panic");
        let error = if stream { error_of(&response) } else { response.json()["error"].clone() };
        assert_eq!(error["code"], "deadline_exceeded");
        for words in ["stage 1 needs 20 MiB, w3 has 16 MiB", "the link to w2 is lost"] {
            assert!(error["message"].as_str().is_some_and(|text| text.contains(words)), "{error}");
        }
        assert_eq!(setup.head.requests().len(), before + 1);
    }
}

#[tokio::test]
async fn there_is_no_wait_for_what_was_undeployed_or_cannot_be_served() {
    let setup = Setup::new().await;
    let tokens = setup.says(TEXT);
    for (failed, code, words) in
        [(true, "not_ready", "w1: shape mismatch"), (false, "model_not_found", "was undeployed")]
    {
        setup.head.set(script(&tokens[..4], lost()));
        setup.change(|demo| demo.replicas[0].ready = true);
        let paced = Duration::from_millis(20);
        setup.head.set(Script { tokens: tokens[..4].to_vec(), pace: paced, end: lost() });
        let (http, before) = (setup.http, setup.head.requests().len());
        let running = tokio::spawn(async move { post(http, COMPLETIONS, &body(true)).await });
        setup.head.sees(|seen| seen.requests.len() > before).await;
        setup.change(|demo| demo.replicas[0].ready = false);
        let since = Instant::now();
        if failed {
            setup.change(|demo| {
                demo.phase = DeploymentPhase::Failed;
                demo.reason = "w1: shape mismatch".to_owned();
            });
        } else {
            setup.table.send_replace(Default::default());
        }
        let error = error_of(&running.await.expect("no panic"));
        assert_eq!(error["code"], code);
        assert!(error["message"].as_str().is_some_and(|text| text.contains(words)), "{error}");
        assert!(since.elapsed() < Duration::from_secs(2));
        if failed {
            setup.change(|demo| demo.phase = DeploymentPhase::Ready);
        }
    }
}

#[tokio::test]
async fn a_new_request_waits_a_moment_for_a_layout_that_is_being_made() {
    let setup = Setup::new().await;
    setup.says(TEXT);
    setup.change(|demo| {
        demo.replicas[0].ready = false;
        demo.phase = DeploymentPhase::Loading;
    });
    let http = setup.http;
    let running = tokio::spawn(async move { post(http, COMPLETIONS, &body(false)).await });
    tokio::time::timeout(Duration::from_millis(100), setup.head.sees(|s| !s.requests.is_empty()))
        .await
        .expect_err("nobody is asked yet");
    setup.change(|demo| demo.replicas[0].ready = true);
    assert_eq!(running.await.expect("no panic").status, 200);
}
