//! ● The conversation with one coordinator (`shoal-ctl`): register, report, be told. It begins again
//! for as long as the coordinator is one; the shards never notice.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::adapters::HeldAdapters;
use shoal_protocol::control::{
    BadCoordinators, CoordinatorAddress, CoordinatorMessage, MESSAGE_LEN_MAX, Register, Report,
    WorkerMessage,
};
use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::mesh::Fact;
use shoal_protocol::prefix::PrefixReport;
use shoal_protocol::quic::{
    Alpn, Connection, Expect, FrameReceiver, FrameSender, Pulse, Silence, close_code,
};
use shoal_protocol::trust::BadTrust;
use shoal_protocol::version::{
    KNOWS_ADAPTERS, KNOWS_HUB, KNOWS_MESHES, KNOWS_PREFIXES, KNOWS_TRUST,
};
use tokio::sync::{mpsc, watch};

use super::book::Book;
use super::coordinators::Coordinators;
use super::renewal::Renewal;
use crate::blob::{Telling, more};
use crate::head::Heads;

/// How long a coordinator may take to be reached and to say `Welcome`.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(5);

/// The pause after the first failure; it doubles up to `RETRY_PAUSE_MAX`.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(50);

/// The longest pause: a coordinator that is back is found again within so long.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Reports that follow each other sooner are sent as one.
const REPORT_PAUSE: Duration = Duration::from_millis(10);

/// How often to see whether a new certificate is due: one of the sessions asks, and another where
/// that one gets no answer.
const RENEW_LOOK: Duration = Duration::from_secs(60);

/// Answers that wait to be sent: as many probes as are at work at once, and as many refusals.
const ANSWERS_MAX: usize = 16;

/// How a session finds its coordinator.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// It is this one, wherever it is, and nobody else.
    Node(NodeId),
    /// Any coordinator of the cluster that is there: what a person gave.
    Seed(SocketAddr),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Node(node) => write!(f, "{node}"),
            Place::Seed(address) => write!(f, "{address}"),
        }
    }
}

/// What a coordinator says, and where answers to it go.
#[derive(Debug)]
pub(super) struct Told {
    pub from: NodeId,
    pub message: CoordinatorMessage,
    pub answers: mpsc::Sender<WorkerMessage>,
}

/// One session.
#[derive(Debug)]
pub(super) struct Session {
    place: Place,
    shared: Coordinators,
    answers: mpsc::Sender<WorkerMessage>,
    answers_inbox: mpsc::Receiver<WorkerMessage>,
    /// The last conversation ended because a certificate was not believed.
    distrusted: bool,
}

