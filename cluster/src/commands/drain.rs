//! `shoal drain NODE…` and `shoal undrain NODE…`.

use std::time::Duration;

use shoal_protocol::admin::{AdminCall, AdminReply, ChangeView, ClusterView};
use shoal_protocol::id::NodeId;
use tokio::time::Instant;

use crate::args::{DrainArgs, UndrainArgs};
use crate::client::{AdminClient, Watch, unexpected};
use crate::failure::Failure;
use crate::output::table;

/// How long the plan may say that something cannot leave a worker before waiting is given up: a worker
/// that is being started again beside it is back within that.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often it is looked whether something cannot leave.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Moves everything off some workers, or shows what that would come to.
pub async fn run(args: DrainArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let nodes = each_once(&args.nodes);
    // Tried first: what is refused is said before anything is done, and what cannot move before it is found out by
    // waiting.
    let tried = try_all(&client, &nodes, true).await?;
    if args.dry_run {
        for (node, view) in nodes.iter().zip(&tried) {
            if nodes.len() > 1 {
                super::print(&format!("{node}, drained alone:\n"))?;
            }
            super::print(&table::change(view))?;
        }
        return Ok(());
    }
    let (marked_at, until) = (Instant::now(), Instant::now() + args.timeout);
    let mut failures = Failures::new(nodes.len());
    for node in &nodes {
        match mark(&client, *node, true).await {
            Ok(()) => eprintln!("{node}: nothing new is placed on it"),
            Err(failure) => failures.note(*node, failure),
        }
    }
    for (node, mut tried) in nodes.iter().zip(tried) {
        if failures.has(*node) {
            continue;
        }
        if nodes.len() > 1 {
            // Without the others there is less room.
            match try_one(&client, *node, true).await {
                Ok(view) => tried = view,
                Err(failure) => {
                    failures.note(*node, failure);
                    continue;
                }
            }
        }
        let stays = what_stays(&tried);
        stays.iter().for_each(|line| eprintln!("{node}: {line}"));
        if !args.wait {
            continue;
        }
        let patience = Patience { until, timeout: args.timeout, stuck_since: marked_at };
        match wait(&client, *node, patience, stays).await {
            Ok(()) => eprintln!("{node}: it holds nothing; it can be stopped"),
            Err(failure) => failures.note(*node, failure),
        }
    }
    client.close().await;
    failures.end("drained")
}

/// Lets workers hold something again.
pub async fn undo(args: UndrainArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let nodes = each_once(&args.nodes);
    try_all(&client, &nodes, false).await?;
    let mut failures = Failures::new(nodes.len());
    for node in &nodes {
        match mark(&client, *node, false).await {
            Ok(()) => eprintln!("{node}: it may hold something again"),
            Err(failure) => failures.note(*node, failure),
        }
    }
    client.close().await;
    failures.end("undrained")
}

/// Who was typed twice is meant once.
fn each_once(nodes: &[NodeId]) -> Vec<NodeId> {
    let mut once = Vec::new();
    for node in nodes {
        if !once.contains(node) {
            once.push(*node);
        }
    }
    once
}

/// What each by itself would come to. The first that is refused ends it, and nothing has changed.
async fn try_all(
    client: &AdminClient,
    nodes: &[NodeId],
    draining: bool,
) -> Result<Vec<ChangeView>, Failure> {
    let mut views = Vec::new();
    for node in nodes {
        views.push(try_one(client, *node, draining).await?);
    }
    Ok(views)
}

async fn try_one(
    client: &AdminClient,
    node: NodeId,
    draining: bool,
) -> Result<ChangeView, Failure> {
    match client.call(AdminCall::Drain { node, draining, dry_run: true }).await? {
        AdminReply::Change(view) => Ok(*view),
        other => Err(unexpected(&other)),
    }
}

async fn mark(client: &AdminClient, node: NodeId, draining: bool) -> Result<(), Failure> {
    match client.call(AdminCall::Drain { node, draining, dry_run: false }).await? {
        AdminReply::Accepted => Ok(()),
        other => Err(unexpected(&other)),
    }
}

/// Those of several with whom it did not work: the others are gone on with.
struct Failures {
    /// Of so many.
    all: usize,
    of: Vec<(NodeId, Failure)>,
}

impl Failures {
    fn new(all: usize) -> Self {
        Self { all, of: Vec::new() }
    }

    fn note(&mut self, node: NodeId, failure: Failure) {
        // One alone is said at the end.
        if self.all > 1 {
            eprintln!("{node}: {failure}");
        }
        self.of.push((node, failure));
    }

    fn has(&self, node: NodeId) -> bool {
        self.of.iter().any(|(failed, _)| *failed == node)
    }

