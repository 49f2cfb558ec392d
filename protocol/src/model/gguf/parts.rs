//! A model that is stored in several GGUF files, as `gguf-split` and llama.cpp's converter cut them:
//!
//! ```text
//! NAME-00001-of-00003.gguf   all metadata, tensors       split.no 0, split.count 3, split.tensors.count
//! NAME-00002-of-00003.gguf   the same three keys, other tensors
//! ```
//!
//! Whichever part is named, the whole is read: where it is, nothing is copied together.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Gguf, GgufTensor, Value};
use crate::model::checkpoint::{CONFIG, CheckpointError};

/// Twenty times the parts of the largest published model.
const PARTS_MAX: u64 = 1 << 10;

/// Digits of either number in a part's name.
const DIGITS: usize = 5;

/// The files of one model, the one with the metadata first.
#[derive(Debug)]
pub(in crate::model) struct Parts {
    files: Vec<(Arc<Path>, Gguf)>,
    /// Which file has a tensor.
    places: HashMap<String, usize>,
}

/// A file's name as that of a part.
#[derive(Debug, PartialEq, Eq)]
struct PartName<'a> {
    stem: &'a str,
    /// From 1 on.
    number: u64,
    count: u64,
}

impl<'a> PartName<'a> {
    /// `None`: the file is not named as parts are.
    fn of(path: &'a Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = number(name)?;
        let (stem, number) = number(rest.strip_suffix("-of")?)?;
        (1..=count).contains(&number).then_some(Self { stem, number, count })
    }

    /// Where another part of the same model is.
    fn sibling(&self, path: &Path, number: u64) -> PathBuf {
        let Self { stem, count, .. } = self;
        path.with_file_name(format!("{stem}-{number:0DIGITS$}-of-{count:0DIGITS$}.gguf"))
    }
}

/// What stands before a dash and a number at the end of a name, and the number.
fn number(name: &str) -> Option<(&str, u64)> {
    let (rest, digits) = name.rsplit_once('-')?;
    let is_number = digits.len() == DIGITS && digits.bytes().all(|byte| byte.is_ascii_digit());
    Some((rest, digits.parse().ok().filter(|_| is_number)?))
}

/// The file that stands for a model: of a part the first one, of any other file itself.
pub fn first_part(path: &Path) -> PathBuf {
    match PartName::of(path) {
        Some(name) => name.sibling(path, 1),
        None => path.to_owned(),
    }
}

/// All files of the model that a file stands for, in the order of their parts; of more parts than are read
/// there are none.
pub fn all_parts(path: &Path) -> Vec<PathBuf> {
    match PartName::of(path) {
        Some(name) if name.count > PARTS_MAX => Vec::new(),
        Some(name) => (1..=name.count).map(|number| name.sibling(path, number)).collect(),
        None => vec![path.to_owned()],
    }
}

/// What a model is called after the file that stands for it: its name without its number among parts.
pub fn stem(path: &Path) -> &str {
    match PartName::of(path) {
        Some(name) => name.stem,
        None => path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default(),
    }
}

/// The GGUF file that a path means: itself, or the only one of a folder without `config.json`. Of a model in
/// parts it is the first, whichever is named, whether it is there or not.
pub fn gguf_of(path: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    let is_gguf = |path: &Path| path.extension().is_some_and(|end| end == "gguf");
    if is_gguf(path) && !path.is_dir() {
        return Ok(Some(first_part(path)));
    }
    if !path.is_dir() || path.join(CONFIG).exists() {
        return Ok(None);
    }
    let unreadable = |source| CheckpointError::Read { file: path.to_owned(), source };
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(path).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        if is_gguf(&file) && file.is_file() {
            found.insert(first_part(&file));
        }
    }
    if found.len() > 1 {
        let name =
            |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let files = found.iter().map(name).collect();
        return Err(CheckpointError::ManyGguf { folder: path.to_owned(), files });
    }
    Ok(found.pop_last())
}

