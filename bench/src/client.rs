//! A client that streams, and notes when each token came.

use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A request for exactly so many tokens, streamed.
pub fn body(model: &str, prompt: &[u32], tokens: u32) -> Value {
    json!({
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true, "stream": true
    })
}

/// A client whose requests end by then.
pub fn agent(within: Duration) -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_global(Some(within))
        .http_status_as_error(false)
        .max_idle_connections_per_host(256)
        .build()
        .into()
}

/// Streams one answer; `token` hears of each token, and ends the stream by `false`. Returns how many
/// came.
pub fn stream(
    agent: &ureq::Agent,
    url: &str,
    body: &Value,
    mut token: impl FnMut(Instant) -> bool,
) -> Result<usize> {
    let mut response = agent.post(format!("{url}/v1/completions")).send_json(body)?;
    if response.status() != 200 {
        bail!("HTTP {}: {}", response.status(), response.body_mut().read_to_string()?);
    }
    let mut tokens = 0;
    for line in BufReader::new(response.body_mut().as_reader()).lines() {
        let line = line?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            return Ok(tokens);
        }
        if data.starts_with("{\"error\"") {
            bail!("{data}");
        }
        // Parsing JSON would cost the machine more than what is measured.
        let ids = data.split_once("\"token_ids\":[").map_or("", |(_, ids)| ids);
        if ids.starts_with(|c: char| c.is_ascii_digit()) {
            tokens += 1;
            if !token(Instant::now()) {
                return Ok(tokens);
            }
        }
    }
    bail!("the stream ended without [DONE] after {tokens} tokens")
}

/// A stream that runs in a thread of its own until this is dropped.
#[derive(Debug)]
pub struct Running {
    times: Arc<Mutex<Vec<Instant>>>,
    stop: Arc<AtomicBool>,
    begun: Receiver<()>,
}

impl Running {
    /// Begins it.
    pub fn start(url: String, body: Value, within: Duration) -> Self {
        let times = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, begun) = sync_channel(1);
        let (seen, ended) = (Arc::clone(&times), Arc::clone(&stop));
        std::thread::spawn(move || {
            let token = |at| {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.push(at);
                if seen.len() == BEGUN {
                    let _ = sender.try_send(());
                }
                !ended.load(Ordering::Relaxed)
            };
            // One that breaks off has too few tokens, and whoever counts them says so.
            let _ = stream(&agent(within), &url, &body, token);
        });
        Self { times, stop, begun }
    }

    /// Waits until it flows.
    pub fn wait_until_begun(&self) -> Result<()> {
        let begun = self.begun.recv_timeout(Duration::from_secs(20));
        begun.context("a stream does not begin")
    }

    /// Milliseconds between its tokens, of those that came in this window.
    pub fn gaps(&self, from: Instant, length: Duration) -> Vec<f64> {
        let times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let within = |at: Instant| at >= from && at < from + length;
        let pairs = times.windows(2).filter(|pair| within(pair[1]));
        pairs.map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect()
    }
}

/// Tokens after which a stream flows.
const BEGUN: usize = 20;

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
