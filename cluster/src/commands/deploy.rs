//! `shoal deploy MODEL`: asks for it, and waits until it is served.

use std::borrow::Cow;
use std::num::NonZeroU32;
use std::path::Path;
use std::time::Duration;

use shoal_protocol::admin::{AdminCall, AdminReply, ClusterView};
use shoal_protocol::blob::ObjectUrl;
use shoal_protocol::blob::name::{self, HubName};
use shoal_protocol::id::DeploymentName;
use shoal_protocol::mesh::{Mesh, MeshAsk, MeshAsked};
use shoal_protocol::model::gguf;
use shoal_protocol::plan::{Activations, KvPrecision, ModelSource, Precision};

use super::rollout;
use crate::args::DeployArgs;
use crate::builtin;
use crate::client::{AdminClient, unexpected};
use crate::failure::{Exit, Failure};
use crate::output::progress::{Progress, Stand, stand};
use crate::output::table;

/// How long to wait until every replica is served: the weights of a large model take a while.
const ROLLOUT_TIMEOUT: Duration = Duration::from_secs(3600);

/// What `deploy` and `up` ask for, beside what is served and what it is called.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Pipeline stages.
    pub stages: Option<NonZeroU32>,
    /// How weights are held.
    pub precision: Option<Precision>,
    /// How keys and values are held.
    pub kv: Option<KvPrecision>,
    /// What rows are in products with whole numbers.
    pub activations: Option<Activations>,
    /// Full copies.
    pub replicas: u32,
    /// What is asked of the planner.
    pub mesh: MeshAsk,
}

impl Asked {
    /// The call: in the words that every build knows where they are enough.
    pub fn call(self, name: DeploymentName, source: ModelSource) -> AdminCall {
        let Self { stages, precision, kv, activations, replicas, mesh } = self;
        let stages = stages.map(NonZeroU32::get);
        let kv = kv.filter(|kv| *kv != KvPrecision::F32);
        let mut ask = MeshAsk { kv, activations, ..mesh };
        if ask.is_empty() {
            return AdminCall::Deploy { name, source, stages, precision, replicas };
        }
        // A number of stages beside it is that of a mesh with one rank.
        let of_stages = |stages| MeshAsked::Exactly(Mesh { stages, ranks: 1 });
        ask.mesh = ask.mesh.or(stages.map(of_stages));
        AdminCall::DeployMesh { name, source, precision, replicas, ask }
    }
}

/// Serves a model.
pub async fn run(args: DeployArgs) -> Result<(), Failure> {
    let (source, name) = source_of(args.model.as_deref())?;
    let name = args.name.unwrap_or(name);
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let asked = Asked {
        stages: args.stages,
        precision: args.precision,
        kv: args.kv,
        activations: args.activations,
        replicas: args.replicas.get(),
        mesh: MeshAsk::from(args.mesh),
    };
    match client.call(asked.call(name.clone(), source)).await? {
        AdminReply::Accepted => eprintln!("{name}: accepted"),
        other => return Err(unexpected(&other)),
    }
    if args.no_wait {
        client.close().await;
        return Ok(());
    }
    let ready = wait_until_ready(&client, &name);
    let begun = tokio::time::Instant::now();
    let ready = match args.timeout {
        Some(time) => tokio::time::timeout_at(begun + time, ready).await.unwrap_or_else(|_| {
            let why = format!(
                "{name} is not ready within {time:?}; the cluster goes on with it: `shoal status` says how far it is, \
                 `shoal undeploy {name}` ends it"
            );
            Err(Failure::failed(why))
        }),
        None => ready.await,
    };
    let view = match ready {
        Ok(view) => view,
        Err(failure) if failure.exit == Exit::Refused => {
            return Err(take_back(&client, &name, failure).await);
        }
        Err(failure) => return Err(failure),
    };
    // From here on it is served, and is not taken from its clients where one of its copies cannot be.
    let view = match args.replicas.get() {
        1 => view,
        _ => {
            let left = args.timeout.map(|time| time.saturating_sub(begun.elapsed()));
            rollout::wait(&client, &name, 0, left.unwrap_or(ROLLOUT_TIMEOUT)).await?
        }
    };
    client.close().await;
    eprintln!("{name}: ready");
    super::print(&table::stages(&view, |d| d.name == name).to_string())
}

/// What was refused leaves nothing behind: its name is free, and workers let go what they have loaded of it.
async fn take_back(client: &AdminClient, name: &DeploymentName, why: Failure) -> Failure {
    let said = match client.call(AdminCall::Undeploy { name: name.clone() }).await {
        Ok(AdminReply::Accepted) => "it was taken back: nothing of it stays".to_owned(),
        Ok(_) | Err(_) => format!("it is still there: `shoal undeploy {name}` ends it"),
    };
    Failure { message: format!("{}\n{said}", why.message), ..why }
}