impl Parts {
    /// Reads and checks the headers of a file, and of all others that belong to it. `path` is the first part.
    pub(in crate::model) fn read(path: &Path) -> Result<Self, CheckpointError> {
        let name = PartName::of(path);
        let head = match (Gguf::read(path), &name) {
            (Err(error), Some(name)) => return Err(missing(error, (name.number, name.count))),
            (head, _) => head?,
        };
        let said = |header: &Gguf, key: &str| header.get(key).and_then(Value::as_u64);
        let count = said(&head, "split.count").unwrap_or(0).max(1);
        let bad = |file: &Path, reason: String| {
            Err(CheckpointError::Gguf { file: file.to_owned(), reason })
        };
        if count > PARTS_MAX {
            return bad(path, format!("it is one of {count} parts; at most {PARTS_MAX} are read"));
        }
        let total = said(&head, "split.tensors.count");
        let mut files = vec![(Arc::from(path), head)];
        if count > 1 {
            let Some(name) = name.filter(|name| name.count == count) else {
                return bad(
                    path,
                    format!(
                        "it says that it is one of {count} parts, which are called \
                         NAME-00001-of-{count:0DIGITS$}.gguf and so on: give them the names that \
                         they were made with"
                    ),
                );
            };
            for number in 2..=count {
                let file = name.sibling(path, number);
                let header = Gguf::read(&file).map_err(|error| missing(error, (number, count)))?;
                files.push((Arc::from(file), header));
            }
        }
        for (number, (file, header)) in (1..).zip(&files).filter(|_| count > 1) {
            let found = said(header, "split.no").map(|no| no + 1);
            let (of, tensors) = (said(header, "split.count"), said(header, "split.tensors.count"));
            if (found, of, tensors) != (Some(number), Some(count), total) {
                let show = |value: Option<u64>| value.map_or("?".to_owned(), |n| n.to_string());
                return bad(
                    file,
                    format!(
                        "it says that it is part {} of {} of a model of {} tensors; expected part \
                         {number} of {count} of one of {}, as the first part says: it belongs to \
                         another model; copy or download it again",
                        show(found),
                        show(of),
                        show(tensors),
                        show(total),
                    ),
                );
            }
        }
        let mut places = HashMap::new();
        for (at, (file, header)) in files.iter().enumerate() {
            for tensor in &header.tensors {
                if let Some(other) = places.insert(tensor.name.clone(), at) {
                    let other = files[other].0.display();
                    return bad(
                        file,
                        format!(
                            "tensor `{}` is also in {other}: one of them belongs to another model; \
                             copy or download both again",
                            tensor.name
                        ),
                    );
                }
            }
        }
        if let Some(total) = total.filter(|total| count > 1 && *total != places.len() as u64) {
            let words = format!(
                "its {count} parts have {} tensors; by `split.tensors.count` they have {total}: one \
                 of them belongs to another model; copy or download them again",
                places.len()
            );
            return bad(path, words);
        }
        Ok(Self { files, places })
    }

    /// The files in the order of their parts.
    pub(in crate::model) fn headers(&self) -> impl Iterator<Item = &Gguf> {
        self.files.iter().map(|(_, header)| header)
    }

    /// The first file.
    pub(super) fn path(&self) -> &Path {
        &self.files[0].0
    }

    /// A value of the metadata.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.files[0].1.get(key)
    }

    /// A tensor, and the file that has it.
    pub(super) fn tensor(&self, name: &str) -> Option<(&Arc<Path>, &GgufTensor)> {
        let (file, header) = self.files.get(*self.places.get(name)?)?;
        Some((file, header.tensor(name)?))
    }

    /// The names of all tensors.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.headers().flat_map(|header| &header.tensors).map(|tensor| tensor.name.as_str())
    }
}

/// Says of a part that is not there which one it is.
fn missing(error: CheckpointError, (number, count): (u64, u64)) -> CheckpointError {
    match error {
        CheckpointError::Read { file, source } if source.kind() == io::ErrorKind::NotFound => {
            let words = format!(
                "part {number} of {count} is missing: copy or download it into the same folder"
            );
            CheckpointError::Read { file, source: io::Error::new(source.kind(), words) }
        }
        error => error,
    }
}

#[cfg(test)]
#[path = "parts_test.rs"]
mod tests;
