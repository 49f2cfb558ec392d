//! ● The way of a request, in order: read, check, tokenise, find a place, ask the heads, answer.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{AdapterId, Attempt, RequestId};
use shoal_protocol::prefix::Tenant;
use shoal_protocol::request::SamplingRecord;

use super::error::ApiError;
use super::openai::chat::Chat;
use super::openai::completions::Completions;
use super::openai::{Shape, Whole};
use super::places::Place;
use super::prepare::{ModelFacts, Prepared, prepare};
use super::session::{Facts, Session, Stops};
use super::surface::Endpoint;
use super::tokenize::TextKey;
use super::validate::{ValidRequest, parse};
use super::{ApiContext, sse};
use crate::dispatch::Sequence;
use crate::recovery::{LastingAnswer, RecoveryError};
use crate::router::prefix::block_hashes;
use crate::router::{self, RouteRequest};
use crate::serving::{ServedDeployment, ServedKind, ServingTable};
use crate::telemetry::Part;
use crate::trace::RequestTrace;

/// How long a stream waits for its first token before it begins: a failure in that time still gets a
/// status of its own.
const FIRST_EVENT_PATIENCE: Duration = Duration::from_secs(5);

/// Serves one request of either endpoint.
pub async fn generate(
    context: Arc<ApiContext>,
    (endpoint, tenant): (Endpoint, Tenant),
    headers: &HeaderMap,
    body: Body,
) -> Response {
    let arrived = Instant::now();
    let (name, route) = match endpoint {
        Endpoint::Chat => ("POST /v1/chat/completions", "/v1/chat/completions"),
        Endpoint::Completions => ("POST /v1/completions", "/v1/completions"),
    };
    let trace = RequestTrace::begin(&context.tracer, headers, name, route, arrived);
    let responded = respond(context, (endpoint, tenant), body, arrived, &trace).await;
    let mut response = responded.into_response();
    trace.answered(&mut response);
    response
}

async fn respond(
    context: Arc<ApiContext>,
    (endpoint, tenant): (Endpoint, Tenant),
    body: Body,
    arrived: Instant,
    trace: &RequestTrace,
) -> Result<Response, ApiError> {
    not_draining(&context)?;
    let request = parse(endpoint, &read(&context, body).await?)?;
    // The body may have taken its time.
    not_draining(&context)?;
    let session = begin(&context, (endpoint, tenant), &request, arrived, trace).await?;
    trace.say("shoal.request_id", session.facts.id.as_str());
    let id = HeaderValue::from_str(&session.facts.id);
    let include_usage = request.stream.is_some_and(|stream| stream.include_usage);
    let mut response = match endpoint {
        Endpoint::Chat => answer(&context, session, Chat { include_usage }, &request).await,
        Endpoint::Completions => {
            answer(&context, session, Completions::new(include_usage), &request).await
        }
    }?;
    // OpenAI's clients report it; the log of the coordinator and of the heads has the same number.
    if let Ok(id) = id {
        response.headers_mut().insert("x-request-id", id);
    }
    Ok(response)
}

pub(super) fn not_draining(context: &ApiContext) -> Result<(), ApiError> {
    if !*context.draining.borrow() {
        return Ok(());
    }
    let why = "this coordinator is stopping and takes no new requests; try another one";
    let retry_after = Some(Duration::from_secs(1));
    Err(ApiError { retry_after, ..ApiError::new(ErrorCode::Draining, why) })
}

/// Why what is under way when the coordinator ends is not complete.
pub(super) fn stopping() -> ApiError {
    let why = "the cluster is stopping, and this answer was not complete in time; ask again when it \
               is back";
    let retry_after = Some(Duration::from_secs(1));
    ApiError { retry_after, ..ApiError::new(ErrorCode::Draining, why) }
}

/// Encoders write no text.
fn check_kind(deployment: &ServedDeployment) -> Result<(), ApiError> {
    let ask = match deployment.kind {
        ServedKind::Generate => return Ok(()),
        ServedKind::Embed { .. } => "makes embeddings and writes no text; ask /v1/embeddings",
        ServedKind::Rank { .. } => "scores pairs of texts and writes no text; ask /v1/rerank",
    };
    let why = format!("`{}` {ask}", deployment.name);
    Err(ApiError::new(ErrorCode::InvalidRequest, why).about("model"))
}

