//! The heads of one worker, and what a request brings along to them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shoal_protocol::control::HeadReport;
use shoal_protocol::id::ReplicaId;
use shoal_protocol::prefix::{PrefixReport, Tenant};
use shoal_protocol::trace::TraceMark;

use super::driver::HeadClient;

/// What may come before a request on its stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct Marks {
    /// Where in a trace it stands.
    pub trace: Option<TraceMark>,
    /// Whose it is, where blocks may be shared.
    pub tenant: Option<Tenant>,
}

/// The heads of one worker, by replica: one, or while the replica moves two, the newer one last. Held for
/// one look-up, never over an await.
#[derive(Clone, Debug, Default)]
pub struct Heads(Arc<Mutex<BTreeMap<ReplicaId, Vec<HeadClient>>>>);

impl Heads {
    /// A head of a replica is here now, the newest one.
    pub fn insert(&self, replica: ReplicaId, head: HeadClient) {
        self.lock().entry(replica).or_default().push(head);
    }

    /// A head has gone.
    pub fn remove(&self, replica: ReplicaId, head: &HeadClient) {
        let mut heads = self.lock();
        if let Some(of_replica) = heads.get_mut(&replica) {
            of_replica.retain(|h| !h.is(head));
            if of_replica.is_empty() {
                heads.remove(&replica);
            }
        }
    }

    /// The head that takes requests of a replica: the newest one that is open. Where none is, the newest
    /// one has the words to say so.
    pub fn get(&self, replica: ReplicaId) -> Option<HeadClient> {
        let heads = self.lock();
        let of_replica = heads.get(&replica)?;
        of_replica.iter().rev().find(|head| head.is_open()).or(of_replica.last()).cloned()
    }

    /// The reports of all heads.
    pub fn reports(&self) -> Vec<HeadReport> {
        self.lock().values().flatten().map(HeadClient::report).collect()
    }

    /// What they report of shared blocks.
    pub fn prefixes(&self) -> Vec<PrefixReport> {
        self.lock().values().flatten().map(HeadClient::prefixes).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ReplicaId, Vec<HeadClient>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
