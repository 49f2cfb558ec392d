//! ● Every metric of the coordinator, declared once and documented like an API.
//!
//! Names and labels of vLLM where it has the metric, so that its dashboards and the gateways that
//! read them work; ours begin with `shoal_`. What a request does is counted as it happens; what
//! heads and shards report is read from the serving table when somebody scrapes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus::{
    HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder,
};
use shoal_protocol::error::ErrorCode;
use shoal_protocol::presence::PresenceView;
use shoal_protocol::trace::SpanCounts;

use crate::router::Standing;
use crate::serving::ServingTable;
use resumes::Resumes;
use way::Way;

mod presence;
mod reported;
mod resumes;
mod routing;
mod way;

pub use way::Part;
mod spans;

/// The metrics of one coordinator.
#[derive(Debug)]
pub struct Telemetry {
    registry: Registry,
    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    request_success: IntCounterVec,
    time_to_first_token: HistogramVec,
    inter_token_latency: HistogramVec,
    e2e_request_latency: HistogramVec,
    request_queue_time: HistogramVec,
    request_prefill_time: HistogramVec,
    request_prompt_tokens: HistogramVec,
    request_generation_tokens: HistogramVec,
    sequences_open: IntGaugeVec,
    answers_failed: IntCounterVec,
    http_requests: IntCounterVec,
    resumes: Resumes,
    way: Way,
}

/// Bounds of latencies up to the first token and of waits, in seconds: vLLM's.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
];

/// Bounds of the time between two tokens, in seconds: vLLM's, and finer ones below for small models.
const BETWEEN_TOKENS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];

/// Bounds of whole requests, in seconds: vLLM's, and finer ones below.
const REQUEST: &[f64] = &[
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0,
    60.0, 120.0, 240.0, 480.0, 960.0,
];

/// Bounds of token counts.
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5,
    5e5, 1e6,
];

