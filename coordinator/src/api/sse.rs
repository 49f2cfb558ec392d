//! ● Writes a session as server-sent events.
//!
//! ```text
//! data: {chunk}    …    data: {usage}    data: [DONE]
//! data: {"error": …}                      and nothing more, where an answer fails in the middle
//! : keep-alive                            where nothing came for a while
//! ```
//!
//! The session lives in the body: a client that hangs up drops it, and so cancels every answer.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures_util::stream;

use super::error::ApiError;
use super::openai::Shape;
use super::session::Session;

/// How long a stream may be silent: proxies cut connections that are, mostly after a minute.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

struct Writer<S> {
    session: Session,
    shape: S,
    /// Whether the usage comes at the end.
    include_usage: bool,
    /// Events that are ready.
    ready: VecDeque<Bytes>,
    /// Nothing follows what is ready.
    over: bool,
}

/// The response that streams this session.
pub fn response<S: Shape>(session: Session, mut shape: S, include_usage: bool) -> Response {
    let opening = shape.opening(&session.facts);
    let ready = opening.iter().map(|chunk| event(chunk)).collect();
    let writer = Writer { session, shape, include_usage, ready, over: false };
    let events = stream::unfold(writer, |mut writer| async move {
        let event = writer.next().await?;
        Some((Ok::<_, Infallible>(event), writer))
    });
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that buffer would turn a stream into one late answer.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn event(json: &str) -> Bytes {
    Bytes::from(format!("data: {json}\n\n"))
}

impl<S: Shape> Writer<S> {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.over {
                return None;
            }
            match tokio::time::timeout(KEEP_ALIVE, self.session.next()).await {
                Err(_) => return Some(Bytes::from_static(b": keep-alive\n\n")),
                Ok(None) => self.end(),
                Ok(Some(Err(error))) => self.fail(&error),
                Ok(Some(Ok(update))) => {
                    let facts = &self.session.facts;
                    let told = facts.logprobs.is_some() || facts.return_token_ids;
                    // A token without text yet, of which nothing else is to be said, makes no chunk.
                    let silent = update.text.is_empty() && update.finish.is_none();
                    if !silent || (told && !update.tokens.is_empty()) {
                        self.ready.push_back(event(&self.shape.chunk(facts, &update)));
                    }
                }
            }
        }
    }

    fn end(&mut self) {
        if self.include_usage {
            let usage = self.shape.usage(&self.session.facts, self.session.usage());
            self.ready.push_back(event(&usage));
        }
        self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
        self.over = true;
    }

    fn fail(&mut self, error: &ApiError) {
        self.ready.push_back(event(&error.json()));
        self.over = true;
    }
}
