//! ○ Who waits for an answer of a coordinator's store, and what it is.

use shoal_coordinator::control::state::Effect;
use shoal_coordinator::control::store::{ProposeError, ReadError};
use shoal_protocol::id::NodeId;
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError::{Closed, Empty};

/// Who waits for an answer of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A client or the operator; the number in the history.
    Operation(usize),
    /// The coordinator announces itself.
    Announce,
    /// A worker's start is recorded.
    Admit(NodeId, u64),
    /// A new layout.
    Adopt,
    /// Proof that this coordinator leads.
    Proof,
    /// The operator changes what is to be; the number of the call.
    Alter(usize),
    /// A step of a coordinator's replacement.
    Replace(u8),
}

/// Somebody who waits.
pub struct Wait {
    /// What for.
    pub purpose: Purpose,
    /// Where the answer will be.
    pub reply: Reply,
}

/// Where an answer will be.
pub enum Reply {
    /// Of a change.
    Change(oneshot::Receiver<Result<Vec<Effect>, ProposeError>>),
    /// Of a read.
    Read(oneshot::Receiver<Result<(), ReadError>>),
}

/// What the store answered.
pub type Answered = Result<Vec<Effect>, No>;

/// Why it did not.
#[derive(Clone, Debug)]
pub struct No {
    /// The state refused it; else nobody knows whether it was made.
    pub refused: bool,
    /// In words.
    pub why: String,
}

impl No {
    fn unknown(why: impl ToString) -> Self {
        Self { refused: false, why: why.to_string() }
    }
}

impl Reply {
    /// The answer, if it is there.
    pub fn answer(&mut self) -> Option<Answered> {
        match self {
            Reply::Change(reply) => match reply.try_recv() {
                Ok(answer) => Some(answer.map_err(|error| {
                    let refused = matches!(error, ProposeError::Refused(_));
                    No { refused, why: error.to_string() }
                })),
                Err(Empty) => None,
                Err(Closed) => Some(Err(No::unknown("closed"))),
            },
            Reply::Read(reply) => match reply.try_recv() {
                Ok(answer) => Some(answer.map(|()| Vec::new()).map_err(No::unknown)),
                Err(Empty) => None,
                Err(Closed) => Some(Err(No::unknown("closed"))),
            },
        }
    }
}
