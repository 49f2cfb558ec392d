//! Replicas whose stages have several tensor ranks, over real links: what goes right, and what happens
//! when a rank dies. What ranks compute of a real model: `ranks.rs`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod cluster;

use std::time::{Duration, Instant};

use cluster::relay::Relay;
use cluster::*;
use shoal_protocol::control::ShardState;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{NodeId, TokenId};
use shoal_protocol::plan::{PeerAddress, PretendSpec};
use shoal_protocol::request::{FinishReason, Generate, HeadEvent, SamplingRecord};

/// How long a stream may go on behind the death of a rank.
const NOTICED_WITHIN: Duration = Duration::from_millis(1300);

/// Five blocks of vocabulary: every rank of five has one.
const WIDE: PretendSpec = PretendSpec { vocab: 5000, ..SPEC };

async fn start(cluster: &Cluster, count: u32) -> Vec<TestWorker> {
    let mut workers = Vec::new();
    for number in 1..=count {
        workers.push(cluster.worker(number).await);
    }
    workers
}

fn nodes(workers: &[TestWorker]) -> Vec<NodeId> {
    workers.iter().map(TestWorker::node).collect()
}

/// Greedy, and drawn in every way that ranks decide differently.
fn requests() -> Vec<Generate> {
    let ways = [
        (0.0, 0, 1.0, false),
        (0.9, 0, 1.0, false),
        (1.1, 40, 1.0, true),
        (0.8, 40, 0.7, false),
        (5.0, 0, 0.9, true),
        (0.0, 0, 1.0, true),
    ];
    let request = |(i, (temperature, top_k, top_p, penalised)): (u32, (f32, u32, f32, bool))| {
        let prompt: Vec<TokenId> = (0..3 + 9 * i).map(|t| (t * 31 + i * 7) % WIDE.vocab).collect();
        let penalty = if penalised { 1.2 } else { 1.0 };
        let sampling = SamplingRecord {
            seed: 11,
            temperature,
            top_k,
            top_p,
            repetition_penalty: penalty,
            logprobs: i % 3,
            ..SamplingRecord::GREEDY
        };
        Generate { sampling, ..request(&prompt, 20) }
    };
    (0..).zip(ways).map(request).collect()
}

/// Each request's tokens with what is reported beside them.
async fn answers(cluster: &Cluster, head: &TestWorker) -> Vec<Vec<(TokenId, u32, String)>> {
    let connection = dial_head(cluster, head).await;
    let mut streams = Vec::new();
    for request in requests() {
        streams.push(Stream::open(&connection, &request).await);
    }
    let mut answers = Vec::new();
    for mut stream in streams {
        let mut answer = Vec::new();
        loop {
            match stream.next().await.expect("a last event") {
                HeadEvent::Token { header, candidates } => {
                    let beside = format!("{candidates:?}");
                    answer.push((header.token, header.logprob.to_bits(), beside));
                }
                HeadEvent::Done { reason: FinishReason::Length, .. } => break,
                other => panic!("{other:?}"),
            }
        }
        answers.push(answer);
    }
    answers
}

/// Over sockets of their machine, and over QUIC as between machines.
#[tokio::test(flavor = "multi_thread")]
async fn every_mesh_draws_what_one_shard_draws() {
    for ranks_apart in [false, true] {
        let cluster = Cluster { ranks_apart, ..Cluster::new() };
        let mut workers = start(&cluster, 5).await;
        let nodes = nodes(&workers);
        deploy(&mesh_of(WIDE, 1, &nodes[..1], &[1]), &mut workers[..1]).await;
        let alone = answers(&cluster, &workers[0]).await;
        assert_eq!(
            alone[0].iter().map(|(token, ..)| *token).collect::<Vec<_>>(),
            continuation(&WIDE, &requests()[0].tokens, 20)
        );
        let meshes: [&[u32]; 6] = [&[2], &[5], &[2, 2], &[1, 3, 1], &[3, 1], &[1, 4]];
        for (generation, mesh) in (2..).zip(meshes) {
            let count = mesh.iter().sum::<u32>() as usize;
            let plan = mesh_of(WIDE, generation, &nodes[..count], mesh);
            deploy(&plan, &mut workers[..count]).await;
            assert_eq!(answers(&cluster, &workers[0]).await, alone, "{mesh:?}");
            for worker in &mut workers[..count] {
                worker
                    .until("all blocks are free", |r| r.heads.iter().all(|h| h.blocks_used == 0))
                    .await;
            }
        }
    }
}

