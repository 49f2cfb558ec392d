//! ● Who is there: with each coordinator that says nothing by itself a conversation is held in which nothing
//! is said.
//!
//! A leader hears its followers, and they it, many times a second. Followers do not hear each other, and with an
//! etcd nobody hears anybody: a coordinator that died there would be missed only when it is needed.

use std::collections::BTreeMap;
use std::time::Duration;

use shoal_protocol::id::NodeId;
use shoal_protocol::quic::{Expect, close_code};
use tokio::task::{AbortHandle, JoinSet};

use super::Peers;
use super::carrier::{GreetError, Greeted};

/// How often it is looked whether somebody is silent: several times before that is said (`SILENT_AFTER`).
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How often somebody is asked who has said no: both sides log it.
const REFUSED_AGAIN: Duration = Duration::from_secs(10);

/// Who was heard within this needs no conversation for it: leaders are heard every 50 ms.
const TALKS: Duration = Duration::from_secs(1);

impl Peers {
    /// Looks after every other coordinator of the state, until the store ends.
    pub(super) async fn look_after_all(self) {
        let mut state = self.store.watch();
        let mut looks = JoinSet::new();
        let mut looked_after: BTreeMap<NodeId, AbortHandle> = BTreeMap::new();
        loop {
            let now = state.borrow_and_update().clone();
            let is_member = |node: NodeId| now.coordinators.get(node).is_some();
            self.store.keep_heard(is_member);
            looked_after.retain(|node, look| {
                let stays = is_member(*node) && !look.is_finished();
                if !stays {
                    look.abort();
                }
                stays
            });
            let others = now.coordinators.iter().map(|(node, _)| node);
            for node in others.filter(|node| *node != self.me.node) {
                let look = || looks.spawn(self.clone().look_after(node));
                looked_after.entry(node).or_insert_with(look);
            }
            tokio::select! {
                changed = state.changed() => if changed.is_err() { return },
                // One that failed is begun again.
                Some(_) = looks.join_next() => {}
            }
        }
    }

    async fn look_after(self, node: NodeId) {
        loop {
            let talks = self.store.silence_of(node).is_some_and(|silence| silence < TALKS);
            if let Some(address) = self.address_of(node).filter(|_| !talks) {
                match self.greet(address, Expect::Node(node)).await {
                    Ok(greeted) => self.hold(node, greeted).await,
                    // Whoever says no makes no majority with this one.
                    Err(GreetError::Refused(_) | GreetError::TooOld { .. }) => {
                        tokio::time::sleep(REFUSED_AGAIN).await;
                    }
                    Err(GreetError::Unreachable(_) | GreetError::Late) => {}
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Holds a conversation to its end. That it is there is no proof: a peer that is killed sends no goodbye,
    /// so what counts is what its transport sends to keep it up.
    async fn hold(&self, node: NodeId, greeted: Greeted) {
        let Greeted { connection, sender: _sender, .. } = greeted;
        let mut received = 0;
        loop {
            let now = connection.stats().received_frames;
            if now > received {
                received = now;
                self.store.heard_from(node);
            }
            tokio::select! {
                _ = connection.closed() => break,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
        connection.close(close_code::DONE, "");
    }
}
