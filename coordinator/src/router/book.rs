//! ○ What the router knows of one replica: the head's last report, and what happened since.

use std::net::SocketAddr;
use std::time::Duration;

use shoal_protocol::control::HeadReport;
use shoal_protocol::error::{ErrorCode, Fault};
use shoal_protocol::id::{Generation, NodeId, ReplicaId};
use shoal_protocol::units::Instant;

use super::breaker::Breaker;
use super::policy::dynamic_wrr::Weights;
use super::policy::peak_ewma::PeakCost;
use super::prefix::PrefixIndex;
use super::speed::Speed;
use crate::serving::ServedReplica;

/// How long a head that says that it drains gets nothing new: until the table says so as well.
const DRAINING_FOR: Duration = Duration::from_secs(2);

/// How an answer ended, as far as the replica is judged by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Outcome {
    /// All of it came.
    Complete,
    /// The client went away, or its request was wrong: that says nothing of the replica.
    #[default]
    NotJudged,
    /// The head refused it, since it has too much to do.
    Refused,
    /// The head takes nothing new.
    Draining,
    /// The replica failed.
    Broken,
    /// Its link is gone.
    Lost,
}

impl Outcome {
    /// What an error's code says of the replica. An error of the caller says nothing.
    pub fn of(code: ErrorCode) -> Self {
        match code {
            code if code.fault() == Fault::Caller => Outcome::NotJudged,
            ErrorCode::Overloaded => Outcome::Refused,
            // An older layout says nothing of the new one.
            ErrorCode::StaleGeneration => Outcome::NotJudged,
            ErrorCode::Draining | ErrorCode::NotReady => Outcome::Draining,
            ErrorCode::WorkerLost => Outcome::Lost,
            _ => Outcome::Broken,
        }
    }
}

/// What we know of a replica.
#[derive(Clone, Debug)]
pub struct Book {
    /// The replica.
    pub id: ReplicaId,
    /// Its layout.
    pub generation: Generation,
    /// The worker with the head.
    pub head: NodeId,
    /// Where it takes requests; `None` where it takes none.
    pub address: Option<SocketAddr>,
    report: Option<HeadReport>,
    /// Counts reports, so that a ticket knows whether it is older than the last.
    pub epoch: u64,
    /// Sequences sent since the report.
    sent: u32,
    /// Sequences over since the report, of those that it counted.
    over: u32,
    /// Sequences of ours that are open.
    pub open: u32,
    /// Sequences that run or wait there, by the report and what happened since.
    pub load: u32,
    /// The most sequences that it runs, where a report showed that others waited.
    pub room: Option<u32>,
    /// How near it is to the end of its KV blocks: `k/(1-k)` of the share `k` in use, 99 at most.
    pub kv_pressure: f64,
    /// Prompt tokens that were sent and of which no first token came yet.
    pub prompt_ahead: u64,
    /// When we last heard of an open sequence, or began to wait for the first.
    pub heard: Instant,
    /// How fast it is.
    pub speed: Speed,
    /// Whether it is left alone.
    pub breaker: Breaker,
    /// When it became ready, or its breaker closed.
    pub since: Instant,
    /// It said that it takes nothing new, until when we believe it.
    pub draining_until: Instant,
    /// The blocks that we sent there.
    pub prefix: PrefixIndex,
    /// Picks of the deployment when it was picked last.
    pub picked_at: u64,
    /// Sequences sent there in all.
    pub picks: u64,
    /// For `dynamic_wrr`.
    pub weights: Weights,
    /// For `peak_ewma`.
    pub peak: PeakCost,
}

impl Book {
    /// An empty book of a replica that has just been seen.
    pub fn new(now: Instant, replica: &ServedReplica) -> Self {
        let mut book = Self {
            id: replica.id,
            generation: replica.generation,
            head: replica.head,
            address: None,
            report: None,
            epoch: 0,
            sent: 0,
            over: 0,
            open: 0,
            load: 0,
            room: None,
            kv_pressure: 0.0,
            prompt_ahead: 0,
            heard: now,
            speed: Speed::default(),
            breaker: Breaker::default(),
            since: now,
            draining_until: Instant(0),
            prefix: PrefixIndex::default(),
            picked_at: 0,
            picks: 0,
            weights: Weights::default(),
            peak: PeakCost::default(),
        };
        book.see(now, replica);
        book
    }

