//! ● Is it alive, is it ready, what does it count.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use shoal_protocol::error::ErrorCode;

use super::ApiContext;
use super::error::{ApiError, Reason};
use super::openai::models::is_ready;
use crate::control::store::ControlStore;

/// When a prober should look again.
const READY_RETRY: Duration = Duration::from_secs(1);

/// `GET /health`: the process lives and answers.
pub async fn health() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], r#"{"status":"alive"}"#).into_response()
}

#[derive(Serialize)]
struct Ready<'a> {
    status: &'static str,
    /// Deployments that can answer.
    ready: Vec<&'a str>,
    /// The others, and why they cannot.
    not_ready: BTreeMap<&'a str, &'a str>,
}

/// `GET /ready`: at least one deployment can answer.
pub async fn ready(State(context): State<Arc<ApiContext>>) -> Response {
    let table = context.table.borrow().clone();
    let draining = *context.draining.borrow();
    let (ready, not_ready): (Vec<_>, Vec<_>) =
        table.deployments.values().partition(|deployment| is_ready(deployment) && !draining);
    let reason = |reason: &'_ str| -> &'static str {
        match reason {
            "" if draining => "this coordinator is stopping",
            _ => "no replica is ready",
        }
    };
    let body = Ready {
        status: match (ready.is_empty(), draining, table.deployments.is_empty()) {
            (_, true, _) => "stopping",
            (true, _, true) => "nothing is deployed",
            (true, ..) => "not ready",
            (false, ..) => "ready",
        },
        ready: ready.iter().map(|deployment| deployment.name.as_str()).collect(),
        not_ready: not_ready
            .iter()
            .map(|deployment| {
                let why = match deployment.reason.as_str() {
                    "" => reason(""),
                    why => why,
                };
                (deployment.name.as_str(), why)
            })
            .collect(),
    };
    let json = serde_json::to_string(&body).unwrap_or_default();
    let content = (header::CONTENT_TYPE, "application/json".to_owned());
    if !ready.is_empty() {
        return ([content], json).into_response();
    }
    let retry = (header::RETRY_AFTER, READY_RETRY.as_secs().to_string());
    let mut response = (StatusCode::SERVICE_UNAVAILABLE, [content, retry], json).into_response();
    response.extensions_mut().insert(Reason(ErrorCode::NotReady.label()));
    response
}

/// `GET /metrics`: Prometheus' text format.
pub async fn metrics(State(context): State<Arc<ApiContext>>) -> Result<Response, ApiError> {
    let table = context.table.borrow().clone();
    let standings = context.places.standings(&table);
    let (stale, spans) = (context.dispatcher.stale_events(), context.tracer.counts());
    let presence = context.control.as_ref().map(ControlStore::presence);
    let text = context.telemetry.render(&table, stale, &standings, spans, presence.as_ref());
    let text = text.map_err(|error| {
        tracing::error!(%error, "the metrics cannot be rendered");
        ApiError::new(ErrorCode::Internal, "the metrics cannot be rendered")
    })?;
    Ok(([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response())
}
