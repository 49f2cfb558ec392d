//! A coordinator on loopback, an operator, and workers that speak `shoal-ctl` and compute nothing.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shoal_coordinator::config::{CoordinatorConfig, StoreConfig};
use shoal_coordinator::{Coordinator, StartError};
use shoal_protocol::admin::{AdminCall, AdminReply, AdminRequest, ClusterView, DeploymentView};
use shoal_protocol::control::{
    CoordinatorMessage, DeviceInfo, Register, Report, ShardCounters, ShardReport, ShardState,
    WorkerMessage,
};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{DeploymentName, Generation, Incarnation, NodeId, Role};
use shoal_protocol::join::JoinToken;
use shoal_protocol::mesh::Fact;
use shoal_protocol::plan::{Assignment, ModelSource, Numerics, PretendSpec};
use shoal_protocol::quic::join::{JoinError, join};
use shoal_protocol::quic::{AdminContext, Alpn, Connection, Endpoint, Expect, Identity};
use shoal_protocol::units::Bytes;
use shoal_protocol::version::VersionRange;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Every wait of a test: far longer than anything here takes.
pub const DEADLINE: Duration = Duration::from_secs(10);

pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} took longer than {DEADLINE:?}"),
    }
}

pub fn config(data: &Path) -> CoordinatorConfig {
    let any: SocketAddr = ([127, 0, 0, 1], 0).into();
    CoordinatorConfig {
        data: data.to_owned(),
        store: StoreConfig::Raft,
        listen: any,
        tls: None,
        cluster: any,
        advertise: None,
        join: Vec::new(),
        token: None,
        builtin: Vec::new(),
        policy: Default::default(),
        tracer: shoal_protocol::trace::Tracer::off(),
        prefix_affinity: false,
        runtime_adapters: false,
    }
}

pub async fn start(config: CoordinatorConfig) -> Result<Coordinator, StartError> {
    within("the start", Coordinator::start(config)).await
}

/// Who holds an admin certificate.
pub struct Operator {
    endpoint: Endpoint,
    address: SocketAddr,
}

impl Operator {
    pub fn of(coordinator: &Coordinator) -> Self {
        let context = AdminContext::load(coordinator.admin_context()).unwrap().unwrap();
        Self { endpoint: endpoint(context.identity), address: context.address }
    }

    pub async fn call(&self, call: AdminCall) -> AdminReply {
        within("the call", self.call_slowly(call)).await
    }

    /// A call that may take longer than `DEADLINE`.
    pub async fn call_slowly(&self, call: AdminCall) -> AdminReply {
        let expect = Expect::Role(Role::Coordinator);
        let connection =
            self.endpoint.connect(self.address, expect, Alpn::Admin, DEADLINE).await.unwrap();
        let (mut sender, mut receiver) = connection.open_bi().await.unwrap();
        let request = AdminRequest { versions: VersionRange::OURS, call };
        let max = shoal_protocol::admin::MESSAGE_LEN_MAX;
        sender.send_message(&request, max).await.unwrap();
        sender.finish();
        receiver.message(max).await.unwrap().unwrap()
    }

    pub async fn token(&self, role: Role, uses: u32, expires_s: u64) -> JoinToken {
        match self.call(AdminCall::CreateToken { role, uses, expires_s }).await {
            AdminReply::Token { token } => token.parse().unwrap(),
            other => panic!("no token: {other:?}"),
        }
    }

    pub async fn deploy(&self, name: &str, source: ModelSource, stages: Option<u32>) -> AdminReply {
        let name = DeploymentName::new(name).unwrap();
        let call = AdminCall::Deploy { name, source, stages, precision: None, replicas: 1 };
        self.call(call).await
    }
}

pub fn refusal(reply: AdminReply) -> WireError {
    match reply {
        AdminReply::Refused(error) => error,
        other => panic!("not refused: {other:?}"),
    }
}

