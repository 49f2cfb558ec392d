//! ● Workers and their certificates: whom they are told to believe, what they say of it, and new ones.

use std::collections::BTreeMap;
use std::time::SystemTime;

use shoal_protocol::id::NodeId;
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_protocol::trust::Trust;

use super::Agents;
use crate::control::registry::Worker;
use crate::control::rotation::step::SeenWorker;
use crate::control::state::KeyFingerprint;

impl Agents {
    /// Tells all workers, those that are connected and those that come, whom to believe, and whether this
    /// coordinator signs.
    pub fn set_trust(&self, trust: Trust, signs: bool) {
        let told = (trust.revision > 0).then(|| (trust.for_workers(), signs));
        let mut registry = self.lock();
        if registry.trust != told {
            registry.trust = told;
            registry.tell_trust(|_| true);
        }
    }

    /// Tells it again to those that have not come along.
    pub fn remind(&self) {
        let registry = self.lock();
        let Some((trust, _)) = &registry.trust else { return };
        let (all, signing) = (trust.fingerprints(), trust.signing());
        registry.tell_trust(|worker| {
            worker.shows != signing || !all.iter().all(|ca| worker.trusts.contains(ca))
        });
    }

    /// What the workers said of their certificates.
    pub fn certificates(&self) -> BTreeMap<NodeId, SeenWorker> {
        let of = |worker: &Worker| SeenWorker {
            connected: worker.link.is_some(),
            trusts: worker.trusts.clone(),
            shows: worker.shows,
        };
        self.lock().workers.iter().map(|(node, worker)| (*node, of(worker))).collect()
    }

    /// A new certificate for the key that is on record, and for no other.
    pub(super) fn renew(&self, node: NodeId, csr: &[u8]) -> Result<Vec<u8>, String> {
        let key = CertificateAuthority::key_of_request(csr).map_err(|error| error.to_string())?;
        let recorded = self.store.state().nodes.get(node).map(|node| node.key);
        if recorded != Some(KeyFingerprint(key)) {
            return Err("it has another key on record".into());
        }
        let ca = self.authority.required().map_err(|error| error.to_string())?;
        ca.issue(csr, node, SystemTime::now()).map_err(|error| error.to_string())
    }
}
