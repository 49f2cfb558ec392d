//! ● The models of origins on this machine: one folder for each, found again by every process.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use super::disk::Held;
use super::disk::SparseFile;
use super::error::BlobError;
use super::fill::{Alone, Entry, Filling, Model, Peers, Wanted};
use super::http::Http;
use super::hub::Hub;
use super::kept;
use super::name::{self, RepoId};
use super::origin::Origin;
use super::prepare::{self, Side};
use super::quant;
use super::s3::{ObjectStore, ObjectUrl};
use super::settings::BlobSettings;
use super::turn::Turn;
use crate::model::Checkpoint;
use crate::model::checkpoint::{INDEX, SINGLE};
use crate::plan::ModelSource;
use crate::weights::{ChunkId, ModelKey};

/// All of them. Cheap to share: clones are the same cache.
#[derive(Clone, Debug)]
pub struct ModelCache(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    settings: BlobSettings,
    http: Http,
    slots: Mutex<BTreeMap<PathBuf, Arc<Slot>>>,
}

/// One model. What takes long is done under its own lock, so that no model waits for another.
#[derive(Debug, Default)]
struct Slot {
    /// Held while the small part is fetched.
    turn: Turn,
    /// Never held for long. It holds no file open, only what is known of them: a model that was unloaded
    /// costs some memory, and its chunks can still be given to others.
    model: Mutex<Option<Arc<Model>>>,
}

impl Slot {
    fn opened(&self) -> Option<Arc<Model>> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, model: Option<Arc<Model>>) {
        *self.model.lock().unwrap_or_else(PoisonError::into_inner) = model;
    }
}

/// A model as somebody asks for it.
struct Named {
    origin: Box<dyn Origin>,
    /// Under which its folder lies.
    place: PathBuf,
    commit: String,
    repo: Option<RepoId>,
    /// The file, where it is a GGUF model among others.
    gguf: Option<String>,
}

impl ModelCache {
    /// A cache in a node's data folder.
    pub fn new(data: &Path, settings: BlobSettings) -> Self {
        let http = Http::new(settings.patience);
        let root = data.join("models");
        Self(Arc::new(Inner { root, settings, http, slots: Mutex::default() }))
    }

    /// Finds out which revision is meant now, and names that one for ever.
    pub fn pin(&self, source: &ModelSource) -> Result<ModelSource, BlobError> {
        let http = self.0.http.waited_for();
        match source {
            ModelSource::Hub { repo, revision } => self.pin_hub((repo, revision), None, http),
            ModelSource::HubGguf { repo, revision, file } => {
                self.pin_hub((repo, revision), Some(file), http)
            }
            ModelSource::ObjectStore { revision, .. } if name::is_commit(revision) => {
                Ok(source.clone())
            }
            ModelSource::ObjectStore { url, .. } => {
                let named = self.named_for(source, http)?;
                let url = url.clone();
                let listing = self.origin(&named).list("", &AtomicBool::new(false))?;
                Ok(ModelSource::ObjectStore { url, revision: listing.commit })
            }
            other => Err(BlobError::NotRemote(other.to_string())),
        }
    }

    /// The same of an adapter of the hub, which is its whole folder: a GGUF file beside it, as some are
    /// published with, is not what was asked for.
    pub fn pin_adapter(&self, repo: &RepoId, revision: &str) -> Result<ModelSource, BlobError> {
        let (repo, revision) = (repo.to_string(), revision.to_owned());
        let all = ModelSource::Hub { repo: repo.clone(), revision };
        let named = self.named_for(&all, self.0.http.waited_for())?;
        let (commit, _) = self.files_now(&named, true)?;
        Ok(ModelSource::Hub { repo, revision: commit })
    }

