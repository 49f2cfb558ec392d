//! `shoal status`.

use crate::args::StatusArgs;
use crate::client::AdminClient;
use crate::failure::Failure;
use crate::output::coordinators::Status;
use crate::output::table;

/// Shows the cluster.
pub async fn run(args: StatusArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let view = client.status().await?;
    let presence = client.presence().await;
    client.close().await;
    match args.json {
        true => super::print_json(&Status::new(&view, presence.as_ref())),
        false => super::print(&table::status(&view, presence.as_ref())),
    }
}
