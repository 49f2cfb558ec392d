//! ● Reads a model where it is: what the coordinator must know before it places one.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use shoal_protocol::blob::name::{self, HubName};
use shoal_protocol::blob::{BlobError, BlobSettings, Filling, ModelCache, Side, Wanted};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::model::{BuiltinModel, Checkpoint};
use shoal_protocol::plan::{ModelRef, ModelSource};

use super::shape::ModelShape;
use crate::api::tokenize::ModelText;

/// Where models come from.
#[derive(Clone, Debug)]
pub struct Models {
    data: PathBuf,
    builtin: Vec<BuiltinModel>,
    cache: ModelCache,
}

impl Models {
    /// Built-in models are unpacked under `data`, and what is needed of others is fetched there.
    pub fn new(data: PathBuf, builtin: Vec<BuiltinModel>) -> Self {
        let cache = ModelCache::new(&data, BlobSettings::from_environment());
        Self { data, builtin, cache }
    }

    /// The same source, with what may change about it pinned: a branch becomes its commit. Blocks on the
    /// network.
    pub fn pin(&self, source: ModelSource) -> Result<ModelSource, WireError> {
        match source.is_fetched() {
            false => Ok(source),
            true => self.cache.pin(&source).map_err(|error| fetch_error(&error)),
        }
    }

    /// The model's folder on this node, unpacked or fetched if need be; `None` for a pretend model.
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
            ModelSource::Hub { .. }
            | ModelSource::HubGguf { .. }
            | ModelSource::ObjectStore { .. } => {
                // Whoever deploys waits for it; each request has its own deadline.
                let prepared = self.cache.prepare(source, Side::Text, &AtomicBool::new(false));
                prepared.map(Some).map_err(|error| fetch_error(&error))
            }
        }
    }

    /// An adapter as every node finds it: what is of the hub is pinned to its commit. Blocks on the network.
    pub fn pin_adapter(&self, path: &str) -> Result<String, WireError> {
        if path.starts_with('/') {
            return Ok(path.to_owned());
        }
        let pin = || -> Result<ModelSource, BlobError> {
            let HubName { repo, revision, .. } = name::parse_adapter(path)?;
            self.cache.pin_adapter(&repo, &revision)
        };
        pin().map(|pinned| pinned.to_string()).map_err(|error| fetch_error(&error))
    }

    /// The folder on this node of an adapter that is pinned, fetched if need be. Blocks on the network.
    pub fn adapter(&self, pinned: &str) -> Result<PathBuf, WireError> {
        if pinned.starts_with('/') {
            return Ok(PathBuf::from(pinned));
        }
        let fetch = || -> Result<PathBuf, BlobError> {
            let HubName { repo, revision, .. } = name::parse_adapter(pinned)?;
            let source = ModelSource::Hub { repo: repo.to_string(), revision };
            let never = AtomicBool::new(false);
            let fill = |wanted: &[Wanted], filling: &Filling<'_>| {
                self.cache.fill(&source, wanted, filling)
            };
            self.cache.adapter(&source, &never, fill)
        };
        fetch().map_err(|error| fetch_error(&error))
    }

    /// Reads and checks a model that is pinned: its shape, and a fingerprint that workers must find too.
    /// Blocks on the disk, and on the network where it is not here yet.
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
                // Read whole and let go: a tokenizer or a chat template that does not work is refused
                // now, not at the first request.
                ModelText::load(&folder).map_err(|error| bad(&error))?;
                let shape = match checkpoint.encoder() {
                    Some(encoder) => ModelShape::Encoder(encoder.clone()),
                    None => ModelShape::Checkpoint(checkpoint.spec().clone()),
                };
                (checkpoint.fingerprint(), shape)
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

