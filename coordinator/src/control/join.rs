//! ● The coordinator's side of `shoal-join` and `shoal-renew`: the conversations with somebody unknown.
//!
//! So every step is bounded before it is taken: how often (a token bucket), how many at once, how
//! long, how much (4 KiB). The secret is spent by a committed command before a certificate is
//! signed; a joiner that breaks off in between has used its token up, which is the safe side. A node that
//! was removed gets no new certificate here: the state is read as all coordinators have it. A coordinator
//! that votes by this copy is the exception: without it there may be no majority that could be asked.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::join::{JoinReply, JoinRequest, MESSAGE_LEN_MAX, RenewRequest};
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_protocol::quic::{Alpn, Connection, FrameReceiver, close_code};
use shoal_protocol::trust::Trust;
use shoal_protocol::version::{KNOWS_REMOVALS, VersionRange};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::admit::{negotiate, too_old};
use super::authority::Authority;
use super::membership::removal;
use super::registry::KNOWS_TRUST;
use super::state::{
    Change, ClusterState, Effect, KeyFingerprint, NodeCommand, Refusal, Timestamp, TokenHash,
};
use super::store::{ControlStore, ReadError};

/// How long a whole join may take on this side, the disk included.
const JOIN_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a joiner may take to say what it wants; until then it has none of the places of joins.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a majority may take to answer before a coordinator that votes is judged by this copy of the
/// state: some elections, and well below what whoever asks waits.
const MAJORITY_PATIENCE: Duration = Duration::from_secs(2);

/// How long to wait until the joiner has its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Joins per second, and renewals: a rack that starts at once is in within seconds, and guessing 32
/// random bytes at this rate is hopeless.
const JOINS_PER_SECOND: f64 = 20.0;

/// Joins at once before the rate counts.
const JOINS_BURST: f64 = 40.0;

/// Joins in progress: each holds 4 KiB and waits for one sync of the disk.
const JOINS_AT_ONCE: usize = 16;

/// What somebody unknown wants.
#[derive(Debug)]
enum Wish {
    Join(JoinRequest),
    Renew(RenewRequest),
}

/// Lets nodes in, or back in.
#[derive(Clone, Debug)]
pub struct JoinServer {
    store: ControlStore,
    authority: Authority,
    strangers: Gate,
    /// For whoever signs with a key that is on record, so that strangers use up nothing of nodes that
    /// come back.
    known: Gate,
}

/// How many get in, at once and a second.
#[derive(Clone, Debug)]
struct Gate {
    bucket: Arc<Mutex<Bucket>>,
    places: Arc<Semaphore>,
}

impl Default for Gate {
    fn default() -> Self {
        let bucket = Bucket { tokens: JOINS_BURST, filled: Instant::now() };
        Self {
            bucket: Arc::new(Mutex::new(bucket)),
            places: Arc::new(Semaphore::new(JOINS_AT_ONCE)),
        }
    }
}

impl Gate {
    fn enter(&self) -> Result<SemaphorePermit<'_>, WireError> {
        // A panic under the lock leaves two valid numbers.
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        if !bucket.take(Instant::now()) {
            return Err(overloaded());
        }
        self.places.try_acquire().map_err(|_| overloaded())
    }
}

impl JoinServer {
    /// A server that issues certificates of this CA.
    pub fn new(store: ControlStore, authority: Authority) -> Self {
        Self { store, authority, strangers: Gate::default(), known: Gate::default() }
    }

    /// Holds one conversation, to its end.
    pub async fn serve(&self, connection: Connection) {
        let address = connection.remote_address();
        match tokio::time::timeout(JOIN_TIMEOUT, self.converse(&connection)).await {
            Ok(Ok(())) => {}
            Ok(Err(why)) => tracing::info!(%address, "a join broke off: {why}"),
            Err(_) => tracing::info!(%address, "a join took longer than {JOIN_TIMEOUT:?}"),
        }
        connection.close(close_code::DONE, "");
    }

    async fn converse(&self, connection: &Connection) -> Result<(), String> {
        let ask = async {
            let (sender, mut receiver) =
                connection.accept_bi().await.map_err(|error| error.to_string())?;
            Ok::<_, String>((sender, wish(connection.alpn(), &mut receiver).await))
        };
        let asked = tokio::time::timeout(REQUEST_TIMEOUT, ask).await;
        let (mut sender, request) =
            asked.map_err(|_| format!("it said nothing for {REQUEST_TIMEOUT:?}"))??;
        let reply = match self.answer(request).await {
            Ok(reply) => {
                if let JoinReply::Removed(why) = &reply {
                    let address = connection.remote_address();
                    tracing::warn!(%address, "a certificate was refused: {why}");
                }
                reply
            }
            Err(refusal) => {
                let address = connection.remote_address();
                tracing::warn!(%address, label = %refusal.code, "a join was refused: {refusal}");
                JoinReply::Refused(refusal)
            }
        };
        let sent = sender.send_message(&reply, MESSAGE_LEN_MAX).await;
        sent.map_err(|error| error.to_string())?;
        sender.finish();
        // The joiner closes when it has read the answer; a reset would take it from its hands.
        let _ = tokio::time::timeout(ANSWER_TIMEOUT, connection.closed()).await;
        Ok(())
    }

