//! What a client may not ask, and what it is told.

use std::time::Duration;

use serde_json::{Value, json};
use shoal_coordinator::api::Limits;
use shoal_coordinator::router::admission::AdmissionLimits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::client::{Response, get, open, post, post_text, send};
use super::head::{End, Script};
use super::setup::Setup;

/// The status, and OpenAI's error object with this `code`, `param` and a part of its message.
fn refused(response: &Response, status: u16, code: &str, param: Option<&str>, part: &str) {
    assert_eq!(response.status, status, "{}", response.body);
    assert_eq!(response.header("content-type"), Some("application/json"));
    let body = response.json();
    let error = body["error"].as_object().unwrap_or_else(|| panic!("{body}"));
    assert_eq!(error["code"], code, "{body}");
    assert_eq!(error["param"], param.map_or(Value::Null, Value::from), "{body}");
    assert!(error["message"].as_str().is_some_and(|text| text.contains(part)), "{body}");
    assert!(error["type"].is_string());
}

#[tokio::test]
async fn wrong_requests_are_refused_by_name() {
    let setup = Setup::new().await;
    let completions = "/v1/completions";
    for (path, body, status, code, param, part) in [
        (completions, json!({"prompt": "x"}), 400, "invalid_request", Some("model"), "missing"),
        (completions, json!({"model": "demo"}), 400, "invalid_request", Some("prompt"), "missing"),
        (
            completions,
            json!({"model": "gpt-4", "prompt": "x"}),
            404,
            "model_not_found",
            Some("model"),
            "these are deployed: demo, org/pretend",
        ),
        (
            completions,
            json!({"model": "demo", "prompt": "x", "max_tokens": 1000}),
            400,
            "context_length_exceeded",
            Some("prompt"),
            "context has 256 tokens",
        ),
        (
            completions,
            json!({"model": "demo", "prompt": [9999]}),
            400,
            "invalid_request",
            Some("prompt"),
            "vocabulary",
        ),
        (
            "/v1/chat/completions",
            json!({"model": "demo", "messages": [{"role": "user", "content": "x"}],
                "tools": [{"type": "function"}]}),
            400,
            "unsupported",
            Some("tools"),
            "not supported yet",
        ),
        (
            "/v1/chat/completions",
            json!({"model": "org/pretend", "messages": [{"role": "user", "content": "x"}]}),
            400,
            "invalid_request",
            Some("messages"),
            "token ids",
        ),
    ] {
        let response = post(setup.http, path, &body).await;
        refused(&response, status, code, param, part);
    }
    let broken = post_text(setup.http, completions, "{\"model\": }").await;
    refused(&broken, 400, "invalid_request", None, "line 1 column 11");
    let missing = get(setup.http, "/v1/audio/speech").await;
    refused(&missing, 404, "invalid_request", None, "/v1/audio/speech");
    refused(&get(setup.http, completions).await, 405, "invalid_request", None, "GET");
    let unknown = get(setup.http, "/v1/models/org/other").await;
    refused(&unknown, 404, "model_not_found", Some("model"), "org/other");
    let no_text = get(setup.http, "/v1/models/%ff").await;
    refused(&no_text, 400, "invalid_request", None, "UTF-8");
    assert!(setup.head.requests().is_empty(), "nothing wrong reaches a head");
}

#[tokio::test]
async fn a_web_page_is_refused_whatever_it_asks_for() {
    let setup = Setup::new().await;
    for path in ["/v1/models", "/health", "/nowhere"] {
        for (headers, words) in [
            ("host: evil.example:8000", "evil.example:8000"),
            ("host: localhost\r\norigin: https://evil.example", "https://evil.example"),
        ] {
            let request = format!("GET {path} HTTP/1.1\r\n{headers}\r\nconnection: close\r\n\r\n");
            refused(&send(setup.http, &request).await, 403, "permission_denied", None, words);
        }
    }
    let old = send(setup.http, "GET /health HTTP/1.0\r\n\r\n").await;
    assert_eq!(old.status, 200);
    let metrics = get(setup.http, "/metrics").await.body;
    assert!(metrics.contains("permission_denied"), "{metrics}");
}

