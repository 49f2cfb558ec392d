//! A folder in the Hugging Face layout: which file holds which bytes of which tensor.
//!
//! Only headers are read here: a coordinator that opens a checkpoint of a terabyte reads a few
//! megabytes of it. Every tensor that any stage will need is checked, so a model that is incomplete
//! is refused before anything is placed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use crate::model::safetensors::{HEADER_LEN_MAX, Header, HeaderTensor};
use crate::model::spec::{ModelSpec, SpecError};
use crate::plan::Precision;
use crate::units::LayerRange;

/// The largest `config.json`; published ones have a few KiB.
const CONFIG_LEN_MAX: u64 = 1 << 20;
/// The largest number of weight files; the largest published models have a few hundred.
const FILES_MAX: usize = 4096;
const CONFIG: &str = "config.json";
pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
const TOKENIZER: &str = "tokenizer.json";

/// A model folder whose headers have been read and checked; no tensor data is read.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    spec: ModelSpec,
    tensors: HashMap<String, TensorLocation>,
    fingerprint: [u8; 32],
}

/// Where the data of one tensor is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorLocation {
    /// The file.
    pub file: Arc<Path>,
    /// The first byte of the data, from the file's beginning.
    pub offset: u64,
    /// Bytes of data.
    pub len: u64,
    /// The type of its elements.
    pub dtype: Precision,
    /// Its shape, rows first.
    pub shape: Vec<u64>,
}

/// Why a folder is refused; names file and tensor.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file is missing or cannot be read.
    #[error("{}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file that is read whole is larger than any real one.
    #[error("{}: it has {found} bytes; at most {max} are read", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The bound in bytes.
        max: u64,
    },
    /// The model's shape is refused.
    #[error("{}: {source}", folder.display())]
    Spec {
        /// The folder.
        folder: PathBuf,
        /// What is wrong in `config.json`.
        source: SpecError,
    },
    /// There are no weights that can be read.
    #[error(
        "{}: no weights: expected model.safetensors, or model.safetensors.index.json and the files \
         that it lists; {advice}", folder.display()
    )]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// What to do, by what else is there.
        advice: &'static str,
    },
    /// `model.safetensors.index.json` is damaged.
    #[error("{}: {reason}", file.display())]
    Index {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A weights file is damaged.
    #[error("{}: this is no intact safetensors file: {reason}", file.display())]
    Header {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A weights file ends too early.
    #[error(
        "{}: truncated: it has {found} bytes, but tensor `{tensor}` ends at byte {expected}; copy \
         or download the file again", file.display()
    )]
    Truncated {
        /// The file.
        file: PathBuf,
        /// The first tensor that is not all there.
        tensor: String,
        /// The file's length in bytes.
        found: u64,
        /// Where that tensor ends.
        expected: u64,
    },
    /// A tensor that `config.json` implies is not there.
    #[error("{}: tensor `{tensor}` is missing; expected it with shape {expected:?}", file.display())]
    MissingTensor {
        /// The file where it should be: the index, if that does not list it.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape by `config.json`.
        expected: Vec<u64>,
    },
    /// A tensor has another shape than `config.json` implies.
    #[error(
        "{}: tensor `{tensor}` has shape {found:?}; by config.json it should be {expected:?}",
        file.display()
    )]
    WrongShape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape in the file.
        found: Vec<u64>,
        /// Its shape by `config.json`.
        expected: Vec<u64>,
    },
    /// A tensor is of a type that is not read.
    #[error(
        "{}: tensor `{tensor}` is stored as {found}, which is not supported; supported: F32, BF16, \
         F16", file.display()
    )]
    UnsupportedType {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type in the file.
        found: String,
    },
}

impl Checkpoint {
    /// Reads `config.json`, the index if there is one, and the header of every weights file; checks
    /// that each tensor of the model is there, whole, and of the right shape and a readable type.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let config_file = folder.join(CONFIG);
        let config = read_bounded(&config_file, CONFIG_LEN_MAX)?;
        let spec_error = |source| CheckpointError::Spec { folder: folder.to_owned(), source };
        let text = std::str::from_utf8(&config)
            .map_err(|error| spec_error(SpecError::NotJson { reason: error.to_string() }))?;
        let mut spec = ModelSpec::from_config_json(text).map_err(spec_error)?;

        let mut hasher = blake3::Hasher::new();
        hash_part(&mut hasher, &config);
        let weights = Weights::find(folder)?;
        let mut files = BTreeMap::new();
        for name in weights.file_names() {
            let path: Arc<Path> = folder.join(name).into();
            let header = Header::read(&path)?;
            hash_part(&mut hasher, name.as_bytes());
            hasher.update(&header.file_len.to_le_bytes());
            hash_part(&mut hasher, &header.bytes);
            let tensors: HashMap<String, HeaderTensor> =
                header.tensors.into_iter().map(|t| (t.name.clone(), t)).collect();
            files.insert(name.to_owned(), (path, tensors));
        }

