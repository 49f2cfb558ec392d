//! ● The request plane: HTTP in OpenAI's words.
//!
//! ```text
//! POST ─► gate: auth (○) ─► read ─► validate (○) ─► tokenize ─► places: router (○) ─► dispatch ══shoal-req══► heads
//! client ◄─ sse, or one object ◄─ openai shapes ◄─ session ◄─ stream (○): text ◄───────── tokens
//! ```

mod adapters;
pub mod auth;
mod encode;
pub mod error;
mod fields;
mod gate;
mod generate;
mod generation;
mod gguf_patterns;
mod gguf_text;
mod health;
mod messages;
mod openai;
mod origin;
mod pieces;
pub mod places;
mod prepare;
pub mod refusal;
mod serve;
pub mod session;
mod sse;
pub mod stream;
mod strftime;
mod surface;
mod template;
pub mod tls;
pub mod tokenize;
pub mod validate;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use shoal_protocol::prefix::Tenant;
use shoal_protocol::trace::Tracer;
use tokio::sync::watch;

use crate::control::adapters::AdapterServer;
use crate::control::store::ControlStore;
use crate::dispatch::Dispatcher;
use crate::recovery::Resumer;
use crate::router;
use crate::router::admission::AdmissionLimits;
use crate::router::policy::Policy;
use crate::serving::ServingTable;
use crate::telemetry::Telemetry;
use error::{ApiError, Reason};
use gate::Door;
pub use gate::Gate;
use places::Places;
pub use serve::serve;
use sse::Unread;
use surface::Endpoint;
use tls::Tls;
use tokenize::ModelTexts;

/// Every route and every layer, behind a listener at this address.
fn routes(context: Arc<ApiContext>, listener: SocketAddr) -> Router {
    let door = Door { gate: context.gate.clone(), listener };
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/embeddings", post(embeddings))
        .route("/rerank", post(rerank))
        .route("/v1/rerank", post(rerank))
        .route("/v2/rerank", post(rerank))
        .route("/v1/load_lora_adapter", post(load_adapter))
        .route("/v1/unload_lora_adapter", post(unload_adapter))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/metrics", get(health::metrics))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(door, gate::pass))
        .layer(from_fn_with_state(Arc::clone(&context), count))
        .with_state(context)
}

/// What the request plane is given, and what it keeps.
#[derive(Debug)]
pub struct ApiContext {
    /// What can be served, replaced on every change.
    pub table: watch::Receiver<Arc<ServingTable>>,
    /// The hand that reaches the heads.
    pub dispatcher: Dispatcher,
    /// Where everything is counted.
    pub telemetry: Arc<Telemetry>,
    /// The bounds.
    pub limits: Limits,
    /// `true`: finish what runs, take nothing new.
    pub draining: watch::Receiver<bool>,
    gate: Gate,
    tls: Option<Arc<Tls>>,
    /// `true`: what is not complete by now is ended with words.
    cut: watch::Receiver<bool>,
    texts: ModelTexts,
    places: Arc<Places>,
    /// Whether the router is told a prompt's blocks.
    prefix_affinity: bool,
    /// Where adapters are loaded and unloaded, if clients may.
    adapters: Option<AdapterServer>,
    /// Who says which coordinators are there, where there are some.
    control: Option<ControlStore>,
    resumer: Resumer,
    tracer: Tracer,
    unread: Unread,
}

/// The bounds of the request plane. Each is there against a client that asks for more than it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time; the next ones wait in the system's backlog.
    pub connections_max: usize,
    /// Bytes of a body: a prompt of half a million tokens as ids.
    pub body_len_max: usize,
    /// How long a request's headers may take to arrive.
    pub header_timeout: Duration,
    /// How long its body may take.
    pub body_timeout: Duration,
    /// How long an answer may take from the moment it is sent to a head.
    pub request_deadline: Duration,
    /// How long a new request waits for a replica that is being made ready; then it is refused. A
    /// worker that is started again serves within a second or two.
    pub ready_patience: Duration,
    /// How long answers may take to finish once the coordinator stops; then they end with an error.
    pub drain: Duration,
    /// What a deployment may have open.
    pub admission: AdmissionLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 4096,
            body_len_max: 4 << 20,
            header_timeout: Duration::from_secs(15),
            body_timeout: Duration::from_secs(30),
            request_deadline: Duration::from_secs(600),
            ready_patience: Duration::from_secs(5),
            drain: Duration::from_secs(4),
            admission: AdmissionLimits::default(),
        }
    }
}

impl ApiContext {
    /// A request plane that has served nothing yet.
    pub fn new(
        table: watch::Receiver<Arc<ServingTable>>,
        dispatcher: Dispatcher,
        telemetry: Arc<Telemetry>,
        limits: Limits,
        draining: watch::Receiver<bool>,
    ) -> Self {
        let cut_off = watch::Sender::new(false);
        let cut = cut_off.subscribe();
        let mut drain = draining.clone();
        // Counted from the drain itself, whoever looks at it when. It ends with the coordinator.
        tokio::spawn(async move {
            // A sender that is gone means that the coordinator is gone.
            let _ = drain.wait_for(|draining| *draining).await;
            tokio::time::sleep(limits.drain).await;
            cut_off.send_replace(true);
        });
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let places = Arc::new(Places::new(Policy::default(), limits.admission));
        let resumer = Resumer::new(
            dispatcher.clone(),
            table.clone(),
            Arc::clone(&places),
            Arc::clone(&telemetry),
        );
        Self {
            table,
            dispatcher,
            telemetry,
            limits,
            draining,
            gate: Gate::without_keys(),
            tls: None,
            cut,
            texts: ModelTexts::new(cores),
            places,
            prefix_affinity: false,
            adapters: None,
            control: None,
            resumer,
            tracer: Tracer::off(),
            unread: Unread::none(),
        }
    }

