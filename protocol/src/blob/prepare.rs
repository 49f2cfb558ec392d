//! ● The small part of a model: what must be here before anything of it can be planned or loaded.
//!
//! ```text
//! list ─► config, index, (tokenizer, templates) whole ─► headers of the weights ─► sparse files
//! ```
//!
//! It can be broken off at any point: what is there under its name, and is what was fetched, is not fetched
//! again. That is looked at each time: it is little, and a model with a damaged header loads nowhere.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Deserialize;

use super::disk::{SparseFile, write_whole};
use super::error::BlobError;
use super::origin::{Checksum, Listing, Origin, RemoteFile};
use super::{kept, name};
use crate::model::checkpoint::{INDEX, SINGLE};
use crate::model::safetensors::HEADER_LEN_MAX;

/// Where a folder keeps what its origin said of it.
const LISTING: &str = ".origin.json";

/// The largest file that is fetched for its own sake: the largest tokenizers have 40 MB.
const SMALL_MAX: u64 = 100_000_000;

/// What is asked for of a weights file at first: most headers are shorter.
const HEAD_FIRST: u64 = 256 << 10;

/// Requests for headers at once: a large model has hundreds of files, and each answer is a round trip.
const AT_ONCE: usize = 8;

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
    each(&small, |file| fetch_small(origin, (folder, commit), file, cancel))?;
    let weights = weights(origin, folder, &listing)?;
    let headless: Vec<_> = weights.into_iter().filter(|file| !has_head(folder, file)).collect();
    each(&headless, |file| fetch_head(origin, (folder, commit), file, cancel))?;
    Ok(listing)
}

/// The weights files of a folder that is prepared, in the order of their names.
pub(super) fn weights<'a>(
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
        // Whoever opens the folder says what is missing.
        return Ok(Vec::new());
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
    let mut bytes = Vec::new();
    origin.read(commit, file, 0..file.len.min(HEAD_FIRST), &mut bytes, cancel)?;
    let Some(head) = head_len(&bytes).filter(|head| *head <= file.len) else {
        return Err(BlobError::Damaged {
            origin: origin.name().to_owned(),
            what: file.name.clone(),
            why: format!(
                "this is no intact safetensors file: its {} bytes do not begin with the length of a \
                 header that fits",
                file.len
            ),
        });
    };
    let came = bytes.len() as u64;
    if head > came {
        origin.read(commit, file, came..head, &mut bytes, cancel)?;
    }
    bytes.truncate(head as usize);
    // What a disk has done to the header it may not have done to the chunks: they are hashed.
    match has_len(folder, file) {
        true => SparseFile::mend(folder, &file.name, &bytes)?,
        false => SparseFile::create(folder, &file.name, file.len, &bytes)?,
    }
    kept::note(folder, &file.name, &bytes)
}

/// The length of a safetensors header with its length word, where the first bytes say a sane one.
pub(super) fn head_len(first: &[u8]) -> Option<u64> {
    let word = u64::from_le_bytes(*first.first_chunk::<8>()?);
    (word <= HEADER_LEN_MAX).then_some(word + 8)
}

/// Does it for each, some at once. The first error ends it.
fn each(
    files: &[&RemoteFile],
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
        for _ in 1..AT_ONCE.min(files.len()) {
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
