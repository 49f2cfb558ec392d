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
            // What this holds cannot be closed by `keep`, which has then forgotten the slot.
            let close_removed = |connection: &Connection| {
                if !self.is_current(head, address, &slot) {
                    connection.close(close_code::REFUSED, "this node was removed");
                }
            };
            if let Some(live) = connection.as_ref().filter(|c| c.close_reason().is_none()) {
                close_removed(live);
                return Ok(live.clone());
            }
            let new = self
                .endpoint
                .connect(address, Expect::Node(head), Alpn::Requests, CONNECT_DEADLINE)
                .await?;
            *connection = Some(new.clone());
            close_removed(&new);
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

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use shoal_protocol::quic::ca::CertificateAuthority;

    use super::*;

    #[tokio::test]
    async fn a_connection_that_is_looked_up_while_its_worker_is_removed_ends() {
        let now = SystemTime::now();
        let ca = CertificateAuthority::create(now).unwrap();
        let bind = |node, alpns: &[Alpn]| {
            let identity = Arc::new(ca.issue_identity(node, now).unwrap());
            Endpoint::bind(([127, 0, 0, 1], 0).into(), identity, alpns).unwrap()
        };
        let (head, me) = (NodeId::worker(1), NodeId::coordinator(1));
        let worker = bind(head, &[Alpn::Requests]);
        let address = worker.local_address();
        let serve = async move {
            let there = worker.accept().await.unwrap().establish().await.unwrap();
            (worker, there)
        };
        let served = tokio::spawn(serve);
        let pool = Arc::new(Pool::new(bind(me, &[])));
        let first = pool.get(head, address).await.unwrap();
        let _there = served.await.unwrap();
        let slot = Arc::clone(&pool.slots.lock().unwrap()[&(head, address)]);
        let held = slot.lock().await;
        let looks = {
            let pool = Arc::clone(&pool);
            tokio::spawn(async move { pool.get(head, address).await })
        };
        // It waits for the slot, which it has from the map: three hold it, this test among them.
        while Arc::strong_count(&slot) < 3 {
            tokio::task::yield_now().await;
        }
        pool.keep(|_| false);
        drop(held);
        let found = looks.await.unwrap().unwrap();
        assert!(found.close_reason().is_some() && first.close_reason().is_some());
    }
}
