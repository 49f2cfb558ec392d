//! Prompts that begin as others did: what is not computed again is said, and changes no answer.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_protocol::admin::DeploymentPhase;
use shoal_tests::api::Api;
use shoal_tests::proc::{Up, UpOptions};

use super::READY;

/// Between two looks at metrics.
const LOOK: Duration = Duration::from_millis(50);

/// 560 tokens that no other test asks for, and which end as `end` says.
fn prompt(end: &[u32]) -> Vec<u32> {
    let begin = (0..560 - end.len() as u32).map(|i| 10 + i * 7 % 370);
    begin.chain(end.iter().copied()).collect()
}

/// The choices without their texts' ids, and tokens of the prompt that were known.
fn ask(up: &Up, model: &str, prompt: &[u32], more: Value) -> Result<(Value, u64)> {
    let mut body = json!({
        "max_tokens": 24, "ignore_eos": true, "return_token_ids": true, "logprobs": 3, "seed": 5,
    });
    if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
        body.extend(more);
    }
    let answer = Api::new(up.url(), model).complete(prompt, body)?.ok()?;
    let usage = &answer.body["usage"];
    let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
    ensure!(usage["prompt_tokens"] == prompt.len(), "{usage}");
    Ok((answer.body["choices"].clone(), cached.with_context(|| usage.to_string())?))
}

fn metric(up: &Up, name: &str, model: &str) -> Result<f64> {
    let text = up.api().get("/metrics")?.body;
    let text = text.as_str().context("a text")?;
    let line = format!("{name}{{model_name=\"{model}\"}} ");
    let value = text.lines().find_map(|found| found.strip_prefix(&line));
    Ok(value.with_context(|| format!("no {line}in {text}"))?.parse()?)
}

#[test]
fn a_prompt_asked_again_is_not_computed_again_and_answered_alike_over_stages_and_ranks()
-> Result<()> {
    let up = Up::start(&UpOptions::flags("--workers 2 --stages 2"))?;
    up.verb(&["deploy", "--name", "ranks", "--mesh", "1x2"])?.expect_code(0);
    up.admin()?.wait_for_phase("ranks", DeploymentPhase::Ready, READY)?;
    for model in ["demo", "ranks"] {
        for temperature in [0.0, 1.0] {
            let end = [20 + temperature as u32; 4];
            let long = prompt(&end);
            let more = json!({"temperature": temperature});
            let (first, missed) = ask(&up, model, &long, more.clone())?;
            // Whole blocks of 16 tokens; at the second temperature all of them but the last are known
            // from the first, and of the last one nothing.
            let before = if temperature == 0.0 { 0 } else { 544 };
            ensure!(missed == before, "{model}: {missed} tokens were known before");
            let (again, known) = ask(&up, model, &long, more)?;
            ensure!(known == 544, "{model}: {known} tokens were known");
            // Tokens, texts and log-probabilities, every bit of them.
            ensure!(first == again, "{model}: {first} and then {again}");
        }
        // Two choices, one prompt, two more tokens behind it.
        let longer = [prompt(&[20; 4]), vec![30, 31]].concat();
        let (_, known) = ask(&up, model, &longer, json!({"n": 2, "temperature": 1.0}))?;
        ensure!(known == 560, "{model}: {known} tokens were known, with the last block");
        let (_, other) = ask(&up, model, &prompt(&[9; 560]), json!({}))?;
        ensure!(other == 0, "{model}: {other} tokens were known of a prompt that is new");
    }
    // Heads report four times a second.
    let until = Instant::now() + READY;
    let found = ["demo", "ranks"].map(|model| (model, 544.0 * 3.0 + 2.0 * 560.0));
    for (model, tokens) in found {
        // And that all of it is idle, which counts as free.
        while metric(&up, "vllm:prefix_cache_hits_total", model)? < tokens
            || metric(&up, "vllm:kv_cache_usage_perc", model)? > 0.0
            || metric(&up, "shoal_prefix_lookups_total", model)? < 7.0
        {
            ensure!(Instant::now() < until, "{model}: the metrics know of no {tokens} tokens");
            #[allow(clippy::disallowed_methods, reason = "metrics have no event to wait for")]
            std::thread::sleep(LOOK);
        }
        ensure!(metric(&up, "shoal_prefix_hits_total", model)? == 5.0);
        ensure!(metric(&up, "shoal_prefix_blocks", model)? > 35.0);
        let idle = metric(&up, "shoal_prefix_blocks_idle", model)?;
        ensure!(metric(&up, "shoal_prefix_blocks", model)? == idle, "nobody uses any");
    }
    Ok(())
}
