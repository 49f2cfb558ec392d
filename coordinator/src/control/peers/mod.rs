//! ● Coordinator ↔ coordinator: messages of the log, who is who, and the CAs' keys for those that vote.
//!
//! ```text
//! outbox ─► carrier (one per peer): connect ─► Hello ─► Welcome ─► messages ══shoal-raft══► serve ─► the log's thread
//! ```
//!
//! Each direction has a connection of its own, which its sender dials. A hello is where an old backup is
//! found out: a start number that is behind the one on record is refused, and the process that shows it
//! ends with reason and advice.

mod carrier;
mod keys;
mod outbox;
mod presence;
mod serve;
mod versions;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shoal_protocol::control::CoordinatorAddress;
use shoal_protocol::id::{Incarnation, NodeId};
use shoal_protocol::peer::PeerHello;
use shoal_protocol::quic::Endpoint;
use shoal_protocol::version::VersionRange;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

pub use outbox::Outboxes;

use super::authority::Authority;
use super::store::ControlStore;
use super::store::raft::NetworkEvent;
use crate::seldom::Seldom;

/// Coordinators that are remembered at once: those of the state, and a joiner or two.
const ADDRESSES_MAX: usize = 64;

/// What a coordinator tells the others of itself.
#[derive(Clone, Debug)]
pub struct Myself {
    /// Its identity.
    pub node: NodeId,
    /// Its start number.
    pub incarnation: Incarnation,
    /// Drawn at its start.
    pub boot: u64,
    /// Where it takes the cluster's conversations, as others reach it.
    pub cluster: SocketAddr,
    /// The version of its binary.
    pub build: String,
}

/// The other coordinators. Cheap to clone.
#[derive(Clone)]
pub struct Peers {
    me: Arc<Myself>,
    endpoint: Endpoint,
    store: ControlStore,
    network: mpsc::Sender<NetworkEvent>,
    outboxes: Outboxes,
    authority: Authority,
    /// Where coordinators have been seen, which is newer than what the state said then.
    seen: Arc<Mutex<BTreeMap<NodeId, Seen>>>,
    /// Whether another coordinator has welcomed this start. Until then nothing of the log is listened to:
    /// an old backup would find in it what it has forgotten that it promised.
    welcomed: Arc<AtomicBool>,
    /// Why this process must end, once another coordinator has said so, or none says anything else.
    ghost: Arc<watch::Sender<Option<Doom>>>,
    /// Where others may be, for one whose state does not say it yet.
    seeds: Arc<[SocketAddr]>,
    /// What is refused several times a second is not said so often.
    refused: Arc<Seldom>,
    /// Counts how often another coordinator's certificate was not believed, or this one's.
    distrust: Arc<watch::Sender<u64>>,
}

/// Why a coordinator must end, and would have to at its next start.
#[derive(Clone, Debug, Default)]
pub struct Doom {
    /// In words.
    pub why: String,
    /// Its state would do harm, or is of a node that there is no more: nobody may vote with it again.
    pub condemned: bool,
}

/// Where a coordinator has been seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    address: SocketAddr,
    /// The start that the state knew then.
    known: Option<u64>,
}

impl std::fmt::Debug for Peers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Peers of {}", self.me.node)
    }
}

impl Peers {
    /// Nobody is connected yet.
    pub fn new(
        me: Myself,
        endpoint: Endpoint,
        store: ControlStore,
        network: mpsc::Sender<NetworkEvent>,
        outboxes: Outboxes,
        authority: Authority,
    ) -> Self {
        Self {
            me: Arc::new(me),
            endpoint,
            store,
            network,
            outboxes,
            authority,
            seen: Arc::default(),
            welcomed: Arc::default(),
            ghost: Arc::new(watch::Sender::new(None)),
            seeds: Arc::default(),
            refused: Arc::default(),
            distrust: Arc::new(watch::Sender::new(0)),
        }
    }

    /// Others may be there, too, for one whose state does not say it yet.
    pub fn seeking(self, seeds: Vec<SocketAddr>) -> Self {
        Self { seeds: seeds.into(), ..self }
    }

