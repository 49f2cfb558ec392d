//! `shoal scale NAME`: asks for it, and waits until it is so.

use std::num::NonZeroU32;
use std::time::Duration;

use shoal_protocol::admin::{AdminCall, AdminReply, ClusterView};
use shoal_protocol::mesh::{Mesh, MeshAsk, MeshAsked};
use shoal_protocol::plan::StagesAsked;

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
    let (replicas, dry_run) = (args.replicas.map(NonZeroU32::get), args.dry_run);
    let mut ask = MeshAsk::from(args.mesh);
    let call = match (ask.is_empty(), args.stages) {
        (true, stages) => {
            let stages = stages.unwrap_or_default();
            AdminCall::Scale { name: args.name, replicas, stages, dry_run }
        }
        (false, stages) => {
            // A number of stages beside an objective is that of a mesh with one rank.
            ask.mesh = ask.mesh.or(match stages {
                Some(StagesAsked::Exactly(stages)) => {
                    Some(MeshAsked::Exactly(Mesh { stages, ranks: 1 }))
                }
                Some(StagesAsked::Auto) => Some(MeshAsked::Auto),
                Some(StagesAsked::Same) | None => None,
            });
            AdminCall::ScaleMesh { name: args.name, replicas, ask, dry_run }
        }
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
