//! ◇ A whole worker: identity, endpoints, agent; started in order and drained in the reverse one.
//!
//! ```text
//! identity ─► shoal-act, shoal-blob endpoints (a thread each) ─► shoal-req endpoint ─► agent ─► shoal-ctl
//! drain:      agent lets its shards out ─► requests end ─► links end
//! ```

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::blob::{BlobSettings, ModelCache};
use shoal_protocol::control::{COORDINATORS_MAX, CoordinatorAddress, Register};
use shoal_protocol::id::{Incarnation, NodeId, Role};
use shoal_protocol::mesh::{Fact, ZoneName};
use shoal_protocol::plan::Numerics;
use shoal_protocol::quic::identity::{IdentityError, write_secret};
use shoal_protocol::quic::join::{JoinError, join_any};
use shoal_protocol::quic::renew::{is_elsewhere, not_joined, unused_token};
use shoal_protocol::quic::{
    Alpn, Connection, Endpoint, EndpointError, Identity, SharedLease, close_code,
};
use shoal_protocol::units::Bytes;
use shoal_protocol::version::VersionRange;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::agent::calibration;
use crate::agent::inventory::{self, InventoryError};
use crate::agent::{Agent, AgentHandle, AgentParts, COORDINATORS_FILE, Models, read_kept};
use crate::backend::cpus::Cpus;
use crate::blob::{Blobs, BlobsError};
use crate::config::WorkerConfig;
use crate::head::Heads;
use crate::head::intake::Intake;
use crate::stage::{Links, LinksError, Ways};

/// How long a join may take.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long peers are given to hear of the end.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(300);

/// Connections of coordinators to this worker's heads at once: one of each, and one that each has
/// left behind for an idle time-out by starting again.
const CONNECTIONS_MAX: usize = 2 * COORDINATORS_MAX;

/// As how many tensor ranks of one stage this build's workers compute. More than one makes the planner
/// choose them by itself.
const RANKS_MOST: u32 = 8;

pub(crate) const IDENTITY_FILE: &str = "identity";
const INCARNATION_FILE: &str = "incarnation";

