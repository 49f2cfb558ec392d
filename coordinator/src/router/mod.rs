//! ○ Which replica gets a request, and whether it gets one at all.
//!
//! ```text
//! admit(now, dice, table, name, n) ─► Ticket{replica, head, address} | RouteError
//! ended(ticket)  one of its n sequences is over        failed(now, ticket)  the head did not answer
//! ```
//!
//! The router is told the time and the dice. It keeps, per replica, what it sent since the head's
//! last report: reports are up to 250 ms old, and in that time a burst would all go one way.

pub mod admission;
pub mod policy;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use shoal_protocol::control::HeadReport;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{Generation, NodeId, ReplicaId};
use shoal_protocol::units::Instant;

use crate::serving::{ServedDeployment, ServedReplica, ServingTable};
use admission::AdmissionLimits;
use policy::{Policy, View};

/// How long a replica that failed us is only used where there is no other: two reports and the time
/// that QUIC needs to notice a dead peer.
const SUSPECT_FOR: Duration = Duration::from_secs(2);

/// When to try again where no replica is ready: loading takes seconds.
const NOT_READY_RETRY: Duration = Duration::from_secs(2);

/// Books of replicas that are gone are dropped when there are this many more than replicas.
const STALE_BOOKS_MAX: usize = 64;

/// The router of one coordinator.
#[derive(Debug, Default)]
pub struct Router {
    policy: Policy,
    limits: AdmissionLimits,
    books: BTreeMap<(ReplicaId, Generation), Book>,
}

/// What we know of a replica besides the head's report.
#[derive(Debug, Default)]
struct Book {
    report: Option<HeadReport>,
    /// Counts reports, so that a ticket knows whether it is older than the last.
    epoch: u64,
    /// Sequences sent since the report.
    sent: u32,
    /// Sequences over since the report, of those that it counted.
    over: u32,
    /// Sequences of ours that are open.
    open: u32,
    suspect_until: Instant,
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
}

/// Why a request has no place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// No deployment has this name.
    #[error("there is no model `{name}`; {}", known_names(.known))]
    NotFound {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// No replica is ready.
    #[error("the model `{name}` is not ready: {reason}")]
    NotReady {
        /// The deployment.
        name: String,
        /// What is missing.
        reason: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// The deployment has as much open as it may.
    #[error(
        "the model `{name}` has {load} answers running or waiting, and {asked} more would pass its \
         bound of {bound}; try again in {} s", .retry_after.as_secs()
    )]
    Overloaded {
        /// The deployment.
        name: String,
        /// What is open.
        load: u32,
        /// What was asked for.
        asked: u32,
        /// The bound.
        bound: u32,
        /// When to try again.
        retry_after: Duration,
    },
}

/// The most names that an error lists.
const NAMES_MAX: usize = 16;

fn known_names(known: &[String]) -> String {
    if known.is_empty() {
        return "nothing is deployed yet (`shoal deploy MODEL` does it)".to_owned();
    }
    let more = if known.len() > NAMES_MAX { ", …" } else { "" };
    format!("these are deployed: {}{more}", known[..known.len().min(NAMES_MAX)].join(", "))
}

impl RouteError {
    /// Its code.
    pub fn code(&self) -> ErrorCode {
        match self {
            RouteError::NotFound { .. } => ErrorCode::NotFound,
            RouteError::NotReady { .. } => ErrorCode::NotReady,
            RouteError::Overloaded { .. } => ErrorCode::Overloaded,
        }
    }

    /// When to try again, where that may help.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            RouteError::NotFound { .. } => None,
            RouteError::NotReady { retry_after, .. }
            | RouteError::Overloaded { retry_after, .. } => Some(*retry_after),
        }
    }
}

/// The deployment that a client means.
pub fn find<'a>(
    table: &'a ServingTable,
    name: &str,
) -> Result<&'a std::sync::Arc<ServedDeployment>, RouteError> {
    // Names are few: a look-up by text needs no parse of a name that may be anything.
    table.deployments.values().find(|deployment| deployment.name.as_str() == name).ok_or_else(
        || RouteError::NotFound {
            name: name.chars().take(96).collect(),
            known: table.deployments.keys().map(|name| name.as_str().to_owned()).collect(),
        },
    )
}