/// The whole body, within the bounds of size and time.
pub(super) async fn read(context: &ApiContext, body: Body) -> Result<Bytes, ApiError> {
    let limits = &context.limits;
    let read = axum::body::to_bytes(body, limits.body_len_max);
    match tokio::time::timeout(limits.body_timeout, read).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => {
            let error = error.into_inner();
            if error.is::<http_body_util::LengthLimitError>() {
                return Err(ApiError::http(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    format!("the body is larger than {} bytes", limits.body_len_max),
                ));
            }
            let why = format!("the body could not be read: {error}");
            Err(ApiError::new(ErrorCode::InvalidRequest, why))
        }
        Err(_) => Err(ApiError::http(
            StatusCode::REQUEST_TIMEOUT,
            format!("the body did not arrive within {:?}", limits.body_timeout),
        )),
    }
}

/// From a valid request to answers that are under way.
async fn begin(
    context: &ApiContext,
    (endpoint, tenant): (Endpoint, Tenant),
    request: &ValidRequest,
    arrived: Instant,
    trace: &RequestTrace,
) -> Result<Session, ApiError> {
    let since = Instant::now();
    let table = table_that_serves(context, &request.model).await;
    let checked = Instant::now();
    let deployment = router::find(&table, &request.model)?;
    check_kind(deployment)?;
    let model = model_facts(context, &table, deployment).await?;
    let text = model.text.clone();
    // What clients made up stays out of it: this name is a deployment's.
    trace.say("gen_ai.request.model", request.model.as_str());
    trace.part("admission", since, Vec::new);
    let since = Instant::now();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (id, seed) = (random()?, random()?);
    let prepared = {
        let request = request.clone();
        context.texts.compute(move || prepare(&request, &model, seed, now)).await??
    };
    let prompt_tokens: usize = prepared.prompts.iter().map(|prompt| prompt.tokens.len()).sum();
    trace.say("gen_ai.usage.input_tokens", prompt_tokens);
    trace.part("tokenize", since, || {
        let prompts = ("shoal.prompts", prepared.prompts.len().into());
        vec![prompts, ("shoal.prompt_tokens", prompt_tokens.into())]
    });
    let since = Instant::now();
    // Tokenising a long prompt takes time in which the layout may have changed.
    let table = table_that_serves(context, &request.model).await;
    let deployment = router::find(&table, &request.model)?;
    let prepared_at = Instant::now();
    let places = places(context, &table, deployment, request, (&prepared, tenant))?;
    context.telemetry.went(Part::Route, prepared_at.elapsed());
    places.iter().step_by(usize::from(request.n).max(1)).for_each(|place| {
        trace.part("route", since, || place.why(deployment.base()));
    });
    let mut metrics = context.telemetry.request(&request.model, arrived, places.len());
    let deadline = tokio::time::Instant::now() + context.limits.request_deadline;
    let id_of = RequestId(id);
    let new = (id_of, deadline, trace);
    let answers = start(context, deployment, places, (&prepared, tenant), new).await;
    let answers = answers.inspect_err(|error| metrics.failed(error.code()))?;
    context.telemetry.went(Part::Dispatch, checked.elapsed());
    let facts = Facts {
        id: match endpoint {
            Endpoint::Chat => format!("chatcmpl-{id:016x}"),
            Endpoint::Completions => format!("cmpl-{id:016x}"),
        },
        created: now,
        model: request.model.clone(),
        prompts: prepared.prompts.iter().map(|prompt| Arc::clone(&prompt.tokens)).collect(),
        n: usize::from(request.n),
        logprobs: request.logprobs,
        return_token_ids: request.return_token_ids,
    };
    let stops = Stops { texts: &request.stop, tokens: &request.stop_token_ids };
    let session = Session::new(facts, text, stops, answers, metrics, deadline);
    Ok(session.traced(trace).cut_off_when(context.stopped()))
}

/// The table as soon as somebody serves the model; the last one seen where that does not come soon, or
/// where there is nothing to wait for. It says why.
pub(super) async fn table_that_serves(context: &ApiContext, model: &str) -> Arc<ServingTable> {
    let mut table = context.table.clone();
    let known = |table: &Arc<ServingTable>| {
        router::find(table, model).map_or(true, |deployment| {
            deployment.phase == DeploymentPhase::Failed
                || deployment.replicas.iter().any(|r| r.ready && r.requests.is_some())
        })
    };
    let waited = tokio::time::timeout(context.limits.ready_patience, table.wait_for(known)).await;
    match waited {
        Ok(Ok(table)) => Arc::clone(&table),
        _ => Arc::clone(&context.table.borrow()),
    }
}

