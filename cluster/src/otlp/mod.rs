//! Traces out of this process: OTLP over HTTP, to a collector beside it.
//!
//! ```text
//! flag, environment ─► settings (○)
//! Tracer ─► bounded queue ─► thread: batch ─► encode (○) ─► POST /v1/traces ─► collector
//!                  └ full: dropped, counted              └ down, slow, refuses: dropped, counted
//! ```
//!
//! A node never waits for it, nor does a request: the worst that a collector can do is to get nothing.
//! It speaks plain HTTP. TLS to a collector elsewhere is the business of the collector's agent, which
//! usually runs on each machine.

mod encode;
mod send;
mod settings;

pub use settings::OtlpUrl;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use shoal_protocol::id::NodeId;
use shoal_protocol::trace::Tracer;

use self::send::Sender;
use self::settings::Settings;
use crate::failure::Failure;

/// Spans that wait to be sent: some four MiB, and a second or two of a busy node.
const QUEUE_MAX: usize = 8192;

/// How long the last spans may hold up the end of a node.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// The traces of this process; nothing at all where nobody asked for them.
#[derive(Debug)]
pub struct Otlp {
    tracer: Tracer,
    exporter: Option<Exporter>,
}

#[derive(Debug)]
struct Exporter {
    node: Arc<OnceLock<NodeId>>,
    stopping: Arc<AtomicBool>,
    /// Closed when the thread has ended.
    ended: Receiver<()>,
}

impl Otlp {
    /// As the flag, or else the environment, says. `service` is the process' name where the environment
    /// has none.
    pub fn start(flag: Option<&OtlpUrl>, service: &str) -> Result<Self, Failure> {
        let environment = |name: &str| std::env::var(name).ok();
        let settings = match Settings::read(flag, service, environment) {
            Ok(settings) => settings,
            Err(why) => {
                // Such variables are often set for all that runs on a machine: no reason not to start.
                tracing::warn!("no traces: {why}");
                None
            }
        };
        let Some(settings) = settings else {
            return Ok(Self { tracer: Tracer::off(), exporter: None });
        };
        tracing::info!(url = %settings.url, ratio = settings.ratio, "traces go out as OTLP");
        // Without random numbers two processes may give spans the same ids, and nothing else happens.
        let seed = getrandom::u64().unwrap_or_else(|_| u64::from(std::process::id()));
        let (tracer, queue) = Tracer::new(seed, settings.ratio, QUEUE_MAX);
        let (node, stopping) = (Arc::default(), Arc::default());
        let sender =
            Sender::new(settings, queue, tracer.clone(), Arc::clone(&node), Arc::clone(&stopping));
        // Nothing is sent: that it ends is the news.
        let (end, ended) = std::sync::mpsc::sync_channel(0);
        let thread = std::thread::Builder::new().name("otlp".to_owned());
        let body = move || {
            sender.run();
            drop(end);
        };
        thread
            .spawn(body)
            .map_err(|error| Failure::failed(format!("no thread for traces: {error}")))?;
        Ok(Self { tracer, exporter: Some(Exporter { node, stopping, ended }) })
    }

    /// The hand for a node's spans.
    pub fn tracer(&self) -> Tracer {
        self.tracer.clone()
    }

    /// Who this process is, once it knows.
    pub fn named(&self, node: NodeId) {
        if let Some(exporter) = &self.exporter {
            // It is told once.
            let _ = exporter.node.set(node);
        }
    }

    /// Sends what waits, for at most `FLUSH_TIMEOUT`.
    pub async fn finish(self) {
        let Self { tracer, exporter: Some(exporter) } = self else { return };
        exporter.stopping.store(true, Ordering::Relaxed);
        tracer.close();
        let ended = move || exporter.ended.recv_timeout(FLUSH_TIMEOUT);
        let ended = tokio::task::spawn_blocking(ended).await;
        if matches!(ended, Ok(Err(RecvTimeoutError::Timeout))) {
            tracing::warn!("the last spans were not sent within {FLUSH_TIMEOUT:?}");
        }
    }
}

#[cfg(test)]
mod otlp_test;
