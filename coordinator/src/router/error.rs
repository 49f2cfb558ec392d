//! ○ Why a request has no place, and in what words.

use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::error::ErrorCode;

use crate::serving::{ServedDeployment, ServingTable};

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

/// The deployment, or the adapter, that a client means.
pub fn find<'a>(
    table: &'a ServingTable,
    name: &str,
) -> Result<&'a Arc<ServedDeployment>, RouteError> {
    // Names are few: a look-up by text needs no parse of a name that may be anything.
    let mut all = table.deployments.values().chain(table.adapters.values());
    let names = || table.deployments.keys().chain(table.adapters.keys());
    all.find(|deployment| deployment.name.as_str() == name).ok_or_else(|| RouteError::NotFound {
        name: name.chars().take(96).collect(),
        known: names().map(|name| name.as_str().to_owned()).collect(),
    })
}
