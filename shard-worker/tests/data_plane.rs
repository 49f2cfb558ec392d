//! Three workers, one replica: what goes right, and what happens when something dies.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "data_plane/adapters.rs"]
mod adapters;
mod cluster;

use std::time::{Duration, Instant};

use cluster::relay::Relay;
use cluster::*;
use shoal_protocol::control::ShardState;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{Attempt, NodeId, TokenId};
use shoal_protocol::liveness::LEASE;
use shoal_protocol::plan::{PeerAddress, PretendSpec};
use shoal_protocol::request::{FinishReason, Generate, HeadEvent, SamplingRecord};

/// How long a stream may go on behind the death of a worker that it needs.
const NOTICED_WITHIN: Duration = Duration::from_millis(1300);

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

/// Slow enough that a stream lives until the test ends it.
fn slow() -> PretendSpec {
    PretendSpec { layer_step_ns: 3_000_000, ..SPEC }
}

fn expect_done(last: &HeadEvent) {
    assert!(matches!(last, HeadEvent::Done { reason: FinishReason::Length, .. }), "{last:?}");
}

fn expect_failed(last: &HeadEvent, expected: ErrorCode, words: &str) {
    let HeadEvent::Failed { code, message, .. } = last else { panic!("{last:?}") };
    assert_eq!(*code, expected, "{message}");
    assert!(message.contains(words), "{words:?} is not in {message:?}");
}

