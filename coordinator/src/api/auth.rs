//! ○ Whether a request may be answered: the key that it shows, and what that key may still ask for.
//!
//! No key was ever made: a listener on loopback is open, another one is shut. Afterwards each request
//! shows a key, except those of [`OPEN`]. Limits are counted by each coordinator for itself: through
//! three coordinators a key gets at most three times what its limits say.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use axum::http::{HeaderMap, header};
use shoal_protocol::access::{KeyName, KeyStanding};
use shoal_protocol::units::Instant;

use crate::control::state::keys::KEYS_MAX;
use crate::control::state::{ApiKey, KeyHash, Keys, Timestamp};

/// What probes and scrapers ask without a key, as at vLLM: is it alive, is it ready, what does it
/// count. The last shows names of deployments and figures of load, and nothing of any request.
const OPEN: [&str; 3] = ["/health", "/ready", "/metrics"];

/// The longest key that is looked at; ours have 73 bytes.
const KEY_LEN_MAX: usize = 256;

/// When to try again where too many requests are under way: nobody knows when one ends.
const CONCURRENT_RETRY: Duration = Duration::from_secs(1);

/// Why a request is not answered.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Denied {
    /// No key where one is needed.
    #[error(
        "this API needs a key: send it as `Authorization: Bearer sk-shoal-…`; whoever operates the \
         cluster makes one with `shoal keys create NAME`"
    )]
    Missing,
    /// Another scheme, or several headers.
    #[error("the `Authorization` header must stand there once and be `Bearer` and an API key")]
    NotBearer,
    /// A key that nobody made.
    #[error(
        "the API key is not known to this cluster; `shoal keys list` shows the names of those that are"
    )]
    Unknown,
    /// A key whose time is over.
    #[error("the API key `{name}` has expired; ask for a new one")]
    Expired {
        /// Which.
        name: KeyName,
    },
    /// A key that was taken back.
    #[error("the API key `{name}` was revoked; ask for a new one")]
    Revoked {
        /// Which.
        name: KeyName,
    },
    /// Too many in a minute.
    #[error(
        "the API key `{name}` may send {per_minute} requests a minute to this coordinator, and has; try again later"
    )]
    Rate {
        /// Which.
        name: KeyName,
        /// How many it may.
        per_minute: u32,
        /// When the next one may come.
        retry_after: Duration,
    },
    /// Too many at once.
    #[error(
        "the API key `{name}` may have {max} requests under way at this coordinator, and has; wait until one ends"
    )]
    Concurrent {
        /// Which.
        name: KeyName,
        /// How many it may.
        max: u32,
    },
}

impl Denied {
    /// When to try again, where that helps.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Denied::Rate { retry_after, .. } => Some(*retry_after),
            Denied::Concurrent { .. } => Some(CONCURRENT_RETRY),
            _ => None,
        }
    }
}

/// Whether the API may listen at this address: at one of the machine's own always, elsewhere with a key.
pub fn may_listen(keys: &Keys, address: SocketAddr, at: Timestamp) -> bool {
    address.ip().is_loopback() || keys.any_good(at)
}

/// The key under which a request may go on; `None` where it needs none.
pub fn judge<'a>(
    keys: &'a Keys,
    listener: SocketAddr,
    path: &str,
    headers: &HeaderMap,
    at: Timestamp,
) -> Result<Option<&'a ApiKey>, Denied> {
    let free = !keys.ever() && listener.ip().is_loopback();
    if free || OPEN.contains(&path) {
        return Ok(None);
    }
    let key = keys.find(&KeyHash::of(shown(headers)?)).ok_or(Denied::Unknown)?;
    match key.standing(at) {
        KeyStanding::Good => Ok(Some(key)),
        KeyStanding::Expired => Err(Denied::Expired { name: key.name.clone() }),
        KeyStanding::Revoked => Err(Denied::Revoked { name: key.name.clone() }),
    }
}

/// What stands behind `Authorization: Bearer`.
fn shown(headers: &HeaderMap) -> Result<&str, Denied> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let value = values.next().ok_or(Denied::Missing)?;
    let text = value.to_str().map_err(|_| Denied::NotBearer)?;
    let (scheme, key) = text.trim().split_once(' ').ok_or(Denied::NotBearer)?;
    let key = key.trim_start();
    if values.next().is_some() || !scheme.eq_ignore_ascii_case("bearer") || key.is_empty() {
        return Err(Denied::NotBearer);
    }
    if key.len() > KEY_LEN_MAX { Err(Denied::Unknown) } else { Ok(key) }
}

/// What each limited key has used.
#[derive(Debug, Default)]
pub struct Quotas {
    /// By the key's hash. Those that say nothing are forgotten where there are many.
    usage: BTreeMap<[u8; 32], Usage>,
}

#[derive(Debug)]
struct Usage {
    /// Requests that may come at once; grows by `per_minute` in a minute, up to `per_minute`.
    left: f64,
    filled: Instant,
    per_minute: Option<u32>,
    running: u32,
}

impl Usage {
    fn refill(&mut self, now: Instant) {
        if let Some(per_minute) = self.per_minute.map(f64::from) {
            let grown = now.since(self.filled).as_secs_f64() * per_minute / 60.0;
            self.left = (self.left + grown).min(per_minute);
        }
        self.filled = now;
    }

    fn says_nothing(&self) -> bool {
        self.running == 0 && self.per_minute.is_none_or(|per_minute| self.left >= per_minute.into())
    }
}

impl Quotas {
    /// One request begins under this key, or is denied. `true`: it is counted, and [`Self::leave`] is
    /// to be called when it has ended.
    pub fn enter(&mut self, now: Instant, key: &ApiKey) -> Result<bool, Denied> {
        let limits = key.limits;
        if limits.requests_per_minute.is_none() && limits.concurrent.is_none() {
            return Ok(false);
        }
        if self.usage.len() >= KEYS_MAX {
            self.usage.values_mut().for_each(|usage| usage.refill(now));
            self.usage.retain(|_, usage| !usage.says_nothing());
        }
        let usage = self.usage.entry(key.hash.0).or_insert_with(|| Usage {
            left: limits.requests_per_minute.unwrap_or(0).into(),
            filled: now,
            per_minute: limits.requests_per_minute,
            running: 0,
        });
        if let Some(max) = limits.concurrent.filter(|max| usage.running >= *max) {
            return Err(Denied::Concurrent { name: key.name.clone(), max });
        }
        usage.refill(now);
        if let Some(per_minute) = limits.requests_per_minute {
            if usage.left < 1.0 {
                let seconds = (1.0 - usage.left) * 60.0 / f64::from(per_minute);
                let retry_after = Duration::from_secs_f64(seconds.ceil());
                return Err(Denied::Rate { name: key.name.clone(), per_minute, retry_after });
            }
            usage.left -= 1.0;
        }
        usage.running += 1;
        Ok(true)
    }

    /// A request that was counted has ended.
    pub fn leave(&mut self, key: &KeyHash) {
        if let Some(usage) = self.usage.get_mut(&key.0) {
            usage.running = usage.running.saturating_sub(1);
        }
    }
}

#[cfg(test)]
#[path = "auth_test.rs"]
mod tests;
