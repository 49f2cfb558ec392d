//! Adapters at workers that run: loaded, chosen, let go, refused, over real links.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use shoal_protocol::adapters::{AdapterSpec, DeploymentAdapters, WantedAdapters};
use shoal_protocol::control::CoordinatorMessage;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{AdapterId, DeploymentName, Generation, NodeId, RankIndex, TokenId};
use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{Adapter, Checkpoint};
use shoal_protocol::plan::{
    ModelRef, ModelSource, Numerics, ReplicaLimits, ReplicaPlan, ShardPlan, StagePlan,
};
use shoal_protocol::request::Generate;
use shoal_protocol::units::LayerRange;

use super::cluster::*;
use super::{expect_done, expect_failed, nodes, start};

const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: 48,
    context_max: 256,
    step_rows_max: 32,
    sequences_max: 8,
    steps_in_flight_max: 4,
};

#[derive(Deserialize)]
struct Case {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    prompt_ids: Vec<TokenId>,
    continuation_ids: Vec<TokenId>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").canonicalize().unwrap()
}

fn prompts(file: &str) -> Vec<Prompt> {
    let bytes = std::fs::read(fixtures().join(file)).unwrap();
    serde_json::from_slice::<Case>(&bytes).unwrap().prompts
}

fn base() -> Checkpoint {
    Checkpoint::open(&fixtures().join("models/llama2-gqa3-bf16")).unwrap()
}

fn spec(id: u32, name: &str) -> AdapterSpec {
    let folder = fixtures().join("adapters").join(name);
    let fingerprint = Adapter::open(&folder, base().spec()).map_or([7; 32], |a| a.fingerprint());
    let name = DeploymentName::new(name).unwrap();
    AdapterSpec { id: AdapterId(id), name, path: folder.display().to_string(), fingerprint }
}

/// Stage `i` ends with layer `ends[i]` and has `ranks[i]` ranks.
fn plan(generation: u64, nodes: &[NodeId], ends: &[u32], ranks: &[u32]) -> ReplicaPlan {
    let checkpoint = base();
    let model = checkpoint.spec();
    let (mut nodes, mut begin) = (nodes.iter().copied(), 0);
    let mut stages = Vec::new();
    for (&end, &count) in ends.iter().zip(ranks) {
        let layers = LayerRange::new(std::mem::replace(&mut begin, end), end);
        let shard = |rank| {
            let split = shoal_protocol::model::Split { rank, ranks: count };
            let part = model.part(split, Reduction::Exact, model.stored).unwrap();
            let memory = part.memory(model, layers, model.stored, &LIMITS);
            let (rank, node) = (RankIndex(rank), nodes.next().unwrap());
            ShardPlan { rank, node, device: "cpu".to_owned(), memory }
        };
        stages.push(StagePlan { layers, shards: (0..count).map(shard).collect() });
    }
    ReplicaPlan {
        id: REPLICA,
        deployment: DeploymentName::new("demo").unwrap(),
        generation: Generation(generation),
        model: ModelRef {
            source: ModelSource::Folder { path: checkpoint.folder().display().to_string() },
            fingerprint: checkpoint.fingerprint(),
        },
        precision: model.stored,
        numerics: Numerics::N1,
        stages,
        limits: LIMITS,
    }
}

async fn want(workers: &[TestWorker], revision: u64, adapters: &[AdapterSpec]) {
    let deployment = DeploymentName::new("demo").unwrap();
    let deployments = vec![DeploymentAdapters { deployment, adapters: adapters.to_vec() }];
    for worker in workers {
        let wanted = WantedAdapters { revision, deployments: deployments.clone() };
        worker.to.send(CoordinatorMessage::Adapters(wanted)).await.unwrap();
    }
}

/// Waits until all say that this layout has just these.
async fn until_held(workers: &mut [TestWorker], generation: u64, expected: &[u32]) {
    for worker in workers {
        let mut said = worker.said.clone();
        let has = |said: &Said| {
            let mut of = said.adapters.iter().filter(|held| held.generation.0 == generation);
            of.any(|held| held.held.iter().map(|(id, _)| id.0).eq(expected.iter().copied()))
        };
        let waited = tokio::time::timeout(PATIENCE, said.wait_for(has)).await;
        assert!(waited.is_ok(), "{}: {:?}", worker.node(), worker.said.borrow().adapters);
    }
}

/// Waits until just these have failed; their words.
async fn until_failed(worker: &mut TestWorker, expected: &[u32]) -> Vec<(u32, String)> {
    let failed = |said: &Said| {
        let all = said.adapters.iter().flat_map(|held| &held.failed);
        all.map(|(id, error)| (id.0, error.message.clone())).collect::<Vec<_>>()
    };
    let has = |said: &Said| failed(said).iter().map(|(id, _)| id).eq(expected);
    let mut said = worker.said.clone();
    let waited = tokio::time::timeout(PATIENCE, said.wait_for(has)).await;
    failed(&waited.expect("they fail in time").expect("the worker lives"))
}

