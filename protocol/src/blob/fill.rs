//! ● Brings the chunks of some byte ranges here: what the disk has is hashed, what is missing is fetched
//! by several threads from whoever has it nearest, hashed, written, put on record.
//!
//! ```text
//! ranges ─► chunks ─► on record? hash it ─► missing ─► Peers::choose ─┬─► another worker ─┐
//!                                               ▲                     ├─► origin (a run) ─┼─► hash ─► disk
//!                                               └── lost, lied ◄──────┴───────────────────┘
//! ```

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::chunks::{ChunkId, Cut};
use super::disk::{Held, SparseFile};
use super::error::BlobError;
use super::origin::{Origin, RemoteFile};
use super::turn::Turn;
use crate::id::NodeId;
use crate::weights::ChunkHash;

/// What is fetched at once: enough to fill a link whose round trip is long, few enough that their
/// buffers (a run each) do not show beside the weights.
const FETCHERS: usize = 4;

/// What hashes at once what the disk has: beyond it is the disk that bounds.
const HASHERS: usize = 8;

/// How soon a thread that waits for others looks again; whoever has news wakes it before.
const LOOK: Duration = Duration::from_millis(200);

const OTHER_HEADER: &str = "its header is not the one that it had when the model was deployed";

/// A range of a file that is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The file's name in the model's folder.
    pub file: String,
    /// Its bytes.
    pub bytes: Range<u64>,
}

/// Who waits for it.
pub struct Filling<'a> {
    /// Called with the bytes that are here and those that are wanted, and with more of both where a whole file
    /// is compared with its origin's sum; calls may overlap.
    pub on_progress: &'a (dyn Fn(u64, u64) + Sync),
    /// Set to give up: within a pause or a read.
    pub cancel: &'a AtomicBool,
}

/// Where something that is missing is to be had now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// These of the origin: neighbours in one file.
    Origin(Vec<ChunkId>),
    /// This one of another worker; what it must hash to is known from somebody else.
    Peer(NodeId, ChunkId, ChunkHash),
    /// Others are about to have it.
    Wait,
}

/// The other workers that want the same model.
pub trait Peers: Send + Sync + Debug {
    /// These are to be fetched from now on.
    fn begin(&self, missing: &BTreeSet<ChunkId>);

    /// Where to get some of what is missing.
    fn choose(&self, missing: &BTreeSet<ChunkId>, cut: Cut) -> Choice;

    /// Gets a chunk of so many bytes from another worker, within a deadline.
    fn fetch(&self, node: NodeId, chunk: ChunkId, len: u64) -> Result<Vec<u8>, String>;

    /// A chunk is here now, and hashed.
    fn have(&self, chunk: ChunkId, hash: ChunkHash);

    /// What a chunk hashes to, and who said so first.
    fn said(&self, chunk: ChunkId) -> Option<(NodeId, ChunkHash)>;

    /// The origin's bytes of a chunk have this hash, and not the one that was said.
    fn correct(&self, chunk: ChunkId, hash: ChunkHash);

    /// Nothing more is wanted from a worker: what it sent or said was not true.
    fn avoid(&self, node: NodeId, why: &str);

    /// A worker did not give what it has: it is left alone for a while.
    fn failed(&self, node: NodeId);

    /// Waits for news, not longer than this.
    fn wait(&self, longest: Duration);
}

/// Nobody else wants it.
#[derive(Debug)]
pub struct Alone;

impl Peers for Alone {
    fn begin(&self, _missing: &BTreeSet<ChunkId>) {}

    fn choose(&self, missing: &BTreeSet<ChunkId>, cut: Cut) -> Choice {
        match missing.first() {
            Some(first) => Choice::Origin(cut.run(*first, missing)),
            None => Choice::Wait,
        }
    }

    fn fetch(&self, node: NodeId, _chunk: ChunkId, _len: u64) -> Result<Vec<u8>, String> {
        Err(format!("{node} is nobody here"))
    }

    fn have(&self, _chunk: ChunkId, _hash: ChunkHash) {}

