//! `/v1/models`.

use serde::Serialize;

use super::json;
use crate::serving::{ServedDeployment, ServingTable};

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Model<'a>>,
}

#[derive(Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: &'a str,
    /// The base model of an adapter.
    parent: Option<&'a str>,
    max_model_len: u32,
    /// `generate`, `embed` or `rank`.
    kind: &'static str,
    ready: bool,
}

fn model(deployment: &ServedDeployment) -> Model<'_> {
    Model {
        id: deployment.name.as_str(),
        object: "model",
        created: deployment.created,
        owned_by: "shoal",
        root: deployment.base().as_str(),
        parent: deployment.adapter.as_ref().map(|adapter| adapter.base.as_str()),
        max_model_len: deployment.context_max,
        kind: deployment.kind.label(),
        ready: is_ready(deployment),
    }
}

/// Whether a request to this deployment would find a replica.
pub fn is_ready(deployment: &ServedDeployment) -> bool {
    deployment.replicas.iter().any(|replica| replica.ready && replica.requests.is_some())
}

/// All deployments, and then their adapters.
pub fn list(table: &ServingTable) -> String {
    let all = table.deployments.values().chain(table.adapters.values());
    let data = all.map(|deployment| model(deployment)).collect();
    json(&List { object: "list", data })
}

/// One deployment, or one adapter.
pub fn one(deployment: &ServedDeployment) -> String {
    json(&model(deployment))
}