/// Follows a deployment, with progress on stderr, until it is served or is known not to be.
///
/// It waits as long as the cluster works on it: for workers that are missing, and for weights.
pub async fn wait_until_ready(
    client: &AdminClient,
    name: &DeploymentName,
) -> Result<ClusterView, Failure> {
    let mut watch = client.watch().await?;
    let mut progress = Progress::new(name.clone());
    let mut seen = false;
    loop {
        let view = watch.next().await?;
        let stand = stand(&view, name);
        progress.show(&stand);
        match stand {
            Stand::Ready => return Ok(view),
            Stand::Failed(why) => return Err(Failure::refused(format!("{name}: {why}"))),
            // The first view may be older than the acceptance.
            Stand::Absent if seen => {
                return Err(Failure::failed(format!("{name} was undeployed by somebody else")));
            }
            Stand::Absent => {}
            Stand::Waiting(_) | Stand::Loading { .. } => seen = true,
        }
    }
}

/// Where a model is, and what it is called unless the operator says otherwise.
pub fn source_of(model: Option<&Path>) -> Result<(ModelSource, DeploymentName), Failure> {
    let builtin = builtin::DEMO.name;
    // Its name is taken for it where there is no such folder.
    let Some(folder) = model.filter(|m| *m != Path::new(builtin) || m.exists()) else {
        return Ok((ModelSource::Builtin { name: builtin.to_owned() }, default_name(builtin)?));
    };
    if let Some(url) = folder.to_str().filter(|text| text.starts_with("s3://")) {
        let called = ObjectUrl::parse(url).map_err(|error| Failure::usage(error.to_string()))?;
        let (url, revision) = (url.to_owned(), String::new());
        return Ok((ModelSource::ObjectStore { url, revision }, default_name(called.name())?));
    }
    if let Some(model) = folder.to_str().and_then(|text| name::parse(text).ok())
        && !folder.exists()
    {
        return hub_model(model);
    }
    let absolute = folder.canonicalize().map_err(|error| {
        Failure::refused(format!(
            "cannot read the model {}: {error}; name a folder in the Hugging Face layout, a GGUF file, \
             a model of the hub as org/name, org/name@revision, org/name:QUANT or org/name/FILE.gguf, or \
             none for the built-in model `{builtin}`",
            folder.display()
        ))
    })?;
    let is_gguf = folder.extension().is_some_and(|end| end == "gguf") && absolute.is_file();
    if !absolute.is_dir() && !is_gguf {
        return Err(Failure::refused(format!(
            "{} is not a folder; a model is a folder with config.json, weights (safetensors, or a \
             state dict of PyTorch) and tokenizer.json, or a file that ends in .gguf",
            folder.display()
        )));
    }
    // A link to such a file keeps its name, which says what part of a model it is.
    let absolute = match folder.parent().filter(|_| is_gguf) {
        Some(parent) => {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            let file = gguf::first_part(folder);
            let parent = parent.canonicalize().map_err(|error| {
                Failure::refused(format!("cannot read {}: {error}", parent.display()))
            })?;
            parent.join(file.file_name().unwrap_or_default())
        }
        None => absolute,
    };
    let path = absolute
        .to_str()
        .ok_or_else(|| Failure::refused(format!("the path {} is not UTF-8", absolute.display())))?;
    let named: Cow<'_, str> = match is_gguf {
        true => gguf::stem(&absolute).into(),
        false => absolute.file_name().unwrap_or_default().to_string_lossy(),
    };
    let name = default_name(&named)?;
    Ok((ModelSource::Folder { path: path.to_owned() }, name))
}

/// A model of the hub. One of GGUF is called as its file is where that is said.
fn hub_model(model: HubName) -> Result<(ModelSource, DeploymentName), Failure> {
    let HubName { repo, revision, gguf } = model;
    let called = match &gguf {
        Some(file) if name::is_gguf(file) => default_name(gguf::stem(Path::new(file)))?,
        _ => default_name(repo.name())?,
    };
    let repo = repo.to_string();
    let source = match gguf {
        Some(file) => ModelSource::HubGguf { repo, revision, file },
        None => ModelSource::Hub { repo, revision },
    };
    Ok((source, called))
}

