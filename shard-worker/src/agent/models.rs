//! Where this worker's models come from: opening, fingerprinting, loading. All of it blocks.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use shoal_protocol::blob::name::{self, HubName};
use shoal_protocol::blob::{BlobError, Filling, ModelCache, Side, Wanted};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::model::{
    BuiltinModel, Checkpoint, CheckpointError, StoredScales, TensorLocation, TensorPart,
};
use shoal_protocol::plan::{Assignment, ModelSource, PretendSpec};
use shoal_protocol::units::Bytes;

use crate::backend::BackendError;
use crate::backend::cpu::{CpuOps, Isa};
use crate::backend::cpus::Cpus;
use crate::blob::Blobs;
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
    /// Where threads compute.
    pub cpus: Cpus,
    /// The models of hubs, as far as they are here.
    pub cache: ModelCache,
    /// Other workers that have some of them; `None`: only the hub is asked.
    pub blobs: Option<Blobs>,
}

impl Models {
    /// What the worker reads at a source: the fingerprint that a plan pins.
    pub fn fingerprint(&self, source: &ModelSource) -> Result<[u8; 32], WireError> {
        match source {
            ModelSource::Pretend(spec) => {
                check_pretend(spec)?;
                Ok(spec.fingerprint())
            }
            ModelSource::Folder { .. }
            | ModelSource::Builtin { .. }
            | ModelSource::Hub { .. }
            | ModelSource::HubGguf { .. }
            | ModelSource::ObjectStore { .. } => {
                // Whoever asks wants to deploy it now: what cannot be read is a refusal.
                let refused = |error: WireError| WireError::new(ErrorCode::BadModel, error.message);
                Ok(self.open(source, &AtomicBool::new(false)).map_err(refused)?.fingerprint())
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
        let mut checkpoint = self.open(&replica.model.source, cancel)?;
        let mut fetched = 0;
        if replica.model.source.is_fetched() {
            checkpoint = self.or_anew(checkpoint, assignment, cancel)?;
            fetched = self.fetch(&checkpoint, assignment, on_progress, cancel)?;
        }
        let on_progress = &|done: Bytes, total: Bytes| {
            on_progress(Bytes(fetched + done.0), Bytes(fetched + total.0));
        };
        let vocab = checkpoint.spec().vocab;
        let isa = Isa::from_environment().map_err(|error| load_error(&error.into()))?;
        let ops = CpuOps::bound(self.threads.get(), isa, &self.cpus)
            .map_err(|error| load_error(&error.into()))?;
        let options = LoadOptions { threads: self.threads, on_progress, cancel };
        let model = load_shard(ops, &checkpoint, assignment, &options);
        let model = model.map_err(|error| load_error(&error))?;
        Ok(LoadedModel { model, vocab })
    }

    /// A checkpoint of the cache that is not the plan's is damaged: it is fetched again, once.
    fn or_anew(
        &self,
        checkpoint: Checkpoint,
        assignment: &Assignment,
        cancel: &AtomicBool,
    ) -> Result<Checkpoint, WireError> {
        let model = &assignment.replica.model;
        if checkpoint.fingerprint() == model.fingerprint {
            return Ok(checkpoint);
        }
        tracing::warn!(
            "{}: not the model of the plan: fetched again",
            checkpoint.folder().display()
        );
        self.cache.forget(&model.source, cancel).map_err(|error| fetch_error(&error))?;
        self.open(&model.source, cancel)
    }

    /// Brings the bytes of an assignment's tensors here; how many there are.
    fn fetch(
        &self,
        checkpoint: &Checkpoint,
        assignment: &Assignment,
        on_progress: &(dyn Fn(Bytes, Bytes) + Sync),
        cancel: &AtomicBool,
    ) -> Result<u64, WireError> {
        let wanted = wanted(checkpoint, assignment);
        // They are read once more when they are loaded.
        let to_load: u64 = wanted.iter().map(|wanted| wanted.bytes.end - wanted.bytes.start).sum();
        let fetched = AtomicU64::new(0);
        let note = |done: u64, total: u64| {
            fetched.store(total, Ordering::Relaxed);
            on_progress(Bytes(done), Bytes(total + to_load));
        };
        let filling = Filling { on_progress: &note, cancel };
        let source = &assignment.replica.model.source;
        let filled = match &self.blobs {
            Some(blobs) => blobs.fill(source, &wanted, &filling),
            None => self.cache.fill(source, &wanted, &filling),
        };
        filled.map_err(|error| fetch_error(&error))?;
        Ok(fetched.into_inner())
    }

    /// The folder of an adapter: where it is, or where it was fetched to from the hub or another worker.
    pub(super) fn adapter(&self, path: &str) -> Result<PathBuf, WireError> {
        if path.starts_with('/') {
            return Ok(PathBuf::from(path));
        }
        let fetch = || -> Result<PathBuf, BlobError> {
            let HubName { repo, revision, .. } = name::parse_adapter(path)?;
            let source = ModelSource::Hub { repo: repo.to_string(), revision };
            let fill = |wanted: &[Wanted], filling: &Filling<'_>| match &self.blobs {
                Some(blobs) => blobs.fill(&source, wanted, filling),
                None => self.cache.fill(&source, wanted, filling),
            };
            self.cache.adapter(&source, &AtomicBool::new(false), fill)
        };
        fetch().map_err(|error| fetch_error(&error))
    }

    /// What is at a source, as far as headers say it.
    pub(super) fn open(
        &self,
        source: &ModelSource,
        cancel: &AtomicBool,
    ) -> Result<Checkpoint, WireError> {
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
            ModelSource::Hub { .. }
            | ModelSource::HubGguf { .. }
            | ModelSource::ObjectStore { .. } => {
                let folder = self.cache.prepare(source, Side::Weights, cancel);
                folder.map_err(|error| fetch_error(&error))?
            }
            ModelSource::Pretend(_) => return Err(bad("a pretend model has no files".to_owned())),
        };
        Checkpoint::open(&folder).map_err(|error| match error {
            // The folder may be mounted, or its files be there, a little later.
            CheckpointError::Read { .. } | CheckpointError::NoModel { .. } => {
                WireError::new(ErrorCode::StorageFailed, error.to_string())
            }
            error => bad(error.to_string()),
        })
    }
}

