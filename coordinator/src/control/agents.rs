//! ● The coordinator's side of `shoal-ctl`: who is connected, what they say, what they are told.
//!
//! ```text
//! connection ─► Register ─► Welcome ─┬─► Report, Probed ─► registry ─► `changed`
//!                                    └◄─ Assign, Probe ◄── outbox ◄─── executor, admin
//! ```
//!
//! Workers talk to every coordinator like this; the leader's executor alone tells them what to be. All
//! of it is soft state: it is rebuilt from the workers' own words after a restart. Only the start
//! number of a registration enters the log (see `admit`).

mod adapters;
mod blobs;
mod certificates;
mod probes;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use shoal_protocol::control::{
    COORDINATORS_MAX, CoordinatorAddress, CoordinatorMessage, MESSAGE_LEN_MAX, Register, Report,
    WorkerMessage,
};
use shoal_protocol::error::WireError;
use shoal_protocol::id::NodeId;
use shoal_protocol::mesh::{FACTS_MAX, Facts};
use shoal_protocol::plan::Assignment;
use shoal_protocol::prefix::PrefixReport;
use shoal_protocol::quic::{Connection, FrameReceiver, FrameSender, Pulse, Silence, close_code};
use shoal_protocol::trust::CAS_MAX;
use tokio::sync::{mpsc, watch};

use super::admit::{admit, reachable, record};
use super::authority::Authority;
use super::reconcile::ObservedWorker;
use super::registry::{Link, OUTBOX_MAX, Registry, Worker};
use super::store::ControlStore;
use blobs::Blobs;

/// How long a worker may take to register once it is connected.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(5);

/// The most shards that a worker may name: ten times what a machine holds.
const THINGS_MAX: usize = 1024;

/// All workers that have registered at this coordinator since its start.
#[derive(Clone, Debug)]
pub struct Agents {
    store: ControlStore,
    authority: Authority,
    registry: Arc<Mutex<Registry>>,
    /// Counts changes.
    changed: Arc<watch::Sender<u64>>,
    /// Who has which chunks of which model.
    blobs: Arc<Blobs>,
}

/// A worker that was let in, and the coordinators that its welcome named.
#[derive(Debug)]
struct Registered {
    register: Register,
    coordinators: Vec<CoordinatorAddress>,
}

/// Why a conversation with a worker ended.
#[derive(Debug, thiserror::Error)]
enum SessionEnd {
    #[error("it did not register within {REGISTER_TIMEOUT:?}")]
    NoRegistration,
    #[error("it was refused: {0}")]
    Refused(WireError),
    #[error("it broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("its link broke: {0}")]
    Link(String),
    #[error("it is given up: {0}")]
    Silent(Silence),
    #[error("it ended the conversation")]
    Finished,
    #[error("a newer connection of the same worker took its place")]
    Replaced,
}

impl Agents {
    /// Nobody is connected yet.
    pub fn new(store: ControlStore, authority: Authority) -> Self {
        let changed = Arc::new(watch::Sender::new(0));
        let registry = Arc::new(Mutex::new(Registry::new(SystemTime::now())));
        Self { store, authority, registry, changed, blobs: Arc::default() }
    }

    /// Fires whenever a worker comes, goes or reports.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Whether a worker is connected.
    pub fn any_connected(&self) -> bool {
        self.lock().workers.values().any(|worker| worker.link.is_some())
    }

    /// All workers that have registered, with all that is known of them.
    pub fn observe(&self) -> BTreeMap<NodeId, ObservedWorker> {
        let of = |worker: &Worker| ObservedWorker {
            connected: worker.link.is_some(),
            silent_for: worker.link.as_ref().map_or(Duration::MAX, |link| link.pulse.silent_for()),
            register: worker.register.clone(),
            report: worker.report.clone(),
            facts: worker.facts.clone(),
            rtt: worker.link.as_ref().map(|link| link.connection.stats().rtt),
            pushed: worker.pushed.clone(),
        };
        self.lock().workers.iter().map(|(node, worker)| (*node, of(worker))).collect()
    }

    /// What the heads of connected workers said of blocks that are shared.
    pub fn prefixes(&self) -> Vec<PrefixReport> {
        let registry = self.lock();
        let connected = registry.workers.values().filter(|worker| worker.link.is_some());
        connected.flat_map(|worker| &worker.prefixes).copied().collect()
    }

