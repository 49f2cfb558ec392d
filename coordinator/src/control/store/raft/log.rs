//! ○ The log as the crate reads it: the entries behind the last compaction, in memory.
//!
//! What is here is on the disk too, or is being written; a write that fails ends the voter, so the
//! two never part.

use std::sync::Arc;

use prost::Message as _;
use raft::prelude::{ConfState, Entry, HardState, Snapshot, SnapshotMetadata};
use raft::storage::{GetEntriesContext, RaftState, Storage};
use raft::{Error, StorageError};

use crate::control::state::{ClusterState, snapshot};

/// The log of one voter.
pub(super) struct Log {
    hard: HardState,
    conf: ConfState,
    /// Where the entries begin: the one before the first.
    begin: (u64, u64),
    entries: Vec<Entry>,
    /// What has been applied, from which a snapshot is made for whoever is too far behind.
    applied: Applied,
}

/// A point of the log, and the state there.
#[derive(Clone)]
pub(super) struct Applied {
    /// The last entry in it.
    pub index: u64,
    /// That entry's term.
    pub term: u64,
    /// The state.
    pub state: Arc<ClusterState>,
}

impl Log {
    /// A log that was found on a disk: what a snapshot has, and the entries behind it.
    pub fn new(hard: HardState, conf: ConfState, applied: Applied, entries: Vec<Entry>) -> Self {
        Self { hard, conf, begin: (applied.index, applied.term), entries, applied }
    }

    /// The configuration as of the last applied entry.
    pub fn conf(&self) -> &ConfState {
        &self.conf
    }

    pub fn set_conf(&mut self, conf: ConfState) {
        self.conf = conf;
    }

    /// Term, vote and commit as they shall be on the disk.
    pub fn hard(&self) -> &HardState {
        &self.hard
    }

    pub fn set_hard(&mut self, hard: HardState) {
        self.hard = hard;
    }

    pub fn commit_to(&mut self, index: u64) {
        self.hard.commit = index;
    }

    pub fn applied(&self) -> &Applied {
        &self.applied
    }

    /// The entries up to `index` have led to this state.
    pub fn set_applied(&mut self, index: u64, state: Arc<ClusterState>) {
        let term = self.term_of(index).unwrap_or(self.applied.term);
        self.applied = Applied { index, term, state };
    }

    /// Everything from here on follows a snapshot.
    pub fn restore(&mut self, meta: &SnapshotMetadata, state: Arc<ClusterState>) {
        self.applied = Applied { index: meta.index, term: meta.term, state };
        self.begin = (meta.index, meta.term);
        self.entries.clear();
        self.conf = meta.get_conf_state().clone();
        self.hard.term = self.hard.term.max(meta.term);
        self.hard.commit = meta.index;
    }

    /// Takes entries; those that they contradict go.
    pub fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        // The crate never overwrites what was compacted, nor leaves a gap.
        let keep = first.index.saturating_sub(self.begin.0 + 1) as usize;
        self.entries.truncate(keep);
        self.entries.extend_from_slice(entries);
    }

    /// Forgets entries up to `index`, all of which have been applied.
    pub fn compact(&mut self, index: u64) {
        let index = index.min(self.applied.index);
        let Some(term) = self.term_of(index) else { return };
        let count = index.saturating_sub(self.begin.0) as usize;
        self.entries.drain(..count.min(self.entries.len()));
        self.begin = (index, term);
    }

    /// Entries that are kept.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    fn last(&self) -> u64 {
        self.begin.0 + self.entries.len() as u64
    }

    fn term_of(&self, index: u64) -> Option<u64> {
        if index == self.begin.0 {
            return Some(self.begin.1);
        }
        if index == self.applied.index && index < self.begin.0 {
            return Some(self.applied.term);
        }
        let at = index.checked_sub(self.begin.0 + 1)? as usize;
        self.entries.get(at).map(|entry| entry.term)
    }
}

