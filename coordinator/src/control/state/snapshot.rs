//! The state as bytes: `SHOALST` · format byte · BLAKE3 of the rest · postcard.
//!
//! The format byte grows with each change of what is encoded; a build reads its own and older
//! formats, and refuses a newer one by name.

use super::{ClusterState, check};

const MAGIC: &[u8; 7] = b"SHOALST";

/// The format that this build writes.
pub const FORMAT: u8 = 2;

/// The oldest format that this build reads: before it there was one coordinator alone.
const OLDEST: u8 = 2;

const HEADER_LEN: usize = MAGIC.len() + 1 + blake3::OUT_LEN;

/// Why bytes are no snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// They do not begin as one.
    #[error("these {len} bytes are no snapshot of a cluster's state")]
    NotASnapshot {
        /// How many bytes there are.
        len: usize,
    },
    /// They were written by a newer build.
    #[error("the snapshot has format {found}, this build reads up to {FORMAT}; upgrade it")]
    NewerFormat {
        /// The format.
        found: u8,
    },
    /// They were written by a build that is too old.
    #[error(
        "the snapshot has format {found}, this build reads {OLDEST} and later; start a new cluster"
    )]
    OlderFormat {
        /// The format.
        found: u8,
    },
    /// Their checksum does not fit.
    #[error("the snapshot is damaged: its checksum does not match; restore the data folder")]
    Damaged,
    /// They are sound but make no sense.
    #[error("the snapshot cannot be read: {0}")]
    Unreadable(String),
}

/// The state as bytes.
pub fn encode(state: &ClusterState) -> Result<Vec<u8>, SnapshotError> {
    let body = postcard::to_stdvec(state).map_err(|e| SnapshotError::Unreadable(e.to_string()))?;
    let mut bytes = Vec::with_capacity(HEADER_LEN + body.len());
    bytes.extend_from_slice(MAGIC);
    bytes.push(FORMAT);
    bytes.extend_from_slice(blake3::hash(&body).as_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// The state that these bytes were made from.
pub fn decode(bytes: &[u8]) -> Result<ClusterState, SnapshotError> {
    let not_ours = SnapshotError::NotASnapshot { len: bytes.len() };
    let Some((header, body)) = bytes.split_at_checked(HEADER_LEN) else { return Err(not_ours) };
    if !header.starts_with(MAGIC) {
        return Err(not_ours);
    }
    let found = header[MAGIC.len()];
    if found > FORMAT {
        return Err(SnapshotError::NewerFormat { found });
    }
    if found < OLDEST {
        return Err(SnapshotError::OlderFormat { found });
    }
    if blake3::hash(body).as_bytes()[..] != header[MAGIC.len() + 1..] {
        return Err(SnapshotError::Damaged);
    }
    let state: ClusterState =
        postcard::from_bytes(body).map_err(|e| SnapshotError::Unreadable(e.to_string()))?;
    match check::violations(&state).first() {
        Some(violation) => Err(SnapshotError::Unreadable(violation.to_string())),
        None => Ok(state),
    }
}
