//! ● Embeddings and rankings: read, check, tokenise, ask the heads for each input, answer.
//!
//! ```text
//! body ─► ask (○) ─► tokens (○) ─► LastingAnswer for each input, some at once ══shoal-req══► heads
//! client ◄─ shapes (○) ◄─ vectors, in the order of the inputs ◄──────────────────────────────┘
//! ```
//!
//! An input whose worker dies is computed again elsewhere: it is the same vector, to the bit. A model
//! with a head for classification scores (query, document) pairs; one that embeds ranks by cosine.

mod ask;
mod shapes;
mod tokens;

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, TryStreamExt, stream};
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{Attempt, RequestId, TokenId};
use shoal_protocol::request::SamplingRecord;

use self::ask::{Embed, Rank};
use self::tokens::{Reading, Source};
use super::ApiContext;
use super::error::ApiError;
use super::generate::{model_facts, not_draining, random, read, stopping, table_that_serves};
use super::places::Place;
use super::prepare::ModelFacts;
use super::refusal::Refusal;
use super::validate::Prompt;
use crate::dispatch::{AnswerEvent, Sequence, Vector};
use crate::recovery::{LastingAnswer, RecoveryError};
use crate::router::{self, RouteRequest};
use crate::serving::{ServedDeployment, ServedKind};
use crate::telemetry::{Finished, Outcome, RequestMetrics};
use crate::trace::RequestTrace;

/// Inputs of one call that are with heads at a time: enough to fill steps, and few enough that a call of
/// thousands leaves room in their queues for others.
const AT_ONCE: usize = 64;

/// `/v1/embeddings`.
pub async fn embeddings(context: Arc<ApiContext>, headers: &HeaderMap, body: Body) -> Response {
    let arrived = Instant::now();
    let (name, route) = ("POST /v1/embeddings", "/v1/embeddings");
    let trace = RequestTrace::begin(&context.tracer, headers, name, route, arrived);
    let answered = embed(&context, body, arrived, &trace).await;
    finish(answered, &trace)
}

/// `/rerank`, also under `/v1` and `/v2`.
pub async fn rerank(context: Arc<ApiContext>, headers: &HeaderMap, body: Body) -> Response {
    let arrived = Instant::now();
    let trace = RequestTrace::begin(&context.tracer, headers, "POST /rerank", "/rerank", arrived);
    let answered = rank(&context, body, arrived, &trace).await;
    finish(answered, &trace)
}

/// `answered` is the request's name and the body.
fn finish(answered: Result<(String, String), ApiError>, trace: &RequestTrace) -> Response {
    let mut response = match answered {
        Ok((id, json)) => {
            let mut response = ([(header::CONTENT_TYPE, "application/json")], json).into_response();
            if let Ok(id) = HeaderValue::from_str(&id) {
                response.headers_mut().insert("x-request-id", id);
            }
            response
        }
        Err(error) => error.into_response(),
    };
    trace.answered(&mut response);
    response
}

async fn embed(
    context: &ApiContext,
    body: Body,
    arrived: Instant,
    trace: &RequestTrace,
) -> Result<(String, String), ApiError> {
    not_draining(context)?;
    let asked = Embed::parse(&read(context, body).await?)?;
    let call = Call::begin(context, &asked.model, arrived, trace).await?;
    let normalize = match call.deployment.kind {
        ServedKind::Embed { width, normalize } => {
            check_dimensions(&asked, width)?;
            normalize
        }
        kind => return Err(call.wrong_kind(kind)),
    };
    let (model, base64) = (asked.model.clone(), asked.base64);
    let dimensions = asked.dimensions;
    let reading =
        Reading { param: "input", cut: asked.cut, add_special_tokens: asked.add_special_tokens };
    let inputs = call
        .tokens(move |facts| {
            let one =
                |(i, input): (usize, &Prompt)| tokens::read(Source::One(input), i, facts, reading);
            asked.inputs.iter().enumerate().map(one).collect()
        })
        .await?;
    let tokens = inputs.iter().map(|input| input.len()).sum();
    let (id, mut vectors) = call.encode(inputs).await?;
    // Millions of numbers become text: not on a thread that has links to serve.
    let body = move || {
        vectors.iter_mut().for_each(|vector| shapes::shorten(vector, dimensions, normalize));
        shapes::embeddings(&model, &vectors, base64, tokens)
    };
    let body = context.texts.compute(body).await?;
    Ok((format!("embd-{id:016x}"), body))
}

