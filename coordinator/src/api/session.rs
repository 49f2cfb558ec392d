//! ● All answers of one request, from the heads to text: streamed and whole responses both read it.
//!
//! Dropping a session cancels what is still under way: that is what a client's hang-up does.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use serde::Serialize;
use shoal_protocol::error::{ErrorCode, Fault};
use shoal_protocol::id::TokenId;
use shoal_protocol::request::FinishReason;

use super::error::ApiError;
use super::stream::{Delta, TextStream};
use super::tokenize::ModelText;
use crate::dispatch::{AnswerEvent, Token};
use crate::recovery::{LastingAnswer, RecoveryError};
use crate::telemetry::{Finished, Outcome, RequestMetrics};
use crate::trace::{RequestTrace, StreamTrace};

/// The answers of a request.
pub struct Session {
    /// What every chunk and every response repeats.
    pub facts: Facts,
    text: Option<Arc<ModelText>>,
    choices: Vec<Choice>,
    running: FuturesUnordered<BoxFuture<'static, Step>>,
    /// Updates that were read ahead of the first chunk.
    ahead: VecDeque<Update>,
    metrics: RequestMetrics,
    trace: StreamTrace,
    /// Resolves when the coordinator can wait for the answers no longer.
    cut_off: BoxFuture<'static, ()>,
    /// When the request's time is up.
    pub deadline: tokio::time::Instant,
}

/// What ends an answer besides the model's own end tokens.
#[derive(Clone, Copy, Debug)]
pub struct Stops<'a> {
    /// Texts.
    pub texts: &'a [String],
    /// The client's own tokens.
    pub tokens: &'a [TokenId],
}

/// What every chunk and every response repeats, and what the client wants to see.
#[derive(Clone, Debug)]
pub struct Facts {
    /// `chatcmpl-…` or `cmpl-…`.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The deployment's name.
    pub model: String,
    /// The prompts, in the order of the request.
    pub prompts: Vec<Arc<[TokenId]>>,
    /// Answers per prompt.
    pub n: usize,
    /// Alternatives beside each token; `None`: no log-probabilities.
    pub logprobs: Option<u32>,
    /// Whether to report token ids.
    pub return_token_ids: bool,
}

/// Token counts, in OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize)]
pub struct Usage {
    /// Tokens of all prompts, each counted once.
    pub prompt_tokens: usize,
    /// Tokens of all answers.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// What is to be said of the prompts' tokens.
    pub prompt_tokens_details: PromptDetails,
}

/// OpenAI's details of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize)]
pub struct PromptDetails {
    /// Tokens of the prompts that no choice had to compute.
    pub cached_tokens: usize,
}

/// What became of one choice since the last update.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Update {
    /// Which choice, counted over all prompts.
    pub choice: usize,
    /// New text; may be empty.
    pub text: String,
    /// New tokens, with what is to be said of them.
    pub tokens: Vec<TokenOut>,
    /// How it ended, if it did.
    pub finish: Option<Finish>,
}

/// One token as it is reported.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOut {
    /// The token.
    pub id: TokenId,
    /// Its log-probability and the alternatives, best first; `None` where none were asked for, and
    /// for the token that ended the answer, which is no part of its text.
    pub logprobs: Option<Logprobs>,
}

/// What is said of a token where log-probabilities are asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// The token's bytes: parts of a character on their own.
    pub bytes: Vec<u8>,
    /// Its log-probability.
    pub logprob: f32,
    /// The alternatives with their bytes, best first.
    pub top: Vec<(Vec<u8>, f32)>,
    /// Characters of the answer before it.
    pub offset: usize,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// The stop string or the client's stop token that ended it.
    pub stop: Option<StopReason>,
}

/// What ended an answer, as vLLM reports it in `stop_reason`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum StopReason {
    /// A token of the request's `stop_token_ids`.
    Token(TokenId),
    /// A text of the request's `stop`.
    Text(String),
}

