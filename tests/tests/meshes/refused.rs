//! What cannot be served is refused with words that help, and nothing of it is left: no deployment, no shard, no
//! memory. What is good is served behind it, from the same place and under the same name.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_protocol::admin::{ClusterView, DeploymentPhase};
use shoal_protocol::control::ShardReport;
use shoal_protocol::model::Checkpoint;
use shoal_tests::api::Api;
use shoal_tests::hub::{Fault, Hub};
use shoal_tests::model::{RandomLlama, write_random};
use shoal_tests::proc::{Finished, Up, UpOptions};

use super::READY;

/// What every refused deployment of these tests is called, and then a good one.
const NAME: &str = "taken-back";

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// A copy of a reference model, with a tokenizer of another one: no request here is a text.
fn model(name: &str, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture("models").join(name).join(file), to.join(file))?;
    }
    let tokenizer = fixture("models/llama31-rope8-bf16/tokenizer.json");
    std::fs::copy(tokenizer, to.join("tokenizer.json"))?;
    Ok(())
}

/// The same with another config.json.
fn configured(name: &str, to: &Path, change: impl Fn(&mut Value)) -> Result<()> {
    model(name, to)?;
    let mut config = serde_json::from_slice(&std::fs::read(to.join("config.json"))?)?;
    change(&mut config);
    Ok(std::fs::write(to.join("config.json"), serde_json::to_vec(&config)?)?)
}

/// A GGUF file, its bytes changed.
fn gguf(name: &str, to: &Path, change: impl Fn(&mut Vec<u8>)) -> Result<()> {
    let mut bytes = std::fs::read(fixture("gguf").join(format!("{name}.gguf")))?;
    change(&mut bytes);
    Ok(std::fs::write(to, bytes)?)
}

/// Says that a tensor of a GGUF file is of this type: it stands behind the name, a number of dimensions, and these.
fn of_type(bytes: &mut [u8], tensor: &str, number: u32) {
    let name = tensor.as_bytes();
    let at = bytes.windows(name.len()).position(|bytes| bytes == name).expect("the tensor");
    let dims = at + name.len();
    let count = u32::from_le_bytes(bytes[dims..dims + 4].try_into().expect("four bytes"));
    let at = dims + 4 + 8 * count as usize;
    bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
}

fn deploy(up: &Up, model: &Path, flags: &str) -> Result<Finished> {
    let model = model.to_str().context("a path in UTF-8")?;
    let flags = flags.split_whitespace();
    let args: Vec<&str> = ["deploy", model, "--name", NAME].into_iter().chain(flags).collect();
    up.verb(&args)
}

/// Whether there is nothing but these deployments, and no shard that is not theirs.
fn has_only(view: &ClusterView, names: &[&str]) -> bool {
    let planned = |shard: &ShardReport| {
        let mut replicas = view.plan.replicas.iter();
        replicas.any(|r| r.id == shard.replica && names.contains(&r.deployment.as_str()))
    };
    view.deployments.iter().all(|one| names.contains(&one.name.as_str()))
        && view.plan.replicas.iter().all(|one| names.contains(&one.deployment.as_str()))
        && view.workers.iter().flat_map(|worker| &worker.shards).all(planned)
}

/// It is refused with all of these words, and nothing is left.
fn refused(up: &Up, done: &Finished, words: &[&str]) -> Result<()> {
    let said = &done.stderr;
    ensure!(done.code() == Some(3), "{done:?}");
    for word in words {
        ensure!(said.contains(word), "`{word}` is not in: {said}");
    }
    up.admin()?.wait_until("nothing left", READY, |view| has_only(view, &["demo"]))?;
    Ok(())
}

/// It is served and says what the reference does; then it goes.
fn served(up: &Up, model: &Path, flags: &str, case: &str) -> Result<()> {
    deploy(up, model, flags)?.expect_code(0);
    up.admin()?.wait_for_phase(NAME, DeploymentPhase::Ready, READY)?;
    let case = fixture("cases").join(format!("{case}.json"));
    let case: Value = serde_json::from_slice(&std::fs::read(case)?)?;
    let prompt = &case["prompts"][0];
    let more = json!({"max_tokens": 40, "ignore_eos": true, "return_token_ids": true});
    let answer = Api::new(up.url(), NAME).complete(prompt["prompt_ids"].clone(), more)?.ok()?;
    ensure!(json!(answer.token_ids()) == prompt["continuation_ids"], "{:?}", answer.body);
    up.verb(&["undeploy", NAME])?.expect_code(0);
    up.admin()?.wait_until("gone", READY, |view| has_only(view, &["demo"]))?;
    Ok(())
}

