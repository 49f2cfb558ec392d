//! A folder in the Hugging Face layout, or a GGUF file: which file holds which bytes of which tensor.
//!
//! Only headers are read here: a coordinator that opens a checkpoint of a terabyte reads a few
//! megabytes of it. Every tensor that any stage will need is checked, so a model that is incomplete
//! is refused before anything is placed.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use super::checkpoint_error::CheckpointError;
use crate::model::encoder::EncoderSpec;
use crate::model::files::WeightFiles;
use crate::model::gguf;
use crate::model::options::NormKind;
use crate::model::safetensors::HeaderTensor;
use crate::model::scheme::Scheme;
use crate::model::spec::{ModelSpec, SpecError};
use crate::model::split::{Part, TensorPart};
use crate::model::stored::{RowOrder, StoredPart, StoredScales, StoredType};
use crate::model::tensors::{TensorRole, TensorSpec};
use crate::plan::Precision;
use crate::units::LayerRange;

/// The largest `config.json`; published ones have a few KiB.
const CONFIG_LEN_MAX: u64 = 1 << 20;
pub(super) const CONFIG: &str = "config.json";
pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
const TOKENIZER: &str = "tokenizer.json";

/// A model folder whose headers have been read and checked; no tensor data is read.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The folder or GGUF file that was opened.
    folder: PathBuf,
    /// The GGUF file, where it is one.
    gguf: Option<PathBuf>,
    spec: ModelSpec,
    encoder: Option<EncoderSpec>,
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
    pub dtype: StoredType,
    /// Its shape, rows first.
    pub shape: Vec<u64>,
    /// The order of its rows.
    pub order: RowOrder,
    /// What else it needs, where its bytes alone do not say its values.
    pub scales: Option<Box<StoredScales>>,
}

/// A folder without a `config.json` is none of a model; who has one that cannot be read is told why.
fn no_model(error: CheckpointError) -> CheckpointError {
    match error {
        CheckpointError::Read { file, source } if source.kind() == io::ErrorKind::NotFound => {
            CheckpointError::NoModel { file, source }
        }
        other => other,
    }
}

