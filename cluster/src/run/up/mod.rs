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
mod share;

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use shoal_protocol::admin::{AdminCall, AdminReply, ClusterView};
use shoal_protocol::id::{DeploymentName, Role};
use shoal_protocol::plan::ModelSource;
use tokio::time::{Instant, sleep_until, timeout};

use self::child::{Ended, Family, Place, Recipe};
use self::folder::Folder;
use super::announce::Announcement;
use super::stop::Stop;
use crate::args::UpArgs;
use crate::client::{AdminClient, Watch, unexpected};
use crate::commands::deploy::source_of;
use crate::failure::Failure;
use crate::output::progress::{Progress, Stand, stand};
use crate::output::{json, table};
use crate::registry::{Entry, Registry};

/// How long workers that have joined may take to open their control links.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);

/// How long there may be no plan although all workers are there. A plan is made at once or not at
/// all; the rest is for reports that are under way.
const PLAN_TIMEOUT: Duration = Duration::from_secs(5);

/// How long after a lost watch the next one is tried.
const WATCH_RETRY: Duration = Duration::from_millis(250);

/// How often children may die before the model has ever been served. More is no accident.
const DEATHS_BEFORE_READY_MAX: u32 = 3;

/// How long the workers' token is good for: they are started at once.
const TOKEN_LIFE_S: u64 = 600;

/// Runs the cluster until it is told to stop, or cannot go on.
pub async fn run(args: UpArgs) -> Result<(), Failure> {
    let mut stop = Stop::listen(false)?;
    let started_ms = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
    let model = source_of(args.model.as_deref())?;
    let folder = Folder::prepare(args.data.as_deref(), started_ms)?;
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

/// A cluster whose processes run.
struct Up<'a> {
    args: &'a UpArgs,
    family: &'a mut Family,
    name: DeploymentName,
    context: PathBuf,
    client: AdminClient,
    /// Children that have died, and when to start them again.
    respawns: Vec<(Instant, Place)>,
    deaths: u32,
    ready: bool,
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
    let mut up =
        Up { args, family, name, context, client, respawns: Vec::new(), deaths: 0, ready: false };
    up.deploy(source).await?;
    up.follow().await
}

