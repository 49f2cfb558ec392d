//! A LoRA adapter in the PEFT layout: low-rank matrices beside the projections of a base model.
//!
//! ```text
//! adapter_config.json         rank, alpha, what is adapted ([`AdapterConfig`])
//! adapter_model.safetensors   base_model.model.<module>.lora_A.weight  [rank, inputs]
//!   (or .bin)                 base_model.model.<module>.lora_B.weight  [outputs, rank]
//! y += scaling * B (A x)
//! ```
//!
//! Which projections are adapted, the names of the matrices say; each is compared with the base model's
//! tensor before anything is loaded. What is not here: the values, which workers read.

mod config;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use config::{AdapterConfig, RANK_MAX};

use crate::model::checkpoint::{CheckpointError, TensorLocation, hash_part, read_bounded};
use crate::model::safetensors::{Header, HeaderTensor};
use crate::model::spec::ModelSpec;
use crate::model::split::Part;
use crate::model::stored::StoredType;
use crate::model::tensors::{TensorRole, TensorSpec};
use crate::model::torch;
use crate::units::{Bytes, LayerRange};

const CONFIG: &str = "adapter_config.json";
/// The largest one that is read; real ones have a KiB or two.
const CONFIG_LEN_MAX: u64 = 1 << 20;
const FILES: [(&str, HeaderReader); 2] =
    [("adapter_model.safetensors", Header::read), ("adapter_model.bin", torch::read)];
type HeaderReader = fn(&Path) -> Result<Header, CheckpointError>;
/// What PEFT puts before the base model's own names.
const PREFIX: &str = "base_model.model.";
const DOWN: &str = ".lora_A.weight";
const UP: &str = ".lora_B.weight";

/// Why an adapter is refused; names what is wrong and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// Its configuration is no JSON object.
    #[error("adapter_config.json is not readable: {reason}; expected one JSON object")]
    NotJson {
        /// Where and what.
        reason: String,
    },
    /// A field has a value that cannot be right.
    #[error("adapter_config.json: `{field}` is {value}; expected {expected}")]
    BadValue {
        /// The field.
        field: String,
        /// What stands there.
        value: String,
        /// What should stand there.
        expected: String,
    },
    /// It asks for something that exists but that is not served.
    #[error(
        "adapter_config.json: `{field}` is {value}, which is not supported; supported: {supported}"
    )]
    Unsupported {
        /// The field.
        field: String,
        /// What it asks for.
        value: String,
        /// What can be served.
        supported: String,
    },
    /// A file is missing, damaged or of a type that is not read.
    #[error(transparent)]
    File(#[from] CheckpointError),
    /// There are no matrices.
    #[error(
        "{}: no adapter: expected adapter_config.json with adapter_model.safetensors or \
         adapter_model.bin beside it", folder.display()
    )]
    NoWeights {
        /// The folder.
        folder: PathBuf,
    },
    /// A tensor is of a layer or of a kind that this base model does not have, or that is not adapted.
    #[error(
        "{}: tensor `{tensor}`: {reason}; is this an adapter for another base model?", file.display()
    )]
    OtherBase {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What of it does not fit.
        reason: String,
    },
    /// A tensor does not have the shape that the base model and the rank ask for.
    #[error(
        "{}: tensor `{tensor}` has shape {found:?}, but beside this base model it should be \
         {expected:?}; is this an adapter for another base model?", file.display()
    )]
    WrongShape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<u64>,
        /// What the base model and the configuration ask for.
        expected: Vec<u64>,
    },
    /// What the configuration promises is not in the file.
    #[error("{}: {what} is missing", file.display())]
    Incomplete {
        /// The file.
        file: PathBuf,
        /// What.
        what: String,
    },
}

/// The two matrices beside one projection.
#[derive(Clone, Debug, PartialEq)]
pub struct Delta {
    /// The projection.
    pub role: TensorRole,
    /// Its layer.
    pub layer: u32,
    /// Multiplies the product.
    pub scaling: f32,
    /// The rank of the two.
    pub rank: u32,
    /// The base model's tensor.
    pub base: TensorSpec,
    /// `[rank, inputs]`.
    pub down: TensorLocation,
    /// `[outputs, rank]`; of a fused projection the outputs of all parts.
    pub up: TensorLocation,
    /// The first row of `up` that is this projection's.
    pub first_row: u64,
}

/// The part of a [`Delta`] that a rank holds: `A`'s columns and `B`'s rows.
#[derive(Clone, Debug, PartialEq)]
pub struct DeltaPart<'a> {
    /// Of which.
    pub delta: &'a Delta,
    /// Columns of `down`.
    pub inputs: std::ops::Range<u64>,
    /// Rows of `up`, [`Delta::first_row`] included.
    pub outputs: std::ops::Range<u64>,
}

/// An adapter whose headers have been read and compared with its base model.
#[derive(Clone, Debug)]
pub struct Adapter {
    folder: PathBuf,
    fingerprint: [u8; 32],
    deltas: Vec<Delta>,
}

