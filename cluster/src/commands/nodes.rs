//! `shoal nodes list | remove`.

use shoal_protocol::access::{AccessCall, AccessReply};

use crate::args::{ListArgs, NodeRemoveArgs, NodesCommand};
use crate::client::AdminClient;
use crate::failure::Failure;
use crate::output::access;

/// Does what was typed.
pub async fn run(command: NodesCommand) -> Result<(), Failure> {
    match command {
        NodesCommand::List(args) => list(args).await,
        NodesCommand::Remove(args) => remove(args).await,
    }
}

async fn list(args: ListArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    match client.access(AccessCall::ListNodes).await? {
        AccessReply::Nodes(nodes) if args.json => {
            super::print_json(&access::NodeList::from(&nodes[..]))
        }
        AccessReply::Nodes(nodes) => super::print(&access::nodes(&nodes)),
        other => Err(super::unexpected_access(&other)),
    }
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
