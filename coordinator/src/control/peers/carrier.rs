//! ● The sending side: one task per peer, and the search for peers that are not known yet.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use prost::Message as _;
use raft::prelude::{Message, MessageType};
use shoal_protocol::error::ErrorCode;
use shoal_protocol::frame::FrameKind;
use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::peer::{MESSAGE_LEN_MAX, PeerReply, PeerRequest};
use shoal_protocol::quic::{Alpn, Connection, Expect, FrameSender, close_code};
use tokio::time::timeout;

use super::Peers;
use super::outbox::Outbox;
use crate::control::state::{Change, CoordinatorCommand};
use crate::control::store::Side;
use crate::control::store::raft::NetworkEvent;

/// How long a peer may take to be reached and to say `Welcome`: longer than a busy machine needs, and
/// an election does not wait for it.
pub(super) const GREET_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a message may take to be taken: a snapshot of many MiB over a slow link.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// The wait after a peer could not be reached; it doubles up to `RETRY_MAX`.
const RETRY_FIRST: Duration = Duration::from_millis(50);

/// The longest such wait: about an election, so that a peer that is back takes part in the next one.
const RETRY_MAX: Duration = Duration::from_millis(400);

/// How often a coordinator that nobody writes to looks for the others.
const FIND_EVERY: Duration = Duration::from_secs(1);

/// Why a greeting failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum GreetError {
    #[error("{0}")]
    Unreachable(String),
    #[error("it refuses: {0}")]
    Refused(shoal_protocol::error::WireError),
    #[error("it did not answer within {GREET_TIMEOUT:?}")]
    Late,
    /// It would not understand what the log holds, and end.
    #[error(
        "it speaks protocol version {speaks} and the log needs {needs}: nothing is sent to it before it runs a \
         newer build"
    )]
    TooOld { speaks: u16, needs: u16 },
}

/// A coordinator that has welcomed this one.
pub(super) struct Greeted {
    pub connection: Connection,
    pub sender: FrameSender,
    /// The version that both speak: what it speaks, unless that is newer than what this one does.
    pub version: u16,
}

impl Peers {
    /// Carries messages to one peer, for ever.
    pub(super) async fn carry(self, id: u64, outbox: Arc<Outbox>) {
        let Ok(number) = u32::try_from(id) else { return };
        let node = NodeId::coordinator(number);
        let mut retry = RETRY_FIRST;
        // Said once, not with every message that it is spared.
        let mut said_too_old = false;
        loop {
            outbox.wait().await;
            let greeted = match self.address_of(node) {
                Some(address) => self.greet(address, Expect::Node(node)).await,
                None => Err(GreetError::Unreachable("nobody knows its address".into())),
            };
            match greeted {
                Ok(Greeted { connection, sender, .. }) => {
                    tracing::debug!(%node, "connected to the coordinator");
                    (retry, said_too_old) = (RETRY_FIRST, false);
                    self.send_all(id, &outbox, &connection, sender).await;
                    connection.close(close_code::DONE, "");
                }
                Err(error) => {
                    match error {
                        GreetError::TooOld { .. } if !said_too_old => {
                            tracing::warn!(%node, "{error}");
                            said_too_old = true;
                        }
                        _ => tracing::debug!(%node, "the coordinator cannot be reached: {error}"),
                    }
                    self.lost(id, outbox.clear()).await;
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(RETRY_MAX);
                }
            }
        }
    }

    async fn send_all(
        &self,
        id: u64,
        outbox: &Outbox,
        connection: &Connection,
        mut sender: FrameSender,
    ) {
        loop {
            let message = tokio::select! {
                message = outbox.next() => message,
                reason = connection.closed() => {
                    tracing::debug!(peer = id, "the coordinator is gone: {reason}");
                    return self.lost(id, outbox.clear()).await;
                }
            };
            let snapshot = message.get_msg_type() == MessageType::MsgSnapshot;
            let body = message.encode_to_vec();
            let sent =
                timeout(SEND_TIMEOUT, sender.send_encoded(FrameKind::Message, &[], body)).await;
            let arrived = matches!(sent, Ok(Ok(())));
            if snapshot {
                // It is in the transport's hands, which either delivers it or ends the connection.
                let _ = self.network.send(NetworkEvent::SnapshotSent(id, arrived)).await;
            }
            if !arrived {
                return self.lost(id, outbox.clear()).await;
            }
        }
    }

    async fn lost(&self, id: u64, messages: Vec<Message>) {
        for message in messages {
            if message.get_msg_type() == MessageType::MsgSnapshot {
                let _ = self.network.send(NetworkEvent::SnapshotSent(id, false)).await;
            }
        }
        let _ = self.network.send(NetworkEvent::Unreachable(id)).await;
    }