    async fn answer(&self, wish: Option<Wish>) -> Result<JoinReply, WireError> {
        let known = matches!(&wish, Some(Wish::Renew(request)) if self.is_on_record(request));
        let _place = if known { self.known.enter()? } else { self.strangers.enter()? };
        match wish {
            Some(Wish::Join(request)) => self.join(&request, SystemTime::now()).await,
            Some(Wish::Renew(request)) => self.renew(&request, SystemTime::now()).await,
            None => {
                let words = "this is not a request to join or to renew a certificate";
                Err(WireError::new(ErrorCode::InvalidRequest, words))
            }
        }
    }

    /// As far as this copy of the state knows. The request proves that its sender has the key; that is looked
    /// at last, since it costs most (a fraction of the handshake before it, of which so many are under way).
    fn is_on_record(&self, request: &RenewRequest) -> bool {
        let state = self.store.state();
        let Some(known) = state.nodes.get(request.node) else { return false };
        let key = CertificateAuthority::key_of_request(&request.csr).map(KeyFingerprint);
        key.is_ok_and(|key| known.key == key)
    }

    /// A new certificate for the key that is on record, and for no other.
    async fn renew(&self, request: &RenewRequest, now: SystemTime) -> Result<JoinReply, WireError> {
        negotiate(request.versions)?;
        let key = CertificateAuthority::key_of_request(&request.csr).map_err(|_| {
            WireError::new(ErrorCode::InvalidRequest, "the signing request cannot be read")
        })?;
        let node = request.node;
        // Which no majority is needed for: it is so for ever.
        if let Some(removed) = removal(&self.store.state(), node) {
            return if_known(removed, request.versions);
        }
        let state = self.state_for(node).await?;
        let Some(known) = state.nodes.get(node) else {
            let removed = removal(&state, node).ok_or(Refusal::UnknownNode { node })?;
            return if_known(removed, request.versions);
        };
        if known.key != KeyFingerprint(key) {
            let words = format!("{node} has another key on record than the one that asks");
            return Err(WireError::new(ErrorCode::PermissionDenied, words));
        }
        let (ca, trust) = self.authority.signer(state.authorities.trust())?;
        let certificate = ca
            .issue(&request.csr, node, now)
            .map_err(|error| WireError::new(ErrorCode::Internal, error.to_string()))?;
        tracing::info!(%node, "is back with an expired certificate: renewed");
        admitted(node, certificate, trust, request.versions)
    }

    /// What is decided, for whoever asks for a certificate. Where no majority answers, a coordinator that
    /// votes by this copy is judged by this copy: it may be the one that the majority lacks, and no message
    /// of the log reaches it before it has a certificate. If it was removed meanwhile it is let in by nobody
    /// who knows that.
    async fn state_for(&self, node: NodeId) -> Result<Arc<ClusterState>, ReadError> {
        let votes = self.store.state().coordinators.voters().contains(&node);
        if self.store.is_elsewhere() || !votes {
            return self.store.read().await;
        }
        match tokio::time::timeout(MAJORITY_PATIENCE, self.store.read()).await {
            Ok(Err(ReadError::NoQuorum | ReadError::NoMajority(_))) | Err(_) => {
                Ok(self.store.state())
            }
            Ok(read) => read,
        }
    }

    async fn join(&self, request: &JoinRequest, now: SystemTime) -> Result<JoinReply, WireError> {
        negotiate(request.versions)?;
        let key = CertificateAuthority::key_of_request(&request.csr).map_err(|_| {
            WireError::new(ErrorCode::InvalidRequest, "the signing request cannot be read")
        })?;
        let token = TokenHash::of(&request.secret);
        self.authority.required()?;
        // Nobody without a good token gets as far as the queue of changes. This copy of the state may
        // not have heard of a token that was made elsewhere a moment ago.
        let good = |state: &ClusterState| state.tokens.is_good(&token, Timestamp::of(now));
        if !good(&self.store.state()) && !good(&*self.store.read().await?) {
            return Err(Refusal::BadToken.into());
        }
        self.check_versions(&token, request.versions)?;
        let join = NodeCommand::Join { token, key: KeyFingerprint(key) };
        let effects = self.store.propose(Change::Node(join)).await?;
        let node = effects.iter().find_map(|effect| match effect {
            Effect::NodeAdded { node } => Some(*node),
            _ => None,
        });
        let internal = |why: String| WireError::new(ErrorCode::Internal, why);
        let node = node.ok_or_else(|| internal("no node came of the join".into()))?;
        // Another CA may sign than before the queue.
        let (ca, trust) = self.authority.signer(self.store.state().authorities.trust())?;
        let certificate =
            ca.issue(&request.csr, node, now).map_err(|error| internal(error.to_string()))?;
        tracing::info!(%node, "joined");
        admitted(node, certificate, trust, request.versions)
    }

