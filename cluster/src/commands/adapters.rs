//! `shoal adapters load | list | unload`.

use std::path::Path;

use shoal_protocol::adapters::{AdapterCall, AdapterReply, AdapterView};
use shoal_protocol::admin::{AdminCall, AdminReply};
use shoal_protocol::blob::name;

use crate::args::{AdapterLoadArgs, AdapterUnloadArgs, AdaptersCommand, ListArgs};
use crate::client::{AdminClient, unexpected};
use crate::failure::Failure;
use crate::output::adapters;

/// Does what was typed.
pub async fn run(command: AdaptersCommand) -> Result<(), Failure> {
    match command {
        AdaptersCommand::Load(args) => load(args).await,
        AdaptersCommand::List(args) => list(args).await,
        AdaptersCommand::Unload(args) => unload(args).await,
    }
}

async fn load(args: AdapterLoadArgs) -> Result<(), Failure> {
    let path = place_of(&args.path)?;
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    super::check_exists(&args.deployment, &client.status().await?)?;
    let AdapterLoadArgs { name, deployment, .. } = args;
    let call = AdapterCall::Load { name: name.clone(), deployment: deployment.clone(), path };
    match ask(client, call).await? {
        AdapterReply::Accepted { adapter: Some(AdapterView { reason, .. }) } => {
            match reason.is_empty() {
                true => eprintln!("{name} is served beside {deployment}"),
                false => eprintln!("{name} is accepted and not everywhere yet: {reason}"),
            }
            Ok(())
        }
        AdapterReply::Accepted { adapter: None } => {
            Err(Failure::failed(format!("{name} was unloaded again meanwhile")))
        }
        other => Err(unexpected(&AdminReply::Adapters(other))),
    }
}

async fn list(args: ListArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    match ask(client, AdapterCall::List).await? {
        AdapterReply::List(all) if args.json => {
            super::print_json(&adapters::AdapterList::from(&all[..]))
        }
        AdapterReply::List(all) => super::print(&adapters::list(&all)),
        other => Err(unexpected(&AdminReply::Adapters(other))),
    }
}

async fn unload(args: AdapterUnloadArgs) -> Result<(), Failure> {
    let client = AdminClient::open(args.cluster.context.as_deref()).await?;
    match ask(client, AdapterCall::Unload { name: args.name.clone() }).await? {
        AdapterReply::Accepted { .. } => {
            eprintln!("{} is no longer served; what is under way still ends", args.name);
            Ok(())
        }
        other => Err(unexpected(&AdminReply::Adapters(other))),
    }
}

async fn ask(client: AdminClient, call: AdapterCall) -> Result<AdapterReply, Failure> {
    let reply = client.call(AdminCall::Adapters(call)).await;
    client.close().await;
    match reply? {
        AdminReply::Adapters(reply) => Ok(reply),
        other => Err(unexpected(&other)),
    }
}

/// What each node finds under this name: a path as each of them has it, or an adapter of the hub. Where it is one from the root it need not be on this machine.
fn place_of(path: &Path) -> Result<String, Failure> {
    // What is no folder here but reads like a name of the hub is one.
    let named = path.to_str().filter(|text| name::parse_adapter(text).is_ok());
    if let Some(named) = named.filter(|_| !path.exists()) {
        return Ok(named.to_owned());
    }
    let found = match path.canonicalize() {
        // As it was typed: a link of this machine says nothing of the others.
        _ if path.is_absolute() => path.to_owned(),
        Ok(found) => found,
        Err(error) => {
            let path = path.display();
            return Err(Failure::refused(format!(
                "cannot read the adapter {path}: {error}; name a folder, or org/name or org/name@revision of \
                 the hub"
            )));
        }
    };
    let words = || Failure::refused(format!("the path {} is not UTF-8", found.display()));
    Ok(found.to_str().ok_or_else(words)?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_is_a_folder_or_a_name_of_the_hub() {
        for (path, expected) in [
            ("/no/such/folder", "/no/such/folder"),
            ("org/name", "org/name"),
            ("org/name@v1", "org/name@v1"),
        ] {
            assert_eq!(place_of(Path::new(path)).ok().as_deref(), Some(expected));
        }
        for path in ["./no/such", "nothing", "org/name:Q4_0"] {
            let error = place_of(Path::new(path)).unwrap_err();
            assert!(error.message.contains("org/name@revision of the hub"), "{error}");
        }
    }
}
