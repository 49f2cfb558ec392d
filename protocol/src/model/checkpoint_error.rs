//! Why a folder or a file is refused as a model.

use std::io;
use std::path::PathBuf;

use super::spec::SpecError;

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
    /// There is no `config.json`, nor a GGUF file.
    #[error(
        "{}: no model here: expected a folder in the Hugging Face layout (config.json, weights such as \
         model.safetensors, and tokenizer.json), or a .gguf file; check the path, which every worker must read under \
         the same name, or whether the download is complete ({source})", file.display()
    )]
    NoModel {
        /// What is missing.
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
         that it lists (or pytorch_model.bin and its index, or one .gguf file and no config.json); \
         check the path, or whether the download is complete", folder.display()
    )]
    NoWeights {
        /// The folder.
        folder: PathBuf,
    },
    /// Several GGUF files: which one is meant?
    #[error("{}: several GGUF files and no config.json: name one of {files:?}", folder.display())]
    ManyGguf {
        /// The folder.
        folder: PathBuf,
        /// Their names; of a model in parts that of the first.
        files: Vec<String>,
    },
    /// A GGUF file is damaged, or holds what is not read.
    #[error("{}: {reason}", file.display())]
    Gguf {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A PyTorch file is damaged, or asks for more than tensors.
    #[error("{}: this is no state dict of torch.save that is read: {reason}", file.display())]
    Torch {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The index of several files is damaged.
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
    #[error(
        "{}: tensor `{tensor}` is missing; expected it with shape {expected:?}; copy or download all of \
         the model again", file.display()
    )]
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
        "{}: tensor `{tensor}` has shape {found:?}; by config.json it should be {expected:?}; copy or \
         download all of the model again",
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
         F16, and with a quantization_config or in a GGUF file what docs/FORMATS.md lists; take the model in one \
         of these",
        file.display()
    )]
    UnsupportedType {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type in the file.
        found: String,
    },
    /// What a quantised tensor needs is missing or does not fit.
    #[error("{}: tensor `{tensor}`: {reason}", file.display())]
    Quantised {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong, with the arithmetic.
        reason: String,
    },
}