/// The bytes of the files that an assignment's parts of tensors are: whole rows, since the columns of each
/// lie apart (what that costs: `docs/decisions/027-weights-that-travel-once.md`).
fn wanted(checkpoint: &Checkpoint, assignment: &Assignment) -> Vec<Wanted> {
    let (spec, replica) = (checkpoint.spec(), &assignment.replica);
    let stage = replica.stages.get(assignment.stage.0 as usize);
    let split = stage.map(|stage| stage.split(assignment.rank));
    let cut = |split| spec.part(split, replica.reduction(), replica.precision).ok();
    let part = split.and_then(cut);
    // What cannot be cut so is refused where it is loaded.
    let of = |part| checkpoint.part_tensors(&part, assignment.layers());
    wanted_of(checkpoint, &part.map(of).unwrap_or_default())
}

fn wanted_of(checkpoint: &Checkpoint, tensors: &[TensorPart]) -> Vec<Wanted> {
    let in_file = |file: &Path, bytes: Range<u64>| {
        let file = file.strip_prefix(checkpoint.folder()).ok()?;
        Some(Wanted { file: file.to_str()?.to_owned(), bytes })
    };
    let wanted = |tensor: &TensorPart| {
        let location = checkpoint.locate(&tensor.spec.name)?;
        let parts = location.scales.as_deref().map(StoredScales::parts).unwrap_or_default();
        let parts = parts.into_iter().map(|part| (&part.file, part.offset..part.offset + part.len));
        let own = [(&location.file, bytes_of(tensor, location))];
        let all: Vec<_> =
            own.into_iter().chain(parts).filter_map(|(file, bytes)| in_file(file, bytes)).collect();
        Some(all)
    };
    tensors.iter().filter_map(wanted).flatten().collect()
}

/// The bytes of a file that a part of a tensor is read from.
fn bytes_of(tensor: &TensorPart, location: &TensorLocation) -> Range<u64> {
    let words = matches!(location.scales.as_deref(), Some(StoredScales::FourBits { .. }));
    let excerpt = tensor.spec.excerpt.as_ref();
    let first_row = excerpt.map_or(0, |excerpt| excerpt.first_row);
    // What lies the other way round crosses as many rows as it has columns.
    let turned = excerpt.filter(|excerpt| excerpt.columns.is_some());
    let (width, rows) = match turned.and_then(|excerpt| excerpt.stored.last()) {
        Some(width) => (*width, tensor.columns.clone()),
        None => (tensor.columns_stored(), tensor.rows.clone()),
    };
    match location.dtype.row_bytes(width) {
        Some(row) if !words => {
            let at = |row_number: u64| location.offset + (first_row + row_number) * row;
            at(rows.start)..at(rows.end)
        }
        // Words across rows.
        _ => location.offset..location.offset + location.len,
    }
}

