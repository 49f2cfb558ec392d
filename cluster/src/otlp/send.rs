//! ● The thread that batches spans and posts them. Nothing waits for it but its own queue.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use otlp_prost::Message;
use shoal_protocol::id::NodeId;
use shoal_protocol::trace::{Given, Span, Tracer};

use super::encode;
use super::settings::Settings;

/// Spans of one request: a quarter of a MiB at most.
const BATCH_MAX: usize = 512;

/// How long the first span of a batch waits for others: what a process that is killed loses at most.
const LINGER: Duration = Duration::from_millis(200);

/// How much of an answer is read. A good one is a few bytes.
const ANSWER_LEN_MAX: u64 = 64 << 10;

/// What the thread owns.
pub struct Sender {
    settings: Settings,
    queue: Receiver<Given>,
    tracer: Tracer,
    node: Arc<OnceLock<NodeId>>,
    stopping: Arc<AtomicBool>,
    agent: ureq::Agent,
    /// What was dropped when it was last said; `None`: all is well.
    said: Option<u64>,
}

impl Sender {
    /// Posts what comes out of the queue.
    pub fn new(
        settings: Settings,
        queue: Receiver<Given>,
        tracer: Tracer,
        node: Arc<OnceLock<NodeId>>,
        stopping: Arc<AtomicBool>,
    ) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .timeout_global(Some(settings.timeout))
            .build()
            .new_agent();
        Self { settings, queue, tracer, node, stopping, agent, said: None }
    }

    /// Runs until it is told to stop, and then until the queue is empty.
    pub fn run(mut self) {
        let mut stopping = false;
        while !stopping {
            let Ok(first) = self.queue.recv() else { return };
            let mut batch = Vec::new();
            stopping |= !take(first, &mut batch);
            let until = Instant::now() + LINGER;
            while batch.len() < BATCH_MAX && !stopping {
                let left = until.saturating_duration_since(Instant::now());
                let Ok(given) = self.queue.recv_timeout(left) else { break };
                stopping |= !take(given, &mut batch);
            }
            self.send(batch);
            stopping |= self.stopping.load(Ordering::Relaxed);
        }
        loop {
            let mut batch = Vec::new();
            for given in self.queue.try_iter().take(BATCH_MAX) {
                take(given, &mut batch);
            }
            if batch.is_empty() {
                return;
            }
            self.send(batch);
        }
    }

    /// Posts one batch. What is not taken is dropped: a collector that is down for long would fill any
    /// memory.
    fn send(&mut self, spans: Vec<Span>) {
        let count = spans.len();
        if count == 0 {
            return;
        }
        let request = encode::request(spans, &self.settings.service, self.node.get().copied());
        match self.post(&request.encode_to_vec()) {
            Ok(refused) => {
                let refused = refused.min(count);
                self.tracer.exported(count - refused);
                self.tracer.refused(refused);
                self.told(None);
            }
            Err(why) => {
                self.tracer.refused(count);
                self.told(Some(why));
            }
        }
    }

    /// How many of the spans the collector refused although it took the batch.
    fn post(&self, body: &[u8]) -> Result<usize, String> {
        let mut request = self
            .agent
            .post(&self.settings.url)
            .header("content-type", "application/x-protobuf")
            .header("user-agent", concat!("shoal/", env!("CARGO_PKG_VERSION")));
        for (name, value) in &self.settings.headers {
            request = request.header(name, value);
        }
        let mut response = request.send(body).map_err(|error| error.to_string())?;
        let status = response.status();
        if !status.is_success() {
            return Err(format!("it answers {status}"));
        }
        let answer = response.body_mut().with_config().limit(ANSWER_LEN_MAX).read_to_vec();
        // The spans are taken; what else it says is of little use where it cannot be read.
        let answer = answer.ok().and_then(|answer| {
            ExportTraceServiceResponse::decode(answer.as_slice()).ok()?.partial_success
        });
        let refused = answer.map_or(0, |partial| partial.rejected_spans);
        Ok(usize::try_from(refused).unwrap_or_default())
    }

    /// One line when spans begin to be dropped, and one when that is over.
    fn told(&mut self, why: Option<String>) {
        let counts = self.tracer.counts().unwrap_or_default();
        let dropped = counts.queue_full + counts.refused;
        match (why, self.said) {
            (Some(why), None) => {
                self.said = Some(dropped);
                let url = &self.settings.url;
                tracing::warn!(
                    "traces are dropped: the collector at {url} does not take them: {why}"
                );
            }
            (None, Some(_)) => {
                self.said = None;
                tracing::info!(dropped, "the collector takes traces again");
            }
            _ => {}
        }
    }
}

/// False for the word that nothing more is waited for.
fn take(given: Given, batch: &mut Vec<Span>) -> bool {
    match given {
        Given::Span(span) => {
            batch.push(span);
            true
        }
        Given::Close => false,
    }
}
