//! ● Where the text side of each deployment lies. Finding out touches the disk (a built-in model is
//! unpacked first), so it happens beside the executor, once for each deployment.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::DeploymentName;
use shoal_protocol::plan::ModelSource;
use tokio::task::{JoinError, JoinSet};

use super::models::Models;
use super::state::ClusterState;

/// How long a round waits for what it has just begun to look for: a disk that works takes
/// milliseconds, and workers must not wait for their assignments because of one that does not.
const PATIENCE: Duration = Duration::from_millis(500);

/// The pause before what was not found is looked for again: rounds follow each other much faster.
const RETRY: Duration = Duration::from_secs(1);

/// The folders that have been found, and those that are being looked for.
#[derive(Debug)]
pub(super) struct Folders {
    models: Models,
    known: BTreeMap<DeploymentName, Known>,
    /// At most one for each deployment; each ends when the disk answers.
    searches: JoinSet<(DeploymentName, ModelSource, Folder)>,
}

/// `None` for a pretend model.
type Folder = Result<Option<PathBuf>, WireError>;

#[derive(Debug)]
struct Known {
    source: ModelSource,
    searching: bool,
    /// When the last search began.
    begun: Option<Instant>,
    /// What the last search came to. What was not found is looked for again in a later round.
    found: Option<Folder>,
}

impl Folders {
    pub fn new(models: Models) -> Self {
        Self { models, known: BTreeMap::new(), searches: JoinSet::new() }
    }

    /// Begins to look for what is new or was not found, and waits for it for a moment.
    pub async fn look(&mut self, state: &ClusterState) {
        while let Some(done) = self.searches.try_join_next() {
            self.note(done);
        }
        self.known.retain(|name, known| {
            let deployment = state.deployments.get(name);
            deployment.is_some_and(|deployment| deployment.spec.model.source == known.source)
        });
        let mut begun = Vec::new();
        for (name, deployment) in state.deployments.iter() {
            let source = &deployment.spec.model.source;
            let known = self.known.entry(name.clone()).or_insert_with(|| Known {
                source: source.clone(),
                searching: false,
                begun: None,
                found: None,
            });
            let early = known.begun.is_some_and(|begun| begun.elapsed() < RETRY);
            if known.searching || early || matches!(known.found, Some(Ok(_))) {
                continue;
            }
            known.searching = true;
            known.begun = Some(Instant::now());
            begun.push(name.clone());
            self.searches.spawn(search(self.models.clone(), name.clone(), source.clone()));
        }
        if tokio::time::timeout(PATIENCE, self.have_ended(&begun)).await.is_err() {
            tracing::warn!(
                "the text side of a model is not here within {PATIENCE:?}: the disk is slow, or it is being fetched"
            );
        }
    }

    /// The folder with a deployment's tokenizer, `None` for a pretend model; or why it is not known.
    pub fn of(&self, name: &DeploymentName) -> Result<Option<PathBuf>, String> {
        match self.known.get(name).and_then(|known| known.found.as_ref()) {
            Some(Ok(folder)) => Ok(folder.clone()),
            Some(Err(error)) => Err(format!("the coordinator cannot read its tokenizer: {error}")),
            None => Err("the coordinator's disk has not shown its tokenizer yet".to_owned()),
        }
    }

    /// Cancel safe: what has not ended is noted in a later round.
    async fn have_ended(&mut self, names: &[DeploymentName]) {
        while names.iter().any(|name| self.known.get(name).is_some_and(|known| known.searching)) {
            let Some(done) = self.searches.join_next().await else { return };
            self.note(done);
        }
    }

    fn note(&mut self, done: Result<(DeploymentName, ModelSource, Folder), JoinError>) {
        // The searches themselves do not panic, and end only with the runtime.
        let Ok((name, source, found)) = done else { return };
        // It may have been removed, or be another one of the same name.
        let known = self.known.get_mut(&name).filter(|known| known.source == source);
        let Some(known) = known else { return };
        if let Err(error) = &found
            && known.found.as_ref() != Some(&found)
        {
            tracing::error!(deployment = %name, %error, "its files are not here");
        }
        known.searching = false;
        known.found = Some(found);
    }
}

async fn search(
    models: Models,
    name: DeploymentName,
    source: ModelSource,
) -> (DeploymentName, ModelSource, Folder) {
    let wanted = source.clone();
    let found = tokio::task::spawn_blocking(move || models.folder(&wanted)).await;
    let found = found.unwrap_or_else(|error| {
        Err(WireError::new(ErrorCode::Internal, format!("looking for its files failed: {error}")))
    });
    (name, source, found)
}

#[cfg(test)]
mod tests {
    use shoal_protocol::id::{Incarnation, NodeId};
    use shoal_protocol::plan::{DeploymentSpec, ModelRef};

    use super::*;
    use crate::control::shape::{ModelShape, small_pretend};
    use crate::control::state::{Change, Command, DeploymentCommand, Timestamp};

    fn deploy(state: &mut ClusterState, sequence: u64, name: &str, source: ModelSource) {
        let shape = small_pretend(1, 1);
        let model = ModelRef { source, fingerprint: shape.fingerprint() };
        let name = DeploymentName::new(name).unwrap();
        let spec = DeploymentSpec { name, model, stages: None, precision: None };
        let create =
            DeploymentCommand::Create { spec, shape: ModelShape::Pretend(shape), replicas: 1 };
        let change = Change::Deployment(create);
        let client = NodeId::coordinator(1);
        state
            .apply(&Command {
                client,
                incarnation: Incarnation(1),
                sequence,
                at: Timestamp(0),
                change,
            })
            .unwrap();
    }

    fn runtime() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_time().max_blocking_threads(1).build().unwrap()
    }

    fn name(text: &str) -> DeploymentName {
        DeploymentName::new(text).unwrap()
    }

    #[test]
    fn what_is_found_stays_found_and_what_is_not_says_why() {
        let mut state = ClusterState::default();
        deploy(&mut state, 1, "there", ModelSource::Folder { path: "/there".into() });
        deploy(&mut state, 2, "missing", ModelSource::Builtin { name: "nemo".into() });
        let mut folders = Folders::new(Models::new("/nowhere".into(), Vec::new()));
        runtime().block_on(async {
            folders.look(&state).await;
            assert_eq!(folders.of(&name("there")), Ok(Some("/there".into())));
            let why = folders.of(&name("missing")).unwrap_err();
            assert!(why.contains("no built-in model `nemo`"), "{why}");
            folders.look(&ClusterState::default()).await;
            assert!(folders.known.is_empty(), "what is not deployed any more is forgotten");
        });
    }

    #[test]
    fn a_disk_that_hangs_holds_up_nobody_and_is_asked_once() {
        let mut state = ClusterState::default();
        deploy(&mut state, 1, "m", ModelSource::Folder { path: "/m".into() });
        let mut folders = Folders::new(Models::new("/nowhere".into(), Vec::new()));
        runtime().block_on(async {
            // The one thread that may wait for the disk does so until this sender is gone.
            let (disk, hangs) = std::sync::mpsc::sync_channel::<()>(0);
            let thread = tokio::task::spawn_blocking(move || hangs.recv());
            for _ in 0..3 {
                folders.look(&state).await;
                assert!(folders.of(&name("m")).unwrap_err().contains("has not shown"));
                assert_eq!(folders.searches.len(), 1);
            }
            drop(disk);
            assert!(thread.await.unwrap().is_err());
            folders.have_ended(&[name("m")]).await;
            assert_eq!(folders.of(&name("m")), Ok(Some("/m".into())));
        });
    }
}