fn fetch_error(error: &BlobError) -> WireError {
    let code = match error.is_final() {
        true => ErrorCode::BadModel,
        false => ErrorCode::StorageFailed,
    };
    WireError::new(code, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_whose_text_side_does_not_work_is_refused_with_the_file() {
        let good = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/fixtures/models/llama31-rope8-bf16");
        let folder = tempfile::tempdir().expect("a folder");
        for entry in std::fs::read_dir(good).expect("the fixture is there") {
            let file = entry.expect("a readable folder");
            std::fs::copy(file.path(), folder.path().join(file.file_name())).expect("a copy");
        }
        let models = Models::new(folder.path().join("data"), Vec::new());
        let path = folder.path().to_str().expect("UTF-8").to_owned();
        let source = ModelSource::Folder { path };
        models.open(&source).expect("a good model");
        for (name, text) in [
            ("chat_template.jinja", "{% if %}"),
            ("generation_config.json", "{"),
            ("tokenizer.json", "{}"),
        ] {
            std::fs::write(folder.path().join(name), text).expect("a writable folder");
            let error = models.open(&source).expect_err("a broken model");
            assert_eq!(error.code, ErrorCode::BadModel);
            assert!(error.message.contains(name), "{error}");
        }
    }

    #[test]
    fn a_gguf_file_brings_its_own_tokenizer() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/fixtures/gguf/llama31-rope8-bf16.gguf");
        let folder = tempfile::tempdir().expect("a folder");
        let models = Models::new(folder.path().join("data"), Vec::new());
        let open = |path: &Path| {
            let path = path.to_str().expect("UTF-8").to_owned();
            models.open(&ModelSource::Folder { path })
        };
        let alone = folder.path().join("fish.gguf");
        std::fs::copy(file, &alone).expect("a copy");
        let (model, shape) = open(&alone).expect("a good model");
        assert_eq!((shape.layers(), shape.vocab()), (3, 517));
        let by_folder = open(folder.path()).expect("a folder with one such file");
        assert_eq!(by_folder.0.fingerprint, model.fingerprint);
        let text = ModelText::load(&alone).expect("its text side");
        assert_eq!(text.end_tokens, [2]);
        let ids = text.encode("Hello, fish!", true).expect("encoded");
        let other = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/fixtures/models/llama31-rope8-bf16");
        let other = ModelText::load(&other).expect("the folder that it was made of");
        assert_eq!(ids, other.encode("Hello, fish!", true).expect("encoded"));
        // One beside the file comes first, and must work.
        std::fs::write(folder.path().join("tokenizer.json"), "{}").expect("written");
        let error = open(&alone).expect_err("a broken tokenizer");
        assert!(error.message.contains("tokenizer.json"), "{error}");
    }

    #[test]
    fn a_gguf_model_in_parts_is_one_model_whichever_part_is_named() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
        let folder = tempfile::tempdir().expect("a folder");
        let models = Models::new(folder.path().join("data"), Vec::new());
        let open = |path: &Path| {
            let path = path.to_str().expect("UTF-8").to_owned();
            models.open(&ModelSource::Folder { path })
        };
        let part = |number: u32| format!("mixtral-bf16-0000{number}-of-00003.gguf");
        for number in 1..=3 {
            let from = fixtures.join("gguf").join(part(number));
            std::fs::copy(from, folder.path().join(part(number))).expect("a copy");
        }
        let tokenizer = fixtures.join("models/qwen2-tied-bf16/tokenizer.json");
        std::fs::copy(tokenizer, folder.path().join("tokenizer.json")).expect("a copy");
        let (model, shape) = open(folder.path()).expect("a good model");
        assert_eq!((shape.layers(), shape.vocab()), (3, 259));
        for number in 1..=3 {
            let (other, _) = open(&folder.path().join(part(number))).expect("the same model");
            assert_eq!(other.fingerprint, model.fingerprint, "part {number}");
        }
        std::fs::remove_file(folder.path().join(part(2))).expect("removed");
        let error = open(&folder.path().join(part(3))).expect_err("a part less");
        assert_eq!(error.code, ErrorCode::BadModel);
        assert!(error.message.contains(&part(2)) && error.message.contains("missing"), "{error}");
    }
}