    /// Carries messages until `stop` becomes true.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        let mut tasks = JoinSet::new();
        let mut carriers = JoinSet::new();
        let mut carried: BTreeMap<u64, tokio::task::Id> = BTreeMap::new();
        tasks.spawn(self.clone().announce());
        tasks.spawn(self.clone().present());
        tasks.spawn(self.clone().agree());
        tasks.spawn(self.clone().look_after_all());
        for seed in self.seeds.iter() {
            tasks.spawn(self.clone().find(*seed));
            tasks.spawn(self.clone().look_at(*seed));
        }
        loop {
            for (id, outbox) in self.outboxes.all() {
                let carry = || carriers.spawn(self.clone().carry(id, outbox)).id();
                carried.entry(id).or_insert_with(carry);
            }
            tokio::select! {
                () = self.outboxes.news() => {}
                Some(ended) = tasks.join_next() => if let Err(error) = ended {
                    tracing::error!("a part of the talk with other coordinators failed: {error}");
                },
                // A carrier never ends by itself. Its messages wait for the next one, which begins at once.
                Some(ended) = carriers.join_next() => if let Err(error) = ended {
                    tracing::error!("what carries messages to a coordinator failed: {error}");
                    carried.retain(|_, carrier| *carrier != error.id());
                },
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }

    /// Resolves when this process must end, and says why.
    pub async fn ghost(&self) -> Doom {
        let mut ghost = self.ghost.subscribe();
        let found = ghost.wait_for(Option::is_some).await;
        // The sender lives as long as this does.
        found.ok().and_then(|why| why.clone()).unwrap_or_default()
    }

    /// This process must end, and its data folder is never to be used again.
    pub fn end(&self, why: String) {
        self.ghost.send_replace(Some(Doom { why, condemned: true }));
    }

    /// This process must end. Its data folder may be right, and what it was started with wrong.
    pub fn leave(&self, why: String) {
        self.ghost.send_replace(Some(Doom { why, condemned: false }));
    }

    /// Fires when another coordinator's certificate was not believed, or this one's.
    pub fn distrust(&self) -> watch::Receiver<u64> {
        self.distrust.subscribe()
    }

    fn note_distrust(&self, distrusted: bool) {
        if distrusted {
            self.distrust.send_modify(|n| *n += 1);
        }
    }

    fn hello(&self) -> PeerHello {
        PeerHello {
            versions: VersionRange::OURS,
            node: self.me.node,
            incarnation: self.me.incarnation,
            boot: self.me.boot,
            cluster: self.me.cluster,
            build: self.me.build.clone(),
        }
    }

    fn address_of(&self, node: NodeId) -> Option<SocketAddr> {
        let record = self.store.state().coordinators.get(node).map(|r| (r.cluster, r.boot));
        latest(self.seen().get(&node).copied(), record)
    }

    fn saw(&self, node: NodeId, address: SocketAddr) {
        let known = self.store.state().coordinators.get(node).map(|record| record.boot);
        let mut seen = self.seen();
        if node != self.me.node && (seen.len() < ADDRESSES_MAX || seen.contains_key(&node)) {
            seen.insert(node, Seen { address, known });
        }
    }

    fn addresses(&self) -> Vec<CoordinatorAddress> {
        let state = self.store.state();
        let known = state.coordinators.iter();
        known.map(|(node, record)| CoordinatorAddress { node, cluster: record.cluster }).collect()
    }

    fn seen(&self) -> MutexGuard<'_, BTreeMap<NodeId, Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where it is: where it was seen, until the state tells of a start that it did not know then. Whoever
/// comes back elsewhere greets one of us, and that one writes it down for the others.
fn latest(seen: Option<Seen>, record: Option<(SocketAddr, u64)>) -> Option<SocketAddr> {
    match (seen, record) {
        (Some(seen), Some((_, boot))) if seen.known == Some(boot) => Some(seen.address),
        (_, Some((address, _))) => Some(address),
        (seen, None) => seen.map(|seen| seen.address),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_came_back_elsewhere_is_found_by_those_that_it_did_not_greet() {
        let [before, after] = [7001, 7002].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let seen = |address, known| Some(Seen { address, known });
        // Known from nowhere else; seen since the state was written; its start in the state is newer.
        assert_eq!(latest(seen(before, None), None), Some(before));
        assert_eq!(latest(seen(after, Some(1)), Some((before, 1))), Some(after));
        assert_eq!(latest(seen(before, Some(1)), Some((after, 2))), Some(after));
        assert_eq!(latest(seen(before, None), Some((after, 2))), Some(after));
        assert_eq!(latest(None, Some((after, 2))), Some(after));
        assert_eq!(latest(None, None), None);
    }
}
