//! ○ Why an answer ended although it could have gone on elsewhere.

use std::time::Duration;

use shoal_protocol::error::ErrorCode;

use super::course::GiveUp;
use crate::dispatch::DispatchError;

/// Why an answer cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// The attempt's own error: another attempt would end the same way.
    #[error(transparent)]
    Attempt(#[from] DispatchError),
    /// The request seems to kill its workers.
    #[error(
        "this request was lost with its workers {losses} times in a row before it had another token \
         (at last: {last}), so it is quarantined: it is not tried again. If `shoal status` and the \
         workers' logs show what else took them, a machine that stalls or links that broke, send it again; if not, the \
         request itself may do it: change the prompt or the sampling, and report it with the request's id"
    )]
    Quarantined {
        /// How often.
        losses: u32,
        /// The last error.
        last: String,
    },
    /// The deployment went away meanwhile.
    #[error("the model `{name}` was undeployed before the answer could go on ({last})")]
    Undeployed {
        /// The deployment.
        name: String,
        /// What had ended the attempt.
        last: String,
    },
    /// Its adapter went away meanwhile.
    #[error(
        "the adapter `{name}` was unloaded before the answer could end ({last}); ask for one that \
         `GET /v1/models` names"
    )]
    Unloaded {
        /// The adapter.
        name: String,
        /// What had ended the attempt.
        last: String,
    },
    /// The deployment cannot be served as it is.
    #[error("the answer cannot go on, because the model `{name}` cannot be served: {reason}")]
    Hopeless {
        /// The deployment.
        name: String,
        /// The deployment's words.
        reason: String,
    },
    /// Nobody could take it on in time.
    #[error(
        "the answer waited {waited:.1?} to go on, until the request's deadline; it was lost because: \
         {last}; what is missing: {missing}"
    )]
    OutOfTime {
        /// Since the loss.
        waited: Duration,
        /// What had ended the attempt.
        last: String,
        /// The deployment's words.
        missing: String,
    },
}

impl RecoveryError {
    /// Its code.
    pub fn code(&self) -> ErrorCode {
        match self {
            RecoveryError::Attempt(error) => error.code(),
            RecoveryError::Quarantined { .. } => ErrorCode::Quarantined,
            RecoveryError::Undeployed { .. } | RecoveryError::Unloaded { .. } => {
                ErrorCode::NotFound
            }
            RecoveryError::Hopeless { .. } => ErrorCode::NotReady,
            RecoveryError::OutOfTime { .. } => ErrorCode::DeadlineExceeded,
        }
    }

    /// The core's verdict with names and words.
    pub(super) fn new(verdict: GiveUp, name: &str, last: &str) -> Self {
        let (name, last) = (name.to_owned(), last.to_owned());
        match verdict {
            GiveUp::Quarantined { losses } => Self::Quarantined { losses, last },
            GiveUp::Hopeless { reason } => Self::Hopeless { name, reason },
            GiveUp::Unloaded => Self::Unloaded { name, last },
            // `AsItIs` is only said of an error that is at hand.
            GiveUp::Undeployed | GiveUp::AsItIs => Self::Undeployed { name, last },
        }
    }
}
