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
//! queue, and a client that is a whole queue behind and stands still loses its answer. Whatever it has not
//! read a little after the deadline is thrown away, even where nobody asks for it any more: hyper asks for
//! more only once the last bytes are written. The body owns the task: a client that hangs up drops both,
//! and so cancels every answer.

use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures_util::stream;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::openai::Shape;
use super::session::{Facts, Session, Update};

/// How long a stream may be silent: proxies cut connections that are, mostly after a minute.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Events that wait for a slow client: most whole answers.
const EVENTS_MAX: usize = 8192;

/// And so many bytes of them: twice what so many events of one token each are. With `top_logprobs` an event
/// is several times larger.
const BYTES_MAX: usize = 4 << 20;

/// Bytes of them that each stream may have whatever the others do: a few hundred events of one token, so
/// that clients who read are not held up by those who do not.
const BYTES_OWN: usize = 64 << 10;

/// Bytes that all streams of a coordinator together may have beyond their own: 64 clients that stand still.
/// With what 4096 connections have of their own no more than half a GiB waits for clients.
const BYTES_OF_ALL: usize = 256 << 20;

/// What all streams of a coordinator share.
#[derive(Clone, Debug)]
pub struct Unread(Arc<Semaphore>);

impl Unread {
    /// Nothing waits yet.
    pub fn none() -> Self {
        Self(Arc::new(Semaphore::new(BYTES_OF_ALL)))
    }
}

/// How long a client that is so far behind may stand still. Its head's other answers wait as long.
const STANDSTILL: Duration = Duration::from_secs(2);

/// How long a client may stand still whose answer has ended and is more than its own room. Nobody waits for it,
/// but what it has of the room of all.
const ENDED_STANDSTILL: Duration = Duration::from_secs(30);

/// How long the last event may wait for a slow client once the request's time is up.
const LAST_EVENT_GRACE: Duration = Duration::from_secs(1);

