//! What goes wrong on the way of weights, in words for whoever waits for them.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::name::BadName;

/// Why a model, or a part of it, is not here.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The name cannot be one.
    #[error(transparent)]
    Name(#[from] BadName),
    /// A source that this build does not fetch.
    #[error("{0} is nothing to fetch; only models of a hub or an object store are")]
    NotRemote(String),
    /// The origin has no such thing.
    #[error(
        "{origin} has no {what}; check the name and the revision (a private model looks like one that \
         is not there: {advice})"
    )]
    NotFound {
        /// Who was asked.
        origin: String,
        /// For what.
        what: String,
        /// How it would be seen.
        advice: &'static str,
    },
    /// It has several models, and not the one that is asked for; or not only that.
    #[error(
        "{what} {why}; there is: {there}. Name one by its quantisation (org/name:Q4_K_M) or its file \
         (org/name/FILE.gguf)"
    )]
    WhichGguf {
        /// Where they were looked for.
        what: String,
        /// What is wrong.
        why: String,
        /// Their first files.
        there: String,
    },
    /// The origin does not let us.
    #[error("{origin} refuses {what} (HTTP {status}): {advice}")]
    Denied {
        /// Who was asked.
        origin: String,
        /// For what.
        what: String,
        /// 401 or 403.
        status: u16,
        /// What to do.
        advice: &'static str,
    },
    /// The origin says no, and would say it again.
    #[error("{origin} answers {what} with HTTP {status}: {words}")]
    Refused {
        /// Who was asked.
        origin: String,
        /// For what.
        what: String,
        /// The status.
        status: u16,
        /// The beginning of its answer.
        words: String,
    },
    /// The origin did not give it, whatever was tried.
    #[error("{origin}: {what} did not come within {tries} tries and {within:.0?}: {why}")]
    Unreachable {
        /// Who was asked.
        origin: String,
        /// For what.
        what: String,
        /// How often.
        tries: u32,
        /// In what time.
        within: Duration,
        /// The last error.
        why: String,
    },
    /// The origin gave something else than it should.
    #[error("{origin}: {what} is damaged or not what it says: {why}")]
    Damaged {
        /// Who sent it.
        origin: String,
        /// What.
        what: String,
        /// How it is known.
        why: String,
    },
    /// No network was allowed, and it is not here.
    #[error("{what} is not on this machine, and HF_HUB_OFFLINE says not to ask for it")]
    Offline {
        /// What was needed.
        what: String,
    },
    /// The disk.
    #[error("{}: {source}", path.display())]
    Disk {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The disk has no room.
    #[error(
        "{}: {needs} bytes are still to be fetched, and {free} are free on that disk: {} are missing; \
         make room there, or start the node with its --data elsewhere", folder.display(),
        needs.saturating_sub(*free)
    )]
    NoRoom {
        /// Where it should go.
        folder: PathBuf,
        /// What is still missing of the model here.
        needs: u64,
        /// What the disk has.
        free: u64,
    },
    /// The caller gave up.
    #[error("fetching was cancelled")]
    Cancelled,
}

impl BlobError {
    /// Whether it is the model's or the asker's fault, which no other try mends.
    pub fn is_final(&self) -> bool {
        match self {
            BlobError::Name(_)
            | BlobError::NotRemote(_)
            | BlobError::NotFound { .. }
            | BlobError::WhichGguf { .. }
            | BlobError::Denied { .. }
            | BlobError::Refused { .. }
            | BlobError::Damaged { .. } => true,
            BlobError::Unreachable { .. }
            | BlobError::Offline { .. }
            | BlobError::Disk { .. }
            | BlobError::NoRoom { .. }
            | BlobError::Cancelled => false,
        }
    }
}
