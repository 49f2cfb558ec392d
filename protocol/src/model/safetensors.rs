//! The header of a safetensors file, read and checked against the file's length.
//!
//! ```text
//! u64 N, little-endian │ N bytes of JSON: {"name": {"dtype", "shape", "data_offsets": [a, b]}, …} │ data
//! ```
//!
//! The ranges must fill the data without holes or overlaps; so one range that is right on its own
//! cannot point into another tensor.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::model::checkpoint::CheckpointError;

/// The longest header, as in the format's reference implementation.
pub(crate) const HEADER_LEN_MAX: u64 = 100_000_000;

/// One file's header.
pub(super) struct Header {
    /// The length word and the JSON.
    pub(super) bytes: Vec<u8>,
    /// The length of the whole file.
    pub(super) file_len: u64,
    /// Its tensors in the order of their data.
    pub(super) tensors: Vec<HeaderTensor>,
}

/// One tensor as the header describes it.
#[derive(Clone)]
pub(super) struct HeaderTensor {
    pub(super) name: String,
    pub(super) dtype: String,
    pub(super) shape: Vec<u64>,
    /// From the file's beginning.
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Header {
    /// Reads the header of the file, which must have exactly the length that the header says.
    pub(super) fn read(path: &Path) -> Result<Self, CheckpointError> {
        let unreadable = |source| CheckpointError::Read { file: path.to_owned(), source };
        let bad = |reason: String| CheckpointError::Header { file: path.to_owned(), reason };
        let metadata = std::fs::metadata(path).map_err(unreadable)?;
        if !metadata.is_file() {
            return Err(bad("it is not a regular file".into()));
        }
        let file_len = metadata.len();
        if file_len < 8 {
            return Err(bad(format!(
                "it has {file_len} bytes; the length of the header alone takes 8"
            )));
        }
        let mut file = File::open(path).map_err(unreadable)?;
        let mut word = [0; 8];
        file.read_exact(&mut word).map_err(unreadable)?;
        let json_len = u64::from_le_bytes(word);
        if json_len > HEADER_LEN_MAX {
            return Err(bad(format!(
                "its first 8 bytes announce a header of {json_len} bytes; at most \
                 {HEADER_LEN_MAX} are allowed"
            )));
        }
        if json_len > file_len - 8 {
            return Err(bad(format!(
                "it is truncated inside its header: it has {file_len} bytes, the header ends at \
                 {}",
                8 + json_len
            )));
        }
        // Bounded above by the file's length and by HEADER_LEN_MAX.
        let mut bytes = vec![0; 8 + json_len as usize];
        bytes[..8].copy_from_slice(&word);
        file.read_exact(&mut bytes[8..]).map_err(unreadable)?;
        let tensors = parse(&bytes[8..]).map_err(bad)?;
        let tensors = check_ranges(path, tensors, 8 + json_len, file_len)?;
        Ok(Self { bytes, file_len, tensors })
    }
}

fn parse(json: &[u8]) -> Result<Vec<RawTensor>, String> {
    if json.first() != Some(&b'{') {
        return Err("its header does not begin with `{`".into());
    }
    let RawHeader(tensors) = serde_json::from_slice(json)
        .map_err(|error| format!("its header is no JSON of the format: {error}"))?;
    let mut names = HashSet::with_capacity(tensors.len());
    match tensors.iter().find(|tensor| !names.insert(tensor.name.as_str())) {
        Some(twice) => Err(format!("its header names tensor `{}` twice", twice.name)),
        None => Ok(tensors),
    }
}

/// Sorts the tensors by offset; each must begin where the one before ends, have the length of its
/// shape and type, and the last must end where the file ends.
fn check_ranges(
    path: &Path,
    mut tensors: Vec<RawTensor>,
    data_start: u64,
    file_len: u64,
) -> Result<Vec<HeaderTensor>, CheckpointError> {
    let bad = |name: &str, reason: String| CheckpointError::Header {
        file: path.to_owned(),
        reason: format!("tensor `{name}` {reason}"),
    };
    tensors.sort_by_key(|tensor| tensor.info.data_offsets);
    let mut end = 0;
    let mut checked = Vec::with_capacity(tensors.len());
    for RawTensor { name, info } in tensors {
        let (first, last) = info.data_offsets;
        if first != end || last < first {
            return Err(bad(
                &name,
                format!(
                    "has the bytes {first}..{last} of the data; expected a range from {end} on, \
                     where the tensor before it ends"
                ),
            ));
        }
        let elements = info.shape.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim));
        if let Some(size) = element_size(&info.dtype) {
            let expected = elements.and_then(|n| n.checked_mul(size));
            if expected != Some(last - first) {
                return Err(bad(
                    &name,
                    format!(
                        "has {} bytes of data, which is not what {} of shape {:?} takes",
                        last - first,
                        info.dtype,
                        info.shape
                    ),
                ));
            }
        }
        end = last;
        let Some(file_end) = data_start.checked_add(last) else {
            return Err(bad(&name, format!("ends at byte {last} of the data: no file is so long")));
        };
        if file_end > file_len {
            return Err(CheckpointError::Truncated {
                file: path.to_owned(),
                tensor: name,
                found: file_len,
                expected: file_end,
            });
        }
        checked.push(HeaderTensor {
            name,
            dtype: info.dtype,
            shape: info.shape,
            offset: data_start + first,
            len: last - first,
        });
    }
    if data_start + end != file_len {
        return Err(CheckpointError::Header {
            file: path.to_owned(),
            reason: format!(
                "it has {file_len} bytes, but its last tensor ends at {}",
                data_start + end
            ),
        });
    }
    Ok(checked)
}

/// Bytes of one element; `None` for types whose elements are no whole bytes or that are unknown.
fn element_size(dtype: &str) -> Option<u64> {
    match dtype {
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" => Some(1),
        "U16" | "I16" | "F16" | "BF16" => Some(2),
        "U32" | "I32" | "F32" => Some(4),
        "U64" | "I64" | "F64" => Some(8),
        _ => None,
    }
}

/// The header's JSON, with repeated names still in it.
struct RawHeader(Vec<RawTensor>);

struct RawTensor {
    name: String,
    info: RawInfo,
}

#[derive(Deserialize)]
struct RawInfo {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        tensors.push(RawTensor { name, info: map.next_value()? });
                    }
                }
                Ok(RawHeader(tensors))
            }
        }

        deserializer.deserialize_map(Members)
    }
}
