//! ● Where the replicated state is kept: one seam, whatever is behind it.
//!
//! ```text
//! propose(change) ─► the store stamps (client, sequence, time) ─► durable ─► applied ─► watch ─► effects or refusal
//! ```
//!
//! [`ControlStore`] is a handle; what serves it ([`raft`]) owns the only copy of the state that changes.
//! Everyone else reads immutable copies.

pub mod etcd;
mod heard;
mod kind;
mod presence;
pub mod raft;

use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::NodeId;
use shoal_protocol::presence::PresenceView;
use shoal_protocol::units::Instant;
use tokio::sync::{mpsc, oneshot, watch};

pub use heard::Heard;
pub use kind::{OpenError, StoreConfig, StoreOwner, open};
use presence::Presence;
pub use presence::{NoMajority, Side};

use super::state::{Change, ClusterState, Effect, Refusal};

/// Changes that wait for the disk. A disk that syncs in 10 ms works them off in under 3 s, well
/// within `PROPOSE_TIMEOUT`; more would only time out.
const PROPOSALS_MAX: usize = 256;

/// How long a change may take: far more than a disk that works needs, far less than a person waits.
pub const PROPOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why what a leader wanted was not made.
const ANOTHER_LEADS: &str = "another coordinator leads now";

/// How long a linearizable read may take: a few elections, and less than a person waits.
pub const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// A handle to the replicated state.
#[derive(Clone, Debug)]
pub struct ControlStore {
    proposals: mpsc::Sender<Message>,
    state: watch::Receiver<Arc<ClusterState>>,
    standing: watch::Receiver<Standing>,
    members: watch::Receiver<Members>,
    heard: Heard,
    me: NodeId,
    presence: Presence,
    /// From when on `presence` counts.
    origin: std::time::Instant,
    /// Whether another service has the log, and does the voting.
    elsewhere: bool,
}

/// Who takes part in the log.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Members {
    /// Those that vote.
    pub voters: Vec<NodeId>,
    /// Those that take the log and have no say.
    pub learners: Vec<NodeId>,
}

/// Who leads, as far as this coordinator knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Standing {
    /// The leader; `None` while there is none, or while nobody can be heard.
    pub leader: Option<NodeId>,
    /// Grows with each leader, over all coordinators: what the leader tells a worker carries it, and
    /// a worker refuses an older one.
    pub epoch: u64,
    /// Whether this coordinator is the leader: it alone tells workers what to be.
    pub leading: bool,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // Most are proposals.
enum Message {
    Propose {
        change: Change,
        /// Under which epoch of its own a leader wants it: it is not made once another leads. `None` where
        /// it is nobody's in particular: an operator's change, a join.
        under: Option<u64>,
        reply: oneshot::Sender<Result<Vec<Effect>, ProposeError>>,
    },
    /// Answered when this coordinator's copy holds all that was committed anywhere before.
    Read {
        /// Only if this coordinator led with this epoch, still after that.
        under: Option<u64>,
        reply: oneshot::Sender<Result<(), ReadError>>,
    },
    Stop,
}

/// A read that could not be shown to be current.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Nobody leads, or the leader does not answer.
    #[error(
        "the state could not be read within {READ_TIMEOUT:?}: no majority of the coordinators answers"
    )]
    NoQuorum,
    /// The same, and who does not answer is known.
    #[error("the state could not be read within {READ_TIMEOUT:?}: {0}")]
    NoMajority(NoMajority),
    /// The disk failed, so this coordinator takes no part until it has been read again.
    #[error(
        "the state could not be read: {why}; free or repair the disk under the data folder: it is tried \
         again by itself, and what runs goes on"
    )]
    Storage {
        /// What the disk said.
        why: String,
    },
    /// The store has ended.
    #[error("this coordinator is stopping")]
    Stopped,
    /// The store is another service, and that does not answer.
    #[error("the state could not be read: {why}; what runs goes on")]
    Unavailable {
        /// What is wrong with it.
        why: String,
    },
}

impl From<ReadError> for WireError {
    fn from(error: ReadError) -> Self {
        let code = match &error {
            ReadError::NoQuorum
            | ReadError::NoMajority(_)
            | ReadError::Storage { .. }
            | ReadError::Unavailable { .. } => ErrorCode::StorageFailed,
            ReadError::Stopped => ErrorCode::Draining,
        };
        WireError::new(code, error.to_string())
    }
}

/// A change that was not made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// The state refused it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It could not be made durable. What is there can still be read, and what runs goes on; the
    /// next change tries again.
    #[error(
        "the change could not be stored: {why}; free or repair the disk under the data folder and \
         try again (`shoal status` shows whether it was taken)"
    )]
    Storage {
        /// What the disk said.
        why: String,
    },
    /// The store has ended.
    #[error("this coordinator is stopping and takes no more changes")]
    Stopped,
    /// No answer in time. It may still be made.
    #[error(
        "the change was not stored within {PROPOSE_TIMEOUT:?}; `shoal status` shows whether it was \
         taken later"
    )]
    TimedOut,
    /// The same, and why is known.
    #[error(
        "the change was not stored within {PROPOSE_TIMEOUT:?}: {0}; `shoal status` shows whether it was taken \
         later"
    )]
    NoMajority(NoMajority),
    /// The store is another service, and that does not take it. What is there can still be read.
    #[error(
        "the change could not be stored: {why}; what runs goes on: try again when the store answers \
         (`shoal status` shows whether the change was taken)"
    )]
    Unavailable {
        /// What is wrong with it.
        why: String,
    },
}

