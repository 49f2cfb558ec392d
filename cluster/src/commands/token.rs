//! `shoal token create | list | revoke`.

use shoal_protocol::admin::{AdminCall, AdminReply};

use shoal_protocol::access::{AccessCall, AccessReply};

use crate::args::{ListArgs, TokenCommand, TokenCreateArgs, TokenRevokeArgs, TokenRole};
use crate::client::{AdminClient, unexpected};
use crate::failure::Failure;
use crate::output::access;

/// Does what was typed.
pub async fn run(command: TokenCommand) -> Result<(), Failure> {
    match command {
        TokenCommand::Create(args) => create(args).await,
        TokenCommand::List(args) => list(args).await,
        TokenCommand::Revoke(args) => revoke(args).await,
    }
}

async fn list(args: ListArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    match client.access(AccessCall::ListTokens).await? {
        AccessReply::Tokens(tokens) if args.json => {
            super::print_json(&access::TokenList::from(&tokens[..]))
        }
        AccessReply::Tokens(tokens) => super::print(&access::tokens(&tokens)),
        other => Err(super::unexpected_access(&other)),
    }
}

async fn revoke(args: TokenRevokeArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    match client.access(AccessCall::RevokeToken { id: args.id.clone() }).await? {
        AccessReply::Done => {
            eprintln!("nobody joins with {} any more; who has joined stays", args.id);
            Ok(())
        }
        other => Err(super::unexpected_access(&other)),
    }
}

/// Makes a token and prints it, and nothing else, to stdout.
async fn create(args: TokenCreateArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let call = AdminCall::CreateToken {
        role: args.role.into(),
        uses: args.uses.get(),
        expires_s: args.expires.as_secs(),
    };
    let reply = client.call(call).await?;
    let join = client.address();
    client.close().await;
    match reply {
        AdminReply::Token { token } => {
            super::print(&format!("{token}\n"))?;
            eprintln!("good for {} use(s); on the other machine type", args.uses);
            match args.role {
                TokenRole::Worker => {
                    eprintln!("  shoal worker --join {join} --token TOKEN --data DIR");
                }
                TokenRole::Coordinator => eprintln!(
                    "  shoal coordinator --join {join} --token TOKEN --data DIR --listen ADDR --cluster ADDR"
                ),
            }
            Ok(())
        }
        other => Err(unexpected(&other)),
    }
}