fn fetch_error(error: &BlobError) -> WireError {
    let code = match error {
        BlobError::Cancelled => ErrorCode::Cancelled,
        // Another worker may have a token, or a better network.
        BlobError::Denied { .. } => ErrorCode::StorageFailed,
        error if error.is_final() => ErrorCode::BadModel,
        _ => ErrorCode::StorageFailed,
    };
    WireError::new(code, error.to_string())
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
    use std::os::unix::fs::FileExt;

    use shoal_protocol::blob::{BlobSettings, Cut};
    use shoal_protocol::mesh::Reduction;
    use shoal_protocol::model::{Split, TensorRole};
    use shoal_protocol::plan::Numerics;
    use shoal_protocol::units::LayerRange;

    use super::*;

    fn models(data: &Path) -> Models {
        let cache = ModelCache::new(data, BlobSettings::default());
        let (data, threads) = (data.to_owned(), NonZeroUsize::MIN);
        let cpus = Cpus::default();
        Models { data, builtin: Vec::new(), threads, cpus, cache, blobs: None }
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

    #[test]
    fn a_part_that_changes_is_another_model_and_one_that_is_missing_may_come() {
        let data = tempfile::tempdir().unwrap();
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/gguf");
        let part = |number: u32| format!("deepseek3-bf16-0000{number}-of-00003.gguf");
        for number in 1..=3 {
            std::fs::copy(fixtures.join(part(number)), data.path().join(part(number))).unwrap();
        }
        let source = ModelSource::Folder { path: data.path().join(part(1)).display().to_string() };
        let models = models(data.path());
        let fingerprint = models.fingerprint(&source).unwrap();
        let last = data.path().join(part(3));
        let bytes = std::fs::read(&last).unwrap();
        std::fs::write(&last, [&bytes[..], &[0; 32]].concat()).unwrap();
        assert_ne!(models.fingerprint(&source).unwrap(), fingerprint);
        std::fs::remove_file(&last).unwrap();
        let error = models.open(&source, &AtomicBool::new(false)).unwrap_err();
        assert_eq!(error.code, ErrorCode::StorageFailed);
        assert!(error.message.contains("part 3 of 3 is missing"), "{}", error.message);
        std::fs::write(&last, &bytes).unwrap();
        assert_eq!(models.fingerprint(&source), Ok(fingerprint));
    }

    #[test]
    fn a_folder_that_is_empty_may_be_filled_a_little_later() {
        let folder = tempfile::tempdir().unwrap();
        let source = ModelSource::Folder { path: folder.path().display().to_string() };
        let error = models(folder.path()).open(&source, &AtomicBool::new(false)).unwrap_err();
        assert_eq!(error.code, ErrorCode::StorageFailed, "{}", error.message);
        assert!(error.message.contains("no model here"), "{}", error.message);
    }

    #[test]
    fn a_rank_fetches_its_own_experts_also_where_they_lie_the_other_way_round() {
        use TensorRole::{ExpertDown, ExpertGate, ExpertUp, KeyUp, ValueUp};
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models");
        for (model, roles) in [
            ("gpt-oss-bf16", [ExpertGate, ExpertUp, ExpertDown].as_slice()),
            ("deepseek3-bf16", [KeyUp, ValueUp].as_slice()),
        ] {
            let checkpoint = Checkpoint::open(&models.join(model)).unwrap();
            let spec = checkpoint.spec();
            let last = LayerRange::new(spec.layers - 1, spec.layers);
            let mut stored = std::collections::BTreeSet::new();
            let mut ends = Vec::new();
            for rank in 0..2 {
                let split = Split { rank, ranks: 2 };
                let part = spec.part(split, Reduction::Sum, spec.stored).unwrap();
                let mut own = std::collections::BTreeSet::new();
                for tensor in part.tensors(spec, last) {
                    if roles.contains(&tensor.spec.role) {
                        let location = checkpoint.locate(&tensor.spec.name).unwrap();
                        own.extend(bytes_of(&tensor, location));
                        stored.extend(location.offset..location.offset + location.len);
                    }
                }
                ends.push(own);
            }
            assert!(ends[0].is_disjoint(&ends[1]), "{model}");
            let all: std::collections::BTreeSet<u64> = &ends[0] | &ends[1];
            assert!(all == stored && !stored.is_empty(), "{model}");
        }
    }

    /// An 8B Llama in bf16 as it is published, of which only the headers are there.
    fn eight_billion(folder: &Path) -> Checkpoint {
        let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "hidden_act": "silu", "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;
        std::fs::write(folder.join("config.json"), config).unwrap();
        let (hidden, mlp, kv, vocab) = (4096_u64, 14336_u64, 1024_u64, 128_256_u64);
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
        for layer in 0..32 {
            let parts = [
                ("input_layernorm", vec![hidden]),
                ("mlp.down_proj", vec![hidden, mlp]),
                ("mlp.gate_proj", vec![mlp, hidden]),
                ("mlp.up_proj", vec![mlp, hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
            ];
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            shapes.extend(parts.map(|(part, shape)| (name(part), shape)));
        }
        shapes.push(("model.norm.weight".to_owned(), vec![hidden]));
        shapes.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
        let (mut header, mut end) = (serde_json::Map::new(), 0_u64);
        for (name, shape) in shapes {
            let first = end;
            end += 2 * shape.iter().product::<u64>();
            let entry = serde_json::json!({
                "dtype": "BF16", "shape": shape, "data_offsets": [first, end],
            });
            header.insert(name, entry);
        }
        let header = serde_json::to_vec(&header).unwrap();
        let file = std::fs::File::create(folder.join("model.safetensors")).unwrap();
        file.write_all_at(&(header.len() as u64).to_le_bytes(), 0).unwrap();
        file.write_all_at(&header, 8).unwrap();
        file.set_len(8 + header.len() as u64 + end).unwrap();
        Checkpoint::open(folder).unwrap()
    }

    /// What every rank of a mesh computes with of its stage's bytes, and what it fetches: the most of any,
    /// in tenths of a percent.
    fn shares(
        checkpoint: &Checkpoint,
        (stages, ranks): (u32, u32),
        numerics: Numerics,
    ) -> [u64; 2] {
        let (spec, reduction) = (checkpoint.spec(), Reduction::of(numerics));
        let (cut, mut shares) = (Cut::default(), [0; 2]);
        let file = Path::new("model.safetensors");
        let len = std::fs::metadata(checkpoint.folder().join(file)).unwrap().len();
        for stage in 0..stages {
            let at = |border: u32| border * spec.layers / stages;
            let layers = LayerRange::new(at(stage), at(stage + 1));
            let all: u64 = checkpoint.tensors(layers).iter().map(|t| 2 * t.elements()).sum();
            for rank in 0..ranks {
                let part = spec.part(Split { rank, ranks }, reduction, spec.stored).unwrap();
                let tensors = checkpoint.part_tensors(&part, layers);
                let own = tensors.iter().map(|t| 2 * t.row_count() * t.column_count()).sum();
                let wanted = wanted_of(checkpoint, &tensors);
                let chunks: std::collections::BTreeSet<u32> =
                    wanted.iter().flat_map(|wanted| cut.touched(&wanted.bytes)).collect();
                let bytes = |chunk: &u32| {
                    let bytes = cut.bytes(*chunk, len);
                    bytes.end - bytes.start
                };
                let fetched: u64 = chunks.iter().map(bytes).sum();
                for (share, bytes) in shares.iter_mut().zip([own, fetched]) {
                    *share = (*share).max((bytes * 1000).div_ceil(all));
                }
            }
        }
        shares
    }

    /// The figures of docs/decisions/027-weights-that-travel-once.md.
    #[test]
    fn what_a_rank_of_a_large_model_fetches_is_its_slice_and_the_rest_of_its_chunks() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = eight_billion(folder.path());
        for (mesh, numerics, expected) in [
            ((2, 1), Numerics::N1, [1000, 1001]),
            ((1, 2), Numerics::N1, [501, 560]),
            ((2, 2), Numerics::N1, [501, 560]),
            ((1, 8), Numerics::N1, [126, 210]),
            ((1, 2), Numerics::N1Sum, [501, 695]),
            ((2, 2), Numerics::N1Sum, [501, 695]),
            ((1, 8), Numerics::N1Sum, [126, 465]),
        ] {
            let found = shares(&checkpoint, mesh, numerics);
            println!(
                "{mesh:?} {numerics:?}: a slice of {found:?} ‰ with and without the rest of its chunks"
            );
            assert!(
                found[0] <= expected[0] && found[1] <= expected[1],
                "{mesh:?} {numerics:?}: {found:?}"
            );
            assert!(found[1] >= found[0], "{mesh:?} {numerics:?}: {found:?}");
        }
    }
}