    /// A model of the hub; where it is one of GGUF, that which is asked for.
    fn pin_hub(
        &self,
        (repo, revision): (&str, &str),
        gguf: Option<&str>,
        http: Http,
    ) -> Result<ModelSource, BlobError> {
        let all = ModelSource::Hub { repo: repo.to_owned(), revision: revision.to_owned() };
        let named = self.named_for(&all, http)?;
        let found = self.files_now(&named, gguf.is_none_or(name::is_gguf));
        let (commit, files) = found.map_err(|error| match error {
            // Of which model it is that nothing is known.
            BlobError::Offline { .. } => BlobError::Offline { what: all.to_string() },
            other => other,
        })?;
        let has = |wanted: &str| files.iter().any(|file| file == wanted);
        let is_folder = has(SINGLE) || has(INDEX) || !files.iter().any(|file| name::is_gguf(file));
        let (repo, what) = (repo.to_owned(), all.to_string());
        let choose = |asked| quant::choose(files.iter().map(String::as_str), asked, &what);
        let file = match gguf {
            None if is_folder => return Ok(ModelSource::Hub { repo, revision: commit }),
            None => choose("")?,
            // Nobody is there who knows what else there is.
            Some(file) if files.is_empty() => file.to_owned(),
            Some(asked) => choose(asked)?,
        };
        Ok(ModelSource::HubGguf { repo, revision: commit, file })
    }

    /// The commit of a revision, and its files. Where the hub cannot be asked its own cache knows what the
    /// revision was then, and a commit names the same files for ever; of these there may be none known.
    fn files_now(
        &self,
        named: &Named,
        may_be_unknown: bool,
    ) -> Result<(String, Vec<String>), BlobError> {
        let error = match self.origin(named).list(&named.commit, &AtomicBool::new(false)) {
            Ok(listing) => {
                let names = listing.files.into_iter().map(|file| file.name);
                return Ok((listing.commit, names.collect()));
            }
            Err(error) if error.is_final() => return Err(error),
            Err(error) => error,
        };
        let is_known = name::is_commit(&named.commit);
        let commit = is_known.then(|| named.commit.clone()).or_else(|| self.known_commit(named));
        let Some(commit) = commit else { return Err(error) };
        let files = self.known_files(named, &commit);
        if files.is_empty() && !may_be_unknown { Err(error) } else { Ok((commit, files)) }
    }

    /// The folder of a pinned model, with its small files and headers in it.
    pub fn prepare(
        &self,
        source: &ModelSource,
        side: Side,
        cancel: &AtomicBool,
    ) -> Result<PathBuf, BlobError> {
        // Whoever deploys waits for the text side; the weights take their time.
        let named = match side {
            Side::Text => self.named_for(source, self.0.http.waited_for())?,
            Side::Weights => self.named(source)?,
        };
        if let Some(snapshot) = self.snapshot(&named, side) {
            return Ok(snapshot);
        }
        let slot = self.slot(&named.place);
        let _turn = slot.turn.take(cancel)?;
        prepare::prepare(self.origin(&named), (&named.place, &named.commit), side, cancel)?;
        Ok(named.place)
    }

    /// Brings these ranges of a pinned model here. What is read then is there, until the disk fails.
    pub fn fill(
        &self,
        source: &ModelSource,
        wanted: &[Wanted],
        filling: &Filling<'_>,
    ) -> Result<(), BlobError> {
        self.fill_with(source, wanted, &Alone, filling)
    }

    /// The same, with the help of those who want it too.
    pub fn fill_with(
        &self,
        source: &ModelSource,
        wanted: &[Wanted],
        peers: &dyn Peers,
        filling: &Filling<'_>,
    ) -> Result<(), BlobError> {
        let named = self.named(source)?;
        if self.snapshot(&named, Side::Weights).is_some() {
            return Ok(());
        }
        self.open(named, filling.cancel)?.fill(wanted, peers, filling)
    }

