//! A cluster in one process: real workers, real QUIC on loopback, and a coordinator that is played by
//! the test.

#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod relay;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use shoal_protocol::adapters::HeldAdapters;
use shoal_protocol::control::{
    CoordinatorAddress, CoordinatorMessage, MESSAGE_LEN_MAX, Register, Report, ShardState,
    WorkerMessage,
};
use shoal_protocol::id::{
    Attempt, DeploymentName, Generation, NodeId, RankIndex, ReplicaId, RequestId, StageIndex,
    TokenId,
};
use shoal_protocol::plan::{
    Assignment, ModelRef, ModelSource, Numerics, PeerAddress, Precision, PretendSpec,
    ReplicaLimits, ReplicaPlan, ShardPlan, StagePlan,
};
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_protocol::quic::{
    Alpn, Connection, Endpoint, Expect, FrameReceiver, FrameSender, Identity,
};
use shoal_protocol::request::{Generate, HeadEvent, SamplingRecord};
use shoal_protocol::units::{Bytes, LayerRange};
use shoal_protocol::version::VersionRange;
use shoal_shard_worker::model::pretend::Oracle;
use shoal_shard_worker::{DrainHandle, Worker, WorkerConfig};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// Nothing on loopback takes so long; a test that waits longer has failed.
pub const PATIENCE: Duration = Duration::from_secs(5);

pub const REPLICA: ReplicaId = ReplicaId(7);

pub const SPEC: PretendSpec = PretendSpec {
    layers: 6,
    hidden: 48,
    vocab: 997,
    max_context: 256,
    seed: 42,
    layer_step_ns: 0,
    layer_row_ns: 0,
    layer_weight_bytes: 1000,
};

pub const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: 64,
    context_max: 256,
    step_rows_max: 16,
    sequences_max: 8,
    steps_in_flight_max: 4,
};

pub struct TestWorker {
    pub register: Register,
    pub to: mpsc::Sender<CoordinatorMessage>,
    pub said: watch::Receiver<Said>,
    pub drain: DrainHandle,
    pub task: JoinHandle<Option<String>>,
    pub data: Arc<TempDir>,
}

/// What a worker has said so far.
#[derive(Clone, Debug, Default)]
pub struct Said {
    pub report: Report,
    pub probed: Vec<WorkerMessage>,
    pub registrations: u32,
    /// The epochs that outranked what it was told.
    pub outranked: Vec<u64>,
    /// What it asked certificates for.
    pub renewals: Vec<Vec<u8>>,
    /// The CA of the certificate that it shows, as it says.
    pub shows: Option<[u8; 32]>,
    /// Which adapters its shards have.
    pub adapters: Vec<HeldAdapters>,
}

pub struct Cluster {
    pub ca: CertificateAuthority,
    pub coordinator: Endpoint,
    /// Whether its workers act as if each had a machine of its own.
    pub ranks_apart: bool,
}

impl Cluster {
    pub fn new() -> Self {
        let ca = CertificateAuthority::create(SystemTime::now()).unwrap();
        let coordinator = endpoint(&ca, NodeId::coordinator(1), &[Alpn::Control]);
        Self { ca, coordinator, ranks_apart: false }
    }

    pub fn identity(&self, node: NodeId) -> Identity {
        self.ca.issue_identity(node, SystemTime::now()).unwrap()
    }

    /// An endpoint that acts as this node.
    pub fn endpoint(&self, node: NodeId, accepts: &[Alpn]) -> Endpoint {
        endpoint(&self.ca, node, accepts)
    }

    /// Starts w`number` and waits until it has registered.
    pub async fn worker(&self, number: u32) -> TestWorker {
        let data = Arc::new(TempDir::new().unwrap());
        self.identity(NodeId::worker(number)).save(&data.path().join("identity")).unwrap();
        self.worker_in(data, Bytes::mib(100)).await
    }

    pub async fn worker_in(&self, data: Arc<TempDir>, memory: Bytes) -> TestWorker {
        let config = WorkerConfig {
            join: vec![self.coordinator.local_address()],
            token: None,
            addresses: Default::default(),
            data: data.path().to_owned(),
            memory: Some(memory),
            threads: std::num::NonZeroUsize::new(1),
            cpus: Default::default(),
            device: "cpu".to_owned(),
            builtin: Vec::new(),
            zone: None,
            ranks_apart: self.ranks_apart,
            tracer: shoal_protocol::trace::Tracer::off(),
        };
        let worker = Worker::start(config).await.unwrap();
        let drain = worker.drain_handle();
        let task = tokio::spawn(worker.run_until_drained());
        let (register, to, said) = welcome(&self.coordinator).await;
        TestWorker { register, to, said, drain, task, data }
    }
}