/// Why a conversation ended.
#[derive(Debug, thiserror::Error)]
enum SessionEnd {
    #[error("{0}")]
    Unreachable(String),
    #[error("there is a conversation with {0} already")]
    Taken(NodeId),
    #[error("the coordinator refuses this worker: {0}")]
    Refused(shoal_protocol::error::WireError),
    #[error("the coordinator said {0} where a welcome was expected")]
    NoWelcome(&'static str),
    #[error("no welcome within {WELCOME_TIMEOUT:?}")]
    Timeout,
    #[error("the conversation broke off: {0}")]
    Broken(String),
    #[error("{0} is given up: {1}")]
    Silent(NodeId, Silence),
    #[error(transparent)]
    Named(#[from] BadCoordinators),
    #[error(transparent)]
    Trust(#[from] BadTrust),
    #[error("{0} is no coordinator of this cluster any more")]
    Left(NodeId),
    #[error("the agent has ended")]
    AgentEnded,
}

impl Session {
    pub fn new(shared: Coordinators, place: Place) -> Self {
        let (answers, answers_inbox) = mpsc::channel(ANSWERS_MAX);
        Self { place, shared, answers, answers_inbox, distrusted: false }
    }

    /// Holds conversations until the agent ends or the coordinator is none any more.
    pub async fn run(mut self) {
        let mut pause = RETRY_PAUSE_MIN;
        // A worker that cannot register says so once, not every second.
        let mut last_words = String::new();
        for attempt in 0_usize.. {
            let Some((address, expect)) = self.turn(attempt).await else { return };
            match self.converse(address, expect, &mut pause).await {
                SessionEnd::AgentEnded => return,
                end @ (SessionEnd::Taken(_) | SessionEnd::Left(_)) => tracing::debug!("{end}"),
                end => {
                    let words = format!("no conversation with {address}: {end}");
                    if words == last_words {
                        tracing::debug!("{words}");
                    } else {
                        tracing::warn!("{words}");
                        last_words = words;
                    }
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    /// Waits until there is a reason to connect; `None` where there will be none any more.
    async fn turn(&self, attempt: usize) -> Option<(SocketAddr, Expect)> {
        let mut book = self.shared.book.subscribe();
        match self.place {
            Place::Node(node) => {
                let free =
                    book.wait_for(|book| !book.known().contains_key(&node) || !book.talks_to(node));
                let address = free.await.ok()?.address_of(node, attempt)?;
                Some((address, Expect::Node(node)))
            }
            Place::Seed(address) => {
                book.wait_for(|book| book.needs_seed(address)).await.ok()?;
                Some((address, Expect::Role(Role::Coordinator)))
            }
        }
    }

    async fn converse(
        &mut self,
        address: SocketAddr,
        expect: Expect,
        pause: &mut Duration,
    ) -> SessionEnd {
        let distrusted = std::mem::take(&mut self.distrusted);
        let who = self.place.to_string();
        if let Err(error) = self.shared.renewal.refresh(address, distrusted).await {
            match error.downcast_ref() {
                Some(error) => {
                    let (book, seeds) = (self.shared.book.borrow(), &self.shared.seeds);
                    self.shared.fate.not_renewed(&who, error, &book, seeds);
                }
                None => self.shared.fate.otherwise(&who),
            }
            return SessionEnd::Unreachable(error.to_string());
        }
        let endpoint = &self.shared.endpoint;
        let connection =
            match endpoint.connect(address, expect, Alpn::Control, WELCOME_TIMEOUT).await {
                Ok(connection) => connection,
                Err(error) => {
                    self.distrusted = error.is_distrust();
                    if !self.distrusted {
                        self.shared.fate.otherwise(&who);
                    }
                    return SessionEnd::Unreachable(error.to_string());
                }
            };
        let Some(node) = connection.peer() else {
            return SessionEnd::Unreachable(format!("{address} has no name"));
        };
        let book = self.shared.book.clone();
        // Nobody waits for its beginning, so that nobody is woken.
        let mut begun = false;
        book.send_if_modified(|book| {
            begun = book.begin(node);
            false
        });
        let end = match begun {
            true => self.talk(node, &connection, pause).await,
            false => SessionEnd::Taken(node),
        };
        self.distrusted = connection.was_distrusted();
        if let Some(why) = connection.removal() {
            self.shared.fate.removed(why);
        }
        connection.close(close_code::DONE, &end.to_string());
        if begun {
            book.send_modify(|book| book.end(node));
        }
        end
    }

    async fn talk(
        &mut self,
        node: NodeId,
        connection: &Connection,
        pause: &mut Duration,
    ) -> SessionEnd {
        let at = connection.remote_address();
        let registering = async {
            let (mut sender, mut receiver) =
                connection.open_bi().await.map_err(|e| SessionEnd::Broken(e.to_string()))?;
            let welcome = register(&mut sender, &mut receiver, &self.shared.register).await?;
            Ok((sender, receiver, welcome))
        };
        let registered = tokio::time::timeout(WELCOME_TIMEOUT, registering).await;
        let (sender, receiver, (version, list)) =
            match registered.unwrap_or(Err(SessionEnd::Timeout)) {
                Ok(registered) => registered,
                Err(end) => return end,
            };
        *pause = RETRY_PAUSE_MIN;
        self.shared.fate.believed();
        tracing::info!("registered at {node} ({at}) as {}", self.shared.register.node);
        let pulse = Pulse::default().renewing(Arc::clone(&self.shared.lease));
        let work = self.shared.work.clone();
        let Coordinators { book, renewal, told, reports, facts, adapters, heads, .. } =
            &mut self.shared;
        let answers = &mut self.answers_inbox;
        let said = Said { reports, facts, adapters, heads, answers };
        let mut dropped = book.subscribe();
        let ear = Ear { node, at, book, told, answers: &self.answers };
        ear.hear(list);
        tokio::select! {
            end = listen(receiver, renewal, ear) => end,
            end = report(sender, said, renewal, version) => end,
            silence = pulse.keep(connection, work) => SessionEnd::Silent(node, silence),
            _ = dropped.wait_for(|book| !book.known().contains_key(&node)) => SessionEnd::Left(node),
        }
    }
}

/// Where what a coordinator says goes.
struct Ear<'a> {
    node: NodeId,
    at: SocketAddr,
    book: &'a watch::Sender<Book>,
    told: &'a mpsc::Sender<Told>,
    answers: &'a mpsc::Sender<WorkerMessage>,
}

impl Ear<'_> {
    fn hear(&self, list: Vec<CoordinatorAddress>) {
        self.book.send_modify(|book| book.hear(self.node, self.at, list));
    }

    async fn tell(&self, message: CoordinatorMessage) -> Result<(), SessionEnd> {
        let told = Told { from: self.node, message, answers: self.answers.clone() };
        self.told.send(told).await.map_err(|_| SessionEnd::AgentEnded)
    }
}

/// Says who this worker is; the version and the coordinators that the welcome names.
async fn register(
    sender: &mut FrameSender,
    receiver: &mut FrameReceiver,
    register: &Register,
) -> Result<(u16, Vec<CoordinatorAddress>), SessionEnd> {
    let broken = |why: String| SessionEnd::Broken(why);
    let message = WorkerMessage::Register(register.clone());
    sender.send_message(&message, MESSAGE_LEN_MAX).await.map_err(|e| broken(e.to_string()))?;
    let answer = receiver.message(MESSAGE_LEN_MAX).await.map_err(|e| broken(e.to_string()))?;
    let instead = match answer {
        Some(CoordinatorMessage::Welcome { version, coordinators }) => {
            let ours = register.versions;
            if !(ours.min..=ours.max).contains(&version) {
                return Err(SessionEnd::NoWelcome("a version that this worker does not speak"));
            }
            CoordinatorAddress::check(&coordinators)?;
            return Ok((version, coordinators));
        }
        Some(CoordinatorMessage::Refused(error)) => return Err(SessionEnd::Refused(error)),
        Some(CoordinatorMessage::Assign { .. }) => "Assign",
        Some(CoordinatorMessage::Probe { .. }) => "Probe",
        Some(CoordinatorMessage::Drain { .. }) => "Drain",
        Some(CoordinatorMessage::Renewed { .. }) => "Renewed",
        Some(CoordinatorMessage::Coordinators(_)) => "Coordinators",
        Some(CoordinatorMessage::Trust { .. }) => "Trust",
        Some(CoordinatorMessage::Blobs(_)) => "Blobs",
        Some(CoordinatorMessage::Adapters(_)) => "Adapters",
        None => "nothing",
    };
    Err(SessionEnd::NoWelcome(instead))
}

async fn listen(mut receiver: FrameReceiver, renewal: &Renewal, ear: Ear<'_>) -> SessionEnd {
    loop {
        match receiver.message(MESSAGE_LEN_MAX).await {
            Ok(Some(CoordinatorMessage::Renewed { certificate })) => {
                renewal.take(certificate).await;
            }
            Ok(Some(CoordinatorMessage::Trust { trust, signs })) => {
                if let Err(bad) = renewal.believe(trust).await {
                    return bad.into();
                }
                // Where the answers are many, it is said again.
                if let Some(request) = renewal.request_if_outdated(signs) {
                    let _ = ear.answers.try_send(request);
                }
            }
            Ok(Some(CoordinatorMessage::Blobs(said))) => {
                if let Some(blobs) = &renewal.blobs {
                    blobs.hear(ear.node, said);
                }
            }
            Ok(Some(CoordinatorMessage::Coordinators(list))) => {
                if let Err(bad) = CoordinatorAddress::check(&list) {
                    return bad.into();
                }
                ear.hear(list);
            }
            Ok(Some(message)) => {
                if let Err(end) = ear.tell(message).await {
                    return end;
                }
            }
            Ok(None) => return SessionEnd::Broken("the coordinator ended it".to_owned()),
            Err(error) => return SessionEnd::Broken(error.to_string()),
        }
    }
}

/// What there is to say.
struct Said<'a> {
    reports: &'a mut watch::Receiver<Report>,
    facts: &'a mut watch::Receiver<Vec<Fact>>,
    adapters: &'a mut watch::Receiver<Vec<HeldAdapters>>,
    heads: &'a Heads,
    answers: &'a mut mpsc::Receiver<WorkerMessage>,
}

async fn report(
    mut sender: FrameSender,
    said: Said<'_>,
    renewal: &Renewal,
    version: u16,
) -> SessionEnd {
    let Said { reports, facts, adapters, heads, answers } = said;
    let mut prefixes: Vec<PrefixReport> = Vec::new();
    reports.mark_changed();
    facts.mark_changed();
    // Who was never told of any has nothing to say of them.
    if !adapters.borrow().is_empty() {
        adapters.mark_changed();
    }
    let mut said = renewal.said.subscribe();
    said.mark_changed();
    // The first look at once: a worker may come back with a certificate that is almost a day old.
    let mut renew = tokio::time::interval(RENEW_LOOK);
    let mut chunks = renewal.blobs.as_ref().map(Telling::new);
    loop {
        let message = tokio::select! {
            changed = reports.changed() => match changed {
                Ok(()) => {
                    tokio::time::sleep(REPORT_PAUSE).await;
                    let now = if version >= KNOWS_PREFIXES { heads.prefixes() } else { Vec::new() };
                    // First, so that whoever looks at reports sees them.
                    if now != prefixes {
                        prefixes.clone_from(&now);
                        let message = WorkerMessage::Prefixes(now);
                        if let Err(error) = sender.send_message(&message, MESSAGE_LEN_MAX).await {
                            return SessionEnd::Broken(error.to_string());
                        }
                    }
                    WorkerMessage::Report(reports.borrow_and_update().clone())
                }
                Err(_) => return SessionEnd::AgentEnded,
            },
            Some(answer) = answers.recv() => answer,
            Ok(()) = said.changed(), if version >= KNOWS_TRUST => match renewal.trusts() {
                Some(message) => message,
                None => continue,
            },
            Ok(()) = facts.changed(), if version >= KNOWS_MESHES => {
                WorkerMessage::Facts(facts.borrow_and_update().clone())
            }
            Ok(()) = adapters.changed(), if version >= KNOWS_ADAPTERS => {
                WorkerMessage::Adapters(adapters.borrow_and_update().clone())
            }
            message = more(&mut chunks), if version >= KNOWS_HUB => message,
            _ = renew.tick() => match renewal.request() {
                Some(message) => message,
                None => continue,
            },
        };
        if let Err(error) = sender.send_message(&message, MESSAGE_LEN_MAX).await {
            return SessionEnd::Broken(error.to_string());
        }
    }
}
