//! What a worker process has in memory that holds half of a model.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use shoal_tests::api::Api;
use shoal_tests::model::RandomLlama;
use shoal_tests::proc::{Up, UpOptions};

/// Some 280 MB of f32: beside it what a process takes anyway is little.
const MODEL: RandomLlama = RandomLlama { layers: 6, hidden: 1024, intermediate: 2816 };

/// A piece of each thread that loads, and the buffers of steps, which every stage has.
const SLACK: u64 = 16 << 20;

/// A line of a process' status, in bytes.
fn status(pid: u32, name: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.split_whitespace().next()).context(name.to_owned())?;
    Ok(kib.parse::<u64>()? << 10)
}

/// Bytes by which a worker's memory has grown, and by which it had at most.
type Grown = (u64, u64);

/// Serves the model so: by how much each worker's memory has grown with it after an answer, and by how much it had at most;
/// and the answer.
fn serve(model: &str, flags: &[&str]) -> Result<(Vec<Grown>, Vec<u64>)> {
    let up = Up::start(&UpOptions::flags("--workers 2"))?;
    let of = |pid: u32| Ok((status(pid, "RssAnon")?, status(pid, "VmHWM")?));
    let held = || up.workers().iter().map(|worker| of(worker.pid)).collect::<Result<Vec<_>>>();
    let before = held()?;
    up.verb(&[&["deploy", model, "--name", "half"], flags].concat())?.expect_code(0);
    let prompt: Vec<u32> = (0..300).map(|i| 5 + i * 37 % 380).collect();
    let more = json!({"max_tokens": 8, "return_token_ids": true, "ignore_eos": true});
    let tokens = Api::new(up.url(), "half").complete(prompt, more)?.ok()?.token_ids();
    let grown = held()?.into_iter().zip(before);
    let grown =
        grown.map(|(now, then)| (now.0.saturating_sub(then.0), now.1.saturating_sub(then.1)));
    let grown = grown.collect();
    up.stop(&[])?;
    Ok((grown, tokens))
}

#[test]
fn each_of_two_workers_has_half_of_the_model_in_memory_and_never_had_more() -> Result<()> {
    let folder = tempfile::tempdir()?;
    MODEL.write_with_heads(folder.path(), 4)?;
    let model = folder.path().to_str().context("a path in UTF-8")?;
    let (held, expected) = serve(model, &["--stages", "1"])?;
    // One of the two has all of it, the other nothing.
    let all = held.iter().map(|(own, _)| *own).max().context("two")?;
    ensure!(all > 200 << 20, "{held:?}");
    let exact = ["--mesh", "1x2", "--reduction", "exact"];
    let sum = ["--mesh", "1x2", "--reduction", "sum"];
    for flags in [&["--stages", "2"][..], &exact, &sum] {
        let (held, tokens) = serve(model, flags)?;
        ensure!(tokens == expected, "{flags:?}: {tokens:?}, not {expected:?}");
        for (own, most) in held {
            let share = |bytes: u64| bytes as f64 / all as f64;
            println!("{flags:?}: {:.3} of the whole, at most {:.3}", share(own), share(most));
            ensure!(own * 100 <= all * 52 + SLACK * 100, "{flags:?}: {own} of {all}");
            ensure!(most * 100 <= all * 52 + SLACK * 100, "{flags:?}: at most {most} of {all}");
        }
    }
    Ok(())
}
