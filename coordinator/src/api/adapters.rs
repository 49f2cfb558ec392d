//! ● Adapters through the public API, in vLLM's words. Only where the operator says so: whoever may ask
//! for an answer could otherwise change what is served.

use axum::body::Body;
use axum::http::StatusCode;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use shoal_protocol::adapters::{AdapterCall, AdapterReply};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::DeploymentName;

use super::ApiContext;
use super::error::ApiError;
use super::generate::{not_draining, read};
use crate::control::adapters::AdapterServer;
use crate::serving::{ServedKind, ServingTable};

/// `POST /v1/load_lora_adapter`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Load {
    lora_name: String,
    lora_path: String,
    /// Ours: which deployment, where there are several.
    base_model_name: Option<String>,
}

/// `POST /v1/unload_lora_adapter`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unload {
    lora_name: String,
    /// vLLM's number of it, which it does not look at either.
    #[serde(rename = "lora_int_id")]
    _number: Option<u64>,
}

/// Loads an adapter beside its base model; answers when it can be used, or says what it waits for.
pub(super) async fn load(context: &ApiContext, body: Body) -> Result<String, ApiError> {
    let server = server(context)?;
    let Load { lora_name, lora_path, base_model_name } = parse(context, body).await?;
    let name = named("lora_name", &lora_name)?;
    if !lora_path.starts_with('/') {
        // Whoever may ask questions is not to fill the disks of all nodes.
        let words = "lora_path begins with `/` and is the same on each node; what is of the hub is loaded by \
                     whoever operates the cluster: `shoal adapters load`";
        return Err(ApiError::new(ErrorCode::InvalidRequest, words).about("lora_path"));
    }
    let deployment = match &base_model_name {
        Some(base) => named("base_model_name", base)?,
        None => the_only(&context.table.borrow())?,
    };
    let reply = ask(server, AdapterCall::Load { name, deployment, path: lora_path }).await?;
    if let AdapterReply::Accepted { adapter: Some(adapter) } = reply
        && !adapter.reason.is_empty()
    {
        return Err(ApiError::new(ErrorCode::NotReady, adapter.reason));
    }
    Ok(format!("Success: LoRA adapter '{lora_name}' added successfully."))
}

/// Unloads one; answers that use it end first.
pub(super) async fn unload(context: &ApiContext, body: Body) -> Result<String, ApiError> {
    let server = server(context)?;
    let Unload { lora_name, .. } = parse(context, body).await?;
    let name = named("lora_name", &lora_name)?;
    ask(server, AdapterCall::Unload { name }).await?;
    Ok(format!("Success: LoRA adapter '{lora_name}' removed successfully."))
}

fn server(context: &ApiContext) -> Result<&AdapterServer, ApiError> {
    not_draining(context)?;
    context.adapters.as_ref().ok_or_else(|| {
        let words = "adapters are not loaded through this API: whoever operates the cluster says \
                     `shoal adapters load`, or starts its coordinators with --allow-runtime-adapters";
        ApiError::new(ErrorCode::PermissionDenied, words)
    })
}

async fn parse<T: DeserializeOwned>(context: &ApiContext, body: Body) -> Result<T, ApiError> {
    let bytes = read(context, body).await?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let words = format!(
            "the body is not what is expected: {error}; expected lora_name, and to load one lora_path \
             and, where several models are served, base_model_name"
        );
        ApiError::new(ErrorCode::InvalidRequest, words)
    })
}

fn named(param: &str, text: &str) -> Result<DeploymentName, ApiError> {
    DeploymentName::new(text)
        .map_err(|bad| ApiError::new(ErrorCode::InvalidRequest, bad.to_string()).about(param))
}

/// The one model that writes text.
fn the_only(table: &ServingTable) -> Result<DeploymentName, ApiError> {
    let mut writers = table.deployments.values().filter(|d| d.kind == ServedKind::Generate);
    match (writers.next(), writers.next()) {
        (Some(one), None) => Ok(one.name.clone()),
        (None, _) => {
            Err(ApiError::new(ErrorCode::NotFound, "no model is deployed that writes text"))
        }
        (Some(_), Some(_)) => {
            let words = "several models are deployed: say with base_model_name whose adapter it is";
            Err(ApiError::new(ErrorCode::InvalidRequest, words).about("base_model_name"))
        }
    }
}

async fn ask(server: &AdapterServer, call: AdapterCall) -> Result<AdapterReply, ApiError> {
    server.answer("a client of the API".to_owned(), call).await.map_err(|error| refused(&error))
}

/// An adapter that is no good is the fault of whoever names it.
fn refused(error: &WireError) -> ApiError {
    match error.code {
        ErrorCode::BadModel | ErrorCode::DoesNotFit => {
            ApiError::http(StatusCode::BAD_REQUEST, error.message.clone())
        }
        code => ApiError::new(code, error.message.clone()),
    }
}
