//! The spans of a request at its coordinator, and the mark that its heads get.

use std::net::SocketAddr;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use serde_json::{Value as Json, json};
use shoal_protocol::error::ErrorCode;
use shoal_protocol::trace::{Given, Span, SpanId, Traceparent, Tracer, Value};

use super::client::{Response, open, send};
use super::head::{End, Script};
use super::setup::Setup;

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// How long a span may take to be given.
const PATIENCE: Duration = Duration::from_secs(5);

async fn ask(http: SocketAddr, body: &Json, parent: &str) -> Response {
    let body = body.to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntraceparent: {parent}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    send(http, &request).await
}

fn body() -> Json {
    json!({"model": "demo", "prompt": "1 plus 2", "max_tokens": 64, "stream": true})
}

/// The spans up to the request's own, which is the last one. It blocks: the server needs threads of its own.
fn spans(queue: &Receiver<Given>) -> Vec<Span> {
    let mut spans = Vec::new();
    loop {
        match queue.recv_timeout(PATIENCE).expect("the request's span in time") {
            Given::Span(span) if span.name.starts_with("POST") => {
                spans.push(span);
                return spans;
            }
            Given::Span(span) => spans.push(span),
            Given::Close => panic!("nobody closed it"),
        }
    }
}

fn get(span: &Span, key: &str) -> Value {
    let found = span.attributes.iter().find(|(name, _)| *name == key);
    found.unwrap_or_else(|| panic!("{} has no {key}", span.name)).1.clone()
}

fn named<'a>(spans: &'a [Span], name: &str) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.name == name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_get_a_mark_only_where_all_members_know_the_frame() {
    let (tracer, queue) = Tracer::new(1, 0.0, 1000);
    let setup = Setup::tracing(tracer).await;
    setup.says("3");
    let client = Traceparent::parse(PARENT).expect("a traceparent");
    for protocol in [0, 1, 2, 3] {
        setup.speak(protocol);
        let response = ask(setup.http, &body(), PARENT).await;
        assert_eq!(response.status, 200, "{}", response.body);
        let spans = spans(&queue);
        let root = spans.last().expect("the request's");
        assert_eq!((root.mark.trace, root.parent), (client.mark.trace, Some(client.mark.span)));
        let here = Traceparent { mark: root.mark, sampled: true }.to_string();
        assert_eq!(response.header("traceresponse"), Some(here.as_str()));
        assert_eq!(get(root, "gen_ai.request.model"), "demo".into());
        let names: Vec<&str> = spans.iter().map(|span| span.name).collect();
        let expected =
            ["admission", "tokenize", "route", "attempt", "stream", "POST /v1/completions"];
        assert_eq!(names, expected);
        assert!(spans[..5].iter().all(|span| span.parent == Some(root.mark.span)), "{spans:?}");
        let attempt = named(&spans, "attempt")[0].mark;
        let mark = setup.head.marks().pop().expect("a request");
        assert_eq!(mark, (protocol >= 2).then_some(attempt), "protocol {protocol}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_sampled_leaves_no_trace() {
    let (tracer, queue) = Tracer::new(1, 0.0, 1000);
    let setup = Setup::tracing(tracer).await;
    setup.speak(2);
    setup.says("3");
    for parent in [PARENT.replace("b7-01", "b7-00"), "nonsense".to_owned()] {
        let response = ask(setup.http, &body(), &parent).await;
        assert_eq!((response.status, response.header("traceresponse")), (200, None));
    }
    assert_eq!(setup.head.marks(), [None, None]);
    assert!(queue.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_attempt_has_a_span_that_says_why_it_was_made_and_how_it_ended() {
    let (tracer, queue) = Tracer::new(1, 1.0, 1000);
    let setup = Setup::tracing(tracer).await;
    setup.speak(2);
    let tokens = setup.says("3 plus 4 is 7.");
    let lost = End::Failed(ErrorCode::WorkerLost, "the link to w2 is lost");
    setup.head.set_first([Script {
        tokens: tokens[..2].to_vec(),
        pace: Duration::ZERO,
        end: lost,
    }]);
    let response = ask(setup.http, &body(), "").await;
    assert!(response.events().1, "{}", response.body);
    let spans = spans(&queue);
    let attempts = named(&spans, "attempt");
    let said: Vec<_> = attempts
        .iter()
        .map(|attempt| {
            let keys = ["shoal.attempt", "shoal.after", "shoal.replayed_tokens", "shoal.outcome"];
            (keys.map(|key| get(attempt, key)), attempt.error.is_some())
        })
        .collect();
    let expected = [
        ([0u32.into(), "new".into(), 0u32.into(), "worker_lost".into()], true),
        ([1u32.into(), "worker_lost".into(), 2u32.into(), "complete".into()], false),
    ];
    assert_eq!(said, expected);
    assert_eq!(named(&spans, "route").len(), 2);
    let marks: Vec<_> = attempts.iter().map(|attempt| Some(attempt.mark)).collect();
    assert_eq!(setup.head.marks(), marks);
    let root = spans.last().expect("the request's");
    assert_eq!((root.parent, &root.error), (None, &None), "the client had no trace");
    let text = |span: &Span| span.attributes.iter().any(|(_, v)| format!("{v:?}").contains("plus"));
    assert!(!spans.iter().any(text), "a prompt's text: {spans:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_refused_and_one_that_fails_say_so() {
    let (tracer, queue) = Tracer::new(1, 1.0, 1000);
    let setup = Setup::tracing(tracer).await;
    let wrong = json!({"model": "demo", "prompt": "x", "max_tokens": -1});
    let response = ask(setup.http, &wrong, PARENT).await;
    assert_eq!(response.status, 400);
    assert!(response.header("traceresponse").is_some());
    let refused = spans(&queue).pop().expect("the request's");
    assert_eq!(get(&refused, "http.response.status_code"), 400u32.into());
    assert_eq!(refused.error, None, "the caller's mistake is not ours");
    let end = End::Failed(ErrorCode::ComputeFailed, "not finite");
    setup.head.set(Script { tokens: vec![5, 6], pace: Duration::ZERO, end });
    let response = ask(setup.http, &body(), PARENT).await;
    assert_eq!(response.status, 200, "the stream had begun");
    let spans = spans(&queue);
    let failed = spans.last().expect("the request's");
    assert_eq!(failed.error.as_deref(), Some(ErrorCode::ComputeFailed.label()));
    assert_eq!(get(named(&spans, "attempt")[0], "shoal.outcome"), "final".into());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_ends_all_of_its_spans() {
    let (tracer, queue) = Tracer::new(1, 1.0, 1000);
    let setup = Setup::tracing(tracer).await;
    let script = Script { tokens: vec![5, 6], pace: Duration::ZERO, end: End::Silence };
    setup.head.set(script);
    let stream = open(setup.http, "/v1/completions", &body()).await;
    setup.head.sees(|seen| seen.requests.len() == 1).await;
    drop(stream);
    setup.head.sees(|seen| seen.cancelled == 1).await;
    let spans = spans(&queue);
    assert_eq!(get(named(&spans, "attempt")[0], "shoal.outcome"), "let go".into());
    let ids: Vec<SpanId> = spans.iter().map(|span| span.mark.span).collect();
    assert!(spans.iter().all(|span| span.parent.is_none_or(|parent| ids.contains(&parent))));
}