impl Checkpoint {
    /// Opens a folder, or a GGUF file. Reads `config.json`, the index if there is one, and the header of every weights file; checks
    /// that each tensor of the model is there, whole, and of the right shape and a readable type.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        if let Some(file) = gguf::gguf_of(folder)? {
            return Self::open_gguf(folder, file);
        }
        let config_file = folder.join(CONFIG);
        let config = read_bounded(&config_file, CONFIG_LEN_MAX).map_err(no_model)?;
        let spec_error = |source| CheckpointError::Spec { folder: folder.to_owned(), source };
        let text = std::str::from_utf8(&config)
            .map_err(|error| spec_error(SpecError::NotJson { reason: error.to_string() }))?;
        let mut encoder = EncoderSpec::from_config_json(text).map_err(spec_error)?;
        let mut spec = match &encoder {
            Some(encoder) => encoder.sizes(),
            None => ModelSpec::from_config_json(text).map_err(spec_error)?,
        };
        let scheme = Scheme::of_config(text).map_err(spec_error)?;

        let mut hasher = blake3::Hasher::new();
        hash_part(&mut hasher, &config);
        let mut files = WeightFiles::open(folder, &mut hasher)?;
        if let Some(encoder) = &mut encoder {
            hash_part(&mut hasher, &super::sentence::read(folder, encoder)?);
            encoder.prefixed = !files.has(encoder.plain_name());
            spec = encoder.sizes();
        }
        let all = LayerRange::new(0, spec.layers);
        let all = encoder.as_ref().map_or_else(|| spec.tensors(all), |e| e.tensors(all));
        let mut tensors: HashMap<String, TensorLocation> = HashMap::new();
        let mut matrices = BTreeSet::new();
        for wanted in all {
            if let Some(known) = tensors.get(&wanted.name) {
                // Another part of a tensor that was found already.
                known.check_excerpt(&wanted)?;
                if wanted.is_matrix {
                    matrices.insert(known.dtype);
                }
                continue;
            }
            let location = match &scheme {
                Some(scheme) if wanted.is_matrix => scheme.locate(&mut files, &wanted)?,
                _ => files.locate(&wanted.name, wanted.stored_shape())?,
            };
            location.check_excerpt(&wanted)?;
            if wanted.is_matrix {
                matrices.insert(location.dtype);
            }
            tensors.insert(wanted.name, location);
        }
        // What is dequantised is held in the type that config.json names, unless asked.
        match scheme {
            None => spec.stored = widest(&matrices),
            // Experts alone are quantised, beside matrices of bf16 as a rule.
            Some(Scheme::Mxfp4) => {
                let packed = matrices.remove(&StoredType::Mxfp4);
                spec.stored = match widest(&matrices) {
                    Precision::Bf16 if packed => Precision::Mxfp4,
                    other => other,
                };
            }
            Some(scheme) => spec.stored = scheme.held().unwrap_or(spec.stored),
        }
        if let Some(encoder) = &mut encoder {
            encoder.stored = spec.stored;
        }
        let fingerprint = *hasher.finalize().as_bytes();
        Ok(Self { folder: folder.to_owned(), gguf: None, spec, encoder, tensors, fingerprint })
    }

    fn open_gguf(folder: &Path, file: PathBuf) -> Result<Self, CheckpointError> {
        let gguf::Found { mut spec, tensors, parts } = gguf::open(&file)?;
        spec.stored = gguf_stored(&tensors);
        let mut hasher = blake3::Hasher::new();
        hash_part(&mut hasher, b"gguf");
        for header in parts.headers() {
            hasher.update(&header.file_len.to_le_bytes());
            hasher.update(&header.header_hash);
        }
        let tensors = tensors.into_iter().map(|(tensor, location)| (tensor.name, location));
        Ok(Self {
            folder: folder.to_owned(),
            gguf: Some(file),
            spec,
            encoder: None,
            tensors: tensors.collect(),
            fingerprint: *hasher.finalize().as_bytes(),
        })
    }

    /// The GGUF file, or the first of its parts, where the model is one.
    pub fn gguf(&self) -> Option<&Path> {
        self.gguf.as_deref()
    }

    /// The folder that was opened.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The model's shape; `stored` says what the matrices in the files are. Of an encoder
    /// its layers: see [`EncoderSpec::sizes`].
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The shape of an encoder, where it is one.
    pub fn encoder(&self) -> Option<&EncoderSpec> {
        self.encoder.as_ref()
    }

    /// The tensors of a stage, whatever the model is.
    pub fn tensors(&self, layers: LayerRange) -> Vec<TensorSpec> {
        match &self.encoder {
            Some(encoder) => encoder.tensors(layers),
            None => self.spec.tensors(layers).into_iter().map(|t| self.called(t)).collect(),
        }
    }

    /// What a rank holds of them.
    pub fn part_tensors(&self, part: &Part, layers: LayerRange) -> Vec<TensorPart> {
        if let Some(encoder) = &self.encoder {
            return encoder.part_tensors(part, layers);
        }
        let parts = part.tensors(&self.spec, layers).into_iter();
        parts.map(|part| TensorPart { spec: self.called(part.spec), ..part }).collect()
    }

    /// A tensor as [`Checkpoint::locate`] knows it.
    fn called(&self, tensor: TensorSpec) -> TensorSpec {
        if self.gguf.is_some() { gguf::renamed(tensor) } else { tensor }
    }

    /// Whether norms are stored without the one of [`NormKind::RmsOnePlus`]: GGUF files have it in them.
    pub fn lacks_one(&self) -> bool {
        self.gguf.is_none() && self.spec.options.norm == NormKind::RmsOnePlus
    }

    /// BLAKE3 over `config.json` and over the name, length and header of each weights file: equal
    /// where two nodes see the same model under the same path, found without reading its data.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// Where a tensor of [`Checkpoint::tensors`] is; `None` for any other name.
    pub fn locate(&self, tensor: &str) -> Option<&TensorLocation> {
        self.tensors.get(tensor)
    }

    /// Checks that there is a tokenizer to read; a GGUF file has its own. Workers do without one.
    pub fn check_tokenizer(&self) -> Result<PathBuf, CheckpointError> {
        if let Some(file) = &self.gguf {
            return Ok(file.clone());
        }
        let file = self.folder.join(TOKENIZER);
        let error = match std::fs::metadata(&file) {
            Ok(metadata) if metadata.is_file() && metadata.len() > 0 => return Ok(file),
            Ok(_) => io::Error::other("it is empty or not a file; expected the model's tokenizer"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => io::Error::new(
                error.kind(),
                "it is not there; expected the model's tokenizer, as the tokenizers library writes it: it belongs to \
                 the model's files on the hub",
            ),
            Err(error) => error,
        };
        Err(CheckpointError::Read { file, source: error })
    }
}