    fn said(&self, _chunk: ChunkId) -> Option<(NodeId, ChunkHash)> {
        None
    }

    fn correct(&self, _chunk: ChunkId, _hash: ChunkHash) {}

    fn avoid(&self, _node: NodeId, _why: &str) {}

    fn failed(&self, _node: NodeId) {}

    #[allow(clippy::disallowed_methods, reason = "there is nobody whose news would end it sooner")]
    fn wait(&self, longest: Duration) {
        std::thread::sleep(longest);
    }
}

/// A weights file of a model, here and there.
#[derive(Debug)]
pub(super) struct Entry {
    pub remote: RemoteFile,
    pub here: Arc<SparseFile>,
    /// The bytes at its beginning that were here from the start: what comes must be the same.
    pub head: u64,
}

/// A model whose chunks are brought here.
#[derive(Debug)]
pub(super) struct Model {
    pub origin: Box<dyn Origin>,
    pub commit: String,
    /// In the order of their names: the number of a file is its place.
    pub files: Vec<Entry>,
    pub folder: std::path::PathBuf,
    pub cut: Cut,
    /// One at a time: the second finds what the first has brought.
    pub turn: Turn,
    /// Who has given a chunk of which file, as long as that file's sum is not known to be right.
    pub givers: Mutex<BTreeSet<(u32, NodeId)>>,
}

struct Work {
    missing: BTreeSet<ChunkId>,
    failure: Option<BlobError>,
}

impl Model {
    /// Brings the chunks of these ranges here.
    pub fn fill(
        &self,
        wanted: &[Wanted],
        peers: &dyn Peers,
        filling: &Filling<'_>,
    ) -> Result<(), BlobError> {
        let _turn = self.turn.take(filling.cancel)?;
        let wanted = self.chunks(wanted);
        self.look_at_disk(&wanted, filling)?;
        let own: Vec<bool> = self.files.iter().map(|entry| entry.here.is_hollow()).collect();
        self.fetch(&wanted, peers, filling)?;
        self.check_sums(&wanted, &own, peers, filling)
    }

    pub fn damaged(&self, what: &str, why: &str) -> BlobError {
        let origin = self.origin.name().to_owned();
        BlobError::Damaged { origin, what: what.to_owned(), why: why.to_owned() }
    }

    fn chunks(&self, wanted: &[Wanted]) -> BTreeSet<ChunkId> {
        let mut chunks = BTreeSet::new();
        for (file, entry) in (0..).zip(&self.files) {
            for wanted in wanted.iter().filter(|wanted| wanted.file == entry.remote.name) {
                let touched = self.cut.touched(&wanted.bytes);
                let last = self.cut.count(entry.here.len());
                chunks.extend(
                    (touched.start..touched.end.min(last)).map(|index| ChunkId { file, index }),
                );
            }
        }
        chunks
    }

    fn entry(&self, chunk: ChunkId) -> &Entry {
        &self.files[chunk.file as usize]
    }

    fn len_of(&self, chunk: ChunkId) -> u64 {
        let bytes = self.cut.bytes(chunk.index, self.entry(chunk).here.len());
        bytes.end - bytes.start
    }

    pub fn bytes_of(&self, chunks: &BTreeSet<ChunkId>) -> u64 {
        chunks.iter().map(|chunk| self.len_of(*chunk)).sum()
    }

    fn is_here(&self, chunk: ChunkId) -> bool {
        matches!(self.entry(chunk).here.held(chunk.index), Some(Held::Verified(_)))
    }

