//! ○ A command as bytes: format byte · BLAKE3 of all else · id · postcard of a `Command`.
//!
//! The id is drawn for each command: whoever lost the answer to his transaction finds by it whether
//! the command in the log is his own.

use crate::control::state::Command;

/// The format that this build writes.
const FORMAT: u8 = 1;

/// The longest entry: etcd takes no request above 1.5 MiB, and the transaction around it is small.
pub const ENTRY_LEN_MAX: usize = 1 << 20;

const ID_LEN: usize = 16;

/// Which command it is, whatever it says.
pub type EntryId = [u8; ID_LEN];

/// Bytes that are no command, or a command that is none for etcd.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Not an entry.
    #[error("it has only {len} bytes")]
    Short {
        /// How many there are.
        len: usize,
    },
    /// Written by a newer build.
    #[error("it has format {found}, this build reads up to {FORMAT}; upgrade it")]
    NewerFormat {
        /// The format.
        found: u8,
    },
    /// Its checksum does not fit.
    #[error("its checksum does not match")]
    Damaged,
    /// It is sound but makes no sense.
    #[error("{0}")]
    Unreadable(String),
    /// It cannot be written.
    #[error("it has {len} bytes, and etcd holds at most {ENTRY_LEN_MAX} in one value")]
    TooLong {
        /// How many it would have.
        len: usize,
    },
}

/// The command as bytes.
pub fn encode(id: EntryId, command: &Command) -> Result<Vec<u8>, EntryError> {
    let body = postcard::to_stdvec(command).map_err(|e| EntryError::Unreadable(e.to_string()))?;
    let mut bytes = vec![FORMAT];
    bytes.extend_from_slice(checksum(FORMAT, &id, &body).as_bytes());
    bytes.extend_from_slice(&id);
    bytes.extend_from_slice(&body);
    match bytes.len() {
        len if len > ENTRY_LEN_MAX => Err(EntryError::TooLong { len }),
        _ => Ok(bytes),
    }
}

/// The command that these bytes were made from.
pub fn decode(bytes: &[u8]) -> Result<(EntryId, Command), EntryError> {
    let short = EntryError::Short { len: bytes.len() };
    let Some((&found, rest)) = bytes.split_first() else { return Err(short) };
    if found > FORMAT {
        return Err(EntryError::NewerFormat { found });
    }
    let parts = rest.split_first_chunk::<{ blake3::OUT_LEN }>();
    let Some((sum, rest)) = parts else { return Err(short) };
    let Some((id, body)) = rest.split_first_chunk::<ID_LEN>() else { return Err(short) };
    if checksum(found, id, body).as_bytes() != sum {
        return Err(EntryError::Damaged);
    }
    let command = postcard::from_bytes(body).map_err(|e| EntryError::Unreadable(e.to_string()))?;
    Ok((*id, command))
}

fn checksum(format: u8, id: &EntryId, body: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[format]).update(id).update(body);
    hasher.finalize()
}