fn with(adapter: Option<u32>, prompt: &Prompt) -> Generate {
    let count = prompt.continuation_ids.len() as u32;
    Generate { adapter: adapter.map(AdapterId), ..request(&prompt.prompt_ids, count) }
}

/// All prompts of two adapters and of the base at once, each with its own tokens.
async fn expect_all(cluster: &Cluster, head: &TestWorker) {
    let connection = dial_head(cluster, head).await;
    let cases = [
        (Some(1), "adapters/llama-attention/case.json"),
        (None, "cases/llama2-gqa3-bf16.json"),
        (Some(2), "adapters/llama-everything/case.json"),
    ];
    let mut streams = Vec::new();
    for (adapter, file) in cases {
        for prompt in prompts(file) {
            let stream = Stream::open(&connection, &with(adapter, &prompt)).await;
            streams.push((adapter, prompt, stream));
        }
    }
    for (adapter, prompt, stream) in streams {
        let (tokens, last) = stream.finish().await;
        expect_done(&last);
        assert_eq!(tokens, prompt.continuation_ids, "{adapter:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_come_while_a_layout_serves_and_stay_with_the_next_one() {
    let cluster = Cluster::new();
    let mut workers = start(&cluster, 3).await;
    let all = nodes(&workers);
    let both = [spec(1, "llama-attention"), spec(2, "llama-everything")];
    deploy(&plan(1, &all, &[1, 3], &[1, 2]), &mut workers).await;
    let connection = dial_head(&cluster, &workers[0]).await;
    let prompt = &prompts("adapters/llama-attention/case.json")[0];
    let early = Stream::open(&connection, &with(Some(1), prompt)).await.finish().await.1;
    expect_failed(&early, ErrorCode::NotReady, "adapter 1 is not loaded at this replica");
    want(&workers, 1, &both).await;
    until_held(&mut workers, 1, &[1, 2]).await;
    expect_all(&cluster, &workers[0]).await;
    // The same layout again: the models stay, and with them what they have.
    deploy(&plan(2, &all, &[1, 3], &[1, 2]), &mut workers).await;
    until_held(&mut workers, 2, &[1, 2]).await;
    expect_all(&cluster, &workers[0]).await;
    // An older list changes nothing, a newer one does.
    want(&workers, 1, &[]).await;
    want(&workers, 2, &both[1..]).await;
    until_held(&mut workers, 2, &[2]).await;
    let connection = dial_head(&cluster, &workers[0]).await;
    let late = Stream::open(&connection, &with(Some(1), prompt)).await.finish().await.1;
    expect_failed(&late, ErrorCode::NotReady, "adapter 1 is not loaded at this replica");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_that_does_not_fit_is_named_and_the_others_are_held() {
    let cluster = Cluster::new();
    let mut workers = start(&cluster, 1).await;
    let all = nodes(&workers);
    deploy(&plan(1, &all, &[3], &[1]), &mut workers).await;
    let mut changed = spec(4, "llama-some-layers");
    changed.fingerprint = [9; 32];
    want(&workers, 1, &[spec(3, "qwen2-everything"), changed, spec(5, "llama-attention")]).await;
    until_held(&mut workers, 1, &[5]).await;
    let failed = until_failed(&mut workers[0], &[3, 4]).await;
    assert!(failed[0].1.contains("is this an adapter for another base model?"), "{failed:?}");
    assert!(failed[1].1.contains("these are not the files of adapter"), "{failed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_failed_is_tried_again_by_itself_and_holds_nobody_up() {
    let cluster = Cluster::new();
    let mut workers = start(&cluster, 1).await;
    let all = nodes(&workers);
    deploy(&plan(1, &all, &[3], &[1]), &mut workers).await;
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("away");
    let away = AdapterSpec { path: place.display().to_string(), ..spec(3, "llama-attention") };
    want(&workers, 1, &[away.clone(), spec(5, "llama-everything")]).await;
    until_held(&mut workers, 1, &[5]).await;
    let failed = until_failed(&mut workers[0], &[3]).await;
    assert!(failed[0].1.contains("no adapter: expected adapter_config.json"), "{failed:?}");
    // The folder is there now; nobody says so.
    let from = fixtures().join("adapters/llama-attention");
    std::fs::create_dir(&place).unwrap();
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        std::fs::copy(from.join(file), place.join(file)).unwrap();
    }
    until_held(&mut workers, 1, &[3, 5]).await;
    assert_eq!(until_failed(&mut workers[0], &[]).await, []);
    want(&workers, 2, &[away]).await;
    until_held(&mut workers, 1, &[3]).await;
}
