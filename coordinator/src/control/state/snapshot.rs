//! The state as bytes: `SHOALST` · format byte · BLAKE3 of the rest · postcard [· parts].
//!
//! A build reads its own and older formats, and refuses a newer one by name. Format 2 is what protocol
//! version 1 wrote; format 3 is the same bytes and behind them what came later, each noun under a tag of
//! its own. A state that holds nothing of that is written as format 2, so that an older build reads it:
//! until something new has been decided, an upgrade can be taken back.

use serde::de::DeserializeOwned;

use super::{ClusterState, Refusal, check};

const MAGIC: &[u8; 7] = b"SHOALST";

/// The newest format that this build writes: where there are parts.
pub const FORMAT: u8 = 3;

/// What it writes where there are none.
pub const PLAIN: u8 = 2;

/// The tag of who speaks which version.
const VERSIONS: u8 = 1;

/// The tag of which CAs are believed.
const AUTHORITIES: u8 = 2;

/// The tag of what was asked of the planner.
const MESHES: u8 = 3;

/// The tag of which adapters are served.
const ADAPTERS: u8 = 4;

/// A noun that format 2 has no room for.
type Part = (u8, Vec<u8>);

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
    /// They hold something that this build does not know.
    #[error("the snapshot has a part with tag {tag}, which this build does not know; upgrade it")]
    UnknownPart {
        /// The tag.
        tag: u8,
    },
    /// They are sound but make no sense.
    #[error("the snapshot cannot be read: {0}")]
    Unreadable(String),
}

/// The state as bytes.
pub fn encode(state: &ClusterState) -> Result<Vec<u8>, SnapshotError> {
    let unreadable = |e: postcard::Error| SnapshotError::Unreadable(e.to_string());
    let mut body = postcard::to_stdvec(state).map_err(unreadable)?;
    let parts = parts_of(state).map_err(unreadable)?;
    if !parts.is_empty() {
        body = postcard::to_extend(&parts, body).map_err(unreadable)?;
    }
    let mut bytes = Vec::with_capacity(HEADER_LEN + body.len());
    bytes.extend_from_slice(MAGIC);
    bytes.push(if parts.is_empty() { PLAIN } else { FORMAT });
    bytes.extend_from_slice(blake3::hash(&body).as_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// What is to stand behind format 2: nothing of a noun that nobody has used yet.
fn parts_of(state: &ClusterState) -> Result<Vec<Part>, postcard::Error> {
    let mut parts = Vec::new();
    if !state.versions.is_empty() || has_new_answers(state) {
        parts.push((VERSIONS, postcard::to_stdvec(&state.versions)?));
    }
    if !state.authorities.is_empty() {
        parts.push((AUTHORITIES, postcard::to_stdvec(&state.authorities)?));
    }
    if !state.meshes.is_empty() {
        parts.push((MESHES, postcard::to_stdvec(&state.meshes)?));
    }
    if !state.adapters.is_empty() {
        parts.push((ADAPTERS, postcard::to_stdvec(&state.adapters)?));
    }
    Ok(parts)
}

/// Whether a client's last command was answered in words that version 1 does not know: all of them are of
/// this one where nothing new has been decided.
fn has_new_answers(state: &ClusterState) -> bool {
    state.last.values().any(|applied| matches!(applied.result, Err(Refusal::HeldBack { .. })))
}

fn put(state: &mut ClusterState, (tag, bytes): &Part) -> Result<(), SnapshotError> {
    match *tag {
        VERSIONS => state.versions = whole(bytes)?,
        AUTHORITIES => state.authorities = whole(bytes)?,
        MESHES => state.meshes = whole(bytes)?,
        ADAPTERS => state.adapters = whole(bytes)?,
        tag => return Err(SnapshotError::UnknownPart { tag }),
    }
    Ok(())
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
    let (mut state, rest): (ClusterState, _) =
        postcard::take_from_bytes(body).map_err(|e| SnapshotError::Unreadable(e.to_string()))?;
    if found > PLAIN {
        let parts: Vec<Part> = whole(rest)?;
        parts.iter().try_for_each(|part| put(&mut state, part))?;
    }
    match check::violations(&state).first() {
        Some(violation) => Err(SnapshotError::Unreadable(violation.to_string())),
        None => Ok(state),
    }
}

/// All of the bytes, and nothing but.
fn whole<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, SnapshotError> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(SnapshotError::Unreadable(format!("{} bytes too many", rest.len()))),
        Err(error) => Err(SnapshotError::Unreadable(error.to_string())),
    }
}
