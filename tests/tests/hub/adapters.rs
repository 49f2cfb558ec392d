//! LoRA adapters of the hub: pinned to a commit, fetched by every node that needs them.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_protocol::blob::ModelCache;
use shoal_protocol::plan::ModelSource;
use shoal_tests::api::Api;
use shoal_tests::hub::{COMMIT, Hub};
use shoal_tests::proc::{Up, UpOptions};

use super::{settings, up};

const ADAPTER: &str = "shoal/support";
const MATRICES: &str = "adapter_model.safetensors";

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// The base model of the adapter, with a tokenizer that has as many words.
fn base_model(folder: &Path) -> Result<PathBuf> {
    let model = folder.join("base");
    std::fs::create_dir(&model)?;
    for (of, file) in [
        ("models/llama2-gqa3-bf16", "config.json"),
        ("models/llama2-gqa3-bf16", "model.safetensors"),
        ("models/llama31-rope8-bf16", "tokenizer.json"),
        ("models/llama31-rope8-bf16", "tokenizer_config.json"),
    ] {
        std::fs::copy(fixture(of).join(file), model.join(file))?;
    }
    Ok(model)
}

/// The prompts of a reference, and what it went on with.
fn prompts(case: &str) -> Result<Vec<(Vec<u32>, Vec<u64>)>> {
    let case: Value = serde_json::from_slice(&std::fs::read(fixture(case))?)?;
    let prompts = case["prompts"].as_array().context("prompts")?;
    let ids = |prompt: &Value, name: &str| -> Result<Vec<u64>> {
        Ok(serde_json::from_value(prompt[name].clone())?)
    };
    let prompt = |prompt: &Value| {
        let asked = ids(prompt, "prompt_ids")?.into_iter().map(|id| id as u32).collect();
        Ok((asked, ids(prompt, "continuation_ids")?))
    };
    prompts.iter().map(prompt).collect()
}

fn expect(up: &Up, model: &str, case: &str) -> Result<()> {
    for (prompt, expected) in prompts(case)? {
        let more = json!({"max_tokens": expected.len(), "ignore_eos": true,
            "return_token_ids": true});
        let found = Api::new(up.url(), model).complete(prompt, more)?.ok()?.token_ids();
        ensure!(found == expected, "{model}: {found:?} instead of {expected:?}");
    }
    Ok(())
}

/// An adapter's repository, as PEFT writes one.
fn repository(folder: &Path) -> Result<PathBuf> {
    let adapter = folder.join("adapter");
    std::fs::create_dir(&adapter)?;
    for file in ["adapter_config.json", MATRICES] {
        std::fs::copy(fixture("adapters/llama-attention").join(file), adapter.join(file))?;
    }
    std::fs::write(adapter.join("README.md"), "an adapter")?;
    Ok(adapter)
}

#[test]
fn gguf_files_beside_an_adapter_are_not_taken_for_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let adapter = repository(folder.path())?;
    // One of them could be chosen, of the second and the third none.
    for (at, beside) in ["one.gguf", "two-Q9_9.gguf", "three-Q9_8.gguf"].into_iter().enumerate() {
        std::fs::copy(fixture("gguf/qwen3-tied-bf16.gguf"), adapter.join(beside))?;
        let hub = Hub::serve(&adapter, ADAPTER, None)?;
        let data = tempfile::tempdir()?;
        let cache = ModelCache::new(data.path(), settings(&hub));
        let pinned = cache.pin_adapter(&ADAPTER.parse()?, "main")?;
        let (repo, revision) = (ADAPTER.to_owned(), COMMIT.to_owned());
        ensure!(pinned == ModelSource::Hub { repo, revision }, "{at}: {pinned}");
        let here = cache.adapter(&pinned, &AtomicBool::new(false), |wanted, filling| {
            cache.fill(&pinned, wanted, filling)
        })?;
        for file in ["adapter_config.json", MATRICES] {
            ensure!(
                std::fs::read(here.join(file))? == std::fs::read(adapter.join(file))?,
                "{file}"
            );
        }
        let counts = hub.counts();
        ensure!(!counts.bytes.keys().any(|name| name.ends_with(".gguf")), "{counts:?}");
    }
    Ok(())
}

#[test]
fn an_adapter_of_the_hub_is_pinned_and_fetched_by_every_node_that_needs_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = base_model(folder.path())?;
    let adapter = repository(folder.path())?;
    let hub = Hub::serve(&adapter, ADAPTER, Some("hf_secret"))?;
    let mut options: UpOptions = up(&hub, folder.path()).model(model);
    options.flags.extend(["--stages".into(), "2".into()]);
    let cluster = Up::start(&options)?;
    let load = |name: &str, of: &str| {
        cluster.verb(&["adapters", "load", name, "--deployment", "base", of])
    };
    let done = load("support", ADAPTER)?.expect_code(0);
    ensure!(done.stderr.contains("is served beside base"), "{}", done.stderr);
    expect(&cluster, "support", "adapters/llama-attention/case.json")?;
    expect(&cluster, "base", "cases/llama2-gqa3-bf16.json")?;

    let listed = cluster.verb(&["adapters", "list", "--json"])?.expect_code(0).stdout;
    ensure!(listed.contains(&format!("{ADAPTER}@{COMMIT}")), "{listed}");
    // The coordinator and two workers; a worker may have it from the other.
    let counts = hub.counts();
    let (sent, len) = (counts.bytes[MATRICES], hub.weights());
    println!("the hub sent {sent} bytes of matrices of {len}, to three nodes");
    ensure!((len..=2 * 3 * len).contains(&sent), "{sent} bytes of {len}");
    ensure!(counts.bytes.keys().all(|name| name.starts_with("adapter_")), "{counts:?}");
    // By its commit it is the same one; nothing of it is asked for again.
    let pinned = load("again", &format!("{ADAPTER}@{COMMIT}"))?.expect_code(0);
    ensure!(pinned.stderr.contains("is served beside base"), "{}", pinned.stderr);
    ensure!(hub.counts().bytes == counts.bytes, "it was fetched again");
    expect(&cluster, "again", "adapters/llama-attention/case.json")?;

    for (of, words) in [
        ("shoal/none", "shoal/none@main"),
        ("shoal/support@v9", "shoal/support@v9"),
        ("nothing", "org/name@revision of the hub"),
    ] {
        let refused = load("none", of)?;
        ensure!(refused.code() != Some(0), "{of} was loaded");
        ensure!(refused.stderr.contains(words), "`{words}` is not in `{}`", refused.stderr);
    }
    cluster.stop(&[])?;
    Ok(())
}