impl Telemetry {
    /// All metrics at zero. An error means that a name is declared twice.
    pub fn new() -> Result<Arc<Self>, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let vec = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(vec.clone())).map(|()| vec)
        };
        let histogram = |name: &str, help: &str, bounds: &[f64]| {
            let opts = HistogramOpts::new(name, help).buckets(bounds.to_vec());
            let vec = HistogramVec::new(opts, &["model_name"])?;
            registry.register(Box::new(vec.clone())).map(|()| vec)
        };
        let sequences_open = IntGaugeVec::new(
            Opts::new("shoal_sequences_open", "Answers that this coordinator is waiting for."),
            &["model_name"],
        )?;
        registry.register(Box::new(sequences_open.clone()))?;
        Ok(Arc::new(Self {
            prompt_tokens: counter(
                "vllm:prompt_tokens_total",
                "Prompt tokens of answers that began.",
                &["model_name"],
            )?,
            generation_tokens: counter(
                "vllm:generation_tokens_total",
                "Tokens received from heads.",
                &["model_name"],
            )?,
            request_success: counter(
                "vllm:request_success_total",
                "Answers that ended, by how: stop, length, abort (the client went away) or error.",
                &["model_name", "finished_reason"],
            )?,
            time_to_first_token: histogram(
                "vllm:time_to_first_token_seconds",
                "From the request's arrival to an answer's first token.",
                FIRST_TOKEN,
            )?,
            inter_token_latency: histogram(
                "vllm:inter_token_latency_seconds",
                "Between two tokens of an answer, as they arrive here.",
                BETWEEN_TOKENS,
            )?,
            e2e_request_latency: histogram(
                "vllm:e2e_request_latency_seconds",
                "From the request's arrival to an answer's end.",
                REQUEST,
            )?,
            request_queue_time: histogram(
                "vllm:request_queue_time_seconds",
                "What a sequence waited at its head before its first step.",
                FIRST_TOKEN,
            )?,
            request_prefill_time: histogram(
                "vllm:request_prefill_time_seconds",
                "From a sequence's first step to its first token, at its head.",
                FIRST_TOKEN,
            )?,
            request_prompt_tokens: histogram(
                "vllm:request_prompt_tokens",
                "Prompt tokens of an answer that ended.",
                TOKENS,
            )?,
            request_generation_tokens: histogram(
                "vllm:request_generation_tokens",
                "Generated tokens of an answer that ended.",
                TOKENS,
            )?,
            answers_failed: counter(
                "shoal_answers_failed_total",
                "Requests whose answers failed after they were sent to a head, by reason.",
                &["model_name", "reason"],
            )?,
            http_requests: counter(
                "shoal_http_requests_total",
                "Responses begun, by route, status and reason (ok, or the error's label).",
                &["route", "status", "reason"],
            )?,
            resumes: Resumes::new(&registry)?,
            way: Way::new(&registry)?,
            sequences_open,
            registry,
        }))
    }

    /// A response was begun.
    pub fn http(&self, route: &str, status: u16, reason: &str) {
        self.http_requests.with_label_values(&[route, &status.to_string(), reason]).inc();
    }

    /// The metrics of a request that arrived at `arrived` and asks for so many answers.
    pub fn request(
        self: &Arc<Self>,
        model: &str,
        arrived: Instant,
        answers: usize,
    ) -> RequestMetrics {
        self.sequences_open.with_label_values(&[model]).add(answers as i64);
        RequestMetrics {
            telemetry: Arc::clone(self),
            model: model.to_owned(),
            arrived,
            open: answers,
            ending: Outcome::Abort,
        }
    }

    /// Everything in Prometheus' text format.
    pub fn render(
        &self,
        table: &ServingTable,
        stale_events: u64,
        standings: &[(String, Standing)],
        spans: Option<SpanCounts>,
        presence: Option<&PresenceView>,
    ) -> Result<String, prometheus::Error> {
        let mut families = self.registry.gather();
        families.extend(reported::families(table, stale_events)?);
        families.extend(routing::families(standings)?);
        families.extend(spans.map_or(Ok(Vec::new()), spans::families)?);
        families.extend(presence.map_or(Ok(Vec::new()), presence::families)?);
        // The encoder refuses a family that nothing has a value for.
        families.retain(|family| !family.get_metric().is_empty());
        TextEncoder::new().encode_to_string(&families)
    }
}

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// By a stop token or a stop string.
    Stop,
    /// By its length.
    Length,
    /// The client went away.
    Abort,
    /// It failed.
    Error,
}

impl Outcome {
    fn label(self) -> &'static str {
        match self {
            Outcome::Stop => "stop",
            Outcome::Length => "length",
            Outcome::Abort => "abort",
            Outcome::Error => "error",
        }
    }
}

/// An answer that is complete.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    /// How it ended.
    pub outcome: Outcome,
    /// Tokens of its prompt.
    pub prompt: usize,
    /// Tokens generated.
    pub generated: usize,
}

/// The metrics of one request. Answers that are still open when it is dropped count as aborted, or
/// as failed where one of them failed.
#[derive(Debug)]
pub struct RequestMetrics {
    telemetry: Arc<Telemetry>,
    model: String,
    arrived: Instant,
    open: usize,
    ending: Outcome,
}

impl RequestMetrics {
    /// An answer's first token came. What the head says it waited and computed is in microseconds.
    pub fn first_token(&self, prompt: usize, queue_us: u32, prefill_us: u32) {
        let (t, model) = (&self.telemetry, [self.model.as_str()]);
        let seconds = |us: u32| f64::from(us) / 1e6;
        t.prompt_tokens.with_label_values(&model).inc_by(prompt as u64);
        t.generation_tokens.with_label_values(&model).inc();
        t.time_to_first_token
            .with_label_values(&model)
            .observe(self.arrived.elapsed().as_secs_f64());
        t.request_queue_time.with_label_values(&model).observe(seconds(queue_us));
        t.request_prefill_time.with_label_values(&model).observe(seconds(prefill_us));
    }