impl Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard.clone(), self.conf.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.begin.0 {
            return Err(Error::Store(StorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(Error::Store(StorageError::Unavailable));
        }
        let range = (low - self.begin.0 - 1) as usize..(high - self.begin.0 - 1) as usize;
        let max = max_size.into().unwrap_or(u64::MAX);
        let mut size = 0;
        let within = |entry: &&Entry| {
            let first = size == 0;
            size += entry.encoded_len() as u64;
            // One entry goes whatever its size is.
            first || size <= max
        };
        Ok(self.entries[range].iter().take_while(within).cloned().collect())
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        match self.term_of(index) {
            Some(term) => Ok(term),
            None if index < self.begin.0 => Err(Error::Store(StorageError::Compacted)),
            None => Err(Error::Store(StorageError::Unavailable)),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.begin.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        if self.applied.index < request_index {
            return Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        }
        snapshot_of(&self.applied, &self.conf)
            .map_err(|error| Error::Store(StorageError::Other(Box::new(error))))
    }
}

/// The state at a point of the log, as it travels and as it lies on a disk.
pub(super) fn snapshot_of(
    applied: &Applied,
    conf: &ConfState,
) -> Result<Snapshot, snapshot::SnapshotError> {
    let mut meta =
        SnapshotMetadata { index: applied.index, term: applied.term, ..Default::default() };
    meta.set_conf_state(conf.clone());
    let mut snapshot = Snapshot { data: snapshot::encode(&applied.state)?, ..Default::default() };
    snapshot.set_metadata(meta);
    Ok(snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64) -> Entry {
        Entry { index, term, data: vec![0; 10], ..Default::default() }
    }

    fn log() -> Log {
        let applied = Applied { index: 5, term: 2, state: Arc::default() };
        let mut log = Log::new(HardState::default(), ConfState::default(), applied, Vec::new());
        log.append(&[entry(6, 2), entry(7, 3), entry(8, 3)]);
        log
    }

    fn indices(log: &Log, low: u64, high: u64, max: u64) -> Vec<(u64, u64)> {
        let entries = log.entries(low, high, max, GetEntriesContext::empty(false)).unwrap();
        entries.iter().map(|entry| (entry.index, entry.term)).collect()
    }

    #[test]
    fn entries_are_found_between_compaction_and_end() {
        let mut log = log();
        assert_eq!((log.first_index().unwrap(), log.last_index().unwrap()), (6, 8));
        assert_eq!(indices(&log, 6, 9, u64::MAX), [(6, 2), (7, 3), (8, 3)]);
        assert_eq!(indices(&log, 7, 9, 1), [(7, 3)], "one entry goes whatever its size is");
        assert_eq!(log.term(5).unwrap(), 2);
        assert!(log.term(4).is_err() && log.term(9).is_err());
        assert!(log.entries(5, 7, None, GetEntriesContext::empty(false)).is_err());
        assert!(log.entries(6, 10, None, GetEntriesContext::empty(false)).is_err());

        log.append(&[entry(7, 4)]);
        assert_eq!(indices(&log, 6, 8, u64::MAX), [(6, 2), (7, 4)], "a contradicted tail stays");

        log.set_applied(7, Arc::default());
        log.compact(6);
        assert_eq!((log.first_index().unwrap(), log.len()), (7, 1));
        assert_eq!((log.term(6).unwrap(), log.term(7).unwrap()), (2, 4));
    }

    #[test]
    fn a_snapshot_is_of_what_was_applied() {
        let mut log = log();
        log.set_conf(ConfState { voters: vec![1, 2], ..Default::default() });
        log.set_applied(7, Arc::default());
        assert!(log.snapshot(8, 2).is_err());
        let snapshot = log.snapshot(7, 2).unwrap();
        let meta = snapshot.get_metadata();
        assert_eq!((meta.index, meta.term), (7, 3));
        assert_eq!(meta.get_conf_state().voters, [1, 2]);
        let mut other = self::log();
        other.restore(meta, Arc::default());
        assert_eq!((other.first_index().unwrap(), other.last_index().unwrap()), (8, 7));
    }
}
