//! ● The receiving side: who may speak, and what is done with what they say.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use prost::Message as _;
use raft::prelude::Message;
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::frame::FrameKind;
use shoal_protocol::id::NodeId;
use shoal_protocol::peer::{
    LOG_MESSAGE_LEN_MAX, MESSAGE_LEN_MAX, PeerHello, PeerReply, PeerRequest,
};
use shoal_protocol::quic::{Connection, FrameReceiver, close_code};
use shoal_protocol::trust::CaFingerprint;
use shoal_protocol::version::{KNOWS_REMOVALS, VersionRange};
use tokio::time::timeout;

use super::Peers;
use crate::control::admit::{negotiate, reachable};
use crate::control::membership::removal;
use crate::control::rotation::entitled;
use crate::control::state::{ClusterState, Refusal};
use crate::control::store::raft::NetworkEvent;
use crate::control::store::{Members, Side};

/// How long a peer may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a refusal may take to arrive before the connection is closed.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Peers {
    /// Holds one coordinator's conversation, to its end.
    pub async fn serve(&self, connection: Connection) {
        // The endpoint lets coordinators alone begin this conversation.
        let Some(node) = connection.peer() else { return };
        if let Err(why) = self.converse(node, &connection).await {
            tracing::info!(%node, "a coordinator's conversation ended: {why}");
        }
        connection.close(close_code::DONE, "");
    }

    async fn converse(&self, node: NodeId, connection: &Connection) -> Result<(), String> {
        let ask = async {
            let (sender, mut receiver) =
                connection.accept_bi().await.map_err(|error| error.to_string())?;
            let request = receiver.message::<PeerRequest>(MESSAGE_LEN_MAX).await;
            let request = request.map_err(|error| error.to_string())?;
            Ok::<_, String>((sender, receiver, request.ok_or("it said nothing")?))
        };
        let asked = timeout(REQUEST_TIMEOUT, ask).await;
        let (mut sender, receiver, request) =
            asked.map_err(|_| format!("it said nothing for {REQUEST_TIMEOUT:?}"))??;
        let (reply, listens) = match request {
            PeerRequest::Log(hello) => {
                match self.admit(node, &hello, connection.remote_address()) {
                    Ok(version) => {
                        self.store.heard_from(node);
                        self.store.welcomes(node, Side::Here);
                        (PeerReply::Welcome { version, coordinators: self.addresses() }, true)
                    }
                    Err(refusal) => {
                        self.store.refuses(node, Side::Here, refusal.message.clone());
                        self.doubt_myself(node).await;
                        (PeerReply::Refused(refusal), false)
                    }
                }
            }
            PeerRequest::CaKey { versions } => {
                let key = self.hand_over(node, versions, &self.authority.fingerprint()).await;
                (key.unwrap_or_else(PeerReply::Refused), false)
            }
            PeerRequest::CaKeyOf { versions, ca } => {
                let key = self.hand_over(node, versions, &ca).await;
                (key.unwrap_or_else(PeerReply::Refused), false)
            }
        };
        if let PeerReply::Refused(refusal) = &reply
            && let Some(words) = self.refused.say(&format!("{node} asks"), &refusal.to_string())
        {
            tracing::warn!(%node, "a coordinator was refused: {words}");
        }
        let sent = timeout(REQUEST_TIMEOUT, sender.send_message(&reply, MESSAGE_LEN_MAX)).await;
        let sent = sent.map_err(|_| format!("it read no answer for {REQUEST_TIMEOUT:?}"))?;
        sent.map_err(|error| error.to_string())?;
        if listens {
            return self.listen(node, receiver).await;
        }
        sender.finish();
        let _ = timeout(LAST_WORDS, connection.closed()).await;
        Ok(())
    }

    /// Whether a coordinator may take part; the version that both will speak.
    fn admit(&self, node: NodeId, hello: &PeerHello, remote: SocketAddr) -> Result<u16, WireError> {
        let version = negotiate(hello.versions)?;
        if hello.node != node {
            let text = format!("the certificate is {node}'s, the greeting {}'s", hello.node);
            return Err(WireError::new(ErrorCode::InvalidRequest, text));
        }
        let state = self.store.state();
        if state.is_new() {
            // This one has joined and knows nothing yet: whoever has a certificate may tell it.
            self.saw(node, reachable(hello.cluster, remote));
            return Ok(version);
        }
        let needs = state.versions.log();
        if hello.versions.max < needs {
            // For good: what it may do by itself, from a state that it cannot bring up to date, is harm.
            let text = format!(
                "{node} speaks protocol versions up to {}, and what was decided since all coordinators were \
                 upgraded needs {needs}: start the newer build on its data folder again",
                hello.versions.max
            );
            return Err(WireError::new(ErrorCode::PermissionDenied, text));
        }
        let Some(known) = state.nodes.get(node) else { return Err(stranger(&state, node)) };
        let last = known.incarnation;
        let record = state.coordinators.get(node);
        let another = record.is_some_and(|record| record.boot != hello.boot);
        if last
            .is_some_and(|last| hello.incarnation < last || (hello.incarnation == last && another))
        {
            let text = format!(
                "{node} has been started since with this or a later start number, so its data folder is \
                 an old backup or a copy: what it voted since is lost. Remove it (`shoal coordinators \
                 remove {node}`) and join anew on an empty folder"
            );
            // A code of its own, by which whoever knows it sees to it that nobody votes with this folder again.
            let knows = hello.versions.max >= KNOWS_REMOVALS;
            let code = if knows { ErrorCode::AlreadyExists } else { ErrorCode::PermissionDenied };
            return Err(WireError::new(code, text));
        }
        let hello = PeerHello { cluster: reachable(hello.cluster, remote), ..hello.clone() };
        self.saw(node, hello.cluster);
        let current = record.is_some_and(|record| record.cluster == hello.cluster) && !another;
        if !current || last != Some(hello.incarnation) {
            let (store, announcement) = (self.store.clone(), self.announcement(&hello));
            tokio::spawn(async move {
                if let Err(error) = store.propose(announcement).await {
                    tracing::info!(%node, "where it is was not written down: {error}");
                }
            });
        }
        Ok(version)
    }

    /// A number that the cluster's CA has certified and the state has never given was given by a later
    /// state: this one is an old backup, from before there was a majority that would not follow it.
    async fn doubt_myself(&self, node: NodeId) {
        let is_given = || self.store.state().nodes.was_given(node);
        // An etcd that went back is found out by its log, and may be what the operator wants.
        let has_log = *self.store.members().borrow() != Members::default();
        if !has_log || self.store.state().is_new() || is_given() {
            return;
        }
        // What is here may be behind what was decided, as every follower's is at times; a majority is not.
        if self.store.read().await.is_err() || is_given() {
            return;
        }
        let me = self.me.node;
        let why = format!(
            "{node} has a certificate of this cluster, and the state here has never given that number, so \
             this data folder is an old backup: what was decided since is not in it. Leave it stopped; where \
             the other coordinators live, remove this one (`shoal coordinators remove {me}`) and join anew \
             on an empty folder"
        );
        tracing::error!("{why}");
        self.end(why);
    }

    /// A CA's key, for a coordinator that is to have it by what all coordinators know: this copy of the state
    /// may not have heard that it lost its vote, or was removed.
    async fn hand_over(
        &self,
        node: NodeId,
        versions: VersionRange,
        ca: &CaFingerprint,
    ) -> Result<PeerReply, WireError> {
        negotiate(versions)?;
        let state = self.store.read().await?;
        if state.nodes.get(node).is_none() {
            return Err(stranger(&state, node));
        }
        if !entitled(&self.store, &state).contains(&node) {
            let text = format!("{node} does not vote, so it does not get the CA's key");
            return Err(WireError::new(ErrorCode::NotReady, text));
        }
        let ca = self.authority.key_of(ca).ok_or_else(|| {
            WireError::new(ErrorCode::NotReady, "this coordinator has no such key".to_owned())
        })?;
        tracing::info!(%node, "the CA's key is handed over");
        let authority = ca.to_bytes();
        let authority =
            authority.map_err(|error| WireError::new(ErrorCode::Internal, error.to_string()))?;
        Ok(PeerReply::CaKey { authority })
    }

    async fn listen(&self, node: NodeId, mut receiver: FrameReceiver) -> Result<(), String> {
        let id = u64::from(node.number);
        loop {
            let head = receiver.next().await.map_err(|error| error.to_string())?;
            let Some(head) = head else { return Ok(()) };
            if head.kind != FrameKind::Message {
                return Err(format!("{:?} is no message of the log", head.kind));
            }
            let body = receiver.body(&head, LOG_MESSAGE_LEN_MAX).await;
            let body = body.map_err(|error| error.to_string())?;
            let message = Message::decode(body.as_slice()).map_err(|error| error.to_string())?;
            if message.from != id || message.to != u64::from(self.me.node.number) {
                return Err(format!("a message from {} to {}", message.from, message.to));
            }
            self.store.heard_from(node);
            if removal(&self.store.state(), node).is_some() {
                // It was admitted before; when it comes again it hears why not.
                return Err(format!("{node} was removed from this cluster"));
            }
            if !self.welcomed.load(Ordering::Relaxed) && !self.store.state().is_new() {
                // The sender sends again whatever it still needs.
                continue;
            }
            if self.network.send(NetworkEvent::Message(Box::new(message))).await.is_err() {
                return Ok(());
            }
        }
    }
}

/// Who is no node of this cluster. One that was removed must not go on with the others of its kind.
fn stranger(state: &ClusterState, node: NodeId) -> WireError {
    removal(state, node).unwrap_or_else(|| Refusal::UnknownNode { node }.into())
}
