//! Ranks as on machines of their own: a real model over QUIC, in messages that are cut in pieces, and answers that go
//! on while it moves from mesh to mesh.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use shoal_protocol::admin::ClusterView;
use shoal_protocol::plan::ReplicaPlan;
use shoal_tests::api::Api;
use shoal_tests::model::RandomLlama;
use shoal_tests::proc::{Up, UpOptions};

use super::{READY, ids};

/// By how much a log-probability may differ where ranks add their sums.
const TOLERANCE: f64 = 1e-4;

/// 300 rows of 256 numbers are 300 KiB: what four ranks tell each other of them does not go from all to all.
fn prompt() -> Vec<u32> {
    (0..300).map(|i| 5 + i * 37 % 380).collect()
}

/// Tokens behind the prompt, and the log-probability of each.
fn ask(api: &Api) -> Result<(Vec<u64>, Vec<f64>)> {
    let more =
        json!({"max_tokens": 16, "logprobs": 1, "return_token_ids": true, "ignore_eos": true});
    let answer = api.complete(prompt(), more)?.ok()?;
    let logprobs = answer.body["choices"][0]["logprobs"]["token_logprobs"].as_array();
    let logprobs = logprobs.context("log-probabilities")?.iter().filter_map(|p| p.as_f64());
    let logprobs: Vec<f64> = logprobs.collect();
    ensure!(logprobs.len() == 16, "{:?}", answer.body);
    Ok((answer.token_ids(), logprobs))
}

/// An answer that takes long enough to see a move.
fn long(api: &Api) -> Result<Vec<u64>> {
    let more = json!({"max_tokens": 120, "return_token_ids": true, "ignore_eos": true});
    Ok(ids(&api.stream("abc", more)?.rest()?.0))
}

#[test]
fn a_real_model_over_quic_says_what_one_worker_says_on_every_mesh() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("wide");
    RandomLlama { layers: 4, hidden: 256, intermediate: 704 }.write_with_heads(&model, 4)?;
    let model = model.to_str().context("a path in UTF-8")?;
    let whole = Up::start(&UpOptions::flags("--workers 1").model(model))?;
    let (expected, of_long) = (ask(&whole.api())?, long(&whole.api())?);
    ensure!(of_long.len() == 120, "{of_long:?}");
    whole.stop(&[])?;

    let up = Up::start(&UpOptions::flags("--workers 4").env("SHOAL_RANKS_APART", "1"))?;
    up.verb(&["undeploy", "demo"])?.expect_code(0);
    for reduction in ["exact", "sum"] {
        let mesh = ["--mesh", "1x4", "--reduction", reduction];
        up.verb(&[&["deploy", model, "--name", reduction][..], &mesh].concat())?.expect_code(0);
        up.admin()?.wait_until("ready", READY, |view| settled(view, reduction, &[4]))?;
    }
    ensure!(ask(&Api::new(up.url(), "exact"))? == expected, "exact, 1x4");
    let (tokens, logprobs) = ask(&Api::new(up.url(), "sum"))?;
    ensure!(tokens == expected.0, "summed, 1x4: {tokens:?}");
    let far = logprobs.iter().zip(&expected.1).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    ensure!(far < TOLERANCE, "summed, 1x4: {far}");
    up.verb(&["undeploy", "sum"])?.expect_code(0);

    // Clients that always have an answer under way, while it moves.
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let (stop, api, expected) =
                (Arc::clone(&stop), Api::new(up.url(), "exact"), of_long.clone());
            std::thread::spawn(move || -> Result<usize> {
                let mut answers = 0;
                while !stop.load(Ordering::Relaxed) {
                    let found = long(&api)?;
                    ensure!(found == expected, "answer {answers}: {found:?}, not {expected:?}");
                    answers += 1;
                }
                Ok(answers)
            })
        })
        .collect();
    let mut moved = Ok(());
    for (mesh, ranks) in [("2x2", &[2, 2][..]), ("3x1", &[1, 1, 1]), ("1x2", &[2])] {
        moved = moved.and_then(|()| {
            up.verb(&["scale", "exact", "--mesh", mesh])?.expect_code(0);
            up.admin()?.wait_until(mesh, READY, |view| settled(view, "exact", ranks))?;
            ensure!(ask(&Api::new(up.url(), "exact"))? == expected, "{mesh}");
            Ok(())
        });
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        let answers = client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        ensure!(answers > 0, "a client had no answer");
    }
    moved?;
    up.stop(&[])?;
    Ok(())
}

/// Whether it is served by one replica whose stages have these numbers of ranks, and nothing is under way.
fn settled(view: &ClusterView, name: &str, ranks: &[usize]) -> bool {
    let deployment = view.deployments.iter().find(|d| d.name.as_str() == name);
    let replicas = view.plan.replicas.iter().filter(|r| r.deployment.as_str() == name);
    let shards = |replica: &ReplicaPlan| -> Vec<usize> {
        replica.stages.iter().map(|stage| stage.shards.len()).collect()
    };
    let made: Vec<Vec<usize>> = replicas.map(shards).collect();
    deployment.is_some_and(|d| d.is_settled()) && made == [ranks]
}