    /// Hashes what is on record.
    fn look_at_disk(
        &self,
        wanted: &BTreeSet<ChunkId>,
        filling: &Filling<'_>,
    ) -> Result<(), BlobError> {
        let claimed = |chunk: &ChunkId| {
            matches!(self.entry(*chunk).here.held(chunk.index), Some(Held::Claimed(_)))
        };
        let claimed: Vec<ChunkId> = wanted.iter().copied().filter(claimed).collect();
        let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
        let (total, hashed) = (self.bytes_of(wanted), AtomicU64::new(0));
        let run = || {
            while let Some(chunk) = claimed.get(next.fetch_add(1, Ordering::Relaxed)) {
                let result = match filling.cancel.load(Ordering::Relaxed) {
                    true => Err(BlobError::Cancelled),
                    false => self.entry(*chunk).here.verify(chunk.index),
                };
                if let Err(error) = result {
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    return;
                }
                let len = self.len_of(*chunk);
                (filling.on_progress)(hashed.fetch_add(len, Ordering::Relaxed) + len, total);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..HASHERS.min(claimed.len()) {
                scope.spawn(run);
            }
            run();
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Fetches what is not here.
    pub fn fetch(
        &self,
        wanted: &BTreeSet<ChunkId>,
        peers: &dyn Peers,
        filling: &Filling<'_>,
    ) -> Result<(), BlobError> {
        for chunk in wanted {
            if let Some(Held::Verified(hash)) = self.entry(*chunk).here.held(chunk.index) {
                peers.have(*chunk, hash);
            }
        }
        let missing: BTreeSet<ChunkId> =
            wanted.iter().copied().filter(|chunk| !self.is_here(*chunk)).collect();
        let (total, needs) = (self.bytes_of(wanted), self.bytes_of(&missing));
        let done = AtomicU64::new(total - needs);
        (filling.on_progress)(total - needs, total);
        if missing.is_empty() {
            return Ok(());
        }
        self.check_room(needs)?;
        peers.begin(&missing);
        let threads = FETCHERS.min(missing.len());
        let work = Mutex::new(Work { missing, failure: None });
        let run = || {
            let fetcher = Fetcher { model: self, work: &work, peers, cancel: filling.cancel };
            fetcher.run(&|came| {
                let done = done.fetch_add(came, Ordering::Relaxed) + came;
                (filling.on_progress)(done, total);
            });
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(run);
            }
            run();
        });
        let work = work.into_inner().unwrap_or_else(PoisonError::into_inner);
        work.failure.map_or(Ok(()), Err)
    }

    /// Refuses what the disk cannot take before anything is fetched for it.
    fn check_room(&self, needs: u64) -> Result<(), BlobError> {
        let free = super::disk::free(&self.folder)
            .map_err(|source| BlobError::Disk { path: self.folder.clone(), source })?;
        room(&self.folder, needs, free)
    }
}

/// Whether so much fits.
pub(super) fn room(folder: &std::path::Path, needs: u64, free: u64) -> Result<(), BlobError> {
    match needs > free {
        true => Err(BlobError::NoRoom { folder: folder.to_owned(), needs, free }),
        false => Ok(()),
    }
}

/// One thread that fetches.
struct Fetcher<'a> {
    model: &'a Model,
    work: &'a Mutex<Work>,
    peers: &'a dyn Peers,
    cancel: &'a AtomicBool,
}

