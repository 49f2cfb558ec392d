//! ○ The replicas of one deployment: the filters before every policy.
//!
//! ```text
//! ready, of this layout ─► not tried before ─► not draining ─► breaker closed ─► policy
//!                          at least half of the ready ones stay, whatever the breakers say
//! ```

use shoal_protocol::id::{DeploymentName, Generation, ReplicaId};
use shoal_protocol::units::Instant;

use super::RouteRequest;
use super::book::Book;
use super::breaker;
use super::policy::score::{self, Terms};
use super::policy::{Ask, Policy};
use crate::serving::ServedReplica;

/// What an answer is taken to have, in tokens, until one was complete.
const ANSWER: f64 = 128.0;

/// How much one complete answer moves the mean: about the last hundred count.
const ANSWER_STEP: f64 = 0.02;

/// Seconds between two tokens where nothing is known: at zero rows, and per row. Only the ratio
/// matters then, which spreads by load.
const UNKNOWN: (f64, f64) = (0.01, 0.01);

/// The replicas of one deployment.
#[derive(Debug)]
pub struct Fleet {
    /// The deployment.
    pub name: DeploymentName,
    /// In the table's order.
    pub books: Vec<Book>,
    /// The mean tokens of its answers.
    pub answer: Option<f64>,
    /// Picks so far.
    picks: u64,
    /// Whose turn it is in round robin.
    turn: u64,
    /// Those that the filters leave; kept so that a pick allocates nothing.
    candidates: Vec<u32>,
    /// Which of `books` the request at hand may use at all; kept for the same reason.
    usable: Vec<bool>,
}

/// What the filters saw on their way.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Ready replicas.
    pub ready: u32,
    /// Sequences at all of them.
    pub load: u32,
    /// The fastest one's line.
    fastest: Option<(f64, f64)>,
    /// One whose breaker wants a probe.
    probe: Option<u32>,
}

/// Whether a replica gets requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// By its score.
    Ready,
    /// Little, since it has just come or come back.
    SlowStart,
    /// None: its breaker is open.
    Ejected,
    /// One, to see whether it works again.
    Probing,
    /// None new.
    Draining,
    /// None: the control plane says that it is not ready.
    NotReady,
}

impl State {
    /// Each of them.
    pub const ALL: [State; 6] = [
        State::Ready,
        State::SlowStart,
        State::Ejected,
        State::Probing,
        State::Draining,
        State::NotReady,
    ];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            State::Ready => "ready",
            State::SlowStart => "slow_start",
            State::Ejected => "ejected",
            State::Probing => "probing",
            State::Draining => "draining",
            State::NotReady => "not_ready",
        }
    }
}

/// Where a replica stands and why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// The replica.
    pub replica: ReplicaId,
    /// Whether it gets requests.
    pub state: State,
    /// Its share of all weights, 0 to 1.
    pub weight: f64,
    /// The terms of its score for a request of one token.
    pub terms: Terms,
    /// Sequences sent there so far.
    pub picks: u64,
}

impl Fleet {
    /// A deployment without replicas.
    pub fn new(name: DeploymentName) -> Self {
        let (candidates, usable) = (Vec::new(), Vec::new());
        Self { name, books: Vec::new(), answer: None, picks: 0, turn: 0, candidates, usable }
    }

    /// Takes over what the table says.
    pub fn observe(&mut self, now: Instant, replicas: &[ServedReplica]) {
        let mut old = std::mem::take(&mut self.books);
        for replica in replicas {
            let same = |book: &Book| book.id == replica.id && book.generation == replica.generation;
            let book = match old.iter().position(same) {
                Some(i) => {
                    let mut book = old.swap_remove(i);
                    book.see(now, replica);
                    book
                }
                None => Book::new(now, replica),
            };
            self.books.push(book);
        }
        self.candidates.reserve(self.books.len());
        self.usable.reserve(self.books.len());
    }

    /// Leaves in `candidates` those that a request may go to; `only`: those of an adapter, of which some
    /// may not have it.
    pub fn filter(
        &mut self,
        now: Instant,
        avoid: &[(ReplicaId, Generation)],
        only: Option<&[ServedReplica]>,
    ) -> Seen {
        let has_it = |book: &Book| {
            let is = |r: &ServedReplica| (r.id, r.generation) == (book.id, book.generation);
            only.is_none_or(|only| only.iter().any(|replica| replica.ready && is(replica)))
        };
        self.usable.clear();
        self.usable.extend(self.books.iter().map(|b| b.address.is_some() && has_it(b)));
        let mut seen = Seen { ready: 0, load: 0, fastest: None, probe: None };
        let mut least = f64::INFINITY;
        self.candidates.clear();
        for (i, book) in self.books.iter().enumerate() {
            if !self.usable[i] {
                continue;
            }
            seen.ready += 1;
            seen.load = seen.load.saturating_add(book.load);
            let (zero, slope) = book.speed.line();
            if book.speed.is_known() && zero + slope < least {
                least = zero + slope;
                seen.fastest = Some((zero, slope));
            }
            if now < book.draining_until {
                continue;
            }
            if book.breaker.is_closed() {
                self.candidates.push(i as u32);
            } else if avoid.is_empty() && book.breaker.probe_is_due(now) {
                seen.probe = Some(i as u32);
            }
        }
        let least = seen.ready.div_ceil(2) as usize;
        while self.candidates.len() < least && self.add_back(now) {}
        if !avoid.is_empty() {
            self.leave_out(avoid);
        }
        seen
    }

