//! `shoal plan NAME`.

use shoal_protocol::admin::{AdminCall, AdminReply};

use crate::args::PlanArgs;
use crate::client::{AdminClient, unexpected};
use crate::failure::Failure;
use crate::output::table;

/// Shows a deployment's plan.
pub async fn run(args: PlanArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    super::check_exists(&args.name, &client.status().await?)?;
    let reply = client.call(AdminCall::ExplainPlan { name: args.name }).await?;
    client.close().await;
    match reply {
        AdminReply::Plan(view) => super::print(&table::plan(&view, args.explain)),
        other => Err(unexpected(&other)),
    }
}
