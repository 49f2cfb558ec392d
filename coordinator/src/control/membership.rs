//! ● Whoever is removed is out at once: a certificate is good for hours, membership for as long as the
//! state has the node.

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::NodeId;
use shoal_protocol::quic::{Connection, close_code};
use tokio::sync::watch;

use super::state::ClusterState;
use super::store::ControlStore;
use crate::dispatch::Dispatcher;

/// What a node hears that is not on record where it comes, and may be elsewhere.
const UNKNOWN: &str = "this coordinator has no such node on record, as far as it can know now";

/// What a node hears that belongs to the cluster no more. Numbers are never given again, so one that was
/// given and is not there was removed for good, by whatever coordinators there were, and whatever this copy
/// of the state has not heard yet.
pub(super) fn removal(state: &ClusterState, node: NodeId) -> Option<WireError> {
    if !state.nodes.was_given(node) || state.nodes.get(node).is_some() {
        return None;
    }
    let text = format!(
        "{node} was removed from this cluster, or given up when the other coordinators went on without \
         it: what it knows counts no more. Delete its data folder, and join anew on an empty one"
    );
    Some(WireError::new(ErrorCode::PermissionDenied, text))
}

/// Asks the state who belongs to the cluster.
#[derive(Clone, Debug)]
pub struct Membership {
    store: ControlStore,
}

impl Membership {
    /// Who belongs to the cluster is in this state.
    pub fn new(store: ControlStore) -> Self {
        Self { store }
    }

    /// Holds a conversation as long as the node at its other end is a member: afterwards its
    /// connection is closed, and the conversation ends in its own way. Who has no certificate is
    /// looked at by the conversation itself.
    pub async fn while_member(&self, connection: &Connection, talk: impl Future<Output = ()>) {
        let Some(node) = connection.peer() else { return talk.await };
        if !self.is_member(node).await {
            let address = connection.remote_address();
            tracing::warn!(%node, %address, "refused: it is no node of this cluster");
            return self.turn_away(node, connection);
        }
        let mut state = self.store.watch();
        tokio::pin!(talk);
        tokio::select! {
            () = &mut talk => return,
            // The store ends after all conversations.
            _ = state.wait_for(|state| state.nodes.get(node).is_none()) => {}
        }
        tracing::info!(%node, "removed: its conversation is ended");
        self.turn_away(node, connection);
        talk.await;
    }

    fn turn_away(&self, node: NodeId, connection: &Connection) {
        match removal(&self.store.state(), node) {
            Some(removed) => connection.close(close_code::REMOVED, &removed.message),
            None => connection.close(close_code::REFUSED, UNKNOWN),
        }
    }

    /// What this coordinator has may be older than the node.
    async fn is_member(&self, node: NodeId) -> bool {
        let state = self.store.state();
        if state.nodes.get(node).is_some() || removal(&state, node).is_some() {
            return state.nodes.get(node).is_some();
        }
        self.store.read().await.is_ok_and(|state| state.nodes.get(node).is_some())
    }

    /// Ends the connections to the heads of removed workers, until `stop` becomes true.
    pub async fn shut_out(self, dispatcher: Dispatcher, mut stop: watch::Receiver<bool>) {
        let mut changes = self.store.watch();
        loop {
            let state = changes.borrow_and_update().clone();
            dispatcher.keep(|node| state.nodes.get(node).is_some());
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }
}
