//! The processes that `up` starts: each announces itself, logs to a file, and ends with its lifeline.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader as StdBufReader};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinSet;

use super::backoff::Backoff;
use crate::failure::Failure;
use crate::run::announce::{Announcement, failure_of};

/// How long a child may take to announce itself: keys are made and, at a coordinator, a state is read.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How long children may take to drain after their lifelines were closed; then they are killed. More
/// than a child's own limit, and more than the coordinator and then the workers take that are well.
const STOP_TIMEOUT: Duration = Duration::from_secs(11);

/// How many of a log's last lines stand in an error.
const TAIL_LINES: usize = 8;

/// A child's place in the family.
pub type Place = usize;

/// The first child of the family.
pub const COORDINATOR: Place = 0;

/// How to start a child.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// What people call it: `coordinator`, `worker 2` until it has an identity, then `w2`.
    pub who: String,
    /// Verb and flags.
    pub arguments: Vec<String>,
    /// What only its owner may read of it.
    pub environment: Vec<(&'static str, String)>,
    /// Where its log goes.
    pub log: PathBuf,
}

/// A child that has ended.
#[derive(Debug)]
pub struct Ended {
    /// Which.
    pub place: Place,
    /// How.
    pub status: ExitStatus,
    /// When to start it again.
    pub again_in: Duration,
}

#[derive(Debug)]
struct Member {
    recipe: Recipe,
    /// The child ends when this is dropped.
    lifeline: Option<ChildStdin>,
    started: Instant,
    backoff: Backoff,
}

/// All children of one `up`. Dropping it kills those that are left.
#[derive(Debug, Default)]
pub struct Family {
    members: Vec<Member>,
    running: JoinSet<(Place, ExitStatus)>,
}

impl Family {
    /// Starts another child and waits until it has announced itself.
    pub async fn add(&mut self, recipe: Recipe) -> Result<(Place, Announcement), Failure> {
        let place = self.members.len();
        let backoff = Backoff::default();
        self.members.push(Member { recipe, lifeline: None, started: Instant::now(), backoff });
        let announcement = self.start(place).await?;
        if let Announcement::Worker { id } = &announcement {
            self.members[place].recipe.who = id.to_string();
        }
        Ok((place, announcement))
    }

    /// Starts a child again that has ended.
    pub async fn start(&mut self, place: Place) -> Result<Announcement, Failure> {
        let member = &mut self.members[place];
        let who = member.recipe.who.clone();
        let failed = |why: String| Failure::failed(format!("{who}: {why}"));
        let mut child = spawn(&member.recipe).map_err(|e| failed(format!("cannot start: {e}")))?;
        member.started = Instant::now();
        member.lifeline = child.stdin.take();
        let stdout = child.stdout.take().ok_or_else(|| failed("it has no stdout".to_owned()))?;
        self.running.spawn(async move { (place, wait(child).await) });
        let mut line = String::new();
        let mut stdout = BufReader::new(stdout);
        let read = tokio::time::timeout(START_TIMEOUT, stdout.read_line(&mut line)).await;
        if !matches!(read, Ok(Ok(1..))) || serde_json::from_str::<Announcement>(&line).is_err() {
            // It is of no use: without its lifeline it ends, and `ended` hears of it.
            self.members[place].lifeline = None;
        }
        let log = &self.members[place].recipe.log;
        match read {
            Err(_) => {
                Err(failed(format!("it did not start within {START_TIMEOUT:?}{}", tail(log))))
            }
            Ok(Err(error)) => Err(failed(format!("its announcement was lost: {error}"))),
            Ok(Ok(0)) => Err(failed(format!("it ended before it had started{}", tail(log)))),
            Ok(Ok(_)) => match serde_json::from_str(&line) {
                Ok(Announcement::Failed { exit, message }) => Err(failure_of(&who, exit, &message)),
                Ok(announcement) => Ok(announcement),
                Err(error) => Err(failed(format!("its announcement cannot be read: {error}"))),
            },
        }
    }

    /// Waits until a child ends. It never returns while none runs.
    pub async fn ended(&mut self) -> Ended {
        loop {
            match self.running.join_next().await {
                Some(Ok((place, status))) => {
                    let member = &mut self.members[place];
                    member.lifeline = None;
                    let again_in = member.backoff.after(member.started.elapsed());
                    return Ended { place, status, again_in };
                }
                // The tasks neither panic nor are they aborted before `stop`.
                Some(Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }

    /// What people call a child.
    pub fn who(&self, place: Place) -> &str {
        &self.members[place].recipe.who
    }

    /// The last lines of a child's log, as a sentence's end.
    pub fn tail(&self, place: Place) -> String {
        tail(&self.members[place].recipe.log)
    }

    /// Sets what a child is started again with.
    pub fn set_arguments(&mut self, place: Place, arguments: Vec<String>) {
        self.members[place].recipe.arguments = arguments;
    }

    /// Lets go of all lifelines, waits until all children have drained, and kills those that take too
    /// long or as soon as `hurry` resolves. The coordinator first: its streams finish, or end with
    /// words, while the workers are there; then these have nothing left to finish.
    pub async fn stop(&mut self, hurry: impl Future<Output = &'static str>) {
        let drained = async {
            let coordinator = self.members.first_mut().and_then(|member| member.lifeline.take());
            let mut runs = coordinator.is_some();
            drop(coordinator);
            while runs {
                let ended = self.running.join_next().await;
                runs = ended.is_some_and(|ended| !matches!(ended, Ok((COORDINATOR, _))));
            }
            self.members.clear();
            while self.running.join_next().await.is_some() {}
        };
        let in_time = tokio::select! {
            finished = tokio::time::timeout(STOP_TIMEOUT, drained) => finished.is_ok(),
            why = hurry => {
                eprintln!("{why} again; ending at once");
                false
            }
        };
        if !in_time {
            self.members.clear();
            // The children are killed when the tasks that own them are dropped.
            self.running.shutdown().await;
        }
    }
}

fn spawn(recipe: &Recipe) -> std::io::Result<Child> {
    let log: File = OpenOptions::new().create(true).append(true).open(&recipe.log)?;
    Command::new(std::env::current_exe()?)
        .args(&recipe.arguments)
        .args(["--lifeline", "--announce"])
        .envs(recipe.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        // A Ctrl-C at the terminal is for `up` alone, which then drains its children in order.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

async fn wait(mut child: Child) -> ExitStatus {
    loop {
        // It fails only where the child was reaped by somebody else, and nobody else knows of it.
        if let Ok(status) = child.wait().await {
            return status;
        }
        tokio::task::yield_now().await;
    }
}

/// The last lines of a log, indented under a colon.
fn tail(log: &Path) -> String {
    let Ok(file) = File::open(log) else { return String::new() };
    let mut last = VecDeque::with_capacity(TAIL_LINES + 1);
    for line in StdBufReader::new(file).lines().map_while(Result::ok) {
        last.push_back(line);
        if last.len() > TAIL_LINES {
            last.pop_front();
        }
    }
    if last.is_empty() {
        return String::new();
    }
    let lines: Vec<String> = last.into_iter().map(|line| format!("\n  {line}")).collect();
    format!("; its log ends with:{}", lines.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_quoted_from_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        assert_eq!(tail(&log), "");
        let lines: Vec<String> = (0..20).map(|n| format!("line {n}\n")).collect();
        std::fs::write(&log, lines.concat()).unwrap();
        let said = tail(&log);
        assert!(said.ends_with("\n  line 18\n  line 19") && !said.contains("line 11\n"), "{said}");
    }
}
