//! LoRA adapters at real processes: loaded while their base model serves, chosen by name, many in one
//! batch, kept over the death of a worker, let go, refused.

use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use shoal_protocol::admin::DeploymentPhase;
use shoal_tests::api::{Answer, Api, Event};
use shoal_tests::proc::{Signal, Up, UpOptions, signal};
use shoal_tests::slow::holder;

use super::{READY, ids};

/// What `peft` and `transformers` said.
#[derive(Clone, Deserialize)]
struct Case {
    prompts: Vec<Prompt>,
}

#[derive(Clone, Deserialize)]
struct Prompt {
    prompt_ids: Vec<u32>,
    continuation_ids: Vec<u64>,
}

fn fixture(path: &str) -> Result<PathBuf> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    Ok(fixtures.join(path).canonicalize()?)
}

fn prompts(file: &str) -> Result<Vec<Prompt>> {
    Ok(serde_json::from_slice::<Case>(&std::fs::read(fixture(file)?)?)?.prompts)
}

/// The base model of two of the adapters, with a tokenizer that has as many words.
fn base_model(folder: &Path) -> Result<PathBuf> {
    let model = folder.join("base");
    std::fs::create_dir(&model)?;
    for (of, files) in [
        ("models/llama2-gqa3-bf16", ["config.json", "model.safetensors"].as_slice()),
        ("models/llama31-rope8-bf16", ["tokenizer.json", "tokenizer_config.json"].as_slice()),
    ] {
        for file in files {
            std::fs::copy(fixture(of)?.join(file), model.join(file))?;
        }
    }
    Ok(model)
}

fn load(up: &Up, name: &str, deployment: &str, fixture_of: &str) -> Result<()> {
    let path = fixture(&format!("adapters/{fixture_of}"))?;
    let path = path.to_str().context("a path in UTF-8")?;
    let done = up.verb(&["adapters", "load", name, "--deployment", deployment, path])?;
    ensure!(done.code() == Some(0) && done.stderr.contains("is served beside"), "{done:?}");
    Ok(())
}

fn list(up: &Up) -> Result<Vec<Value>> {
    let listed = up.verb(&["adapters", "list", "--json"])?;
    let listed: Value =
        serde_json::from_str(&listed.stdout).with_context(|| format!("{listed:?}"))?;
    Ok(listed["adapters"].as_array().context("a list")?.clone())
}

fn complete(url: &str, model: &str, prompt: &[u32], max_tokens: usize) -> Result<Answer> {
    let more = json!({"max_tokens": max_tokens, "ignore_eos": true, "return_token_ids": true});
    Api::new(url, model).complete(prompt, more)
}

/// Asks for all prompts of all models at once; each has the tokens of the reference.
fn expect_all(up: &Up, models: &[(&str, &str)]) -> Result<()> {
    let mut asked = Vec::new();
    for (model, file) in models {
        for prompt in prompts(file)? {
            asked.push((*model, prompt));
        }
    }
    let url = up.url();
    thread::scope(|scope| {
        let begin = |(model, prompt)| scope.spawn(move || expect_tokens(url, model, &prompt));
        let asked: Vec<_> = asked.into_iter().map(begin).collect();
        let each = asked.into_iter().map(|one| one.join().map_err(|_| anyhow!("it panicked"))?);
        each.collect()
    })
}

fn expect_tokens(url: &str, model: &str, prompt: &Prompt) -> Result<()> {
    let expected = &prompt.continuation_ids;
    let found = complete(url, model, &prompt.prompt_ids, expected.len())?.ok()?.token_ids();
    ensure!(found == *expected, "{model}: {found:?} instead of {expected:?}");
    Ok(())
}

const BASE: &str = "cases/llama2-gqa3-bf16.json";
const ATTENTION: &str = "adapters/llama-attention/case.json";
const EVERYTHING: &str = "adapters/llama-everything/case.json";

#[test]
fn adapters_are_served_by_name_beside_their_base_over_stages_and_ranks() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = base_model(folder.path())?;
    let up = Up::start(&UpOptions::flags("--workers 2 --stages 2").model(&model))?;
    let path = model.to_str().context("a path in UTF-8")?;
    up.verb(&["deploy", path, "--name", "ranks", "--mesh", "1x2"])?.expect_code(0);
    up.admin()?.wait_for_phase("ranks", DeploymentPhase::Ready, READY)?;
    for (deployment, names) in [("base", ["a", "b"]), ("ranks", ["ra", "rb"])] {
        load(&up, names[0], deployment, "llama-attention")?;
        load(&up, names[1], deployment, "llama-everything")?;
    }
    for names in [["base", "a", "b"], ["ranks", "ra", "rb"]] {
        expect_all(&up, &[(names[0], BASE), (names[1], ATTENTION), (names[2], EVERYTHING)])?;
    }
    let models = up.api().get("/v1/models")?.ok()?.body;
    let parent_of = |name: &str| {
        let all = models["data"].as_array().into_iter().flatten();
        all.filter(|model| model["id"] == name).map(|model| model["parent"].clone()).next()
    };
    ensure!(
        parent_of("base") == Some(Value::Null) && parent_of("rb") == Some("ranks".into()),
        "{models}"
    );
    refusals(&up)?;
    let said = up.verb(&["chat", "rb", "--ask", "What is 47 plus 38?", "--max-tokens", "4"])?;
    ensure!(said.code() == Some(0) && !said.stdout.trim().is_empty(), "{said:?}");
    let unknown = up.verb(&["chat", "rc", "--ask", "?"])?;
    ensure!(unknown.stderr.contains("no deployment or adapter `rc`"), "{unknown:?}");

    // It goes, and the others stay.
    up.verb(&["adapters", "unload", "a"])?.expect_code(0);
    let prompt = &prompts(ATTENTION)?[0].prompt_ids;
    let gone = complete(up.url(), "a", prompt, 4)?;
    ensure!(gone.status == 404 && gone.error().contains("there is no model `a`"), "{gone:?}");
    expect_all(&up, &[("base", BASE), ("b", EVERYTHING), ("ra", ATTENTION)])?;
    // Under the same name another one: the number is another too.
    load(&up, "a", "base", "llama-everything")?;
    expect_all(&up, &[("a", EVERYTHING), ("b", EVERYTHING), ("base", BASE)])?;
    // A deployment takes its adapters along.
    up.verb(&["undeploy", "ranks"])?.expect_code(0);
    let left = list(&up)?;
    ensure!(left.len() == 2 && left.iter().all(|one| one["deployment"] == "base"), "{left:?}");
    up.stop(&[])?;
    Ok(())
}

