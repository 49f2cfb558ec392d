//! ● Which version of the protocol all coordinators speak: each asks all others, and the leader says it in
//! the log.
//!
//! ```text
//! greet each ─► Welcome{version} ─► heard ─┬─► the leader: Raise, once all speak it
//!                                          └─► names for whoever is refused meanwhile
//! ```
//!
//! Whoever does not answer holds it back, since nobody knows what it will be when it is back.

use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::id::NodeId;
use shoal_protocol::quic::{Expect, close_code};
use shoal_protocol::version::PROTOCOL_VERSION;
use tokio::time::timeout;

use super::Peers;
use super::carrier::Greeted;
use crate::control::state::{Change, ClusterState, VersionCommand};

/// How often those are asked again that did not answer, or speak an older version: one that was
/// upgraded says so by itself, with its new start, so this is for the others alone.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// How long a peer may take to end a conversation in which nothing more is said.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Peers {
    /// Runs until the log has the version that this build speaks: no more can be had with it.
    pub(super) async fn agree(self) {
        let mut state = self.store.watch();
        let mut standing = self.store.standing();
        loop {
            let now = Arc::clone(&state.borrow_and_update());
            if now.versions.log() >= PROTOCOL_VERSION {
                return;
            }
            self.ask_all(&now).await;
            if standing.borrow_and_update().leading {
                self.raise(&now).await;
            }
            let before = starts(&now);
            tokio::select! {
                other = state.wait_for(|state| starts(state) != before) => {
                    if other.is_err() {
                        return;
                    }
                }
                changed = standing.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(ASK_EVERY) => {}
            }
        }
    }

    /// Hears what those speak of whom it is not known that they speak all that this one does.
    async fn ask_all(&self, state: &ClusterState) {
        let heard = self.store.heard();
        heard.keep(state);
        for (node, record) in state.coordinators.iter() {
            let known = heard.of(state, node);
            if node == self.me.node {
                heard.note(node, self.me.boot, PROTOCOL_VERSION);
            } else if known.is_none_or(|version| version < PROTOCOL_VERSION)
                && let Some(address) = self.address_of(node)
            {
                match self.greet(address, Expect::Node(node)).await {
                    Ok(Greeted { connection, mut sender, version }) => {
                        heard.note(node, record.boot, version);
                        // It ends the conversation when it has read that nothing follows.
                        sender.finish();
                        let _ = timeout(LAST_WORDS, connection.closed()).await;
                        connection.close(close_code::DONE, "");
                    }
                    Err(error) => {
                        tracing::debug!(%node, "it was not heard what it speaks: {error}")
                    }
                }
            }
        }
    }

    /// Says in the log what all speak, if that is more than it says already.
    async fn raise(&self, state: &ClusterState) {
        let heard = self.store.heard();
        let all = state.coordinators.iter().map(|(node, _)| heard.of(state, node));
        let all: Option<Vec<u16>> = all.collect();
        let Some(to) = all.and_then(|all| all.into_iter().min()) else { return };
        if to <= state.versions.log() {
            return;
        }
        let raise = VersionCommand::Raise { to, heard: starts(state).1.into_iter().collect() };
        match self.store.propose(Change::Version(raise)).await {
            Ok(_) => tracing::info!("all coordinators speak protocol version {to} from now on"),
            Err(error) => tracing::info!("protocol version {to} has to wait: {error}"),
        }
    }
}

/// What the version of the log depends on: itself, and each coordinator's start.
fn starts(state: &ClusterState) -> (u16, Vec<(NodeId, u64)>) {
    let all = state.coordinators.iter().map(|(node, record)| (node, record.boot));
    (state.versions.log(), all.collect())
}
