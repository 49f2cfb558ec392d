//! A coordinator's request plane, a head, and deployments `demo` (text) and `org/pretend` (ids).

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use shoal_coordinator::api::tls::Tls;
use shoal_coordinator::api::tokenize::ModelText;
use shoal_coordinator::api::{ApiContext, Gate, Limits, serve};
use shoal_coordinator::dispatch::Dispatcher;
use shoal_coordinator::serving::{ServedDeployment, ServedReplica, ServingTable};
use shoal_coordinator::telemetry::Telemetry;
use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::control::HeadReport;
use shoal_protocol::id::{DeploymentName, Generation, NodeId, ReplicaId, TokenId};
use shoal_protocol::quic::Endpoint;
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_protocol::trace::Tracer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::head::{End, Head, Script};

/// The context of both deployments, in tokens.
pub const CONTEXT: u32 = 256;

pub struct Setup {
    pub http: SocketAddr,
    pub head: Head,
    pub table: watch::Sender<Arc<ServingTable>>,
    pub draining: watch::Sender<bool>,
    pub text: ModelText,
    pub server: JoinHandle<()>,
    ca: CertificateAuthority,
}

fn demo_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../cluster/demo-model")
}

fn deployment(name: &str, folder: Option<PathBuf>, head: SocketAddr) -> ServedDeployment {
    let (id, head_node) = (ReplicaId(1), NodeId::worker(1));
    ServedDeployment {
        name: DeploymentName::new(name).expect("a name"),
        created: 1_700_000_000,
        folder,
        vocab: 512,
        context_max: CONTEXT,
        kind: shoal_coordinator::serving::ServedKind::Generate,
        adapter: None,
        replicas: vec![ServedReplica {
            id,
            generation: Generation(1),
            head: head_node,
            requests: Some(head),
            ready: true,
            load: Some(HeadReport { replica: id, blocks_total: 10, ..HeadReport::default() }),
        }],
        reason: String::new(),
        phase: DeploymentPhase::Ready,
    }
}

impl Setup {
    pub async fn new() -> Self {
        Self::with(Limits::default()).await
    }

    pub async fn with(limits: Limits) -> Self {
        Self::behind(limits, Gate::without_keys()).await
    }

    pub async fn behind(limits: Limits, gate: Gate) -> Self {
        Self::over(limits, gate, None).await
    }

    pub async fn over(limits: Limits, gate: Gate, tls: Option<Arc<Tls>>) -> Self {
        Self::build(limits, gate, tls, |context| context).await
    }

    pub async fn tracing(tracer: Tracer) -> Self {
        Self::build(Limits::default(), Gate::without_keys(), None, |c| c.tracing(tracer)).await
    }

    pub async fn with_prefix_affinity() -> Self {
        let with = |context: ApiContext| context.with_prefix_affinity(true);
        Self::build(Limits::default(), Gate::without_keys(), None, with).await
    }

    async fn build(
        limits: Limits,
        gate: Gate,
        tls: Option<Arc<Tls>>,
        finish: impl FnOnce(ApiContext) -> ApiContext,
    ) -> Self {
        let now = SystemTime::now();
        let ca = CertificateAuthority::create(now).expect("a CA");
        let identity = |node| ca.issue_identity(node, now).expect("an identity");
        let text = ModelText::load(&demo_folder()).expect("the demo model's text side");
        let script = Script { tokens: Vec::new(), pace: Duration::ZERO, end: End::Done(1) };
        // Its runtime must not be built or dropped on a thread that runs tasks.
        let worker = identity(NodeId::worker(1));
        let head = std::thread::spawn(|| Head::start(worker, script)).join().expect("a head");
        let mut table = ServingTable::default();
        for (name, folder) in [("demo", Some(demo_folder())), ("org/pretend", None)] {
            let deployment = deployment(name, folder, head.address);
            table.deployments.insert(deployment.name.clone(), Arc::new(deployment));
        }
        let (table, table_seen) = watch::channel(Arc::new(table));
        let (draining, draining_seen) = watch::channel(false);
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let coordinator = Arc::new(identity(NodeId::coordinator(1)));
        let endpoint = Endpoint::bind(any, coordinator, &[]).expect("a socket");
        let telemetry = Telemetry::new().expect("metrics");
        let listener = TcpListener::bind(any).await.expect("a port");
        let http = listener.local_addr().expect("an address");
        let dispatcher = Dispatcher::new(endpoint);
        let context = ApiContext::new(table_seen, dispatcher, telemetry, limits, draining_seen);
        let context = finish(context.behind(gate));
        let server = match tls {
            Some(tls) => serve(listener, context.over(tls)),
            None => serve(listener, context),
        };
        Self { http, head, table, draining, text, server, ca }
    }

    /// Another worker with a head, of which the table does not know yet.
    pub fn another_head(&self, node: NodeId, script: Script) -> Head {
        let identity = self.ca.issue_identity(node, SystemTime::now()).expect("an identity");
        std::thread::spawn(|| Head::start(identity, script)).join().expect("a head")
    }

    /// A second replica of `demo`, of which nothing is known, with a head of its own.
    pub fn another_replica(&self, script: Script) -> Head {
        let node = NodeId::worker(2);
        let head = self.another_head(node, script);
        self.change(|demo| {
            let mut second = demo.replicas[0].clone();
            (second.id, second.head, second.requests) = (ReplicaId(9), node, Some(head.address));
            second.load = None;
            demo.replicas[0].load = None;
            demo.replicas.push(second);
        });
        head
    }

    /// The head answers every sequence with this text, then its end token.
    pub fn says(&self, text: &str) -> Vec<TokenId> {
        let tokens = self.text.encode(text, false).expect("plain text");
        self.head.set(Script { tokens: tokens.clone(), pace: Duration::ZERO, end: End::Done(1) });
        tokens
    }

    /// What every member of the cluster speaks.
    pub fn speak(&self, protocol: u16) {
        let table = ServingTable { protocol, ..ServingTable::clone(&self.table.borrow()) };
        self.table.send_replace(Arc::new(table));
    }

    /// Changes the deployment `demo`.
    pub fn change(&self, change: impl FnOnce(&mut ServedDeployment)) {
        let mut table = ServingTable::clone(&self.table.borrow());
        let name = DeploymentName::new("demo").expect("a name");
        let demo = table.deployments.get_mut(&name).expect("the demo");
        change(Arc::make_mut(demo));
        self.table.send_replace(Arc::new(table));
    }
}