/// Waits until the coordinator shows a cluster of which `is_it` holds.
pub async fn until(
    coordinator: &Coordinator,
    what: &str,
    is_it: impl Fn(&ClusterView) -> bool,
) -> Arc<ClusterView> {
    let mut view = coordinator.watch();
    let found = tokio::time::timeout(DEADLINE, view.wait_for(|view| is_it(view))).await;
    match found {
        Ok(found) => Arc::clone(&found.unwrap()),
        Err(_) => panic!("never {what}: {:#?}", coordinator.view()),
    }
}

pub fn deployment<'a>(view: &'a ClusterView, name: &str) -> Option<&'a DeploymentView> {
    view.deployments.iter().find(|deployment| deployment.name.as_str() == name)
}

pub fn endpoint(identity: Identity) -> Endpoint {
    Endpoint::bind(([127, 0, 0, 1], 0).into(), Arc::new(identity), &[]).unwrap()
}

pub async fn try_join(address: SocketAddr, token: &JoinToken) -> Result<Identity, JoinError> {
    within("the join", join(address, token, DEADLINE)).await
}

/// 6 layers of 100 MiB.
pub fn pretend() -> PretendSpec {
    PretendSpec {
        layers: 6,
        hidden: 64,
        vocab: 256,
        max_context: 512,
        seed: 7,
        layer_step_ns: 0,
        layer_row_ns: 0,
        layer_weight_bytes: 100 << 20,
    }
}

/// How a worker is.
#[derive(Clone)]
pub struct Manners {
    pub incarnation: u64,
    pub memory: Bytes,
    pub versions: VersionRange,
    /// What it registers as, where that is not what its certificate says.
    pub poses_as: Option<NodeId>,
    /// What it says of every model.
    pub cannot_read: Option<WireError>,
    /// What it asks a certificate for.
    pub renew: Option<Vec<u8>>,
    /// The newest generation that it has seen: it refuses what is not newer.
    pub seen: Generation,
    /// What it says of itself besides.
    pub facts: Vec<Fact>,
}

impl Default for Manners {
    fn default() -> Self {
        Self {
            incarnation: 1,
            memory: Bytes::mib(420),
            versions: VersionRange::OURS,
            poses_as: None,
            cannot_read: None,
            renew: None,
            seen: Generation(0),
            facts: Vec::new(),
        }
    }
}

/// A worker that does as it is told and says at once that it is ready.
pub struct FakeWorker {
    pub node: NodeId,
    pub told: watch::Receiver<Option<Vec<Assignment>>>,
    /// The certificate that it asked for.
    pub renewed: watch::Receiver<Option<Vec<u8>>>,
    endpoint: Endpoint,
    task: JoinHandle<()>,
}

impl FakeWorker {
    /// Connects; what the coordinator says where it refuses.
    pub async fn connect(
        address: SocketAddr,
        identity: &Identity,
        manners: Manners,
    ) -> Result<Self, WireError> {
        let endpoint = endpoint(identity.clone());
        let expect = Expect::Role(Role::Coordinator);
        let connection = endpoint.connect(address, expect, Alpn::Control, DEADLINE).await.unwrap();
        let (told_sender, told) = watch::channel(None);
        let (renewed_sender, renewed) = watch::channel(None);
        let (ready, welcome) = tokio::sync::oneshot::channel();
        let worker = Talk {
            register: register(identity, &endpoint, &manners),
            manners,
            connection,
            told: told_sender,
            renewed: renewed_sender,
        };
        let ready = Mutex::new(Some(ready));
        let task = tokio::spawn(async move {
            worker
                .run(|result| {
                    if let Some(ready) = ready.lock().unwrap().take() {
                        let _ = ready.send(result);
                    }
                })
                .await;
        });
        let node = identity.node;
        within("the welcome", welcome).await.unwrap()?;
        Ok(Self { node, told, renewed, endpoint, task })
    }

    /// Waits until it has been told something of which `is_it` holds.
    pub async fn until_told(&mut self, is_it: impl Fn(&[Assignment]) -> bool) -> Vec<Assignment> {
        let told = self.told.wait_for(|told| told.as_deref().is_some_and(&is_it));
        within("being told", told).await.unwrap().clone().unwrap()
    }

