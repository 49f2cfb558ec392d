//! `shoal token create`.

use shoal_protocol::admin::{AdminCall, AdminReply};

use crate::args::TokenCreateArgs;
use crate::client::{AdminClient, unexpected};
use crate::failure::Failure;

/// Makes a token and prints it, and nothing else, to stdout.
pub async fn create(args: TokenCreateArgs) -> Result<(), Failure> {
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
            eprintln!("  shoal worker --join {join} --token TOKEN --data DIR");
            Ok(())
        }
        other => Err(unexpected(&other)),
    }
}
