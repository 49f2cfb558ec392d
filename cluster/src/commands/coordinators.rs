//! `shoal coordinators list | add | remove | recover-alone`.

use shoal_protocol::access::{AccessCall, AccessReply};
use shoal_protocol::admin::{AdminCall, AdminReply};
use shoal_protocol::id::NodeId;

use crate::args::CoordinatorsCommand;
use crate::client::{AdminClient, unexpected};
use crate::failure::{Exit, Failure};
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
                "{}",
                match args.nodes.len() {
                    1 =>
                        "stop its process, and delete its data folder: its number is never given again",
                    _ => {
                        "stop their processes, and delete their data folders: their numbers are never given again"
                    }
                }
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
    let there = members(client, remove).await?;
    let call = AdminCall::ChangeVoters { add: add.to_vec(), remove: remove.to_vec() };
    match client.call(call).await {
        Ok(AdminReply::Accepted) => Ok(()),
        Ok(other) => Err(unexpected(&other)),
        Err(failure) => {
            let left = match there.is_empty() {
                true => Ok(Vec::new()),
                false => members(client, &there).await,
            };
            Err(half_done(failure, &there, left.ok().as_deref()))
        }
    }
}

/// Those of `nodes` that belong to the cluster, by what all coordinators know.
async fn members(client: &AdminClient, nodes: &[NodeId]) -> Result<Vec<NodeId>, Failure> {
    if nodes.is_empty() {
        return Ok(Vec::new());
    }
    match client.ask_access(AccessCall::ListNodes).await? {
        AccessReply::Nodes(all) => {
            let is_there = |node: &NodeId| all.iter().any(|known| known.node == *node);
            Ok(nodes.iter().copied().filter(is_there).collect())
        }
        other => Err(super::unexpected_access(&other)),
    }
}

/// What has failed, and what of it has happened all the same: whoever is removed has the CA's key, and that CA is not
/// rotated. `left`: who is there still of those that were; `None` where nobody knows.
fn half_done(failure: Failure, there: &[NodeId], left: Option<&[NodeId]>) -> Failure {
    // Who only adds has removed nobody.
    if there.is_empty() {
        return failure;
    }
    let also = match left {
        Some(left) => {
            let gone: Vec<_> = there.iter().copied().filter(|node| !left.contains(node)).collect();
            // Nothing has changed where it was refused.
            if gone.is_empty() && failure.exit == Exit::Refused {
                return failure;
            }
            if gone.is_empty() {
                let message = format!(
                    "{failure}; {} to the cluster still: look again (`shoal coordinators list`) before you say this again",
                    say(left, "belongs", "belong")
                );
                return Failure { message, ..failure };
            }
            format!("{}, and the CA is not rotated", say(&gone, "is removed", "are removed"))
        }
        None => "whoever of them `shoal coordinators list` does not show is removed".to_owned(),
    };
    let message =
        format!("{failure}; {also}: say `shoal ca rotate`, since what was removed has its key");
    Failure { message, ..failure }
}

fn say(nodes: &[NodeId], one: &str, several: &str) -> String {
    let names: Vec<_> = nodes.iter().map(NodeId::to_string).collect();
    format!("{} {}", names.join(", "), if nodes.len() == 1 { one } else { several })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_failed_says_what_has_happened_all_the_same_and_nothing_else() {
        let [c2, c3] = [2, 3].map(NodeId::coordinator);
        let check = |left: Option<&[NodeId]>, expected: &str| {
            let failure = half_done(Failure::refused("no"), &[c2, c3], left);
            assert_eq!((failure.exit, failure.message.as_str()), (Exit::Refused, expected));
        };
        check(Some(&[c2, c3]), "no");
        let late = half_done(Failure::failed("too late"), &[c3], Some(&[c3])).message;
        assert_eq!(
            late,
            "too late; c3 belongs to the cluster still: look again (`shoal coordinators list`) before you say this again"
        );
        let added = half_done(Failure::failed("too late"), &[], Some(&[])).message;
        assert_eq!(added, "too late", "nobody was to be removed");
        check(
            Some(&[c3]),
            "no; c2 is removed, and the CA is not rotated: say `shoal ca rotate`, since what was removed has its key",
        );
        check(
            None,
            "no; whoever of them `shoal coordinators list` does not show is removed: say `shoal ca rotate`, \
             since what was removed has its key",
        );
    }
}
