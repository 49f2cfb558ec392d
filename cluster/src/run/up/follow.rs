//! What `up` does once the model is asked for: keeps the children alive and tells what changes.
//!
//! ```text
//! a death ─► a pause ─► started again      a view ─► progress, then the ready line, then changes
//!                                          a lost watch ─► a pause ─► another one
//! ```

use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use shoal_protocol::admin::ClusterView;
use shoal_protocol::id::DeploymentName;
use tokio::time::{Instant, sleep, sleep_until};

use super::child::{COORDINATOR, Ended, Family, Place};
use super::{changes, demo};
use crate::args::UpArgs;
use crate::client::{AdminClient, Watch};
use crate::failure::{Exit, Failure};
use crate::output::progress::{Progress, Stand, stand};
use crate::output::{json, table};

/// How long there may be no plan although all workers are there. A plan is made at once or not at
/// all; the rest is for reports that are under way.
const PLAN_TIMEOUT: Duration = Duration::from_secs(5);

/// How long after a lost watch the next one is tried.
const WATCH_RETRY: Duration = Duration::from_millis(250);

/// How often children may die before the model has ever been served. More is no accident.
const DEATHS_BEFORE_READY_MAX: u32 = 3;

/// A cluster whose processes run and whose model is asked for.
pub struct Follower<'a> {
    args: &'a UpArgs,
    family: &'a mut Family,
    name: DeploymentName,
    context: PathBuf,
    client: AdminClient,
    progress: Progress,
    /// The newest view.
    last: Option<ClusterView>,
    /// Since when there is no plan, although all children run.
    waiting_since: Option<Instant>,
    /// Children that have died, and when to start them again.
    respawns: Vec<(Instant, Place)>,
    deaths: u32,
    ready: bool,
}

/// What is heard of the cluster.
enum News {
    /// What it looks like now.
    View(Watch, Box<ClusterView>),
    /// The coordinator is gone or out of breath.
    Lost,
    /// It is there again.
    Back(Box<(AdminClient, Watch)>),
}

/// A view must be received whole, so the future lives on from turn to turn of the loop.
type NextNews = Pin<Box<dyn Future<Output = News>>>;

fn next_view(mut watch: Watch) -> NextNews {
    Box::pin(async move {
        match watch.next().await {
            Ok(view) => News::View(watch, Box::new(view)),
            Err(_) => News::Lost,
        }
    })
}

/// Tries until the coordinator answers: where it is dead it is started again meanwhile.
fn next_watch(context: PathBuf) -> NextNews {
    Box::pin(async move {
        loop {
            sleep(WATCH_RETRY).await;
            if let Ok(client) = AdminClient::open(Some(&context)).await
                && let Ok(watch) = client.watch().await
            {
                return News::Back(Box::new((client, watch)));
            }
        }
    })
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

impl<'a> Follower<'a> {
    /// Follows the deployment `name`, through the context file where the watch is lost.
    pub fn new(
        args: &'a UpArgs,
        family: &'a mut Family,
        name: DeploymentName,
        context: PathBuf,
        client: AdminClient,
    ) -> Self {
        Self {
            progress: Progress::new(name.clone()),
            args,
            family,
            name,
            context,
            client,
            last: None,
            waiting_since: None,
            respawns: Vec::new(),
            deaths: 0,
            ready: false,
        }
    }

    /// Ends when the cluster cannot go on, or after the demo's answer.
    pub async fn run(mut self) -> Result<(), Failure> {
        let mut news = next_view(self.client.watch().await?);
        loop {
            let respawn = self.respawns.iter().min().copied();
            let no_plan_at = self.waiting_since.map(|since| since + PLAN_TIMEOUT);
            tokio::select! {
                ended = self.family.ended() => self.mourn(ended)?,
                () = at(respawn.map(|(when, _)| when)) => {
                    self.respawns.retain(|r| Some(*r) != respawn);
                    if let Some((_, place)) = respawn {
                        self.start_again(place).await;
                    }
                }
                () = at(no_plan_at) => return Err(self.no_plan()),
                what = &mut news => match what {
                    News::View(watch, view) => {
                        news = next_view(watch);
                        if self.see(*view).await? {
                            return Ok(());
                        }
                    }
                    News::Lost => news = next_watch(self.context.clone()),
                    News::Back(back) => {
                        let (client, watch) = *back;
                        self.client = client;
                        news = next_view(watch);
                    }
                },
            }
        }
    }

    async fn start_again(&mut self, place: Place) {
        match self.family.start(place).await {
            Ok(_) => eprintln!("{}: started again", self.family.who(place)),
            // It has ended as well, and `ended` hears of it.
            Err(failure) => eprintln!("{failure}"),
        }
    }

    /// Takes a view, and says whether that was all.
    async fn see(&mut self, view: ClusterView) -> Result<bool, Failure> {
        let end = if self.ready {
            let lines = self.last.as_ref().map(|last| changes::changes(last, &view));
            lines.unwrap_or_default().iter().for_each(|line| eprintln!("{line}"));
            false
        } else {
            self.see_it_load(&view).await?
        };
        self.last = Some(view);
        Ok(end)
    }

    async fn see_it_load(&mut self, view: &ClusterView) -> Result<bool, Failure> {
        let stand = stand(view, &self.name);
        self.progress.show(&stand);
        self.waiting_since = match stand {
            Stand::Waiting(_) if self.respawns.is_empty() => {
                self.waiting_since.or_else(|| Some(Instant::now()))
            }
            _ => None,
        };
        match stand {
            Stand::Ready => {
                self.progress.end();
                self.ready = true;
                self.say_ready(view).await
            }
            Stand::Failed(why) => Err(Failure::refused(format!("{}: {why}", self.name))),
            // It is there, or will be in the next view.
            Stand::Absent | Stand::Waiting(_) | Stand::Loading { .. } => Ok(false),
        }
    }

    fn no_plan(&self) -> Failure {
        let why = match self.last.as_ref().map(|view| stand(view, &self.name)) {
            Some(Stand::Waiting(why)) => why,
            _ => "there is no plan".to_owned(),
        };
        Failure::refused(format!("{}: {why}", self.name))
    }

    /// A child has died: says so, and plans its next life.
    fn mourn(&mut self, ended: Ended) -> Result<(), Failure> {
        let who = self.family.who(ended.place).to_owned();
        let status = ended.status;
        let for_good = status.code() == Some(Exit::Refused as i32);
        if (self.args.no_respawn || for_good) && ended.place == COORDINATOR {
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
        } else if for_good {
            // It was removed: each further start would end so.
            let tail = self.family.tail(ended.place);
            eprintln!("{who} ended: {status}; it is not started again{tail}");
        } else {
            eprintln!("{who} ended: {status}; starting it again in {:?}", ended.again_in);
            self.respawns.push((Instant::now() + ended.again_in, ended.place));
        }
        Ok(())
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