/// What cannot be loaded leaves nothing behind.
fn refusals(up: &Up) -> Result<()> {
    let before = list(up)?;
    for (name, deployment, of, words) in [
        ("c", "base", "adapters/qwen2-everything", "is this an adapter for another base model?"),
        ("c", "base", "models/llama2-gqa3-bf16", "no adapter: expected adapter_config.json"),
        ("a", "base", "adapters/llama-attention", "`a` is an adapter's name already"),
        ("ranks", "base", "adapters/llama-attention", "`ranks` is the name of a deployment"),
        ("c", "basis", "adapters/llama-attention", "did you mean `base`?"),
    ] {
        let path = fixture(of)?;
        let path = path.to_str().context("a path in UTF-8")?;
        let refused = up.verb(&["adapters", "load", name, "--deployment", deployment, path])?;
        ensure!(
            refused.code() == Some(3) && refused.stderr.contains(words),
            "{words}: {refused:?}"
        );
    }
    let refused = up.verb(&["adapters", "unload", "c"])?;
    ensure!(
        refused.code() == Some(3) && refused.stderr.contains("no adapter named `c`"),
        "{refused:?}"
    );
    ensure!(list(up)? == before, "something was left behind");
    // Nobody said that clients may.
    let body = json!({"lora_name": "c", "lora_path": fixture("adapters/llama-attention")?});
    let shut = up.api().ask("/v1/load_lora_adapter", &body)?;
    ensure!(shut.status == 403 && shut.error().contains("--allow-runtime-adapters"), "{shut:?}");
    Ok(())
}

#[test]
fn an_answer_with_an_adapter_outlives_a_death_and_clients_may_load_where_they_are_let() -> Result<()>
{
    let folder = tempfile::tempdir()?;
    let model = base_model(folder.path())?;
    let flags = "--workers 3 --stages 2 --allow-runtime-adapters";
    let up = Up::start(&UpOptions::flags(flags).model(&model))?;
    // In vLLM's words.
    let attention = fixture("adapters/llama-attention")?;
    let body = json!({"lora_name": "sql", "lora_path": attention});
    let loaded = up.api().ask("/v1/load_lora_adapter", &body)?.ok()?;
    ensure!(loaded.body == "Success: LoRA adapter 'sql' added successfully.", "{loaded:?}");
    let other = json!({"lora_name": "other", "lora_path": fixture("adapters/qwen2-everything")?});
    let refused = up.api().ask("/v1/load_lora_adapter", &other)?;
    ensure!(refused.status == 400 && refused.error().contains("another base model"), "{refused:?}");

    let Prompt { prompt_ids, continuation_ids } = prompts(ATTENTION)?.remove(0);
    let tokens = 400;
    let expected = complete(up.url(), "sql", &prompt_ids, tokens)?.ok()?.token_ids();
    ensure!(expected[..continuation_ids.len()] == continuation_ids, "{expected:?}");
    let view = up.admin()?.wait_for_phase("base", DeploymentPhase::Ready, READY)?;
    let more = json!({"max_tokens": tokens, "ignore_eos": true, "return_token_ids": true});
    let mut stream = Api::new(up.url(), "sql").stream(prompt_ids, more)?;
    let mut chunks = Vec::new();
    for _ in 0..10 {
        let Event::Chunk(chunk) = stream.event()? else { anyhow::bail!("it ended early") };
        chunks.push(chunk);
    }
    // Whoever takes its place reads the adapter first.
    signal(holder(&view, "base", 1)?, Signal::KILL)?;
    let (rest, end) = stream.rest()?;
    ensure!(end == Event::Done, "{end:?}");
    chunks.extend(rest);
    ensure!(ids(&chunks) == expected, "other tokens after the death");

    let gone = json!({"lora_name": "sql"});
    up.api().ask("/v1/unload_lora_adapter", &gone)?.ok()?;
    let again = up.api().ask("/v1/unload_lora_adapter", &gone)?;
    ensure!(again.status == 404 && again.error().contains("no adapter named `sql`"), "{again:?}");
    up.stop(&[])?;
    Ok(())
}
