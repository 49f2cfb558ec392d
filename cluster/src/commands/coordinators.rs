//! `shoal coordinators list | add | remove | recover-alone`.

use shoal_protocol::admin::{AdminCall, AdminReply};
use shoal_protocol::id::NodeId;

use crate::args::CoordinatorsCommand;
use crate::client::{AdminClient, unexpected};
use crate::failure::Failure;
use crate::output::coordinators;
use crate::run;

/// Does what was typed.
pub async fn run(command: CoordinatorsCommand) -> Result<(), Failure> {
    match command {
        CoordinatorsCommand::List(args) => {
            let client = AdminClient::open(args.cluster.context.as_deref()).await?;
            let view = client.status().await?;
            let presence = client.presence().await;
            client.close().await;
            if args.json {
                return super::print_json(&coordinators::list(&view, presence.as_ref()));
            }
            super::print(&coordinators::table(&view, presence.as_ref()).to_string())?;
            if let Some(why) = presence.and_then(|presence| presence.no_majority) {
                eprintln!("{why}");
            }
            Ok(())
        }
        CoordinatorsCommand::Add(args) => {
            let client = AdminClient::open(args.cluster.context.as_deref()).await?;
            change(&client, &args.nodes, &args.replace).await?;
            eprintln!("{}", say(&args.nodes, "votes now", "vote now"));
            if args.replace.is_empty() {
                return Ok(());
            }
            eprintln!("{}", say(&args.replace, "is removed", "are removed"));
            rotate(&client, args.keep_ca).await
        }
        CoordinatorsCommand::Remove(args) => {
            let client = AdminClient::open(args.cluster.context.as_deref()).await?;
            change(&client, &[], &args.nodes).await?;
            eprintln!("{}", say(&args.nodes, "is removed", "are removed"));
            eprintln!(
                "stop its process, and delete its data folder: its number is never given again"
            );
            rotate(&client, args.keep_ca).await
        }
        // There is no cluster to ask.
        CoordinatorsCommand::RecoverAlone(args) => run::alone::run(args).await,
    }
}

/// Whoever was removed has the CA's key, and could be any node with it.
async fn rotate(client: &AdminClient, keep: bool) -> Result<(), Failure> {
    if keep {
        eprintln!("the CA stays, and what was removed has its key: destroy that disk");
        return Ok(());
    }
    match super::ca::begin(client, false).await {
        Ok(()) => {
            eprintln!(
                "the CA, whose key it has, is being rotated; `shoal ca list` shows how far it is"
            );
            Ok(())
        }
        Err(failure) => {
            let message = format!(
                "it is removed, but the CA, whose key it has, is not rotated: {failure}; say `shoal ca \
                 rotate` when that is mended"
            );
            Err(Failure { message, ..failure })
        }
    }
}

async fn change(client: &AdminClient, add: &[NodeId], remove: &[NodeId]) -> Result<(), Failure> {
    let call = AdminCall::ChangeVoters { add: add.to_vec(), remove: remove.to_vec() };
    let called = client.call(call).await.map_err(|failure| match remove.is_empty() {
        true => failure,
        // Some of them may be removed, and the CA whose key they have is not rotated.
        false => {
            let message = format!(
                "{failure}; whoever of them `shoal coordinators list` does not show is removed, and has the \
                 CA's key: say this again, or `shoal ca rotate`"
            );
            Failure { message, ..failure }
        }
    });
    match called? {
        AdminReply::Accepted => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn say(nodes: &[NodeId], one: &str, several: &str) -> String {
    let names: Vec<_> = nodes.iter().map(NodeId::to_string).collect();
    format!("{} {}", names.join(", "), if nodes.len() == 1 { one } else { several })
}
