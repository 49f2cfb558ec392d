//! ○ The default: the least estimated time until the answer is complete, in seconds.
//!
//! ```text
//! queue     sequences beyond what it runs at a time, each a whole answer of a share of its steps
//! prefill   prompt tokens before ours and ours that are not cached, at its measured time a token
//! decode    the answer's tokens, at the gap that it will have with us on board
//! memory    the chance to be preempted near the end of its KV blocks, as a share of the work
//! failures  tries that will be needed, and a fixed penalty for the share of failures
//! slow start  a replica that has just come gets little, until it is measured
//! ```
//!
//! All of it is measured here, from the times of tokens and from reports: a replica whose machine or
//! link turns slow says so without knowing it.

use shoal_protocol::units::Instant;

use super::super::book::Book;
use super::Ask;
use crate::router::prefix_tokens;

/// The work that a full memory threatens, at `k/(1-k)` of the share `k` in use: 5 % of an answer's
/// own time at half, 45 % at nine tenths. A preempted sequence computes all of its tokens again.
const MEMORY: f64 = 0.05;

/// What a failure costs, in seconds: linkerd's penalty.
const FAILURE: f64 = 5.0;

/// Seconds until a replica that has just come counts fully.
const SLOW_START: f64 = 5.0;

/// The least share of its weight in that time: Envoy's.
const SLOW_START_LEAST: f64 = 0.1;

/// Picks of the deployment after which an idle replica's figures begin to be doubted: at most half a
/// percent of the requests find out whether a slow replica is slow still, so no p99 shows it.
const DOUBT_AFTER: u64 = 200;

/// A prompt's token takes this share of a step with one row, where it was never measured.
const PROMPT_SHARE: f64 = 1.0 / 16.0;

/// How much of a replica's time a request would take, and why; in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Terms {
    /// Until it runs.
    pub queue: f64,
    /// Prompts.
    pub prefill: f64,
    /// Its own tokens.
    pub decode: f64,
    /// The danger of preemption.
    pub memory: f64,
    /// What failures cost.
    pub failures: f64,
    /// For being new.
    pub slow_start: f64,
}

impl Terms {
    /// All of them.
    pub fn total(&self) -> f64 {
        self.queue + self.prefill + self.decode + self.memory + self.failures + self.slow_start
    }

    /// Each with its name.
    pub fn named(&self) -> [(&'static str, f64); 6] {
        [
            ("queue", self.queue),
            ("prefill", self.prefill),
            ("decode", self.decode),
            ("memory", self.memory),
            ("failures", self.failures),
            ("slow_start", self.slow_start),
        ]
    }
}

/// The lowest; the dice say where to begin to look, and so who wins a tie.
pub fn choose(books: &[Book], candidates: &[u32], ask: &Ask<'_>) -> u32 {
    let start = (ask.dice % candidates.len() as u64) as usize;
    let mut best = (f64::INFINITY, candidates[start]);
    for &i in candidates[start..].iter().chain(&candidates[..start]) {
        let total = terms(&books[i as usize], ask).total();
        if total < best.0 {
            best = (total, i);
        }
    }
    best.1
}

/// The score of a replica.
pub fn terms(book: &Book, ask: &Ask<'_>) -> Terms {
    let after = book.load.saturating_add(ask.sequences);
    let running = book.running(after);
    let gap = gap(book, ask, f64::from(running));
    let prompt_token = match book.speed.prompt_token() {
        Some(measured) => measured,
        None => PROMPT_SHARE * (ask.fastest.0 + ask.fastest.1),
    };
    let prefill_ahead = book.prompt_ahead as f64 * prompt_token;
    // Divisions are what a pick's time goes into: none where nothing waits.
    let turns = match after - running {
        0 => 0.0,
        queued => f64::from(queued) / f64::from(running.max(1)),
    };
    let ahead = |gap: f64| turns * ask.answer * gap;
    // While it says nothing, it is at best as slow as the silence beyond what it has to do first.
    let silence = if book.open > 0 { seconds(book.heard, ask.now) } else { 0.0 };
    let gap = gap.max(silence - prefill_ahead - ahead(gap));
    let cached = prefix_tokens(book, ask.hashes).min(f64::from(ask.prompt));
    let mut terms = Terms {
        queue: ahead(gap),
        prefill: prefill_ahead + (f64::from(ask.prompt) - cached) * prompt_token,
        decode: ask.answer * gap,
        ..Terms::default()
    };
    let work = terms.prefill + terms.decode;
    terms.memory = MEMORY * work * book.kv_pressure;
    let share = book.breaker.failure_share(ask.now).min(0.9);
    if share > 0.0 {
        terms.failures = terms.total() * share / (1.0 - share) + FAILURE * share;
    }
    let age = seconds(book.since, ask.now);
    if age < SLOW_START {
        let weight = (age / SLOW_START).max(SLOW_START_LEAST);
        terms.slow_start = terms.total() * (1.0 / weight - 1.0);
    }
    terms
}

/// The gap between tokens with so many rows. Of a replica from which we await nothing, old figures
/// fade into the fastest one's, so that one that was slow is tried again some day, with one request:
/// as soon as that is open, the figures count fully again.
fn gap(book: &Book, ask: &Ask<'_>, rows: f64) -> f64 {
    let fastest = ask.fastest.0 + ask.fastest.1 * rows;
    if !book.speed.is_known() {
        return fastest;
    }
    let own = book.speed.gap(rows);
    if book.open > 0 || ask.picks.saturating_sub(book.picked_at) < DOUBT_AFTER {
        return own;
    }
    let trust = book.speed.trust(ask.now);
    trust * own + (1.0 - trust) * fastest
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.0.saturating_sub(from.0) as f64 * 1e-6
}

/// Whether a replica is in its slow start.
pub fn is_starting(book: &Book, now: Instant) -> bool {
    seconds(book.since, now) < SLOW_START
}
