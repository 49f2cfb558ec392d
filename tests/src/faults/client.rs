//! One stream as a client reads it, with the time of each pause.

use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::api::{Api, Event};
use crate::proc::logs::now_of_day;

/// Tokens that each stream has before the fault.
pub const BEFORE: usize = 40;

/// What a stream had at its end.
pub struct Seen {
    /// Which deployment was asked.
    pub deployment: usize,
    /// Its tokens.
    pub tokens: Vec<u64>,
    /// Why it did not end well.
    pub error: Option<String>,
    /// The longest pause after the first tokens.
    pub longest: Duration,
    /// When that ended, in milliseconds of the day.
    pub until: f64,
}

/// A stream under way.
pub struct Stream {
    thread: JoinHandle<Seen>,
    begun: mpsc::Receiver<()>,
}

impl Stream {
    /// Asks for so many tokens.
    pub fn start(url: String, name: &'static str, deployment: usize, tokens: usize) -> Self {
        let (sender, begun) = mpsc::sync_channel(1);
        let thread = std::thread::spawn(move || follow(&url, (name, deployment), tokens, &sender));
        Self { thread, begun }
    }

    /// Waits until it has `BEFORE` tokens, or has failed.
    pub fn wait_until_begun(&self, within: Duration) -> Result<()> {
        self.begun.recv_timeout(within).context("a stream did not begin")
    }

    /// Reads it to its end.
    pub fn finish(self) -> Result<Seen> {
        self.thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))
    }
}

fn follow(
    url: &str,
    (name, deployment): (&str, usize),
    tokens: usize,
    begun: &mpsc::SyncSender<()>,
) -> Seen {
    let longest = Duration::ZERO;
    let mut seen = Seen { deployment, tokens: Vec::new(), error: None, longest, until: 0.0 };
    if let Err(error) = read(url, name, tokens, begun, &mut seen) {
        seen.error = Some(format!("{error:#}"));
    }
    // Where it failed before, nobody waits for ever.
    let _ = begun.try_send(());
    seen
}

/// What is asked: the same by everybody, so that one answer is right.
pub fn prompt() -> Vec<u32> {
    (10..42).collect()
}

fn read(
    url: &str,
    name: &str,
    tokens: usize,
    begun: &mpsc::SyncSender<()>,
    seen: &mut Seen,
) -> Result<()> {
    let options = json!({"max_tokens": tokens, "ignore_eos": true, "return_token_ids": true,
                         "seed": 5, "temperature": 0.7});
    let mut stream = Api::new(url, name).stream(prompt(), options)?;
    let mut last = None;
    loop {
        let chunk = match stream.event()? {
            Event::Chunk(chunk) => chunk,
            Event::Done => return Ok(()),
            other => bail!("{other:?}"),
        };
        let ids = chunk["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default();
        if ids.is_empty() {
            continue;
        }
        let now = Instant::now();
        let gap = now.duration_since(last.replace(now).unwrap_or(now));
        // Gaps before the fault say nothing of it.
        if seen.tokens.len() >= BEFORE && gap > seen.longest {
            (seen.longest, seen.until) = (gap, now_of_day()?);
        }
        seen.tokens.extend(ids.iter().filter_map(Value::as_u64));
        if seen.tokens.len() >= BEFORE {
            let _ = begun.try_send(());
        }
    }
}

/// Milliseconds until the first token of a prompt as long as a whole answer: one full prefill.
pub fn full_prefill(url: &str, name: &str, rows: usize) -> Result<Duration> {
    let prompt: Vec<u32> = (0..rows as u32).map(|n| 10 + n % 900).collect();
    let options = json!({"max_tokens": 2, "ignore_eos": true, "return_token_ids": true});
    let asked = Instant::now();
    let mut stream = Api::new(url, name).stream(prompt, options)?;
    match stream.event()? {
        Event::Chunk(_) => Ok(asked.elapsed()),
        other => bail!("{other:?}"),
    }
}

/// Lets time pass: a fault's own length is what it is about, and there is nothing to wait for.
pub fn pass(time: Duration) {
    let (_sender, never) = mpsc::sync_channel::<()>(0);
    let _ = never.recv_timeout(time);
}
