//! ○ Which replica gets a request, and whether it gets one at all.
//!
//! ```text
//! observe(now, table)             what there is, on every change of the table
//! admit(now, dice, name, request) ─► filters ─► policy ─► Ticket{replica, head, address} | RouteError
//! first_token, token(ticket)      how fast it is       ended(ticket, outcome)  whether it works
//! ```
//!
//! The router is told the time and the dice. It keeps, per replica, what it sent since the head's
//! last report: reports are up to 250 ms old, and in that time a burst would all go one way.

pub mod admission;
pub mod book;
pub mod breaker;
pub mod budget;
pub mod dice;
mod error;
mod fleet;
pub mod policy;
pub mod prefix;
pub mod sim;
pub mod speed;

use std::net::SocketAddr;
use std::time::Duration;

use shoal_protocol::id::{DeploymentName, Generation, NodeId, ReplicaId};
use shoal_protocol::plan::BLOCK_TOKENS;
use shoal_protocol::units::Instant;

use crate::serving::{ServedDeployment, ServingTable};
use admission::AdmissionLimits;
use book::{Book, Outcome};
pub use error::{RouteError, find};
use fleet::Fleet;
pub use fleet::{Standing, State};
use policy::Policy;

/// When to try again where no replica is ready: loading takes seconds.
const NOT_READY_RETRY: Duration = Duration::from_secs(2);

/// The router of one coordinator.
#[derive(Debug, Default)]
pub struct Router {
    policy: Policy,
    limits: AdmissionLimits,
    /// In the table's order. A handful, and tickets know their place in it.
    fleets: Vec<Fleet>,
}

/// What is to be known of a request to choose a replica.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouteRequest<'a> {
    /// Sequences, all for one replica: they share a prompt, and so its KV blocks.
    pub sequences: u32,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// The most tokens of each answer.
    pub max_tokens: u32,
    /// The prompt's blocks (`prefix::block_hashes`), where the operator wants requests to go to where
    /// those were computed (`--prefix-affinity`); else empty.
    pub block_hashes: &'a [u64],
    /// Where it was tried before: used only where there is nothing else.
    pub avoid: &'a [(ReplicaId, Generation)],
}

/// A place for some sequences at a replica. Each of them must be given back by `Router::ended`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The replica.
    pub replica: ReplicaId,
    /// Its layout.
    pub generation: Generation,
    /// The worker with the head.
    pub head: NodeId,
    /// Where it takes requests.
    pub address: SocketAddr,
    epoch: u64,
    prompt: u32,
    /// Tokens of the prompt that its head had already, once it has said so.
    pub reused: u32,
    sent: Instant,
    /// When its last token came.
    last: Option<Instant>,
    tokens: u32,
    /// Where its book was when it was made.
    fleet: u32,
    slot: u32,
}

impl Router {
    /// A router with these bounds.
    pub fn new(policy: Policy, limits: AdmissionLimits) -> Self {
        Self { policy, limits, fleets: Vec::new() }
    }

    /// How it chooses.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Takes over a new table. Replicas that are gone are forgotten.
    pub fn observe(&mut self, now: Instant, table: &ServingTable) {
        let mut old = std::mem::take(&mut self.fleets);
        for deployment in table.deployments.values() {
            let known = old.iter().position(|fleet| fleet.name == deployment.name);
            let mut fleet = match known {
                Some(i) => old.swap_remove(i),
                None => Fleet::new(deployment.name.clone()),
            };
            fleet.observe(now, &deployment.replicas);
            self.fleets.push(fleet);
        }
    }

    /// A place for the request's sequences, all at one replica.
    pub fn admit(
        &mut self,
        now: Instant,
        dice: u64,
        deployment: &ServedDeployment,
        request: &RouteRequest<'_>,
    ) -> Result<Ticket, RouteError> {
        // An adapter's answers are computed, and counted, beside those of its base model.
        let at = self.fleets.iter().position(|fleet| fleet.name == *deployment.base());
        let not_ready = || RouteError::NotReady {
            name: deployment.name.as_str().to_owned(),
            reason: match deployment.reason.as_str() {
                "" => "none of its replicas is ready".to_owned(),
                reason => reason.to_owned(),
            },
            retry_after: NOT_READY_RETRY,
        };
        let at = at.ok_or_else(not_ready)?;
        let fleet = &mut self.fleets[at];
        let only = deployment.adapter.is_some().then_some(&deployment.replicas[..]);
        let seen = fleet.filter(now, request.avoid, only);
        if seen.ready == 0 {
            return Err(not_ready());
        }
        let bound = self.limits.bound(seen.ready as usize);
        if seen.load.saturating_add(request.sequences) > bound {
            return Err(RouteError::Overloaded {
                name: deployment.name.as_str().to_owned(),
                load: seen.load,
                asked: request.sequences,
                bound,
                retry_after: admission::retry_after(seen.load),
            });
        }
        let slot = fleet.choose(self.policy, now, dice, request, seen);
        let book = &mut fleet.books[slot as usize];
        let Some(address) = book.address else { return Err(not_ready()) };
        let epoch = book.epoch;
        book.send(now, request.sequences, request.prompt_tokens, request.block_hashes);
        Ok(Ticket {
            replica: book.id,
            generation: book.generation,
            head: book.head,
            address,
            epoch,
            prompt: request.prompt_tokens,
            reused: 0,
            sent: now,
            last: None,
            tokens: 0,
            fleet: at as u32,
            slot,
        })
    }

