//! `shoal status`.

use crate::args::StatusArgs;
use crate::client::AdminClient;
use crate::failure::Failure;
use crate::output::{json, table};

/// Shows the cluster.
pub async fn run(args: StatusArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let view = client.status().await?;
    client.close().await;
    if args.json {
        let line = json::line(&view).map_err(|error| Failure::failed(error.to_string()))?;
        return super::print(&format!("{line}\n"));
    }
    super::print(&table::status(&view))
}
