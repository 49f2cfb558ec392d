//! Who gets into the ring, and what happens to a neighbour that sends nonsense: the test plays the
//! stage before w2.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod cluster;

use std::sync::Arc;

use bytes::Bytes;
use cluster::*;
use shoal_protocol::activation::{
    BlockGrant, CloseHeader, LinkHello, Open, RowRecord, Samples, Step, StepHeader,
};
use shoal_protocol::control::ShardState;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::frame::{Flat, FrameKind};
use shoal_protocol::id::{Attempt, Generation, NodeId, RankIndex, RequestId, SequenceId, StepId};
use shoal_protocol::plan::{Assignment, PeerAddress};
use shoal_protocol::quic::{Alpn, Connection, Endpoint, Expect, FrameReceiver, FrameSender};
use shoal_protocol::request::SamplingRecord;
use shoal_protocol::trace::{SpanId, TraceHeader, TraceId, TraceMark};
use shoal_shard_worker::collective::{Collective as _, CollectiveError};
use shoal_shard_worker::stage::{
    ALIGNMENT, Attached, BufferPool, Inlet, LinkEnds, LinkEvent, LinkFrame, LinkPlan, Links, Ranks,
    StageInput, StepData, Takes, records_of,
};
use tokio::sync::{mpsc, watch};

const W1: NodeId = NodeId::worker(1);
const W2: NodeId = NodeId::worker(2);
const W3: NodeId = NodeId::worker(3);

/// w2 with stage 1 of three; w1 and w3 exist as far as the test plays them.
async fn middle_stage(cluster: &Cluster) -> TestWorker {
    let worker = cluster.worker(2).await;
    assign_middle(&worker, 1).await;
    worker
}

async fn assign_middle(worker: &TestWorker, generation: u64) {
    let nowhere = |node| PeerAddress { node, activations: "127.0.0.1:1".parse().unwrap() };
    let peers = [nowhere(W1), worker.peer(), nowhere(W3)];
    worker.assign(vec![assignment(&layout(generation, &[W1, W2, W3]), 1, &peers)]).await;
}

fn hello(generation: u64) -> LinkHello {
    LinkHello { generation, replica: REPLICA.0, from_stage: 0, to_stage: 1, ranks: 0 }
}

async fn dial(from: &Endpoint, to: &TestWorker) -> Connection {
    let address = to.register.activations;
    from.connect(address, Expect::Node(to.node()), Alpn::Activations, PATIENCE).await.unwrap()
}

async fn greet(connection: &Connection, hello: &LinkHello) -> (FrameSender, FrameReceiver) {
    let (mut sender, receiver) = connection.open_bi().await.unwrap();
    sender.send(FrameKind::LinkHello, hello, Bytes::new(), Bytes::new()).await.unwrap();
    (sender, receiver)
}

/// Links as w1; the shard may still be on its way to being ready for it.
async fn link(from: &Endpoint, to: &TestWorker, generation: u64) -> (Connection, FrameSender) {
    let linked = async {
        loop {
            let connection = dial(from, to).await;
            let (sender, mut receiver) = greet(&connection, &hello(generation)).await;
            if let Ok(Some(head)) = receiver.next().await {
                let answer = LinkHello::read_from(head.header()).unwrap();
                assert_eq!((answer.from_stage, answer.to_stage), (1, 0));
                return (connection, sender);
            }
        }
    };
    within(linked).await
}

