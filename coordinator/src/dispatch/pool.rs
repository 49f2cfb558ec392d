//! ● Connections to heads: one for each, shared by all requests, made again when it is lost.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use shoal_protocol::id::NodeId;
use shoal_protocol::quic::{Alpn, ConnectError, Connection, Endpoint, Expect, Pulse, close_code};

/// How long a request waits for a connection to its head. Loopback and LAN need milliseconds; the
/// rest is a peer that is not there.
pub const CONNECT_DEADLINE: Duration = Duration::from_millis(1500);

/// Slots of heads that are gone are dropped when there are this many slots.
const SLOTS_TIDY: usize = 64;

type Slot = Arc<tokio::sync::Mutex<Option<Connection>>>;

/// The connections of one coordinator.
#[derive(Debug)]
pub struct Pool {
    endpoint: Endpoint,
    /// Held for a look-up. The lock of a slot is held while its connection is made, so that many
    /// requests make one.
    slots: Mutex<HashMap<(NodeId, SocketAddr), Slot>>,
}

impl Pool {
    /// No connection yet.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, slots: Mutex::default() }
    }

    /// A live connection to `head` at `address`.
    pub async fn get(&self, head: NodeId, address: SocketAddr) -> Result<Connection, ConnectError> {
        let slot = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            if slots.len() >= SLOTS_TIDY {
                slots.retain(|_, slot| in_use(slot));
            }
            Arc::clone(slots.entry((head, address)).or_default())
        };
        // Includes the wait for others who are connecting: they fail at the same peer.
        let connect = async {
            let mut connection = slot.lock().await;
            if let Some(live) = connection.as_ref().filter(|c| c.close_reason().is_none()) {
                return Ok(live.clone());
            }
            let new = self
                .endpoint
                .connect(address, Expect::Node(head), Alpn::Requests, CONNECT_DEADLINE)
                .await?;
            *connection = Some(new.clone());
            // Whoever is connecting cannot be closed by `keep`, which has then forgotten the slot.
            if !self.is_current(head, address, &slot) {
                new.close(close_code::REFUSED, "this node was removed");
            }
            tokio::spawn(watch_over(head, new.clone()));
            Ok(new)
        };
        tokio::time::timeout(CONNECT_DEADLINE, connect).await.unwrap_or_else(|_| {
            Err(ConnectError::Timeout {
                address,
                expect: head.to_string(),
                deadline: CONNECT_DEADLINE,
            })
        })
    }

    fn is_current(&self, head: NodeId, address: SocketAddr, slot: &Slot) -> bool {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.get(&(head, address)).is_some_and(|current| Arc::ptr_eq(current, slot))
    }

    /// Ends the connections to nodes of which this does not hold.
    pub fn keep(&self, member: impl Fn(NodeId) -> bool) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|(node, _), slot| {
            let stays = member(*node);
            if !stays && let Ok(Some(connection)) = slot.try_lock().as_deref() {
                connection.close(close_code::REFUSED, "this node was removed");
            }
            stays
        });
    }

    /// Ends every connection.
    pub fn close(&self) {
        let slots = std::mem::take(&mut *self.slots.lock().unwrap_or_else(PoisonError::into_inner));
        for slot in slots.into_values() {
            if let Ok(Some(connection)) = slot.try_lock().as_deref() {
                connection.close(close_code::DONE, "the coordinator stops");
            }
        }
    }
}

/// Ends a connection whose head is dead, and with it the answers that wait there. The head beats often
/// while it has streams of ours.
async fn watch_over(head: NodeId, connection: Connection) {
    let pulse = Pulse::default();
    tokio::select! {
        silence = pulse.follow(&connection) => {
            tracing::warn!("{head} is given up: {silence}");
            connection.close(close_code::DONE, "nothing was heard of you");
        }
        _ = connection.closed() => {}
    }
}

/// Somebody is connecting, or the connection lives.
fn in_use(slot: &Slot) -> bool {
    slot.try_lock().map_or(true, |connection| {
        connection.as_ref().is_some_and(|connection| connection.close_reason().is_none())
    })
}
