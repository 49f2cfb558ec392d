//! `shoal up`: a whole cluster on this machine, as separate processes.
//!
//! ```text
//! folder ─► coordinator ─► token ─► worker 1 … n ─► all joined? ─► deploy ─► ready line ─► serve ─► stop
//!             (child)                 (children)                                │
//!                          a death: started again after a while ◄───────────────┘
//! ```
//!
//! A child ends when its stdin closes, so that none outlives `up`, however `up` ends. `up` itself
//! holds no model and answers no request.

mod backoff;
mod changes;
mod child;
mod demo;
mod folder;
mod follow;
mod share;

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use shoal_protocol::admin::{AdminCall, AdminReply};
use shoal_protocol::id::{DeploymentName, Role};
use shoal_protocol::mesh::MeshAsk;
use shoal_protocol::model::Checkpoint;
use shoal_protocol::plan::ModelSource;
use tokio::time::timeout;

use self::child::{Family, Recipe};
use self::folder::Folder;
use self::follow::Follower;
use super::announce::Announcement;
use super::lock;
use super::stop::Stop;
use crate::args::UpArgs;
use crate::client::{AdminClient, unexpected};
use crate::commands::deploy::{Asked, source_of};
use crate::failure::Failure;
use crate::output::json;
use crate::registry::{Entry, Registry};

/// How long workers that have joined may take to open their control links.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the workers' token is good for: they are started at once.
const TOKEN_LIFE_S: u64 = 600;

/// Runs the cluster until it is told to stop, or cannot go on.
pub async fn run(args: UpArgs) -> Result<(), Failure> {
    let mut stop = Stop::listen(false)?;
    let started_ms = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
    let model = source_of(args.model.as_deref())?;
    let source = model.0.clone();
    tokio::select! {
        // It blocks on the disk, which may be another machine's.
        checked = tokio::task::spawn_blocking(move || check(&source)) => {
            checked.map_err(|error| Failure::failed(format!("reading the model: {error}")))??;
        }
        _ = stop.requested() => return Ok(()),
    }
    let folder = tokio::select! {
        prepared = Folder::prepare(args.data.as_deref(), started_ms, lock::PATIENCE) => prepared?,
        _ = stop.requested() => return Ok(()),
    };
    eprintln!("logs: {}", folder.logs().display());
    let mut family = Family::default();
    let outcome = tokio::select! {
        outcome = serve(&args, model, &folder, started_ms, &mut family) => outcome,
        why = stop.requested() => {
            eprintln!("{why}; stopping");
            Ok(())
        }
    };
    family.stop(stop.requested()).await;
    outcome
}

/// What the coordinator would refuse is refused before anything is started for it.
fn check(source: &ModelSource) -> Result<(), Failure> {
    let ModelSource::Folder { path } = source else { return Ok(()) };
    let opened = Checkpoint::open(Path::new(path)).and_then(|model| model.check_tokenizer());
    let opened = opened.map(drop);
    opened.map_err(|error| Failure::refused(error.to_string()))
}

async fn serve(
    args: &UpArgs,
    (source, name): (ModelSource, DeploymentName),
    folder: &Folder,
    started_ms: u64,
    family: &mut Family,
) -> Result<(), Failure> {
    let context = start_coordinator(args, folder, family).await?;
    let client = AdminClient::open(Some(&context)).await?;
    // Found from now on, so that `shoal status` can watch it load.
    let registry = Registry::of_user();
    let _registration = registry.and_then(|registry| {
        // Those that were killed could not clear up after themselves.
        let _ = registry.running();
        let scratch = folder.scratch().map(Path::to_owned);
        let context = context.clone();
        let registered =
            registry.register(&Entry { pid: std::process::id(), started_ms, context, scratch });
        registered.inspect_err(|error| eprintln!("operator verbs need --context: {error}")).ok()
    });
    start_workers(args, folder, family, &client).await?;
    deploy(args, &client, source, &name).await?;
    Follower::new(args, family, name, context, client).run().await
}

async fn start_coordinator(
    args: &UpArgs,
    folder: &Folder,
    family: &mut Family,
) -> Result<PathBuf, Failure> {
    let arguments = |listen: String, cluster: String| {
        let data = folder.data("coordinator").to_string_lossy().into_owned();
        let policy = args.routing.policy.name();
        let affinity = args.routing.prefix_affinity.then_some("--prefix-affinity");
        let adapters = args.adapters.allow_runtime_adapters.then_some("--allow-runtime-adapters");
        ["coordinator", "--data", &data, "--listen", &listen, "--cluster", &cluster]
            .into_iter()
            .chain(["--policy", policy])
            .chain(affinity)
            .chain(adapters)
            .map(str::to_owned)
            .chain(trace_flag(args))
            .collect()
    };
    let recipe = Recipe {
        who: "coordinator".to_owned(),
        arguments: arguments(args.listen.to_string(), "127.0.0.1:0".to_owned()),
        environment: Vec::new(),
        log: folder.log("coordinator"),
    };
    match family.add(recipe).await? {
        (place, Announcement::Coordinator { id, api, cluster, context }) => {
            eprintln!("{id}: takes requests at {}", json::url(api, false));
            // Started again it must be found where it was.
            family.set_arguments(place, arguments(api.to_string(), cluster.to_string()));
            Ok(context)
        }
        _ => Err(Failure::failed("the coordinator announced itself as something else")),
    }
}

