//! ● Asks workers whether they can read a model, before anything is promised.

use std::time::Duration;

use futures_util::future::join_all;
use shoal_protocol::control::CoordinatorMessage;
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::NodeId;
use shoal_protocol::plan::ModelSource;
use tokio::sync::oneshot;

use super::Agents;

/// How long a worker may take to look at a model's folder: headers alone are read, but a network
/// file system may be slow to wake.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);

/// And where it has to ask somebody far away for the listing and the headers first, who may tell it to
/// wait. Whoever deploys waits for two minutes (`cluster::client`).
const FETCHED_PROBE_TIMEOUT: Duration = Duration::from_secs(100);

/// Probes of one worker at once: one per operator who deploys at this moment.
const PROBES_MAX: usize = 64;

/// A probe under way: its place at the worker's link is free again when this is gone.
struct Asked<'a> {
    agents: &'a Agents,
    node: NodeId,
    number: u64,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        let mut registry = self.agents.lock();
        let link = registry.workers.get_mut(&self.node).and_then(|worker| worker.link.as_mut());
        if let Some(link) = link {
            link.probes.remove(&self.number);
        }
    }
}

impl Agents {
    /// Asks every connected worker for the fingerprint of a model. Each answers within a deadline.
    pub async fn probe_all(
        &self,
        source: &ModelSource,
    ) -> Vec<(NodeId, Result<[u8; 32], WireError>)> {
        let nodes: Vec<_> = {
            let registry = self.lock();
            let connected = registry.workers.iter().filter(|(_, worker)| worker.link.is_some());
            connected.map(|(node, _)| *node).collect()
        };
        join_all(nodes.into_iter().map(async |node| (node, self.probe(node, source).await))).await
    }

    async fn probe(&self, node: NodeId, source: &ModelSource) -> Result<[u8; 32], WireError> {
        let lost = || WireError::new(ErrorCode::WorkerLost, format!("{node} was lost"));
        let (reply, answer) = oneshot::channel();
        let number = {
            let mut registry = self.lock();
            let number = registry.number();
            let link = registry.workers.get_mut(&node).and_then(|worker| worker.link.as_mut());
            let link = link.ok_or_else(lost)?;
            let message = CoordinatorMessage::Probe { probe: number, source: source.clone() };
            if link.probes.len() >= PROBES_MAX || link.outbox.try_send(message).is_err() {
                let text = format!("{node} is busy with other deployments; try again");
                return Err(WireError::new(ErrorCode::Overloaded, text));
            }
            link.probes.insert(number, reply);
            number
        };
        // Also where whoever asked has hung up and this is dropped.
        let _asked = Asked { agents: self, node, number };
        let patience = if source.is_fetched() { FETCHED_PROBE_TIMEOUT } else { PROBE_TIMEOUT };
        match tokio::time::timeout(patience, answer).await {
            Ok(answer) => answer.unwrap_or_else(|_| Err(lost())),
            Err(_) => Err(WireError::new(
                ErrorCode::DeadlineExceeded,
                format!("{node} did not look at {source} within {patience:?}; try again"),
            )),
        }
    }
}
