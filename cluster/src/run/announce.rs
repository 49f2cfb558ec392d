//! The one line with which a child tells the `up` that started it how the start went.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use shoal_protocol::id::NodeId;

use crate::failure::{Exit, Failure};

/// How a start went. Parent and child are the same binary, so this is no contract with others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Announcement {
    /// A coordinator takes requests.
    Coordinator {
        /// Its identity.
        id: NodeId,
        /// Where it takes the public API.
        api: SocketAddr,
        /// Where it takes the cluster's conversations.
        cluster: SocketAddr,
        /// Its admin context file.
        context: PathBuf,
    },
    /// A worker has joined.
    Worker {
        /// Its identity.
        id: NodeId,
    },
    /// It did not start.
    Failed {
        /// The exit code that it ends with.
        exit: u8,
        /// Why.
        message: String,
    },
}

impl Announcement {
    /// Prints the line to stdout. Whether anybody reads it is not the child's concern.
    pub fn print(&self) {
        if let Ok(line) = serde_json::to_string(self) {
            let mut stdout = std::io::stdout().lock();
            let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
        }
    }
}

impl From<&Failure> for Announcement {
    fn from(failure: &Failure) -> Self {
        Announcement::Failed { exit: failure.exit as u8, message: failure.message.clone() }
    }
}

/// The failure that a child announced, as the parent's own.
pub fn failure_of(who: &str, exit: u8, message: &str) -> Failure {
    Failure { exit: Exit::from_number(exit), message: format!("{who}: {message}") }
}