impl TensorLocation {
    pub(super) fn check(
        file: Arc<Path>,
        found: HeaderTensor,
        expected: &[u64],
    ) -> Result<Self, CheckpointError> {
        let dtype = match found.dtype.as_str() {
            "F32" => StoredType::F32,
            "BF16" => StoredType::Bf16,
            "F16" => StoredType::F16,
            _ => return Err(unsupported(&file, found)),
        };
        if found.shape != expected {
            return Err(CheckpointError::WrongShape {
                file: file.to_path_buf(),
                tensor: found.name,
                found: found.shape,
                expected: expected.to_vec(),
            });
        }
        Ok(StoredPart::of(file, found, dtype).alone())
    }

    /// Refuses a part of a tensor that is not stored value by value, but for those whose scales the
    /// loader finds: of FP8, and of the blocks of MXFP4, which lie the other way round.
    pub(super) fn check_excerpt(&self, wanted: &TensorSpec) -> Result<(), CheckpointError> {
        let is_fp8 = matches!(self.scales.as_deref(), Some(StoredScales::Blocks { .. }));
        let is_plain = is_fp8 || (self.dtype.is_plain() && self.scales.is_none());
        let is_turned = wanted.excerpt.as_ref().is_some_and(|excerpt| excerpt.columns.is_some());
        let is_mx = matches!(self.scales.as_deref(), Some(StoredScales::Exponents { .. }));
        if wanted.excerpt.is_none() || (is_plain && self.order == RowOrder::AsIs) {
            return Ok(());
        }
        if is_mx && is_turned {
            return Ok(());
        }
        Err(CheckpointError::Quantised {
            file: self.file.to_path_buf(),
            tensor: wanted.name.clone(),
            reason: format!(
                "it is stored as {}, and the model needs {:?} out of its {:?}: parts are read only of \
                 tensors stored as F32, BF16, F16 or FP8",
                self.dtype, wanted.shape, self.shape
            ),
        })
    }
}

impl StoredPart {
    pub(super) fn of(file: Arc<Path>, found: HeaderTensor, dtype: StoredType) -> Self {
        let HeaderTensor { offset, len, shape, .. } = found;
        Self { file, offset, len, dtype, shape }
    }

    /// A tensor whose bytes say its values.
    pub(super) fn alone(self) -> TensorLocation {
        let Self { file, offset, len, dtype, shape } = self;
        TensorLocation { file, offset, len, dtype, shape, order: RowOrder::AsIs, scales: None }
    }
}

/// The tensor is of a type that is not read there.
pub(super) fn unsupported(file: &Path, found: HeaderTensor) -> CheckpointError {
    CheckpointError::UnsupportedType {
        file: file.to_path_buf(),
        tensor: found.name,
        found: found.dtype,
    }
}

/// What the matrices of a GGUF file are held as. Routers, which such files always have as F32, are held as the
/// others are; experts in MXFP4 stay what they are beside anything but F32.
fn gguf_stored(tensors: &[(TensorSpec, TensorLocation)]) -> Precision {
    let is_router = |role| matches!(role, TensorRole::Router | TensorRole::SharedWeight);
    let matrices = tensors.iter().filter(|(t, _)| t.is_matrix && !is_router(t.role));
    let mut matrices: BTreeSet<_> = matrices.map(|(_, location)| location.dtype).collect();
    let packed = matrices.remove(&StoredType::Mxfp4Block);
    match widest(&matrices) {
        Precision::Bf16 | Precision::F16 | Precision::Q8_0 if packed => Precision::Mxfp4,
        other => other,
    }
}

/// The narrowest type that holds all of these without loss.
fn widest(types: &BTreeSet<StoredType>) -> Precision {
    match (types.len(), types.first().and_then(|only| only.held())) {
        (1, Some(only)) => only,
        // Of blocks of several kinds each keeps nearly all it has.
        _ if types.iter().any(|stored| stored.block().0 > 1) => Precision::Q8_0,
        // bf16 and f16 together fit only f32.
        _ => Precision::F32,
    }
}

pub(super) fn read_bounded(file: &Path, max: u64) -> Result<Vec<u8>, CheckpointError> {
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
pub(super) fn hash_part(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

#[cfg(test)]
#[path = "checkpoint_test.rs"]
mod tests;