    /// Takes over what the table says.
    pub fn see(&mut self, now: Instant, replica: &ServedReplica) {
        let address = replica.requests.filter(|_| replica.ready);
        if self.address.is_none() && address.is_some() {
            self.since = now;
        }
        self.address = address;
        self.head = replica.head;
        if self.report != replica.load {
            // A new report has counted what we sent before it, or nearly so: a request on its way
            // at that moment is missed until the next one.
            self.report = replica.load;
            self.epoch += 1;
            self.sent = 0;
            self.over = 0;
            if let Some(load) = replica.load {
                let used = f64::from(load.blocks_used) / f64::from(load.blocks_total.max(1));
                let used = used.clamp(0.0, 0.99);
                self.kv_pressure = used / (1.0 - used);
                self.room = match self.room {
                    _ if load.waiting > 0 && load.running > 0 => Some(load.running),
                    room => room.map(|room| room.max(load.running)),
                };
            }
        }
        self.count();
    }

    /// Sequences that compute there at a time, of a load.
    pub fn running(&self, load: u32) -> u32 {
        self.room.map_or(load, |room| load.min(room))
    }

    /// So many sequences of a prompt were sent.
    pub fn send(&mut self, now: Instant, sequences: u32, prompt: u32, hashes: &[u64]) {
        if self.open == 0 {
            self.heard = now;
        }
        if !self.breaker.is_closed() && self.breaker.probe_is_due(now) {
            self.breaker.probe(now);
        }
        self.sent += sequences;
        self.open += sequences;
        self.prompt_ahead += u64::from(prompt) * u64::from(sequences);
        self.picks += u64::from(sequences);
        self.prefix.note(hashes);
        self.count();
    }

    /// A sequence's first token came; its head says how long it took and for how many tokens of the
    /// prompt, except where the answer began elsewhere.
    pub fn first_token(&mut self, now: Instant, prompt: u32, prefill: Option<(u32, Duration)>) {
        self.heard = now;
        self.prompt_ahead = self.prompt_ahead.saturating_sub(u64::from(prompt));
        if let Some((tokens, prefill)) = prefill {
            self.speed.prompt(now, f64::from(tokens), prefill.as_secs_f64());
        }
        // A whole answer may take minutes: the first token shows that it works.
        if !self.breaker.is_closed() && self.breaker.success(now) {
            self.since = now;
        }
    }

    /// A further token came.
    pub fn token(&mut self, now: Instant, gap: Duration) {
        self.heard = now;
        let rows = f64::from(self.running(self.load));
        self.speed.token(now, rows, gap.as_secs_f64());
    }

    /// A sequence is over. `epoch` is the ticket's, `prompt_left` its prompt where no token came.
    pub fn end(&mut self, now: Instant, epoch: u64, prompt_left: u32, took: Duration) {
        self.heard = now;
        self.open = self.open.saturating_sub(1);
        if self.epoch == epoch {
            self.sent = self.sent.saturating_sub(1);
        } else {
            self.over += 1;
        }
        self.prompt_ahead = self.prompt_ahead.saturating_sub(u64::from(prompt_left));
        self.peak.seen(now, took.as_secs_f64());
        self.count();
    }

    /// Judges it by how a sequence ended.
    pub fn judge(&mut self, now: Instant, outcome: Outcome, dice: u64) {
        match outcome {
            Outcome::NotJudged => {}
            Outcome::Complete => {
                self.weights.good();
                if self.breaker.success(now) {
                    self.since = now;
                }
            }
            Outcome::Draining => self.draining_until = now + DRAINING_FOR,
            Outcome::Refused | Outcome::Broken | Outcome::Lost => {
                self.weights.bad();
                self.peak.failed(now);
                self.breaker.failure(now, outcome == Outcome::Lost, dice);
            }
        }
    }

    fn count(&mut self) {
        let reported = self.report.map_or(0, |load| load.running.saturating_add(load.waiting));
        let estimate = reported.saturating_sub(self.over).saturating_add(self.sent);
        // What is ours is open for certain, whatever the report says.
        self.load = estimate.max(self.open);
    }
}
