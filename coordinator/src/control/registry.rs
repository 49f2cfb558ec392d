//! ● What a coordinator holds of its workers: plain data, and the way to each that is connected.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use shoal_protocol::adapters::{HeldAdapters, WantedAdapters};
use shoal_protocol::control::{CoordinatorAddress, CoordinatorMessage, Register, Report};
use shoal_protocol::error::WireError;
use shoal_protocol::id::NodeId;
use shoal_protocol::mesh::Facts;
use shoal_protocol::plan::Assignment;
use shoal_protocol::prefix::PrefixReport;
use shoal_protocol::quic::{Connection, Pulse, close_code};
use shoal_protocol::trust::{CaFingerprint, Trust};
use shoal_protocol::version::KNOWS_ADAPTERS;
pub(super) use shoal_protocol::version::KNOWS_TRUST;
use tokio::sync::{mpsc, oneshot};

/// Messages that wait for a worker. Each is complete in itself, so a worker that has not read so
/// many is not slow but stuck.
pub(super) const OUTBOX_MAX: usize = 16;

/// Guards plain data; nothing is awaited under it.
#[derive(Debug)]
pub(super) struct Registry {
    pub workers: BTreeMap<NodeId, Worker>,
    /// What workers are told of where coordinators are.
    pub coordinators: Vec<CoordinatorAddress>,
    /// Whom workers are to believe, and whether this coordinator signs; `None`: the CA of the founding.
    pub trust: Option<(Trust, bool)>,
    /// The adapters that there should be. Revision 0: there never were any, and nobody is told.
    pub adapters: WantedAdapters,
    /// Numbers connections and probes.
    next: u64,
}

impl Registry {
    /// A worker may still be at work for the coordinator before this one, or before this process, and
    /// answers whoever is there when it is done. So numbers begin at the microsecond of the start: no
    /// coordinator gives out one every microsecond.
    pub fn new(now: SystemTime) -> Self {
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let next = u64::try_from(since.as_micros()).unwrap_or(u64::MAX / 2);
        let (coordinators, adapters) = (Vec::new(), WantedAdapters::default());
        Self { workers: BTreeMap::new(), coordinators, trust: None, adapters, next }
    }

    /// Says whom to believe to those workers that are wanted.
    pub fn tell_trust(&self, wanted: impl Fn(&Worker) -> bool) {
        for (node, worker) in self.workers.iter().filter(|(_, worker)| wanted(worker)) {
            worker.tell_trust(*node, &self.trust);
        }
    }

    pub fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

#[derive(Debug)]
pub(super) struct Worker {
    pub register: Register,
    pub report: Report,
    /// What it has said of itself besides.
    pub facts: Facts,
    pub pushed: Option<Vec<Assignment>>,
    /// It says that it was told by a leader with this epoch, later than the one that tried.
    pub outranked: Option<u64>,
    /// No epoch below is any use with it.
    pub floor: u64,
    pub link: Option<Link>,
    /// The CAs that it said that it believes.
    pub trusts: Vec<CaFingerprint>,
    /// The CA of the certificate that it said that it shows.
    pub shows: Option<CaFingerprint>,
    /// What it said that its shards have of adapters.
    pub adapters: Vec<HeldAdapters>,
    /// What its heads said of blocks that are shared.
    pub prefixes: Vec<PrefixReport>,
}

impl Worker {
    /// One that has just registered and has been told nothing.
    pub fn new(register: Register, report: Report, link: Link) -> Self {
        let (trusts, shows, link) = (Vec::new(), None, Some(link));
        let (adapters, prefixes) = (Vec::new(), Vec::new());
        let (facts, pushed, outranked) = (Facts::default(), None, None);
        Self {
            register,
            report,
            facts,
            pushed,
            outranked,
            floor: 0,
            link,
            trusts,
            shows,
            adapters,
            prefixes,
        }
    }

    /// Says whom to believe, to one that is there and understands it.
    pub fn tell_trust(&self, node: NodeId, told: &Option<(Trust, bool)>) {
        if let (Some(link), Some((trust, signs))) = (&self.link, told)
            && self.register.versions.max >= KNOWS_TRUST
        {
            link.send(node, CoordinatorMessage::Trust { trust: trust.clone(), signs: *signs });
        }
    }

    /// Says which adapters there should be, to one that is there and understands it.
    pub fn tell_adapters(&self, node: NodeId, wanted: &WantedAdapters) {
        let Some(link) = &self.link else { return };
        if wanted.revision > 0 && self.register.versions.max >= KNOWS_ADAPTERS {
            link.send(node, CoordinatorMessage::Adapters(wanted.clone()));
        }
    }
}

impl Link {
    /// Puts a message in the outbox; cuts the worker off where that is full.
    pub fn send(&self, node: NodeId, message: CoordinatorMessage) -> bool {
        let sent = self.outbox.try_send(message).is_ok();
        if !sent {
            tracing::warn!(%node, "has not read its last {OUTBOX_MAX} messages: cut off");
            self.connection.close(close_code::PROTOCOL, "you do not read your messages");
        }
        sent
    }
}

#[derive(Debug)]
pub(super) struct Link {
    pub session: u64,
    pub connection: Connection,
    pub pulse: Arc<Pulse>,
    pub outbox: mpsc::Sender<CoordinatorMessage>,
    pub probes: BTreeMap<u64, oneshot::Sender<Result<[u8; 32], WireError>>>,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn numbers_of_two_starts_are_not_the_same() {
        let now = SystemTime::now();
        let mut before = Registry::new(now);
        let given: Vec<_> = (0..1000).map(|_| before.number()).collect();
        let first = Registry::new(now + Duration::from_secs(1)).number();
        assert!(given.iter().all(|number| *number < first));
    }
}
