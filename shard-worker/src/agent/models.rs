//! Where this worker's models come from: opening, fingerprinting, loading. All of it blocks.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::model::{BuiltinModel, Checkpoint, CheckpointError};
use shoal_protocol::plan::{Assignment, ModelSource, PretendSpec};
use shoal_protocol::units::Bytes;

use crate::backend::BackendError;
use crate::backend::cpu::{CpuOps, Isa};
use crate::model::pretend::{PretendShard, SLOWER_VARIABLE};
use crate::model::{LoadError, LoadOptions, WeightsError, load_shard};
use crate::stage::LoadedModel;

/// The models that a worker can read.
#[derive(Clone, Debug)]
pub struct Models {
    /// The worker's data folder, where built-in models are unpacked.
    pub data: PathBuf,
    /// The models inside the binary.
    pub builtin: Vec<BuiltinModel>,
    /// Threads that compute, and that read weights.
    pub threads: NonZeroUsize,
}

impl Models {
    /// What the worker reads at a source: the fingerprint that a plan pins.
    pub fn fingerprint(&self, source: &ModelSource) -> Result<[u8; 32], WireError> {
        match source {
            ModelSource::Pretend(spec) => {
                check_pretend(spec)?;
                Ok(spec.fingerprint())
            }
            ModelSource::Folder { .. } | ModelSource::Builtin { .. } => {
                // Whoever asks wants to deploy it now: what cannot be read is a refusal.
                let refused = |error: WireError| WireError::new(ErrorCode::BadModel, error.message);
                Ok(self.open(source).map_err(refused)?.fingerprint())
            }
        }
    }

    /// Loads the shard of an assignment.
    pub fn load(
        &self,
        assignment: &Assignment,
        on_progress: &(dyn Fn(Bytes, Bytes) + Sync),
        cancel: &AtomicBool,
    ) -> Result<LoadedModel, WireError> {
        let replica = &assignment.replica;
        if let ModelSource::Pretend(spec) = &replica.model.source {
            return load_pretend(spec, assignment);
        }
        let checkpoint = self.open(&replica.model.source)?;
        let vocab = checkpoint.spec().vocab;
        let isa = Isa::from_environment().map_err(|error| load_error(&error.into()))?;
        let ops =
            CpuOps::new(self.threads.get(), isa).map_err(|error| load_error(&error.into()))?;
        let options = LoadOptions { threads: self.threads, on_progress, cancel };
        let model = load_shard(ops, &checkpoint, assignment, &options);
        let model = model.map_err(|error| load_error(&error))?;
        Ok(LoadedModel { model, vocab })
    }

    fn open(&self, source: &ModelSource) -> Result<Checkpoint, WireError> {
        let bad = |why: String| WireError::new(ErrorCode::BadModel, why);
        let folder = match source {
            ModelSource::Folder { path } => {
                let folder = Path::new(path);
                if !folder.exists() {
                    // It may be mounted a little later.
                    let words = format!(
                        "there is no {path} on this worker; a model's folder (or GGUF file) must be \
                         readable under the same path on each of them"
                    );
                    return Err(WireError::new(ErrorCode::StorageFailed, words));
                }
                folder.to_owned()
            }
            ModelSource::Builtin { name } => {
                let builtin = self.builtin.iter().find(|model| model.name == name);
                let builtin = builtin.ok_or_else(|| {
                    bad(format!("this worker's binary has no built-in model `{name}`"))
                })?;
                builtin.unpack(&self.data).map_err(|error| {
                    let data = self.data.display();
                    let words = format!("cannot unpack the model `{name}` into {data}: {error}");
                    WireError::new(ErrorCode::StorageFailed, words)
                })?
            }
            ModelSource::Pretend(_) => return Err(bad("a pretend model has no files".to_owned())),
        };
        Checkpoint::open(&folder).map_err(|error| match error {
            CheckpointError::Read { .. } => {
                WireError::new(ErrorCode::StorageFailed, error.to_string())
            }
            error => bad(error.to_string()),
        })
    }
}