impl Adapter {
    /// Opens a folder for a base model. Reads all of it, once, for its fingerprint.
    pub fn open(folder: &Path, base: &ModelSpec) -> Result<Self, AdapterError> {
        let json = match read_bounded(&folder.join(CONFIG), CONFIG_LEN_MAX) {
            Ok(json) => json,
            Err(CheckpointError::Read { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                return Err(AdapterError::NoWeights { folder: folder.to_owned() });
            }
            Err(error) => return Err(error.into()),
        };
        let text = std::str::from_utf8(&json)
            .map_err(|error| AdapterError::NotJson { reason: error.to_string() })?;
        let config = AdapterConfig::parse(text)?;
        let found = FILES.iter().find(|(name, _)| folder.join(name).exists());
        let (name, read) =
            found.ok_or_else(|| AdapterError::NoWeights { folder: folder.to_owned() })?;
        let file: Arc<Path> = folder.join(name).into();
        let header = read(&file)?;
        let deltas = Reading { file: &file, config: &config, base }.deltas(header.tensors)?;
        let mut hasher = blake3::Hasher::new();
        hash_part(&mut hasher, &json);
        hash_file(&mut hasher, &file)
            .map_err(|source| CheckpointError::Read { file: file.to_path_buf(), source })?;
        let fingerprint = *hasher.finalize().as_bytes();
        Ok(Self { folder: folder.to_owned(), fingerprint, deltas })
    }

    /// The folder that was opened.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// BLAKE3 over its configuration and its matrices.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// All that it changes, by layer.
    pub fn deltas(&self) -> &[Delta] {
        &self.deltas
    }

    /// The largest rank.
    pub fn rank_max(&self) -> u32 {
        self.deltas.iter().map(|delta| delta.rank).max().unwrap_or(0)
    }

    /// What a rank of a stage holds of it: as its base projections are cut. Where those hold columns, `A`
    /// does and `B` is whole, so that partial results are summed with the base's; else `A` is whole and
    /// `B` has the projection's rows.
    pub fn parts<'a>(
        &'a self,
        base: &'a ModelSpec,
        part: &'a Part,
        layers: LayerRange,
    ) -> impl Iterator<Item = DeltaPart<'a>> {
        let own = self.deltas.iter().filter(move |delta| layers.iter().contains(&delta.layer));
        own.filter_map(move |delta| {
            let held = part.of(delta.base.clone(), base)?;
            let outputs = delta.first_row + held.rows.start..delta.first_row + held.rows.end;
            Some(DeltaPart { delta, inputs: held.columns, outputs })
        })
    }

    /// Bytes of the rows between the two matrices, of which a shard has one set for all of its adapters:
    /// inputs, low rank, outputs.
    pub fn scratch_bytes(
        &self,
        base: &ModelSpec,
        part: &Part,
        layers: LayerRange,
        rows: u32,
    ) -> Bytes {
        let mut widest = [0; 3];
        for part in self.parts(base, part, layers) {
            let widths = [
                part.inputs.end - part.inputs.start,
                u64::from(part.delta.rank),
                part.outputs.end - part.outputs.start,
            ];
            for (widest, width) in widest.iter_mut().zip(widths) {
                *widest = width.max(*widest);
            }
        }
        Bytes(widest.iter().sum::<u64>() * u64::from(rows) * size_of::<f32>() as u64)
    }

    /// Bytes that a rank of a stage holds of it.
    pub fn held_bytes(&self, base: &ModelSpec, part: &Part, layers: LayerRange) -> Bytes {
        self.parts(base, part, layers).map(|part| part.held_bytes()).sum()
    }
}

impl DeltaPart<'_> {
    /// Bytes in memory, padding included: each matrix as it is stored.
    pub fn held_bytes(&self) -> Bytes {
        let (inputs, outputs) =
            (self.inputs.end - self.inputs.start, self.outputs.end - self.outputs.start);
        let rank = u64::from(self.delta.rank);
        let held = |shape: Vec<u64>, stored: StoredType| {
            let precision = stored.held().unwrap_or(crate::plan::Precision::F32);
            TensorSpec { shape, ..self.delta.base.clone() }.held_bytes(precision)
        };
        let down = held(vec![rank, inputs], self.delta.down.dtype);
        Bytes(down.0 + held(vec![outputs, rank], self.delta.up.dtype).0)
    }
}

/// What one file is compared with.
struct Reading<'a> {
    file: &'a Arc<Path>,
    config: &'a AdapterConfig,
    base: &'a ModelSpec,
}