fn check_dimensions(asked: &Embed, width: u32) -> Result<(), Refusal> {
    match asked.dimensions {
        Some(dimensions) if dimensions > width => Err(Refusal::OutOfRange {
            param: "dimensions".to_owned(),
            expected: format!("from 1 to {width}, the width of this model's embeddings"),
            found: dimensions.to_string(),
        }),
        _ => Ok(()),
    }
}

async fn rank(
    context: &ApiContext,
    body: Body,
    arrived: Instant,
    trace: &RequestTrace,
) -> Result<(String, String), ApiError> {
    not_draining(context)?;
    let asked = Arc::new(Rank::parse(&read(context, body).await?)?);
    let call = Call::begin(context, &asked.model, arrived, trace).await?;
    let pairs = match call.deployment.kind {
        ServedKind::Rank { labels: 1 } => true,
        ServedKind::Embed { .. } => false,
        ServedKind::Rank { labels } => {
            let why = format!(
                "`{}` sorts into {labels} classes, and a ranking needs a model with one score; \
                 deploy a cross-encoder with one label, or an embedding model",
                asked.model
            );
            return Err(ApiError::new(ErrorCode::InvalidRequest, why).about("model"));
        }
        kind => return Err(call.wrong_kind(kind)),
    };
    let reading = Reading { param: "documents", cut: asked.cut, add_special_tokens: true };
    let texts = Arc::clone(&asked);
    let inputs = call
        .tokens(move |facts| {
            let documents = texts.documents.iter().enumerate();
            if pairs {
                let pair = |(i, document): (usize, &String)| {
                    tokens::read(Source::Pair(&texts.query, document), i, facts, reading)
                };
                return documents.map(pair).collect();
            }
            let own = Reading { param: "query", ..reading };
            let query = Prompt::Text(texts.query.clone());
            let one = |(i, document): (usize, &String)| {
                tokens::read(Source::One(&Prompt::Text(document.clone())), i, facts, reading)
            };
            let query = tokens::read(Source::One(&query), 0, facts, own);
            std::iter::once(query).chain(documents.map(one)).collect()
        })
        .await?;
    let tokens = inputs.iter().map(|input| input.len()).sum();
    let (id, vectors) = call.encode(inputs).await?;
    let id = format!("rerank-{id:016x}");
    let name = id.clone();
    let body = move || {
        let first = |score: &Vec<f32>| score.first().copied().map_or(0.0, f64::from);
        let scores: Vec<f64> = match (pairs, vectors.split_first()) {
            (false, Some((query, documents))) => {
                documents.iter().map(|document| shapes::cosine(query, document)).collect()
            }
            _ => vectors.iter().map(first).collect(),
        };
        shapes::ranking(&name, &asked, &scores, tokens)
    };
    let body = context.texts.compute(body).await?;
    Ok((id, body))
}

/// One call: where it goes.
struct Call<'a> {
    context: &'a ApiContext,
    deployment: Arc<ServedDeployment>,
    facts: ModelFacts,
    arrived: Instant,
    trace: &'a RequestTrace,
}

impl<'a> Call<'a> {
    async fn begin(
        context: &'a ApiContext,
        model: &str,
        arrived: Instant,
        trace: &'a RequestTrace,
    ) -> Result<Self, ApiError> {
        // The body may have taken its time.
        not_draining(context)?;
        let table = table_that_serves(context, model).await;
        let deployment = Arc::clone(router::find(&table, model)?);
        let facts = model_facts(context, &table, &deployment).await?;
        trace.say("gen_ai.request.model", model);
        Ok(Self { context, deployment, facts, arrived, trace })
    }

    fn wrong_kind(&self, kind: ServedKind) -> ApiError {
        let name = &self.deployment.name;
        let why = match kind {
            ServedKind::Generate => format!(
                "`{name}` writes text and makes no embeddings; ask /v1/chat/completions or \
                 /v1/completions, or deploy an encoder"
            ),
            ServedKind::Rank { .. } => {
                format!("`{name}` scores pairs of texts and makes no embeddings; ask /v1/rerank")
            }
            ServedKind::Embed { .. } => format!("`{name}` makes embeddings; ask /v1/embeddings"),
        };
        ApiError::new(ErrorCode::InvalidRequest, why).about("model")
    }