fn endpoint(ca: &CertificateAuthority, node: NodeId, accepts: &[Alpn]) -> Endpoint {
    let identity = Arc::new(ca.issue_identity(node, SystemTime::now()).unwrap());
    Endpoint::bind("127.0.0.1:0".parse().unwrap(), identity, accepts).unwrap()
}

/// Takes the next worker that registers.
pub async fn welcome(
    coordinator: &Endpoint,
) -> (Register, mpsc::Sender<CoordinatorMessage>, watch::Receiver<Said>) {
    welcome_with(coordinator, Vec::new()).await
}

/// Takes the next worker that registers, and names these coordinators to it.
pub async fn welcome_with(
    coordinator: &Endpoint,
    coordinators: Vec<CoordinatorAddress>,
) -> (Register, mpsc::Sender<CoordinatorMessage>, watch::Receiver<Said>) {
    let (connection, (mut sender, mut receiver)) = loop {
        let accepting = within(coordinator.accept()).await.unwrap();
        // A worker that a test has ended may have been about to come back, and one that dials two of a
        // coordinator's addresses at once hangs up the second time.
        let Ok(connection) = within(accepting.establish()).await else { continue };
        if let Ok(stream) = within(connection.accept_bi()).await {
            break (connection, stream);
        }
    };
    let first = within(receiver.message(MESSAGE_LEN_MAX)).await.unwrap();
    let Some(WorkerMessage::Register(register)) = first else { panic!("{first:?}") };
    assert_eq!(Some(register.node), connection.peer());
    let version = VersionRange::OURS.max;
    let welcome = CoordinatorMessage::Welcome { version, coordinators };
    sender.send_message(&welcome, MESSAGE_LEN_MAX).await.unwrap();
    let (to, mut orders) = mpsc::channel(16);
    let (said_to, said) = watch::channel(Said::default());
    tokio::spawn(async move {
        while let Some(order) = orders.recv().await {
            if sender.send_message(&order, MESSAGE_LEN_MAX).await.is_err() {
                return;
            }
        }
        // The conversation lasts as long as the test holds its sender.
        connection.close(0, "the test has ended");
    });
    tokio::spawn(async move {
        while let Ok(Some(message)) = receiver.message(MESSAGE_LEN_MAX).await {
            said_to.send_modify(|said| match message {
                WorkerMessage::Report(report) => said.report = report,
                WorkerMessage::Probed { .. } => said.probed.push(message),
                WorkerMessage::Register(_) => said.registrations += 1,
                WorkerMessage::Renew { csr } => said.renewals.push(csr),
                WorkerMessage::Trusts { shows, .. } => said.shows = Some(shows),
                WorkerMessage::Outranked { epoch } => said.outranked.push(epoch),
                WorkerMessage::Facts(_) => {}
                // These workers serve no model that is fetched.
                WorkerMessage::Blobs { .. } => {}
                WorkerMessage::Adapters(held) => said.adapters = held,
                WorkerMessage::Prefixes(_) => {}
            });
        }
    });
    (register, to, said)
}

impl TestWorker {
    pub fn node(&self) -> NodeId {
        self.register.node
    }

    pub fn peer(&self) -> PeerAddress {
        PeerAddress { node: self.node(), activations: self.register.activations }
    }

    pub async fn assign(&self, assignments: Vec<Assignment>) {
        self.to.send(CoordinatorMessage::Assign { epoch: 1, assignments }).await.unwrap();
    }

    /// Waits for a report of which this holds.
    pub async fn until(&mut self, what: &str, holds: impl Fn(&Report) -> bool) -> Report {
        let mut said = self.said.clone();
        let waited = tokio::time::timeout(PATIENCE, said.wait_for(|s| holds(&s.report))).await;
        match waited {
            Ok(said) => said.unwrap().report.clone(),
            Err(_) => panic!("{} never: {what}; {:?}", self.register.node, self.said.borrow()),
        }
    }

    /// Waits until the shard of this generation is in such a state.
    pub async fn until_state(
        &mut self,
        generation: u64,
        what: &str,
        holds: impl Fn(&ShardState) -> bool,
    ) -> Report {
        self.until(what, |report| {
            report.shards.iter().any(|s| s.generation.0 == generation && holds(&s.state))
        })
        .await
    }

    pub async fn until_ready(&mut self, generation: u64) {
        self.until_state(generation, "ready", |state| *state == ShardState::Ready).await;
    }
}

/// A layout of `SPEC` over these workers, one stage each, as evenly as it goes.
pub fn layout(generation: u64, nodes: &[NodeId]) -> ReplicaPlan {
    layout_of(SPEC, generation, nodes)
}

pub fn layout_of(spec: PretendSpec, generation: u64, nodes: &[NodeId]) -> ReplicaPlan {
    mesh_of(spec, generation, nodes, &vec![1; nodes.len()])
}

