//! A worker that gives something else than it said: others name it in their logs, and have the model from
//! elsewhere.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use shoal_tests::hub::Hub;
use shoal_tests::model::RandomLlama;
use shoal_tests::proc::{Up, UpOptions};

use super::{REPO, WEIGHTS, up};

/// The weights that a process has fetched chunks of, below a folder.
fn weights(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            weights(&path, found)?;
        }
        if path.file_name().is_some_and(|name| name == WEIGHTS) {
            let records = path.with_file_name(".chunks").join(WEIGHTS);
            found.extend(records.exists().then_some(path));
        }
    }
    Ok(())
}

/// What the logs of a cluster say, but for that of one node.
fn logs(cluster: &Up, but: &str) -> Result<String> {
    let mut all = String::new();
    for entry in std::fs::read_dir(cluster.runtime_dir().join("up/logs"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.starts_with(but) {
            all.push_str(&std::fs::read_to_string(&path)?);
        }
    }
    Ok(all)
}

#[test]
fn a_worker_that_gives_other_bytes_than_it_said_is_named_and_the_model_comes_from_elsewhere()
-> Result<()> {
    let folder = tempfile::tempdir()?;
    RandomLlama { layers: 4, hidden: 256, intermediate: 1024 }.write(folder.path())?;
    let hub = Hub::serve(folder.path(), REPO, Some("hf_secret"))?;
    let home = tempfile::tempdir()?;
    let options: UpOptions = up(&hub, home.path());
    let mut options = options;
    options.flags.extend(["--stages".into(), "1".into()]);
    let cluster = Up::start(&options)?;
    let ask = || -> Result<Vec<u64>> {
        let more = json!({"max_tokens": 8, "temperature": 0, "return_token_ids": true});
        Ok(cluster.api().complete("Once upon", more)?.ok()?.token_ids())
    };
    let expected = ask()?;
    let mut fetched = Vec::new();
    weights(cluster.runtime_dir(), &mut fetched)?;
    let [file] = &fetched[..] else { anyhow::bail!("one worker has fetched: {fetched:?}") };
    // Behind its back, in every chunk: it has hashed what was there before.
    let mut bytes = std::fs::read(file)?;
    for at in (bytes.len() / 8..bytes.len()).step_by(1 << 20) {
        bytes[at] ^= 1;
    }
    std::fs::write(file, bytes)?;
    let liar = cluster.workers().into_iter().find(|worker| worker.stage.is_some());
    let liar = liar.context("one of them has the model")?.id;
    let before = hub.counts().weights();

    cluster.verb(&["scale", "demo", "--replicas", "2"])?.expect_code(0);
    let number = liar.trim_start_matches('w');
    let said = logs(&cluster, &format!("worker-{number}"))?;
    let words = format!("{liar} is avoided: what it sent is not what others say that it is");
    ensure!(said.contains(&words), "`{words}` is not in the others' logs:\n{said}");
    ensure!(said.contains(WEIGHTS), "the file is not named:\n{said}");
    ensure!(hub.counts().weights() > before, "nobody asked the hub instead");
    // Whichever of the two copies answers.
    for _ in 0..4 {
        ensure!(ask()? == expected, "an answer out of other weights");
    }
    cluster.stop(&[])?;
    Ok(())
}
