//! ● A model's folder on this disk: sparse files of full length, and beside each the record of the chunks
//! that it has.
//!
//! ```text
//! model.safetensors          ▓▓▓▓░░░░▓▓▓▓▓▓▓▓░░░░░░░░   header and fetched chunks; the rest is a hole
//! .chunks/model.safetensors  magic, length, chunk │ index, BLAKE3, check │ index, BLAKE3, check │ …
//! ```
//!
//! A record is a claim: the disk may have lost or changed the bytes since (nothing is synced), so each
//! process hashes a chunk before it uses it first. A record that is torn, or of a file of another
//! length, counts as none.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::chunks::Cut;
use super::error::BlobError;
use crate::weights::ChunkHash;

const MAGIC: &[u8; 8] = b"shoal-b1";

/// The folder of the records.
const RECORDS: &str = ".chunks";

/// The record that a whole file was compared with its origin's sum has this number, which no chunk has.
const WHOLE: u32 = u32::MAX;

/// Magic, file length, chunk length.
const HEAD_LEN: usize = 24;

/// Index, hash, check.
const RECORD_LEN: usize = 40;

/// What is known of a chunk on this disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// A process before this one had it.
    Claimed(ChunkHash),
    /// This process has hashed it.
    Verified(ChunkHash),
}

/// A large file of a model on this disk. It is opened for each chunk: that is cheap beside four mebibytes,
/// and a process may know hundreds of files of each model that it ever had.
#[derive(Debug)]
pub(super) struct SparseFile {
    path: PathBuf,
    records: PathBuf,
    len: u64,
    cut: Cut,
    held: Mutex<BTreeMap<u32, Held>>,
    /// What was compared with the origin's sum.
    proven: Mutex<Option<ChunkHash>>,
}

/// What is on record.
type Records = (BTreeMap<u32, Held>, Option<ChunkHash>);

impl SparseFile {
    /// Looks at the file, which `create` has made, and at its records.
    pub fn open(folder: &Path, name: &str, cut: Cut) -> Result<Arc<Self>, BlobError> {
        let path = folder.join(name);
        let failed = |source| BlobError::Disk { path: path.clone(), source };
        let len = std::fs::metadata(&path).map_err(failed)?.len();
        let records = records_of(folder, name);
        let (held, proven) = match read_records(&records, len, cut) {
            Ok(found) => found.unwrap_or_default(),
            Err(source) => return Err(BlobError::Disk { path: records, source }),
        };
        let (held, proven) = (Mutex::new(held), Mutex::new(proven));
        Ok(Arc::new(Self { path, records, len, cut, held, proven }))
    }

    /// Makes a file of full length that holds nothing but its beginning; whole under its name, or not
    /// there.
    pub fn create(folder: &Path, name: &str, len: u64, beginning: &[u8]) -> Result<(), BlobError> {
        let path = folder.join(name);
        let scratch = folder.join(format!(".{}.part", name.replace('/', "-")));
        let make = || {
            let file = File::create(&scratch)?;
            file.set_len(len)?;
            file.write_all_at(beginning, 0)?;
            let _ = std::fs::remove_file(records_of(folder, name));
            std::fs::rename(&scratch, &path)
        };
        make().map_err(|source| BlobError::Disk { path: path.clone(), source })
    }