    /// Tells a worker all that it should be, as the leader of this epoch. A worker that is gone is told
    /// when it is back.
    pub fn assign(&self, node: NodeId, epoch: u64, assignments: Vec<Assignment>) {
        let mut registry = self.lock();
        let Some(worker) = registry.workers.get_mut(&node) else { return };
        let Some(link) = &worker.link else { return };
        let epoch = epoch.max(worker.floor);
        let message = CoordinatorMessage::Assign { epoch, assignments: assignments.clone() };
        if link.send(node, message) {
            worker.pushed = Some(assignments);
        }
    }

    /// This coordinator begins to lead: nobody has been told anything by this leader yet.
    pub fn begin_to_lead(&self) {
        self.lock().workers.values_mut().for_each(|worker| worker.pushed = None);
    }

    /// The workers that say that a later leader has told them what to be, and its epoch.
    pub fn outranked(&self) -> BTreeMap<NodeId, u64> {
        let registry = self.lock();
        let workers = registry.workers.iter();
        workers.filter_map(|(node, worker)| Some((*node, worker.outranked?))).collect()
    }

    /// Speaks to these workers with greater epochs from now on. Only for a leader (of this epoch) that
    /// has made sure, after they said so, that it still is the leader.
    pub fn outrank(&self, epoch: u64, outranked: &BTreeMap<NodeId, u64>) {
        let mut registry = self.lock();
        for (node, later) in outranked {
            let Some(worker) = registry.workers.get_mut(node) else { continue };
            worker.outranked = None;
            // Said to this coordinator when it led before.
            if *later < epoch {
                continue;
            }
            tracing::warn!(
                %node,
                epoch,
                later,
                "was told by a later leader than any that this cluster knows (was its state restored \
                 from a backup?); it is told anew"
            );
            worker.floor = worker.floor.max(later.saturating_add(1));
            worker.pushed = None;
        }
    }

    /// Tells all workers, those that are connected and those that come, where the coordinators are: at
    /// most `COORDINATORS_MAX` of them.
    pub fn set_coordinators(&self, mut coordinators: Vec<CoordinatorAddress>) {
        coordinators.truncate(COORDINATORS_MAX);
        let mut registry = self.lock();
        if registry.coordinators == coordinators {
            return;
        }
        for (node, worker) in &registry.workers {
            if let Some(link) = &worker.link {
                link.send(*node, CoordinatorMessage::Coordinators(coordinators.clone()));
            }
        }
        registry.coordinators = coordinators;
    }

    /// Holds the conversation with one worker, to its end.
    pub async fn serve(&self, connection: Connection) {
        // An endpoint lets nobody begin this conversation without a certificate.
        let Some(node) = connection.peer() else { return };
        let end = match self.register(node, &connection).await {
            Err(end) => end,
            Ok((registered, sender, receiver)) => {
                self.converse(node, registered, &connection, sender, receiver).await
            }
        };
        let code = match end {
            SessionEnd::Refused(_) => close_code::REFUSED,
            SessionEnd::NoRegistration | SessionEnd::Protocol(_) => close_code::PROTOCOL,
            SessionEnd::Link(_)
            | SessionEnd::Silent(_)
            | SessionEnd::Finished
            | SessionEnd::Replaced => close_code::DONE,
        };
        tracing::info!(%node, address = %connection.remote_address(), "control link ended: {end}");
        connection.close(code, &end.to_string());
    }

    async fn register(
        &self,
        node: NodeId,
        connection: &Connection,
    ) -> Result<(Registered, FrameSender, FrameReceiver), SessionEnd> {
        let link = |error: &dyn std::fmt::Display| SessionEnd::Link(error.to_string());
        let hello = async {
            let (sender, mut receiver) =
                connection.accept_bi().await.map_err(|error| link(&error))?;
            let first = receiver.message(MESSAGE_LEN_MAX).await.map_err(|error| link(&error))?;
            Ok((first, sender, receiver))
        };
        let hello = tokio::time::timeout(REGISTER_TIMEOUT, hello).await;
        let (first, mut sender, receiver) = hello.map_err(|_| SessionEnd::NoRegistration)??;
        let Some(WorkerMessage::Register(mut register)) = first else {
            return Err(SessionEnd::Protocol("its first message is not its registration"));
        };
        let coordinators = self.lock().coordinators.clone();
        match admit(&self.store, node, &register).await {
            Ok(version) => {
                let told = coordinators.clone();
                let welcome = CoordinatorMessage::Welcome { version, coordinators: told };
                let sent = sender.send_message(&welcome, MESSAGE_LEN_MAX).await;
                sent.map_err(|error| link(&error))?;
            }
            Err(refusal) => {
                let message = CoordinatorMessage::Refused(refusal.clone());
                if sender.send_message(&message, MESSAGE_LEN_MAX).await.is_ok() {
                    sender.finish();
                    // The words should arrive before the connection closes.
                    let _ = tokio::time::timeout(REGISTER_TIMEOUT, sender.stopped()).await;
                }
                return Err(SessionEnd::Refused(refusal));
            }
        }
        let remote = connection.remote_address();
        register.requests = reachable(register.requests, remote);
        register.activations = reachable(register.activations, remote);
        Ok((Registered { register, coordinators }, sender, receiver))
    }

