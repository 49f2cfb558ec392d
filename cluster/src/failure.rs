//! How a command can end other than well, and the exit code that says so to a script.

use std::fmt;
use std::process::ExitCode;

use shoal_protocol::error::{Fault, WireError};

/// The codes of `--help`. Usage errors (2) are clap's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Something broke on the way.
    Failed = 1,
    /// What was typed cannot be meant.
    Usage = 2,
    /// The cluster understood and said no; nothing has changed.
    Refused = 3,
    /// Nobody answers.
    Unreachable = 4,
}

impl Exit {
    /// The code with this number, as a child reports it; what is unknown has failed.
    pub fn from_number(number: u8) -> Self {
        match number {
            2 => Exit::Usage,
            3 => Exit::Refused,
            4 => Exit::Unreachable,
            _ => Exit::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// Why a command ended: words for a person and a code for a script.
#[derive(Debug)]
pub struct Failure {
    /// The code.
    pub exit: Exit,
    /// What was wrong, what was expected and what to do.
    pub message: String,
}

impl Failure {
    /// Something broke on the way.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { exit: Exit::Failed, message: message.into() }
    }

    /// What was typed cannot be meant.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, message: message.into() }
    }

    /// The cluster said no.
    pub fn refused(message: impl Into<String>) -> Self {
        Self { exit: Exit::Refused, message: message.into() }
    }

    /// Nobody answers.
    pub fn unreachable(message: impl Into<String>) -> Self {
        Self { exit: Exit::Unreachable, message: message.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// A refusal is the caller's to mend; what is the cluster's fault is a failure.
impl From<WireError> for Failure {
    fn from(error: WireError) -> Self {
        let exit = match error.code.fault() {
            Fault::Caller => Exit::Refused,
            Fault::Cluster => Exit::Failed,
        };
        Self { exit, message: error.message }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::failed(format!("{error:#}"))
    }
}

#[cfg(test)]
mod tests {
    use shoal_protocol::error::ErrorCode;

    use super::*;

    #[test]
    fn a_refusal_is_told_from_a_failure() {
        for (code, exit) in [
            (ErrorCode::DoesNotFit, Exit::Refused),
            (ErrorCode::BadModel, Exit::Refused),
            (ErrorCode::NotFound, Exit::Refused),
            (ErrorCode::PermissionDenied, Exit::Refused),
            (ErrorCode::StorageFailed, Exit::Failed),
            (ErrorCode::Internal, Exit::Failed),
        ] {
            assert_eq!(Failure::from(WireError::new(code, "no")).exit, exit, "{code}");
        }
        for exit in [Exit::Failed, Exit::Usage, Exit::Refused, Exit::Unreachable] {
            assert_eq!(Exit::from_number(exit as u8), exit);
        }
    }
}
