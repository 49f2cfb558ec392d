//! ● Whoever is removed is out at once: a certificate is good for hours, membership for as long as the
//! state has the node.

use shoal_protocol::id::NodeId;
use shoal_protocol::quic::{Connection, close_code};
use tokio::sync::watch;

use super::store::ControlStore;
use crate::dispatch::Dispatcher;

/// What a node hears that belongs to the cluster no more.
const REMOVED: &str = "this node was removed from the cluster; it joins again with a new token";

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
            tracing::warn!(%node, %address, "refused: it is no node of this cluster any more");
            return connection.close(close_code::REFUSED, REMOVED);
        }
        let mut state = self.store.watch();
        tokio::pin!(talk);
        tokio::select! {
            () = &mut talk => return,
            // The store ends after all conversations.
            _ = state.wait_for(|state| state.nodes.get(node).is_none()) => {}
        }
        tracing::info!(%node, "removed: its conversation is ended");
        connection.close(close_code::REFUSED, REMOVED);
        talk.await;
    }

    /// What this coordinator has may be older than the node.
    async fn is_member(&self, node: NodeId) -> bool {
        if self.store.state().nodes.get(node).is_some() {
            return true;
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
