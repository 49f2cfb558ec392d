//! ● What was written of a model's small part, by length and hash: nothing is synced, and a disk that lost
//! its power may have a file of the right length that is full of zeros.
//!
//! Chunks have records of their own (`disk`). Here a record lies beside each file whose beginning, or all
//! of it, was fetched; one that is not there, or damaged, only costs another request.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::disk::write_whole;
use super::error::BlobError;
use crate::model::gguf::HEADER_LEN_MAX;

/// The folder of the records.
const RECORDS: &str = ".kept";

/// No beginning is longer: the bounds of safetensors' headers and of small files are lower.
const LEN_MAX: u64 = HEADER_LEN_MAX;

/// Length and BLAKE3.
const RECORD_LEN: usize = 8 + 32;

/// Puts on record that a file begins with these bytes.
pub(super) fn note(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), BlobError> {
    write_whole(folder, &format!("{RECORDS}/{}", flat(name)), &record(bytes))
}

/// Whether a file still begins with the bytes that are on record.
pub(super) fn holds(folder: &Path, name: &str) -> bool {
    let read = || -> Option<bool> {
        let kept = std::fs::read(path(folder, name)).ok()?;
        let len = u64::from_le_bytes(*kept.first_chunk()?);
        if len > LEN_MAX {
            return Some(false);
        }
        let mut bytes = Vec::new();
        File::open(folder.join(name)).ok()?.take(len).read_to_end(&mut bytes).ok()?;
        Some(record(&bytes)[..] == kept)
    };
    read().unwrap_or(false)
}

/// The length of the beginning that is on record; 0 where there is no record.
pub(super) fn len(folder: &Path, name: &str) -> u64 {
    let kept = std::fs::read(path(folder, name)).unwrap_or_default();
    kept.first_chunk().map_or(0, |len| u64::from_le_bytes(*len))
}

/// Whether these bytes are the ones on record.
pub(super) fn is(folder: &Path, name: &str, bytes: &[u8]) -> bool {
    std::fs::read(path(folder, name)).is_ok_and(|kept| record(bytes)[..] == kept)
}

fn record(bytes: &[u8]) -> [u8; RECORD_LEN] {
    let mut record = [0; RECORD_LEN];
    record[..8].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    record[8..].copy_from_slice(blake3::hash(bytes).as_bytes());
    record
}

fn path(folder: &Path, name: &str) -> PathBuf {
    folder.join(RECORDS).join(flat(name))
}

fn flat(name: &str) -> String {
    name.replace('/', "--")
}
