//! ● Writes a session as server-sent events.
//!
//! ```text
//! data: {chunk}    …    data: {usage}    data: [DONE]
//! data: {"error": …}                      and nothing more, where an answer fails in the middle
//! : keep-alive                            where nothing came for a while
//! ```
//!
//! A task of its own reads the session into a bounded queue, and the body reads the queue: the
//! request's deadline holds also where a client has stopped reading. All answers of one head share a
//! connection and its credit, so what a client does not read must not stay there: it is read on into the
//! queue, and a client that is a whole queue behind and stands still loses its answer. The body owns the
//! task: a client that hangs up drops both, and so cancels every answer.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures_util::stream;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::task::JoinHandle;

use super::openai::Shape;
use super::session::{Facts, Session, Update};

/// How long a stream may be silent: proxies cut connections that are, mostly after a minute.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Events that wait for a slow client: most whole answers. Some 2 MiB, where a client is that slow.
const EVENTS_MAX: usize = 8192;

/// How long a client that is so far behind may stand still. Its head's other answers wait as long.
const STANDSTILL: Duration = Duration::from_secs(2);

/// How long the last event may wait for a slow client once the request's time is up.
const LAST_EVENT_GRACE: Duration = Duration::from_secs(1);

/// The response that streams this session.
pub fn response<S: Shape>(session: Session, shape: S, include_usage: bool) -> Response {
    let (events, queue) = mpsc::channel(EVENTS_MAX);
    let until = session.deadline + LAST_EVENT_GRACE;
    let request = session.facts.id.clone();
    let write = write(session, shape, include_usage, Writer { events });
    let task = tokio::spawn(async move {
        // Nobody reads any more, so there is nobody else to tell.
        match tokio::time::timeout_at(until, write).await {
            Ok(Ok(())) | Ok(Err(Unread::HungUp)) => {}
            Ok(Err(Unread::StandsStill)) | Err(_) => {
                tracing::info!(%request, "its client does not read on: its answer is given up");
            }
        }
    });
    let reader = Reader { queue, _task: Owned(task) };
    let events = stream::unfold(reader, |mut reader| async move {
        let event = reader.next().await?;
        Some((Ok::<_, Infallible>(event), reader))
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

struct Reader {
    queue: mpsc::Receiver<Bytes>,
    _task: Owned,
}

impl Reader {
    async fn next(&mut self) -> Option<Bytes> {
        match tokio::time::timeout(KEEP_ALIVE, self.queue.recv()).await {
            Ok(event) => event,
            Err(_) => Some(Bytes::from_static(b": keep-alive\n\n")),
        }
    }
}

/// A task that ends with its owner.
struct Owned(JoinHandle<()>);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Why an event could not be written.
enum Unread {
    HungUp,
    StandsStill,
}

struct Writer {
    events: mpsc::Sender<Bytes>,
}

impl Writer {
    async fn send(&self, event: Bytes) -> Result<(), Unread> {
        let event = match self.events.try_send(event) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Closed(_)) => return Err(Unread::HungUp),
            Err(TrySendError::Full(event)) => event,
        };
        match tokio::time::timeout(STANDSTILL, self.events.send(event)).await {
            Ok(sent) => sent.map_err(|_| Unread::HungUp),
            Err(_) => Err(Unread::StandsStill),
        }
    }
}

/// Writes all events of a session, in order.
async fn write<S: Shape>(
    mut session: Session,
    mut shape: S,
    include_usage: bool,
    events: Writer,
) -> Result<(), Unread> {
    for chunk in shape.opening(&session.facts) {
        events.send(event(&chunk)).await?;
    }
    while let Some(update) = session.next().await {
        let update = match update {
            Ok(update) => update,
            Err(error) => return events.send(event(&error.json())).await,
        };
        if is_worth_a_chunk(&session.facts, &update) {
            events.send(event(&shape.chunk(&session.facts, &update))).await?;
        }
    }
    if include_usage {
        events.send(event(&shape.usage(&session.facts, session.usage()))).await?;
    }
    events.send(Bytes::from_static(b"data: [DONE]\n\n")).await
}

/// A token without text yet, of which nothing else is to be said, makes no chunk.
fn is_worth_a_chunk(facts: &Facts, update: &Update) -> bool {
    let told = facts.logprobs.is_some() || facts.return_token_ids;
    !update.text.is_empty() || update.finish.is_some() || (told && !update.tokens.is_empty())
}

fn event(json: &str) -> Bytes {
    Bytes::from(format!("data: {json}\n\n"))
}