    /// With the code of the first.
    fn end(self, what: &str) -> Result<(), Failure> {
        let (all, failed) = (self.all, self.of.len());
        let names: Vec<_> = self.of.iter().map(|(node, _)| node.to_string()).collect();
        match self.of.into_iter().next() {
            None => Ok(()),
            Some((_, failure)) if all == 1 => Err(failure),
            Some((_, failure)) => {
                let message = format!(
                    "{failed} of {all} are not {what}: {}; above it is said why",
                    names.join(", ")
                );
                Err(Failure { message, ..failure })
            }
        }
    }
}

/// What cannot be moved off it, and why: in the words of whoever planned it.
fn what_stays(tried: &ChangeView) -> Vec<String> {
    let lines = tried.explanation.iter().filter(|line| line.contains("cannot leave"));
    lines.map(|line| line.replace('\n', "; ")).collect()
}

/// How long is waited for one of them.
#[derive(Clone, Copy)]
struct Patience {
    /// The end of it, for all.
    until: Instant,
    /// What was asked for.
    timeout: Duration,
    /// Since when what stays has stayed.
    stuck_since: Instant,
}

/// Waits until a worker is in no layout and has let go of all shards. Gives up where the plan says for
/// `PATIENCE` that something cannot leave it: `stays` is what it says now.
async fn wait(
    client: &AdminClient,
    node: NodeId,
    patience: Patience,
    mut stays: Vec<String>,
) -> Result<(), Failure> {
    let Patience { until, timeout, mut stuck_since } = patience;
    // One that is empty already has not run out of time, whoever was waited for before.
    let until = until.max(Instant::now() + LOOK_EVERY);
    if stays.is_empty() {
        stuck_since = Instant::now();
    }
    let mut news = Box::pin(next(client.watch().await?));
    let mut last = String::new();
    let mut look = tokio::time::interval(LOOK_EVERY);
    loop {
        let view = tokio::select! {
            (watch, view) = &mut news => {
                news = Box::pin(next(watch));
                view?
            }
            () = tokio::time::sleep_until(until) => {
                let words = format!("{node} still holds something after {timeout:?}: {last}");
                return Err(Failure::failed(words));
            }
            _ = look.tick() => {
                let call = AdminCall::Drain { node, draining: true, dry_run: true };
                let AdminReply::Change(tried) = client.call(call).await? else { continue };
                let now_stays = what_stays(&tried);
                if now_stays != stays {
                    now_stays.iter().for_each(|line| eprintln!("{node}: {line}"));
                }
                if now_stays.is_empty() || stays.is_empty() {
                    stuck_since = Instant::now();
                }
                stays = now_stays;
                if stays.is_empty() || stuck_since.elapsed() < PATIENCE {
                    continue;
                }
                return Err(Failure::failed(format!(
                    "{node} cannot be drained, and waiting does not help: {}; it stays marked, and is \
                     emptied when that has changed (`shoal undrain {node}` takes the mark back)",
                    stays.join("; ")
                )));
            }
        };
        let Some(held) = held(&view, node) else { return Ok(()) };
        if held != last {
            eprintln!("{node}: {}", held.replace('\n', "; "));
            last = held;
        }
    }
}

/// The next view. It must be received whole, so this is not to be dropped half-way.
async fn next(mut watch: Watch) -> (Watch, Result<ClusterView, Failure>) {
    let view = watch.next().await;
    (watch, view)
}

/// What a worker still holds, and why; `None` where that is nothing.
fn held(view: &ClusterView, node: NodeId) -> Option<String> {
    let mut held: Vec<String> = Vec::new();
    for plan in view.plan.replicas.iter().filter(|plan| plan.nodes().any(|n| n == node)) {
        let replicas = view.deployments.iter().flat_map(|d| &d.replicas);
        let why = replicas.filter(|r| r.id == plan.id).map(|r| r.reason.as_str()).next();
        held.push(format!("{} of {}: {}", plan.id, plan.deployment, why.unwrap_or_default()));
    }
    let worker = view.workers.iter().find(|worker| worker.id == node);
    let shards = worker.filter(|w| w.connected).map_or(0, |worker| worker.shards.len());
    if held.is_empty() && shards > 0 {
        held.push(format!("{shards} shards are being let go"));
    }
    (!held.is_empty()).then(|| held.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Exit;

    #[test]
    fn of_several_those_are_named_with_whom_it_did_not_work() {
        let [w1, w2, w3] = [1, 2, 3].map(NodeId::worker);
        assert_eq!(each_once(&[w2, w1, w2, w3, w1]), [w2, w1, w3]);
        assert!(Failures::new(3).end("drained").is_ok());
        let mut one = Failures::new(1);
        one.note(w1, Failure::refused("no room"));
        assert_eq!(one.end("drained").unwrap_err().message, "no room");
        let mut two = Failures::new(3);
        two.note(w3, Failure::refused("no room"));
        two.note(w1, Failure::failed("gone"));
        assert!(two.has(w1) && !two.has(w2));
        let failure = two.end("drained").unwrap_err();
        assert_eq!(failure.exit, Exit::Refused);
        assert_eq!(failure.message, "2 of 3 are not drained: w3, w1; above it is said why");
    }
}
