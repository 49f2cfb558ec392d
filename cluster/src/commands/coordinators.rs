//! `shoal coordinators list | add | remove | recover-alone`.

use shoal_protocol::admin::{AdminCall, AdminReply};
use shoal_protocol::id::NodeId;

use crate::args::CoordinatorsCommand;
use crate::client::{AdminClient, unexpected};
use crate::failure::Failure;
use crate::output::table;
use crate::run;

/// Does what was typed.
pub async fn run(command: CoordinatorsCommand) -> Result<(), Failure> {
    match command {
        CoordinatorsCommand::List(args) => {
            let client = AdminClient::open(args.cluster.context.as_deref()).await?;
            let view = client.status().await?;
            client.close().await;
            match args.json {
                true => super::print_json(&view.coordinators),
                false => super::print(&table::coordinators(&view).to_string()),
            }
        }
        CoordinatorsCommand::Add(args) => {
            let client = AdminClient::open(args.cluster.context.as_deref()).await?;
            change(&client, &args.nodes, &args.replace).await?;
            eprintln!("{}", say(&args.nodes, "votes now", "vote now"));
            Ok(())
        }
        CoordinatorsCommand::Remove(args) => {
            let client = AdminClient::open(args.cluster.context.as_deref()).await?;
            change(&client, &[], &args.nodes).await?;
            eprintln!("{}", say(&args.nodes, "is removed", "are removed"));
            eprintln!(
                "stop its process, and delete its data folder: its number is never given again"
            );
            Ok(())
        }
        // There is no cluster to ask.
        CoordinatorsCommand::RecoverAlone(args) => run::alone::run(args).await,
    }
}

async fn change(client: &AdminClient, add: &[NodeId], remove: &[NodeId]) -> Result<(), Failure> {
    let call = AdminCall::ChangeVoters { add: add.to_vec(), remove: remove.to_vec() };
    match client.call(call).await? {
        AdminReply::Accepted => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn say(nodes: &[NodeId], one: &str, several: &str) -> String {
    let names: Vec<_> = nodes.iter().map(NodeId::to_string).collect();
    format!("{} {}", names.join(", "), if nodes.len() == 1 { one } else { several })
}