impl Finish {
    /// OpenAI's word.
    pub fn word(&self) -> &'static str {
        match self.reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

struct Choice {
    text: TextStream,
    tokens: usize,
    /// Tokens of its prompt that the head which began it had already.
    reused: usize,
    stop_token_ids: Arc<[TokenId]>,
    last: Instant,
}

struct Step {
    choice: usize,
    answer: Box<LastingAnswer>,
    event: Result<AnswerEvent, RecoveryError>,
}

async fn step(choice: usize, mut answer: Box<LastingAnswer>) -> Step {
    let event = answer.next().await;
    Step { choice, answer, event }
}

impl Session {
    /// Answers that have just been asked for.
    pub fn new(
        facts: Facts,
        text: Option<Arc<ModelText>>,
        stops: Stops<'_>,
        answers: Vec<LastingAnswer>,
        metrics: RequestMetrics,
        deadline: tokio::time::Instant,
    ) -> Self {
        let now = Instant::now();
        let stop_token_ids: Arc<[TokenId]> = stops.tokens.into();
        let choice = || Choice {
            text: TextStream::new(stops.texts.to_vec()),
            tokens: 0,
            reused: 0,
            stop_token_ids: Arc::clone(&stop_token_ids),
            last: now,
        };
        let choices = answers.iter().map(|_| choice()).collect();
        let running = FuturesUnordered::new();
        for (i, answer) in answers.into_iter().enumerate() {
            running.push(Box::pin(step(i, Box::new(answer))) as BoxFuture<'static, Step>);
        }
        let (ahead, cut_off) = (VecDeque::new(), Box::pin(std::future::pending()));
        let trace = RequestTrace::default().stream();
        Self { facts, text, choices, running, ahead, metrics, trace, cut_off, deadline }
    }

    /// The same answers, as a part of this request's trace.
    pub fn traced(self, request: &RequestTrace) -> Self {
        Self { trace: request.stream(), ..self }
    }

    /// The same answers; those that are under way when `stopped` resolves end with an error.
    pub fn cut_off_when(self, stopped: impl Future<Output = ()> + Send + 'static) -> Self {
        Self { cut_off: Box::pin(stopped), ..self }
    }

    /// The next update of any choice; `None` once all are complete. After an error the session is
    /// over. May be dropped while it waits: nothing is lost.
    pub async fn next(&mut self) -> Option<Result<Update, ApiError>> {
        match self.ahead.pop_front() {
            Some(update) => Some(Ok(update)),
            None => self.receive().await,
        }
    }

    /// Waits for the first event, so that an early failure still gets a status of its own.
    pub async fn first(&mut self) -> Result<(), ApiError> {
        if let Some(update) = self.receive().await {
            self.ahead.push_back(update?);
        }
        Ok(())
    }

    /// Tokens so far.
    pub fn usage(&self) -> Usage {
        let prompt_tokens = self.facts.prompts.iter().map(|prompt| prompt.len()).sum();
        let completion_tokens = self.choices.iter().map(|choice| choice.tokens).sum();
        let of_prompt = |choices: &[Choice]| choices.iter().map(|choice| choice.reused).min();
        let reused = self.choices.chunks(self.facts.n.max(1)).filter_map(of_prompt);
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens: reused.sum() },
        }
    }