pub(super) async fn model_facts(
    context: &ApiContext,
    table: &ServingTable,
    deployment: &ServedDeployment,
) -> Result<ModelFacts, ApiError> {
    // An adapter speaks with its base model's tokenizer.
    let base = table.deployments.get(deployment.base()).map_or(deployment, |base| base.as_ref());
    let key = |deployment: &ServedDeployment| -> Option<TextKey> {
        Some((deployment.folder.clone()?, deployment.created))
    };
    let in_use =
        |known: &TextKey| table.deployments.values().any(|d| key(d).as_ref() == Some(known));
    let text = match key(base) {
        Some(key) => Some(context.texts.get(&key, in_use).await?),
        None => None,
    };
    Ok(ModelFacts { vocab: deployment.vocab, context_max: deployment.context_max, text })
}

/// A place for each answer. The choices of one prompt go to one replica, whose blocks of the prompt
/// they share.
fn places(
    context: &ApiContext,
    table: &Arc<ServingTable>,
    deployment: &ServedDeployment,
    request: &ValidRequest,
    (prepared, tenant): (&Prepared, Tenant),
) -> Result<Vec<Place>, ApiError> {
    let mut places = Vec::new();
    let mut blocks = Vec::new();
    for prompt in &prepared.prompts {
        if context.prefix_affinity {
            block_hashes(&prompt.tokens, (tenant, deployment.adapter_id()), &mut blocks);
        }
        let request = RouteRequest {
            sequences: u32::from(request.n),
            prompt_tokens: prompt.tokens.len() as u32,
            max_tokens: prompt.max_tokens,
            block_hashes: &blocks,
            ..RouteRequest::default()
        };
        places.extend(context.places.take(random()?, table, deployment, &request)?);
    }
    Ok(places)
}

/// Asks the heads.
async fn start(
    context: &ApiContext,
    deployment: &ServedDeployment,
    places: Vec<Place>,
    (prepared, tenant): (&Prepared, Tenant),
    (id, deadline, trace): (RequestId, tokio::time::Instant, &RequestTrace),
) -> Result<Vec<LastingAnswer>, RecoveryError> {
    let n = (places.len() / prepared.prompts.len()).max(1);
    let mut answers = Vec::with_capacity(places.len());
    let mut reached = true;
    for (i, place) in places.into_iter().enumerate() {
        let whose = (tenant, deployment.adapter_id());
        let sequence = sequence(prepared, (i / n, i % n, i), id, whose);
        let answer = context.resumer.answer(deployment, sequence, deadline);
        let mut answer = answer.traced(trace);
        // One after the other: the first makes the connection, the others find it. Where there is
        // none, each goes on by itself.
        if reached {
            reached = answer.begin(place).await?;
        }
        answers.push(answer);
    }
    Ok(answers)
}

fn sequence(
    prepared: &Prepared,
    (prompt, choice, index): (usize, usize, usize),
    request: RequestId,
    (tenant, adapter): (Tenant, Option<AdapterId>),
) -> Sequence {
    // Both are at most `validate::CHOICES_MAX`.
    let stream = SamplingRecord::stream_of(prompt as u16, choice as u16);
    Sequence {
        request,
        attempt: Attempt(0),
        choice: index as u32,
        prompt: Arc::clone(&prepared.prompts[prompt].tokens),
        received: Vec::new(),
        sampling: SamplingRecord { stream, ..prepared.sampling },
        stop_tokens: Arc::clone(&prepared.stop_tokens),
        max_tokens: prepared.prompts[prompt].max_tokens,
        adapter,
        tenant: Some(tenant),
        reused: 0,
    }
}

/// Streams, or waits for the end.
async fn answer<S: Shape>(
    context: &ApiContext,
    mut session: Session,
    shape: S,
    request: &ValidRequest,
) -> Result<Response, ApiError> {
    if let Some(stream) = request.stream {
        if let Ok(first) = tokio::time::timeout(FIRST_EVENT_PATIENCE, session.first()).await {
            first?;
        }
        return Ok(sse::response(session, shape, stream.include_usage, &context.unread));
    }
    let mut answers = vec![Whole::default(); session.facts.prompts.len() * session.facts.n];
    while let Some(update) = session.next().await {
        let update = update?;
        answers[update.choice].add(update);
    }
    let json = shape.whole(&session.facts, &answers, session.usage());
    Ok(([(header::CONTENT_TYPE, "application/json")], json).into_response())
}

/// 64 bits from the system.
pub(super) fn random() -> Result<u64, ApiError> {
    getrandom::u64().map_err(|error| {
        tracing::error!(%error, "the system gives no random numbers");
        ApiError::new(ErrorCode::Internal, "the system gives no random numbers")
    })
}
