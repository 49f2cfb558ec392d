//! `shoal keys create | list | revoke`.

use shoal_protocol::access::{AccessCall, AccessReply, KeyLimits};

use crate::args::{KeyCreateArgs, KeyRevokeArgs, KeysCommand, ListArgs};
use crate::client::AdminClient;
use crate::failure::Failure;
use crate::output::access;

/// Does what was typed.
pub async fn run(command: KeysCommand) -> Result<(), Failure> {
    match command {
        KeysCommand::Create(args) => create(args).await,
        KeysCommand::List(args) => list(args).await,
        KeysCommand::Revoke(args) => revoke(args).await,
    }
}

/// Makes a key and prints it, and nothing else, to stdout.
async fn create(args: KeyCreateArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let limits = KeyLimits {
        requests_per_minute: args.rpm.map(|n| n.get()),
        concurrent: args.concurrent.map(|n| n.get()),
    };
    let expires_s = args.expires.map(|life| life.as_secs());
    let call = AccessCall::CreateKey { name: args.name.clone(), limits, expires_s };
    match client.access(call).await? {
        AccessReply::Key { secret } => {
            super::print(&format!("{secret}\n"))?;
            eprintln!("this key is shown once; clients send it as `Authorization: Bearer KEY`");
            eprintln!("(OPENAI_API_KEY, SHOAL_API_KEY), and every request to /v1 needs one now");
            Ok(())
        }
        other => Err(super::unexpected_access(&other)),
    }
}

async fn list(args: ListArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    match client.access(AccessCall::ListKeys).await? {
        AccessReply::Keys(keys) if args.json => {
            super::print_json(&access::KeyList::from(&keys[..]))
        }
        AccessReply::Keys(keys) => super::print(&access::keys(&keys)),
        other => Err(super::unexpected_access(&other)),
    }
}

async fn revoke(args: KeyRevokeArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    match client.access(AccessCall::RevokeKey { name: args.name.clone() }).await? {
        AccessReply::Done => {
            eprintln!("{} opens nothing any more; what is under way still ends", args.name);
            Ok(())
        }
        other => Err(super::unexpected_access(&other)),
    }
}