/// The same where stage `i` has `ranks[i]` ranks; the nodes stand in mesh order.
pub fn mesh_of(spec: PretendSpec, generation: u64, nodes: &[NodeId], ranks: &[u32]) -> ReplicaPlan {
    let count = ranks.len() as u32;
    let mut nodes = nodes.iter().copied();
    let stages = (0..count).map(|i| {
        let layers = LayerRange::new(i * spec.layers / count, (i + 1) * spec.layers / count);
        let memory = spec.shard_memory(layers, &LIMITS);
        let shard = |rank| ShardPlan {
            rank: RankIndex(rank),
            node: nodes.next().unwrap(),
            device: "cpu".to_owned(),
            memory,
        };
        StagePlan { layers, shards: (0..ranks[i as usize]).map(shard).collect() }
    });
    ReplicaPlan {
        id: REPLICA,
        deployment: DeploymentName::new("demo").unwrap(),
        generation: Generation(generation),
        model: ModelRef {
            source: ModelSource::Pretend(spec.clone()),
            fingerprint: spec.fingerprint(),
        },
        precision: Precision::F32,
        numerics: Numerics::N1,
        stages: stages.collect(),
        limits: LIMITS,
    }
}

pub fn assignment(plan: &ReplicaPlan, stage: u32, peers: &[PeerAddress]) -> Assignment {
    Assignment {
        replica: plan.clone(),
        stage: StageIndex(stage),
        rank: RankIndex(0),
        peers: peers.to_vec(),
    }
}

/// Gives each worker its stage, and waits until all are ready.
pub async fn deploy(plan: &ReplicaPlan, workers: &mut [TestWorker]) {
    let peers: Vec<_> = workers.iter().map(TestWorker::peer).collect();
    deploy_at(plan, workers, &peers).await;
}

pub async fn deploy_at(plan: &ReplicaPlan, workers: &mut [TestWorker], peers: &[PeerAddress]) {
    let places = plan.stages.iter().enumerate();
    let places =
        places.flat_map(|(stage, s)| s.shards.iter().map(move |shard| (stage, shard.rank)));
    for ((stage, rank), worker) in places.zip(workers.iter()) {
        let assignment = assignment(plan, stage as u32, peers);
        worker.assign(vec![Assignment { rank, ..assignment }]).await;
    }
    for worker in workers {
        worker.until_ready(plan.generation.0).await;
    }
}

/// A coordinator's connection to a head.
pub async fn dial_head(cluster: &Cluster, worker: &TestWorker) -> Connection {
    let expect = Expect::Node(worker.node());
    let address = worker.register.requests;
    cluster.coordinator.connect(address, expect, Alpn::Requests, PATIENCE).await.unwrap()
}

pub fn request(prompt: &[TokenId], max_tokens: u32) -> Generate {
    Generate {
        request: RequestId(u64::from(prompt[0])),
        attempt: Attempt(1),
        choice: 0,
        replica: REPLICA,
        deadline_ms: 0,
        prompt_len: prompt.len() as u32,
        max_tokens,
        adapter: None,
        sampling: SamplingRecord::GREEDY,
        stop_tokens: Vec::new(),
        tokens: prompt.to_vec(),
    }
}

/// One stream to a head.
pub struct Stream {
    pub sender: FrameSender,
    pub receiver: FrameReceiver,
}

impl Stream {
    pub async fn open(connection: &Connection, request: &Generate) -> Self {
        let (mut sender, receiver) = within(connection.open_bi()).await.unwrap();
        let (header, body) = request.encode();
        let kind = shoal_protocol::frame::FrameKind::Generate;
        sender.send(kind, &header, body.into(), Default::default()).await.unwrap();
        Self { sender, receiver }
    }

    pub async fn next(&mut self) -> Option<HeadEvent> {
        let head = within(self.receiver.next()).await.unwrap()?;
        let body = within(self.receiver.body(&head, 1 << 16)).await.unwrap();
        Some(HeadEvent::decode(head.kind, head.header(), &body).unwrap())
    }

    /// The tokens up to the end, and what ended them.
    pub async fn finish(mut self) -> (Vec<TokenId>, HeadEvent) {
        let mut tokens = Vec::new();
        loop {
            match self.next().await.expect("the stream ended without a last event") {
                HeadEvent::Token { header, .. } => {
                    assert_eq!(header.index as usize, tokens.len());
                    tokens.push(header.token);
                }
                last => {
                    assert!(self.next().await.is_none(), "something behind {last:?}");
                    return (tokens, last);
                }
            }
        }
    }
}

/// What a pretend model says after this prompt.
pub fn continuation(spec: &PretendSpec, prompt: &[TokenId], count: usize) -> Vec<TokenId> {
    let mut oracle = Oracle::new(spec);
    let mut next = 0;
    for &token in prompt {
        next = oracle.push(token);
    }
    let mut tokens = vec![next];
    while tokens.len() < count {
        next = oracle.push(next);
        tokens.push(next);
    }
    tokens
}

pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it took too long")
}

pub fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}
