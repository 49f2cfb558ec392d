//! Meshes of real processes: what the demo model says over ranks is what it says over stages, and a
//! stream outlives the death of a rank.

#[path = "meshes/adapters.rs"]
mod adapters;
#[path = "meshes/far.rs"]
mod far;
#[path = "meshes/halves.rs"]
mod halves;
#[path = "meshes/prefixes.rs"]
mod prefixes;
#[path = "meshes/refused.rs"]
mod refused;
#[path = "meshes/uneven.rs"]
mod uneven;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_protocol::admin::DeploymentPhase;
use shoal_tests::api::{Api, Event, text_of};
use shoal_tests::model::RandomLlama;
use shoal_tests::proc::{Signal, Up, UpOptions, signal};
use shoal_tests::slow::holder;

const READY: Duration = Duration::from_secs(30);

const QUESTIONS: [&str; 4] =
    ["What is 17 + 25?", "What is 3 + 4?", "What is 58 + 31?", "What is 99 + 1?"];

/// The tokens of an answer and what is reported beside them, greedy or drawn.
fn ask(up: &Up, model: &str, question: &str, temperature: f64) -> Result<(Vec<u64>, Value)> {
    let api = Api::new(up.url(), model);
    let more = json!({
        "temperature": temperature, "seed": 7, "max_tokens": 12, "logprobs": true,
        "top_logprobs": 3, "return_token_ids": true, "ignore_eos": true,
    });
    let answer = api.chat(question, more)?.ok()?;
    let beside = answer.body["choices"][0]["logprobs"].clone();
    Ok((answer.token_ids(), beside))
}

#[test]
fn ranks_say_what_stages_say() -> Result<()> {
    let up = Up::start(&UpOptions::flags("--workers 4"))?;
    for (name, flags) in [
        ("exact", "--mesh 2x2 --reduction exact"),
        ("summed", "--mesh 1x2"),
        ("auto", "--mesh auto --objective throughput"),
    ] {
        let words: Vec<&str> =
            ["deploy", "--name", name].into_iter().chain(flags.split(' ')).collect();
        let done = up.verb(&words)?;
        ensure!(done.code() == Some(0), "{done:?}");
        up.admin()?.wait_for_phase(name, DeploymentPhase::Ready, READY)?;
    }
    for question in QUESTIONS {
        for temperature in [0.0, 1.0] {
            let stages = ask(&up, "demo", question, temperature)?;
            ensure!(!stages.0.is_empty(), "no tokens");
            // The very bits, log-probabilities too.
            ensure!(ask(&up, "exact", question, temperature)? == stages, "exact: {question}");
        }
        let stages = ask(&up, "demo", question, 0.0)?.0;
        for name in ["summed", "auto"] {
            ensure!(ask(&up, name, question, 0.0)?.0 == stages, "{name}: {question}");
        }
    }
    let refused = up.verb(&["deploy", "--name", "wide", "--mesh", "1x64"])?;
    ensure!(refused.code() != Some(0), "{refused:?}");
    ensure!(refused.stderr.contains("possible"), "{refused:?}");
    up.stop(&[])?;
    Ok(())
}

#[test]
fn an_answer_outlives_the_death_of_a_rank() -> Result<()> {
    let up = Up::start(&UpOptions::flags("--workers 4"))?;
    let done = up.verb(&["deploy", "--name", "exact", "--mesh", "1x2", "--reduction", "exact"])?;
    ensure!(done.code() == Some(0), "{done:?}");
    let view = up.admin()?.wait_for_phase("exact", DeploymentPhase::Ready, READY)?;
    let question = QUESTIONS[0];
    let api = Api::new(up.url(), "exact");
    let more = json!({
        "temperature": 0.0, "max_tokens": 120, "return_token_ids": true, "ignore_eos": true,
    });
    let expected = api.chat(question, more.clone())?.ok()?.text().to_owned();
    let replica = view.plan.replicas.iter().find(|r| r.deployment.as_str() == "exact");
    let rank = replica.and_then(|r| r.stages[0].shards.get(1)).context("it has two ranks")?.node;
    let worker = up.workers().into_iter().find(|worker| worker.id == rank.to_string());
    // In the middle of an answer: it goes on in the layout that is made then.
    let mut stream = api.stream_chat(question, more)?;
    let mut text = String::new();
    for _ in 0..5 {
        text.push_str(&stream.text()?);
    }
    signal(worker.context("it runs")?.pid, Signal::KILL)?;
    let (chunks, _) = stream.rest()?;
    chunks.iter().for_each(|chunk| text.push_str(text_of(chunk)));
    ensure!(text == expected, "another answer after the death: {text:?}, not {expected:?}");
    let after = up.admin()?.wait_for_phase("exact", DeploymentPhase::Ready, READY)?;
    let after = after.plan.replicas.iter().find(|r| r.deployment.as_str() == "exact");
    let nodes: Vec<_> = after.context("it is served")?.nodes().collect();
    ensure!(!nodes.contains(&rank), "it is still with {rank}, which is dead");
    up.stop(&[])?;
    Ok(())
}