async fn answers_are_those_of_the_unsplit_model(stages: u32) {
    let cluster = Cluster::new();
    let mut workers = start(&cluster, stages).await;
    deploy(&layout(1, &nodes(&workers)), &mut workers).await;
    let connection = dial_head(&cluster, &workers[0]).await;
    // More sequences than may run at once, longer ones than a step has rows.
    let prompts: Vec<Vec<TokenId>> =
        (0..12).map(|i| (0..1 + 5 * i).map(|t| (t * 31 + i * 7) % SPEC.vocab).collect()).collect();
    let mut streams = Vec::new();
    for prompt in &prompts {
        streams.push(Stream::open(&connection, &request(prompt, 20)).await);
    }
    for (prompt, stream) in prompts.iter().zip(streams) {
        let (tokens, last) = stream.finish().await;
        expect_done(&last);
        assert_eq!(tokens, continuation(&SPEC, prompt, 20), "after {prompt:?}");
    }
    let report = workers[0]
        .until("all is told and all blocks are free", |r| {
            r.heads.iter().any(|h| h.generated_tokens == 240 && h.blocks_used == 0)
        })
        .await;
    let head = report.heads[0];
    assert_eq!((head.running, head.waiting), (0, 0));
    for worker in &mut workers {
        let report = worker.until("counted", |r| r.shards[0].counters.steps == head.steps).await;
        let counters = report.shards[0].counters;
        if stages > 1 {
            assert!(counters.sent_frames >= head.steps && counters.link_rtt_us > 0);
            assert_eq!(counters.lost_packets, 0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_stages_answer_as_one() {
    answers_are_those_of_the_unsplit_model(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_stages_answer_as_one() {
    answers_are_those_of_the_unsplit_model(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_stage_answers() {
    answers_are_those_of_the_unsplit_model(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_frees_its_blocks() {
    let cluster = Cluster::new();
    let mut workers = start(&cluster, 2).await;
    deploy(&layout_of(slow(), 1, &nodes(&workers)), &mut workers).await;
    let connection = dial_head(&cluster, &workers[0]).await;
    let mut stopped = Stream::open(&connection, &request(&[1, 2, 3], 200)).await;
    let mut reset = Stream::open(&connection, &request(&[4, 5, 6], 200)).await;
    assert!(stopped.next().await.is_some() && reset.next().await.is_some());
    stopped.receiver.stop(0);
    reset.sender.reset(0);
    let other = dial_head(&cluster, &workers[0]).await;
    let mut lost = Stream::open(&other, &request(&[7, 8, 9], 200)).await;
    assert!(lost.next().await.is_some());
    other.close(0, "the coordinator goes away");
    workers[0]
        .until("idle", |r| {
            r.heads.iter().all(|h| h.running + h.blocks_used == 0 && h.generated_tokens > 0)
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_worker_ends_the_streams_with_its_name() {
    let cluster = Cluster::new();
    let mut workers = start(&cluster, 3).await;
    let mut relays = Vec::new();
    for worker in &workers {
        relays.push(Relay::to(worker.register.activations).await);
    }
    let peers: Vec<_> = workers
        .iter()
        .zip(&relays)
        .map(|(w, relay)| PeerAddress { node: w.node(), activations: relay.address })
        .collect();
    deploy_at(&layout_of(slow(), 1, &nodes(&workers)), &mut workers, &peers).await;
    let connection = dial_head(&cluster, &workers[0]).await;
    let mut stream = Stream::open(&connection, &request(&[1, 2, 3], 200)).await;
    assert!(stream.next().await.is_some());

    // The last worker: the head is its neighbour on one side only.
    relays[2].silence();
    relays[0].silence();
    let begun = Instant::now();
    let last = loop {
        match stream.next().await.expect("a last event") {
            HeadEvent::Token { .. } => {}
            last => break last,
        }
    };
    let took = begun.elapsed();
    assert!(took < NOTICED_WITHIN, "noticed after {took:?}");
    expect_failed(&last, ErrorCode::WorkerLost, "w3");

    // The head refuses new work until there is a new layout.
    let (_, refused) = Stream::open(&connection, &request(&[1], 1)).await.finish().await;
    expect_failed(&refused, ErrorCode::NotReady, "w3");
    workers[0].until_state(1, "failed", |s| matches!(s, ShardState::Failed(_))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_a_coordinator_finishes_its_streams_and_takes_no_new_work() {
    let cluster = Cluster::new();
    let mut workers = start(&cluster, 1).await;
    // 0.9 s of tokens would be over before the lease is; these take twice its length.
    let tokens = 2 * (LEASE.as_millis() / 60) as u32;
    let slow = PretendSpec { layer_step_ns: 60_000_000 / u64::from(SPEC.layers), ..SPEC };
    deploy(&layout_of(slow.clone(), 1, &nodes(&workers)), &mut workers).await;
    let connection = dial_head(&cluster, &workers[0]).await;
    let mut running = Stream::open(&connection, &request(&[1, 2, 3], tokens)).await;
    assert!(running.next().await.is_some());
    let (_, last) = Stream::open(&connection, &request(&[4], 1)).await.finish().await;
    expect_done(&last);

    // The control link ends and nobody answers any more; requests still arrive.
    let worker = workers.remove(0);
    drop(worker.to);
    let begun = Instant::now();
    let refused = loop {
        let (_, last) = Stream::open(&connection, &request(&[5], 1)).await.finish().await;
        match last {
            HeadEvent::Done { .. } => assert!(begun.elapsed() < LEASE * 2, "it is never refused"),
            last => break last,
        }
    };
    expect_failed(&refused, ErrorCode::NotReady, "takes no new work");
    assert!(begun.elapsed() > LEASE - Duration::from_secs(1), "after {:?}", begun.elapsed());
    let mut rest = 1;
    let last = loop {
        match running.next().await.expect("a last event") {
            HeadEvent::Token { .. } => rest += 1,
            last => break last,
        }
    };
    expect_done(&last);
    assert_eq!(rest, tokens, "what ran has finished");
}

#[tokio::test(flavor = "multi_thread")]
async fn survivors_serve_again_in_a_new_generation() {
    let cluster = Cluster::new();
    let mut workers = start(&cluster, 3).await;
    deploy(&layout_of(slow(), 1, &nodes(&workers)), &mut workers).await;
    let connection = dial_head(&cluster, &workers[0]).await;
    let mut stream = Stream::open(&connection, &request(&[1, 2, 3], 200)).await;
    assert!(stream.next().await.is_some());

    let dead = workers.remove(1);
    dead.task.abort();
    let begun = Instant::now();
    let last = loop {
        match stream.next().await.expect("a last event") {
            HeadEvent::Token { .. } => {}
            last => break last,
        }
    };
    assert!(begun.elapsed() < NOTICED_WITHIN);
    expect_failed(&last, ErrorCode::WorkerLost, "w2");

    // A third worker comes back, under another address.
    workers.insert(1, cluster.worker(4).await);
    deploy(&layout(2, &nodes(&workers)), &mut workers).await;
    let (tokens, last) = Stream::open(&connection, &request(&[5, 6], 8)).await.finish().await;
    expect_done(&last);
    assert_eq!(tokens, continuation(&SPEC, &[5, 6], 8));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_may_restart_while_streams_run() {
    let cluster = Cluster::new();
    let mut workers = start(&cluster, 2).await;
    let plan = layout_of(slow(), 1, &nodes(&workers));
    deploy(&plan, &mut workers).await;
    let connection = dial_head(&cluster, &workers[0]).await;
    let mut stream = Stream::open(&connection, &request(&[1, 2, 3], 30)).await;
    assert!(stream.next().await.is_some());
    for worker in &mut workers {
        // The conversation ends with the test's sender; the worker begins another one.
        worker.to = mpsc_closed();
    }
    for _ in 0..2 {
        let (register, to, said) = welcome(&cluster.coordinator).await;
        let worker = workers.iter_mut().find(|w| w.node() == register.node).unwrap();
        assert_eq!(register, worker.register, "the same incarnation at the same addresses");
        (worker.to, worker.said) = (to, said);
    }
    deploy(&plan, &mut workers).await;
    let (tokens, last) = {
        let mut tokens = vec![0];
        let last = loop {
            match stream.next().await.expect("a last event") {
                HeadEvent::Token { header, .. } => tokens.push(header.token),
                last => break last,
            }
        };
        (tokens, last)
    };
    expect_done(&last);
    assert_eq!(tokens[1..], continuation(&SPEC, &[1, 2, 3], 30)[1..]);
}

fn mpsc_closed() -> tokio::sync::mpsc::Sender<shoal_protocol::control::CoordinatorMessage> {
    tokio::sync::mpsc::channel(1).0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_cluster_lets_its_streams_out() {
    let cluster = Cluster::new();
    let mut workers = start(&cluster, 2).await;
    deploy(&layout_of(slow(), 1, &nodes(&workers)), &mut workers).await;
    let connection = dial_head(&cluster, &workers[0]).await;
    let mut stream = Stream::open(&connection, &request(&[1, 2, 3], 20)).await;
    assert!(stream.next().await.is_some());
    workers.iter().for_each(|worker| worker.drain.drain());
    let mut tokens = 1;
    let last = loop {
        match stream.next().await.expect("a last event") {
            HeadEvent::Token { .. } => tokens += 1,
            last => break last,
        }
    };
    expect_done(&last);
    assert_eq!(tokens, 20);
    for worker in workers {
        within(worker.task).await.unwrap();
    }
}

/// All events of an answer.
async fn events_of(mut stream: Stream) -> Vec<HeadEvent> {
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event);
    }
    events
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_answer_is_the_rest_of_the_same_one_bit_for_bit() {
    let cluster = Cluster::new();
    let mut workers = start(&cluster, 2).await;
    deploy(&layout(1, &nodes(&workers)), &mut workers).await;
    let connection = dial_head(&cluster, &workers[0]).await;
    let sampling = SamplingRecord {
        seed: 77,
        stream: 3,
        temperature: 1.3,
        top_k: 40,
        presence_penalty: 0.7,
        frequency_penalty: 0.3,
        repetition_penalty: 1.2,
        logprobs: 3,
        ..SamplingRecord::GREEDY
    };
    // A prompt that ends within a block, and an answer over several.
    let prompt: Vec<TokenId> = (0..21).map(|t| (t * 31) % SPEC.vocab).collect();
    let mut whole = Generate { sampling, ..request(&prompt, 40) };
    let undisturbed = events_of(Stream::open(&connection, &whole).await).await;
    let tokens: Vec<TokenId> = undisturbed
        .iter()
        .filter_map(|event| match event {
            HeadEvent::Token { header, .. } => Some(header.token),
            _ => None,
        })
        .collect();
    assert_eq!(tokens.len(), 40);
    // Also one that ends by a token: the resumed one must end there, too.
    let ends = [vec![], vec![tokens[30]]];
    for stop_tokens in ends {
        whole.stop_tokens = stop_tokens;
        let undisturbed = events_of(Stream::open(&connection, &whole).await).await;
        let last = undisturbed.len() - 1;
        for known in (0..last).step_by(3).chain([last - 1, last]) {
            let mut resumed = whole.clone();
            resumed.attempt = Attempt(whole.attempt.0 + 1);
            resumed.tokens.extend(&tokens[..known]);
            let rest = events_of(Stream::open(&connection, &resumed).await).await;
            assert_eq!(rest.len(), undisturbed.len() - known, "after {known} tokens");
            for (event, expected) in rest.iter().zip(&undisturbed[known..]) {
                assert_eq!(words(event, resumed.attempt), words(expected, whole.attempt));
            }
        }
    }
}

/// What an event says, bit for bit, but for how long it took. Checks whose it is.
fn words(event: &HeadEvent, attempt: Attempt) -> Vec<u32> {
    match event {
        HeadEvent::Token { header, candidates } => {
            assert_eq!(header.attempt, attempt.0);
            let candidates = candidates.iter().flat_map(|c| [c.token, c.logprob.to_bits()]);
            [header.index, header.token, header.logprob.to_bits()]
                .into_iter()
                .chain(candidates)
                .collect()
        }
        HeadEvent::Done { header, reason } => {
            assert_eq!(header.attempt, attempt.0);
            vec![*reason as u32, header.tokens, header.stop_token]
        }
        HeadEvent::Reused { .. } => panic!("nobody named a tenant"),
        HeadEvent::Vector { .. } => panic!("a vector of a decoder"),
        HeadEvent::Failed { message, .. } => panic!("{message}"),
    }
}