async fn refused(connection: Connection, words: &str) {
    let reason = within(connection.closed()).await.to_string();
    assert!(reason.contains(words), "{words:?} is not in {reason:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_neighbour_of_this_generation_gets_in() {
    let cluster = Cluster::new();
    let mut worker = middle_stage(&cluster).await;
    worker.until_state(1, "linking", |state| *state == ShardState::Linking).await;
    let w1 = cluster.endpoint(W1, &[]);

    let stranger = cluster.endpoint(NodeId::worker(9), &[]);
    for (from, hello, words) in [
        (&stranger, hello(1), "that stage belongs to another worker"),
        (&w1, hello(2), "another generation is assigned here"),
        (&w1, LinkHello { from_stage: 2, ..hello(1) }, "another stage is expected"),
        (&w1, LinkHello { to_stage: 0, ..hello(1) }, "waits for no link"),
        (&w1, LinkHello { replica: 8, ..hello(1) }, "waits for no link"),
    ] {
        let connection = dial(from, &worker).await;
        let (_sender, mut receiver) = greet(&connection, &hello).await;
        assert!(within(receiver.next()).await.is_err(), "{hello:?} was let in");
        refused(connection, words).await;
    }
    let connection = dial(&w1, &worker).await;
    let (mut sender, _receiver) = connection.open_bi().await.unwrap();
    let close = CloseHeader { generation: 1, sequence: 1 };
    sender.send(FrameKind::Close, &close, Bytes::new(), Bytes::new()).await.unwrap();
    refused(connection, "a LinkHello was expected").await;

    // Another cluster's worker, with the right name; and a coordinator of this one.
    let other = Cluster::new().endpoint(W1, &[]);
    let address = worker.register.activations;
    let alpn = Alpn::Activations;
    assert!(other.connect(address, Expect::Node(W2), alpn, PATIENCE).await.is_err());
    let connection =
        cluster.coordinator.connect(address, Expect::Node(W2), alpn, PATIENCE).await.unwrap();
    refused(connection, "not allowed").await;

    let (_connection, _sender) = link(&w1, &worker, 1).await;
    let second = dial(&w1, &worker).await;
    let _half = greet(&second, &hello(1)).await;
    refused(second, "waits for no link").await;
    let report = worker.until("still linking", |_| true).await;
    assert_eq!(report.shards[0].state, ShardState::Linking, "nobody has harmed it");
}

fn open(generation: u64, tokens: u32) -> Open {
    Open {
        generation: Generation(generation),
        sequence: SequenceId(1),
        request: RequestId(1),
        attempt: Attempt(1),
        choice: 0,
        prompt_len: 1,
        adapter: None,
        sampling: SamplingRecord::GREEDY,
        tokens: vec![0; tokens as usize],
    }
}

/// A step of the first `rows` positions of sequence 1 in one block.
fn step(generation: u64, rows: u32) -> Step {
    let row = |position| RowRecord { sequence: 1, position, flags: 0 };
    Step {
        header: StepHeader { generation, step: 0, rows, grants: 1, samples: 0, reserved: 0 },
        rows: (0..rows).map(row).collect(),
        grants: vec![BlockGrant { sequence: 1, block: 0, flags: 0 }],
    }
}

/// A frame as it is sent, whatever is in it.
struct Raw(FrameKind, Vec<u8>, Vec<u8>);

fn raw<H: Flat>(kind: FrameKind, header: &H, body: Vec<u8>) -> Raw {
    let mut bytes = Vec::new();
    header.append_to(&mut bytes);
    Raw(kind, bytes, body)
}

fn raw_open(open: &Open) -> Raw {
    let (header, body) = open.encode();
    raw(FrameKind::Open, &header, body)
}

/// A step with so many rows of zeros as payload.
fn raw_step(step: &Step, rows: usize) -> Raw {
    let mut body = step.encode_records();
    body.resize(body.len() + rows * SPEC.hidden as usize * size_of::<f32>(), 0);
    raw(FrameKind::Step, &step.header, body)
}

fn changed(generation: u64, change: impl FnOnce(&mut Step)) -> Step {
    let mut step = step(generation, 1);
    change(&mut step);
    step
}

/// What a neighbour of this generation may send, and words of what the shard says to it.
fn nonsense(g: u64) -> Vec<(&'static str, Vec<Raw>)> {
    let opened = |then: Raw| vec![raw_open(&open(g, 3)), then];
    let first = StepId(0);
    let none = Samples { generation: Generation(g), step: first, samples: vec![], vectors: vec![] };
    let close = CloseHeader { generation: g, sequence: 1 };
    let mark = TraceMark { trace: TraceId(1), span: SpanId(2) };
    let of = |generation, sequence| {
        TraceHeader::of_sequence(mark, Generation(generation), SequenceId(sequence))
    };
    let trace = |header: TraceHeader, body| raw(FrameKind::Trace, &header, body);
    let mut not_finite = raw_step(&step(g, 1), 1);
    let payload = not_finite.2.len() - SPEC.hidden as usize * size_of::<f32>();
    not_finite.2[payload..payload + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    vec![
        ("a frame of", vec![raw_open(&open(g + 1, 3))]),
        ("not open at this stage", vec![raw_step(&step(g, 1), 1)]),
        ("not open at this stage", vec![raw(FrameKind::Close, &close, vec![])]),
        ("already open", opened(raw_open(&open(g, 3)))),
        ("at most 1064 is", vec![raw_open(&open(g, LIMITS.context_max + 1))]),
        ("bytes follow from the plan", opened(raw_step(&step(g, 2), 1))),
        ("bytes follow from the plan", opened(raw_step(&step(g, 1), 2))),
        ("rows", opened(raw_step(&step(g, LIMITS.step_rows_max + 1), 0))),
        ("grants", opened(raw_step(&changed(g, |s| s.header.grants = u32::MAX), 1))),
        ("sample", opened(raw_step(&changed(g, |s| s.header.samples = 1), 1))),
        ("block 9999", opened(raw_step(&changed(g, |s| s.grants[0].block = 9999), 1))),
        ("position", opened(raw_step(&changed(g, |s| s.rows[0].position = 7), 1))),
        ("Open, Trace, Step or Close", opened(raw(FrameKind::LinkHello, &hello(g), vec![]))),
        ("Open, Trace, Step or Close", opened(raw(FrameKind::Samples, &none.encode().0, vec![]))),
        ("3 long", opened(raw(FrameKind::Close, &close, vec![1, 2, 3]))),
        ("a frame of", opened(trace(of(g + 1, 1), vec![]))),
        ("not open at this stage", opened(trace(of(g, 9), vec![]))),
        ("not open at this stage", vec![trace(of(g, 1), vec![])]),
        ("3 long", opened(trace(of(g, 1), vec![1, 2, 3]))),
        ("TraceHeader", opened(Raw(FrameKind::Trace, vec![0; 7], vec![]))),
        ("StepHeader", opened(Raw(FrameKind::Step, vec![0; 7], vec![0; 7]))),
        ("no pretend activations", opened(not_finite)),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_fails_the_shard_with_words_and_never_the_process() {
    let cluster = Cluster::new();
    let mut worker = cluster.worker(2).await;
    let w1 = cluster.endpoint(W1, &[]);
    for case in 0..nonsense(0).len() {
        // Each time in a new generation, as after any failure.
        let generation = case as u64 + 1;
        let (words, frames) = nonsense(generation).swap_remove(case);
        assign_middle(&worker, generation).await;
        let (_connection, mut sender) = link(&w1, &worker, generation).await;
        for Raw(kind, header, body) in frames {
            sender.send_encoded(kind, &header, body).await.unwrap();
        }
        let report = worker
            .until_state(generation, words, |state| matches!(state, ShardState::Failed(_)))
            .await;
        let shard = report.shards.iter().find(|s| s.generation.0 == generation).unwrap();
        let ShardState::Failed(error) = &shard.state else { unreachable!("it has failed") };
        assert!(error.message.contains(words), "case {case}: {words:?} not in {error}");
        let codes = [ErrorCode::ProtocolViolation, ErrorCode::ComputeFailed];
        assert!(codes.contains(&error.code), "case {case}: {:?}", error.code);
    }
}

/// One end of a ring of two that the test drives itself.
struct End {
    _links: Links,
    _attached: Attached,
    frames: mpsc::Sender<LinkFrame>,
    inputs: mpsc::Receiver<StageInput>,
    events: mpsc::Receiver<LinkEvent>,
    received_into: BufferPool,
}

fn ends(cluster: &Cluster) -> [End; 2] {
    let links =
        [W1, W2].map(|node| Links::start(loopback(), Arc::new(cluster.identity(node))).unwrap());
    let peers = [0, 1].map(|i| PeerAddress { node: [W1, W2][i], activations: links[i].address() });
    let plan = layout(1, &[W1, W2]);
    let mut stage = 0;
    links.map(|links| {
        let assignment = assignment(&plan, stage, &peers);
        stage += 1;
        let hidden = SPEC.hidden as usize;
        let pool = BufferPool::new(hidden, LIMITS.step_rows_max as usize, 4);
        let (to, inputs) = mpsc::channel(4);
        let (frames, outlet) = mpsc::channel(4);
        let (outlets, siblings) = (vec![outlet], Vec::new());
        let (events_to, events) = mpsc::channel(4);
        let takes = Takes::Hidden { width: hidden, pool: pool.clone() };
        let inlet = Inlet::Stage { takes, to };
        let counters = Default::default();
        let ends = LinkEnds {
            inlet,
            outlets,
            siblings,
            events: events_to,
            counters,
            work: watch::channel(0).1,
        };
        let ring = LinkPlan::of(&assignment).unwrap().unwrap();
        let attached = links.attach(ring, ends);
        End { _links: links, _attached: attached, frames, inputs, events, received_into: pool }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn hidden_states_travel_in_buffers_that_are_used_again() {
    let cluster = Cluster::new();
    let [mut first, mut second] = ends(&cluster);
    for end in [&mut first, &mut second] {
        for _ in 0..2 {
            assert!(!matches!(within(end.events.recv()).await.unwrap(), LinkEvent::Lost(_)));
        }
    }
    let pool = BufferPool::new(SPEC.hidden as usize, LIMITS.step_rows_max as usize, 4);
    const ROUNDS: u32 = 200;
    for round in 0..ROUNDS {
        let rows = 1 + round % 3;
        let mut buffer = pool.take(rows as usize);
        buffer.floats_mut().iter_mut().zip(0..).for_each(|(x, i)| *x = (round * 1000 + i) as f32);
        let step = step(1, rows);
        let (header, records) = (step.header, records_of(&step));
        let payload = buffer.into_bytes();
        let ready = std::time::Instant::now();
        first.frames.send(LinkFrame::Step { header, records, payload, ready }).await.unwrap();
        let StageInput::Step { step: received, data: StepData::Hidden(hidden), .. } =
            within(second.inputs.recv()).await.unwrap()
        else {
            panic!("not a step with hidden states")
        };
        assert_eq!(received, step);
        assert_eq!(hidden.floats().as_ptr() as usize % ALIGNMENT, 0);
        let expected = (0..rows * SPEC.hidden).map(|i| (round * 1000 + i) as f32);
        assert!(hidden.floats().iter().copied().eq(expected), "round {round}");
    }
    // Sent ones come back once they are acknowledged, which takes a busy machine some steps; received ones when
    // they are dropped.
    for (pool, most) in [(&pool, u64::from(ROUNDS / 8)), (&second.received_into, 8)] {
        assert!(pool.allocations() <= most, "{} buffers for {ROUNDS} steps", pool.allocations());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_whose_neighbour_leaves_says_who() {
    let cluster = Cluster::new();
    let mut worker = middle_stage(&cluster).await;
    let (connection, sender) = link(&cluster.endpoint(W1, &[]), &worker, 1).await;
    drop(sender);
    connection.close(7, "just so");
    let report =
        worker.until_state(1, "failed", |state| matches!(state, ShardState::Failed(_))).await;
    let ShardState::Failed(error) = &report.shards[0].state else { unreachable!("it has failed") };
    assert_eq!(error.code, ErrorCode::WorkerLost);
    for words in ["w1", "stage 0", "just so"] {
        assert!(error.message.contains(words), "{words:?} is not in {error}");
    }
}

/// Two ranks of one stage, of which each may want to meet the other beside their link.
fn rank_ends(
    cluster: &Cluster,
    apart: [bool; 2],
) -> [(Ranks, Links, Attached, mpsc::Receiver<LinkEvent>); 2] {
    let mut number = 0;
    let links = apart.map(|apart| {
        number += 1;
        let identity = Arc::new(cluster.identity(NodeId::worker(number)));
        let links = Links::start(loopback(), identity).unwrap();
        if apart { links.apart() } else { links }
    });
    let peers = [0, 1].map(|i| PeerAddress { node: [W1, W2][i], activations: links[i].address() });
    let plan = mesh_of(SPEC, 1, &[W1, W2], &[2]);
    let mut rank = 0;
    links.map(|links| {
        let assignment = Assignment { rank: RankIndex(rank), ..assignment(&plan, 0, &peers) };
        rank += 1;
        let ring = LinkPlan::of(&assignment).unwrap().unwrap();
        let (ranks, siblings) = Ranks::new(ring.split, 64);
        let (to, _inputs) = mpsc::channel(1);
        let (events, heard) = mpsc::channel(4);
        let ends = LinkEnds {
            inlet: Inlet::Stage { takes: Takes::Tokens, to },
            outlets: ring.mirrors.iter().map(|_| mpsc::channel(1).1).collect(),
            siblings,
            events,
            counters: Default::default(),
            work: watch::channel(1).1,
        };
        let attached = links.attach(ring, ends);
        (ranks, links, attached, heard)
    })
}

/// They meet where both want to; a round is the same either way, and the loss of one ends the other's wait.
#[tokio::test(flavor = "multi_thread")]
async fn ranks_of_one_machine_meet_at_a_socket_where_both_want_to() {
    for apart in [[false, false], [true, false], [false, true], [true, true]] {
        let cluster = Cluster::new();
        let expected = usize::from(apart == [false, false]);
        let [mut first, mut second] = rank_ends(&cluster, apart);
        for events in [&mut first.3, &mut second.3] {
            for _ in 0..2 {
                assert_eq!(within(events.recv()).await, Some(LinkEvent::Up), "{apart:?}");
            }
        }
        let (mut ranks, _links, _attached, mut events) = first;
        let other = tokio::task::spawn_blocking(move || {
            let got = second.0.exchange(&[Bytes::from_static(b"to 0"), Bytes::new()]);
            assert_eq!(got, Ok(vec![Bytes::from_static(b"to 1"), Bytes::new()]));
            assert_eq!(second.0.beside(), expected);
            // Its links go with it.
        });
        let waits = tokio::task::spawn_blocking(move || {
            let got = ranks.exchange(&[Bytes::new(), Bytes::from_static(b"to 1")]);
            assert_eq!(got, Ok(vec![Bytes::new(), Bytes::from_static(b"to 0")]));
            assert_eq!(ranks.beside(), expected);
            ranks.exchange(&[Bytes::new(), Bytes::from_static(b"more")]).unwrap_err()
        });
        within(other).await.unwrap();
        let lost = within(events.recv()).await;
        assert!(matches!(&lost, Some(LinkEvent::Lost(lost)) if !lost.violation), "{lost:?}");
        let error = within(waits).await.unwrap();
        assert!(matches!(error, CollectiveError::Gone { rank: 1, .. }), "{error}");
    }
}
