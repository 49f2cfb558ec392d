//! `shoal scale NAME`: asks for it, and waits until it is so.

use std::num::NonZeroU32;
use std::time::Duration;

use shoal_protocol::admin::{AdminCall, AdminReply, ClusterView};

use super::rollout;
use crate::args::ScaleArgs;
use crate::client::{AdminClient, unexpected};
use crate::failure::Failure;
use crate::output::table;

/// How long to wait: the weights of a large model take a while.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// Changes how a model is served, or shows what that would come to.
pub async fn run(args: ScaleArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let before = client.status().await?;
    super::check_exists(&args.name, &before)?;
    let name = args.name.clone();
    let asked = |view: &ClusterView| {
        view.deployments.iter().find(|d| d.name == name).map_or(0, |d| d.asked)
    };
    let before = asked(&before);
    let call = AdminCall::Scale {
        name: args.name,
        replicas: args.replicas.map(NonZeroU32::get),
        stages: args.stages.unwrap_or_default(),
        dry_run: args.dry_run,
    };
    match client.call(call).await? {
        AdminReply::Accepted => eprintln!("{name}: accepted"),
        AdminReply::Change(view) => return super::print(&table::change(&view)),
        other => return Err(unexpected(&other)),
    }
    if args.no_wait {
        client.close().await;
        return Ok(());
    }
    // What is shown after the acceptance has it in; what was shown before may have been older than the
    // change before this one, which is not to be taken for this one.
    let before = before.max(asked(&client.status().await?).saturating_sub(1));
    let view = rollout::wait(&client, &name, before, TIMEOUT).await?;
    client.close().await;
    eprintln!("{name}: as was asked for");
    super::print(&table::stages(&view, |d| d.name == name).to_string())
}
