//! The operator's verbs, one file each. They know the admin API and, for `chat`, the public one.

pub mod adapters;
pub mod ca;
pub mod chat;
pub mod coordinators;
pub mod deploy;
pub mod drain;
pub mod keys;
pub mod models;
pub mod nodes;
pub mod plan;
pub mod rollout;
pub mod scale;
pub mod sse;
pub mod status;
pub mod token;
pub mod undeploy;
pub mod upgrade;

use shoal_protocol::access::AccessReply;
use shoal_protocol::admin::{AdminReply, ClusterView};
use shoal_protocol::id::DeploymentName;

use crate::client::unexpected;
use crate::failure::Failure;
use crate::output::json;

/// How alike two names must be (Jaro-Winkler) for one to be offered for the other.
const ALIKE_MIN: f64 = 0.75;

/// That there is no such deployment, and which one was probably meant.
fn no_such_deployment(name: &DeploymentName, view: &ClusterView) -> Failure {
    let names: Vec<&str> = view.deployments.iter().map(|d| d.name.as_str()).collect();
    no_such("deployment", name, &names)
}

/// That nothing of this kind has the name, and which one was probably meant.
fn no_such(kind: &str, name: &DeploymentName, names: &[&str]) -> Failure {
    let nearest = names
        .iter()
        .map(|known| (strsim::jaro_winkler(known, name.as_str()), known))
        .filter(|(alike, _)| *alike >= ALIKE_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let advice = match nearest {
        Some((_, known)) => format!("did you mean `{known}`?"),
        None if names.is_empty() => "nothing is deployed".to_owned(),
        None => format!("there is {}", names.join(", ")),
    };
    Failure::refused(format!("there is no {kind} `{name}`; {advice}"))
}

/// Says no where there is no such deployment.
fn check_exists(name: &DeploymentName, view: &ClusterView) -> Result<(), Failure> {
    match view.deployments.iter().any(|d| d.name == *name) {
        true => Ok(()),
        false => Err(no_such_deployment(name, view)),
    }
}

/// An answer about access to another question than ours.
fn unexpected_access(reply: &AccessReply) -> Failure {
    unexpected(&AdminReply::Access(reply.clone()))
}

/// Prints one line of JSON.
fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let line = json::line(value).map_err(|error| Failure::failed(error.to_string()))?;
    print(&format!("{line}\n"))
}

/// Prints data. A reader that has gone (`| head`) is no failure.
pub fn print(text: &str) -> Result<(), Failure> {
    use std::io::Write;

    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::failed(format!("cannot write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}