    /// The same, telling what it does for requests that are traced.
    pub fn tracing(self, tracer: Tracer) -> Self {
        Self { tracer, ..self }
    }

    /// The same, with a preference for the replica to which a prompt's beginning went before, or without.
    pub fn with_prefix_affinity(self, prefix_affinity: bool) -> Self {
        Self { prefix_affinity, ..self }
    }

    /// The same, where clients may load and unload adapters, or may not.
    pub fn with_runtime_adapters(self, adapters: Option<AdapterServer>) -> Self {
        Self { adapters, ..self }
    }

    /// The same, with another way to choose replicas; before anything is served.
    pub fn with_policy(self, policy: Policy) -> Self {
        let places = Arc::new(Places::new(policy, self.limits.admission));
        Self { resumer: self.resumer.through(Arc::clone(&places)), places, ..self }
    }

    /// The same, with metrics of the coordinators.
    pub fn of_cluster(self, control: ControlStore) -> Self {
        Self { control: Some(control), ..self }
    }

    /// The same request plane, behind this gate.
    pub fn behind(self, gate: Gate) -> Self {
        Self { gate, ..self }
    }

    /// The same request plane, with TLS.
    pub fn over(self, tls: Arc<Tls>) -> Self {
        Self { tls: Some(tls), ..self }
    }

    /// Resolves when the coordinator has been stopping for as long as answers may take to finish.
    pub fn stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut cut = self.cut.clone();
        async move {
            let _ = cut.wait_for(|cut| *cut).await;
        }
    }
}

async fn completions(
    State(context): State<Arc<ApiContext>>,
    Extension(tenant): Extension<Tenant>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    generate::generate(context, (Endpoint::Completions, tenant), &headers, body).await
}

async fn chat(
    State(context): State<Arc<ApiContext>>,
    Extension(tenant): Extension<Tenant>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    generate::generate(context, (Endpoint::Chat, tenant), &headers, body).await
}

async fn embeddings(
    State(context): State<Arc<ApiContext>>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    encode::embeddings(context, &headers, body).await
}

async fn rerank(
    State(context): State<Arc<ApiContext>>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    encode::rerank(context, &headers, body).await
}

async fn load_adapter(State(context): State<Arc<ApiContext>>, body: Body) -> Response {
    adapters::load(&context, body).await.into_response()
}

async fn unload_adapter(State(context): State<Arc<ApiContext>>, body: Body) -> Response {
    adapters::unload(&context, body).await.into_response()
}

async fn models(State(context): State<Arc<ApiContext>>) -> Response {
    let table = context.table.borrow().clone();
    json(openai::models::list(&table))
}

/// Names may contain `/`, so the rest of the path is the name.
async fn model(
    State(context): State<Arc<ApiContext>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Path(name) = name.map_err(|error| {
        let words = format!("the name of a model is UTF-8, percent-encoded: {}", error.body_text());
        ApiError::http(StatusCode::BAD_REQUEST, words)
    })?;
    let table = context.table.borrow().clone();
    let deployment = router::find(&table, &name)?;
    Ok(json(openai::models::one(deployment)))
}

fn json(text: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

async fn not_found(uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(128).collect();
    ApiError::http(
        StatusCode::NOT_FOUND,
        format!(
            "there is no {path}; the API is under /v1 (models, completions, chat/completions, \
             embeddings, rerank)"
        ),
    )
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(128).collect();
    ApiError::http(StatusCode::METHOD_NOT_ALLOWED, format!("{path} does not take {method:.16}"))
}

/// Counts every response by route, status and reason.
async fn count(State(context): State<Arc<ApiContext>>, request: Request, next: Next) -> Response {
    let route = match request.uri().path() {
        "/v1/models" => "/v1/models",
        path if path.starts_with("/v1/models/") => "/v1/models/{name}",
        "/v1/completions" => "/v1/completions",
        "/v1/chat/completions" => "/v1/chat/completions",
        "/v1/embeddings" => "/v1/embeddings",
        "/rerank" | "/v1/rerank" | "/v2/rerank" => "/rerank",
        "/v1/load_lora_adapter" => "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter" => "/v1/unload_lora_adapter",
        "/health" => "/health",
        "/ready" => "/ready",
        "/metrics" => "/metrics",
        // Not the path itself: anybody could make any number of labels.
        _ => "other",
    };
    let response = next.run(request).await;
    let reason = response.extensions().get::<Reason>().map_or("ok", |reason| reason.0);
    context.telemetry.http(route, response.status().as_u16(), reason);
    response
}
