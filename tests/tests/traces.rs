//! One trace shows every hop of a request, over real processes and a real collector.

use std::collections::BTreeSet;
use std::io::Read;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use shoal_protocol::plan::ModelSource;
use shoal_tests::api::Api;
use shoal_tests::collector::{Collector, Span};
use shoal_tests::proc::{Signal, Up, UpOptions, signal};
use shoal_tests::slow::{SLOW, holder, options, prompt};

/// Spans are sent a fifth of a second after they end.
const SPANS_TIMEOUT: Duration = Duration::from_secs(15);

/// How much a span may stick out of the one that it is a part of: times are read on threads that a busy
/// machine stops in between.
const TOLERANCE_NS: u64 = 100_000_000;

/// A client's span, in which each trace here begins.
const CLIENT: &str = "00f067aa0ba902b7";

fn trace_id(number: u32) -> String {
    format!("4bf92f3577b34da6a3ce929d{number:08x}")
}

/// Sends a request as a part of a client's trace; returns `traceresponse`, and the body when it is
/// complete.
fn post(url: &str, path: &str, body: &Value, trace: &str, flags: &str) -> Result<(String, String)> {
    let agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(40)))
        .build()
        .new_agent();
    let parent = format!("00-{trace}-{CLIENT}-{flags}");
    let mut response =
        agent.post(format!("{url}{path}")).header("traceparent", parent).send_json(body)?;
    let header = response.headers().get("traceresponse");
    let header = header.map_or(Ok(""), |value| value.to_str())?.to_owned();
    let text = response.body_mut().read_to_string()?;
    ensure!(response.status() == 200, "{text}");
    Ok((header, text))
}

fn chat(question: &str) -> Value {
    json!({
        "model": "demo", "temperature": 0, "max_tokens": 40, "ignore_eos": true,
        "messages": [{"role": "user", "content": question}],
    })
}

fn of<'a>(spans: &'a [Span], name: &str) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.name == name).collect()
}

fn one<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    let found = of(spans, name);
    assert_eq!(found.len(), 1, "{name}: {found:?}");
    found[0]
}

/// Each span lies within the one that it is a part of, and that one is there.
fn check_parents(spans: &[Span]) {
    for span in spans {
        assert!(span.start <= span.end, "{span:?}");
        if span.parent == CLIENT {
            continue;
        }
        let parent = spans.iter().find(|other| other.id == span.parent);
        let parent = parent.unwrap_or_else(|| panic!("the parent of {span:?} is missing"));
        let within =
            span.start + TOLERANCE_NS >= parent.start && span.end <= parent.end + TOLERANCE_NS;
        assert!(within, "{span:?} is not within {parent:?}");
    }
    let ids: BTreeSet<&str> = spans.iter().map(|span| span.id.as_str()).collect();
    assert_eq!(ids.len(), spans.len(), "each has an id of its own");
}

/// Whether the request is over and its spans of all stages are there, that of the last step too.
fn complete(spans: &[Span], heads: usize) -> bool {
    let sums =
        |stage: &str| of(spans, "stage steps").iter().any(|span| span.get("shoal.stage") == stage);
    spans.iter().any(|span| span.parent == CLIENT)
        && of(spans, "head").len() == heads
        && ["0", "1", "2"].into_iter().all(sums)
}

/// Waits until marks travel: all members must have said that they know the frame.
fn until_marks_travel(up: &Up, collector: &Collector) -> Result<()> {
    let body = chat("Hello");
    for number in 100..120 {
        let trace = trace_id(number);
        post(up.url(), "/v1/chat/completions", &body, &trace, "01")?;
        let has_head = |spans: &[Span]| !of(spans, "head").is_empty();
        if collector.wait_for(&trace, Duration::from_secs(1), has_head).is_ok() {
            return Ok(());
        }
    }
    bail!("no head ever got a mark")
}

/// Steps of a stage that stand in sums.
fn summed(spans: &[Span], stage: u64) -> u32 {
    let stage = stage.to_string();
    let here = of(spans, "stage steps").into_iter().filter(|s| s.get("shoal.stage") == stage);
    here.filter_map(|span| span.get("shoal.steps").parse::<u32>().ok()).sum()
}

