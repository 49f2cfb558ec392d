//! `shoal nodes list | remove`.

use shoal_protocol::access::{AccessCall, AccessReply};

use crate::args::{ListArgs, NodeRemoveArgs, NodesCommand};
use crate::client::AdminClient;
use crate::failure::Failure;
use crate::output::access::{self, AsOf};

/// Does what was typed.
pub async fn run(command: NodesCommand) -> Result<(), Failure> {
    match command {
        NodesCommand::List(args) => list(args).await,
        NodesCommand::Remove(args) => remove(args).await,
    }
}

async fn list(args: ListArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let reply = nodes(&client).await;
    client.close().await;
    let (nodes, known) = match reply? {
        AccessReply::Nodes(nodes) => (nodes, None),
        AccessReply::NodesKnown(known) => (known.nodes, Some((known.as_of_s, known.no_majority))),
        other => return Err(super::unexpected_access(&other)),
    };
    let as_of = known.as_ref().map(|(at, why)| AsOf { at_s: *at, why: why.as_deref() });
    match args.json {
        true => super::print_json(&access::NodeList::new(&nodes, as_of)),
        false => super::print(&access::nodes(&nodes, as_of)),
    }
}

/// What all coordinators know, or what this one last knew where there is no majority of them.
async fn nodes(client: &AdminClient) -> Result<AccessReply, Failure> {
    if !lacks_majority(client).await {
        match client.ask_access(AccessCall::ListNodes).await {
            // It may have been lost just now.
            Err(_) if lacks_majority(client).await => {}
            answer => return answer,
        }
    }
    client.ask_access(AccessCall::ListNodesKnown).await
}

async fn lacks_majority(client: &AdminClient) -> bool {
    client.presence().await.is_some_and(|presence| presence.no_majority.is_some())
}

async fn remove(args: NodeRemoveArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let call = AccessCall::RemoveNode { node: args.node, force: args.force };
    match client.access(call).await? {
        AccessReply::Done => {
            eprintln!("{} belongs to the cluster no more; end its process", args.node);
            Ok(())
        }
        other => Err(super::unexpected_access(&other)),
    }
}
