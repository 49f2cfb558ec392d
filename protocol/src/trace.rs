//! ○ Traces: what marks a request that is traced, how the mark crosses a wire, and the hand into which
//! nodes give their spans.
//!
//! ```text
//! client ── traceparent ──► coordinator ══ Trace, Generate ══► head ══ Open, Trace ══► stage ══► stage …
//!                               └─ Span ─► Tracer ─► bounded queue ─► whoever exports (`cluster/`)
//! ```
//!
//! A request that is not sampled has no mark: nothing is sent, kept or timed for it. There is no clock
//! here: spans are told their times, in the wall time of the node that measured them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::frame::{FrameError, flat};
use crate::id::{Generation, SequenceId};

/// A trace; never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceId(pub u128);

/// One span of it; never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SpanId(pub u64);

/// Where in a sampled trace something happens: spans of it hang under `span`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceMark {
    /// The trace.
    pub trace: TraceId,
    /// The span that it happens under.
    pub span: SpanId,
}

flat! {
    /// The header of a `Trace` frame; it has no body. On `shoal-req` it stands before `Generate`, on
    /// `shoal-act` right behind the `Open` of its sequence.
    pub struct TraceHeader = 48 {
        /// The layout; 0 on `shoal-req`.
        pub generation: u64,
        /// The sequence; 0 on `shoal-req`.
        pub sequence: u64,
        /// The upper half of the trace's id.
        pub trace_high: u64,
        /// The lower half.
        pub trace_low: u64,
        /// The span that the receiver's spans hang under.
        pub span: u64,
        /// 0; for later versions.
        pub reserved: u64,
    }
}

impl TraceHeader {
    /// For a head: the request that follows is traced.
    pub fn of_request(mark: TraceMark) -> Self {
        Self::of_sequence(mark, Generation(0), SequenceId(0))
    }

    /// For a stage: this sequence, which has just been opened, is traced.
    pub fn of_sequence(mark: TraceMark, generation: Generation, sequence: SequenceId) -> Self {
        Self {
            generation: generation.0,
            sequence: sequence.0,
            trace_high: (mark.trace.0 >> 64) as u64,
            trace_low: mark.trace.0 as u64,
            span: mark.span.0,
            reserved: 0,
        }
    }

    /// The mark, if it is one.
    pub fn mark(&self) -> Result<TraceMark, FrameError> {
        let trace = u128::from(self.trace_high) << 64 | u128::from(self.trace_low);
        if trace == 0 || self.span == 0 {
            let why = "the id of a trace and of a span is not 0".to_owned();
            return Err(FrameError::Invalid { what: "TraceHeader", why });
        }
        Ok(TraceMark { trace: TraceId(trace), span: SpanId(self.span) })
    }
}

/// W3C's `traceparent`, as a client sends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traceparent {
    /// The client's trace and span.
    pub mark: TraceMark,
    /// Whether the client records it.
    pub sampled: bool,
}

impl Traceparent {
    /// `None` for what is no `traceparent`: it is ignored then, as W3C wants it.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.trim().split('-');
        let (version, trace) = (hex(parts.next()?, 2)?, hex(parts.next()?, 32)?);
        let (span, flags) = (hex(parts.next()?, 16)?, hex(parts.next()?, 2)?);
        // Later versions may have more behind the flags; this one has not.
        let more = parts.next().is_some();
        if version == 0xff || (version == 0 && more) || trace == 0 || span == 0 {
            return None;
        }
        let mark = TraceMark { trace: TraceId(trace), span: SpanId(span as u64) };
        Some(Self { mark, sampled: flags & 1 == 1 })
    }
}

impl fmt::Display for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TraceMark { trace, span } = self.mark;
        write!(f, "00-{:032x}-{:016x}-{:02x}", trace.0, span.0, u8::from(self.sampled))
    }
}

/// Exactly so many lower-case digits.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let right = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if text.len() != digits || !text.bytes().all(right) {
        return None;
    }
    u128::from_str_radix(text, 16).ok()
}

/// Nanoseconds since 1970, by the clock of the node that measured them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnixNanos(pub u64);

impl UnixNanos {
    /// So long ago, as it is `now`.
    pub fn before(now: SystemTime, ago: Duration) -> Self {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(now.saturating_sub(ago).as_nanos()).unwrap_or(u64::MAX))
    }
}

/// What a span says of itself. Never text of a prompt or an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A number.
    Int(i64),
    /// A word.
    Text(String),
    /// Yes or no.
    Bool(bool),
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Value::Int(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Value::Int(value.into())
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Self {
        Value::from(value as u64)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Value::Bool(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Value::Text(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Value::Text(value)
    }
}

/// Microseconds.
impl From<Duration> for Value {
    fn from(value: Duration) -> Self {
        Value::from(u64::try_from(value.as_micros()).unwrap_or(u64::MAX))
    }
}

/// Which side of a call a span is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// Neither.
    Internal,
    /// It serves somebody.
    Server,
    /// It asks somebody.
    Client,
}

/// Something that took time.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Its trace, and its own id.
    pub mark: TraceMark,
    /// What it is a part of; `None` at a trace's root.
    pub parent: Option<SpanId>,
    /// What it is called.
    pub name: &'static str,
    /// Which side of a call it is.
    pub kind: SpanKind,
    /// When it began.
    pub start: UnixNanos,
    /// When it ended; not before it began.
    pub end: UnixNanos,
    /// What else is to be said of it.
    pub attributes: Vec<(&'static str, Value)>,
    /// What went wrong, where something did.
    pub error: Option<String>,
}

impl Span {
    /// One thing more to be said of it.
    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.attributes.push((key, value.into()));
        self
    }
}

