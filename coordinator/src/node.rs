//! ◇ A coordinator: every part built, wired, started, and drained in order.
//!
//! ```text
//! start:  folder ─► store ─► CA, identities ─► endpoint (UDP) ─► listener (TCP) ─► executor, accept loop, api
//! drain:  api (requests finish) ─► accept loop, executor ─► endpoint (peers are told) ─► store (file closed)
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use shoal_protocol::admin::{ClusterView, CoordinatorView};
use shoal_protocol::id::NodeId;
use shoal_protocol::plan::Plan;
use shoal_protocol::quic::ca::{CaError, CertificateAuthority};
use shoal_protocol::quic::{
    Accepting, AdminContext, Alpn, Endpoint, EndpointError, Identity, close_code,
    identity::IdentityError,
};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

use crate::api::auth::may_listen;
use crate::api::tls::{Tls, TlsError};
use crate::api::{self, ApiContext, Gate};
use crate::config::CoordinatorConfig;
use crate::control::access::AccessServer;
use crate::control::admin::AdminServer;
use crate::control::agents::Agents;
use crate::control::executor::{Executor, Shown};
use crate::control::join::JoinServer;
use crate::control::membership::Membership;
use crate::control::models::Models;
use crate::control::state::{Change, KeyFingerprint, NodeCommand, Timestamp};
use crate::control::store::raft::{self, OpenError, RaftStore, WhenEmpty};
use crate::control::store::{ControlStore, ProposeError};
use crate::dispatch::Dispatcher;
use crate::serving::ServingTable;
use crate::telemetry::Telemetry;

/// The CA's file in the data folder.
const CA_FILE: &str = "ca.key";

/// The one coordinator of a cluster, until there are several.
const SELF: NodeId = NodeId::coordinator(1);

/// The admin certificate that a coordinator writes for its operator.
const OPERATOR: NodeId = NodeId::admin(1);

/// How often this coordinator renews its own certificate and its operator's: a third of their life,
/// so that one failure is not the end.
const RENEW_PERIOD: Duration = Duration::from_secs(8 * 3600);

/// How often to look whether that has passed, by the clock that certificates go by: it goes on while
/// the machine sleeps, and timers do not.
const RENEW_LOOK: Duration = Duration::from_secs(60);

/// Conversations with members at once: workers and operators, ten times what a large cluster has.
const MEMBERS_MAX: usize = 4096;

/// Conversations with joiners at once. Nobody knows who they are, so they have places of their own: a
/// rack that starts at once, each for the second or two that a join takes.
const JOINERS_MAX: usize = 256;

/// How long the error may take to reach clients whose answers are not complete within
/// `api::Limits::drain`. Then their connections are cut.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How long peers may take to hear of the end.
const DRAIN_PEERS: Duration = Duration::from_millis(500);

