//! Clients before and during their handshake: how many, from where, and who they turn out to be.
//!
//! A handshake costs memory and signatures before anything is known of the client, so strangers must
//! not be able to take all places. As long as there is room, everybody gets one. Once half are taken,
//! a client must first show that it receives at the address that it sends from (a stateless retry, one
//! round trip), and then no address gets more than its share. Strangers with made-up addresses have
//! at most that half; others have as many places as addresses.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use quinn::VarInt;
use quinn::crypto::rustls::HandshakeData;

use super::alpn::Alpn;
use super::close_code;
use super::connection::{Connection, peer_node};
use super::endpoint::HANDSHAKE_TIMEOUT;
use super::error::AcceptError;

/// The bounds of one socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bounds {
    /// Handshakes at once. A thousand that lead nowhere are gone after `HANDSHAKE_TIMEOUT`, and hold
    /// some tens of MiB until then; a rack that starts at once has fewer.
    all: usize,
    /// Those of addresses that are not proven.
    unproven: usize,
    /// Those of one proven address: the workers of a large machine, all at once.
    of_one_source: usize,
}

const BOUNDS: Bounds = Bounds { all: 1024, unproven: 512, of_one_source: 128 };

/// The handshakes in progress on one socket.
#[derive(Clone, Debug)]
pub(super) struct Handshakes {
    bounds: Bounds,
    counts: Arc<Mutex<Counts>>,
}

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    unproven: usize,
    /// By source; none is 0.
    proven: BTreeMap<IpAddr, usize>,
}

/// What becomes of a client that knocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Door {
    Open,
    /// Let it prove its address and knock again.
    Prove,
    Shut,
}

impl Counts {
    fn door(&self, bounds: Bounds, source: IpAddr, proven: bool) -> Door {
        let of_source = self.proven.get(&source).copied().unwrap_or(0);
        match proven {
            // It costs us nothing to remember, so even a full house says so.
            false if self.all >= bounds.unproven => Door::Prove,
            true if self.all >= bounds.all || of_source >= bounds.of_one_source => Door::Shut,
            false | true => Door::Open,
        }
    }

    fn enter(&mut self, source: IpAddr, proven: bool) {
        self.all += 1;
        match proven {
            true => *self.proven.entry(source).or_default() += 1,
            false => self.unproven += 1,
        }
    }

    fn leave(&mut self, source: IpAddr, proven: bool) {
        self.all -= 1;
        if !proven {
            self.unproven -= 1;
        } else if let Some(count) = self.proven.get_mut(&source) {
            *count -= 1;
            if *count == 0 {
                self.proven.remove(&source);
            }
        }
    }
}

impl Default for Handshakes {
    fn default() -> Self {
        Self { bounds: BOUNDS, counts: Arc::default() }
    }
}

impl Handshakes {
    /// Lets a client in, or answers it.
    pub fn admit(&self, incoming: quinn::Incoming) -> Option<Accepting> {
        let source = source_of(incoming.remote_address().ip());
        let proven = incoming.remote_address_validated();
        let mut counts = self.lock();
        let door = counts.door(self.bounds, source, proven);
        if door == Door::Open {
            counts.enter(source, proven);
            let place = Place { handshakes: self.clone(), source, proven };
            return Some(Accepting { incoming, place });
        }
        drop(counts);
        tracing::debug!(%source, ?door, "many handshakes are in progress");
        match door {
            // It fails for those alone that have proven it already.
            Door::Prove => drop(incoming.retry()),
            Door::Open | Door::Shut => incoming.refuse(),
        }
        None
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // Nothing under the lock panics half-way.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who counts as one: an IPv6 network is its owner's, with all of its 2^64 addresses.
fn source_of(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(ip) => IpAddr::V4(ip),
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64)),
    }
}

/// A handshake's place, given back when it is dropped.
#[derive(Debug)]
struct Place {
    handshakes: Handshakes,
    source: IpAddr,
    proven: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.handshakes.lock().leave(self.source, self.proven);
    }
}

/// A client before its handshake. It has its place until it is established, refused or dropped.
#[derive(Debug)]
pub struct Accepting {
    incoming: quinn::Incoming,
    place: Place,
}

impl Accepting {
    /// Who knocks.
    pub fn remote_address(&self) -> SocketAddr {
        self.incoming.remote_address()
    }

    /// Does the handshake and checks certificate and role against the conversation.
    pub async fn establish(self) -> Result<Connection, AcceptError> {
        let Self { incoming, place: _place } = self;
        let address = incoming.remote_address();
        let failed = |why: String| AcceptError::Handshake { address, why };
        let connecting = incoming.accept().map_err(|error| failed(error.to_string()))?;
        let inner = tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting)
            .await
            .map_err(|_| failed(format!("it took longer than {HANDSHAKE_TIMEOUT:?}")))?
            .map_err(|error| failed(error.to_string()))?;
        let refuse = |error: AcceptError| {
            inner.close(VarInt::from_u32(close_code::REFUSED), b"not allowed");
            error
        };
        let handshake =
            inner.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
        let alpn =
            handshake.and_then(|data| data.protocol).and_then(|name| Alpn::from_bytes(&name));
        // TLS has already refused a client that offers none of our protocols.
        let alpn = alpn.ok_or_else(|| refuse(failed("no protocol was agreed on".to_owned())))?;
        let peer = match peer_node(&inner) {
            Some(Ok(node)) => Some(node),
            Some(Err(source)) => return Err(refuse(AcceptError::NoNode { address, source })),
            None if alpn.without_client_certificate() => None,
            None => return Err(refuse(AcceptError::NoCertificate { address, alpn })),
        };
        if let Some(node) = peer.filter(|node| !alpn.admits(node.role)) {
            return Err(refuse(AcceptError::Role { address, node, alpn }));
        }
        Ok(Connection::new(inner, peer, alpn))
    }

    /// Turns the client away.
    pub fn refuse(self) {
        self.incoming.refuse();
    }
}

#[cfg(test)]
#[path = "accept_test.rs"]
mod accept_test;
