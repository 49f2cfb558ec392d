//! ● The door before every route: whose request it is, and a place that lasts until its answer ends.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http_body_util::BodyExt;
use shoal_protocol::prefix::Tenant;
use shoal_protocol::units;
use tokio::sync::watch;

use super::auth::{self, Quotas};
use super::error::ApiError;
use super::origin;
use crate::control::state::{ClusterState, KeyHash, Timestamp};

/// Who may use this coordinator's API.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// The keys are in it. A copy that lags behind shuts a revoked key out a little later.
    state: watch::Receiver<Arc<ClusterState>>,
    /// Held for a few comparisons, never across an await.
    quotas: Mutex<Quotas>,
    /// Where the quotas' time begins.
    origin: Instant,
}

/// What a layer of the router carries.
#[derive(Clone, Debug)]
pub(super) struct Door {
    pub gate: Gate,
    pub listener: SocketAddr,
}

impl Gate {
    /// A gate that lets in whoever shows a key of this state, or everybody of this machine while
    /// there is none.
    pub fn new(state: watch::Receiver<Arc<ClusterState>>) -> Self {
        let (quotas, origin) = (Mutex::default(), Instant::now());
        Self(Arc::new(Inner { state, quotas, origin }))
    }

    /// A gate for a listener on loopback where there are no keys.
    pub fn without_keys() -> Self {
        Self::new(watch::channel(Arc::default()).1)
    }

    /// Whose request it is, and the place under which it is answered, where its key has limits.
    fn admit(
        &self,
        listener: SocketAddr,
        request: &Request,
    ) -> Result<(Tenant, Option<Place>), ApiError> {
        let state = Arc::clone(&self.0.state.borrow());
        let (uri, headers) = (request.uri(), request.headers());
        if !state.keys.ever() {
            // The address is the only lock, so it is looked at closely.
            origin::check(listener, request.version(), uri, headers)?;
        }
        let at = Timestamp::of(SystemTime::now());
        let Some(key) = auth::judge(&state.keys, listener, uri.path(), headers, at)? else {
            return Ok((Tenant::OPEN, None));
        };
        let now = units::Instant(0) + self.0.origin.elapsed();
        let counted = self.quotas().enter(now, key)?;
        let place = counted.then(|| Place { gate: self.clone(), key: key.hash });
        Ok((tenant_of(&key.hash), place))
    }

    fn quotas(&self) -> MutexGuard<'_, Quotas> {
        // A panic under the lock leaves counts that are valid one by one.
        self.0.quotas.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A key is a tenant of its own, the same at every coordinator. Heads learn nothing that would open a door.
fn tenant_of(key: &KeyHash) -> Tenant {
    let derived = blake3::derive_key("shoal 2026-11 the tenant of an API key", &key.0);
    let mut number = [0; 16];
    number.copy_from_slice(&derived[..16]);
    Tenant(u128::from_le_bytes(number))
}

/// Lets a request through, or says why not.
pub(super) async fn pass(
    State(door): State<Door>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let (tenant, place) = door.gate.admit(door.listener, &request)?;
    request.extensions_mut().insert(tenant);
    let response = next.run(request).await;
    Ok(match place {
        // Until the last byte is on its way, or the client has gone.
        Some(place) => response.map(|body| {
            Body::new(body.inspect_frame(move |_| {
                let _held = &place;
            }))
        }),
        None => response,
    })
}

/// A key's place; dropping it gives it back.
#[derive(Debug)]
struct Place {
    gate: Gate,
    key: KeyHash,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.gate.quotas().leave(&self.key);
    }
}