    /// Whoever would be refused when it comes is refused before it has spent its token.
    fn check_versions(&self, token: &TokenHash, speaks: VersionRange) -> Result<(), WireError> {
        let state = self.store.state();
        let role = state.tokens.iter().find(|known| known.hash == *token).map(|token| token.role);
        let needs = match role {
            Some(Role::Coordinator) => state.versions.log(),
            _ => state.versions.workers(),
        };
        match speaks.max < needs {
            true => Err(too_old("the joiner", speaks, needs)),
            false => Ok(()),
        }
    }
}

/// The end, for whoever understands it.
fn if_known(removed: WireError, versions: VersionRange) -> Result<JoinReply, WireError> {
    match versions.max >= KNOWS_REMOVALS {
        true => Ok(JoinReply::Removed(removed)),
        false => Err(removed),
    }
}

/// The answer, as far as whoever asked understands it.
fn admitted(
    node: NodeId,
    certificate: Vec<u8>,
    trust: Trust,
    versions: VersionRange,
) -> Result<JoinReply, WireError> {
    match (trust.revision, &trust.cas[..]) {
        (0, _) => {}
        _ if versions.max >= KNOWS_TRUST => {
            return Ok(JoinReply::Admitted { node, certificate, trust: trust.for_workers() });
        }
        (_, [_]) => {}
        _ => {
            let words = "the cluster's CA is being replaced, which this build does not understand; \
                         upgrade it, or wait until `shoal ca list` shows one CA";
            return Err(WireError::new(ErrorCode::VersionMismatch, words));
        }
    }
    let ca = trust.cas.into_iter().next().unwrap_or_default();
    Ok(JoinReply::Joined { node, certificate, ca })
}

async fn wish(alpn: Alpn, receiver: &mut FrameReceiver) -> Option<Wish> {
    match alpn {
        Alpn::Renew => {
            let request = receiver.message(MESSAGE_LEN_MAX).await;
            request.ok().flatten().map(Wish::Renew)
        }
        _ => {
            let request = receiver.message(MESSAGE_LEN_MAX).await;
            request.ok().flatten().map(Wish::Join)
        }
    }
}

fn overloaded() -> WireError {
    WireError::new(ErrorCode::Overloaded, "too many nodes come at once; try again in a second")
}

/// A token bucket.
#[derive(Debug)]
struct Bucket {
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + passed * JOINS_PER_SECOND).min(JOINS_BURST);
        self.filled = now;
        let may = self.tokens >= 1.0;
        if may {
            self.tokens -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::state::TokenCommand;
    use crate::control::store::raft::{self, WhenEmpty};

    #[tokio::test]
    async fn a_token_is_good_until_it_expires() {
        let data = tempfile::tempdir().unwrap();
        let (store, _thread) =
            raft::open(data.path(), NodeId::coordinator(1), WhenEmpty::Found, Box::new(|_| {}))
                .unwrap();
        let now = SystemTime::now();
        let ca = CertificateAuthority::create(now).unwrap();
        let someone = ca.issue_identity(NodeId::worker(9), now).unwrap();
        let csr = someone.renewal_request().unwrap();
        let request = JoinRequest { versions: VersionRange::OURS, secret: [7; 32], csr };
        let (hash, expires) = (TokenHash::of(&request.secret), Duration::from_secs(60));
        let token = TokenCommand::Create { hash, role: Role::Worker, uses: 2, expires };
        store.propose(Change::Token(token)).await.unwrap();

        let server = JoinServer::new(store, Authority::holding(ca));
        let joined = server.join(&request, now + Duration::from_secs(59)).await.unwrap();
        let first = NodeId::worker(1);
        assert!(matches!(joined, JoinReply::Joined { node, .. } if node == first), "{joined:?}");
        // The disk may have taken the token a little later, and its last second counts in full.
        let late = server.join(&request, now + Duration::from_secs(75)).await.unwrap_err();
        assert_eq!(late.code, ErrorCode::BadToken);
    }

    #[test]
    fn a_burst_is_let_in_and_then_a_rate() {
        let start = Instant::now();
        let mut bucket = Bucket { tokens: JOINS_BURST, filled: start };
        let let_in = |bucket: &mut Bucket, at: Duration| {
            (0..1000).filter(|_| bucket.take(start + at)).count()
        };
        assert_eq!(let_in(&mut bucket, Duration::ZERO), 40);
        assert_eq!(let_in(&mut bucket, Duration::from_millis(500)), 10);
        assert_eq!(let_in(&mut bucket, Duration::from_millis(510)), 0);
        assert_eq!(let_in(&mut bucket, Duration::from_secs(3600)), 40);
    }
}
