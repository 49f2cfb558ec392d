//! ○ A coordinator's disk: what is on the platter, and what a lying one still has in its cache.

use raft::prelude::{Entry, HardState, Snapshot};
use shoal_coordinator::control::store::raft::core::{Saved, Write};

use super::bug::Bug;

/// What survives a crash of the process; of the cache nothing survives a power cut.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    /// On the platter.
    durable: Platter,
    /// Writes that the process believes to be on it. Always empty, but for a planted bug.
    cached: Vec<Write>,
    /// Counts the starts of the coordinator.
    pub incarnation: u64,
}

/// The log as it lies there.
#[derive(Clone, Debug, Default)]
pub struct Platter {
    snapshot: Snapshot,
    entries: Vec<Entry>,
    hard: HardState,
}

impl Disk {
    /// A disk with a log on it.
    pub fn with(saved: Saved) -> Self {
        let Saved { hard, snapshot, entries } = saved;
        Self { durable: Platter { snapshot, entries, hard }, ..Self::default() }
    }

    /// A write that has been synced.
    pub fn write(&mut self, write: &Write, bug: Option<Bug>) {
        if bug == Some(Bug::SkipSync) {
            self.cached.push(write.clone());
            return;
        }
        self.durable.write(write, bug);
    }

    /// Whether whoever started now could read it.
    pub fn sound(&self) -> Result<(), String> {
        self.durable.last().map(drop)
    }

    /// The cache goes to the platter.
    pub fn sync(&mut self, bug: Option<Bug>) {
        for write in std::mem::take(&mut self.cached) {
            self.durable.write(&write, bug);
        }
    }

    /// The entries in a snapshot give way to it.
    pub fn compact(&mut self, snapshot: &Snapshot, bug: Option<Bug>) {
        self.sync(bug);
        let mut index = snapshot.get_metadata().index;
        if bug != Some(Bug::LoseSnapshot) {
            self.durable.snapshot = snapshot.clone();
        }
        if bug == Some(Bug::CompactOneTooFar) {
            index += 1;
        }
        self.durable.entries.retain(|entry| entry.index > index);
    }

    /// The power goes.
    pub fn power_cut(&mut self) {
        self.cached.clear();
    }

    /// What a process finds that starts now, or what is wrong with it (as `disk.rs` of the store
    /// finds it).
    pub fn read(&self, bug: Option<Bug>) -> Result<Saved, String> {
        let mut seen = self.durable.clone();
        self.cached.iter().for_each(|write| seen.write(write, bug));
        let last = seen.last()?;
        let begin = seen.snapshot.get_metadata().index;
        let entries: Vec<_> = seen.entries.into_iter().filter(|e| e.index > begin).collect();
        let mut hard = seen.hard;
        if bug == Some(Bug::ForgetVote) {
            hard.vote = 0;
            hard.term = last.1;
        }
        hard.commit = hard.commit.min(last.0);
        Ok(Saved { hard, snapshot: seen.snapshot, entries })
    }
}

impl Platter {
    /// Index and term of the last entry, or what is wrong with the log.
    fn last(&self) -> Result<(u64, u64), String> {
        let meta = self.snapshot.get_metadata();
        let mut last = (meta.index, meta.term);
        for entry in self.entries.iter().filter(|entry| entry.index > meta.index) {
            let (index, term) = (entry.index, entry.term);
            if index != last.0 + 1 {
                return Err(format!("the log jumps from entry {} to {index}", last.0));
            }
            if term < last.1 {
                return Err(format!(
                    "entry {index} is of term {term}, the one before of {}",
                    last.1
                ));
            }
            last = (index, term);
        }
        Ok(last)
    }

    fn write(&mut self, write: &Write, bug: Option<Bug>) {
        if let Some(snapshot) = &write.snapshot {
            self.snapshot = snapshot.clone();
            self.entries.clear();
        }
        if let Some(first) = write.entries.first() {
            let last = write.entries.last().map_or(first.index, |entry| entry.index);
            let keeps =
                |index| index < first.index || bug == Some(Bug::KeepOldTail) && index > last;
            self.entries.retain(|entry| keeps(entry.index));
            self.entries.extend_from_slice(&write.entries);
            self.entries.sort_by_key(|entry| entry.index);
        }
        if let Some(hard) = &write.hard {
            self.hard = hard.clone();
        }
    }
}