    /// Tokenises on a thread for computing.
    async fn tokens(
        &self,
        work: impl FnOnce(&ModelFacts) -> Result<Vec<Arc<[TokenId]>>, Refusal> + Send + 'static,
    ) -> Result<Vec<Arc<[TokenId]>>, ApiError> {
        let (since, facts) = (Instant::now(), self.facts.clone());
        let inputs = self.context.texts.compute(move || work(&facts)).await??;
        self.trace.part("tokenize", since, || vec![("shoal.prompts", inputs.len().into())]);
        Ok(inputs)
    }

    /// The vectors of all inputs, in their order, and the request's number.
    async fn encode(&self, inputs: Vec<Arc<[TokenId]>>) -> Result<(u64, Vec<Vec<f32>>), ApiError> {
        let id = random()?;
        // Tokenising takes time in which the layout may have changed.
        let table = table_that_serves(self.context, self.deployment.name.as_str()).await;
        let deployment = Arc::clone(router::find(&table, self.deployment.name.as_str())?);
        let first = RouteRequest {
            sequences: 1,
            prompt_tokens: inputs.first().map_or(0, |input| input.len()) as u32,
            ..RouteRequest::default()
        };
        // Whoever finds no room is told while it can go elsewhere; the other inputs wait for theirs.
        let mut place = self.context.places.take(random()?, &table, &deployment, &first)?.pop();
        let (name, count) = (self.deployment.name.as_str(), inputs.len());
        let mut metrics = self.context.telemetry.request(name, self.arrived, count);
        let deadline = tokio::time::Instant::now() + self.context.limits.request_deadline;
        let answer = |(index, input): (usize, &Arc<[TokenId]>)| {
            let sequence = sequence(RequestId(id), index as u32, input);
            let answer = self.context.resumer.answer(&deployment, sequence, deadline);
            let answer = if index == 0 { answer } else { answer.promised() };
            vector_of(answer.traced(self.trace), place.take())
        };
        let answers: Vec<_> = inputs.iter().enumerate().map(answer).collect();
        let all = stream::iter(answers).buffered(AT_ONCE).try_collect::<Vec<Vector>>();
        let vectors: Result<Vec<Vector>, RecoveryError> = tokio::select! {
            biased;
            vectors = all => vectors,
            () = self.context.stopped() => {
                metrics.failed(ErrorCode::Draining);
                return Err(stopping());
            }
        };
        let vectors = vectors.inspect_err(|error| metrics.failed(error.code()))?;
        Ok((id, tell(&mut metrics, &inputs, vectors)))
    }
}

/// Waits for an answer's vector, from whichever head. Without a place it waits for one first.
async fn vector_of(
    mut answer: LastingAnswer,
    place: Option<Place>,
) -> Result<Vector, RecoveryError> {
    if let Some(place) = place {
        answer.begin(place).await?;
    }
    loop {
        if let AnswerEvent::Vector(vector) = answer.next().await? {
            return Ok(vector);
        }
    }
}

/// Counts what came, and keeps the numbers.
fn tell(
    metrics: &mut RequestMetrics,
    inputs: &[Arc<[TokenId]>],
    vectors: Vec<Vector>,
) -> Vec<Vec<f32>> {
    let one = |(input, vector): (&Arc<[TokenId]>, Vector)| {
        metrics.encoded(input.len(), vector.queue_us, vector.encode_us);
        let prompt = input.len();
        metrics.finished(Finished { outcome: Outcome::Stop, prompt, generated: 0 });
        vector.values
    };
    inputs.iter().zip(vectors).map(one).collect()
}

fn sequence(request: RequestId, index: u32, input: &Arc<[TokenId]>) -> Sequence {
    Sequence {
        request,
        attempt: Attempt(0),
        choice: index,
        prompt: Arc::clone(input),
        received: Vec::new(),
        sampling: SamplingRecord::GREEDY,
        stop_tokens: Arc::from([]),
        max_tokens: 0,
        adapter: None,
        tenant: None,
        reused: 0,
    }
}
