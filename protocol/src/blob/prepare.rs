//! ● The small part of a model: what must be here before anything of it can be planned or loaded.
//!
//! ```text
//! list ─► config, index, (tokenizer, templates) whole ─► headers of the weights ─► sparse files
//! ```
//!
//! It can be broken off at any point: what is there under its name, and is what was fetched, is not fetched
//! again. That is looked at each time: it is little, and a model with a damaged header loads nowhere.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Deserialize;

use super::disk::{SparseFile, write_whole};
use super::error::BlobError;
use super::fill::Wanted;
use super::name::is_gguf;
use super::origin::{Checksum, Listing, Origin, RemoteFile};
use super::{kept, name};
use crate::model::checkpoint::{INDEX, SINGLE};
use crate::model::gguf::header_len;
use crate::model::safetensors::HEADER_LEN_MAX;

/// Where a folder keeps what its origin said of it.
const LISTING: &str = ".origin.json";

/// The largest file that is fetched for its own sake: the largest tokenizers have 40 MB.
const SMALL_MAX: u64 = 100_000_000;

/// What is asked for of a weights file at first: most headers are shorter.
const HEAD_FIRST: u64 = 256 << 10;

/// The most that is asked of a header at once whose length is not known: of that of a large vocabulary (some
/// eight megabytes) a quarter too much comes at most.
const HEAD_STEP_MAX: u64 = 2 << 20;

/// Requests for small files and headers at once: a large model has hundreds of files, and each answer is a
/// round trip.
const AT_ONCE: usize = 8;

/// Headers of GGUF files at once: one may take hundreds of megabytes in memory, and that is bound for each
/// model, however many parts it has. They are few, and those behind the first are short.
const GGUF_AT_ONCE: usize = 1;

/// For whom a model is prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A coordinator: tokenizer and templates too.
    Text,
    /// A worker: what its weights need.
    Weights,
}

impl Side {
    /// Whether a file is needed whole. Anything may describe a model, but only in these forms.
    fn wants(self, file: &RemoteFile) -> bool {
        let (depth, name) = (file.name.matches('/').count(), file.name.as_str());
        let form = |suffixes: &[&str]| suffixes.iter().any(|suffix| name.ends_with(suffix));
        // A sentence encoder says in folders of its own how it pools.
        let described = depth == 0 || (depth == 1 && name.ends_with("/config.json"));
        let text = name.starts_with("tokenizer")
            || name.starts_with("vocab")
            || name.starts_with("merges")
            || form(&[".jinja", ".txt", ".model"]);
        let wanted = match self {
            Side::Text => form(&[".json", ".jinja", ".txt"]),
            Side::Weights => form(&[".json"]) && !text,
        };
        described && wanted && file.len <= SMALL_MAX
    }
}

/// Sees to it that the small part is in the folder; says what the whole model consists of.
pub(super) fn prepare(
    origin: &dyn Origin,
    (folder, commit): (&Path, &str),
    side: Side,
    cancel: &AtomicBool,
) -> Result<Listing, BlobError> {
    std::fs::create_dir_all(folder)
        .map_err(|source| BlobError::Disk { path: folder.to_owned(), source })?;
    let listing = listing(origin, (folder, commit), cancel)?;
    let small = listing.files.iter().filter(|file| side.wants(file));
    let small: Vec<_> = small.filter(|file| !has_small(folder, file)).collect();
    each(&small, AT_ONCE, |file| fetch_small(origin, (folder, commit), file, cancel))?;
    let weights = weights(origin, folder, &listing)?;
    let headless = weights.into_iter().filter(|file| !has_head(folder, file));
    let (gguf, others): (Vec<_>, Vec<_>) = headless.partition(|file| is_gguf(&file.name));
    each(&others, AT_ONCE, |file| fetch_head(origin, (folder, commit), file, cancel))?;
    each(&gguf, GGUF_AT_ONCE, |file| fetch_head(origin, (folder, commit), file, cancel))?;
    Ok(listing)
}

/// The matrices of an adapter, as PEFT writes them, the usual file first.
const ADAPTER_FILES: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];

/// All of the matrices of an adapter whose folder is prepared.
pub(super) fn adapter_files(folder: &Path) -> Vec<Wanted> {
    let len = |file: &str| Some(std::fs::metadata(folder.join(file)).ok()?.len());
    let wanted = |file: &&str| Some(Wanted { file: (*file).to_owned(), bytes: 0..len(file)? });
    ADAPTER_FILES.iter().filter_map(wanted).collect()
}

