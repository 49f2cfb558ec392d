//! Streams that go on when a worker is killed or frozen: a pause, then the same tokens as without it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use shoal_protocol::admin::{ClusterView, DeploymentPhase};
use shoal_protocol::plan::ModelSource;
use shoal_tests::api::{Api, Event, Stream};
use shoal_tests::model::RandomLlama;
use shoal_tests::proc::{Admin, Signal, Up, UpOptions, signal};
use shoal_tests::slow::{SLOW, holder, options, prompt, some_tokens};

/// How long a cluster of three may take to serve again.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(20);

/// Tokens of the streams that are broken: some three seconds.
const TOKENS: u32 = 500;

/// Chunks before something breaks.
const BEFORE: usize = 20;

/// The ids of the first choice of these chunks.
fn ids(chunks: &[Value]) -> Vec<u64> {
    let of = |chunk: &Value| chunk["choices"][0]["token_ids"].as_array().cloned();
    chunks.iter().filter_map(of).flatten().filter_map(|id| id.as_u64()).collect()
}

/// What a stream says from here to its end, which must be a good one.
fn rest(stream: &mut Stream) -> Result<Vec<Value>> {
    let (chunks, end) = stream.rest()?;
    assert_eq!(end, Event::Done, "after {} chunks", chunks.len());
    Ok(chunks)
}

/// So many chunks of a stream.
fn begin(stream: &mut Stream, chunks: usize) -> Result<Vec<Value>> {
    (0..chunks)
        .map(|_| match stream.event()? {
            Event::Chunk(chunk) => Ok(chunk),
            other => anyhow::bail!("{other:?} where a chunk was expected"),
        })
        .collect()
}

/// Chunks without what differs between any two requests.
fn plain(mut chunks: Vec<Value>) -> Vec<Value> {
    for chunk in &mut chunks {
        chunk["id"] = Value::Null;
        chunk["created"] = Value::Null;
    }
    chunks
}