    /// Adds the replica that comes back first of those that were left out: nobody is ejected where
    /// more than half would be. Those that drain come last. False where there is none.
    fn add_back(&mut self, now: Instant) -> bool {
        let left_out = |i: &usize| self.usable[*i] && !self.candidates.contains(&(*i as u32));
        let back = |i: &usize| {
            let book = &self.books[*i];
            (now < book.draining_until, book.breaker.until())
        };
        let first = (0..self.books.len()).filter(left_out).min_by_key(back);
        self.candidates.extend(first.map(|i| i as u32));
        first.is_some()
    }

    /// Prefers replicas that were not tried before, even ones that the filters left out.
    fn leave_out(&mut self, avoid: &[(ReplicaId, Generation)]) {
        let books = &self.books;
        let tried = |i: u32| {
            let book = &books[i as usize];
            avoid.contains(&(book.id, book.generation))
        };
        if self.candidates.iter().any(|i| !tried(*i)) {
            self.candidates.retain(|i| !tried(*i));
            return;
        }
        let others = (0..books.len() as u32)
            .filter(|i| self.usable[*i as usize] && !tried(*i))
            .min_by_key(|i| books[*i as usize].breaker.until());
        if let Some(other) = others {
            self.candidates.clear();
            self.candidates.push(other);
        }
    }

    /// The place in `books` of the replica to use, after `filter` found any that is ready.
    pub fn choose(
        &mut self,
        policy: Policy,
        now: Instant,
        dice: u64,
        request: &RouteRequest<'_>,
        seen: Seen,
    ) -> u32 {
        let ask = Ask {
            now,
            dice,
            sequences: request.sequences,
            prompt: request.prompt_tokens,
            answer: self.answer.unwrap_or(ANSWER).min(f64::from(request.max_tokens.max(1))),
            hashes: request.block_hashes,
            picks: self.picks,
            fastest: seen.fastest.unwrap_or(UNKNOWN),
        };
        let chosen = match seen.probe {
            // What may be tried again elsewhere is a good probe.
            Some(probe) => probe,
            None => policy.choose(&mut self.books, &self.candidates, &ask, &mut self.turn),
        };
        self.picks += 1;
        self.books[chosen as usize].picked_at = self.picks;
        chosen
    }

    /// Where each replica stands.
    pub fn standings(&self, policy: Policy, now: Instant) -> Vec<Standing> {
        let line = |book: &&Book| book.speed.is_known();
        let fastest = self.books.iter().filter(line).map(|book| book.speed.line());
        let fastest = fastest.min_by(|a, b| (a.0 + a.1).total_cmp(&(b.0 + b.1)));
        let ask = Ask {
            now,
            dice: 0,
            sequences: 1,
            prompt: 1,
            answer: self.answer.unwrap_or(ANSWER),
            hashes: &[],
            picks: self.picks,
            fastest: fastest.unwrap_or(UNKNOWN),
        };
        let mut standings: Vec<Standing> = self
            .books
            .iter()
            .map(|book| {
                let (state, terms) = (state(book, now), score::terms(book, &ask));
                let gets = matches!(state, State::Ready | State::SlowStart);
                let weight = match policy {
                    _ if !gets => 0.0,
                    Policy::Score => 1.0 / terms.total().max(1e-6),
                    Policy::DynamicWrr => book.weights.effective() as f64,
                    Policy::RoundRobin => 1.0,
                    Policy::P2c => 1.0 / f64::from(book.load + 1),
                    Policy::PeakEwma => 1.0 / book.peak.load(now, book.load).max(1e-6),
                };
                Standing { replica: book.id, state, weight, terms, picks: book.picks }
            })
            .collect();
        let sum: f64 = standings.iter().map(|standing| standing.weight).sum();
        if sum > 0.0 {
            standings.iter_mut().for_each(|standing| standing.weight /= sum);
        }
        standings
    }
}

fn state(book: &Book, now: Instant) -> State {
    match book.breaker.state() {
        _ if book.address.is_none() => State::NotReady,
        _ if now < book.draining_until => State::Draining,
        breaker::State::Open { .. } => State::Ejected,
        breaker::State::Probing { .. } => State::Probing,
        breaker::State::Closed if score::is_starting(book, now) => State::SlowStart,
        breaker::State::Closed => State::Ready,
    }
}

/// The mean answer after one more.
pub fn longer_or_shorter(mean: Option<f64>, tokens: u32) -> Option<f64> {
    let tokens = f64::from(tokens);
    Some(mean.map_or(tokens, |mean| mean + ANSWER_STEP * (tokens - mean)))
}
