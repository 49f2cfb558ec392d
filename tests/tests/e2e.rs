//! Whole clusters of real processes serve real requests.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use shoal_protocol::admin::DeploymentPhase;
use shoal_tests::api::{Answer, Api, Event, text_of};
use shoal_tests::model::demo;
use shoal_tests::proc::{Process, Up, UpOptions, shoal};

/// Questions that are under way at once.
const CLIENTS: usize = 16;

#[test]
fn the_demo_answers_its_questions_over_three_workers() -> Result<()> {
    let up = Up::start(&UpOptions::default())?;
    assert_eq!(up.ready["mesh"], "3x1");
    let text = std::fs::read_to_string(demo().join("questions.json"))?;
    let questions: Vec<Value> = serde_json::from_str(&text)?;
    assert_eq!(questions.len(), 500);
    let (next, right) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let api = up.api();
    let ask = || -> Result<()> {
        while let Some(case) = questions.get(next.fetch_add(1, Ordering::Relaxed)) {
            let question = case["question"].as_str().context("a question")?;
            let answer = api.chat(question, json!({}))?.ok()?;
            if answer.text() == case["answer"] {
                right.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(ask)).collect();
        clients.into_iter().try_for_each(|client| client.join().expect("no client panics"))
    })?;
    let right = right.into_inner();
    assert!(right >= 495, "{right} of 500 were right");

    // Every stage took part.
    let status: Value =
        serde_json::from_str(&up.verb(&["status", "--json"])?.expect_code(0).stdout)?;
    for worker in status["workers"].as_array().context("workers")? {
        let shards = worker["shards"].as_array().context("shards")?;
        assert_eq!(shards.len(), 1, "{worker}");
        assert!(shards[0]["counters"]["steps"].as_u64() > Some(500), "{worker}");
        assert_eq!(shards[0]["counters"]["lost_packets"], 0, "{worker}");
    }
    up.stop(&[])?;
    Ok(())
}

#[test]
fn up_asks_the_planner_for_what_deploy_can() -> Result<()> {
    let up = Up::start(&UpOptions::flags("--workers 2 --mesh 1x2 --reduction exact"))?;
    assert_eq!(up.ready["mesh"], "1x2");
    let status = up.verb(&["status"])?.expect_code(0).stdout;
    assert!(!status.contains("resume not exact"), "{status}");
    up.stop(&[])?;
    let summed = Up::start(&UpOptions::flags("--workers 2 --mesh 1x2"))?;
    let status = summed.verb(&["status"])?.expect_code(0).stdout;
    assert!(status.contains("resume not exact"), "{status}");
    summed.stop(&[])?;
    Ok(())
}

#[test]
fn the_ready_line_says_who_holds_which_layers() -> Result<()> {
    let mut up = Up::start(&UpOptions::flags("--workers 3 --stages 2"))?;
    let ready = &up.ready;
    assert_eq!(ready["event"], "ready");
    assert_eq!(ready["version"], 1);
    assert_eq!(ready["model"], "demo");
    assert_eq!(ready["mesh"], "2x1");
    assert_eq!(ready["generation"], 1);
    assert_eq!(ready["coordinator"]["id"], "c1");
    let workers = up.workers();
    let ids: Vec<&str> = workers.iter().map(|worker| worker.id.as_str()).collect();
    assert_eq!(ids, ["w1", "w2", "w3"]);
    let idle: Vec<usize> = (0..3).filter(|&w| ready["workers"][w]["layers"].is_null()).collect();
    assert_eq!(idle.len(), 1, "{ready}");
    assert_eq!(ready["workers"][idle[0]]["weight_bytes"], 0);
    let mut layers: Vec<(u64, u64)> = workers.iter().filter_map(|w| w.layers).collect();
    layers.sort_unstable();
    assert_eq!((layers[0].0, layers[1].1), (0, 12), "{ready}");
    assert_eq!(layers[0].1, layers[1].0, "{ready}");
    for (number, worker) in workers.iter().enumerate() {
        assert!(up.address(number).is_some(), "{ready}");
        if worker.layers.is_some() {
            assert!(ready["workers"][number]["weight_bytes"].as_u64() > Some(0), "{ready}");
            assert!(ready["workers"][number]["kv_bytes"].as_u64() > Some(0), "{ready}");
        }
    }
    // Nothing but that one line is ever on stdout.
    assert!(up.process().line(Duration::from_millis(100)).is_err());
    let finished = up.stop(&[])?;
    assert_eq!(finished.stdout, "");
    Ok(())
}