impl From<ProposeError> for WireError {
    fn from(error: ProposeError) -> Self {
        let code = match &error {
            ProposeError::Refused(refusal) => refusal.code(),
            ProposeError::Storage { .. }
            | ProposeError::Unavailable { .. }
            | ProposeError::NoMajority(_)
            | ProposeError::TimedOut => ErrorCode::StorageFailed,
            ProposeError::Stopped => ErrorCode::Draining,
        };
        WireError::new(code, error.to_string())
    }
}

impl ControlStore {
    /// Makes a change durable and applies it. When this returns, `state` shows it.
    ///
    /// What somebody would not understand whom it concerns does not get as far as the log.
    pub async fn propose(&self, change: Change) -> Result<Vec<Effect>, ProposeError> {
        self.propose_under(change, None).await
    }

    /// The same, for what the leader of an epoch wants as the leader: once another leads it is not made.
    pub async fn propose_under(
        &self,
        change: Change,
        under: Option<u64>,
    ) -> Result<Vec<Effect>, ProposeError> {
        let state = self.state();
        state.permits(&change).map_err(|refusal| self.heard.explain(&state, refusal))?;
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            let sent = self.proposals.send(Message::Propose { change, under, reply }).await;
            sent.map_err(|_| ProposeError::Stopped)?;
            answer.await.map_err(|_| ProposeError::Stopped)?
        };
        let answer = tokio::time::timeout(PROPOSE_TIMEOUT, exchange).await;
        match answer.unwrap_or(Err(ProposeError::TimedOut)) {
            Err(ProposeError::TimedOut) => {
                Err(self.missing().map_or(ProposeError::TimedOut, ProposeError::NoMajority))
            }
            answer => answer,
        }
    }

    /// The state, with everything in it that was committed before this call, whichever coordinator
    /// proposed it (a linearizable read).
    pub async fn read(&self) -> Result<Arc<ClusterState>, ReadError> {
        self.read_under(None).await
    }

    /// The same, and proof that this coordinator still led with this epoch when all that was in it: one
    /// that was deposed does not pass.
    pub async fn prove(&self, epoch: u64) -> Result<Arc<ClusterState>, ReadError> {
        let state = self.read_under(Some(epoch)).await?;
        let standing = *self.standing.borrow();
        match standing.leading && standing.epoch == epoch {
            true => Ok(state),
            false => Err(ReadError::Unavailable { why: ANOTHER_LEADS.to_owned() }),
        }
    }

    async fn read_under(&self, under: Option<u64>) -> Result<Arc<ClusterState>, ReadError> {
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            let sent = self.proposals.send(Message::Read { under, reply }).await;
            sent.map_err(|_| ReadError::Stopped)?;
            answer.await.map_err(|_| ReadError::Stopped)?
        };
        let answer = tokio::time::timeout(READ_TIMEOUT, exchange).await;
        match answer.unwrap_or(Err(ReadError::NoQuorum)) {
            Err(ReadError::NoQuorum) => {
                Err(self.missing().map_or(ReadError::NoQuorum, ReadError::NoMajority))
            }
            answer => answer.map(|()| self.state()),
        }
    }

    /// Who is missing, where nobody leads and too few of those that vote are heard.
    fn missing(&self) -> Option<NoMajority> {
        if self.elsewhere || self.standing.borrow().leader.is_some() {
            return None;
        }
        self.presence.missing(self.me, &self.members.borrow().voters, self.now())
    }

    /// Which coordinators are heard, for people.
    pub fn presence(&self) -> PresenceView {
        let (state, now) = (self.state(), self.now());
        let all = state.coordinators.iter().map(|(node, _)| node);
        PresenceView {
            coordinators: all.map(|node| self.presence.view(self.me, node, now)).collect(),
            no_majority: self.missing().map(|missing| missing.to_string()),
        }
    }

    /// Another coordinator was heard.
    pub fn heard_from(&self, node: NodeId) {
        self.presence.heard(node, self.now());
    }

    /// One of the two will not speak with the other, and says why.
    pub fn refuses(&self, node: NodeId, who: Side, why: String) {
        self.presence.refused(node, who, why, self.now());
    }

    /// It will, after all.
    pub fn welcomes(&self, node: NodeId, who: Side) {
        self.presence.welcomed(node, who);
    }

    /// How long ago another coordinator was heard; `None`: not since this one started.
    pub fn silence_of(&self, node: NodeId) -> Option<Duration> {
        self.presence.silence(node, self.now())
    }

    /// Forgets of whom it was heard that does not belong to the cluster any more.
    pub fn keep_heard(&self, is_member: impl Fn(NodeId) -> bool) {
        self.presence.keep(is_member);
    }

    fn now(&self) -> Instant {
        Instant(0) + self.origin.elapsed()
    }

    /// Who leads, again on every change.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// Who takes part in the log, again on every change.
    pub fn members(&self) -> watch::Receiver<Members> {
        self.members.clone()
    }

    /// What the other coordinators have been heard to speak.
    pub fn heard(&self) -> &Heard {
        &self.heard
    }

    /// Whether another service has the log: then no coordinator votes, and all of them are alike.
    pub fn is_elsewhere(&self) -> bool {
        self.elsewhere
    }

    /// The state as this coordinator last heard of it.
    pub fn state(&self) -> Arc<ClusterState> {
        Arc::clone(&self.state.borrow())
    }

    /// The state, again on every change.
    pub fn watch(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.state.clone()
    }
}
