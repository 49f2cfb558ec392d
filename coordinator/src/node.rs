//! ◇ A coordinator: every part built, wired, started, and drained in order.
//!
//! ```text
//! start:  certificate, ports (UDP, TCP) ─► folder ─► store ─► CA, identities ─► executor, accept loop, api
//! drain:  api (requests finish) ─► accept loop, executor ─► endpoint (peers are told) ─► store (file closed)
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use shoal_protocol::admin::{ClusterView, CoordinatorView};
use shoal_protocol::control::CoordinatorAddress;
use shoal_protocol::id::NodeId;
use shoal_protocol::plan::Plan;
use shoal_protocol::quic::{Accepting, AdminContext, Alpn, Endpoint, Identity, close_code};
use tokio::net::TcpSocket;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

use crate::api::auth::may_listen;
use crate::api::tls::Tls;
use crate::api::{self, ApiContext, Gate};
use crate::begin::{Begun, begin};
use crate::config::CoordinatorConfig;
use crate::control::access::AccessServer;
use crate::control::adapters::{self, AdapterServer};
use crate::control::admin::AdminServer;
use crate::control::agents::Agents;
use crate::control::authority::{Authority, CaFiles};
use crate::control::executor::{Executor, Shown};
use crate::control::join::JoinServer;
use crate::control::membership::Membership;
use crate::control::models::Models;
use crate::control::peers::{Doom, Myself, Outboxes, Peers};
use crate::control::rotation::{self, CaServer};
use crate::control::state::{CoordinatorRecord, Timestamp};
use crate::control::store::{ControlStore, StoreOwner};
use crate::dispatch::Dispatcher;
use crate::renewal::{Renewal, first_context};
use crate::seldom::Seldom;
use crate::serving::ServingTable;
use crate::start_error::StartError;
use crate::telemetry::Telemetry;

/// Conversations with members at once: workers and operators, ten times what a large cluster has.
const MEMBERS_MAX: usize = 4096;

/// Conversations with joiners at once. Nobody knows who they are, so they have places of their own: a
/// rack that starts at once, each for the second or two that a join takes.
const JOINERS_MAX: usize = 256;

/// How long the error may take to reach clients whose answers are not complete within
/// `api::Limits::drain`. Then their connections are cut.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Connections that wait to be accepted: a burst of clients that start together.
const API_BACKLOG: u32 = 1024;

/// How long peers may take to hear of the end.
const DRAIN_PEERS: Duration = Duration::from_millis(500);

/// Why a coordinator has ended by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// In words.
    pub why: String,
    /// Whether the next start would end so too: it was removed, or would do harm.
    pub for_good: bool,
    /// Whether nobody may vote with its data folder again.
    pub condemned: bool,
}

/// A running coordinator. Dropping it ends its tasks at once; `drain` lets them finish.
#[derive(Debug)]
pub struct Coordinator {
    running: Running,
    store: StoreOwner,
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
    peers: Peers,
}

/// What the parts are built on.
struct Parts<'a> {
    door: Door,
    me: NodeId,
    store: ControlStore,
    authority: Authority,
    identity: Identity,
    outboxes: Outboxes,
    owner: &'a StoreOwner,
}

/// Where others will find it. It is taken before anything is founded or joined: a start that fails for a
/// port that is taken leaves no cluster behind, which the next start would go on with.
struct Door {
    tls: Option<Arc<Tls>>,
    endpoint: Endpoint,
    /// Bound, and not listening yet: whoever asks too early is refused at once.
    socket: TcpSocket,
}

impl Door {
    async fn open(config: &CoordinatorConfig) -> Result<Self, StartError> {
        let tls = Tls::start(config.tls.clone(), config.listen)?;
        let accepts = [Alpn::Control, Alpn::Admin, Alpn::Join, Alpn::Renew, Alpn::Raft];
        let endpoint = Endpoint::reserve(config.cluster, &accepts)?;
        let failed = |source| StartError::Api { address: config.listen, source };
        let socket = match config.listen.is_ipv4() {
            true => TcpSocket::new_v4(),
            false => TcpSocket::new_v6(),
        };
        let socket = socket.map_err(failed)?;
        // As `TcpListener::bind` does: a coordinator that starts again takes over the port of its last start.
        socket.set_reuseaddr(true).and_then(|()| socket.bind(config.listen)).map_err(failed)?;
        Ok(Self { tls, endpoint, socket })
    }
}

