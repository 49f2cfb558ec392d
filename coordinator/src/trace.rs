//! ● The spans of a request at this coordinator, and the mark that it takes along to the heads.
//!
//! ```text
//! client's span ─► POST /v1/… ─┬─► admission ─► tokenize ─► route
//!                              ├─► attempt 0 ─► (the head's and its stages' spans)
//!                              ├─► route ─► attempt 1 …      where a worker was lost
//!                              └─► stream                    from the first token to the last byte
//! ```
//!
//! Each is given away when it ends, however it ends: a client that hangs up drops them all. No span has
//! text of a prompt or an answer in it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::http::{HeaderMap, HeaderValue};
use axum::response::Response;
use shoal_protocol::trace::{
    Span, SpanId, SpanKind, TraceMark, Traceparent, Tracer, UnixNanos, Value,
};

/// W3C's header of requests.
const TRACEPARENT: &str = "traceparent";

/// What W3C calls the same in responses (Trace Context, level 2).
const TRACERESPONSE: &str = "traceresponse";

/// A request that may be traced. Cheap to clone; where it is not traced all of it does nothing.
#[derive(Clone, Debug, Default)]
pub struct RequestTrace(Option<Arc<Traced>>);

/// The request's own span, until the last who holds it has let go.
#[derive(Debug)]
struct Traced {
    tracer: Tracer,
    mark: TraceMark,
    client: Option<SpanId>,
    name: &'static str,
    begun: Instant,
    said: Mutex<Said>,
}

#[derive(Debug, Default)]
struct Said {
    attributes: Vec<(&'static str, Value)>,
    error: Option<String>,
}

impl RequestTrace {
    /// A request to this endpoint has arrived, with these headers.
    pub fn begin(
        tracer: &Tracer,
        headers: &HeaderMap,
        name: &'static str,
        route: &'static str,
        begun: Instant,
    ) -> Self {
        if !tracer.is_on() {
            return Self(None);
        }
        let client = headers.get(TRACEPARENT).and_then(|value| value.to_str().ok());
        let client = client.and_then(Traceparent::parse);
        Self(tracer.request(client).map(|(mark, client)| {
            let attributes =
                vec![("http.request.method", "POST".into()), ("http.route", route.into())];
            let said = Mutex::new(Said { attributes, error: None });
            Arc::new(Traced { tracer: tracer.clone(), mark, client, name, begun, said })
        }))
    }

    /// Whether it is traced.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Something more about the request.
    pub fn say(&self, key: &'static str, value: impl Into<Value>) {
        if let Some(traced) = &self.0 {
            traced.said().attributes.push((key, value.into()));
        }
    }

    /// The request failed after its response had begun.
    pub fn failed(&self, why: &str) {
        if let Some(traced) = &self.0 {
            traced.said().error = Some(why.to_owned());
        }
    }

    /// The response begins: its status is noted, and it is told the trace.
    pub fn answered(&self, response: &mut Response) {
        let Some(traced) = &self.0 else { return };
        let status = response.status();
        self.say("http.response.status_code", u32::from(status.as_u16()));
        if status.is_server_error() {
            self.failed(status.as_str());
        }
        let here = Traceparent { mark: traced.mark, sampled: true };
        if let Ok(here) = HeaderValue::from_str(&here.to_string()) {
            response.headers_mut().insert(TRACERESPONSE, here);
        }
    }