/// A coordinator that did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The public API would be open to others.
    #[error(
        "the API cannot listen on {address}: there is no API key, so whoever reaches it could use it; \
         listen on 127.0.0.1:{}, make a key with `shoal keys create NAME`, and start again with \
         {address} and the same --data", address.port()
    )]
    NotLoopback {
        /// The address.
        address: SocketAddr,
    },
    /// The data folder cannot be used.
    #[error("cannot use the data folder {}", path.display())]
    Data {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The replicated state cannot be read.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The replicated state cannot be written.
    #[error("cannot found the cluster: {0}")]
    Found(#[from] ProposeError),
    /// The CA cannot be used.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// One of the state and the CA's key is there, and the other is not.
    #[error(
        "{} has {found} but not {missing}: restore the data folder from a backup, or start a new \
         cluster on an empty one (its workers must join again)", path.display()
    )]
    Incomplete {
        /// The data folder.
        path: PathBuf,
        /// What is there.
        found: &'static str,
        /// What is not.
        missing: &'static str,
    },
    /// The operator's context file cannot be written.
    #[error(transparent)]
    Context(#[from] IdentityError),
    /// The cluster's address cannot be used.
    #[error(transparent)]
    Cluster(#[from] EndpointError),
    /// The API's address cannot be used.
    #[error("cannot listen on {address} (TCP): {source}; `:0` as the port picks a free one")]
    Api {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The API's certificate cannot be used.
    #[error("the API's certificate: {0}")]
    Certificate(#[from] TlsError),
    /// The metrics cannot be set up.
    #[error("cannot set up the metrics: {0}")]
    Telemetry(#[from] prometheus::Error),
}

/// A running coordinator. Dropping it ends its tasks at once; `drain` lets them finish.
#[derive(Debug)]
pub struct Coordinator {
    running: Running,
    store: RaftStore,
}

/// All that stands on the store.
#[derive(Debug)]
struct Running {
    coordinator: CoordinatorView,
    context: PathBuf,
    view: watch::Receiver<Arc<ClusterView>>,
    endpoint: Endpoint,
    draining: watch::Sender<bool>,
    stopping: watch::Sender<bool>,
    api: JoinHandle<()>,
    /// Executor, accept loop, renewal: all end when `stopping` becomes true.
    tasks: JoinSet<()>,
}

impl Coordinator {
    /// Starts a coordinator: the first time it founds a cluster, later it finds it again.
    pub async fn start(config: CoordinatorConfig) -> Result<Self, StartError> {
        create_folder(&config.data)?;
        let (store, owner) = raft::open(&config.data, SELF, WhenEmpty::Found, Box::new(|_| {}))?;
        match Running::start(config, store).await {
            Ok(running) => Ok(Self { running, store: owner }),
            Err(error) => {
                // Whoever tries again must not find the folder in use.
                close(owner).await;
                Err(error)
            }
        }
    }

    /// Who it is.
    pub fn id(&self) -> NodeId {
        self.running.coordinator.id
    }

    /// Where it takes the public API.
    pub fn api_address(&self) -> SocketAddr {
        self.running.coordinator.api
    }

    /// Where it takes the cluster's conversations.
    pub fn cluster_address(&self) -> SocketAddr {
        self.running.coordinator.cluster
    }

    /// The file with which an operator acts; rewritten for as long as the coordinator runs.
    pub fn admin_context(&self) -> &Path {
        &self.running.context
    }

    /// The cluster as it sees it now.
    pub fn view(&self) -> Arc<ClusterView> {
        Arc::clone(&self.running.view.borrow())
    }

    /// The cluster, again on every change.
    pub fn watch(&self) -> watch::Receiver<Arc<ClusterView>> {
        self.running.view.clone()
    }

    /// Waits until a part of it has ended that should run as long as it does: the API, the reconciler
    /// (which ends with the store), the door for peers. A coordinator like that is to be ended and
    /// started again. Cancel safe.
    pub async fn failed(&mut self) -> &'static str {
        tokio::select! {
            _ = &mut self.running.api => "the API has ended",
            _ = self.running.tasks.join_next() => "a part of the control plane has ended",
        }
    }

    /// Stops: requests finish (for a few seconds), peers are told, the state is closed. Workers go
    /// on with what they have and look for a coordinator.
    pub async fn drain(self) {
        self.running.drain().await;
        close(self.store).await;
    }
}

impl Running {
    async fn start(config: CoordinatorConfig, store: ControlStore) -> Result<Self, StartError> {
        if !may_listen(&store.state().keys, config.listen, Timestamp::of(SystemTime::now())) {
            return Err(StartError::NotLoopback { address: config.listen });
        }
        let tls = Tls::start(config.tls, config.listen)?;
        let data = config.data;
        let (ca, identity) = authority(&store, &data).await?;
        let ca = Arc::new(ca);

        let accepts = [Alpn::Control, Alpn::Admin, Alpn::Join, Alpn::Renew];
        let endpoint = Endpoint::bind(config.cluster, Arc::new(identity), &accepts)?;
        let failed = |source| StartError::Api { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        let coordinator = CoordinatorView {
            id: SELF,
            pid: std::process::id(),
            build: env!("CARGO_PKG_VERSION").to_owned(),
            api: listener.local_addr().map_err(failed)?,
            cluster: endpoint.local_address(),
            tls: tls.is_some(),
        };
        let context = data.join(AdminContext::FILE_NAME);
        write_context(&ca, coordinator.cluster, &context)?;

        let draining = watch::Sender::new(false);
        let stopping = watch::Sender::new(false);
        let agents = Agents::new(store.clone(), Arc::clone(&ca));
        let models = Models::new(data, config.builtin);
        let shown = Shown {
            table: watch::Sender::new(Arc::new(ServingTable::default())),
            view: watch::Sender::new(Arc::new(empty_view(&coordinator))),
        };
        let (table, view) = (shown.table.subscribe(), shown.view.subscribe());
        let executor = Executor::new(
            store.clone(),
            agents.clone(),
            models.clone(),
            coordinator.clone(),
            shown,
        );
        let gate = Gate::new(store.watch());
        let membership = Membership::new(store.clone());
        let servers = Servers {
            join: JoinServer::new(store.clone(), Arc::clone(&ca)),
            renew: JoinServer::new(store.clone(), Arc::clone(&ca)),
            admin: AdminServer {
                access: AccessServer { store: store.clone(), agents: agents.clone() },
                store,
                agents: agents.clone(),
                models,
                view: view.clone(),
                ca_fingerprint: ca.fingerprint(),
            },
            agents,
            membership: membership.clone(),
            members: Semaphore::new(MEMBERS_MAX),
            joiners: Semaphore::new(JOINERS_MAX),
        };
        let dispatcher = Dispatcher::new(endpoint.clone());
        let api_context = ApiContext::new(
            table,
            dispatcher.clone(),
            Telemetry::new()?,
            api::Limits::default(),
            draining.subscribe(),
        );
        let api_context = match tls {
            Some(tls) => api_context.behind(gate).over(tls),
            None => api_context.behind(gate),
        };

        let mut tasks = JoinSet::new();
        tasks.spawn(membership.shut_out(dispatcher, stopping.subscribe()));
        tasks.spawn(executor.run(stopping.subscribe()));
        tasks.spawn(servers.accept(endpoint.clone(), stopping.subscribe()));
        let stop = stopping.subscribe();
        tasks.spawn(renew_certificates(ca, endpoint.clone(), context.clone(), stop));
        let api = api::serve(listener, api_context);
        Ok(Self { coordinator, context, view, endpoint, draining, stopping, api, tasks })
    }

    async fn drain(mut self) {
        self.draining.send_replace(true);
        let patience = api::Limits::default().drain + LAST_WORDS;
        if tokio::time::timeout(patience, &mut self.api).await.is_err() {
            tracing::warn!("some requests did not finish within {patience:?}: cut off");
            self.api.abort();
        }
        self.stopping.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
        self.endpoint.close(close_code::DRAINING, "the coordinator is stopping");
        self.endpoint.drained(DRAIN_PEERS).await;
    }
}

/// The other tasks are aborted by their set.
impl Drop for Running {
    fn drop(&mut self) {
        self.api.abort();
    }
}

async fn close(store: RaftStore) {
    // It fails only where the runtime ends; then the file is closed with the process.
    let _ = tokio::task::spawn_blocking(move || store.close()).await;
}

/// What is behind each conversation.
struct Servers {
    agents: Agents,
    admin: AdminServer,
    join: JoinServer,
    renew: JoinServer,
    membership: Membership,
    members: Semaphore,
    joiners: Semaphore,
}

impl Servers {
    /// Lets clients in, each in a task of its own, until `stop` becomes true.
    async fn accept(self, endpoint: Endpoint, mut stop: watch::Receiver<bool>) {
        let servers = Arc::new(self);
        let mut conversations = JoinSet::new();
        loop {
            let incoming = tokio::select! {
                incoming = endpoint.accept() => incoming,
                Some(_) = conversations.join_next() => continue,
                _ = stop.wait_for(|stop| *stop) => return,
            };
            // The endpoint is closed only after this loop.
            let Some(incoming) = incoming else { return };
            // Bounded by the endpoint's handshakes and the places after them.
            conversations.spawn(Arc::clone(&servers).converse(incoming));
        }
    }

    async fn converse(self: Arc<Self>, incoming: Accepting) {
        let connection = match incoming.establish().await {
            Ok(connection) => connection,
            Err(error) => return tracing::info!("{error}"),
        };
        let places = match connection.alpn().without_client_certificate() {
            true => &self.joiners,
            false => &self.members,
        };
        let Ok(_place) = places.try_acquire() else {
            let (address, alpn) = (connection.remote_address(), connection.alpn());
            tracing::warn!(%address, %alpn, "too many conversations");
            return connection
                .close(close_code::REFUSED, "too many conversations; try again later");
        };
        let conversation = connection.clone();
        let talk = async {
            match connection.alpn() {
                Alpn::Control => self.agents.serve(conversation).await,
                Alpn::Admin => self.admin.serve(conversation).await,
                Alpn::Join => self.join.serve(conversation).await,
                Alpn::Renew => self.renew.serve(conversation).await,
                // Not offered, so TLS does not agree on them.
                Alpn::Requests | Alpn::Activations => {
                    conversation.close(close_code::REFUSED, "a coordinator does not compute");
                }
            }
        };
        self.membership.while_member(&connection, talk).await;
    }
}

fn create_folder(path: &Path) -> Result<(), StartError> {
    // Keys lie in it.
    let created = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    created.map_err(|source| StartError::Data { path: path.to_owned(), source })
}

/// Founds the cluster or finds it again: the CA, and a fresh certificate for this coordinator.
///
/// The state is written before the CA's key, so a founding that is cut off leaves a state without
/// nodes that anybody relies on, and is begun anew. A key without a state is what a lost disk leaves:
/// numbers would be given a second time, so it is refused.
async fn authority(
    store: &ControlStore,
    data: &Path,
) -> Result<(CertificateAuthority, Identity), StartError> {
    let path = data.join(CA_FILE);
    let incomplete =
        |found, missing| StartError::Incomplete { path: data.to_owned(), found, missing };
    let state = store.state();
    let founded = state.nodes.get(SELF).is_some() && state.nodes.get(OPERATOR).is_some();
    let now = SystemTime::now();
    if let Some(ca) = CertificateAuthority::load(&path)? {
        if !founded {
            return Err(incomplete("the CA's key", "the cluster's state"));
        }
        let identity = ca.issue_identity(SELF, now)?;
        return Ok((ca, identity));
    }
    if state.nodes.workers().next().is_some() {
        return Err(incomplete("the cluster's state", "the CA's key"));
    }
    let ca = CertificateAuthority::create(now)?;
    let identity = ca.issue_identity(SELF, now)?;
    for node in [SELF, OPERATOR] {
        if state.nodes.get(node).is_none() {
            // Both get new keys at each start, so the CA stands for the key that renews them.
            let key = KeyFingerprint(ca.fingerprint());
            store.propose(Change::Node(NodeCommand::Enrol { role: node.role, key })).await?;
        }
    }
    ca.save(&path)?;
    tracing::info!("founded a cluster in {}", data.display());
    Ok((ca, identity))
}

/// Writes what the operator needs. An address that listens everywhere is reached by loopback.
fn write_context(
    ca: &CertificateAuthority,
    cluster: SocketAddr,
    path: &Path,
) -> Result<(), StartError> {
    let ip = match cluster.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let identity = ca.issue_identity(OPERATOR, SystemTime::now())?;
    let address = SocketAddr::new(ip, cluster.port());
    Ok(AdminContext { address, identity }.save(path)?)
}

/// Certificates live for a day; this coordinator holds the CA, so it renews its own.
async fn renew_certificates(
    ca: Arc<CertificateAuthority>,
    endpoint: Endpoint,
    context: PathBuf,
    mut stop: watch::Receiver<bool>,
) {
    let mut last = SystemTime::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep(RENEW_LOOK) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        let now = SystemTime::now();
        // A clock that was set back counts from where it is.
        if now.duration_since(last).is_ok_and(|since| since < RENEW_PERIOD) {
            continue;
        }
        last = now;
        let renewed = ca
            .issue_identity(SELF, SystemTime::now())
            .map_err(StartError::from)
            .and_then(|identity| Ok(endpoint.renew(Arc::new(identity))?))
            .and_then(|()| write_context(&ca, endpoint.local_address(), &context));
        if let Err(error) = renewed {
            tracing::error!(%error, "certificates could not be renewed; trying again later");
        }
    }
}

fn empty_view(coordinator: &CoordinatorView) -> ClusterView {
    ClusterView {
        coordinator: coordinator.clone(),
        workers: Vec::new(),
        deployments: Vec::new(),
        plan: Plan::default(),
    }
}
