//! `shoal undeploy NAME`.

use shoal_protocol::admin::{AdminCall, AdminReply};

use crate::args::UndeployArgs;
use crate::client::{AdminClient, unexpected};
use crate::failure::Failure;

/// Stops serving a model.
pub async fn run(args: UndeployArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    super::check_exists(&args.name, &client.status().await?)?;
    let reply = client.call(AdminCall::Undeploy { name: args.name.clone() }).await?;
    client.close().await;
    match reply {
        AdminReply::Accepted => {
            eprintln!("{} is no longer served", args.name);
            Ok(())
        }
        other => Err(unexpected(&other)),
    }
}