async fn start_coordinator(
    args: &UpArgs,
    folder: &Folder,
    family: &mut Family,
) -> Result<PathBuf, Failure> {
    let arguments = |listen: String, cluster: String| {
        let data = folder.data("coordinator").to_string_lossy().into_owned();
        ["coordinator", "--data", &data, "--listen", &listen, "--cluster", &cluster]
            .map(str::to_owned)
            .to_vec()
    };
    let recipe = Recipe {
        who: "coordinator".to_owned(),
        arguments: arguments(args.listen.to_string(), "127.0.0.1:0".to_owned()),
        environment: Vec::new(),
        log: folder.log("coordinator"),
    };
    match family.add(recipe).await? {
        (place, Announcement::Coordinator { id, api, cluster, context }) => {
            eprintln!("{id}: takes requests at {}", json::url(api));
            // Started again it must be found where it was.
            family.set_arguments(place, arguments(api.to_string(), cluster.to_string()));
            Ok(context)
        }
        _ => Err(Failure::failed("the coordinator announced itself as something else")),
    }
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
        .or_else(|| share::free_memory().map(|free| share::memory(free, args.workers)));
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

impl Up<'_> {
    /// Asks for the deployment. What was typed wins over what an earlier run left under the name.
    async fn deploy(&mut self, source: ModelSource) -> Result<(), Failure> {
        if self.client.status().await?.deployments.iter().any(|d| d.name == self.name) {
            self.accepted(AdminCall::Undeploy { name: self.name.clone() }).await?;
        }
        self.accepted(AdminCall::Deploy {
            name: self.name.clone(),
            source,
            stages: self.args.stages.map(NonZeroU32::get),
            precision: self.args.precision,
        })
        .await
    }

    async fn accepted(&self, call: AdminCall) -> Result<(), Failure> {
        match self.client.call(call).await? {
            AdminReply::Accepted => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Keeps the children alive and tells what changes; ends when the cluster cannot go on, or after
    /// the demo's answer.
    async fn follow(&mut self) -> Result<(), Failure> {
        let mut progress = Progress::new(self.name.clone());
        let mut last: Option<ClusterView> = None;
        let mut waiting_since: Option<Instant> = None;
        let mut next = next_view(self.client.watch().await?);
        let mut watch_again_at: Option<Instant> = None;
        loop {
            let respawn = self.respawns.iter().min().copied();
            let respawn_at = respawn.map_or_else(Instant::now, |(at, _)| at);
            let no_plan_at = waiting_since.map(|since| since + PLAN_TIMEOUT);
            tokio::select! {
                ended = self.family.ended() => self.mourn(ended)?,
                () = sleep_until(respawn_at), if respawn.is_some() => {
                    self.respawns.retain(|r| Some(*r) != respawn);
                    if let Some((_, place)) = respawn {
                        match self.family.start(place).await {
                            Ok(_) => eprintln!("{}: started again", self.family.who(place)),
                            // It has ended as well, and `ended` hears of it.
                            Err(failure) => eprintln!("{failure}"),
                        }
                    }
                }
                () = sleep_until(watch_again_at.unwrap_or_else(Instant::now)), if watch_again_at.is_some() => {
                    watch_again_at = match self.watch_again().await {
                        Ok(watch) => {
                            next = next_view(watch);
                            None
                        }
                        Err(_) => Some(Instant::now() + WATCH_RETRY),
                    };
                }
                () = sleep_until(no_plan_at.unwrap_or_else(Instant::now)), if no_plan_at.is_some() => {
                    let why = match last.as_ref().map(|view| stand(view, &self.name)) {
                        Some(Stand::Waiting(why)) => why,
                        _ => "there is no plan".to_owned(),
                    };
                    return Err(Failure::refused(format!("{}: {why}", self.name)));
                }
                (watch, view) = &mut next => match view {
                    Ok(view) => {
                        next = next_view(watch);
                        let stand = stand(&view, &self.name);
                        if self.ready {
                            let lines = last.as_ref().map(|last| changes::changes(last, &view));
                            lines.unwrap_or_default().iter().for_each(|line| eprintln!("{line}"));
                        } else {
                            progress.show(&stand);
                            waiting_since = match stand {
                                Stand::Waiting(_) if self.respawns.is_empty() => {
                                    waiting_since.or_else(|| Some(Instant::now()))
                                }
                                _ => None,
                            };
                            match stand {
                                Stand::Ready => {
                                    progress.end();
                                    self.ready = true;
                                    if self.say_ready(&view).await? {
                                        return Ok(());
                                    }
                                }
                                Stand::Failed(why) => {
                                    return Err(Failure::refused(format!("{}: {why}", self.name)));
                                }
                                // It is there, or will be in the next view.
                                Stand::Absent | Stand::Waiting(_) | Stand::Loading { .. } => {}
                            }
                        }
                        last = Some(view);
                    }
                    // The coordinator is gone or out of breath: what it says next is heard.
                    Err(_) => {
                        next = Box::pin(std::future::pending());
                        watch_again_at = Some(Instant::now() + WATCH_RETRY);
                    }
                },
            }
        }
    }

    /// A child has died: says so, and plans its next life.
    fn mourn(&mut self, ended: Ended) -> Result<(), Failure> {
        let who = self.family.who(ended.place).to_owned();
        let status = ended.status;
        if self.args.no_respawn && ended.place == COORDINATOR {
            return Err(Failure::failed(format!(
                "{who} ended: {status}{}",
                self.family.tail(ended.place)
            )));
        }
        if !self.ready {
            self.deaths += 1;
            if self.args.no_respawn || self.deaths >= DEATHS_BEFORE_READY_MAX {
                return Err(Failure::failed(format!(
                    "{who} ended before {} was ready: {status}{}",
                    self.name,
                    self.family.tail(ended.place)
                )));
            }
        }
        if self.args.no_respawn {
            eprintln!("{who} ended: {status}; it is not started again (--no-respawn)");
        } else {
            eprintln!("{who} ended: {status}; starting it again in {:?}", ended.again_in);
            self.respawns.push((Instant::now() + ended.again_in, ended.place));
        }
        Ok(())
    }

    async fn watch_again(&mut self) -> Result<Watch, Failure> {
        self.client = AdminClient::open(Some(&self.context)).await?;
        self.client.watch().await
    }

    /// The ready line, and in the demo the question; says whether that was all.
    async fn say_ready(&self, view: &ClusterView) -> Result<bool, Failure> {
        let ready = json::ready(view, &self.name, &self.context)
            .ok_or_else(|| Failure::failed(format!("{} is ready without a plan", self.name)))?;
        if self.args.json {
            let line = json::line(&ready).map_err(|error| Failure::failed(error.to_string()))?;
            crate::commands::print(&format!("{line}\n"))?;
            return Ok(false);
        }
        if self.args.demo {
            return demo::show(&self.client, &ready.url, &self.name).await;
        }
        let stages = table::stages(view, |d| d.name == self.name).to_string();
        eprintln!("\n{stages}");
        crate::commands::print(&format!(
            "ready: {} ({}, generation {}) at {}/v1\n",
            self.name, ready.mesh, ready.generation, ready.url
        ))?;
        eprintln!("talk to it: shoal chat    look at it: shoal status    stop: Ctrl-C");
        Ok(false)
    }
}

/// The first child of the family.
const COORDINATOR: Place = 0;

/// A view must be received whole, so the future lives on from turn to turn of the loop.
type NextView = Pin<Box<dyn Future<Output = (Watch, Result<ClusterView, Failure>)>>>;

fn next_view(mut watch: Watch) -> NextView {
    Box::pin(async move {
        let view = watch.next().await;
        (watch, view)
    })
}
