//! Which file of a folder holds which tensor: safetensors, or PyTorch's state dicts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use crate::model::checkpoint::{
    CheckpointError, INDEX, SINGLE, TensorLocation, hash_part, read_bounded,
};
use crate::model::safetensors::{HEADER_LEN_MAX, Header, HeaderTensor};
use crate::model::torch;

/// The largest number of weight files; the largest published models have a few hundred.
const FILES_MAX: usize = 4096;

/// A kind of file: what a single one is called, what the index of many is called, how names end.
struct Kind {
    single: &'static [&'static str],
    index: &'static str,
    endings: &'static [&'static str],
    read: fn(&Path) -> Result<Header, CheckpointError>,
}

/// In the order in which they are looked for.
const KINDS: [Kind; 2] = [
    Kind { single: &[SINGLE], index: INDEX, endings: &[".safetensors"], read: Header::read },
    Kind {
        single: &["pytorch_model.bin", "pytorch_model.pth", "model.pth"],
        index: "pytorch_model.bin.index.json",
        endings: &[".bin", ".pth"],
        read: torch::read,
    },
];

/// The headers of all weight files of a folder.
pub(super) struct WeightFiles {
    folder: PathBuf,
    /// Tensor to file, where there is an index, and what that is called.
    index: Option<(HashMap<String, String>, &'static str)>,
    files: BTreeMap<String, (Arc<Path>, HashMap<String, HeaderTensor>)>,
}

impl WeightFiles {
    /// Reads the headers of the files; what they are goes to `hasher`.
    pub(super) fn open(
        folder: &Path,
        hasher: &mut blake3::Hasher,
    ) -> Result<Self, CheckpointError> {
        let no_weights = || CheckpointError::NoWeights { folder: folder.to_owned() };
        let found = KINDS.iter().find_map(|kind| {
            if let Some(single) = kind.single.iter().find(|name| folder.join(name).exists()) {
                return Some((kind, Some(*single)));
            }
            folder.join(kind.index).exists().then_some((kind, None))
        });
        let (kind, single) = found.ok_or_else(no_weights)?;
        let index = match single {
            Some(_) => None,
            None => Some((read_index(folder, kind)?, kind.index)),
        };
        let names: BTreeSet<&str> = match (&index, single) {
            (Some((map, _)), _) => map.values().map(String::as_str).collect(),
            (None, single) => single.into_iter().collect(),
        };
        let mut files = BTreeMap::new();
        for name in names {
            let path: Arc<Path> = folder.join(name).into();
            let header = (kind.read)(&path)?;
            hash_part(hasher, name.as_bytes());
            hasher.update(&header.file_len.to_le_bytes());
            hash_part(hasher, &header.bytes);
            let tensors: HashMap<String, HeaderTensor> =
                header.tensors.into_iter().map(|t| (t.name.clone(), t)).collect();
            files.insert(name.to_owned(), (path, tensors));
        }
        Ok(Self { folder: folder.to_owned(), index, files })
    }

    /// Whether one of them has a tensor of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.files.values().any(|(_, tensors)| tensors.contains_key(name))
    }

    /// The file where a tensor should be, by the index; where it is in fact, without one.
    fn file_of(&self, tensor: &str) -> Option<&str> {
        match &self.index {
            Some((map, _)) => map.get(tensor).map(String::as_str),
            None => self.files.keys().next().map(String::as_str),
        }
    }

    /// Takes a tensor, if it is there.
    pub(super) fn take(&mut self, tensor: &str) -> Option<(Arc<Path>, HeaderTensor)> {
        let file = self.file_of(tensor)?.to_owned();
        let (path, tensors) = self.files.get_mut(&file)?;
        Some((path.clone(), tensors.remove(tensor)?))
    }

    /// The refusal of a model without this tensor.
    pub(super) fn missing(&self, tensor: &str, expected: &[u64]) -> CheckpointError {
        let index = self.index.as_ref().map_or("", |(_, name)| name);
        CheckpointError::MissingTensor {
            file: self.folder.join(self.file_of(tensor).unwrap_or(index)),
            tensor: tensor.to_owned(),
            expected: expected.to_vec(),
        }
    }

    /// Takes a tensor whose elements stand for themselves.
    pub(super) fn locate(
        &mut self,
        tensor: &str,
        expected: &[u64],
    ) -> Result<TensorLocation, CheckpointError> {
        match self.take(tensor) {
            Some((path, found)) => TensorLocation::check(path, found, expected),
            None => Err(self.missing(tensor, expected)),
        }
    }
}

/// Tensor to file.
fn read_index(folder: &Path, kind: &Kind) -> Result<HashMap<String, String>, CheckpointError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let file = folder.join(kind.index);
    let bad = |reason: String| CheckpointError::Index { file: file.clone(), reason };
    let bytes = read_bounded(&file, HEADER_LEN_MAX)?;
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|error| bad(format!("no index of weights: {error}")))?;
    // An index names files beside it, and nothing else that this process may read.
    let plain = |name: &str| {
        kind.endings.iter().any(|ending| name.ends_with(ending))
            && !name.contains(['/', '\\', '\0'])
            && name.len() < 256
    };
    if let Some((tensor, name)) = index.weight_map.iter().find(|(_, name)| !plain(name)) {
        return Err(bad(format!(
            "tensor `{tensor}` is said to be in `{name}`; expected the name of a {} file in this \
             folder",
            kind.endings[0]
        )));
    }
    let files = index.weight_map.values().collect::<BTreeSet<_>>().len();
    if files == 0 || files > FILES_MAX {
        return Err(bad(format!("it lists {files} files; expected 1 to {FILES_MAX}")));
    }
    Ok(index.weight_map)
}
