//! `shoal drain NODE` and `shoal undrain NODE`.

use std::time::Duration;

use shoal_protocol::admin::{AdminCall, AdminReply, ClusterView};
use shoal_protocol::id::NodeId;
use tokio::time::Instant;

use crate::args::{DrainArgs, UndrainArgs};
use crate::client::{AdminClient, unexpected};
use crate::failure::Failure;
use crate::output::table;

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
    for line in tried.explanation.iter().filter(|line| line.contains("cannot leave")) {
        eprintln!("{node}: {line}");
    }
    if args.wait {
        wait(&client, node, args.timeout).await?;
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

/// Waits until a worker is in no layout and has let go of all shards.
async fn wait(client: &AdminClient, node: NodeId, timeout: Duration) -> Result<(), Failure> {
    let until = Instant::now() + timeout;
    let mut watch = client.watch().await?;
    let mut last = String::new();
    loop {
        let late = || {
            let words = format!("{node} still holds something after {timeout:?}: {last}");
            Failure::failed(words)
        };
        let view = tokio::time::timeout_at(until, watch.next()).await.map_err(|_| late())??;
        let Some(held) = held(&view, node) else { return Ok(()) };
        if held != last {
            eprintln!("{node}: {}", held.replace('\n', "; "));
            last = held;
        }
    }
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
