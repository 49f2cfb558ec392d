//! `shoal drain NODE` and `shoal undrain NODE`.

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

/// Moves everything off a worker, or shows what that would come to.
pub async fn run(args: DrainArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let node = args.node;
    let call = |dry_run| AdminCall::Drain { node, draining: true, dry_run };
    // Tried first: what cannot move is said before it is found out by waiting.
    let tried = match client.call(call(true)).await? {
        AdminReply::Change(view) => view,
        other => return Err(unexpected(&other)),
    };
    if args.dry_run {
        return super::print(&table::change(&tried));
    }
    match client.call(call(false)).await? {
        AdminReply::Accepted => eprintln!("{node}: nothing new is placed on it"),
        other => return Err(unexpected(&other)),
    }
    let stays = what_stays(&tried);
    stays.iter().for_each(|line| eprintln!("{node}: {line}"));
    if args.wait {
        wait(&client, node, args.timeout, stays).await?;
        eprintln!("{node}: it holds nothing; it can be stopped");
    }
    client.close().await;
    Ok(())
}

/// Lets a worker hold something again.
pub async fn undo(args: UndrainArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let call = AdminCall::Drain { node: args.node, draining: false, dry_run: false };
    match client.call(call).await? {
        AdminReply::Accepted => {
            client.close().await;
            eprintln!("{}: it may hold something again", args.node);
            Ok(())
        }
        other => Err(unexpected(&other)),
    }
}

/// What cannot be moved off it, and why: in the words of whoever planned it.
fn what_stays(tried: &ChangeView) -> Vec<String> {
    let lines = tried.explanation.iter().filter(|line| line.contains("cannot leave"));
    lines.map(|line| line.replace('\n', "; ")).collect()
}

/// Waits until a worker is in no layout and has let go of all shards. Gives up where the plan says for
/// `PATIENCE` that something cannot leave it: `stays` is what it says now.
async fn wait(
    client: &AdminClient,
    node: NodeId,
    timeout: Duration,
    mut stays: Vec<String>,
) -> Result<(), Failure> {
    let until = Instant::now() + timeout;
    let mut news = Box::pin(next(client.watch().await?));
    let mut last = String::new();
    let mut stuck_since = Instant::now();
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