        let mut tensors: HashMap<String, TensorLocation> = HashMap::new();
        let mut matrices = BTreeSet::new();
        for wanted in spec.tensors(LayerRange::new(0, spec.layers)) {
            if let Some(known) = tensors.get(&wanted.name) {
                // Another part of a tensor that was found already.
                if wanted.is_matrix {
                    matrices.insert(known.dtype);
                }
                continue;
            }
            let missing = |file: PathBuf| CheckpointError::MissingTensor {
                file,
                tensor: wanted.name.clone(),
                expected: wanted.stored_shape().to_vec(),
            };
            let file = weights.file_of(&wanted.name).ok_or_else(|| missing(folder.join(INDEX)))?;
            let (path, found) = files
                .get_mut(file)
                .and_then(|(path, tensors)| Some((path.clone(), tensors.remove(&wanted.name)?)))
                .ok_or_else(|| missing(folder.join(file)))?;
            let location = TensorLocation::check(path, found, wanted.stored_shape())?;
            if wanted.is_matrix {
                matrices.insert(location.dtype);
            }
            tensors.insert(wanted.name, location);
        }
        spec.stored = widest(&matrices);
        let fingerprint = *hasher.finalize().as_bytes();
        Ok(Self { folder: folder.to_owned(), spec, tensors, fingerprint })
    }

    /// The folder that was opened.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The model's shape; `stored` says what the matrices in the files are.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// BLAKE3 over `config.json` and over the name, length and header of each weights file: equal
    /// where two nodes see the same model under the same path, found without reading its data.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// Where a tensor of [`ModelSpec::tensors`] is; `None` for any other name.
    pub fn locate(&self, tensor: &str) -> Option<&TensorLocation> {
        self.tensors.get(tensor)
    }

    /// Checks that there is a tokenizer to read. Workers do without one.
    pub fn check_tokenizer(&self) -> Result<PathBuf, CheckpointError> {
        let file = self.folder.join(TOKENIZER);
        let error = match std::fs::metadata(&file) {
            Ok(metadata) if metadata.is_file() && metadata.len() > 0 => return Ok(file),
            Ok(_) => io::Error::other("it is empty or not a file; expected the model's tokenizer"),
            Err(error) => error,
        };
        Err(CheckpointError::Read { file, source: error })
    }
}

impl TensorLocation {
    fn check(
        file: Arc<Path>,
        found: HeaderTensor,
        expected: &[u64],
    ) -> Result<Self, CheckpointError> {
        let dtype = match found.dtype.as_str() {
            "F32" => Precision::F32,
            "BF16" => Precision::Bf16,
            "F16" => Precision::F16,
            _ => {
                return Err(CheckpointError::UnsupportedType {
                    file: file.to_path_buf(),
                    tensor: found.name,
                    found: found.dtype,
                });
            }
        };
        if found.shape != expected {
            return Err(CheckpointError::WrongShape {
                file: file.to_path_buf(),
                tensor: found.name,
                found: found.shape,
                expected: expected.to_vec(),
            });
        }
        Ok(Self { file, offset: found.offset, len: found.len, dtype, shape: found.shape })
    }
}

/// Which file holds which tensor.
enum Weights {
    /// `model.safetensors` holds all.
    Single,
    /// The index says it: tensor to file.
    Many(HashMap<String, String>),
}

impl Weights {
    fn find(folder: &Path) -> Result<Self, CheckpointError> {
        if folder.join(SINGLE).exists() {
            return Ok(Weights::Single);
        }
        let file = folder.join(INDEX);
        if !file.exists() {
            let has_torch = ["pytorch_model.bin", "pytorch_model.bin.index.json"]
                .iter()
                .any(|name| folder.join(name).exists());
            let advice = if has_torch {
                "the folder has PyTorch files: convert them with save_pretrained of transformers"
            } else {
                "check the path, or whether the download is complete"
            };
            return Err(CheckpointError::NoWeights { folder: folder.to_owned(), advice });
        }
        #[derive(Deserialize)]
        struct Index {
            weight_map: HashMap<String, String>,
        }
        let bad = |reason: String| CheckpointError::Index { file: file.clone(), reason };
        let bytes = read_bounded(&file, HEADER_LEN_MAX)?;
        let index: Index = serde_json::from_slice(&bytes)
            .map_err(|error| bad(format!("no index of weights: {error}")))?;
        // An index names files beside it, and nothing else that this process may read.
        let plain = |name: &str| {
            name.ends_with(".safetensors") && !name.contains(['/', '\\', '\0']) && name.len() < 256
        };
        if let Some((tensor, name)) = index.weight_map.iter().find(|(_, name)| !plain(name)) {
            return Err(bad(format!(
                "tensor `{tensor}` is said to be in `{name}`; expected the name of a .safetensors \
                 file in this folder"
            )));
        }
        let weights = Weights::Many(index.weight_map);
        let files = weights.file_names().len();
        if files == 0 || files > FILES_MAX {
            return Err(bad(format!("it lists {files} files; expected 1 to {FILES_MAX}")));
        }
        Ok(weights)
    }

    fn file_names(&self) -> BTreeSet<&str> {
        match self {
            Weights::Single => BTreeSet::from([SINGLE]),
            Weights::Many(map) => map.values().map(String::as_str).collect(),
        }
    }

    fn file_of(&self, tensor: &str) -> Option<&str> {
        match self {
            Weights::Single => Some(SINGLE),
            Weights::Many(map) => map.get(tensor).map(String::as_str),
        }
    }
}

/// The narrowest type that holds all of these without loss.
fn widest(types: &BTreeSet<Precision>) -> Precision {
    match (types.len(), types.first()) {
        (1, Some(only)) => *only,
        // bf16 and f16 together fit only f32.
        _ => Precision::F32,
    }
}

fn read_bounded(file: &Path, max: u64) -> Result<Vec<u8>, CheckpointError> {
    let unreadable = |source| CheckpointError::Read { file: file.to_owned(), source };
    let metadata = std::fs::metadata(file).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(unreadable(io::Error::other("it is not a regular file")));
    }
    let mut bytes = Vec::new();
    let handle = File::open(file).map_err(unreadable)?;
    handle.take(max + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > max {
        let found = metadata.len();
        return Err(CheckpointError::TooLarge { file: file.to_owned(), found, max });
    }
    Ok(bytes)
}

/// Length first, so that no two lists of parts hash alike.
fn hash_part(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

#[cfg(test)]
#[path = "checkpoint_test.rs"]
mod tests;
