//! `shoal upgrade status | finish`.

use shoal_protocol::admin::{AdminCall, AdminReply};
use shoal_protocol::upgrade::{UpgradeCall, UpgradeView};

use crate::args::UpgradeCommand;
use crate::client::{AdminClient, unexpected};
use crate::failure::{Exit, Failure};
use crate::output::upgrade;

/// Does what was typed.
pub async fn run(command: UpgradeCommand) -> Result<(), Failure> {
    let (args, call) = match command {
        UpgradeCommand::Status(args) => (args, UpgradeCall::Status),
        UpgradeCommand::Finish(args) => (args, UpgradeCall::Finish),
    };
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let reply = client.call(AdminCall::Upgrade(call)).await;
    client.close().await;
    let view: UpgradeView = match reply {
        Ok(AdminReply::Upgrade(view)) => view,
        Ok(other) => return Err(unexpected(&other)),
        // One of version 1 ends the conversation at a question that it does not know.
        Err(failure) if failure.exit == Exit::Unreachable => {
            let words = format!(
                "{}; a coordinator of an older build does not know this question: upgrade it, or ask another",
                failure.message
            );
            return Err(Failure::unreachable(words));
        }
        Err(failure) => return Err(failure),
    };
    match (args.json, call) {
        (true, _) => super::print_json(&upgrade::Upgrade::from(&view)),
        (false, UpgradeCall::Status) => {
            super::print(&upgrade::speakers(&view))?;
            eprintln!("{}", upgrade::summary(&view));
            Ok(())
        }
        (false, UpgradeCall::Finish) => {
            eprintln!("{}", upgrade::summary(&view));
            Ok(())
        }
    }
}
