//! ● Suspects of a deployment go one after the other, so that what one of them does to its worker
//! cannot be blamed on another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use shoal_protocol::id::DeploymentName;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Who is on probation, by deployment.
#[derive(Debug, Default)]
pub struct Probation(Mutex<HashMap<DeploymentName, Arc<Semaphore>>>);

impl Probation {
    /// Waits until no other suspect of the deployment is tried.
    pub async fn enter(&self, deployment: &DeploymentName) -> Option<OwnedSemaphorePermit> {
        let turn = {
            let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // Nobody holds or awaits those.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            let turn = turns.entry(deployment.clone());
            Arc::clone(turn.or_insert_with(|| Arc::new(Semaphore::new(1))))
        };
        // It is never closed, so there always is a permit in the end.
        turn.acquire_owned().await.ok()
    }
}