    /// An encoder has answered: what the head says it waited and computed, in microseconds.
    pub fn encoded(&self, prompt: usize, queue_us: u32, encode_us: u32) {
        let (t, model) = (&self.telemetry, [self.model.as_str()]);
        let seconds = |us: u32| f64::from(us) / 1e6;
        t.prompt_tokens.with_label_values(&model).inc_by(prompt as u64);
        t.request_queue_time.with_label_values(&model).observe(seconds(queue_us));
        t.request_prefill_time.with_label_values(&model).observe(seconds(encode_us));
    }

    /// Another token came, so long after the one before it.
    pub fn next_token(&self, after: Duration) {
        let (t, model) = (&self.telemetry, [self.model.as_str()]);
        t.generation_tokens.with_label_values(&model).inc();
        t.inter_token_latency.with_label_values(&model).observe(after.as_secs_f64());
    }

    /// An answer is complete.
    pub fn finished(&mut self, finished: Finished) {
        let (t, model) = (&self.telemetry, [self.model.as_str()]);
        t.e2e_request_latency
            .with_label_values(&model)
            .observe(self.arrived.elapsed().as_secs_f64());
        t.request_prompt_tokens.with_label_values(&model).observe(finished.prompt as f64);
        t.request_generation_tokens.with_label_values(&model).observe(finished.generated as f64);
        self.close(finished.outcome, 1);
    }

    /// The request failed, and all answers that are open with it.
    pub fn failed(&mut self, code: ErrorCode) {
        let labels = [self.model.as_str(), code.label()];
        self.telemetry.answers_failed.with_label_values(&labels).inc();
        self.ending = Outcome::Error;
    }

    fn close(&mut self, outcome: Outcome, answers: usize) {
        let answers = answers.min(self.open);
        self.open -= answers;
        let (t, model) = (&self.telemetry, self.model.as_str());
        t.sequences_open.with_label_values(&[model]).sub(answers as i64);
        t.request_success.with_label_values(&[model, outcome.label()]).inc_by(answers as u64);
    }
}

impl Drop for RequestMetrics {
    fn drop(&mut self) {
        self.close(self.ending, self.open);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has(telemetry: &Telemetry, line: &str) {
        let text = telemetry.render(&ServingTable::default(), 0, &[], None, None).expect("renders");
        assert!(text.lines().any(|found| found == line), "no `{line}` in\n{text}");
    }

    #[test]
    fn answers_are_counted_by_how_they_ended() {
        let telemetry = Telemetry::new().expect("every metric is declared once");
        let mut request = telemetry.request("m", Instant::now(), 3);
        has(&telemetry, "shoal_sequences_open{model_name=\"m\"} 3");
        request.first_token(5, 1500, 2_000_000);
        request.next_token(Duration::from_millis(3));
        request.finished(Finished { outcome: Outcome::Length, prompt: 5, generated: 2 });
        drop(request);
        has(&telemetry, "shoal_sequences_open{model_name=\"m\"} 0");
        has(&telemetry, "vllm:prompt_tokens_total{model_name=\"m\"} 5");
        has(&telemetry, "vllm:generation_tokens_total{model_name=\"m\"} 2");
        has(
            &telemetry,
            "vllm:request_success_total{finished_reason=\"length\",model_name=\"m\"} 1",
        );
        has(&telemetry, "vllm:request_success_total{finished_reason=\"abort\",model_name=\"m\"} 2");
        has(&telemetry, "vllm:request_prefill_time_seconds_sum{model_name=\"m\"} 2");
        let mut request = telemetry.request("m", Instant::now(), 1);
        request.failed(ErrorCode::WorkerLost);
        drop(request);
        has(&telemetry, "vllm:request_success_total{finished_reason=\"error\",model_name=\"m\"} 1");
        let line = "shoal_answers_failed_total{model_name=\"m\",reason=\"worker_lost\"} 1";
        has(&telemetry, line);
    }
}