/// Whether it is the model's fault, which no other worker can mend, or this machine's.
fn load_error(error: &LoadError) -> WireError {
    let code = match error {
        LoadError::Assignment(_) => ErrorCode::Internal,
        LoadError::OtherModel { .. } => ErrorCode::BadModel,
        LoadError::Backend(_) => ErrorCode::ComputeFailed,
        LoadError::Weights(error) => match error {
            WeightsError::Cancelled => ErrorCode::Cancelled,
            WeightsError::Read { source, .. }
                if source.kind() != std::io::ErrorKind::UnexpectedEof =>
            {
                ErrorCode::StorageFailed
            }
            WeightsError::Memory { source: BackendError::BadShape { .. } } => ErrorCode::BadModel,
            WeightsError::Thread { .. } | WeightsError::Memory { .. } => ErrorCode::ComputeFailed,
            WeightsError::Read { .. }
            | WeightsError::Device { .. }
            | WeightsError::NotLocated { .. }
            | WeightsError::NotInTable { .. } => ErrorCode::BadModel,
        },
    };
    WireError::new(code, error.to_string())
}

fn check_pretend(spec: &PretendSpec) -> Result<(), WireError> {
    spec.check().map_err(|error| WireError::new(ErrorCode::BadModel, error.to_string()))
}

fn load_pretend(spec: &PretendSpec, assignment: &Assignment) -> Result<LoadedModel, WireError> {
    check_pretend(spec)?;
    if spec.fingerprint() != assignment.replica.model.fingerprint {
        let words = "the plan's fingerprint is of another pretend model";
        return Err(WireError::new(ErrorCode::BadModel, words));
    }
    let layers = assignment.layers();
    if layers.is_empty() || layers.end > spec.layers {
        let words = format!("layers {layers} of a pretend model of {}", spec.layers);
        return Err(WireError::new(ErrorCode::BadModel, words));
    }
    let limits = &assignment.replica.limits;
    let model = PretendShard::rank(spec, layers, assignment.split(), limits).slower(slower());
    Ok(LoadedModel { model: Box::new(model), vocab: spec.vocab })
}

/// How much slower this worker pretends to be than others.
fn slower() -> f64 {
    let said = std::env::var(SLOWER_VARIABLE).ok().and_then(|said| said.parse().ok());
    said.filter(|times| (1.0..=1000.0).contains(times)).unwrap_or(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn models(data: &Path) -> Models {
        Models { data: data.to_owned(), builtin: Vec::new(), threads: NonZeroUsize::MIN }
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let data = tempfile::tempdir().unwrap();
        let check = |source: ModelSource, expected: &str| {
            let error = models(data.path()).fingerprint(&source).unwrap_err();
            assert_eq!(error.code, ErrorCode::BadModel);
            assert!(error.message.contains(expected), "{}", error.message);
        };
        let path = data.path().join("nothing").display().to_string();
        check(ModelSource::Folder { path: path.clone() }, &path);
        check(ModelSource::Builtin { name: "demo".to_owned() }, "`demo`");
        let empty = data.path().display().to_string();
        check(ModelSource::Folder { path: empty.clone() }, &empty);
    }

    #[test]
    fn a_gguf_file_is_read_by_its_path_and_a_damaged_one_refused() {
        let data = tempfile::tempdir().unwrap();
        let file = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/fixtures/gguf/qwen3-tied-bf16.gguf");
        let bytes = std::fs::read(file).unwrap();
        let path = data.path().join("fish.gguf");
        std::fs::write(&path, &bytes).unwrap();
        let source = ModelSource::Folder { path: path.display().to_string() };
        let models = models(data.path());
        let fingerprint = models.fingerprint(&source).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let error = models.fingerprint(&source).unwrap_err();
        assert_eq!(error.code, ErrorCode::BadModel);
        assert!(error.message.contains("truncated"), "{}", error.message);
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(models.fingerprint(&source), Ok(fingerprint));
    }
}