#[test]
fn one_trace_shows_every_hop_of_a_request() -> Result<()> {
    let collector = Collector::start()?;
    let up = Up::start(&UpOptions::flags(&format!("--otlp {}", collector.url())))?;
    until_marks_travel(&up, &collector)?;
    let path = "/v1/chat/completions";
    let [unsampled, sampled] = [1, 2].map(trace_id);
    let (header, _) = post(up.url(), path, &chat("What is 47 plus 38?"), &unsampled, "00")?;
    assert_eq!(header, "");
    let (header, _) = post(up.url(), path, &chat("What is 47 plus 38?"), &sampled, "01")?;
    // The first token comes with the prompt, the last one is not fed back, and eight steps are shown.
    let all = |spans: &[Span]| (0..3).all(|stage| summed(spans, stage) == 40 - 1 - 8);
    let enough = |spans: &[Span]| complete(spans, 1) && all(spans);
    let spans = collector.wait_for(&sampled, SPANS_TIMEOUT, enough)?;
    check_parents(&spans);

    let root = one(&spans, "POST /v1/chat/completions");
    assert_eq!(header, format!("00-{sampled}-{}-01", root.id));
    assert_eq!((root.parent.as_str(), root.node.as_str()), (CLIENT, "c1"));
    assert_eq!(root.service, "shoal-coordinator");
    assert_eq!(root.get("http.response.status_code"), "200");
    assert!(root.get("shoal.request_id").starts_with("chatcmpl-"), "{root:?}");
    for name in ["admission", "tokenize", "route", "attempt", "stream"] {
        let span = one(&spans, name);
        assert_eq!((&span.parent, span.node.as_str()), (&root.id, "c1"), "{name}");
    }
    let route = one(&spans, "route");
    assert_eq!(
        (route.get("shoal.policy"), route.get("shoal.why")),
        ("score", "it is the only replica")
    );

    let (attempt, head) = (one(&spans, "attempt"), one(&spans, "head"));
    assert_eq!((attempt.get("shoal.attempt"), attempt.get("shoal.outcome")), ("0", "complete"));
    let workers = up.workers();
    let holder_of = |stage| {
        let worker = workers.iter().find(|worker| worker.stage == Some(stage));
        worker.map(|worker| worker.id.clone()).context("a holder")
    };
    assert_eq!((&head.parent, &head.node), (&attempt.id, &holder_of(0)?));
    assert_eq!(head.get("shoal.tokens"), "40");
    for name in ["queue", "prefill", "decode"] {
        let span = one(&spans, name);
        assert_eq!((&span.parent, &span.node), (&head.id, &head.node), "{name}");
    }
    let chunks = of(&spans, "prefill chunk");
    assert!(!chunks.is_empty() && chunks.iter().all(|chunk| chunk.parent == head.id));

    for stage in 0..3 {
        let node = holder_of(stage)?;
        let here = |span: &&Span| span.node == node && span.service == "shoal-worker";
        let steps: Vec<&Span> = of(&spans, "stage step").into_iter().filter(here).collect();
        // Those of the prompt, and the first of the answer; the others stand in sums.
        assert_eq!(steps.len(), chunks.len() + 8, "stage {stage}");
        for step in &steps {
            assert_eq!(
                (&step.parent, step.get("shoal.stage")),
                (&head.id, stage.to_string().as_str())
            );
            let mut parts: Vec<&Span> = spans.iter().filter(|s| s.parent == step.id).collect();
            parts.sort_by_key(|part| part.start);
            let names: Vec<&str> = parts.iter().map(|part| part.name.as_str()).collect();
            let expected: &[&str] = match stage {
                2 => &["receive", "compute", "sample", "send"],
                _ => &["receive", "compute", "send"],
            };
            assert_eq!(names, expected, "stage {stage}");
        }
    }
    assert!(spans.len() < 200, "{} spans", spans.len());

    let all = collector.spans();
    assert!(all.iter().all(|span| span.trace != unsampled), "not sampled, and told all the same");
    let words = |span: &Span| span.attributes.values().any(|value| value.contains("plus"));
    assert!(!all.iter().any(words), "a prompt's text stands in a span");
    let counted = up.api().get("/metrics")?;
    let counted = counted.body.as_str().context("a text")?.to_owned();
    assert!(counted.contains("shoal_trace_spans_total{outcome=\"collector\"} 0"), "{counted}");
    up.stop(&[])?;
    Ok(())
}