    async fn receive(&mut self) -> Option<Result<Update, ApiError>> {
        let Step { choice, answer, event } = tokio::select! {
            // What is complete is given out, whatever else happens.
            biased;
            step = self.running.next() => step?,
            () = &mut self.cut_off => {
                let why = "the cluster is stopping, and this answer was not complete in time; \
                           ask again when it is back";
                self.metrics.failed(ErrorCode::Draining);
                self.trace.failed(ErrorCode::Draining.label());
                self.running.clear();
                let retry_after = Some(Duration::from_secs(1));
                let error = ApiError::new(ErrorCode::Draining, why);
                return Some(Err(ApiError { retry_after, ..error }));
            }
        };
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                let (code, request) = (error.code(), &self.facts.id);
                match code.fault() {
                    Fault::Caller if code != ErrorCode::Quarantined => {
                        tracing::debug!(request, choice, %error, "refused");
                    }
                    _ => tracing::warn!(request, choice, %error, "an answer failed"),
                }
                self.metrics.failed(code);
                self.trace.failed(code.label());
                self.running.clear();
                return Some(Err(error.into()));
            }
        };
        let (text, facts, metrics) = (self.text.as_deref(), &self.facts, &mut self.metrics);
        let mine = &mut self.choices[choice];
        if mine.tokens == 0 {
            mine.reused = answer.reused() as usize;
        }
        let update = self.trace.around(|| mine.take(choice, event, text, facts, metrics));
        if update.finish.is_none() {
            self.running.push(Box::pin(step(choice, answer)));
        }
        // Otherwise `answer` drops here: an answer that ran into a stop string is cancelled.
        Some(Ok(update))
    }
}

impl Choice {
    fn take(
        &mut self,
        choice: usize,
        event: AnswerEvent,
        model: Option<&ModelText>,
        facts: &Facts,
        metrics: &mut RequestMetrics,
    ) -> Update {
        let mut update = Update { choice, ..Update::default() };
        match event {
            AnswerEvent::Token(token) => {
                let now = Instant::now();
                match token.first {
                    Some((queue_us, prefill_us)) => {
                        let prompt = facts.prompts[choice / facts.n].len();
                        metrics.first_token(prompt, queue_us, prefill_us);
                    }
                    None => metrics.next_token(now.duration_since(self.last)),
                }
                self.last = now;
                self.tokens += 1;
                let offset = self.text.chars();
                let id = token.id;
                let delta = model.map_or_else(Delta::default, |model| self.text.push(id, model));
                let logprobs = facts.logprobs.map(|_| logprobs(token, model, offset));
                update.tokens.push(TokenOut { id, logprobs });
                self.add(&mut update, delta);
            }
            // Only an encoder's head says it, and those are asked by `encode`.
            AnswerEvent::Vector(_) => {
                let reason = FinishReason::Length;
                update.finish = Some(Finish { reason, stop: None });
            }
            AnswerEvent::Done { reason, stop_token } => {
                let delta = model.map_or_else(Delta::default, |model| self.text.finish(model));
                // The token that ended the answer counts, but is no part of its text.
                if let Some(id) = stop_token {
                    self.tokens += 1;
                    update.tokens.push(TokenOut { id, logprobs: None });
                }
                let own = stop_token.filter(|id| self.stop_token_ids.contains(id));
                update.finish = Some(Finish { reason, stop: own.map(StopReason::Token) });
                self.add(&mut update, delta);
            }
        }
        if let Some(finish) = &update.finish {
            metrics.finished(Finished {
                outcome: match finish.reason {
                    FinishReason::Stop => Outcome::Stop,
                    FinishReason::Length => Outcome::Length,
                },
                prompt: facts.prompts[choice / facts.n].len(),
                generated: self.tokens,
            });
        }
        update
    }

    fn add(&self, update: &mut Update, delta: Delta) {
        update.text = delta.text;
        if let Some(stop) = delta.stop {
            let text = self.text.stop_text(stop).to_owned();
            let stop = Some(StopReason::Text(text));
            update.finish = Some(Finish { reason: FinishReason::Stop, stop });
        }
    }
}

fn logprobs(token: Token, model: Option<&ModelText>, offset: usize) -> Logprobs {
    let bytes = |id| model.map(|model| model.token_bytes(id)).unwrap_or_default();
    let top = token.candidates.iter().map(|c| (bytes(c.token), c.logprob)).collect();
    Logprobs { bytes: bytes(token.id), logprob: token.logprob, top, offset }
}
