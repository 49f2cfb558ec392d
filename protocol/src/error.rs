//! Errors that may cross a wire: a stable number, a label, whose fault it is and whether to try
//! again.
//!
//! The label is also the value of the `reason` label in metrics. Numbers and labels are never
//! reused: add, do not change.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Whose fault an error is. A caller's error never lowers a node's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The request was wrong.
    Caller,
    /// The cluster could not serve a right request.
    Cluster,
}

macro_rules! error_codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $label:literal, $fault:ident, retry $retry:literal;)*) => {
        /// Why something was refused or failed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[repr(u16)]
        pub enum ErrorCode {
            $($(#[$doc])* $name = $number,)*
        }

        impl ErrorCode {
            /// Every code, in the order of the numbers.
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$name),*];

            /// The code with this number, where there is one.
            pub fn from_number(number: u16) -> Option<Self> {
                match number { $($number => Some(ErrorCode::$name),)* _ => None }
            }

            /// The stable number.
            pub fn number(self) -> u16 {
                self as u16
            }

            /// The stable label.
            pub fn label(self) -> &'static str {
                match self { $(ErrorCode::$name => $label,)* }
            }

            /// Whose fault it is.
            pub fn fault(self) -> Fault {
                match self { $(ErrorCode::$name => Fault::$fault,)* }
            }

            /// Whether the same request may succeed a little later.
            pub fn retryable(self) -> bool {
                match self { $(ErrorCode::$name => $retry,)* }
            }
        }
    };
}

error_codes! {
    /// A parameter is wrong.
    InvalidRequest = 1, "invalid_request", Caller, retry false;
    /// A parameter is known but not supported yet.
    Unsupported = 2, "unsupported", Caller, retry false;
    /// There is no such deployment, node or token.
    NotFound = 3, "not_found", Caller, retry false;
    /// The prompt and what is asked for do not fit the model's context.
    ContextTooLong = 4, "context_too_long", Caller, retry false;
    /// The client went away.
    Cancelled = 5, "cancelled", Caller, retry false;
    /// The name is taken.
    AlreadyExists = 6, "already_exists", Caller, retry false;
    /// The certificate's role may not ask this.
    PermissionDenied = 7, "permission_denied", Caller, retry false;
    /// A join token is unknown, expired or used up.
    BadToken = 8, "bad_token", Caller, retry false;
    /// The model's files are damaged, incomplete or of a kind that is not supported.
    BadModel = 9, "bad_model", Caller, retry false;
    /// The model does not fit the cluster's memory.
    DoesNotFit = 10, "does_not_fit", Caller, retry false;
    /// A queue is full.
    Overloaded = 20, "overloaded", Cluster, retry true;
    /// The deployment has no replica that is ready.
    NotReady = 21, "not_ready", Cluster, retry true;
    /// A worker that the stream needs was lost.
    WorkerLost = 22, "worker_lost", Cluster, retry true;
    /// The request's deadline passed.
    DeadlineExceeded = 23, "deadline_exceeded", Cluster, retry true;
    /// The node is stopping.
    Draining = 24, "draining", Cluster, retry true;
    /// A message carried a generation that is not the current one.
    StaleGeneration = 25, "stale_generation", Cluster, retry true;
    /// A peer broke the protocol.
    ProtocolViolation = 26, "protocol_violation", Cluster, retry false;
    /// The peer speaks no version that this node speaks.
    VersionMismatch = 27, "version_mismatch", Cluster, retry false;
    /// A computation failed or gave numbers that are not finite.
    ComputeFailed = 28, "compute_failed", Cluster, retry false;
    /// The state could not be written.
    StorageFailed = 29, "storage_failed", Cluster, retry true;
    /// Something that should not happen; the log says what.
    Internal = 30, "internal", Cluster, retry false;
    /// The request seems to kill its workers, and is not tried again.
    Quarantined = 40, "quarantined", Caller, retry false;
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// An error as it crosses a wire: the code, and words for a person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct WireError {
    /// What kind of error.
    pub code: ErrorCode,
    /// What was wrong, what was expected and what to do.
    pub message: String,
}

impl WireError {
    /// The longest message, in bytes; longer ones are cut.
    pub const MESSAGE_LEN_MAX: usize = 4096;

    /// An error with this code; a message that is too long is cut at a character's border.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > Self::MESSAGE_LEN_MAX {
            let cut = (0..=Self::MESSAGE_LEN_MAX).rev().find(|&i| message.is_char_boundary(i));
            message.truncate(cut.unwrap_or(0));
        }
        Self { code, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_labels_are_unique_and_found_again() {
        for (i, code) in ErrorCode::ALL.iter().enumerate() {
            assert_eq!(ErrorCode::from_number(code.number()), Some(*code));
            for other in &ErrorCode::ALL[i + 1..] {
                assert_ne!(code.label(), other.label());
            }
        }
    }
}