#[test]
fn a_stream_says_what_an_answer_says() -> Result<()> {
    let up = Up::start(&UpOptions::default())?;
    let api = up.api();
    let question = "What is 47 plus 38?";
    let answer = api.chat(question, json!({"return_token_ids": true}))?.ok()?;
    assert_eq!(answer.text(), "47 plus 38 is 85.");
    let options = json!({"stream_options": {"include_usage": true}, "return_token_ids": true});
    let (chunks, end) = api.stream_chat(question, options)?.rest()?;
    assert_eq!(end, Event::Done);
    let text: String = chunks.iter().map(text_of).collect();
    assert_eq!(text, answer.text());
    let ids: Vec<u64> = chunks
        .iter()
        .flat_map(|chunk| chunk["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default())
        .filter_map(|id| id.as_u64())
        .collect();
    assert_eq!(ids, answer.token_ids());
    let reasons: Vec<&Value> = chunks
        .iter()
        .map(|chunk| &chunk["choices"][0]["finish_reason"])
        .filter(|reason| !reason.is_null())
        .collect();
    assert_eq!(reasons, ["stop"]);
    let usage = &chunks.last().context("chunks")?["usage"];
    // But for what was known of the prompt the second time.
    for field in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert!(usage[field].is_u64());
        assert_eq!(usage[field], answer.body["usage"][field], "{field}");
    }
    assert_eq!(usage["completion_tokens"], ids.len());
    up.stop(&[])?;
    Ok(())
}

/// The same requests, for deployments of one model that are cut differently.
fn sample(api: &Api) -> Result<Vec<Value>> {
    let mut seen = Vec::new();
    let mut keep = |answer: Answer| {
        for choice in answer.body["choices"].as_array().into_iter().flatten() {
            seen.push(json!([choice["token_ids"], choice["logprobs"]]));
        }
    };
    let all = json!({"return_token_ids": true, "logprobs": 3, "max_tokens": 24});
    let with = |more: Value| {
        let mut all = all.clone();
        for (key, value) in more.as_object().into_iter().flatten() {
            all[key] = value.clone();
        }
        all
    };
    for prompt in ["What is 12 plus 7?", "abc ü 漢", &"3 4 5 ".repeat(60)] {
        keep(api.complete(prompt, with(json!({"ignore_eos": true})))?.ok()?);
        let drawn = json!({
            "temperature": 1.3, "top_p": 0.97, "top_k": 200, "seed": 11, "n": 3,
            "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1,
            "ignore_eos": true,
        });
        keep(api.complete(prompt, with(drawn))?.ok()?);
    }
    Ok(seen)
}

#[test]
fn any_split_draws_the_same_tokens() -> Result<()> {
    let up = Up::start(&UpOptions::flags("--workers 3 --stages 3"))?;
    let split = sample(&up.api())?;
    assert_eq!(split.len(), 3 * (1 + 3));
    assert_ne!(split[1], split[2], "the choices of one prompt must differ");
    for stages in [1, 2] {
        let name = format!("demo-{stages}");
        let stages = stages.to_string();
        up.verb(&["deploy", "--name", &name, "--stages", &stages])?.expect_code(0);
        assert_eq!(sample(&Api::new(up.url(), &name))?, split, "{stages} stages");
    }
    // Side by side with other requests nothing changes either.
    let api = up.api();
    let together = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..6).map(|_| scope.spawn(|| sample(&api))).collect();
        let joined = clients.into_iter().map(|client| client.join().expect("no client panics"));
        joined.collect::<Result<Vec<_>>>()
    })?;
    for alone in together {
        assert_eq!(alone, split);
    }
    up.stop(&[])?;
    Ok(())
}