/// A metric without labels, or the sum over its labels.
fn metric(api: &Api, name: &str) -> Result<f64> {
    let text = api.get("/metrics")?.body;
    let lines = text.as_str().context("a text")?.lines();
    let of = lines.filter(|line| line.starts_with(&format!("{name}{{")));
    Ok(of.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}

fn healthy(admin: &Admin) -> Result<ClusterView> {
    admin.wait_until("served again", RECOVERY_TIMEOUT, |view| {
        view.workers.iter().all(|w| w.connected)
            && view.deployments.iter().all(|d| d.phase == DeploymentPhase::Ready)
    })
}

/// Breaks the worker of each stage in the middle of a stream and of a request that waits for its
/// whole answer.
fn break_each_stage(flags: &str, how: Signal, mend: Option<Signal>) -> Result<()> {
    let up = Up::start(&UpOptions::flags(flags))?;
    let admin = up.admin()?;
    admin.deploy("slow", ModelSource::Pretend(SLOW), 3)?;
    let api = Api::new(up.url(), "slow");
    let undisturbed = api.complete(prompt(), options(TOKENS))?.ok()?;
    for stage in 0..3 {
        let view = healthy(&admin)?;
        let pid = holder(&view, "slow", stage)?;
        let mut stream = api.stream(prompt(), options(TOKENS))?;
        let waiting = std::thread::spawn({
            let api = api.clone();
            move || api.complete(prompt(), options(TOKENS))
        });
        let mut chunks = begin(&mut stream, BEFORE)?;
        signal(pid, how)?;
        let broken_at = Instant::now();
        chunks.extend(begin(&mut stream, TOKENS as usize / 4)?);
        println!(
            "stage {stage}: {how:?}, {} tokens later after {:?}",
            chunks.len(),
            broken_at.elapsed()
        );
        if let Some(mend) = mend {
            // It wakes up beside its successor, in the middle of the stream.
            signal(pid, mend)?;
        }
        chunks.extend(rest(&mut stream)?);
        assert_eq!(ids(&chunks), undisturbed.token_ids(), "stage {stage}");
        let whole = waiting.join().expect("no panic")?.ok()?;
        assert_eq!(whole.body["choices"], undisturbed.body["choices"], "stage {stage}");
        // And a new request.
        assert_eq!(some_tokens(&api)?.as_array().map(Vec::len), Some(20));
    }
    assert!(metric(&api, "shoal_resumed_attempts_total")? >= 6.0);
    println!(
        "{} stalls of {} s in all",
        metric(&api, "shoal_stall_seconds_count")?,
        metric(&api, "shoal_stall_seconds_sum")?
    );
    Ok(())
}

#[test]
fn a_killed_worker_is_a_pause_in_its_streams() -> Result<()> {
    break_each_stage("", Signal::KILL, None)
}

#[test]
fn a_frozen_worker_is_a_pause_and_disturbs_nothing_when_it_wakes() -> Result<()> {
    // Nobody starts another in the place of one that is frozen, so there is a spare.
    break_each_stage("--workers 4", Signal::STOP, Some(Signal::CONT))
}

#[test]
fn a_spare_worker_takes_over_where_nothing_is_started_again() -> Result<()> {
    let up = Up::start(&UpOptions::flags("--workers 4 --no-respawn"))?;
    let admin = up.admin()?;
    let view = admin.deploy("slow", ModelSource::Pretend(SLOW), 3)?;
    let api = Api::new(up.url(), "slow");
    let undisturbed = api.complete(prompt(), options(TOKENS))?.ok()?;
    let mut stream = api.stream(prompt(), options(TOKENS))?;
    let mut chunks = begin(&mut stream, BEFORE)?;
    signal(holder(&view, "slow", 1)?, Signal::KILL)?;
    chunks.extend(rest(&mut stream)?);
    assert_eq!(ids(&chunks), undisturbed.token_ids());
    Ok(())
}

#[test]
fn choices_that_are_drawn_go_on_with_their_log_probabilities_and_stop_where_they_would_have()
-> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("wide");
    RandomLlama { layers: 9, hidden: 256, intermediate: 704 }.write(&model)?;
    let up = Up::start(&UpOptions::flags("").model(&model))?;
    let (admin, api) = (up.admin()?, up.api());
    let mut options = json!({
        "max_tokens": 300, "ignore_eos": true, "return_token_ids": true, "n": 2, "logprobs": 2,
        "temperature": 1.0, "seed": 11, "presence_penalty": 0.4, "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
    });
    // A stop string that the second choice runs into late.
    let free = api.complete("abc", options.clone())?.ok()?;
    let text = free.body["choices"][1]["text"].as_str().context("a text")?.to_owned();
    let from = text.char_indices().nth(text.chars().count() * 3 / 4).map_or(0, |(at, _)| at);
    let stop: String = text[from..].chars().take(6).collect();
    options["stop"] = json!([stop]);
    let undisturbed = api.complete("abc", options.clone())?.ok()?;
    for stage in 0..2 {
        let view = healthy(&admin)?;
        let name = view.deployments[0].name.to_string();
        let pid = holder(&view, &name, stage)?;
        let resumed = metric(&api, "shoal_resumed_attempts_total")?;
        let mut stream = api.stream("abc", options.clone())?;
        let mut chunks = begin(&mut stream, BEFORE)?;
        signal(pid, Signal::KILL)?;
        chunks.extend(rest(&mut stream)?);
        for choice in 0..2 {
            let of = |chunk: &&Value| chunk["choices"][0]["index"] == choice;
            let mine: Vec<Value> = plain(chunks.iter().filter(of).cloned().collect());
            let whole = &undisturbed.body["choices"][choice];
            let text: String =
                mine.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
            assert_eq!(whole["text"], text.as_str(), "stage {stage}, choice {choice}");
            assert_eq!(json!(ids(&mine)), whole["token_ids"], "stage {stage}, choice {choice}");
            let logprobs: Vec<Value> = mine
                .iter()
                .filter_map(|chunk| chunk["choices"][0]["logprobs"]["token_logprobs"].as_array())
                .flatten()
                .cloned()
                .collect();
            assert_eq!(json!(logprobs), whole["logprobs"]["token_logprobs"]);
            let last = &mine.last().context("a chunk")?["choices"][0];
            assert_eq!(last["finish_reason"], whole["finish_reason"]);
            assert_eq!(last["stop_reason"], whole["stop_reason"]);
        }
        assert!(metric(&api, "shoal_resumed_attempts_total")? > resumed, "nothing was lost");
    }
    Ok(())
}