    /// Waits until the coordinator has ended its link.
    pub async fn gone(&mut self) {
        (&mut self.task).await.unwrap();
    }

    pub fn die(self) {
        self.task.abort();
        self.endpoint.close(1, "died");
    }
}

pub fn register(identity: &Identity, endpoint: &Endpoint, manners: &Manners) -> Register {
    Register {
        versions: manners.versions,
        build: "test".into(),
        node: manners.poses_as.unwrap_or(identity.node),
        incarnation: Incarnation(manners.incarnation),
        pid: 1,
        requests: endpoint.local_address(),
        activations: endpoint.local_address(),
        devices: vec![DeviceInfo {
            name: "cpu".into(),
            description: "a test".into(),
            memory: manners.memory,
            threads: 1,
        }],
        numerics: vec![Numerics::N1],
    }
}

struct Talk {
    register: Register,
    manners: Manners,
    connection: Connection,
    told: watch::Sender<Option<Vec<Assignment>>>,
    renewed: watch::Sender<Option<Vec<u8>>>,
}

impl Talk {
    async fn run(self, welcomed: impl Fn(Result<(), WireError>)) {
        let max = shoal_protocol::control::MESSAGE_LEN_MAX;
        let (mut sender, mut receiver) = self.connection.open_bi().await.unwrap();
        sender.send_message(&WorkerMessage::Register(self.register), max).await.unwrap();
        while let Ok(Some(message)) = receiver.message(max).await {
            let answer = match message {
                CoordinatorMessage::Welcome { .. } => {
                    welcomed(Ok(()));
                    match (&self.manners.renew, &self.manners.facts) {
                        (Some(csr), _) => WorkerMessage::Renew { csr: csr.clone() },
                        (None, facts) if !facts.is_empty() => WorkerMessage::Facts(facts.clone()),
                        _ => continue,
                    }
                }
                CoordinatorMessage::Refused(error) => {
                    welcomed(Err(error));
                    return;
                }
                CoordinatorMessage::Assign { assignments, .. } => {
                    let answer = |assignment| answer(assignment, self.manners.seen);
                    let shards = assignments.iter().map(answer).collect();
                    self.told.send_replace(Some(assignments));
                    WorkerMessage::Report(Report { shards, heads: Vec::new() })
                }
                CoordinatorMessage::Probe { probe, source } => {
                    let result = match (&self.manners.cannot_read, source) {
                        (Some(error), _) => Err(error.clone()),
                        (None, ModelSource::Pretend(spec)) => Ok(spec.fingerprint()),
                        (None, _) => Ok([0; 32]),
                    };
                    WorkerMessage::Probed { probe, result }
                }
                CoordinatorMessage::Drain { .. } => return,
                CoordinatorMessage::Coordinators(_)
                | CoordinatorMessage::Blobs(_)
                | CoordinatorMessage::Adapters(_) => continue,
                // Its certificate stays what it is; what it says of it is what it was told.
                CoordinatorMessage::Trust { trust, .. } => {
                    let shows = trust.signing().unwrap();
                    WorkerMessage::Trusts { trusts: trust.fingerprints(), shows }
                }
                CoordinatorMessage::Renewed { certificate } => {
                    self.renewed.send_replace(Some(certificate));
                    continue;
                }
            };
            if sender.send_message(&answer, max).await.is_err() {
                return;
            }
        }
    }
}

fn answer(assignment: &Assignment, seen: Generation) -> ShardReport {
    let generation = assignment.replica.generation;
    let state = match generation > seen {
        true => ShardState::Ready,
        false => ShardState::Failed(WireError::new(ErrorCode::StaleGeneration, "it is old")),
    };
    let stage = &assignment.replica.stages[assignment.stage.0 as usize];
    ShardReport {
        replica: assignment.replica.id,
        generation: generation.max(seen),
        stage: assignment.stage,
        state,
        memory: stage.shards[0].memory,
        counters: ShardCounters::default(),
    }
}
