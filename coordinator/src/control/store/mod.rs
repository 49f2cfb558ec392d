//! ● Where the replicated state is kept: one seam, whatever is behind it.
//!
//! ```text
//! propose(change) ─► the store stamps (client, sequence, time) ─► durable ─► applied ─► watch ─► effects or refusal
//! ```
//!
//! [`ControlStore`] is a handle; what serves it (today [`local`], one voter on this disk) owns the
//! only copy of the state that changes. Everyone else reads immutable copies.

mod disk;
pub mod local;

use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::error::{ErrorCode, WireError};
use tokio::sync::{mpsc, oneshot, watch};

use super::state::{Change, ClusterState, Effect, Refusal};

/// Changes that wait for the disk. A disk that syncs in 10 ms works them off in under 3 s, well
/// within `PROPOSE_TIMEOUT`; more would only time out.
const PROPOSALS_MAX: usize = 256;

/// How long a change may take: far more than a disk that works needs, far less than a person waits.
pub const PROPOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// A handle to the replicated state.
#[derive(Clone, Debug)]
pub struct ControlStore {
    proposals: mpsc::Sender<Message>,
    state: watch::Receiver<Arc<ClusterState>>,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // One that is not a proposal, at the end.
enum Message {
    Propose { change: Change, reply: oneshot::Sender<Result<Vec<Effect>, ProposeError>> },
    Stop,
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
}

impl From<ProposeError> for WireError {
    fn from(error: ProposeError) -> Self {
        let code = match &error {
            ProposeError::Refused(refusal) => refusal.code(),
            ProposeError::Storage { .. } | ProposeError::TimedOut => ErrorCode::StorageFailed,
            ProposeError::Stopped => ErrorCode::Draining,
        };
        WireError::new(code, error.to_string())
    }
}

impl ControlStore {
    /// Makes a change durable and applies it. When this returns, `state` shows it.
    pub async fn propose(&self, change: Change) -> Result<Vec<Effect>, ProposeError> {
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            let sent = self.proposals.send(Message::Propose { change, reply }).await;
            sent.map_err(|_| ProposeError::Stopped)?;
            answer.await.map_err(|_| ProposeError::Stopped)?
        };
        match tokio::time::timeout(PROPOSE_TIMEOUT, exchange).await {
            Ok(answer) => answer,
            Err(_) => Err(ProposeError::TimedOut),
        }
    }

    /// The state as it is now.
    pub fn state(&self) -> Arc<ClusterState> {
        Arc::clone(&self.state.borrow())
    }

    /// The state, again on every change.
    pub fn watch(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.state.clone()
    }
}