/// A folder's name with a dash for each character that a deployment's name cannot have.
fn default_name(folder: &str) -> Result<DeploymentName, Failure> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let name: String = folder
        .chars()
        .map(|c| if plain(c) { c } else { '-' })
        .skip_while(|c| !c.is_ascii_alphanumeric())
        .take(DeploymentName::LEN_MAX)
        .collect();
    let name = if name.is_empty() { "model".to_owned() } else { name };
    DeploymentName::new(name).map_err(|error| Failure::usage(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_named_by_its_absolute_path() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("tiny-1.5");
        std::fs::create_dir_all(model.join("sub")).unwrap();
        let (source, name) = source_of(Some(&model.join("sub/.."))).unwrap();
        let path = model.canonicalize().unwrap().to_str().unwrap().to_owned();
        assert_eq!(source, ModelSource::Folder { path });
        assert_eq!(name.as_str(), "tiny-1.5");
    }

    #[test]
    fn a_model_in_parts_is_named_by_its_first_whichever_is_given() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().canonicalize().unwrap().join(name);
        let blob = path("blob");
        std::fs::write(&blob, "GGUF").unwrap();
        // The hub's own cache has links with the names.
        for number in 1..=3 {
            let link = path(&format!("Big-Q4_K_M-0000{number}-of-00003.gguf"));
            std::os::unix::fs::symlink(&blob, link).unwrap();
        }
        let first = path("Big-Q4_K_M-00001-of-00003.gguf").to_str().unwrap().to_owned();
        for given in ["Big-Q4_K_M-00001-of-00003.gguf", "Big-Q4_K_M-00003-of-00003.gguf"] {
            let (source, name) = source_of(Some(&path(given))).unwrap();
            assert_eq!(source, ModelSource::Folder { path: first.clone() });
            assert_eq!(name.as_str(), "Big-Q4_K_M");
        }
        std::fs::write(path("fish-1.gguf"), "GGUF").unwrap();
        let (source, name) = source_of(Some(&path("fish-1.gguf"))).unwrap();
        let alone = path("fish-1.gguf").to_str().unwrap().to_owned();
        assert_eq!((source, name.as_str()), (ModelSource::Folder { path: alone }, "fish-1"));
    }

    #[test]
    fn what_every_build_knows_is_asked_in_words_that_every_build_knows() {
        let asked = |kv, stages: u32| {
            let (precision, mesh) = (None, MeshAsk::default());
            let stages = NonZeroU32::new(stages);
            let asked = Asked { stages, precision, kv, activations: None, replicas: 1, mesh };
            asked.call(default_name("m").unwrap(), source_of(None).unwrap().0)
        };
        for kv in [None, Some(KvPrecision::F32)] {
            assert!(matches!(asked(kv, 2), AdminCall::Deploy { stages: Some(2), .. }), "{kv:?}");
        }
        for (stages, words) in [(0, "KV bf16"), (2, "mesh 2x1, KV bf16")] {
            let AdminCall::DeployMesh { ask, .. } = asked(Some(KvPrecision::Bf16), stages) else {
                panic!("the old words have no room for it")
            };
            assert_eq!(ask.to_string(), words);
        }
    }

    #[test]
    fn what_is_no_folder_but_reads_like_one_is_a_model_of_the_hub() {
        for (text, repo, at, called) in [
            ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "main", "Qwen3-0.6B"),
            ("org/name@v1", "org/name", "v1", "name"),
        ] {
            let (source, name) = source_of(Some(Path::new(text))).unwrap();
            let (repo, revision) = (repo.to_owned(), at.to_owned());
            assert_eq!(source, ModelSource::Hub { repo, revision });
            assert_eq!(name.as_str(), called);
        }
        for (text, file, called) in [
            ("org/Big-GGUF:Q4_K_M", "Q4_K_M", "Big-GGUF"),
            ("org/Big-GGUF/Big-Q8_0.gguf", "Big-Q8_0.gguf", "Big-Q8_0"),
            (
                "org/Big-GGUF/F16/Big-F16-00001-of-00002.gguf",
                "F16/Big-F16-00001-of-00002.gguf",
                "Big-F16",
            ),
        ] {
            let (source, name) = source_of(Some(Path::new(text))).unwrap();
            let (repo, revision) = ("org/Big-GGUF".to_owned(), "main".to_owned());
            assert_eq!(source, ModelSource::HubGguf { repo, revision, file: file.to_owned() });
            assert_eq!(name.as_str(), called);
        }
        let url = "s3://bucket/folder/Big-Q8_0.gguf";
        assert_eq!(source_of(Some(Path::new(url))).unwrap().1.as_str(), "Big-Q8_0");
    }

    #[test]
    fn the_built_in_model_needs_no_name_and_has_one() {
        for model in [None, Some(Path::new("demo"))] {
            let (source, name) = source_of(model).unwrap();
            assert_eq!(source, ModelSource::Builtin { name: "demo".to_owned() });
            assert_eq!(name.as_str(), "demo");
        }
        // That is a path, and there is nothing under it.
        let failure = source_of(Some(Path::new("./demo/x"))).unwrap_err();
        assert!(failure.message.contains("built-in model `demo`"), "{failure}");
    }

    #[test]
    fn any_folder_gives_a_name() {
        for (folder, expected) in [
            ("Qwen3-0.6B", "Qwen3-0.6B"),
            ("my model (2)", "my-model--2-"),
            ("_x", "x"),
            ("模型", "model"),
            ("", "model"),
        ] {
            assert_eq!(default_name(folder).unwrap().as_str(), expected, "{folder:?}");
        }
        assert_eq!(default_name(&"x".repeat(300)).unwrap().as_str().len(), 96);
    }

    #[test]
    fn what_is_no_folder_is_refused_here() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (path, words) in [(file.path(), "is not a folder"), (Path::new("/no/such"), "/no/such")]
        {
            let failure = source_of(Some(path)).unwrap_err();
            assert_eq!(failure.exit, Exit::Refused);
            assert!(failure.message.contains(words), "{failure}");
        }
    }
}