/// The weights files of a folder that is prepared, in the order of their names: a model's, and an
/// adapter's where it has some.
pub(super) fn weights<'a>(
    origin: &dyn Origin,
    folder: &Path,
    listing: &'a Listing,
) -> Result<Vec<&'a RemoteFile>, BlobError> {
    let mut files = model_weights(origin, folder, listing)?;
    files.extend(ADAPTER_FILES.iter().find_map(|name| listing.file(name)));
    files.sort_by_key(|file| &file.name);
    Ok(files)
}

fn model_weights<'a>(
    origin: &dyn Origin,
    folder: &Path,
    listing: &'a Listing,
) -> Result<Vec<&'a RemoteFile>, BlobError> {
    if let Some(single) = listing.file(SINGLE) {
        return Ok(vec![single]);
    }
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::HashMap<String, String>,
    }
    let damaged = |why: String| {
        let (origin, what) = (origin.name().to_owned(), INDEX.to_owned());
        BlobError::Damaged { origin, what, why }
    };
    let path = folder.join(INDEX);
    if listing.file(INDEX).is_none() {
        // One GGUF model is nothing else; of anything else whoever opens the folder says what is missing.
        let is_one = listing.files.iter().all(|file| is_gguf(&file.name));
        let mut parts: Vec<_> = listing.files.iter().filter(|_| is_one).collect();
        parts.sort_by_key(|file| &file.name);
        return Ok(parts);
    }
    let text = std::fs::read(&path).map_err(|source| BlobError::Disk { path, source })?;
    let index: Index =
        serde_json::from_slice(&text).map_err(|error| damaged(format!("no index: {error}")))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    let found = |name: &&String| {
        let listed = listing.file(name);
        listed.ok_or_else(|| damaged(format!("it lists {name}, which is not among the files")))
    };
    names.iter().map(found).collect()
}

fn listing(
    origin: &dyn Origin,
    (folder, commit): (&Path, &str),
    cancel: &AtomicBool,
) -> Result<Listing, BlobError> {
    let kept = std::fs::read(folder.join(LISTING)).ok();
    let kept = kept.filter(|bytes| kept::is(folder, LISTING, bytes));
    let kept = kept.and_then(|bytes| serde_json::from_slice::<Listing>(&bytes).ok());
    if let Some(kept) = kept.filter(|kept| kept.commit == commit) {
        return Ok(kept);
    }
    let listing = origin.list(commit, cancel)?;
    if listing.commit != commit {
        return Err(BlobError::Damaged {
            origin: origin.name().to_owned(),
            what: format!("the description of {commit}"),
            why: format!("it is of {}", listing.commit),
        });
    }
    for file in &listing.files {
        name::check_file(&file.name)?;
    }
    let bytes = serde_json::to_vec(&listing).unwrap_or_default();
    write_whole(folder, LISTING, &bytes)?;
    kept::note(folder, LISTING, &bytes)?;
    Ok(listing)
}

fn has_len(folder: &Path, file: &RemoteFile) -> bool {
    std::fs::metadata(folder.join(&file.name))
        .is_ok_and(|found| found.is_file() && found.len() == file.len)
}

/// Whether a small file is here as its origin means it.
fn has_small(folder: &Path, file: &RemoteFile) -> bool {
    let holds = |bytes: Vec<u8>| match &file.checksum {
        Some(sum @ (Checksum::Sha256(_) | Checksum::GitBlob(_))) => sum.holds(&bytes),
        // The origin says nothing that could be compared.
        Some(Checksum::Etag(_)) | None => kept::is(folder, &file.name, &bytes),
    };
    has_len(folder, file) && std::fs::read(folder.join(&file.name)).is_ok_and(holds)
}

/// Whether a weights file is here with the header that was fetched.
fn has_head(folder: &Path, file: &RemoteFile) -> bool {
    has_len(folder, file) && kept::holds(folder, &file.name)
}

fn fetch_small(
    origin: &dyn Origin,
    (folder, commit): (&Path, &str),
    file: &RemoteFile,
    cancel: &AtomicBool,
) -> Result<(), BlobError> {
    let mut bytes = Vec::new();
    origin.read(commit, file, 0..file.len, &mut bytes, cancel)?;
    if file.checksum.as_ref().is_some_and(|sum| !sum.holds(&bytes)) {
        return Err(BlobError::Damaged {
            origin: origin.name().to_owned(),
            what: file.name.clone(),
            why: "its hash is not the one that the description says".to_owned(),
        });
    }
    write_whole(folder, &file.name, &bytes)?;
    kept::note(folder, &file.name, &bytes)
}

