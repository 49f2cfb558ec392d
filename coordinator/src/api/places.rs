//! ● The router behind a lock and a clock; places at replicas that give themselves back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::DeploymentName;
use shoal_protocol::trace::Value;
use shoal_protocol::units;

use crate::router::admission::AdmissionLimits;
use crate::router::book::Outcome;
use crate::router::budget::RetryBudget;
use crate::router::policy::Policy;
use crate::router::{RouteError, RouteRequest, Router, Standing, Ticket, dice};
use crate::serving::{ServedDeployment, ServingTable};

/// All places of this coordinator.
#[derive(Debug)]
pub struct Places {
    /// Held for a decision or a token's time, which is a microsecond; never across an await.
    inner: Mutex<Inner>,
    /// Where the router's time begins.
    origin: Instant,
}

#[derive(Debug)]
struct Inner {
    router: Router,
    budget: RetryBudget,
    /// The table that the router has seen; kept, so that its address is nobody else's.
    table: Option<Arc<ServingTable>>,
}

/// One sequence's place at a replica; dropping it gives it back.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    /// Where the place is.
    pub ticket: Ticket,
    /// How the sequence ended. One that is dropped before its end says nothing of the replica.
    outcome: Outcome,
}

impl Places {
    /// No place is taken.
    pub fn new(policy: Policy, limits: AdmissionLimits) -> Self {
        let router = Router::new(policy, limits);
        let inner = Inner { router, budget: RetryBudget::default(), table: None };
        Self { inner: Mutex::new(inner), origin: Instant::now() }
    }

    /// Places at one replica for a new request, as many as it has sequences. `dice` breaks ties between
    /// replicas.
    pub fn take(
        self: &Arc<Self>,
        dice: u64,
        table: &Arc<ServingTable>,
        deployment: &ServedDeployment,
        request: &RouteRequest<'_>,
    ) -> Result<Vec<Place>, RouteError> {
        let now = self.now();
        self.inner().budget.request(now);
        self.take_again(dice, table, deployment, request)
    }

    /// The same for a request that was counted before.
    pub fn take_again(
        self: &Arc<Self>,
        dice: u64,
        table: &Arc<ServingTable>,
        deployment: &ServedDeployment,
        request: &RouteRequest<'_>,
    ) -> Result<Vec<Place>, RouteError> {
        let now = self.now();
        let ticket = {
            let mut inner = self.inner();
            inner.observe(now, table);
            inner.router.admit(now, dice, deployment, request)?
        };
        let place = |_| Place {
            places: Arc::clone(self),
            ticket: ticket.clone(),
            outcome: Outcome::default(),
        };
        Ok((0..request.sequences).map(place).collect())
    }

    /// Whether something that failed may be tried again: takes one retry off the budget.
    pub fn may_retry(&self) -> bool {
        self.inner().budget.retry(self.now())
    }

    /// Where each replica stands, by deployment.
    pub fn standings(&self, table: &Arc<ServingTable>) -> Vec<(String, Standing)> {
        let now = self.now();
        let mut inner = self.inner();
        inner.observe(now, table);
        let standings = inner.router.standings(now);
        standings.map(|(name, standing)| (name.as_str().to_owned(), standing)).collect()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> units::Instant {
        units::Instant(0) + self.origin.elapsed()
    }
}

impl Inner {
    fn observe(&mut self, now: units::Instant, table: &Arc<ServingTable>) {
        if !self.table.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, table)) {
            self.router.observe(now, table);
            self.table = Some(Arc::clone(table));
        }
    }
}

impl Place {
    /// Why the router chose it, for people: what a trace says of its decision.
    pub fn why(&self, deployment: &DeploymentName) -> Vec<(&'static str, Value)> {
        let now = self.places.now();
        let inner = self.places.inner();
        let policy = inner.router.policy();
        let of = |(name, standing)| (name == deployment).then_some(standing);
        let standings: Vec<Standing> = inner.router.standings(now).filter_map(of).collect();
        drop(inner);
        let mine = standings.iter().find(|standing| standing.replica == self.ticket.replica);
        let why = match (mine, standings.len()) {
            (None, _) => "its replica is not in the table any more".to_owned(),
            (Some(_), 1) => "it is the only replica".to_owned(),
            (Some(mine), count) => {
                let terms = mine.terms.named();
                let terms = terms.map(|(name, seconds)| format!("{name} {seconds:.4} s"));
                let (share, state) = (mine.weight * 100.0, mine.state.name());
                let terms = terms.join(", ");
                format!("{state}, {share:.0} % of the weights of {count} replicas: {terms}")
            }
        };
        vec![
            ("shoal.policy", policy.name().into()),
            ("shoal.replica", self.ticket.replica.to_string().into()),
            ("shoal.generation", self.ticket.generation.0.into()),
            ("shoal.head", self.ticket.head.to_string().into()),
            ("shoal.replicas", standings.len().into()),
            ("shoal.why", why.into()),
        ]
    }

    /// A token came. With the first one the head says how many microseconds its prompt took.
    pub fn token(&mut self, prefill_us: Option<u32>) {
        let now = self.places.now();
        let mut inner = self.places.inner();
        match prefill_us {
            Some(us) => {
                let prefill = Duration::from_micros(u64::from(us));
                inner.router.first_token(now, &mut self.ticket, prefill);
            }
            None => inner.router.token(now, &mut self.ticket),
        }
    }

    /// The answer is complete.
    pub fn complete(&mut self) {
        self.outcome = Outcome::Complete;
    }

    /// The answer ended with an error: whose fault it is decides what it says of the replica.
    pub fn failed(&mut self, code: ErrorCode) {
        self.outcome = Outcome::of(code);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let now = self.places.now();
        // Only spreads back-offs: a coordinator's own clock is dice enough.
        let dice = dice::mix(now.0);
        self.places.inner().router.ended(now, dice, &self.ticket, self.outcome);
    }
}