    async fn converse(
        &self,
        node: NodeId,
        registered: Registered,
        connection: &Connection,
        sender: FrameSender,
        receiver: FrameReceiver,
    ) -> SessionEnd {
        let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
        let pulse = Arc::new(Pulse::default());
        let register = registered.register.clone();
        let Some(session) = self.connected(node, registered, connection, &pulse, outbox) else {
            return SessionEnd::Replaced;
        };
        // Both halves run until one of them ends; a message is never left half-read for the other.
        let end = tokio::select! {
            end = self.listen(node, (session, connection.remote_address()), receiver) => end,
            end = speak(sender, messages) => end,
            end = self.tell_blobs(node, session, register.versions.max) => end,
            refused = record(&self.store, node, &register) => SessionEnd::Refused(refused.into()),
            reason = connection.closed() => SessionEnd::Link(reason.to_string()),
            silence = pulse.follow(connection) => SessionEnd::Silent(silence),
        };
        self.forget_blobs(node, session);
        self.disconnected(node, session);
        end
    }

    async fn listen(
        &self,
        node: NodeId,
        (session, remote): (u64, SocketAddr),
        mut receiver: FrameReceiver,
    ) -> SessionEnd {
        loop {
            match receiver.message(MESSAGE_LEN_MAX).await {
                Ok(Some(WorkerMessage::Report(report))) => {
                    if report.shards.len() > THINGS_MAX || report.heads.len() > THINGS_MAX {
                        return SessionEnd::Protocol("it reports more shards than a worker has");
                    }
                    self.with_link(node, session, |worker| worker.report = report);
                    self.changed.send_modify(|n| *n += 1);
                }
                Ok(Some(WorkerMessage::Probed { probe, result })) => {
                    let waiting = self.with_link(node, session, |worker| {
                        worker.link.as_mut().and_then(|link| link.probes.remove(&probe))
                    });
                    // Nobody waits for an answer that comes after the deadline.
                    if let Some(waiting) = waiting.flatten() {
                        let _ = waiting.send(result);
                    }
                }
                Ok(Some(WorkerMessage::Trusts { trusts, shows })) => {
                    if trusts.len() > CAS_MAX {
                        return SessionEnd::Protocol("it believes more CAs than there can be");
                    }
                    self.with_link(node, session, |worker| {
                        (worker.trusts, worker.shows) = (trusts, Some(shows));
                    });
                    self.changed.send_modify(|n| *n += 1);
                }
                // It asks another one after a while.
                Ok(Some(WorkerMessage::Renew { .. })) if self.authority.current().is_none() => {
                    tracing::debug!(%node, "asks for a certificate where the CA's key is not");
                }
                Ok(Some(WorkerMessage::Renew { csr })) => match self.renew(node, &csr) {
                    Ok(certificate) => {
                        let renewed = CoordinatorMessage::Renewed { certificate };
                        // A worker whose outbox is full asks again.
                        self.with_link(node, session, |worker| {
                            worker.link.as_ref().map(|link| link.outbox.try_send(renewed))
                        });
                    }
                    Err(why) => {
                        tracing::warn!(%node, "its certificate was not renewed: {why}");
                        return SessionEnd::Protocol("it asked for a certificate that is not its");
                    }
                },
                Ok(Some(WorkerMessage::Facts(facts))) => {
                    if facts.len() > FACTS_MAX {
                        return SessionEnd::Protocol("it says more of itself than there is");
                    }
                    self.with_link(node, session, |worker| worker.facts = Facts::of(facts));
                    self.changed.send_modify(|n| *n += 1);
                }
                Ok(Some(WorkerMessage::Blobs { address, news })) => {
                    if let Err(why) = self.hear_blobs(node, reachable(address, remote), news) {
                        return SessionEnd::Protocol(why);
                    }
                }
                Ok(Some(WorkerMessage::Adapters(held))) => {
                    if let Err(why) = self.hear_adapters(node, session, held) {
                        return SessionEnd::Protocol(why);
                    }
                }
                Ok(Some(WorkerMessage::Prefixes(prefixes))) => {
                    if prefixes.len() > THINGS_MAX {
                        return SessionEnd::Protocol("it reports more heads than a worker has");
                    }
                    // Figures alone: they are seen with the next report.
                    self.with_link(node, session, |worker| worker.prefixes = prefixes);
                }
                Ok(Some(WorkerMessage::Outranked { epoch })) => {
                    self.with_link(node, session, |worker| worker.outranked = Some(epoch));
                    self.changed.send_modify(|n| *n += 1);
                }
                Ok(Some(WorkerMessage::Register(_))) => {
                    return SessionEnd::Protocol("it registered twice");
                }
                Ok(None) => return SessionEnd::Finished,
                Err(error) => return SessionEnd::Link(error.to_string()),
            }
        }
    }