    /// A sequence's first token came; its head says how long the prompt took, but for what of it was
    /// there already (`Ticket::reused`).
    pub fn first_token(&mut self, now: Instant, ticket: &mut Ticket, prefill: Duration) {
        ticket.last = Some(now);
        ticket.tokens = 1;
        let prompt = ticket.prompt;
        let computed = prompt.saturating_sub(ticket.reused);
        if let Some((book, _)) = self.find(ticket) {
            book.first_token(now, prompt, Some((computed, prefill)));
        }
    }

    /// A further token of a sequence came.
    pub fn token(&mut self, now: Instant, ticket: &mut Ticket) {
        let last = ticket.last.replace(now);
        ticket.tokens += 1;
        // After a failure elsewhere an answer goes on here without a first token of its own.
        let gap = last.map(|last| now.since(last));
        let prompt = ticket.prompt;
        let Some((book, _)) = self.find(ticket) else { return };
        match gap {
            Some(gap) => book.token(now, gap),
            None => book.first_token(now, prompt, None),
        }
    }

    /// One sequence of a ticket is over.
    pub fn ended(&mut self, now: Instant, dice: u64, ticket: &Ticket, outcome: Outcome) {
        let prompt_left = if ticket.last.is_none() { ticket.prompt } else { 0 };
        let took = now.since(ticket.sent);
        let tokens = ticket.tokens;
        let epoch = ticket.epoch;
        let Some((book, answer)) = self.find(ticket) else { return };
        book.end(now, epoch, prompt_left, took);
        book.judge(now, outcome, dice);
        if outcome == Outcome::Complete {
            *answer = fleet::longer_or_shorter(*answer, tokens);
        }
    }

    /// How many sequences are open at each layout: what a simulator compares with those that run.
    #[doc(hidden)]
    pub fn open(&self) -> impl Iterator<Item = (ReplicaId, Generation, u32)> {
        let books = self.fleets.iter().flat_map(|fleet| &fleet.books);
        books.map(|book| (book.id, book.generation, book.open))
    }

    /// Where each replica stands and why, for metrics.
    pub fn standings(&self, now: Instant) -> impl Iterator<Item = (&DeploymentName, Standing)> {
        let policy = self.policy;
        self.fleets.iter().flat_map(move |fleet| {
            fleet.standings(policy, now).into_iter().map(|standing| (&fleet.name, standing))
        })
    }

    /// The book of a ticket, where its replica is still there, and its fleet's mean answer.
    fn find(&mut self, ticket: &Ticket) -> Option<(&mut Book, &mut Option<f64>)> {
        let is = |book: &Book| book.id == ticket.replica && book.generation == ticket.generation;
        let (mut fleet, mut slot) = (ticket.fleet as usize, ticket.slot as usize);
        let hit = self.fleets.get(fleet).and_then(|fleet| fleet.books.get(slot)).is_some_and(is);
        if !hit {
            // The table has changed since.
            (fleet, slot) =
                self.fleets.iter().enumerate().find_map(|(at, fleet)| {
                    fleet.books.iter().position(is).map(|slot| (at, slot))
                })?;
        }
        let fleet = self.fleets.get_mut(fleet)?;
        Some((fleet.books.get_mut(slot)?, &mut fleet.answer))
    }
}

/// Tokens of a prompt that a replica has probably computed before.
fn prefix_tokens(book: &Book, hashes: &[u64]) -> f64 {
    if hashes.is_empty() {
        return 0.0;
    }
    (book.prefix.known(hashes) * BLOCK_TOKENS as usize) as f64
}

#[cfg(test)]
#[path = "router_test.rs"]
mod tests;
