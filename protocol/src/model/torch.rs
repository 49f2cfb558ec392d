//! State dicts of `torch.save`: a zip archive with one pickle and a file for each storage.
//!
//! ```text
//! entries … │ central directory │ end record
//! NAME/data.pkl: which tensor is which part of which storage     NAME/data/0, 1, …: their bytes
//! ```
//!
//! Entries are stored, never compressed, so that a tensor is a range of the file, as in safetensors.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::model::checkpoint::CheckpointError;
use crate::model::pickle::{PickledTensor, state_dict};
use crate::model::safetensors::{Header, HeaderTensor};

/// The longest pickle and the longest directory; those of the largest models have a few MiB.
const PICKLE_LEN_MAX: u64 = 64 << 20;
/// An end record and the longest comment.
const END_LEN_MAX: u64 = 22 + 65_535;

/// Reads which tensors a file holds.
pub(super) fn read(path: &Path) -> Result<Header, CheckpointError> {
    let unreadable = |source| CheckpointError::Read { file: path.to_owned(), source };
    let bad = |reason: String| CheckpointError::Torch { file: path.to_owned(), reason };
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(bad("it is not a regular file".into()));
    }
    let file = File::open(path).map_err(unreadable)?;
    let archive = Archive { file, len: metadata.len() };
    archive.header().map_err(|error| match error {
        Refused::Io(source) => unreadable(source),
        Refused::Bad(reason) => bad(reason),
    })
}

/// Why an archive is refused.
enum Refused {
    Io(std::io::Error),
    Bad(String),
}

impl From<String> for Refused {
    fn from(reason: String) -> Self {
        Refused::Bad(reason)
    }
}

impl From<&str> for Refused {
    fn from(reason: &str) -> Self {
        Refused::Bad(reason.to_owned())
    }
}

struct Archive {
    file: File,
    len: u64,
}

/// An entry as the directory describes it.
#[derive(Clone, Copy)]
struct Entry {
    /// Where its own header is.
    at: u64,
    len: u64,
    is_stored: bool,
}

fn u16_at(bytes: &[u8], at: usize) -> u64 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]]).into()
}

fn u32_at(bytes: &[u8], at: usize) -> u64 {
    u16_at(bytes, at) | u16_at(bytes, at + 2) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u32_at(bytes, at) | u32_at(bytes, at + 4) << 32
}

impl Archive {
    /// Bytes of the file, which must be there.
    fn bytes(&self, at: u64, len: u64, what: &str) -> Result<Vec<u8>, Refused> {
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            let words = format!(
                "{what} is said to be at bytes {at} to {at} + {len}, and the file has {}: it is \
                 truncated or damaged",
                self.len
            );
            return Err(words.into());
        }
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, at).map_err(Refused::Io)?;
        Ok(bytes)
    }

    fn header(&self) -> Result<Header, Refused> {
        let entries = self.entries()?;
        let pickle = entries.iter().find(|(name, _)| name.ends_with("/data.pkl"));
        let (name, entry) = pickle.ok_or("there is no data.pkl in it")?;
        let root = name.trim_end_matches("data.pkl");
        if let Some(order) = entries.get(&format!("{root}byteorder"))
            && order.len <= 16
            && self.content(*order, "byteorder")? != b"little"
        {
            return Err("its numbers are not little-endian".into());
        }
        if entry.len > PICKLE_LEN_MAX {
            let words =
                format!("its data.pkl has {} bytes; at most {PICKLE_LEN_MAX} are read", entry.len);
            return Err(words.into());
        }
        let bytes = self.content(*entry, "data.pkl")?;
        let mut tensors = Vec::new();
        // Tensors of one storage are one entry.
        let mut places: HashMap<String, (u64, u64)> = HashMap::new();
        for (name, tensor) in state_dict(&bytes)? {
            let entry = format!("{root}data/{}", tensor.key);
            let place = match places.get(&entry) {
                Some(place) => *place,
                None => {
                    let found = entries.get(&entry).ok_or_else(|| {
                        format!("tensor `{name}` is in `{entry}`, which is not in the archive")
                    })?;
                    let place = (self.content_at(*found, &entry)?, found.len);
                    places.insert(entry, place);
                    place
                }
            };
            tensors.push(located(name, &tensor, place)?);
        }
        Ok(Header { bytes, file_len: self.len, tensors })
    }

    /// The entries by name.
    fn entries(&self) -> Result<HashMap<String, Entry>, Refused> {
        let tail_len = self.len.min(END_LEN_MAX);
        let tail = self.bytes(self.len - tail_len, tail_len, "the end")?;
        let end = tail.windows(4).rposition(|bytes| bytes == b"PK\x05\x06");
        let end = end.filter(|end| tail.len() - end >= 22).ok_or(
            "it is no zip archive: files of torch before 1.6 are not read (load it with torch and \
             save it again), and what was cut off has lost its directory",
        )?;
        let record = &tail[end..];
        let (mut len, mut at) = (u32_at(record, 12), u32_at(record, 16));
        if at == u64::from(u32::MAX) || u16_at(record, 10) == u64::from(u16::MAX) {
            let locator = end.checked_sub(20).map(|at| &tail[at..end]);
            let locator = locator.filter(|locator| locator.starts_with(b"PK\x06\x07"));
            let record = u64_at(locator.ok_or("its directory of 64 bits is missing")?, 8);
            let record = self.bytes(record, 56, "its end record of 64 bits")?;
            (len, at) = (u64_at(&record, 40), u64_at(&record, 48));
        }
        if len > PICKLE_LEN_MAX {
            return Err(format!(
                "its directory has {len} bytes; at most {PICKLE_LEN_MAX} are read"
            )
            .into());
        }
        let directory = self.bytes(at, len, "its directory")?;
        let mut entries = HashMap::new();
        let mut rest = directory.as_slice();
        while rest.len() >= 46 {
            if !rest.starts_with(b"PK\x01\x02") {
                return Err("its directory is damaged".into());
            }
            let name_len = u16_at(rest, 28) as usize;
            let (extra_len, comment_len) = (u16_at(rest, 30) as usize, u16_at(rest, 32) as usize);
            let whole = 46 + name_len + extra_len + comment_len;
            if rest.len() < whole {
                return Err("its directory ends in the middle of an entry".into());
            }
            let name = String::from_utf8_lossy(&rest[46..46 + name_len]).into_owned();
            let entry = Entry::of(rest, &rest[46 + name_len..][..extra_len])?;
            if entries.insert(name.clone(), entry).is_some() {
                return Err(format!("its directory names `{name}` twice").into());
            }
            rest = &rest[whole..];
        }
        Ok(entries)
    }

    /// Where the bytes of an entry begin.
    fn content_at(&self, entry: Entry, name: &str) -> Result<u64, Refused> {
        if !entry.is_stored {
            return Err(format!("`{name}` is compressed; torch.save stores its entries").into());
        }
        let local = self.bytes(entry.at, 30, name)?;
        if !local.starts_with(b"PK\x03\x04") {
            return Err(format!("`{name}` is not where the directory says").into());
        }
        let at = entry.at + 30 + u16_at(&local, 26) + u16_at(&local, 28);
        if at.checked_add(entry.len).is_none_or(|end| end > self.len) {
            let words = format!(
                "`{name}` ends beyond the file's {} bytes: it is truncated; copy or download it \
                 again",
                self.len
            );
            return Err(words.into());
        }
        Ok(at)
    }

    fn content(&self, entry: Entry, name: &str) -> Result<Vec<u8>, Refused> {
        let at = self.content_at(entry, name)?;
        self.bytes(at, entry.len, name)
    }
}