    fn connected(
        &self,
        node: NodeId,
        registered: Registered,
        connection: &Connection,
        pulse: &Arc<Pulse>,
        outbox: mpsc::Sender<CoordinatorMessage>,
    ) -> Option<u64> {
        let Registered { register, coordinators } = registered;
        self.store.heard().keep(&self.store.state());
        self.store.heard().note(node, register.incarnation.0, register.versions.max);
        let mut registry = self.lock();
        let session = registry.number();
        let (mut report, mut facts) = (Report::default(), Facts::default());
        let mut adapters = Vec::new();
        if let Some(older) = registry.workers.get(&node) {
            // Two registrations may have passed the log at the same time.
            if older.register.incarnation > register.incarnation {
                return None;
            }
            // The same process after a broken link is still what it last said.
            if older.register.incarnation == register.incarnation {
                (report, facts) = (older.report.clone(), older.facts.clone());
                adapters.clone_from(&older.adapters);
            }
            if let Some(link) = &older.link {
                link.connection.close(close_code::DONE, "a newer connection took your place");
            }
        }
        tracing::info!(
            %node,
            incarnation = %register.incarnation,
            address = %register.activations,
            requests = %register.requests,
            "worker registered"
        );
        let (connection, pulse) = (connection.clone(), Arc::clone(pulse));
        let link = Link { session, connection, pulse, outbox, probes: BTreeMap::new() };
        // They may have changed since the welcome.
        if registry.coordinators != coordinators {
            link.send(node, CoordinatorMessage::Coordinators(registry.coordinators.clone()));
        }
        let worker = Worker { facts, adapters, ..Worker::new(register, report, link) };
        worker.tell_trust(node, &registry.trust);
        worker.tell_adapters(node, &registry.adapters);
        registry.workers.insert(node, worker);
        drop(registry);
        self.changed.send_modify(|n| *n += 1);
        Some(session)
    }

    fn disconnected(&self, node: NodeId, session: u64) {
        self.with_link(node, session, |worker| {
            // Those who wait for its probes see that it is gone.
            worker.link = None;
            worker.pushed = None;
            worker.outranked = None;
        });
        self.changed.send_modify(|n| *n += 1);
    }

    /// Does something with a worker, if this connection is still its link.
    fn with_link<T>(
        &self,
        node: NodeId,
        session: u64,
        action: impl FnOnce(&mut Worker) -> T,
    ) -> Option<T> {
        let mut registry = self.lock();
        let worker = registry.workers.get_mut(&node)?;
        let current = worker.link.as_ref().is_some_and(|link| link.session == session);
        current.then(|| action(worker))
    }

    fn lock(&self) -> MutexGuard<'_, Registry> {
        // A panic under the lock leaves plain data, each field of which is valid by itself.
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn speak(
    mut sender: FrameSender,
    mut messages: mpsc::Receiver<CoordinatorMessage>,
) -> SessionEnd {
    while let Some(message) = messages.recv().await {
        if let Err(error) = sender.send_message(&message, MESSAGE_LEN_MAX).await {
            return SessionEnd::Link(error.to_string());
        }
    }
    SessionEnd::Replaced
}
