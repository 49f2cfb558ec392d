//! ● The router behind a lock and a clock; places at replicas that give themselves back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use shoal_protocol::units;

use crate::router::admission::AdmissionLimits;
use crate::router::policy::Policy;
use crate::router::{RouteError, Router, Ticket};
use crate::serving::{ServedDeployment, ServingTable};

/// All places of this coordinator.
#[derive(Debug)]
pub struct Places {
    /// Held for a decision, which is a few comparisons; never across an await.
    router: Mutex<Router>,
    /// Where the router's time begins.
    origin: Instant,
}

/// One sequence's place at a replica; dropping it gives it back.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    /// Where the place is.
    pub ticket: Ticket,
}

impl Places {
    /// No place is taken.
    pub fn new(limits: AdmissionLimits) -> Self {
        let router = Mutex::new(Router::new(Policy::default(), limits));
        Self { router, origin: Instant::now() }
    }

    /// `count` places at one replica. `dice` breaks ties between replicas.
    pub fn take(
        self: &Arc<Self>,
        dice: u64,
        table: &ServingTable,
        deployment: &ServedDeployment,
        count: u32,
    ) -> Result<Vec<Place>, RouteError> {
        let ticket = {
            let mut router = self.router();
            router.tidy(table);
            router.admit(self.now(), dice, deployment, count)?
        };
        let place = |_| Place { places: Arc::clone(self), ticket: ticket.clone() };
        Ok((0..count).map(place).collect())
    }

    fn router(&self) -> MutexGuard<'_, Router> {
        self.router.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> units::Instant {
        units::Instant(0) + self.origin.elapsed()
    }
}

impl Place {
    /// The replica did not answer, or was lost.
    pub fn failed(&self) {
        self.places.router().failed(self.places.now(), &self.ticket);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.router().ended(&self.ticket);
    }
}