#[test]
fn what_cannot_be_served_is_refused_and_leaves_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let up = Up::start(&UpOptions::flags("--workers 2"))?;

    let (file, llama) = (at("fish.gguf"), "llama31-rope8-bf16");
    let up_of_1 = "blk.1.ffn_up.weight";
    let cut = |len: usize| move |bytes: &mut Vec<u8>| bytes.truncate(len);
    for len in [300, 99_000] {
        gguf(llama, &file, cut(len))?;
        let words = ["fish.gguf", "truncated", "copy or download it again"];
        refused(&up, &deploy(&up, &file, "")?, &words)?;
    }
    for (number, name) in [(10, "Q2_K"), (99, "type 99")] {
        gguf(llama, &file, |bytes| of_type(bytes, up_of_1, number))?;
        let words = [up_of_1, name, "docs/FORMATS.md", "take the model in one of these"];
        refused(&up, &deploy(&up, &file, "")?, &words)?;
    }
    gguf(llama, &file, |_| ())?;
    served(&up, &file, "--stages 2", llama)?;

    for (quantization, words) in [
        (json!({"quant_method": "bitsandbytes", "load_in_4bit": true}), "with `bitsandbytes`"),
        (json!({"quant_method": "gptq", "bits": 3, "group_size": 128}), "`gptq` with bits 3"),
    ] {
        let quantised = |config: &mut Value| config["quantization_config"] = quantization.clone();
        configured(llama, &at("quantised"), quantised)?;
        let words = ["quantization_config", words, "supported: `fp8`", "with 4 bits"];
        refused(&up, &deploy(&up, &at("quantised"), "")?, &words)?;
    }

    let router = "`model.layers.0.block_sparse_moe.gate.weight` has shape [4, 40]";
    for (key, number, words) in [
        ("num_local_experts", 5, [router, "should be [5, 40]; copy or download all"]),
        ("num_local_experts", 3, [router, "should be [3, 40]; copy or download all"]),
        ("num_local_experts", 0, ["`num_local_experts` is 0", "from 1 to 2048"]),
        ("num_experts_per_tok", 9, ["`num_experts_per_tok` is 9", "at most `num_local_experts`"]),
    ] {
        configured("mixtral-bf16", &at("experts"), |config| config[key] = json!(number))?;
        refused(&up, &deploy(&up, &at("experts"), "")?, &words)?;
    }
    configured("mixtral-bf16", &at("experts"), |_| ())?;
    for (mesh, words) in [
        ("1x3", ["2 KV heads on 3 ranks", "possible: 1 or 2 ranks"]),
        ("4x1", ["4 stages", "the model has 3 layers; a stage has one at least: give 3 or fewer"]),
        ("3x1", ["3 stages were asked for, but 2 workers", "start 1 more, or give --stages 2"]),
        ("2x2", ["4 shards, and 2 workers", "start more, or give --mesh 2x1 or 1x2"]),
    ] {
        let done = deploy(&up, &at("experts"), &format!("--mesh {mesh}"))?;
        refused(&up, &done, &words)?;
    }
    write_random(&at("few"), &few_experts())?;
    let done = deploy(&up, &at("few"), "--mesh 1x4")?;
    refused(&up, &done, &["3 experts on 4 ranks", "possible: 1 to 3 ranks"])?;
    served(&up, &at("experts"), "--mesh 1x2 --reduction exact", "mixtral-bf16")?;

    // Found by who reads it, when the other one has loaded its part.
    let scales = damage_scale(&at("scales"))?;
    for flags in ["--mesh 2x1", "--mesh 1x2", "--replicas 2 --stages 1"] {
        refused(&up, &deploy(&up, &at("scales"), flags)?, &[&scales])?;
    }
    model("gpt-oss-mxfp4", &at("scales"))?;
    served(&up, &at("scales"), "--mesh 2x1", "gpt-oss-mxfp4")?;

    let answer = up.api().chat("What is 47 plus 38?", json!({}))?.ok()?;
    ensure!(answer.text() == "47 plus 38 is 85.", "{answer:?}");
    up.stop(&[])?;
    Ok(())
}

/// More key/value heads than experts.
fn few_experts() -> Value {
    json!({
        "architectures": ["MixtralForCausalLM"], "vocab_size": 389, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 64, "num_local_experts": 3, "num_experts_per_tok": 2,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
    })
}

/// A model with a scale in its last layer that stands for no number; the name of the tensor.
fn damage_scale(folder: &Path) -> Result<String> {
    model("gpt-oss-mxfp4", folder)?;
    let name = "model.layers.1.mlp.experts.down_proj";
    let checkpoint = Checkpoint::open(folder)?;
    let scales = checkpoint.locate(name).and_then(|location| location.scales.as_deref());
    let at = scales.context("it has scales")?.parts()[0].offset;
    let file = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&file)?;
    bytes[at as usize] = 255;
    std::fs::write(&file, bytes)?;
    Ok(name.to_owned())
}

#[test]
fn weights_whose_hash_is_wrong_are_refused_and_leave_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("wide");
    // 25.5 MiB, of which no worker has room for two.
    RandomLlama { layers: 9, hidden: 256, intermediate: 704 }.write(&model)?;
    let (hub, home) = (Hub::serve(&model, "shoal/wide", None)?, tempfile::tempdir()?);
    let options = UpOptions::flags("--workers 2 --worker-memory 40MiB");
    let options = options.env("HF_ENDPOINT", hub.url()).env("HF_HOME", home.path());
    let up = Up::start(&options)?;
    up.verb(&["undeploy", "demo"])?.expect_code(0);
    let wide = Path::new("shoal/wide");
    // A mesh that cannot be: config and headers are known behind it, and only weights are still to be fetched.
    refused(
        &up,
        &deploy(&up, wide, "--mesh 1x64")?,
        &["1 KV head on 64 ranks", "possible: 1 rank"],
    )?;
    hub.fail("model.safetensors", &vec![Fault::Lie; 1000]);
    let done = deploy(&up, wide, "--stages 1")?;
    refused(&up, &done, &["SHA-256", "model.safetensors", "taken back"])?;
    ensure!(hub.left("model.safetensors") < 1000, "nobody was lied to");
    hub.fail("model.safetensors", &[]);
    deploy(&up, wide, "--stages 1")?.expect_code(0);
    let more = json!({"max_tokens": 8, "ignore_eos": true, "return_token_ids": true});
    let answer = Api::new(up.url(), NAME).complete("abc", more)?.ok()?;
    ensure!(answer.token_ids().len() == 8, "{:?}", answer.body);
    up.stop(&["its files are not here", "SHA-256"])?;
    Ok(())
}