/// llama.cpp's converter cut it, transformers said what it answers.
#[test]
fn a_model_in_parts_is_served_whichever_part_is_named() -> Result<()> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let folder = tempfile::tempdir()?;
    let part = |number: u32| format!("mixtral-bf16-0000{number}-of-00003.gguf");
    for number in 1..=3 {
        std::fs::copy(fixtures.join("gguf").join(part(number)), folder.path().join(part(number)))?;
    }
    let tokenizer = fixtures.join("models/qwen2-tied-bf16/tokenizer.json");
    std::fs::copy(tokenizer, folder.path().join("tokenizer.json"))?;
    let model = Some(folder.path().join(part(2)));
    let up = Up::start(&UpOptions { model, ..UpOptions::flags("--workers 2 --stages 2") })?;
    let case = std::fs::read_to_string(fixtures.join("cases/mixtral-bf16.json"))?;
    let case: Value = serde_json::from_str(&case)?;
    let api = Api::new(up.url(), "mixtral-bf16");
    for prompt in case["prompts"].as_array().context("prompts")? {
        let asked = json!({
            "max_tokens": 40, "temperature": 0.0, "ignore_eos": true, "return_token_ids": true,
        });
        let answer = api.complete(prompt["prompt_ids"].clone(), asked)?.ok()?;
        assert_eq!(json!(answer.token_ids()), prompt["continuation_ids"]);
    }
    up.stop(&[])?;
    Ok(())
}

/// Runs a verb that must find the cluster by itself.
fn newest(up: &Up, args: &[&str], stdin: Option<&str>) -> Result<shoal_tests::proc::Finished> {
    let mut command = Command::new(shoal());
    command.args(args).env("XDG_RUNTIME_DIR", up.runtime_dir()).env_remove("SHOAL_CONTEXT");
    command.stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut process = Process::spawn_with(command)?;
    if let (Some(text), Some(mut pipe)) = (stdin, process.take_stdin()) {
        pipe.write_all(text.as_bytes())?;
    }
    process.finish(Duration::from_secs(30))
}

#[test]
fn operators_see_and_change_the_cluster() -> Result<()> {
    let up = Up::start(&UpOptions::flags("--workers 2"))?;

    let status = newest(&up, &["status"], None)?.expect_code(0).stdout;
    for words in ["coordinator c1", "w1", "w2", "demo", "ready", "2x1"] {
        assert!(status.contains(words), "{words:?} is not in {status}");
    }
    let plan = up.verb(&["plan", "demo", "--explain"])?.expect_code(0).stdout;
    assert!(plan.contains("WEIGHTS") && plan.contains("0..6"), "{plan}");

    let asked = newest(&up, &["chat", "--ask", "What is 20 plus 22?"], None)?.expect_code(0);
    assert_eq!(asked.stdout, "20 plus 22 is 42.\n");
    let lines = "What is 1 plus 2?\n\nWhat is 30 minus 4?\n";
    let asked = newest(&up, &["chat", "demo"], Some(lines))?.expect_code(0);
    assert_eq!(asked.stdout, "1 plus 2 is 3.\n30 minus 4 is 26.\n");

    let refused = up.verb(&["undeploy", "dmeo"])?.expect_code(3);
    assert!(refused.stderr.contains("did you mean `demo`?"), "{}", refused.stderr);
    let refused = up.verb(&["deploy", "--name", "demo"])?.expect_code(3);
    assert!(refused.stderr.contains("demo"), "{}", refused.stderr);

    up.verb(&["deploy", "--name", "second", "--stages", "1"])?.expect_code(0);
    let both = up.api().get("/v1/models")?.ok()?;
    let ids: Vec<&str> = both.body["data"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|m| m["id"].as_str())
        .collect();
    assert_eq!(ids, ["demo", "second"]);
    let which = up.verb(&["chat", "--ask", "?"])?.expect_code(2);
    assert!(which.stderr.contains("demo, second"), "{}", which.stderr);
    up.verb(&["undeploy", "second"])?.expect_code(0);
    let gone = Api::new(up.url(), "second").chat("What is 1 plus 1?", json!({}))?;
    assert_eq!(gone.status, 404, "{}", gone.body);
    up.stop(&[])?;
    Ok(())
}