/// The environment they have from us; the flag they need to be told.
fn trace_flag(args: &UpArgs) -> impl Iterator<Item = String> + use<> {
    let url = args.trace.otlp.as_ref().map(ToString::to_string);
    url.into_iter().flat_map(|url| ["--otlp".to_owned(), url])
}

async fn start_workers(
    args: &UpArgs,
    folder: &Folder,
    family: &mut Family,
    client: &AdminClient,
) -> Result<(), Failure> {
    let uses = args.workers.get();
    let call = AdminCall::CreateToken { role: Role::Worker, uses, expires_s: TOKEN_LIFE_S };
    let token = match client.call(call).await? {
        AdminReply::Token { token } => token,
        other => return Err(unexpected(&other)),
    };
    let memory = args
        .worker_memory
        .or_else(|| share::free_memory().map(|free| share::memory(free, args.workers)))
        // A worker that finds nothing free says so with words.
        .filter(|share| share.0 > 0);
    let cores =
        std::thread::available_parallelism().ok().and_then(|n| NonZeroU32::try_from(n).ok());
    let threads = args
        .worker_threads
        .unwrap_or_else(|| share::threads(cores.unwrap_or(NonZeroU32::MIN), args.workers));
    for number in 1..=uses {
        let name = format!("worker-{number}");
        let data = folder.data(&name).to_string_lossy().into_owned();
        let (join, threads) = (client.address().to_string(), threads.to_string());
        let mut arguments = ["worker", "--join", &join, "--data", &data, "--threads", &threads]
            .map(str::to_owned)
            .to_vec();
        if let Some(memory) = memory {
            arguments.extend(["--memory".to_owned(), memory.0.to_string()]);
        }
        arguments.extend(trace_flag(args));
        let recipe = Recipe {
            who: format!("worker {number}"),
            arguments,
            environment: vec![("SHOAL_TOKEN", token.clone())],
            log: folder.log(&name),
        };
        match family.add(recipe).await? {
            (_, Announcement::Worker { .. }) => {}
            _ => return Err(Failure::failed("a worker announced itself as something else")),
        }
    }
    wait_until_joined(client, args.workers).await
}

async fn wait_until_joined(client: &AdminClient, workers: NonZeroU32) -> Result<(), Failure> {
    let mut watch = client.watch().await?;
    let joined = async {
        loop {
            let view = watch.next().await?;
            let connected: Vec<String> =
                view.workers.iter().filter(|w| w.connected).map(|w| w.id.to_string()).collect();
            if connected.len() >= workers.get() as usize {
                eprintln!("{}: joined", connected.join(", "));
                return Ok(());
            }
        }
    };
    timeout(JOIN_TIMEOUT, joined).await.unwrap_or_else(|_| {
        Err(Failure::failed(format!("not all of {workers} workers joined within {JOIN_TIMEOUT:?}")))
    })
}

/// Asks for the deployment. What was typed wins over what an earlier run left under the name; what
/// that left under other names is served too, and said.
async fn deploy(
    args: &UpArgs,
    client: &AdminClient,
    source: ModelSource,
    name: &DeploymentName,
) -> Result<(), Failure> {
    let view = client.status().await?;
    if view.deployments.iter().any(|d| d.name == *name) {
        accepted(client, AdminCall::Undeploy { name: name.clone() }).await?;
    }
    let others: Vec<&str> =
        view.deployments.iter().filter(|d| d.name != *name).map(|d| d.name.as_str()).collect();
    if let Some(first) = others.first() {
        eprintln!(
            "also served, as an earlier run on this data folder left them: {}; `shoal undeploy \
             {first}` ends that",
            others.join(", ")
        );
    }
    let asked = Asked {
        stages: args.stages,
        precision: args.precision,
        kv: args.kv,
        activations: args.activations,
        replicas: 1,
        mesh: MeshAsk::from(args.mesh),
    };
    accepted(client, asked.call(name.clone(), source)).await
}

async fn accepted(client: &AdminClient, call: AdminCall) -> Result<(), Failure> {
    match client.call(call).await? {
        AdminReply::Accepted => Ok(()),
        other => Err(unexpected(&other)),
    }
}
