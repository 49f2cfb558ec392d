//! ● Reads a model where it is: what the coordinator must know before it places one.

use std::path::{Path, PathBuf};

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::model::{BuiltinModel, Checkpoint};
use shoal_protocol::plan::{ModelRef, ModelSource};

use super::shape::ModelShape;

/// Where models come from.
#[derive(Clone, Debug)]
pub struct Models {
    data: PathBuf,
    builtin: Vec<BuiltinModel>,
}

impl Models {
    /// Built-in models are unpacked under `data`.
    pub fn new(data: PathBuf, builtin: Vec<BuiltinModel>) -> Self {
        Self { data, builtin }
    }

    /// The model's folder on this node, unpacked if need be; `None` for a pretend model.
    pub fn folder(&self, source: &ModelSource) -> Result<Option<PathBuf>, WireError> {
        match source {
            ModelSource::Folder { path } if Path::new(path).is_absolute() => {
                Ok(Some(PathBuf::from(path)))
            }
            ModelSource::Folder { path } => Err(WireError::new(
                ErrorCode::InvalidRequest,
                format!(
                    "`{path}` is not an absolute path; each node has its own working folder, so \
                     name the model's folder from the root"
                ),
            )),
            ModelSource::Builtin { name } => self.unpack(name).map(Some),
            ModelSource::Pretend(_) => Ok(None),
        }
    }

    /// Reads and checks a model: its shape, and a fingerprint that workers must find too. Blocks on
    /// the disk.
    pub fn open(&self, source: &ModelSource) -> Result<(ModelRef, ModelShape), WireError> {
        let bad =
            |error: &dyn std::fmt::Display| WireError::new(ErrorCode::BadModel, error.to_string());
        let (fingerprint, shape) = match (source, self.folder(source)?) {
            (ModelSource::Pretend(spec), _) => {
                spec.check().map_err(|error| bad(&error))?;
                (spec.fingerprint(), ModelShape::Pretend(spec.clone()))
            }
            (_, Some(folder)) => {
                let checkpoint = Checkpoint::open(&folder).map_err(|error| bad(&error))?;
                checkpoint.check_tokenizer().map_err(|error| bad(&error))?;
                (checkpoint.fingerprint(), ModelShape::Checkpoint(checkpoint.spec().clone()))
            }
            (source, None) => return Err(bad(&format!("{source} has no folder"))),
        };
        Ok((ModelRef { source: source.clone(), fingerprint }, shape))
    }

    fn unpack(&self, name: &str) -> Result<PathBuf, WireError> {
        let model = self.builtin.iter().find(|model| model.name == name).ok_or_else(|| {
            let names: Vec<_> = self.builtin.iter().map(|model| model.name).collect();
            WireError::new(
                ErrorCode::NotFound,
                format!("there is no built-in model `{name}`; there is: {}", names.join(", ")),
            )
        })?;
        model.unpack(&self.data).map_err(|error| {
            WireError::new(
                ErrorCode::StorageFailed,
                format!("cannot unpack `{name}` under {}: {error}", self.data.display()),
            )
        })
    }
}
