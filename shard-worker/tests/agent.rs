//! What a worker answers to its coordinator, which the test plays.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod cluster;

use cluster::*;
use shoal_protocol::control::{CoordinatorMessage, ShardState, WorkerMessage};
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::NodeId;
use shoal_protocol::plan::{ModelSource, PretendSpec};
use shoal_protocol::units::Bytes;

async fn probe(worker: &mut TestWorker, number: u64, source: ModelSource) -> WorkerMessage {
    worker.to.send(CoordinatorMessage::Probe { probe: number, source }).await.unwrap();
    let answer = worker.said.wait_for(|said| {
        said.probed
            .iter()
            .any(|p| matches!(p, WorkerMessage::Probed { probe, .. } if *probe == number))
    });
    within(answer).await.unwrap().probed.last().cloned().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_is_answered_with_a_fingerprint_or_with_words() {
    let cluster = Cluster::new();
    let mut worker = cluster.worker(1).await;
    let found = probe(&mut worker, 1, ModelSource::Pretend(SPEC)).await;
    assert_eq!(found, WorkerMessage::Probed { probe: 1, result: Ok(SPEC.fingerprint()) });

    let path = "/no/such/folder".to_owned();
    let found = probe(&mut worker, 2, ModelSource::Folder { path: path.clone() }).await;
    let WorkerMessage::Probed { result: Err(error), .. } = found else { panic!("{found:?}") };
    assert_eq!(error.code, ErrorCode::BadModel);
    assert!(error.message.contains(&path), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_the_budget_is_refused_with_the_arithmetic() {
    let cluster = Cluster::new();
    let mut worker = cluster.worker(1).await;
    assert_eq!(worker.register.devices[0].memory, Bytes::mib(100));
    let spec = PretendSpec { layer_weight_bytes: 50 << 20, ..SPEC };
    let plan = layout_of(spec, 1, &[worker.node()]);
    worker.assign(vec![assignment(&plan, 0, &[worker.peer()])]).await;
    let report =
        worker.until_state(1, "refused", |state| matches!(state, ShardState::Failed(_))).await;
    let ShardState::Failed(error) = &report.shards[0].state else { unreachable!("it has failed") };
    assert_eq!(error.code, ErrorCode::DoesNotFit);
    assert!(error.message.contains("weights 300.0 MiB"), "{error}");
    assert!(error.message.contains("budget is 100.0 MiB"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_worker_is_the_same_node_in_its_next_life() {
    let cluster = Cluster::new();
    let first = cluster.worker(1).await;
    assert_eq!((first.node(), first.register.incarnation.0), (NodeId::worker(1), 1));
    first.to.send(CoordinatorMessage::Drain { epoch: 1 }).await.unwrap();
    within(first.task).await.unwrap();
    let second = cluster.worker_in(first.data, Bytes::mib(7)).await;
    assert_eq!((second.node(), second.register.incarnation.0), (NodeId::worker(1), 2));
    assert_eq!(second.register.devices[0].memory, Bytes::mib(7));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_is_not_wanted_any_more_is_freed() {
    let cluster = Cluster::new();
    let mut workers = [cluster.worker(1).await];
    deploy(&layout(1, &[workers[0].node()]), &mut workers).await;
    let [worker] = &mut workers;
    worker.assign(vec![]).await;
    worker.until("freed", |report| report.shards.is_empty() && report.heads.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_says_which_generation_a_forgetful_coordinator_must_go_beyond() {
    let cluster = Cluster::new();
    let mut workers = [cluster.worker(1).await];
    let nodes = [workers[0].node()];
    deploy(&layout(3, &nodes), &mut workers).await;
    let [worker] = &mut workers;
    let peers = [worker.peer()];
    worker.assign(vec![assignment(&layout(1, &nodes), 0, &peers)]).await;
    let refused = |state: &ShardState| matches!(state, ShardState::Failed(error) if error.code == ErrorCode::StaleGeneration);
    worker.until_state(3, "refused under the newest generation", refused).await;
    worker.assign(vec![assignment(&layout(4, &nodes), 0, &peers)]).await;
    worker.until_ready(4).await;
}