impl Entry {
    fn of(record: &[u8], extra: &[u8]) -> Result<Self, Refused> {
        const BEYOND: u64 = u32::MAX as u64;
        let is_stored = u16_at(record, 10) == 0;
        let packed = u32_at(record, 20);
        let (mut len, mut at) = (u32_at(record, 24), u32_at(record, 42));
        let mut extra = extra;
        while extra.len() >= 4 {
            let (kind, field_len) = (u16_at(extra, 0), u16_at(extra, 2) as usize);
            let field =
                extra.get(4..4 + field_len).ok_or("an entry of its directory is damaged")?;
            extra = &extra[4 + field_len..];
            if kind != 1 {
                continue;
            }
            // What does not fit 32 bits, in this order: length, packed length, place.
            let mut numbers = field.chunks_exact(8).map(|bytes| u64_at(bytes, 0));
            for (small, wide) in [(len, 0), (packed, 1), (at, 2)] {
                if small == BEYOND {
                    let number = numbers.next().ok_or("an entry of its directory is damaged")?;
                    match wide {
                        0 => len = number,
                        2 => at = number,
                        _ => {}
                    }
                }
            }
        }
        Ok(Self { at, len, is_stored })
    }
}

/// Where a tensor's bytes are, given where those of its storage are.
fn located(
    name: String,
    tensor: &PickledTensor,
    (at, storage_len): (u64, u64),
) -> Result<HeaderTensor, Refused> {
    let (dtype, size) = match tensor.storage {
        "FloatStorage" => ("F32", 4),
        "HalfStorage" => ("F16", 2),
        "BFloat16Storage" => ("BF16", 2),
        "DoubleStorage" => ("F64", 8),
        "LongStorage" => ("I64", 8),
        "IntStorage" => ("I32", 4),
        "ShortStorage" => ("I16", 2),
        "CharStorage" => ("I8", 1),
        _ => ("U8", 1),
    };
    let mut neighbours = 1_u64;
    for (size, stride) in tensor.shape.iter().zip(&tensor.strides).rev() {
        if *size != 1 && *stride != neighbours {
            let words = format!(
                "tensor `{name}` has strides {:?} for shape {:?}: its rows do not lie one after \
                 another; save it with .contiguous()",
                tensor.strides, tensor.shape
            );
            return Err(words.into());
        }
        neighbours = neighbours.saturating_mul(*size);
    }
    let first = tensor.first.checked_mul(size);
    let len = neighbours.checked_mul(size);
    match (first, len) {
        (Some(first), Some(len))
            if tensor.strides.len() == tensor.shape.len()
                && first.checked_add(len).is_some_and(|end| end <= storage_len) =>
        {
            let (dtype, shape) = (dtype.to_owned(), tensor.shape.clone());
            Ok(HeaderTensor { name, dtype, shape, offset: at + first, len })
        }
        _ => Err(format!(
            "tensor `{name}` of shape {:?} from element {} on is more than its storage of \
             {storage_len} bytes holds",
            tensor.shape, tensor.first
        )
        .into()),
    }
}

#[cfg(test)]
#[path = "torch_test.rs"]
mod tests;
