//! A model whose answers last long enough to break something in the middle, and who holds which part
//! of it.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use shoal_protocol::admin::ClusterView;
use shoal_protocol::plan::PretendSpec;

use crate::api::{Answer, Api, Stream};

/// A token takes 6 ms.
pub const SLOW: PretendSpec = PretendSpec {
    layers: 6,
    hidden: 64,
    vocab: 1000,
    max_context: 4096,
    seed: 5,
    layer_step_ns: 1_000_000,
    layer_row_ns: 0,
    layer_weight_bytes: 1 << 20,
};

/// What it is asked.
pub fn prompt() -> Vec<u32> {
    (10..30).collect()
}

/// An answer of so many tokens, with their ids.
pub fn options(max_tokens: u32) -> Value {
    json!({"max_tokens": max_tokens, "ignore_eos": true, "return_token_ids": true})
}

/// A stream of twelve seconds.
pub fn slow_stream(api: &Api) -> Result<Stream> {
    api.stream(prompt(), options(2000))
}

/// The ids of a short answer.
pub fn some_tokens(api: &Api) -> Result<Value> {
    let answer: Answer = api.complete(prompt(), options(20))?.ok()?;
    Ok(answer.body["choices"][0]["token_ids"].clone())
}

/// The process that holds a stage of a deployment.
pub fn holder(view: &ClusterView, deployment: &str, stage: usize) -> Result<u32> {
    let mut replicas = view.plan.replicas.iter();
    let replica = replicas.find(|r| r.deployment.as_str() == deployment).context("a plan")?;
    let node = replica.stages[stage].shards[0].node;
    Ok(view.workers.iter().find(|w| w.id == node).context("its worker")?.pid)
}