/// A worker that does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There is neither an identity nor a token.
    #[error(
        "{} holds no identity and no token is given; make one with `shoal token create --role \
         worker` and start again with --token",
        data.display()
    )]
    NoIdentity {
        /// The data folder.
        data: PathBuf,
    },
    /// The identity is not a worker's.
    #[error("{} holds the identity of {node}, which is no worker; use another --data", data.display())]
    NotAWorker {
        /// The data folder.
        data: PathBuf,
        /// Whose it is.
        node: NodeId,
    },
    /// The token is for something else.
    #[error("the token is for a {0}; a worker needs one made with --role worker")]
    WrongToken(Role),
    /// Nowhere to begin, or too many places.
    #[error("{0} coordinator addresses are given; give 1 to {COORDINATORS_MAX} with --join")]
    Coordinators(usize),
    /// The processors to compute on.
    #[error("{0}; list others with --cpus, or leave it out")]
    Cpus(String),
    /// The identity file.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The join.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The incarnation could not be kept.
    #[error("cannot keep the start count in {}: {source}", path.display())]
    Incarnation {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No way to the coordinator.
    #[error("cannot find the local address that leads to {coordinator}: {source}")]
    Route {
        /// Where the coordinator is.
        coordinator: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The device or its memory.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The endpoint for requests.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The endpoint for activations.
    #[error(transparent)]
    Links(#[from] LinksError),
    /// The endpoint for chunks of weights.
    #[error(transparent)]
    Blobs(#[from] BlobsError),
}

impl StartError {
    /// Whether the next start would fail so too, until a person gives it something else.
    pub fn needs_a_person(&self) -> bool {
        matches!(
            self,
            Self::NoIdentity { .. }
                | Self::NotAWorker { .. }
                | Self::WrongToken(_)
                | Self::Coordinators(_)
                | Self::Cpus(_)
        )
    }
}

/// A worker that runs.
#[derive(Debug)]
pub struct Worker {
    id: NodeId,
    agent: Agent,
    handle: AgentHandle,
    endpoint: Endpoint,
    intake: Intake,
    links: Arc<Links>,
}

/// Asks a worker to let out what runs and end.
#[derive(Clone, Debug)]
pub struct DrainHandle(AgentHandle);

impl DrainHandle {
    /// May be called more than once.
    pub fn drain(&self) {
        self.0.drain();
    }
}

impl Worker {
    /// Finds or gets an identity, opens the endpoints, and begins to talk to the coordinators. None
    /// of them need be there where the identity is.
    pub async fn start(config: WorkerConfig) -> Result<Self, StartError> {
        if config.join.is_empty() || config.join.len() > COORDINATORS_MAX {
            return Err(StartError::Coordinators(config.join.len()));
        }
        config.cpus.check().map_err(StartError::Cpus)?;
        let threads = config.threads.or(std::num::NonZeroUsize::new(config.cpus.count()));
        let device = inventory::device(&config.device, config.memory, threads)?;
        let identity = Arc::new(identity_of(&config).await?);
        let incarnation = next_incarnation(&config.data.join(INCARNATION_FILE))?;
        let kept = read_kept(&config.data.join(COORDINATORS_FILE));
        let addresses = config.addresses;
        let (activations, requests) = match (addresses.activations, addresses.requests) {
            (Some(activations), Some(requests)) => (activations, requests),
            (activations, requests) => {
                let any_port = SocketAddr::new(local_ip(&config.join, &kept)?, 0);
                (activations.unwrap_or(any_port), requests.unwrap_or(any_port))
            }
        };
        look_at(&config.join, &kept, &identity);
        let links = Links::start(activations, Arc::clone(&identity))?;
        let cache = ModelCache::new(&config.data, BlobSettings::from_environment());
        let any_port = SocketAddr::new(activations.ip(), 0);
        let at = (addresses.blobs.unwrap_or(any_port), addresses.advertise_blobs);
        let blobs = Blobs::start(at, Arc::clone(&identity), cache.clone())?;
        let threads = std::num::NonZeroUsize::new(device.threads as usize);
        let (facts, ways) = facts(config.zone, (threads, config.cpus.clone()), device.memory);
        let links = links.tracing(config.tracer).measuring(ways.clone());
        let links = Arc::new(if config.ranks_apart { links.apart() } else { links });
        let blobs = blobs.measuring(ways);
        let endpoint = Endpoint::bind(requests, Arc::clone(&identity), &[Alpn::Requests])?;
        let register = Register {
            versions: VersionRange::OURS,
            build: env!("CARGO_PKG_VERSION").to_owned(),
            node: identity.node,
            incarnation,
            pid: std::process::id(),
            requests: addresses.advertise_requests.unwrap_or(endpoint.local_address()),
            activations: addresses.advertise_activations.unwrap_or(links.address()),
            devices: vec![device.clone()],
            numerics: vec![Numerics::N1],
        };
        let (heads, lease) = (Heads::default(), Arc::new(SharedLease::default()));
        let (agent, handle) = Agent::start(AgentParts {
            register,
            facts,
            seeds: config.join,
            kept,
            endpoint: endpoint.clone(),
            links: Arc::clone(&links),
            heads: heads.clone(),
            lease: Arc::clone(&lease),
            models: Models {
                data: config.data,
                cache,
                blobs: Some(blobs),
                builtin: config.builtin,
                threads: threads.unwrap_or(std::num::NonZeroUsize::MIN),
                cpus: config.cpus,
            },
            budget: device.memory,
        });
        let intake = Intake::new(identity.node, heads, lease);
        Ok(Self { id: identity.node, agent, handle, endpoint, intake, links })
    }

    /// Who this worker is.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// For whoever decides when it ends: a signal, a parent's pipe.
    pub fn drain_handle(&self) -> DrainHandle {
        DrainHandle(self.handle.clone())
    }

    /// Runs until it is drained, by its handle or by the coordinator. Where it ends because the cluster has
    /// to do with it no more: why, in words. Another start would end so too.
    pub async fn run_until_drained(self) -> Option<String> {
        let Self { id, agent, handle, endpoint, intake, links } = self;
        let serve = serve_requests(&endpoint, &intake, &handle);
        let unwanted = tokio::select! {
            unwanted = agent.run() => unwanted,
            () = serve => {
                tracing::error!("{id}'s endpoint for requests is gone");
                None
            }
        };
        endpoint.close(close_code::DRAINING, "the worker is stopping");
        endpoint.drained(GOODBYE_TIMEOUT).await;
        match Arc::try_unwrap(links) {
            Ok(links) => links.stop().await,
            // Its thread ends with the last of its holders.
            Err(_) => tracing::debug!("the links are still held"),
        }
        unwanted
    }
}

/// What the worker says of itself besides its registration: at once what it knows, soon how fast it is, and
/// later what its links tell of the ways.
fn facts(
    zone: Option<ZoneName>,
    (threads, cpus): (Option<std::num::NonZeroUsize>, Cpus),
    memory: Bytes,
) -> (watch::Receiver<Vec<Fact>>, Ways) {
    let mut known = vec![Fact::Ranks { most: RANKS_MOST }];
    known.extend(zone.map(Fact::Zone));
    let (say, facts) = watch::channel(known);
    let say = Arc::new(say);
    let ways = Ways::telling(Arc::clone(&say));
    let threads = threads.unwrap_or(std::num::NonZeroUsize::MIN);
    // It computes for a moment, beside the first words with the coordinators.
    let measure = move || match calibration::rates(threads, &cpus, memory) {
        rates if rates.is_empty() => {
            tracing::warn!("its compute rate could not be measured; it counts as any other");
        }
        rates => say.send_modify(|known| known.extend(rates)),
    };
    let started = std::thread::Builder::new().name("calibrate".to_owned()).spawn(measure);
    if let Err(error) = started {
        tracing::warn!("its compute rate is not measured: {error}");
    }
    tokio::spawn(ways.clone().keep_fresh());
    (facts, ways)
}

/// Lets coordinators in until the endpoint is closed.
async fn serve_requests(endpoint: &Endpoint, intake: &Intake, agent: &AgentHandle) {
    // Taken after the handshake, so that strangers, who do not get that far, take none.
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepting = endpoint.accept() => {
                let Some(accepting) = accepting else { return };
                let (intake, places) = (intake.clone(), Arc::clone(&places));
                let agent = agent.clone();
                connections.spawn(async move {
                    let connection = match accepting.establish().await {
                        Ok(connection) => connection,
                        Err(error) => return tracing::debug!("a connection is refused: {error}"),
                    };
                    match places.try_acquire() {
                        Ok(_place) => serve_member(&intake, connection, &agent).await,
                        Err(_) => connection.close(close_code::REFUSED, "too many connections"),
                    }
                });
            }
            Some(done) = connections.join_next() => {
                if let Err(error) = done {
                    tracing::error!("a coordinator's connection panicked: {error}");
                }
            }
        }
    }
}

/// Serves a coordinator for as long as it is one. TLS looks at its certificate once; what it began before
/// it was removed would go on.
async fn serve_member(intake: &Intake, connection: Connection, agent: &AgentHandle) {
    let Some(coordinator) = connection.peer() else { return };
    let serve = intake.serve(connection.clone());
    tokio::pin!(serve);
    tokio::select! {
        () = &mut serve => return,
        () = agent.left(coordinator) => {}
    }
    tracing::info!("{coordinator} is no coordinator any more: its requests are ended");
    connection.close(close_code::REFUSED, "this coordinator was removed from the cluster");
    serve.await;
}

/// The identity in the data folder, or a new one for the token.
async fn identity_of(config: &WorkerConfig) -> Result<Identity, StartError> {
    let path = config.data.join(IDENTITY_FILE);
    let data = || config.data.clone();
    if let Some(identity) = Identity::load(&path)? {
        if identity.node.role != Role::Worker {
            return Err(StartError::NotAWorker { data: data(), node: identity.node });
        }
        if let Some(token) = &config.token {
            tracing::warn!("{}", unused_token(&identity, token));
        }
        return Ok(identity);
    }
    let token = config.token.as_ref().ok_or_else(|| StartError::NoIdentity { data: data() })?;
    if token.role != Role::Worker {
        return Err(StartError::WrongToken(token.role));
    }
    if config.join.is_empty() {
        return Err(StartError::Coordinators(0));
    }
    let identity = join_any(&config.join, token, JOIN_TIMEOUT).await?;
    identity.save(&path)?;
    Ok(identity)
}

/// Says so where an address that was given leads to another cluster than the one that this worker has been in.
fn look_at(given: &[SocketAddr], kept: &[CoordinatorAddress], identity: &Arc<Identity>) {
    let known = |given: &SocketAddr| kept.iter().any(|kept| kept.cluster == *given);
    // One that was never welcomed anywhere learns by its conversations who is there.
    let given = given.iter().filter(|given| !kept.is_empty() && !known(given));
    for address in given.copied() {
        let identity = Arc::clone(identity);
        tokio::spawn(async move {
            if is_elsewhere(address, &identity, JOIN_TIMEOUT).await {
                tracing::warn!("{}", not_joined(address, identity.node));
            }
        });
    }
}

/// The number of this start, kept on disk before anybody hears of it.
fn next_incarnation(path: &Path) -> Result<Incarnation, StartError> {
    let failed = |source| StartError::Incarnation { path: path.to_owned(), source };
    let last: u64 = match std::fs::read_to_string(path) {
        Ok(text) => text.trim().parse().map_err(|_| {
            let why = format!("`{}` is not a number; remove the file", text.trim());
            failed(io::Error::new(io::ErrorKind::InvalidData, why))
        })?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(failed(error)),
    };
    let next = last.saturating_add(1);
    write_secret(path, format!("{next}\n").as_bytes()).map_err(failed)?;
    Ok(Incarnation(next))
}

/// The local address for the first coordinator to which there is a way.
fn local_ip(given: &[SocketAddr], kept: &[CoordinatorAddress]) -> Result<IpAddr, StartError> {
    let mut first = Err(StartError::Coordinators(0));
    for address in given.iter().copied().chain(kept.iter().map(|kept| kept.cluster)) {
        match (local_ip_to(address), &first) {
            (Ok(ip), _) => return Ok(ip),
            (Err(error), Err(StartError::Coordinators(_))) => first = Err(error),
            (Err(_), _) => {}
        }
    }
    first
}

/// The local address from which packets to the coordinator leave: where its peers find this worker.
fn local_ip_to(coordinator: SocketAddr) -> Result<IpAddr, StartError> {
    let failed = |source| StartError::Route { coordinator, source };
    let any: SocketAddr = match coordinator {
        SocketAddr::V4(_) => ([0; 4], 0).into(),
        SocketAddr::V6(_) => ([0; 16], 0).into(),
    };
    // Connecting a datagram socket sends nothing; it asks the routing table.
    let socket = UdpSocket::bind(any).map_err(failed)?;
    socket.connect(coordinator).map_err(failed)?;
    Ok(socket.local_addr().map_err(failed)?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_start_has_a_number_of_its_own() {
        let data = tempfile::tempdir().unwrap();
        let path = data.path().join("deep").join(INCARNATION_FILE);
        assert_eq!(next_incarnation(&path).unwrap(), Incarnation(1));
        assert_eq!(next_incarnation(&path).unwrap(), Incarnation(2));
        std::fs::write(&path, "x").unwrap();
        let error = next_incarnation(&path).unwrap_err().to_string();
        assert!(error.contains("incarnation") && error.contains("not a number"), "{error}");
    }

    #[test]
    fn a_worker_listens_where_its_coordinator_can_reach_it() {
        let loopback = local_ip_to("127.0.0.1:9".parse().unwrap()).unwrap();
        assert_eq!(loopback, IpAddr::from([127, 0, 0, 1]));
    }

    #[tokio::test]
    async fn without_identity_and_token_there_is_no_worker() {
        let data = tempfile::tempdir().unwrap();
        let config = WorkerConfig {
            join: vec!["127.0.0.1:9".parse().unwrap()],
            token: None,
            addresses: Default::default(),
            data: data.path().to_owned(),
            memory: Some(shoal_protocol::units::Bytes::mib(1)),
            threads: None,
            cpus: Default::default(),
            device: "cpu".to_owned(),
            builtin: Vec::new(),
            zone: None,
            ranks_apart: false,
            tracer: shoal_protocol::trace::Tracer::off(),
        };
        let error = Worker::start(config.clone()).await.unwrap_err().to_string();
        assert!(error.contains("shoal token create --role worker"), "{error}");
        let token = shoal_protocol::join::JoinToken {
            role: Role::Admin,
            ca_fingerprint: [0; 32],
            secret: [0; 32],
        };
        let config = WorkerConfig { token: Some(token), ..config };
        let error = Worker::start(config.clone()).await.unwrap_err();
        assert!(error.to_string().contains("token is for a admin"), "{error}");
        let config = WorkerConfig { join: vec![config.join[0]; COORDINATORS_MAX + 1], ..config };
        let error = Worker::start(config).await.unwrap_err().to_string();
        assert!(error.contains("17 coordinator addresses") && error.contains("--join"), "{error}");
    }
}