#[test]
fn a_worker_joins_with_a_token_and_no_other_way() -> Result<()> {
    let up = Up::start(&UpOptions::flags("--workers 1"))?;
    let admin = up.admin()?;
    let token = up.verb(&["token", "create", "--role", "worker"])?.expect_code(0).stdout;
    let view = admin.wait_until("there", Duration::from_secs(5), |_| true)?;
    let join = view.coordinator.cluster.to_string();
    let folder = tempfile::tempdir()?;
    let worker = |data: &Path, token: &str| {
        let args = ["worker", "--join", &join, "--token", token, "--data"].map(str::to_owned);
        Process::shoal(args.into_iter().chain([data.to_string_lossy().into_owned()]))
    };
    let joined = worker(&folder.path().join("a"), token.trim())?;
    admin.wait_until("joined", Duration::from_secs(10), |view| {
        view.workers.iter().any(|w| w.id.to_string() == "w2" && w.connected)
    })?;

    // The token was good for one.
    let refused = worker(&folder.path().join("b"), token.trim())?;
    let refused = refused.finish(Duration::from_secs(15))?.expect_code(3);
    assert!(refused.stderr.contains("token"), "{}", refused.stderr);
    // A token of another cluster's CA.
    let mut other = token.trim().to_owned();
    let digit = other.find("worker.").context("a role")? + "worker.".len();
    let flipped = if other.as_bytes()[digit] == b'0' { "1" } else { "0" };
    other.replace_range(digit..=digit, flipped);
    let refused = worker(&folder.path().join("c"), &other)?.finish(Duration::from_secs(15))?;
    assert_ne!(refused.code(), Some(0), "{}", refused.stderr);

    // Without one no other start would do better, and a supervisor is told so.
    let empty = folder.path().join("d").to_string_lossy().into_owned();
    let refused = Process::shoal(["worker", "--join", &join, "--data", &empty])?;
    let refused = refused.finish(Duration::from_secs(15))?.expect_code(3);
    assert!(refused.stderr.contains("no token is given"), "{}", refused.stderr);

    // The identity outlives the process; no token is needed any more.
    joined.signal(shoal_tests::proc::Signal::TERM)?;
    joined.finish(Duration::from_secs(10))?.expect_code(0);
    admin.wait_until("gone", Duration::from_secs(10), |view| {
        view.workers.iter().any(|w| w.id.to_string() == "w2" && !w.connected)
    })?;
    let data = folder.path().join("a").to_string_lossy().into_owned();
    let again = || Process::shoal(["worker", "--join", &join, "--data", &data]);
    let back = again()?;
    admin.wait_until("back", Duration::from_secs(10), |view| {
        view.workers.len() == 2
            && view.workers.iter().any(|w| w.id.to_string() == "w2" && w.connected)
    })?;
    admin.wait_for_phase("demo", DeploymentPhase::Ready, Duration::from_secs(5))?;

    // Removed, it ends and says why, and so does its next start: a supervisor does not try it again.
    up.verb(&["nodes", "remove", "w2", "--force"])?.expect_code(0);
    let removed = back.finish(Duration::from_secs(15))?.expect_code(3);
    let is_told = |stderr: &str| {
        let last = stderr.lines().last().unwrap_or_default();
        last.starts_with("shoal: w2 was removed from this cluster") && last.contains("empty")
    };
    assert!(is_told(&removed.stderr), "{}", removed.stderr);
    let removed = again()?.finish(Duration::from_secs(15))?.expect_code(3);
    assert!(is_told(&removed.stderr), "{}", removed.stderr);
    // Also where its certificate is of a CA that nobody believes any more.
    up.verb(&["ca", "rotate", "--wait"])?.expect_code(0);
    let removed = again()?.finish(Duration::from_secs(15))?.expect_code(3);
    assert!(is_told(&removed.stderr), "{}", removed.stderr);
    // And a token of another cluster is not passed over in silence.
    let refused = worker(Path::new(&data), &other)?.finish(Duration::from_secs(15))?.expect_code(3);
    assert!(refused.stderr.contains("this data folder is w2's"), "{}", refused.stderr);
    assert!(is_told(&refused.stderr), "{}", refused.stderr);
    Ok(())
}