    /// Writes some bytes of a file that `create` has made, and leaves the rest of it alone.
    pub fn mend(folder: &Path, name: &str, first: u64, bytes: &[u8]) -> Result<(), BlobError> {
        let path = folder.join(name);
        let write = || OpenOptions::new().write(true).open(&path)?.write_all_at(bytes, first);
        write().map_err(|source| BlobError::Disk { path: path.clone(), source })
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn held(&self, index: u32) -> Option<Held> {
        self.lock().get(&index).copied()
    }

    /// Whether this process knows of no chunk of it.
    pub fn is_hollow(&self) -> bool {
        !self.lock().values().any(|held| matches!(held, Held::Verified(_)))
    }

    /// One hash for the hashes of all chunks, where this process has hashed them all.
    pub fn whole(&self) -> Option<ChunkHash> {
        let held = self.lock();
        let mut hasher = blake3::Hasher::new();
        for index in 0..self.cut.count(self.len) {
            let Some(Held::Verified(hash)) = held.get(&index) else { return None };
            hasher.update(hash);
        }
        Some(*hasher.finalize().as_bytes())
    }

    /// What `whole` was when the file was last compared with its origin's sum, and was the same.
    pub fn proven(&self) -> Option<ChunkHash> {
        *self.proven.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts on record that it was.
    pub fn prove(&self, whole: ChunkHash) -> Result<(), BlobError> {
        self.record(WHOLE, &whole)
            .map_err(|source| BlobError::Disk { path: self.records.clone(), source })?;
        *self.proven.lock().unwrap_or_else(PoisonError::into_inner) = Some(whole);
        Ok(())
    }

    /// The chunks that this process has hashed.
    #[cfg(test)]
    pub fn verified(&self) -> Vec<(u32, ChunkHash)> {
        let held = self.lock();
        let verified = held.iter().filter_map(|(index, held)| match held {
            Held::Verified(hash) => Some((*index, *hash)),
            Held::Claimed(_) => None,
        });
        verified.collect()
    }

    /// Hashes a chunk that is on record; whether it is what the record says. Where it is not, it is not
    /// there any more.
    pub fn verify(&self, index: u32) -> Result<bool, BlobError> {
        let claimed = match self.held(index) {
            None => return Ok(false),
            Some(Held::Verified(_)) => return Ok(true),
            Some(Held::Claimed(hash)) => hash,
        };
        let good = *blake3::hash(&self.read(index)?).as_bytes() == claimed;
        let mut held = self.lock();
        if good {
            held.insert(index, Held::Verified(claimed));
        } else {
            held.remove(&index);
            tracing::warn!(
                "{}: chunk {index} is damaged on this disk: it is fetched again",
                self.path.display()
            );
        }
        Ok(good)
    }

    /// The bytes of a chunk, as they are.
    pub fn read(&self, index: u32) -> Result<Vec<u8>, BlobError> {
        let bytes = self.cut.bytes(index, self.len);
        self.read_at(bytes.start, (bytes.end - bytes.start) as usize)
    }

    /// Some bytes, as they are.
    pub fn read_at(&self, first: u64, len: usize) -> Result<Vec<u8>, BlobError> {
        let mut buffer = vec![0; len];
        let mut read = || File::open(&self.path)?.read_exact_at(&mut buffer, first);
        read().map_err(|source| self.failed(source))?;
        Ok(buffer)
    }

    /// Writes a chunk whose hash has been checked, then its record.
    pub fn write(&self, index: u32, bytes: &[u8], hash: ChunkHash) -> Result<(), BlobError> {
        let place = self.cut.bytes(index, self.len);
        debug_assert_eq!(place.end - place.start, bytes.len() as u64);
        let file = OpenOptions::new().write(true).open(&self.path);
        let written = file.and_then(|file| file.write_all_at(bytes, place.start));
        written.map_err(|source| self.failed(source))?;
        let mut held = self.lock();
        self.record(index, &hash)
            .map_err(|source| BlobError::Disk { path: self.records.clone(), source })?;
        held.insert(index, Held::Verified(hash));
        Ok(())
    }

    /// Forgets all chunks: what they are made of has turned out to be wrong.
    pub fn forget(&self) -> Result<(), BlobError> {
        self.lock().clear();
        *self.proven.lock().unwrap_or_else(PoisonError::into_inner) = None;
        match std::fs::remove_file(&self.records) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(BlobError::Disk { path: self.records.clone(), source })
            }
            _ => Ok(()),
        }
    }

    fn record(&self, index: u32, hash: &ChunkHash) -> io::Result<()> {
        if let Some(folder) = self.records.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut file = OpenOptions::new().append(true).create(true).open(&self.records)?;
        let mut bytes = Vec::with_capacity(HEAD_LEN + RECORD_LEN);
        if file.metadata()?.len() == 0 {
            bytes.extend(head(self.len, self.cut));
        }
        bytes.extend(encode(index, hash));
        file.write_all(&bytes)
    }