impl Router {
    /// A router with these bounds.
    pub fn new(policy: Policy, limits: AdmissionLimits) -> Self {
        Self { policy, limits, books: BTreeMap::new() }
    }

    /// A place for `sequences` sequences, all at one replica: they share a prompt, and so its KV
    /// blocks.
    pub fn admit(
        &mut self,
        now: Instant,
        dice: u64,
        deployment: &ServedDeployment,
        sequences: u32,
    ) -> Result<Ticket, RouteError> {
        let ready: Vec<(&ServedReplica, SocketAddr)> = deployment
            .replicas
            .iter()
            .filter(|replica| replica.ready)
            .filter_map(|replica| Some((replica, replica.requests?)))
            .collect();
        let views: Vec<View> = ready.iter().map(|(replica, _)| self.view(now, replica)).collect();
        let name = deployment.name.as_str();
        let Some(chosen) = self.policy.choose(&views, dice) else {
            let reason = match deployment.reason.as_str() {
                "" => "none of its replicas is ready",
                reason => reason,
            };
            return Err(RouteError::NotReady {
                name: name.to_owned(),
                reason: reason.to_owned(),
                retry_after: NOT_READY_RETRY,
            });
        };
        let load = views.iter().map(|view| view.load).sum::<u32>();
        let bound = self.limits.bound(ready.len());
        if load.saturating_add(sequences) > bound {
            return Err(RouteError::Overloaded {
                name: name.to_owned(),
                load,
                asked: sequences,
                bound,
                retry_after: admission::retry_after(load),
            });
        }
        let (replica, address) = ready[chosen];
        let book = self.books.entry((replica.id, replica.generation)).or_default();
        book.sent += sequences;
        book.open += sequences;
        Ok(Ticket {
            replica: replica.id,
            generation: replica.generation,
            head: replica.head,
            address,
            epoch: book.epoch,
        })
    }

    /// One sequence of a ticket is over, however it ended.
    pub fn ended(&mut self, ticket: &Ticket) {
        let Some(book) = self.books.get_mut(&(ticket.replica, ticket.generation)) else { return };
        book.open = book.open.saturating_sub(1);
        if book.epoch == ticket.epoch {
            book.sent = book.sent.saturating_sub(1);
        } else {
            book.over += 1;
        }
    }

    /// The head of a ticket could not be reached or was lost.
    pub fn failed(&mut self, now: Instant, ticket: &Ticket) {
        let book = self.books.entry((ticket.replica, ticket.generation)).or_default();
        book.suspect_until = now + SUSPECT_FOR;
    }

    /// Forgets replicas that are gone.
    pub fn tidy(&mut self, table: &ServingTable) {
        let replicas = || table.deployments.values().flat_map(|d| &d.replicas);
        if self.books.len() > replicas().count() + STALE_BOOKS_MAX {
            let known: Vec<_> = replicas().map(|r| (r.id, r.generation)).collect();
            self.books.retain(|key, book| book.open > 0 || known.contains(key));
        }
    }

    fn view(&mut self, now: Instant, replica: &ServedReplica) -> View {
        let book = self.books.entry((replica.id, replica.generation)).or_default();
        if book.report != replica.load {
            // A new report has counted what we sent before it, or nearly so: a request on its way
            // at that moment is missed until the next one.
            book.report = replica.load;
            book.epoch += 1;
            book.sent = 0;
            book.over = 0;
        }
        let (reported, kv_usage) = match replica.load {
            None => (0, 0.0),
            Some(load) => (
                load.running.saturating_add(load.waiting),
                f64::from(load.blocks_used) / f64::from(load.blocks_total.max(1)),
            ),
        };
        let estimate = reported.saturating_sub(book.over).saturating_add(book.sent);
        View {
            // What is ours is open for certain, whatever the report says.
            load: estimate.max(book.open),
            kv_usage,
            suspect: now < book.suspect_until,
        }
    }
}

#[cfg(test)]
#[path = "router_test.rs"]
mod tests;