impl Fetcher<'_> {
    fn lock(&self) -> MutexGuard<'_, Work> {
        // Nothing under the lock panics half-way.
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, on_bytes: &dyn Fn(u64)) {
        while let Some(choice) = self.next() {
            let result = match choice {
                Choice::Wait => {
                    self.peers.wait(LOOK);
                    Ok(())
                }
                Choice::Origin(run) => self.ask_origin(&run, on_bytes),
                Choice::Peer(node, chunk, hash) => self.ask_peer(node, chunk, hash, on_bytes),
            };
            if let Err(error) = result {
                self.lock().failure.get_or_insert(error);
            }
        }
    }

    /// Takes what to do next out of what is missing; `None` where there is nothing more to do here.
    fn next(&self) -> Option<Choice> {
        let mut work = self.lock();
        if self.cancel.load(Ordering::Relaxed) {
            work.failure.get_or_insert(BlobError::Cancelled);
        }
        if work.failure.is_some() || work.missing.is_empty() {
            return None;
        }
        let choice = self.peers.choose(&work.missing, self.model.cut);
        match &choice {
            Choice::Origin(run) => run.iter().for_each(|chunk| {
                work.missing.remove(chunk);
            }),
            Choice::Peer(_, chunk, _) => {
                work.missing.remove(chunk);
            }
            Choice::Wait => {}
        }
        Some(choice)
    }

    fn ask_origin(&self, run: &[ChunkId], on_bytes: &dyn Fn(u64)) -> Result<(), BlobError> {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return Ok(()) };
        let model = self.model;
        let (entry, cut) = (model.entry(*first), model.cut);
        let len = entry.here.len();
        let bytes = cut.bytes(first.index, len).start..cut.bytes(last.index, len).end;
        let mut buffer = Vec::with_capacity((bytes.end - bytes.start) as usize);
        let read = |buffer: &mut Vec<u8>| {
            model.origin.read(&model.commit, &entry.remote, bytes.clone(), buffer, self.cancel)
        };
        let result = read(&mut buffer);
        // What came before it broke off is whole chunks, but for the last.
        let mut rest = buffer.as_slice();
        for chunk in run {
            let Some((data, behind)) = rest.split_at_checked(model.len_of(*chunk) as usize) else {
                break;
            };
            rest = behind;
            self.take(*chunk, data, None)?;
            on_bytes(data.len() as u64);
        }
        result
    }

    fn ask_peer(
        &self,
        node: NodeId,
        chunk: ChunkId,
        hash: ChunkHash,
        on_bytes: &dyn Fn(u64),
    ) -> Result<(), BlobError> {
        let fetched = self.peers.fetch(node, chunk, self.model.len_of(chunk));
        let (file, index) = (&self.model.entry(chunk).remote.name, chunk.index);
        match fetched {
            Ok(data) => {
                let why = match *blake3::hash(&data).as_bytes() == hash {
                    false => "what it sent is not what others say that it is",
                    // Whoever says so, and however many: the header is the plan's.
                    true if !self.fits_header(chunk, &data)? => OTHER_HEADER,
                    true => {
                        self.take(chunk, &data, Some(node))?;
                        on_bytes(data.len() as u64);
                        return Ok(());
                    }
                };
                tracing::warn!("{file} chunk {index}: {node} is avoided: {why}");
                self.peers.avoid(node, why);
            }
            Err(why) => {
                tracing::info!("{file} chunk {index}: not from {node}: {why}");
                self.peers.failed(node);
            }
        }
        self.lock().missing.insert(chunk);
        Ok(())
    }

    /// Whether what a chunk has of its file's header is what has been here from the start.
    fn fits_header(&self, chunk: ChunkId, data: &[u8]) -> Result<bool, BlobError> {
        let entry = self.model.entry(chunk);
        let first = self.model.cut.bytes(chunk.index, entry.here.len()).start;
        let known = entry.head.saturating_sub(first).min(data.len() as u64) as usize;
        Ok(known == 0 || entry.here.read_at(first, known)? == data[..known])
    }

    /// Takes a chunk that is of the right length; one of a peer has been compared with all that is known.
    fn take(&self, chunk: ChunkId, data: &[u8], from: Option<NodeId>) -> Result<(), BlobError> {
        let entry = self.model.entry(chunk);
        if from.is_none() && !self.fits_header(chunk, data)? {
            return Err(self.model.damaged(&entry.remote.name, OTHER_HEADER));
        }
        let hash = *blake3::hash(data).as_bytes();
        if from.is_none()
            && let Some((node, said)) = self.peers.said(chunk)
            && said != hash
        {
            // The origin is who says what the model is.
            let why = "it said another hash of a chunk than the origin's bytes have";
            tracing::warn!("{} chunk {}: {node}: {why}", entry.remote.name, chunk.index);
            self.peers.avoid(node, why);
            self.peers.correct(chunk, hash);
        }
        entry.here.write(chunk.index, data, hash)?;
        if let Some(node) = from {
            let mut givers = self.model.givers.lock().unwrap_or_else(PoisonError::into_inner);
            givers.insert((chunk.file, node));
        }
        self.peers.have(chunk, hash);
        Ok(())
    }
}

#[cfg(test)]
#[path = "fill_test.rs"]
mod tests;