    fn failed(&self, source: io::Error) -> BlobError {
        BlobError::Disk { path: self.path.clone(), source }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Held>> {
        // Nothing under the lock panics half-way.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn records_of(folder: &Path, name: &str) -> PathBuf {
    folder.join(RECORDS).join(name.replace('/', "--"))
}

fn head(len: u64, cut: Cut) -> [u8; HEAD_LEN] {
    let mut head = [0; HEAD_LEN];
    head[..8].copy_from_slice(MAGIC);
    head[8..16].copy_from_slice(&len.to_le_bytes());
    head[16..].copy_from_slice(&cut.chunk.to_le_bytes());
    head
}

fn encode(index: u32, hash: &ChunkHash) -> [u8; RECORD_LEN] {
    let mut record = [0; RECORD_LEN];
    record[..4].copy_from_slice(&index.to_le_bytes());
    record[4..36].copy_from_slice(hash);
    let check = blake3::hash(&record[..36]);
    record[36..].copy_from_slice(&check.as_bytes()[..4]);
    record
}

/// The claims of a record file; `None` where there are none for such a file.
fn read_records(path: &Path, len: u64, cut: Cut) -> io::Result<Option<Records>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    // Each chunk may have been fetched a few times, never thousands of times.
    let max = HEAD_LEN as u64 + 16 * RECORD_LEN as u64 * u64::from(cut.count(len)).max(1);
    file.take(max).read_to_end(&mut bytes)?;
    let whole = bytes.len() >= HEAD_LEN && bytes[..HEAD_LEN] == head(len, cut);
    if !whole {
        std::fs::remove_file(path)?;
        return Ok(None);
    }
    let (mut held, mut proven) = Records::default();
    let (records, torn) = bytes[HEAD_LEN..].as_chunks::<RECORD_LEN>();
    for record in records {
        let index = u32::from_le_bytes([record[0], record[1], record[2], record[3]]);
        let mut hash = [0; 32];
        hash.copy_from_slice(&record[4..36]);
        let is_whole = *record == encode(index, &hash);
        if is_whole && index == WHOLE {
            proven = Some(hash);
        } else if is_whole && index < cut.count(len) {
            held.insert(index, Held::Claimed(hash));
        }
    }
    if !torn.is_empty() {
        // The next record must begin where one may begin.
        let good = (bytes.len() - torn.len()) as u64;
        OpenOptions::new().write(true).open(path)?.set_len(good)?;
    }
    Ok(Some((held, proven)))
}

/// Bytes that are free where a folder is.
pub(super) fn free(folder: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(folder)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Writes a small file, whole under its name or not there.
pub(super) fn write_whole(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), BlobError> {
    let path = folder.join(name);
    let scratch = folder.join(format!(".{}.part", name.replace('/', "-")));
    let write = || {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(&scratch, bytes)?;
        std::fs::rename(&scratch, &path)
    };
    write().map_err(|source| BlobError::Disk { path: path.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CUT: Cut = Cut { chunk: 10, run: 30 };

    fn hash(bytes: &[u8]) -> ChunkHash {
        *blake3::hash(bytes).as_bytes()
    }

    #[test]
    fn what_was_written_is_claimed_by_the_next_process_and_believed_only_when_hashed() {
        let folder = tempfile::tempdir().unwrap();
        SparseFile::create(folder.path(), "m", 25, b"head").unwrap();
        let file = SparseFile::open(folder.path(), "m", CUT).unwrap();
        file.write(1, b"0123456789", hash(b"0123456789")).unwrap();
        file.write(2, b"abcde", hash(b"abcde")).unwrap();
        assert_eq!(file.verified().len(), 2);
        let next = SparseFile::open(folder.path(), "m", CUT).unwrap();
        assert_eq!(next.held(1), Some(Held::Claimed(hash(b"0123456789"))));
        assert!(next.verified().is_empty());
        // Somebody's finger slips.
        let slipped = OpenOptions::new().write(true).open(&next.path).unwrap();
        slipped.write_all_at(b"X", 12).unwrap();
        assert!(!next.verify(1).unwrap());
        assert!(next.verify(2).unwrap());
        assert_eq!((next.held(0), next.held(1)), (None, None));
        assert_eq!(next.read_at(0, 4).unwrap(), b"head");
    }

    #[test]
    fn a_torn_record_is_none_and_the_next_one_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        SparseFile::create(folder.path(), "m", 25, b"").unwrap();
        let file = SparseFile::open(folder.path(), "m", CUT).unwrap();
        file.write(0, b"0123456789", hash(b"0123456789")).unwrap();
        file.write(2, b"abcde", hash(b"abcde")).unwrap();
        let records = records_of(folder.path(), "m");
        let len = std::fs::metadata(&records).unwrap().len();
        OpenOptions::new().write(true).open(&records).unwrap().set_len(len - 3).unwrap();
        let next = SparseFile::open(folder.path(), "m", CUT).unwrap();
        assert!(next.held(0).is_some() && next.held(2).is_none());
        next.write(2, b"abcde", hash(b"abcde")).unwrap();
        let last = SparseFile::open(folder.path(), "m", CUT).unwrap();
        assert!(last.held(0).is_some() && last.held(2).is_some());
    }

    #[test]
    fn records_of_a_file_of_another_length_or_cut_count_for_nothing() {
        let folder = tempfile::tempdir().unwrap();
        SparseFile::create(folder.path(), "m", 25, b"").unwrap();
        let file = SparseFile::open(folder.path(), "m", CUT).unwrap();
        file.write(2, b"abcde", hash(b"abcde")).unwrap();
        let other = Cut { chunk: 5, ..CUT };
        assert_eq!(SparseFile::open(folder.path(), "m", other).unwrap().held(2), None);
    }
}