impl Coordinator {
    /// Starts a coordinator: the first time it founds a cluster, later it finds it again.
    pub async fn start(config: CoordinatorConfig) -> Result<Self, StartError> {
        let door = Door::open(&config).await?;
        // Both are large, and whoever starts one holds it on its own.
        let begun = Box::pin(begin(&config)).await?;
        let Begun { me, store, owner, authority, identity, outboxes } = begun;
        let parts = Parts { door, me, store, authority, identity, outboxes, owner: &owner };
        match Box::pin(Running::start(config, parts)).await {
            Ok(running) => Ok(Self { running, store: owner }),
            Err(error) => {
                // Whoever tries again must not find the folder in use.
                owner.close().await;
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
    pub async fn failed(&mut self) -> Ended {
        let part = tokio::select! {
            _ = &mut self.running.api => "the API",
            _ = self.running.tasks.join_next() => "a part of the control plane",
            Doom { why, condemned } = self.running.peers.ghost() => {
                return Ended { why, for_good: true, condemned };
            }
        };
        let why = format!("{part} has ended; the log above says why: start it again");
        Ended { why, for_good: false, condemned: false }
    }

    /// Stops at once, after it has `failed`. Where the next start would end so too it finds that written down, and does
    /// no harm before somebody tells it.
    pub async fn give_up(self, ended: &Ended) {
        drop(self.running);
        match ended.condemned {
            true => self.store.condemn(ended.why.clone()).await,
            false => self.store.close().await,
        }
    }

    /// Stops: requests finish (for a few seconds), peers are told, the state is closed. Workers go
    /// on with what they have and look for a coordinator.
    pub async fn drain(self) {
        self.running.drain().await;
        self.store.close().await;
    }
}

impl Running {
    async fn start(config: CoordinatorConfig, parts: Parts<'_>) -> Result<Self, StartError> {
        let Parts { door, me, store, authority, identity, outboxes, owner } = parts;
        let Door { tls, endpoint, socket } = door;
        let at = Timestamp::of(SystemTime::now());
        // One that has just joined knows no keys yet; its gate stays shut to others until it does.
        if !store.state().is_new() && !may_listen(&store.state().keys, config.listen, at) {
            return Err(StartError::NotLoopback { address: config.listen });
        }
        let data = config.data;
        endpoint.renew(Arc::new(identity))?;
        let failed = |source| StartError::Api { address: config.listen, source };
        let listener = socket.listen(API_BACKLOG).map_err(failed)?;
        let coordinator = CoordinatorView {
            id: me,
            pid: std::process::id(),
            build: env!("CARGO_PKG_VERSION").to_owned(),
            api: listener.local_addr().map_err(failed)?,
            cluster: endpoint.local_address(),
            tls: tls.is_some(),
        };
        let context = data.join(AdminContext::FILE_NAME);
        first_context(&authority, coordinator.cluster, &context)?;

        let draining = watch::Sender::new(false);
        let stopping = watch::Sender::new(false);
        let agents = Agents::new(store.clone(), authority.clone());
        let myself = Myself {
            node: me,
            incarnation: owner.incarnation(),
            boot: getrandom::u64().unwrap_or(u64::from(coordinator.pid)),
            cluster: config.advertise.unwrap_or(coordinator.cluster),
            build: coordinator.build.clone(),
        };
        let peers = Peers::new(
            myself,
            endpoint.clone(),
            store.clone(),
            owner.network(),
            outboxes,
            authority.clone(),
        )
        .seeking(config.join);
        let models = Models::new(data.clone(), config.builtin);
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
        let ca = CaServer {
            store: store.clone(),
            agents: agents.clone(),
            authority: authority.clone(),
            files: CaFiles::of(&data),
            me,
            turn: Arc::default(),
        };
        let adapter_server = AdapterServer {
            store: store.clone(),
            agents: agents.clone(),
            models: models.clone(),
            table: table.clone(),
        };
        let servers = Servers {
            join: JoinServer::new(store.clone(), authority.clone()),
            admin: AdminServer {
                access: AccessServer {
                    store: store.clone(),
                    agents: agents.clone(),
                    ca: ca.clone(),
                },
                adapters: adapter_server.clone(),
                store: store.clone(),
                agents: agents.clone(),
                models,
                view: view.clone(),
                authority: authority.clone(),
            },
            agents: agents.clone(),
            peers: peers.clone(),
            membership: membership.clone(),
            members: Semaphore::new(MEMBERS_MAX),
            joiners: Semaphore::new(JOINERS_MAX),
            refused: Seldom::default(),
        };
        let dispatcher = Dispatcher::new(endpoint.clone());
        let api_context = ApiContext::new(
            table,
            dispatcher.clone(),
            Telemetry::new()?,
            api::Limits::default(),
            draining.subscribe(),
        )
        .with_policy(config.policy)
        .tracing(config.tracer)
        .with_prefix_affinity(config.prefix_affinity)
        .with_runtime_adapters(config.runtime_adapters.then_some(adapter_server))
        .of_cluster(store.clone())
        .behind(gate);
        let api_context = match tls {
            Some(tls) => api_context.over(tls),
            None => api_context,
        };

        let mut tasks = JoinSet::new();
        tasks.spawn(membership.shut_out(dispatcher, stopping.subscribe()));
        tasks.spawn(executor.run(stopping.subscribe()));
        tasks.spawn(servers.accept(endpoint.clone(), stopping.subscribe()));
        tasks.spawn(peers.clone().run(stopping.subscribe()));
        tasks.spawn(rotation::drive(ca.clone(), stopping.subscribe()));
        tasks.spawn(tell_workers(store.clone(), agents.clone(), stopping.subscribe()));
        tasks.spawn(adapters::tell(store.clone(), agents.clone(), stopping.subscribe()));
        let (to, peer_tasks) = (context.clone(), peers.clone());
        let renewal = Renewal {
            me,
            data,
            authority,
            endpoint: endpoint.clone(),
            context: to,
            peers: peer_tasks,
            store,
            agents,
        };
        tasks.spawn(renewal.run(stopping.subscribe()));
        let api = api::serve(listener, api_context);
        Ok(Self { coordinator, context, view, endpoint, draining, stopping, api, tasks, peers })
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

/// What is behind each conversation.
struct Servers {
    agents: Agents,
    admin: AdminServer,
    join: JoinServer,
    peers: Peers,
    membership: Membership,
    members: Semaphore,
    joiners: Semaphore,
    refused: Seldom,
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
        let address = incoming.remote_address();
        let connection = match incoming.establish().await {
            Ok(connection) => connection,
            Err(error) => {
                // Whoever is not believed tries again several times a second.
                let words = self.refused.say(&address.to_string(), &error.to_string());
                return words.into_iter().for_each(|words| tracing::info!("{words}"));
            }
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
        if connection.alpn() == Alpn::Raft {
            // Whoever has just joined does not know its peers yet: it looks at them itself.
            return self.peers.serve(connection).await;
        }
        let conversation = connection.clone();
        let talk = async {
            match connection.alpn() {
                Alpn::Control => self.agents.serve(conversation).await,
                Alpn::Admin => self.admin.serve(conversation).await,
                Alpn::Join | Alpn::Renew => self.join.serve(conversation).await,
                // Not offered, so TLS does not agree on them; or seen to above.
                Alpn::Requests | Alpn::Activations | Alpn::Blobs | Alpn::Raft => {
                    conversation.close(close_code::REFUSED, "a coordinator does not compute");
                }
            }
        };
        // A conversation with an operator is large, and there are few.
        self.membership.while_member(&connection, Box::pin(talk)).await;
    }
}

/// Tells the workers where the coordinators are, on every change.
async fn tell_workers(store: ControlStore, agents: Agents, mut stop: watch::Receiver<bool>) {
    let mut state = store.watch();
    loop {
        let known: Vec<_> = {
            let state = state.borrow_and_update();
            let all = state.coordinators.iter();
            let address = |(node, record): (NodeId, &CoordinatorRecord)| CoordinatorAddress {
                node,
                cluster: record.cluster,
            };
            all.map(address).collect()
        };
        if !known.is_empty() {
            agents.set_coordinators(known);
        }
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

fn empty_view(coordinator: &CoordinatorView) -> ClusterView {
    ClusterView {
        coordinator: coordinator.clone(),
        workers: Vec::new(),
        deployments: Vec::new(),
        plan: Plan::default(),
        coordinators: Vec::new(),
    }
}