#[tokio::test]
async fn bodies_have_bounds_of_size_and_time() {
    let limits = Limits {
        body_len_max: 1000,
        body_timeout: Duration::from_millis(200),
        header_timeout: Duration::from_millis(200),
        ..Limits::default()
    };
    let setup = Setup::with(limits).await;
    let large = json!({"model": "demo", "prompt": "x".repeat(1000)});
    let large = post(setup.http, "/v1/completions", &large).await;
    refused(&large, 413, "invalid_request", None, "1000 bytes");
    let slow = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
                content-length: 100\r\n\r\n{";
    refused(&send(setup.http, slow).await, 408, "invalid_request", None, "did not arrive");
    // Headers that never end, and none at all: the connection is closed.
    for start in ["GET /health HTTP/1.1\r\nhost: localhost\r\nx-slow: ", ""] {
        let mut stream = TcpStream::connect(setup.http).await.expect("it listens");
        stream.write_all(start.as_bytes()).await.expect("it reads");
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(Duration::from_secs(2), stream.read_to_end(&mut rest));
        assert!(closed.await.is_ok(), "{start:?} is still open");
    }
}

#[tokio::test]
async fn what_is_over_the_bound_is_told_when_to_come_back() {
    let limits =
        Limits { admission: AdmissionLimits { sequences_per_replica: 2 }, ..Limits::default() };
    let setup = Setup::with(limits).await;
    setup.head.set(Script { tokens: vec![40], pace: Duration::ZERO, end: End::Silence });
    let body = json!({"model": "demo", "prompt": "x", "n": 2});
    let open = open(setup.http, "/v1/completions", &body).await;
    setup.head.sees(|seen| seen.requests.len() == 2).await;
    let over = post(setup.http, "/v1/completions", &json!({"model": "demo", "prompt": "x"})).await;
    refused(&over, 429, "overloaded", None, "bound of 2");
    assert_eq!(over.header("retry-after"), Some("1"));
    // The other deployment has its own bound; and a place that is free again is used.
    drop(open);
    setup.head.sees(|seen| seen.cancelled == 2).await;
    setup.says("ok");
    let body = json!({"model": "demo", "prompt": "x"});
    assert_eq!(post(setup.http, "/v1/completions", &body).await.status, 200);
}

#[tokio::test]
async fn what_is_not_ready_says_why() {
    let limits = Limits { ready_patience: Duration::from_millis(50), ..Limits::default() };
    let setup = Setup::with(limits).await;
    let body = json!({"model": "demo", "prompt": "x"});
    setup.change(|demo| {
        demo.replicas[0].ready = false;
        demo.reason = "w2 is loading (40 %)".to_owned();
    });
    let response = post(setup.http, "/v1/completions", &body).await;
    refused(&response, 503, "not_ready", None, "w2 is loading (40 %)");
    assert!(response.header("retry-after").is_some());
    // Another deployment is ready, so this coordinator is.
    let ready = get(setup.http, "/ready").await;
    assert_eq!(ready.status, 200);
    assert_eq!(ready.json()["not_ready"]["demo"], "w2 is loading (40 %)");
    setup.table.send_replace(Default::default());
    let ready = get(setup.http, "/ready").await;
    assert_eq!((ready.status, &ready.json()["status"]), (503, &json!("nothing is deployed")));
}

#[tokio::test]
async fn a_coordinator_that_drains_lets_answers_finish() {
    let setup = Setup::new().await;
    let tokens = setup.says("1 plus 2 is 3.");
    let pace = Duration::from_millis(20);
    setup.head.set(Script { tokens, pace, end: End::Done(1) });
    let body = json!({"model": "demo", "prompt": "x", "stream": true});
    let http = setup.http;
    let running = tokio::spawn(async move { post(http, "/v1/completions", &body).await });
    setup.head.sees(|seen| seen.requests.len() == 1).await;
    setup.draining.send_replace(true);
    let (events, done) = running.await.expect("no panic").events();
    assert!(done && !events.is_empty());
    tokio::time::timeout(Duration::from_secs(5), setup.server)
        .await
        .expect("ends")
        .expect("no panic");
    assert!(TcpStream::connect(setup.http).await.is_err(), "it still listens");
}