/// What goes to whoever exports.
#[derive(Debug)]
pub enum Given {
    /// A span that is complete.
    Span(Span),
    /// Nothing that comes behind this is waited for.
    Close,
}

/// What became of spans; all grow for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SpanCounts {
    /// The collector has taken them.
    pub exported: u64,
    /// Dropped, since the queue was full.
    pub queue_full: u64,
    /// Dropped, since the collector did not take them.
    pub refused: u64,
}

/// The hand into which a node gives its spans. Cheap to clone; one that is off takes nothing, and
/// decides that nothing is traced. It never waits.
#[derive(Clone, Debug, Default)]
pub struct Tracer(Option<Arc<Shared>>);

#[derive(Debug)]
struct Shared {
    queue: SyncSender<Given>,
    /// Ids are this counter, mixed: unique in a process, and unlike those of others by its seed.
    ids: AtomicU64,
    ratio: f64,
    exported: AtomicU64,
    queue_full: AtomicU64,
    refused: AtomicU64,
}

impl Tracer {
    /// One that takes nothing.
    pub fn off() -> Self {
        Self::default()
    }

    /// One that queues at most `queue` spans for the receiver. `ratio` of the requests whose clients
    /// say nothing are traced. The seed is 64 random bits.
    pub fn new(seed: u64, ratio: f64, queue: usize) -> (Self, Receiver<Given>) {
        let (queue, receiver) = sync_channel(queue);
        let zero = AtomicU64::default;
        let (exported, queue_full, refused) = (zero(), zero(), zero());
        let ids = AtomicU64::new(seed);
        let shared = Shared { queue, ids, ratio, exported, queue_full, refused };
        (Self(Some(Arc::new(shared))), receiver)
    }

    /// Whether it takes anything.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// A new span for a request: the client's word on sampling holds, and without one the dice decide.
    /// With it comes the client's span.
    pub fn request(&self, client: Option<Traceparent>) -> Option<(TraceMark, Option<SpanId>)> {
        let shared = self.0.as_ref()?;
        match client {
            Some(client) => client.sampled.then(|| {
                let mark = TraceMark { trace: client.mark.trace, span: self.id() };
                (mark, Some(client.mark.span))
            }),
            None => {
                let low = shared.bits();
                // The lower 63 bits decide, as in the samplers of OpenTelemetry.
                let sampled = ((low >> 1) as f64) < shared.ratio * (1u64 << 63) as f64;
                let trace = u128::from(shared.bits()) << 64 | u128::from(low);
                sampled.then(|| (TraceMark { trace: TraceId(trace.max(1)), span: self.id() }, None))
            }
        }
    }

    /// An id for a span.
    pub fn id(&self) -> SpanId {
        SpanId(self.0.as_ref().map_or(1, |shared| shared.bits().max(1)))
    }

    /// A span under another one.
    pub fn span(
        &self,
        under: TraceMark,
        name: &'static str,
        start: UnixNanos,
        end: UnixNanos,
    ) -> Span {
        Span {
            mark: TraceMark { trace: under.trace, span: self.id() },
            parent: Some(under.span),
            name,
            kind: SpanKind::Internal,
            start,
            end: end.max(start),
            attributes: Vec::new(),
            error: None,
        }
    }

    /// Gives a span away. Where the queue is full it is dropped, and counted.
    pub fn give(&self, span: Span) {
        let Some(shared) = &self.0 else { return };
        match shared.queue.try_send(Given::Span(span)) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => drop(shared.queue_full.fetch_add(1, Ordering::Relaxed)),
            Err(TrySendError::Disconnected(_)) => {
                shared.refused.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Wakes whoever exports, behind all that was given before. Where the queue is full it is awake.
    pub fn close(&self) {
        if let Some(shared) = &self.0 {
            let _ = shared.queue.try_send(Given::Close);
        }
    }

    /// The collector has taken so many.
    pub fn exported(&self, spans: usize) {
        if let Some(shared) = &self.0 {
            shared.exported.fetch_add(spans as u64, Ordering::Relaxed);
        }
    }

    /// The collector has not taken so many.
    pub fn refused(&self, spans: usize) {
        if let Some(shared) = &self.0 {
            shared.refused.fetch_add(spans as u64, Ordering::Relaxed);
        }
    }

    /// What became of spans so far; `None` where it is off.
    pub fn counts(&self) -> Option<SpanCounts> {
        let shared = self.0.as_ref()?;
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Some(SpanCounts {
            exported: read(&shared.exported),
            queue_full: read(&shared.queue_full),
            refused: read(&shared.refused),
        })
    }
}

impl Shared {
    /// The next of splitmix64.
    fn bits(&self) -> u64 {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        let state = self.ids.fetch_add(GOLDEN, Ordering::Relaxed).wrapping_add(GOLDEN);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
#[path = "trace_test.rs"]
mod tests;