/// The response that streams this session.
pub fn response<S: Shape>(
    session: Session,
    shape: S,
    include_usage: bool,
    shared: &Unread,
) -> Response {
    let (events, queue) = queue(shared);
    let until = session.deadline + LAST_EVENT_GRACE;
    let request = session.facts.id.clone();
    // Until it is known whether it is cut off, its queue must not look as if it had ended.
    let open = events.events.clone();
    let beyond = Arc::clone(&events.room.beyond);
    let write = write(session, shape, include_usage, events);
    let unread = queue.clone();
    let task = tokio::spawn(async move {
        match tokio::time::timeout_at(until, write).await {
            Ok(Ok(())) => {
                drop(open);
                // The body ends this task as soon as it has read all.
                stands_still(&beyond, until).await;
            }
            Ok(Err(Stuck::HungUp)) => return,
            Ok(Err(Stuck::StandsStill)) | Err(_) => unread.cut_off(),
        }
        // Nobody reads any more, so there is nobody else to tell.
        tracing::info!(%request, "its client does not read on: its answer is given up");
        unread.throw_away();
    });
    let reader = Reader { queue, _task: Owned(task) };
    let events = stream::unfold(reader, |reader| async move {
        let event = reader.next().await?;
        Some((event, reader))
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

/// Until a client that is behind reads nothing for a while, or its time is up.
async fn stands_still(beyond: &Semaphore, until: Instant) {
    let mut left = beyond.available_permits();
    loop {
        let look = (Instant::now() + ENDED_STANDSTILL).min(until);
        tokio::time::sleep_until(look).await;
        let before = std::mem::replace(&mut left, beyond.available_permits());
        if look == until || (left == before && left < BYTES_MAX - BYTES_OWN) {
            return;
        }
    }
}

/// An event, with what lets its bytes wait.
type Waiting = (Bytes, Permits);

/// What an event's bytes take of a room, given back when it is read.
struct Permits {
    _own: OwnedSemaphorePermit,
    _shared: Option<OwnedSemaphorePermit>,
}

/// A place for each byte that may wait for a client.
struct Room {
    own: Arc<Semaphore>,
    beyond: Arc<Semaphore>,
    of_all: Arc<Semaphore>,
}

impl Room {
    fn new(shared: &Unread) -> Self {
        let places = |bytes| Arc::new(Semaphore::new(bytes));
        let (own, beyond) = (places(BYTES_OWN), places(BYTES_MAX - BYTES_OWN));
        Self { own, beyond, of_all: Arc::clone(&shared.0) }
    }

    /// As soon as there is room. Only who is behind already takes of what all share.
    async fn permits(&self, bytes: usize) -> Result<Permits, AcquireError> {
        // An event that is larger than all there is room for waits until it is alone.
        let bytes = bytes.min(BYTES_MAX - BYTES_OWN) as u32;
        let own = Arc::clone(&self.own).acquire_many_owned(bytes.min(BYTES_OWN as u32));
        let behind = async {
            let own = Arc::clone(&self.beyond).acquire_many_owned(bytes).await?;
            let shared = Arc::clone(&self.of_all).acquire_many_owned(bytes).await?;
            Ok(Permits { _own: own, _shared: Some(shared) })
        };
        // Who reads on gets its own room back while it waits for what the others have.
        tokio::select! {
            biased;
            own = own => Ok(Permits { _own: own?, _shared: None }),
            behind = behind => behind,
        }
    }
}

/// What waits for the client. The body reads it; the task empties it where the body does not.
#[derive(Clone)]
struct Queue(Arc<Mutex<Rest>>);

struct Rest {
    events: mpsc::Receiver<Waiting>,
    /// The end is missing.
    cut_off: bool,
}

fn queue(shared: &Unread) -> (Writer, Queue) {
    let (events, rest) = mpsc::channel(EVENTS_MAX);
    let room = Room::new(shared);
    let rest = Rest { events: rest, cut_off: false };
    (Writer { events, room }, Queue(Arc::new(Mutex::new(rest))))
}

impl Queue {
    /// The next event; `None` at the end. Whoever is given up is cut off, so that it does not take what it
    /// has for all of it.
    async fn next(&self) -> Option<io::Result<Bytes>> {
        // Not held while it waits: a body that nobody asks any more would keep it for ever.
        poll_fn(|cx| {
            let mut rest = self.lock();
            rest.events.poll_recv(cx).map(|event| match event {
                Some((event, _)) => Some(Ok(event)),
                None if std::mem::take(&mut rest.cut_off) => {
                    Some(Err(io::Error::other("the client has not read on in time")))
                }
                None => None,
            })
        })
        .await
    }

    /// What there is in it is not all.
    fn cut_off(&self) {
        self.lock().cut_off = true;
    }

    /// Throws away what has not been read.
    fn throw_away(&self) {
        let mut rest = self.lock();
        rest.events.close();
        while rest.events.try_recv().is_ok() {
            rest.cut_off = true;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Rest> {
        // A panic under the lock leaves a queue all the same.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Reader {
    queue: Queue,
    _task: Owned,
}

impl Reader {
    async fn next(&self) -> Option<io::Result<Bytes>> {
        match tokio::time::timeout(KEEP_ALIVE, self.queue.next()).await {
            Ok(event) => event,
            Err(_) => Some(Ok(Bytes::from_static(b": keep-alive\n\n"))),
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
enum Stuck {
    HungUp,
    StandsStill,
}

struct Writer {
    events: mpsc::Sender<Waiting>,
    room: Room,
}

impl Writer {
    async fn send(&self, event: Bytes) -> Result<(), Stuck> {
        let push = async {
            // The semaphores are never closed.
            let permits = self.room.permits(event.len()).await.map_err(|_| Stuck::HungUp)?;
            self.events.send((event, permits)).await.map_err(|_| Stuck::HungUp)
        };
        match tokio::time::timeout(STANDSTILL, push).await {
            Ok(pushed) => pushed,
            Err(_) => Err(Stuck::StandsStill),
        }
    }
}

/// Writes all events of a session, in order.
async fn write<S: Shape>(
    mut session: Session,
    mut shape: S,
    include_usage: bool,
    events: Writer,
) -> Result<(), Stuck> {
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

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt;
    use tokio::task::unconstrained;
    use tokio::time::timeout;

    use super::*;

    const LARGE: usize = 32 << 10;

    fn large() -> Bytes {
        Bytes::from_static(&[b'x'; LARGE])
    }

    /// As many as fit, of one who does not read.
    fn fill(events: &Writer) -> usize {
        let mut sent = 0;
        while let Some(Ok(())) = unconstrained(events.send(large())).now_or_never() {
            sent += 1;
        }
        sent
    }

    fn free(room: &Room) -> usize {
        room.own.available_permits() + room.beyond.available_permits()
    }

    #[tokio::test]
    async fn bytes_that_wait_are_bounded_and_each_that_is_read_makes_room() {
        let (events, queue) = queue(&Unread::none());
        assert_eq!(fill(&events), BYTES_MAX / LARGE);
        assert!(queue.next().await.unwrap().is_ok());
        assert_eq!(fill(&events), 1);
    }

    #[tokio::test]
    async fn who_reads_is_not_held_up_where_all_room_is_taken_by_those_who_do_not() {
        let shared = Unread::none();
        let behind: Vec<_> = std::iter::repeat_with(|| queue(&shared))
            .take_while(|(events, _)| fill(events) > BYTES_OWN / LARGE)
            .collect();
        assert_eq!(behind.len(), BYTES_OF_ALL.div_ceil(BYTES_MAX - BYTES_OWN));
        let (events, queue) = queue(&shared);
        assert_eq!(fill(&events), BYTES_OWN / LARGE);
        let mut next = pin!(unconstrained(events.send(large())));
        assert!(next.as_mut().now_or_never().is_none(), "there is room where all is taken");
        assert!(queue.next().await.unwrap().is_ok());
        assert!(matches!(next.now_or_never(), Some(Ok(()))), "it waits for others to read");
        drop(behind);
        assert_eq!(fill(&events), (BYTES_MAX - BYTES_OWN) / LARGE, "who is given up keeps room");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_has_ended_keeps_the_room_of_all_only_while_it_is_read() {
        let shared = Unread::none();
        let (events, queue) = queue(&shared);
        fill(&events);
        let (begun, late) = (Instant::now(), Duration::from_secs(600));
        let beyond = Arc::clone(&events.room.beyond);
        let mut end = pin!(stands_still(&beyond, begun + late));
        for _ in 0..3 {
            assert!(timeout(ENDED_STANDSTILL / 2, end.as_mut()).await.is_err());
            for _ in 0..4 {
                assert!(queue.next().await.unwrap().is_ok());
            }
        }
        end.await;
        let waited = begun.elapsed();
        assert!(waited >= ENDED_STANDSTILL && waited < late, "{waited:?}");
        let small = Semaphore::new(BYTES_MAX - BYTES_OWN);
        stands_still(&small, Instant::now() + late).await;
        assert!(begun.elapsed() >= late, "one that is not behind is not hurried");
    }

    #[tokio::test]
    async fn what_nobody_asks_for_is_thrown_away_in_the_end_and_its_client_is_cut_off() {
        let shared = Unread::none();
        let (events, queue) = queue(&shared);
        fill(&events);
        assert_eq!(free(&events.room), 0);
        queue.throw_away();
        assert_eq!(free(&events.room), BYTES_MAX, "it keeps its memory");
        assert_eq!(shared.0.available_permits(), BYTES_OF_ALL, "it keeps what all share");
        assert!(matches!(events.send(large()).await, Err(Stuck::HungUp)));
        assert!(queue.next().await.unwrap().is_err(), "it looks like a whole answer");
        assert!(queue.next().await.is_none());
    }

    #[tokio::test]
    async fn an_answer_that_was_read_ends_as_it_should() {
        let (events, queue) = queue(&Unread::none());
        events.send(large()).await.ok().unwrap();
        drop(events);
        assert!(queue.next().await.unwrap().is_ok());
        queue.throw_away();
        assert!(queue.next().await.is_none());
    }
}