/// `make bench-size` does the same with a billion parameters.
#[test]
fn a_model_that_no_worker_has_room_for_says_the_same_over_every_mesh() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("wide");
    // 25.5 MiB of weights.
    RandomLlama { layers: 9, hidden: 256, intermediate: 704 }.write_with_heads(&model, 2)?;
    let model = model.to_str().context("a path in UTF-8")?;
    let answer = |api: &Api| -> Result<Vec<u64>> {
        let more = json!({"max_tokens": 8, "return_token_ids": true, "ignore_eos": true});
        Ok(api.complete("abc", more)?.ok()?.token_ids())
    };
    let whole = Up::start(&UpOptions::flags("--workers 1").model(model))?;
    let expected = answer(&whole.api())?;
    ensure!(expected.len() == 8, "{expected:?}");
    whole.stop(&[])?;

    let up = Up::start(&UpOptions::flags("--workers 4 --worker-memory 20MiB"))?;
    up.verb(&["undeploy", "demo"])?.expect_code(0);
    let alone = up.verb(&["deploy", model, "--name", "alone", "--stages", "1"])?;
    ensure!(alone.code() != Some(0) && alone.stderr.contains("does not fit"), "{alone:?}");
    for (name, mesh) in [("long", "2x1"), ("broad", "1x2"), ("both", "2x2")] {
        let words = ["deploy", model, "--name", name, "--mesh", mesh, "--reduction", "exact"];
        up.verb(&words)?.expect_code(0);
        up.admin()?.wait_for_phase(name, DeploymentPhase::Ready, READY)?;
        let found = answer(&Api::new(up.url(), name))?;
        ensure!(found == expected, "{mesh}: {found:?} instead of {expected:?}");
        up.verb(&["undeploy", name])?.expect_code(0);
    }
    up.stop(&[])?;
    Ok(())
}

/// The ids of these chunks of a stream.
fn ids(chunks: &[Value]) -> Vec<u64> {
    let of = |chunk: &Value| chunk["choices"][0]["token_ids"].as_array().cloned();
    chunks.iter().filter_map(of).flatten().filter_map(|id| id.as_u64()).collect()
}

#[test]
fn a_cache_of_fewer_bits_says_the_same_over_every_cut_and_after_a_death() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("wide");
    RandomLlama { layers: 6, hidden: 256, intermediate: 704 }.write(&model)?;
    let up = Up::start(&UpOptions::flags("--kv q8_0").model(&model))?;
    let path = model.to_str().context("it is UTF-8")?;
    for (name, flags) in [("one", "--stages 1 --kv q8_0"), ("half", "--kv bf16"), ("whole", "")] {
        let flags = flags.split_whitespace();
        let args: Vec<&str> = ["deploy", path, "--name", name].into_iter().chain(flags).collect();
        let done = up.verb(&args)?;
        ensure!(done.code() == Some(0), "{done:?}");
    }
    let status = up.verb(&["status"])?;
    for contract in ["n1-kv-q8_0", "n1-kv-bf16"] {
        ensure!(status.stdout.contains(contract), "{status:?}");
    }
    let explained = up.verb(&["plan", "one", "--explain"])?;
    ensure!(explained.stdout.contains("held as q8_0"), "{explained:?}");
    let options = json!({
        "max_tokens": 300, "ignore_eos": true, "return_token_ids": true, "temperature": 1.0,
        "seed": 11, "logprobs": 2,
    });
    let said = |name: &str| Api::new(up.url(), name).complete("abc", options.clone())?.ok();
    let expected = said("wide")?.body["choices"].clone();
    ensure!(said("one")?.body["choices"] == expected, "another answer over one stage");
    for name in ["half", "whole"] {
        ensure!(said(name)?.body["choices"] != expected, "{name}: nothing was rounded");
    }
    let view = up.admin()?.wait_for_phase("wide", DeploymentPhase::Ready, READY)?;
    let mut stream = Api::new(up.url(), "wide").stream("abc", options.clone())?;
    let mut chunks = Vec::new();
    for _ in 0..20 {
        let Event::Chunk(chunk) = stream.event()? else { anyhow::bail!("it ended early") };
        chunks.push(chunk);
    }
    signal(holder(&view, "wide", 1)?, Signal::KILL)?;
    let (rest, end) = stream.rest()?;
    ensure!(end == Event::Done, "{end:?}");
    chunks.extend(rest);
    ensure!(json!(ids(&chunks)) == expected[0]["token_ids"], "other tokens after the death");
    up.stop(&[])?;
    Ok(())
}