    /// Connects and says who this is.
    pub(super) async fn greet(
        &self,
        address: SocketAddr,
        expect: Expect,
    ) -> Result<Greeted, GreetError> {
        let unreachable =
            |error: &dyn std::fmt::Display| GreetError::Unreachable(error.to_string());
        let connection = self.endpoint.connect(address, expect, Alpn::Raft, GREET_TIMEOUT).await;
        let connection = connection.map_err(|error| {
            self.note_distrust(error.is_distrust());
            unreachable(&error)
        })?;
        let exchange = async {
            let (mut sender, mut receiver) =
                connection.open_bi().await.map_err(|error| unreachable(&error))?;
            let hello = PeerRequest::Log(self.hello());
            let sent = sender.send_message(&hello, MESSAGE_LEN_MAX).await;
            sent.map_err(|error| unreachable(&error))?;
            let reply = receiver.message(MESSAGE_LEN_MAX).await;
            match reply.map_err(|error| unreachable(&error))? {
                Some(PeerReply::Welcome { version, coordinators }) => {
                    let needs = self.store.state().versions.log();
                    if version < needs {
                        return Err(GreetError::TooOld { speaks: version, needs });
                    }
                    for known in coordinators {
                        if self.address_of(known.node).is_none() {
                            self.saw(known.node, known.cluster);
                        }
                    }
                    Ok((sender, version))
                }
                Some(PeerReply::Refused(error)) => Err(GreetError::Refused(error)),
                Some(PeerReply::CaKey { .. }) | None => {
                    Err(GreetError::Unreachable("it broke the protocol".into()))
                }
            }
        };
        match timeout(GREET_TIMEOUT, exchange).await.unwrap_or(Err(GreetError::Late)) {
            Ok((sender, version)) => {
                self.welcomed.store(true, Ordering::Relaxed);
                if let Some(node) = connection.peer() {
                    self.store.welcomes(node, Side::There);
                }
                Ok(Greeted { connection, sender, version })
            }
            Err(error) => {
                self.note_distrust(connection.was_distrusted());
                match (&error, connection.peer()) {
                    (GreetError::Refused(refusal), Some(node)) => self.refused(node, refusal),
                    (GreetError::TooOld { .. }, Some(node)) => {
                        self.store.refuses(node, Side::Here, error.to_string());
                    }
                    _ => {}
                }
                connection.close(close_code::DONE, "");
                Err(error)
            }
        }
    }

    /// Shows itself to the others that it knows of, until one of them has welcomed it.
    pub(super) async fn present(self) {
        let mut changes = self.store.watch();
        while !self.welcomed.load(Ordering::Relaxed) {
            let state = Arc::clone(&changes.borrow_and_update());
            let all = state.coordinators.iter().map(|(node, _)| node);
            let others: Vec<_> = all.filter(|node| *node != self.me.node).collect();
            if others.is_empty() {
                // The store ends after all conversations.
                if changes.changed().await.is_err() {
                    return;
                }
                continue;
            }
            for node in others {
                let Some(address) = self.address_of(node) else { continue };
                if let Ok(greeted) = self.greet(address, Expect::Node(node)).await {
                    greeted.connection.close(close_code::DONE, "");
                    return;
                }
            }
            tokio::time::sleep(RETRY_MAX).await;
        }
    }

    /// What another coordinator refuses for good ends this process: it would only do harm.
    fn refused(&self, node: NodeId, refusal: &shoal_protocol::error::WireError) {
        self.store.refuses(node, Side::There, refusal.message.clone());
        match refusal.code {
            // Its next start would have a higher number, and be let in.
            ErrorCode::AlreadyExists => self.end(refusal.message.clone()),
            // The next start is told so too. Whoever says it may be one that went on alone while a majority was only
            // out of its sight: that one's folders must not be spoilt by a word.
            ErrorCode::PermissionDenied => self.leave(refusal.message.clone()),
            _ => {
                let words = self.refused.say(&format!("{node} answers"), &refusal.to_string());
                if let Some(words) = words {
                    tracing::warn!(%node, "another coordinator refuses this one: {words}");
                }
            }
        }
    }

    /// Says where this coordinator is, to one that may know the others, until the state knows it too:
    /// the one who hears it writes it down.
    pub(super) async fn find(self, seed: SocketAddr) {
        loop {
            let known = self.store.state().coordinators.get(self.me.node).cloned();
            let current = |record: crate::control::state::CoordinatorRecord| {
                record.boot == self.me.boot && record.cluster == self.me.cluster
            };
            if known.is_some_and(current) {
                return;
            }
            match self.greet(seed, Expect::Role(Role::Coordinator)).await {
                Ok(Greeted { connection, sender: _sender, .. }) => {
                    if let Some(node) = connection.peer() {
                        self.saw(node, seed);
                    }
                    // It writes down what it heard while the connection lasts.
                    let _ = timeout(FIND_EVERY, connection.closed()).await;
                    connection.close(close_code::DONE, "");
                }
                Err(error) => {
                    if let Some(words) = self.refused.say(&seed.to_string(), &error.to_string()) {
                        tracing::info!(%seed, "no coordinator was found there: {words}");
                    }
                }
            }
            tokio::time::sleep(FIND_EVERY).await;
        }
    }

    /// Writes down where this coordinator is, as soon as there is somebody to write it.
    pub(super) async fn announce(self) {
        while let Err(error) = self.store.propose(self.announcement(&self.hello())).await {
            tracing::debug!("not announced yet: {error}");
            tokio::time::sleep(FIND_EVERY).await;
        }
    }

    pub(super) fn announcement(&self, hello: &shoal_protocol::peer::PeerHello) -> Change {
        Change::Coordinator(CoordinatorCommand::Announce {
            node: hello.node,
            incarnation: hello.incarnation,
            boot: hello.boot,
            cluster: hello.cluster,
            // It is stored for ever, so it is bounded here.
            build: hello.build.chars().take(64).collect(),
        })
    }
}