impl Reading<'_> {
    fn deltas(&self, tensors: Vec<HeaderTensor>) -> Result<Vec<Delta>, AdapterError> {
        let pairs = self.pairs(tensors)?;
        let modules = self.modules();
        let mut deltas = Vec::new();
        for (module, (down, up)) in &pairs {
            let (Some(down), Some(up)) = (down, up) else {
                let half = if down.is_none() { DOWN } else { UP };
                return Err(self.incomplete(format!("tensor `{PREFIX}{module}{half}`")));
            };
            let parts = modules.get(module.as_str());
            let parts =
                parts.ok_or_else(|| self.other_base(&down.name, self.not_adapted(module)))?;
            self.of_module(module, (down, up), parts, &mut deltas)?;
        }
        let names: Vec<&str> = pairs.keys().map(String::as_str).collect();
        if names.is_empty() {
            return Err(self.incomplete("every low-rank matrix".to_owned()));
        }
        if let Some(target) = self.config.missing_target(&names) {
            let words = format!("what adapter_config.json calls target module `{target}`");
            return Err(self.incomplete(words));
        }
        deltas.sort_by_key(|delta| (delta.layer, delta.role));
        Ok(deltas)
    }

    /// The tensors by the module that they stand beside.
    fn pairs(&self, tensors: Vec<HeaderTensor>) -> Result<Pairs, AdapterError> {
        let mut pairs = Pairs::new();
        for tensor in tensors {
            let inner = tensor.name.strip_prefix(PREFIX).unwrap_or(&tensor.name);
            let (module, is_down) = match (inner.strip_suffix(DOWN), inner.strip_suffix(UP)) {
                (Some(module), _) => (module.to_owned(), true),
                (None, Some(module)) => (module.to_owned(), false),
                (None, None) => {
                    let words = format!("expected names that end with `{DOWN}` or `{UP}`");
                    return Err(self.other_base(&tensor.name, words));
                }
            };
            let pair = pairs.entry(module).or_default();
            if is_down { pair.0 = Some(tensor) } else { pair.1 = Some(tensor) }
        }
        Ok(pairs)
    }

    /// The projections that can be adapted, by the name of their module; several where they are fused.
    fn modules(&self) -> HashMap<String, Vec<TensorSpec>> {
        let mut modules: HashMap<String, Vec<TensorSpec>> = HashMap::new();
        if self.base.options.mla.is_some() {
            return modules;
        }
        for tensor in self.base.tensors(LayerRange::new(0, self.base.layers)) {
            let turned = tensor.excerpt.as_ref().is_some_and(|excerpt| excerpt.columns.is_some());
            if is_adapted(tensor.role) && !turned {
                let module = tensor.name.trim_end_matches(".weight").to_owned();
                modules.entry(module).or_default().push(tensor);
            }
        }
        modules
    }

    fn not_adapted(&self, module: &str) -> String {
        let known = |name: &str| {
            let tensors = self.base.tensors(LayerRange::new(0, self.base.layers));
            tensors.iter().any(|tensor| tensor.name.trim_end_matches(".weight") == name)
        };
        if known(module) {
            format!(
                "`{module}` cannot have an adapter; supported: the projections of attention and of a \
                 dense MLP, not embeddings, output heads, experts or compressed caches"
            )
        } else {
            format!("the base model of {} layers has no `{module}`", self.base.layers)
        }
    }

    fn of_module(
        &self,
        module: &str,
        (down, up): (&HeaderTensor, &HeaderTensor),
        parts: &[TensorSpec],
        deltas: &mut Vec<Delta>,
    ) -> Result<(), AdapterError> {
        let Some(stored) = parts.first().map(TensorSpec::stored_shape) else { return Ok(()) };
        let rank = self.config.rank(module);
        let down = self.located(down, &[u64::from(rank), stored[1]])?;
        let up = self.located(up, &[stored[0], u64::from(rank)])?;
        for part in parts {
            deltas.push(Delta {
                role: part.role,
                layer: part.layer.unwrap_or(0),
                scaling: self.config.scaling(module),
                rank,
                first_row: part.excerpt.as_ref().map_or(0, |excerpt| excerpt.first_row),
                base: TensorSpec { excerpt: None, ..part.clone() },
                down: down.clone(),
                up: up.clone(),
            });
        }
        Ok(())
    }

    fn located(
        &self,
        tensor: &HeaderTensor,
        expected: &[u64],
    ) -> Result<TensorLocation, AdapterError> {
        match TensorLocation::check(self.file.clone(), tensor.clone(), expected) {
            Err(CheckpointError::WrongShape { file, tensor, found, expected }) => {
                Err(AdapterError::WrongShape { file, tensor, found, expected })
            }
            other => Ok(other?),
        }
    }

    fn other_base(&self, tensor: &str, reason: String) -> AdapterError {
        AdapterError::OtherBase { file: self.file.to_path_buf(), tensor: tensor.to_owned(), reason }
    }

    fn incomplete(&self, what: String) -> AdapterError {
        AdapterError::Incomplete { file: self.file.to_path_buf(), what }
    }
}

/// `A` and `B` by module.
type Pairs = BTreeMap<String, (Option<HeaderTensor>, Option<HeaderTensor>)>;

/// Whether the shared layers add an adapter to this projection.
fn is_adapted(role: TensorRole) -> bool {
    use TensorRole::*;
    matches!(role, Query | Key | Value | AttentionOutput | Gate | Up | Down)
}

fn hash_file(hasher: &mut blake3::Hasher, file: &Path) -> io::Result<()> {
    /// Long enough that the disk is the bound.
    const PIECE: usize = 1 << 20;
    let mut file = File::open(file)?;
    let mut buffer = vec![0; PIECE];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            read => hasher.update(&buffer[..read]),
        };
    }
}

#[cfg(test)]
#[path = "adapter_test.rs"]
mod tests;
