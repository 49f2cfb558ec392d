//! Stages of different numbers of ranks: of two layers one is so large that only one worker has room for it, and the
//! other one so small that two others hold a half of it each, and no third of all.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_protocol::admin::{ClusterView, DeploymentPhase};
use shoal_protocol::plan::ReplicaPlan;
use shoal_tests::api::Api;
use shoal_tests::model::write_random;
use shoal_tests::proc::{Process, Signal, Up, UpOptions};

use super::READY;

/// Two layers, of which the one with a dense MLP takes 27 MiB and the one with experts 14.
fn config(dense: u32) -> Value {
    json!({
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "vocab_size": 389,
        "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 8704, "num_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 320, "norm_topk_prob": true,
        "mlp_only_layers": [dense], "decoder_sparse_step": 1, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1,
    })
}

/// Tokens and log-probabilities, greedy and drawn.
fn ask(url: &str, model: &str) -> Result<Vec<Value>> {
    let mut said = Vec::new();
    for temperature in [0.0, 1.0] {
        let more = json!({
            "temperature": temperature, "seed": 3, "max_tokens": 24, "logprobs": 3,
            "ignore_eos": true, "return_token_ids": true,
        });
        let prompt: Vec<u32> = (0..70).map(|i| 5 + i * 37 % 380).collect();
        let answer = Api::new(url, model).complete(prompt, more)?.ok()?;
        ensure!(answer.token_ids().len() == 24, "{answer:?}");
        said.push(answer.body["choices"].clone());
    }
    Ok(said)
}

/// The numbers of ranks, by stage, of what is served.
fn ranks(view: &ClusterView, name: &str) -> Vec<usize> {
    let replica = view.plan.replicas.iter().find(|r| r.deployment.as_str() == name);
    let stages = replica.map(|replica| replica.stages.as_slice()).unwrap_or_default();
    stages.iter().map(|stage| stage.shards.len()).collect()
}

#[test]
fn stages_of_one_and_of_two_ranks_say_what_one_worker_says_in_either_order() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let whole = Up::start(&UpOptions::flags("--workers 1"))?;
    let mut expected = Vec::new();
    let mut models = Vec::new();
    for dense in [0, 1] {
        let model = folder.path().join(format!("dense-{dense}"));
        write_random(&model, &config(dense))?;
        let name = format!("whole-{dense}");
        let path = model.to_str().context("a path in UTF-8")?.to_owned();
        whole.verb(&["deploy", &path, "--name", &name])?.expect_code(0);
        expected.push(ask(whole.url(), &name)?);
        models.push(path);
    }
    ensure!(expected[0] != expected[1], "two models say the same");
    whole.stop(&[])?;

    let up = Up::start(&UpOptions::flags("--workers 1 --worker-memory 38MiB"))?;
    let small = ["w2", "w3"].map(|name| join(&up, &folder.path().join(name)));
    let small = small.into_iter().collect::<Result<Vec<_>>>()?;
    let admin = up.admin()?;
    admin.wait_until("joined", READY, |view| view.workers.iter().all(|w| w.connected))?;
    up.verb(&["undeploy", "demo"])?.expect_code(0);
    for (dense, stages) in [(0, [1, 2]), (1, [2, 1])] {
        for (reduction, contract) in [("exact", "n1"), ("sum", "n1-sum")] {
            let name = format!("{reduction}-{dense}");
            let how = ["--mesh", "auto", "--reduction", reduction];
            let words = [&["deploy", models[dense].as_str(), "--name", &name][..], &how].concat();
            let done = up.verb(&words)?;
            ensure!(done.code() == Some(0), "{done:?}");
            let view = admin.wait_for_phase(&name, DeploymentPhase::Ready, READY)?;
            let under = |plan: &ReplicaPlan| plan.numerics.to_string() == contract;
            ensure!(view.plan.replicas.iter().all(under), "{:?}", view.plan.replicas);
            ensure!(
                ranks(&view, &name) == stages,
                "{:?} instead of {stages:?}",
                ranks(&view, &name)
            );
            let found = ask(up.url(), &name)?;
            match reduction {
                // The very bits, log-probabilities too.
                "exact" => {
                    ensure!(found == expected[dense], "{found:?}, not {:?}", expected[dense])
                }
                _ => ensure!(
                    found[0][0]["token_ids"] == expected[dense][0][0]["token_ids"],
                    "{found:?}, not {:?}",
                    expected[dense]
                ),
            }
            up.verb(&["undeploy", &name])?.expect_code(0);
        }
    }
    for worker in small {
        worker.signal(Signal::TERM)?;
        worker.finish(READY)?.expect_code(0);
    }
    up.stop(&[])?;
    Ok(())
}

/// A worker with room for half a layer.
fn join(up: &Up, data: &Path) -> Result<Process> {
    let token = up.verb(&["token", "create", "--role", "worker"])?.expect_code(0).stdout;
    let view = up.admin()?.wait_until("there", READY, |_| true)?;
    let join = view.coordinator.cluster.to_string();
    let data = data.to_str().context("a path in UTF-8")?;
    let args = ["worker", "--join", &join, "--token", token.trim(), "--data", data];
    let mut process = Process::shoal(args.into_iter().chain(["--memory", "12MiB", "--announce"]))?;
    process.line(READY)?;
    Ok(process)
}