#[test]
fn a_recovered_answer_shows_both_attempts_in_one_trace() -> Result<()> {
    let collector = Collector::start()?;
    let up = Up::start(&UpOptions::flags(&format!("--otlp {}", collector.url())))?;
    until_marks_travel(&up, &collector)?;
    let admin = up.admin()?;
    let view = admin.deploy("slow", ModelSource::Pretend(SLOW), 3)?;
    let trace = trace_id(3);
    let mut body = options(400);
    body["model"] = "slow".into();
    body["prompt"] = json!(prompt());
    let (_, text) = std::thread::scope(|scope| -> Result<_> {
        let (url, body, trace) = (up.url(), &body, &trace);
        let waiting = scope.spawn(move || post(url, "/v1/completions", body, trace, "01"));
        // The middle stage has computed for it: now its worker dies.
        let there = |spans: &[Span]| {
            of(spans, "stage step").iter().any(|span| span.get("shoal.stage") == "1")
        };
        collector.wait_for(trace, SPANS_TIMEOUT, there)?;
        signal(holder(&view, "slow", 1)?, Signal::KILL)?;
        waiting.join().expect("no panic")
    })?;
    let answer: Value = serde_json::from_str(&text)?;
    assert_eq!(answer["choices"][0]["token_ids"].as_array().map(Vec::len), Some(400));
    let spans = collector.wait_for(&trace, SPANS_TIMEOUT, |spans| complete(spans, 2))?;
    check_parents(&spans);

    let root = one(&spans, "POST /v1/completions");
    let mut attempts = of(&spans, "attempt");
    attempts.sort_by_key(|attempt| attempt.start);
    println!("{} spans; attempts: {attempts:?}", spans.len());
    assert!(attempts.iter().all(|attempt| attempt.parent == root.id));
    let (first, last) = (attempts[0], attempts[attempts.len() - 1]);
    assert_eq!((first.get("shoal.attempt"), first.get("shoal.after")), ("0", "new"));
    assert_eq!(
        (first.get("shoal.outcome"), first.error.as_deref()),
        ("worker_lost", Some("worker_lost"))
    );
    assert_eq!((last.get("shoal.outcome"), last.error.as_deref()), ("complete", None));
    assert_ne!(last.get("shoal.attempt"), "0");
    assert_ne!(last.get("shoal.after"), "new");
    let replayed: usize = last.get("shoal.replayed_tokens").parse()?;
    assert!((1..400).contains(&replayed), "{replayed}");
    // Each has a head and steps at all three stages.
    for attempt in [first, last] {
        let head = of(&spans, "head").into_iter().find(|head| head.parent == attempt.id);
        let head = head.context("a head of the attempt")?;
        assert_eq!(head.get("shoal.attempt"), attempt.get("shoal.attempt"));
        let steps = of(&spans, "stage step").into_iter().filter(|step| step.parent == head.id);
        let stages: BTreeSet<&str> = steps.map(|step| step.get("shoal.stage")).collect();
        assert_eq!(stages, BTreeSet::from(["0", "1", "2"]), "{}", attempt.get("shoal.attempt"));
    }
    assert_eq!(of(&spans, "route").len(), attempts.len(), "each place was chosen");
    Ok(())
}

/// The value of `shoal_trace_spans_total` for spans that no collector took.
fn dropped(api: &Api) -> Result<u64> {
    let text = api.get("/metrics")?.body;
    let start = "shoal_trace_spans_total{outcome=\"collector\"} ";
    let mut lines = text.as_str().context("a text")?.lines();
    let line = lines.find_map(|line| line.strip_prefix(start)).context("the metric")?;
    Ok(line.parse()?)
}

#[test]
fn a_collector_that_is_down_or_mute_costs_no_request_anything() -> Result<()> {
    // Nobody listens at the first; the second takes what comes and never says a word.
    let down = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let mute = TcpListener::bind("127.0.0.1:0")?;
    let address = mute.local_addr()?;
    std::thread::spawn(move || {
        for mut stream in mute.incoming().map_while(Result::ok) {
            std::thread::spawn(move || stream.read_to_end(&mut Vec::new()));
        }
    });
    for (collector, is_down) in [(down, true), (address, false)] {
        let up = Up::start(&UpOptions::flags(&format!("--otlp http://{collector}")))?;
        let api = up.api();
        let began = Instant::now();
        for _ in 0..5 {
            api.chat("What is 47 plus 38?", json!({"max_tokens": 8}))?.ok()?;
        }
        println!("five requests in {:?}, the collector at {collector}", began.elapsed());
        if is_down {
            let until = Instant::now() + SPANS_TIMEOUT;
            // A scrape takes its time, so this does not spin.
            while dropped(&api)? < 10 {
                ensure!(Instant::now() < until, "the drops are not counted");
            }
            let log = up.runtime_dir().join("up/logs/coordinator.log");
            let log = std::fs::read_to_string(log)?;
            assert_eq!(log.matches("traces are dropped").count(), 1, "{log}");
        }
        let began = Instant::now();
        up.stop(&[])?;
        println!("stopped in {:?}", began.elapsed());
    }
    Ok(())
}