/// The last event of a stream, and how long it took from `begun`.
async fn last_event(stream: &mut Stream, begun: Instant) -> (HeadEvent, Duration) {
    loop {
        match stream.next().await.expect("a last event") {
            HeadEvent::Token { .. } => {}
            last => return (last, begun.elapsed()),
        }
    }
}

fn expect_lost(last: &HeadEvent, words: &str) {
    let HeadEvent::Failed { code, message, .. } = last else { panic!("{last:?}") };
    assert_eq!(*code, ErrorCode::WorkerLost, "{message}");
    assert!(message.contains(words), "{words:?} is not in {message:?}");
}

fn slow() -> PretendSpec {
    PretendSpec { layer_step_ns: 3_000_000, ..WIDE }
}

/// In a mesh of 2x2, w1 w2 | w3 w4.
#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_dies_ends_the_streams_with_its_name_and_the_others_serve_again() {
    for (victim, ranks_apart) in [(1, false), (3, false), (3, true)] {
        let cluster = Cluster { ranks_apart, ..Cluster::new() };
        let mut workers = start(&cluster, 4).await;
        let all = nodes(&workers);
        deploy(&mesh_of(slow(), 1, &all, &[2, 2]), &mut workers).await;
        let connection = dial_head(&cluster, &workers[0]).await;
        let mut stream = Stream::open(&connection, &request(&[1, 2, 3], 200)).await;
        assert!(stream.next().await.is_some());
        let dead = workers.remove(victim);
        dead.task.abort();
        let (last, took) = last_event(&mut stream, Instant::now()).await;
        assert!(took < NOTICED_WITHIN, "noticed after {took:?}");
        expect_lost(&last, &dead.node().to_string());
        for worker in &mut workers {
            worker.until_state(1, "failed", |s| matches!(s, ShardState::Failed(_))).await;
        }
        let plan = mesh_of(WIDE, 2, &nodes(&workers), &[1, 2]);
        deploy(&plan, &mut workers).await;
        let connection = dial_head(&cluster, &workers[0]).await;
        let (tokens, _) = Stream::open(&connection, &request(&[5, 6], 20)).await.finish().await;
        assert_eq!(tokens, continuation(&WIDE, &[5, 6], 20));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_is_only_silent_ends_the_streams_too() {
    for ranks_apart in [false, true] {
        let cluster = Cluster { ranks_apart, ..Cluster::new() };
        let mut workers = start(&cluster, 2).await;
        let mut peers = Vec::new();
        let mut relays = Vec::new();
        for worker in &workers {
            let relay = Relay::to(worker.register.activations).await;
            peers.push(PeerAddress { node: worker.node(), activations: relay.address });
            relays.push(relay);
        }
        let plan = mesh_of(slow(), 1, &nodes(&workers), &[2]);
        deploy_at(&plan, &mut workers, &peers).await;
        let connection = dial_head(&cluster, &workers[0]).await;
        let mut stream = Stream::open(&connection, &request(&[1, 2, 3], 200)).await;
        assert!(stream.next().await.is_some());
        relays.iter().for_each(Relay::silence);
        let (last, took) = last_event(&mut stream, Instant::now()).await;
        assert!(took < NOTICED_WITHIN, "noticed after {took:?}");
        expect_lost(&last, "w2");
    }
}