    /// The folder of a pinned adapter with all of its files in it, all of which are fetched from its origin
    /// and, where `fill` asks them, from others.
    pub fn adapter(
        &self,
        source: &ModelSource,
        cancel: &AtomicBool,
        fill: impl FnOnce(&[Wanted], &Filling<'_>) -> Result<(), BlobError>,
    ) -> Result<PathBuf, BlobError> {
        let folder = self.prepare(source, Side::Weights, cancel)?;
        fill(&prepare::adapter_files(&folder), &Filling { on_progress: &|_, _| (), cancel })?;
        Ok(folder)
    }

    /// A chunk that this process has, of a model by its key.
    pub fn chunk(&self, key: ModelKey, chunk: ChunkId) -> Option<Vec<u8>> {
        let slots: Vec<_> = {
            let slots = self.0.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots
                .iter()
                .filter(|(place, _)| self.key_of(place) == key)
                .map(|(_, s)| s.clone())
                .collect()
        };
        let model = slots.first()?.opened()?;
        let here = &model.files.get(chunk.file as usize)?.here;
        let verified = matches!(here.held(chunk.index), Some(Held::Verified(_)));
        if verified { here.read(chunk.index).ok() } else { None }
    }

    /// How others call a pinned model.
    pub fn key(&self, source: &ModelSource) -> Result<ModelKey, BlobError> {
        Ok(self.key_of(&self.named(source)?.place))
    }

    /// Its place in the cache says which model it is, on every node.
    fn key_of(&self, place: &Path) -> ModelKey {
        let name = place.strip_prefix(&self.0.root).unwrap_or(place);
        ModelKey(*blake3::hash(name.as_os_str().as_encoded_bytes()).as_bytes())
    }

    /// Throws away what is here of a model: its small part has turned out to be wrong.
    pub fn forget(&self, source: &ModelSource, cancel: &AtomicBool) -> Result<(), BlobError> {
        let named = self.named(source)?;
        let slot = self.slot(&named.place);
        let _turn = slot.turn.take(cancel)?;
        slot.set(None);
        match std::fs::remove_dir_all(&named.place) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(BlobError::Disk { path: named.place, source })
            }
            _ => Ok(()),
        }
    }

    /// Prepares a model whose weights are wanted; what is known already of their chunks stays known.
    fn open(&self, named: Named, cancel: &AtomicBool) -> Result<Arc<Model>, BlobError> {
        let slot = self.slot(&named.place);
        let _turn = slot.turn.take(cancel)?;
        let (asked, side) = (self.origin(&named), Side::Weights);
        let listing = prepare::prepare(asked, (&named.place, &named.commit), side, cancel)?;
        if let Some(before) = slot.opened() {
            return Ok(before);
        }
        let cut = self.0.settings.cut;
        let mut files = Vec::new();
        for remote in prepare::weights(asked, &named.place, &listing)? {
            let here = SparseFile::open(&named.place, &remote.name, cut)?;
            let head = kept::len(&named.place, &remote.name).min(here.len());
            files.push(Entry { remote: remote.clone(), here, head });
        }
        let (turn, givers) = Default::default();
        let Named { place: folder, commit, origin, .. } = named;
        let origin = if self.0.settings.offline { Box::new(Offline) } else { origin };
        let model = Arc::new(Model { origin, commit, files, folder, cut, turn, givers });
        slot.set(Some(Arc::clone(&model)));
        Ok(model)
    }

    /// Who may be asked for a model.
    fn origin<'a>(&self, named: &'a Named) -> &'a dyn Origin {
        if self.0.settings.offline { &Offline } else { named.origin.as_ref() }
    }

    fn slot(&self, place: &Path) -> Arc<Slot> {
        let mut slots = self.0.slots.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(slots.entry(place.to_owned()).or_default())
    }

    fn named(&self, source: &ModelSource) -> Result<Named, BlobError> {
        self.named_for(source, self.0.http.clone())
    }

    fn named_for(&self, source: &ModelSource, http: Http) -> Result<Named, BlobError> {
        let Inner { root, settings, .. } = &*self.0;
        match source {
            ModelSource::Hub { repo, revision } => {
                let repo: RepoId = repo.parse()?;
                name::check_revision(revision)?;
                let place = root.join("hub").join(repo.folder()).join(name::segment(revision));
                let origin = Box::new(Hub::new(http, settings, repo.clone()));
                let (commit, repo) = (revision.clone(), Some(repo));
                Ok(Named { origin, place, commit, repo, gguf: None })
            }
            ModelSource::HubGguf { repo, revision, file } => {
                let repo: RepoId = repo.parse()?;
                name::check_revision(revision)?;
                name::check_file(file)?;
                let of = root.join("hub").join(repo.folder());
                let place = of.join(format!("gguf-{}", name::segment(revision))).join(file);
                let origin = Box::new(Hub::new(http, settings, repo.clone()).gguf(file));
                let (commit, gguf) = (revision.clone(), Some(file.clone()));
                Ok(Named { origin, place, commit, repo: Some(repo), gguf })
            }
            ModelSource::ObjectStore { url, revision } => {
                let at = ObjectUrl::parse(url)?;
                if !revision.is_empty() {
                    name::check_revision(revision)?;
                }
                let place = root.join("s3").join(at.folder()).join(name::segment(revision));
                let origin = Box::new(ObjectStore::new(http, settings, at));
                let commit = revision.clone();
                Ok(Named { origin, place, commit, repo: None, gguf: None })
            }
            ModelSource::Folder { .. } | ModelSource::Builtin { .. } | ModelSource::Pretend(_) => {
                Err(BlobError::NotRemote(source.to_string()))
            }
        }
    }

    /// The folder of the hub's own cache, where the model lies there whole; of a GGUF model its file.
    fn snapshot(&self, named: &Named, side: Side) -> Option<PathBuf> {
        let folder = self.hub_folder(named)?.join("snapshots").join(&named.commit);
        let place = named.gguf.as_ref().map_or_else(|| folder.clone(), |file| folder.join(file));
        let opened = Checkpoint::open(&place).ok()?;
        // A tokenizer beside the file would come first, and who fetches the file has none.
        let has_own = named.gguf.is_none() || !place.with_file_name("tokenizer.json").exists();
        (side == Side::Weights || (has_own && opened.check_tokenizer().is_ok())).then_some(place)
    }

    /// The files of a model in the hub's own cache, in its folder and those in it.
    fn known_files(&self, named: &Named, commit: &str) -> Vec<String> {
        let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten();
        let Some(folder) = self.hub_folder(named) else { return Vec::new() };
        let folder = folder.join("snapshots").join(commit);
        let mut files = Vec::new();
        for entry in entries(&folder) {
            match entry.path().is_dir() {
                true => files.extend(entries(&entry.path()).map(|entry| entry.path())),
                false => files.push(entry.path()),
            }
        }
        let name = |path: &PathBuf| Some(path.strip_prefix(&folder).ok()?.to_str()?.to_owned());
        files.iter().filter_map(name).collect()
    }

    fn known_commit(&self, named: &Named) -> Option<String> {
        let file = self.hub_folder(named)?.join("refs").join(&named.commit);
        let commit = std::fs::read_to_string(file).ok()?.trim().to_owned();
        name::is_commit(&commit).then_some(commit)
    }

    fn hub_folder(&self, named: &Named) -> Option<PathBuf> {
        let cache = self.0.settings.hub_cache.as_ref()?;
        Some(cache.join(format!("models--{}", named.repo.as_ref()?.folder())))
    }
}

/// Nobody is to be asked.
#[derive(Debug)]
struct Offline;

impl Origin for Offline {
    fn name(&self) -> &str {
        "nobody"
    }

    fn list(&self, revision: &str, _: &AtomicBool) -> Result<super::origin::Listing, BlobError> {
        Err(BlobError::Offline { what: format!("the description of {revision}") })
    }

    fn read(
        &self,
        _: &str,
        file: &super::origin::RemoteFile,
        bytes: std::ops::Range<u64>,
        _: &mut Vec<u8>,
        _: &AtomicBool,
    ) -> Result<(), BlobError> {
        let what = format!("{} bytes {}..{}", file.name, bytes.start, bytes.end);
        Err(BlobError::Offline { what })
    }
}
