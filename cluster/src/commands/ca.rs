//! `shoal ca rotate | list`.

use std::time::Duration;

use shoal_protocol::access::{AccessCall, AccessReply, CaStanding, CaView, RotationView};
use shoal_protocol::id::NodeId;

use crate::args::{CaCommand, CaRotateArgs, ListArgs};
use crate::client::AdminClient;
use crate::failure::Failure;
use crate::output::ca;

/// How often to look while waiting: steps of a rotation take longer, and nobody announces them.
const LOOK: Duration = Duration::from_millis(300);

/// Does what was typed.
pub async fn run(command: CaCommand) -> Result<(), Failure> {
    match command {
        CaCommand::Rotate(args) => rotate(args).await,
        CaCommand::List(args) => list(args).await,
    }
}

async fn list(args: ListArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let view = look(&client).await?;
    client.close().await;
    match args.json {
        true => super::print_json(&ca::CaList::from(&view)),
        false => super::print(&ca::cas(&view)),
    }
}

async fn rotate(args: CaRotateArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    let before = signing(&look(&client).await?);
    begin(&client, args.skip_absent).await?;
    let ended = match args.wait {
        true => wait(&client, &before).await,
        false => {
            eprintln!("the CA is being rotated; `shoal ca list` shows how far it is");
            Ok(())
        }
    };
    client.close().await;
    ended
}

/// Begins a rotation, or goes on with the one that is under way.
pub async fn begin(client: &AdminClient, skip_absent: bool) -> Result<(), Failure> {
    match client.ask_access(AccessCall::RotateCa { skip_absent }).await? {
        AccessReply::Done => Ok(()),
        other => Err(super::unexpected_access(&other)),
    }
}

async fn wait(client: &AdminClient, before: &str) -> Result<(), Failure> {
    let mut said = String::new();
    // The CA to come, as soon as it is seen: where a rotation was under way already, it may sign.
    let mut target = None;
    loop {
        let view = look(client).await.map_err(|failure| {
            let message = format!("{failure}; the rotation goes on: `shoal ca list`");
            Failure { message, ..failure }
        })?;
        let Some(rotation) = &view.rotation else {
            let now = signing(&view);
            if target.map_or(now == before, |target| now != target) {
                let words = "the rotation was given up, since nobody had the new key any more; the CA is \
                             the one from before: say it again";
                return Err(Failure::failed(words));
            }
            eprintln!("{} signs, and the CA before it is believed no more", &now[..ca::SHOWN]);
            return Ok(());
        };
        let next = view.cas.iter().find(|ca| ca.standing == CaStanding::Next);
        target = next.or(view.cas.first()).map(|ca| ca.fingerprint.clone());
        let words = words(rotation);
        if words != said {
            eprintln!("{words}");
            said = words;
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn words(rotation: &RotationView) -> String {
    let nodes: Vec<_> = rotation.waits_for.iter().map(NodeId::to_string).collect();
    match nodes.is_empty() {
        true => format!("the new CA: {}", rotation.waits),
        false => format!("the new CA: {} (waiting for {})", rotation.waits, nodes.join(", ")),
    }
}

/// The CAs. A context of a CA that signs no more is renewed on the way.
async fn look(client: &AdminClient) -> Result<CaView, Failure> {
    match client.ask_access(AccessCall::ListCas).await? {
        AccessReply::Cas(view) => {
            client.renew_context(&signing(&view)).await;
            Ok(view)
        }
        other => Err(super::unexpected_access(&other)),
    }
}

fn signing(view: &CaView) -> String {
    view.cas.first().map(|ca| ca.fingerprint.clone()).unwrap_or_default()
}