fn fetch_head(
    origin: &dyn Origin,
    (folder, commit): (&Path, &str),
    file: &RemoteFile,
    cancel: &AtomicBool,
) -> Result<(), BlobError> {
    let mut head = Head { origin, commit, file, cancel, bytes: Vec::new(), read: 0, failure: None };
    let len = match file.name.as_str() {
        name if is_gguf(name) => header_len(&mut head, file.len),
        name if name.ends_with(".safetensors") => head.safetensors().map(|len| (len, Vec::new())),
        // A state dict has what describes it at its end.
        _ => Ok((0, Vec::new())),
    };
    let Head { mut bytes, failure, .. } = head;
    if let Some(error) = failure {
        return Err(error);
    }
    let (len, factors) = len.map_err(|why| BlobError::Damaged {
        origin: origin.name().to_owned(),
        what: file.name.clone(),
        why,
    })?;
    bytes.truncate(len as usize);
    // What a disk has done to the header it may not have done to the chunks: they are hashed.
    match has_len(folder, file) {
        true => SparseFile::mend(folder, &file.name, 0, &bytes)?,
        false => SparseFile::create(folder, &file.name, file.len, &bytes)?,
    }
    // Before the header is on record: what broke off here is done again.
    for factors in factors {
        let (first, mut bytes) = (factors.start, Vec::new());
        origin.read(commit, file, factors, &mut bytes, cancel)?;
        SparseFile::mend(folder, &file.name, first, &bytes)?;
    }
    kept::note(folder, &file.name, &bytes)
}

/// The beginning of a weights file, which comes as far as it is read.
struct Head<'a> {
    origin: &'a dyn Origin,
    commit: &'a str,
    file: &'a RemoteFile,
    cancel: &'a AtomicBool,
    /// What has come.
    bytes: Vec<u8>,
    read: usize,
    failure: Option<BlobError>,
}

impl Head<'_> {
    /// Sees to it that so many bytes have come.
    fn get(&mut self, end: u64) -> Result<(), BlobError> {
        let came = self.bytes.len() as u64;
        match end > came {
            true => {
                self.origin.read(self.commit, self.file, came..end, &mut self.bytes, self.cancel)
            }
            false => Ok(()),
        }
    }

    /// The length of a safetensors header with its length word, all of which has come then.
    fn safetensors(&mut self) -> Result<u64, String> {
        let file_len = self.file.len;
        let first = self.get(file_len.min(HEAD_FIRST));
        let word = self.bytes.first_chunk::<8>().map(|word| u64::from_le_bytes(*word));
        let word = word.filter(|word| *word <= HEADER_LEN_MAX);
        let len = word.map(|word| word + 8).filter(|len| *len <= file_len);
        self.failure = match (first, len) {
            (Ok(()), Some(len)) => self.get(len).err(),
            (first, _) => first.err(),
        };
        len.ok_or_else(|| {
            format!(
                "this is no intact safetensors file: its {file_len} bytes do not begin with the length \
                 of a header that fits"
            )
        })
    }
}

/// For headers whose length nothing says before they are read.
impl Read for Head<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.read == self.bytes.len() {
            let came = self.bytes.len() as u64;
            let end = self.file.len.min(came + came.clamp(HEAD_FIRST, HEAD_STEP_MAX));
            if let Err(error) = self.get(end) {
                let words = error.to_string();
                self.failure = Some(error);
                return Err(io::Error::other(words));
            }
        }
        let read = (&self.bytes[self.read..]).read(buffer)?;
        self.read += read;
        Ok(read)
    }
}

/// Does it for each, so many at once. The first error ends it.
fn each(
    files: &[&RemoteFile],
    at_once: usize,
    work: impl Fn(&RemoteFile) -> Result<(), BlobError> + Sync,
) -> Result<(), BlobError> {
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let run = || {
        while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            let result = work(file);
            let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
            if failure.is_some() {
                return;
            }
            *failure = result.err();
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..at_once.min(files.len()) {
            scope.spawn(run);
        }
        run();
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

#[cfg(test)]
#[path = "prepare_test.rs"]
mod tests;
