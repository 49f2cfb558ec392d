//! An OpenTelemetry collector, as far as a test needs one: it takes OTLP over HTTP and keeps the spans.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use otlp_prost::Message;

/// The longest body that is read: far more than any batch.
const BODY_LEN_MAX: usize = 16 << 20;

/// A span as the collector sees it; ids are hexadecimal.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Its trace.
    pub trace: String,
    /// Its own id.
    pub id: String,
    /// What it is a part of; empty: nothing.
    pub parent: String,
    /// Its name.
    pub name: String,
    /// Nanoseconds since 1970.
    pub start: u64,
    /// The same.
    pub end: u64,
    /// What it says of itself.
    pub attributes: BTreeMap<String, String>,
    /// Why it failed.
    pub error: Option<String>,
    /// The process' name.
    pub service: String,
    /// The node, such as `w2`.
    pub node: String,
}

impl Span {
    /// An attribute; empty where there is none.
    pub fn get(&self, key: &str) -> &str {
        self.attributes.get(key).map_or("", String::as_str)
    }
}

/// A collector that runs until the test ends.
#[derive(Debug)]
pub struct Collector {
    url: String,
    kept: Arc<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    spans: Mutex<Vec<Span>>,
    more: Condvar,
}

impl Collector {
    /// One on a free port.
    pub fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("http://{}", listener.local_addr()?);
        let kept = Arc::<Kept>::default();
        let keep = Arc::clone(&kept);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let kept = Arc::clone(&keep);
                std::thread::spawn(move || {
                    // A process that was killed in the middle of a request is no failure here.
                    if let Err(error) = converse(&stream, &kept) {
                        eprintln!("a conversation with the collector ended: {error:#}");
                    }
                });
            }
        });
        Ok(Self { url, kept })
    }

    /// What `--otlp` takes.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The spans of a trace, as soon as `enough` holds of them.
    pub fn wait_for(
        &self,
        trace: &str,
        within: Duration,
        enough: impl Fn(&[Span]) -> bool,
    ) -> Result<Vec<Span>> {
        let until = Instant::now() + within;
        let mut all = self.kept.spans.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let spans: Vec<Span> = all.iter().filter(|s| s.trace == trace).cloned().collect();
            if enough(&spans) {
                return Ok(spans);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let line = |s: &Span| format!("{} {} {:?}", s.node, s.name, s.attributes);
                let seen: Vec<String> = spans.iter().map(line).collect();
                bail!("not enough within {within:?}: {} spans:\n{}", seen.len(), seen.join("\n"));
            }
            let woken = self.kept.more.wait_timeout(all, left);
            all = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All spans so far, of all traces.
    pub fn spans(&self) -> Vec<Span> {
        self.kept.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One connection: requests one after the other.
fn converse(stream: &TcpStream, kept: &Kept) -> Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        ensure!(line.starts_with("POST /v1/traces HTTP/1.1"), "{line:?}");
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let kind = headers.get("content-type").context("a content type")?;
        ensure!(kind == "application/x-protobuf", "{kind:?}");
        let len: usize = headers.get("content-length").context("a length")?.parse()?;
        ensure!(len <= BODY_LEN_MAX, "{len} bytes");
        let mut body = vec![0; len];
        reader.read_exact(&mut body)?;
        kept.take(ExportTraceServiceRequest::decode(body.as_slice())?);
        // An empty message: everything was taken.
        let answer =
            "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
        (&mut &*stream).write_all(answer.as_bytes())?;
    }
}

impl Kept {
    fn take(&self, request: ExportTraceServiceRequest) {
        let mut all = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        for of_process in request.resource_spans {
            let facts = attributes(of_process.resource.map(|r| r.attributes).unwrap_or_default());
            let fact = |key: &str| facts.get(key).cloned().unwrap_or_default();
            let spans = of_process.scope_spans.into_iter().flat_map(|scope| scope.spans);
            all.extend(spans.map(|span| Span {
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                name: span.name,
                start: span.start_time_unix_nano,
                end: span.end_time_unix_nano,
                attributes: attributes(span.attributes),
                error: span.status.map(|status| status.message),
                service: fact("service.name"),
                node: fact("service.instance.id"),
            }));
        }
        self.more.notify_all();
    }
}

fn attributes(list: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value| match value {
        any_value::Value::StringValue(text) => text,
        any_value::Value::IntValue(number) => number.to_string(),
        any_value::Value::BoolValue(yes) => yes.to_string(),
        other => format!("{other:?}"),
    };
    let pair = |pair: KeyValue| Some((pair.key, text(pair.value?.value?)));
    list.into_iter().filter_map(pair).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