    /// A part of the request, from then until now.
    pub fn part(
        &self,
        name: &'static str,
        since: Instant,
        attributes: impl FnOnce() -> Vec<(&'static str, Value)>,
    ) {
        if let Some(traced) = &self.0 {
            let mut span = traced.tracer.span(traced.mark, name, wall(since), wall(Instant::now()));
            span.attributes = attributes();
            traced.tracer.give(span);
        }
    }

    /// An attempt begins.
    pub fn attempt(&self, attributes: impl FnOnce() -> Vec<(&'static str, Value)>) -> AttemptTrace {
        AttemptTrace(self.0.as_ref().map(|traced| {
            let mark = TraceMark { span: traced.tracer.id(), ..traced.mark };
            let (request, begun) = (Arc::clone(traced), Instant::now());
            Box::new(Attempt { request, mark, begun, attributes: attributes(), outcome: None })
        }))
    }

    /// The way of the answers back to the client.
    pub fn stream(&self) -> StreamTrace {
        StreamTrace(self.0.as_ref().map(|_| {
            let request = self.clone();
            Box::new(Streamed { request, since: None, tokens: 0, text: Duration::ZERO })
        }))
    }
}

impl Traced {
    fn said(&self) -> std::sync::MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        let said = std::mem::take(&mut *self.said());
        self.tracer.give(Span {
            mark: self.mark,
            parent: self.client,
            name: self.name,
            kind: SpanKind::Server,
            start: wall(self.begun),
            end: wall(Instant::now()),
            attributes: said.attributes,
            error: said.error,
        });
    }
}

/// One attempt of one answer; given away when it is dropped.
#[derive(Debug)]
pub struct AttemptTrace(Option<Box<Attempt>>);

#[derive(Debug)]
struct Attempt {
    request: Arc<Traced>,
    mark: TraceMark,
    begun: Instant,
    attributes: Vec<(&'static str, Value)>,
    /// How it ended; `None`: it was let go.
    outcome: Option<(&'static str, bool)>,
}

impl AttemptTrace {
    /// What the head's spans hang under.
    pub fn mark(&self) -> Option<TraceMark> {
        self.0.as_ref().map(|attempt| attempt.mark)
    }

    /// The answer is complete.
    pub fn complete(&mut self) {
        self.outcome("complete", false);
    }

    /// It was lost.
    pub fn lost(&mut self, why: &'static str) {
        self.outcome(why, true);
    }

    fn outcome(&mut self, outcome: &'static str, lost: bool) {
        if let Some(attempt) = &mut self.0 {
            attempt.outcome = Some((outcome, lost));
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let (outcome, lost) = self.outcome.unwrap_or(("let go", false));
        let mut attributes = std::mem::take(&mut self.attributes);
        attributes.push(("shoal.outcome", outcome.into()));
        self.request.tracer.give(Span {
            mark: self.mark,
            parent: Some(self.request.mark.span),
            name: "attempt",
            kind: SpanKind::Client,
            start: wall(self.begun),
            end: wall(Instant::now()),
            attributes,
            error: lost.then(|| outcome.to_owned()),
        });
    }
}

/// From the first token until the session is over.
#[derive(Debug)]
pub struct StreamTrace(Option<Box<Streamed>>);

#[derive(Debug)]
struct Streamed {
    request: RequestTrace,
    since: Option<Instant>,
    tokens: u64,
    text: Duration,
}

impl StreamTrace {
    /// Makes text of an event, and notes how long that took.
    pub fn around<T>(&mut self, make_text: impl FnOnce() -> T) -> T {
        let Some(streamed) = &mut self.0 else { return make_text() };
        let began = Instant::now();
        streamed.since.get_or_insert(began);
        streamed.tokens += 1;
        let made = make_text();
        streamed.text += began.elapsed();
        made
    }

    /// An answer ended with an error.
    pub fn failed(&self, why: &str) {
        if let Some(streamed) = &self.0 {
            streamed.request.failed(why);
        }
    }
}

impl Drop for Streamed {
    fn drop(&mut self) {
        let Some(since) = self.since else { return };
        self.request.part("stream", since, || {
            vec![("shoal.events", self.tokens.into()), ("shoal.detokenize_us", self.text.into())]
        });
    }
}

/// The wall time of something that happened a moment ago.
fn wall(at: Instant) -> UnixNanos {
    UnixNanos::before(SystemTime::now(), at.elapsed())
}
