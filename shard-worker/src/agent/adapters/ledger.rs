//! ○ What this worker's shards have of the adapters that there should be, what is being read, and when what
//! failed is tried again.
//!
//! ```text
//! want, begin, end, gone ─► Ledger ─► next(now): Read, Unload
//!            read, may_take, done, unloaded ─┘ └─► said: what the coordinators are told
//! ```
//!
//! **Bytes** are counted from the moment at which they are to be read until the model has let them go: also
//! those of an adapter that waits for its last answer, and those of a shard that is being stopped.
//! **Reads** may hang, as a mount does whose server is gone. After `READ_DEADLINE` one is reported as
//! failed; it keeps its place among `READS_MAX` until it ends, and is taken then if it is still wanted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use shoal_protocol::adapters::{AdapterSpec, HeldAdapters, WantedAdapters};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{AdapterId, DeploymentName};
use shoal_protocol::units::{Bytes, Instant};

use super::tries::{Failed, Now};
use crate::agent::lifecycle::ShardKey;

/// How long reading may take until it is said to have failed. It is as long as a coordinator waits for all
/// workers to load an adapter: what is only slow still comes, and is taken when it is there.
pub const READ_DEADLINE: Duration = Duration::from_secs(60);

/// Reads at once, with those that hang: each is a thread, and a disk has as much from a few as from many.
pub const READS_MAX: usize = 4;

/// What tells two adapters apart, whatever their numbers: a state that was restored gives some again.
pub type Fingerprint = [u8; 32];

/// The number of one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReadId(u64);

/// An adapter that lies in a model, or may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kept {
    fingerprint: Fingerprint,
    bytes: Bytes,
}

/// Adapters by number.
type Shelf = BTreeMap<AdapterId, Kept>;

/// A shard that runs.
#[derive(Debug)]
struct Running {
    deployment: DeploymentName,
    /// Weights, cache and the rest.
    memory: Bytes,
    held: Shelf,
    failed: BTreeMap<AdapterId, Failed>,
    /// What may lie in its model: from a layout before, or just handed over.
    left: Shelf,
    /// Those of which nothing is said: they go behind their last sequence, or the shard stops.
    silent: Shelf,
}

/// A shard that is being stopped or has stopped. Its model may serve the replica's next layout, with all
/// that lies in it.
#[derive(Debug)]
struct Stopped {
    memory: Bytes,
    shelf: Shelf,
}

/// A read, and what follows it.
#[derive(Debug)]
struct Read {
    key: ShardKey,
    spec: AdapterSpec,
    since: Instant,
    /// What it was found to take.
    takes: Bytes,
    /// Whether it has been handed to the shard.
    handed: bool,
    /// Whether it was said to have failed already.
    late: bool,
}

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Read it for this shard, and hand it over.
    Read(ReadId, ShardKey, AdapterSpec),
    /// Let it go behind the last sequence that uses it.
    Unload(ShardKey, AdapterId),
}

/// Why a shard has not got an adapter.
#[derive(Debug)]
pub enum NotLoaded {
    /// The shard has ended meanwhile, or it is not wanted any more: that says nothing of the adapter.
    Moot,
    /// It cannot be had.
    Refused(WireError),
}

/// See the module.
#[derive(Debug)]
pub struct Ledger {
    budget: Bytes,
    wanted: WantedAdapters,
    shards: BTreeMap<ShardKey, Running>,
    stopped: BTreeMap<ShardKey, Stopped>,
    reads: BTreeMap<ReadId, Read>,
    reads_begun: u64,
}

impl Ledger {
    /// Of a worker that may hold so much, and has nothing.
    pub fn new(budget: Bytes) -> Self {
        Self {
            budget,
            wanted: WantedAdapters::default(),
            shards: BTreeMap::new(),
            stopped: BTreeMap::new(),
            reads: BTreeMap::new(),
            reads_begun: 0,
        }
    }

    /// A coordinator says what there should be; their copies of the state are not equally new. What must
    /// not be begun with any more, at which shards.
    pub fn want(&mut self, wanted: WantedAdapters) -> Vec<(ShardKey, AdapterId)> {
        if wanted.revision > self.wanted.revision {
            self.wanted = wanted;
            for shard in self.shards.values_mut() {
                let wanted = self.wanted.of(&shard.deployment);
                shard.failed.retain(|id, _| wanted.iter().any(|spec| spec.id == *id));
                // Somebody has changed something, perhaps what was wrong.
                shard.failed.values_mut().for_each(|failed| failed.next.at = Instant::default());
            }
        }
        let mut away = Vec::new();
        for (key, shard) in &self.shards {
            let wanted = self.wanted.of(&shard.deployment);
            let gone = shard.held.iter().filter(|(id, kept)| !is_in(wanted, **id, kept));
            away.extend(gone.map(|(id, _)| (*key, *id)));
        }
        away
    }

    /// A shard runs: with the model that the shard `heir_of` left, or with one that was just loaded.
    pub fn begin(
        &mut self,
        key: ShardKey,
        (deployment, memory): (DeploymentName, Bytes),
        heir_of: Option<ShardKey>,
    ) {
        let from = heir_of.and_then(|from| self.stopped.remove(&from));
        let left = from.map(|from| from.shelf).unwrap_or_default();
        let (held, failed, silent) = Default::default();
        let running = Running { deployment, memory, held, failed, left, silent };
        self.shards.insert(key, running);
    }

    /// A shard is being stopped.
    pub fn end(&mut self, key: ShardKey) {
        let Some(shard) = self.shards.remove(&key) else { return };
        let Running { memory, held, left, silent, .. } = shard;
        let shelf = held.into_iter().chain(left).chain(silent).collect();
        self.stopped.insert(key, Stopped { memory, shelf });
    }

    /// The model of a shard that has stopped is gone, with all that lay in it.
    pub fn gone(&mut self, key: ShardKey) {
        if self.stopped.remove(&key).is_some() {
            self.there_is_room();
        }
    }

    /// What is to be done next. It counts as begun.
    pub fn next(&mut self, now: Now) -> Option<Next> {
        self.note_late(now);
        if let Some((key, id)) = self.unwanted() {
            let shard = self.shards.get_mut(&key)?;
            let held = shard.held.remove(&id);
            if let Some(kept) = shard.left.remove(&id).or(held) {
                shard.silent.insert(id, kept);
            }
            return Some(Next::Unload(key, id));
        }
        while let Some((key, spec)) = self.due(now) {
            match self.in_the_way(&spec, now) {
                Some(error) => self.failed(now, key, spec.id, error),
                None if self.reads.len() >= READS_MAX => return None,
                None => return Some(self.read(now, key, spec)),
            }
        }
        None
    }

    fn read(&mut self, now: Now, key: ShardKey, spec: AdapterSpec) -> Next {
        let id = ReadId(self.reads_begun);
        self.reads_begun += 1;
        let (takes, handed, late) = Default::default();
        let read = Read { key, spec: spec.clone(), since: now.at, takes, handed, late };
        self.reads.insert(id, read);
        Next::Read(id, key, spec)
    }

    /// When to ask `next` again, should nothing happen before.
    pub fn wake_at(&self) -> Option<Instant> {
        let late = self.reads.values().filter(|read| !read.late);
        let late = late.map(|read| read.since + READ_DEADLINE).min();
        // Where there is no place the end of a read is waited for, and it wakes whoever asks.
        if late.is_some() && self.reads.len() >= READS_MAX {
            return late;
        }
        let tries = self.shards.iter().flat_map(|(key, shard)| {
            let waits = |id: &AdapterId| !self.is_read(*key, *id) && !shard.silent.contains_key(id);
            let open = shard.failed.iter().filter(move |(id, _)| waits(id));
            open.map(|(_, failed)| failed.next.at)
        });
        late.into_iter().chain(tries).min()
    }

    /// A read has found how much it would hold; whether there is room. It is kept for it.
    pub fn reserve(&mut self, read: ReadId, takes: Bytes) -> Result<(), NotLoaded> {
        let Some(Read { key, spec, .. }) = self.reads.get(&read) else {
            return Err(NotLoaded::Moot);
        };
        if !self.is_wanted(*key, spec) {
            return Err(NotLoaded::Moot);
        }
        let (used, leaving) = self.used_beside(read, *key, spec.id);
        if used + takes > self.budget {
            let waiting = match leaving {
                Bytes(0) => String::new(),
                leaving => format!(
                    " ({leaving} of it by adapters that are unloaded and wait for their last answer)"
                ),
            };
            let words = format!(
                "adapter `{}` takes {takes} here, and {used} of this worker's {} are in use{waiting}; \
                 unload another one, or give the worker more with --memory",
                spec.name, self.budget
            );
            return Err(NotLoaded::Refused(WireError::new(ErrorCode::DoesNotFit, words)));
        }
        if let Some(read) = self.reads.get_mut(&read) {
            read.takes = takes;
        }
        Ok(())
    }

    /// A read has ended; whether the shard is to have it. From then on it may lie in its model.
    pub fn may_take(&mut self, read: ReadId) -> bool {
        let Some(Read { key, spec, takes, .. }) = self.reads.get(&read) else { return false };
        let (key, id) = (*key, spec.id);
        let kept = Kept { fingerprint: spec.fingerprint, bytes: *takes };
        if !self.is_wanted(key, spec) {
            return false;
        }
        let Some(shard) = self.shards.get_mut(&key) else { return false };
        shard.left.insert(id, kept);
        if let Some(read) = self.reads.get_mut(&read) {
            read.handed = true;
        }
        true
    }

    /// A read has ended, and what followed it.
    pub fn done(&mut self, now: Now, read: ReadId, outcome: Result<(), NotLoaded>) {
        let Some(Read { key, spec, handed, takes, .. }) = self.reads.remove(&read) else { return };
        let Some(shard) = self.shards.get_mut(&key) else { return };
        let (id, fingerprint) = (spec.id, spec.fingerprint);
        let kept = Kept { fingerprint, bytes: takes };
        match outcome {
            Ok(()) => {
                tracing::info!("{id} is loaded at {key}: {takes}");
                shard.left.remove(&id);
                shard.failed.remove(&id);
                shard.held.insert(id, kept);
            }
            // Its shard has stopped under it, and what becomes of it is not known.
            Err(NotLoaded::Moot) if handed => {
                shard.left.remove(&id);
                shard.silent.insert(id, kept);
            }
            Err(NotLoaded::Moot) => {}
            Err(NotLoaded::Refused(error)) => {
                if handed {
                    shard.left.remove(&id);
                }
                self.failed(now, key, id, error);
            }
        }
    }

    /// A shard has let an adapter go.
    pub fn unloaded(&mut self, key: ShardKey, id: AdapterId) {
        if let Some(shard) = self.shards.get_mut(&key) {
            shard.silent.remove(&id);
            self.there_is_room();
        }
    }

    /// What coordinators are told.
    pub fn said(&self) -> Vec<HeldAdapters> {
        if self.wanted.revision == 0 {
            return Vec::new();
        }
        let of = |(key, shard): (&ShardKey, &Running)| HeldAdapters {
            replica: key.replica,
            generation: key.generation,
            held: shard.held.iter().map(|(id, kept)| (*id, kept.fingerprint)).collect(),
            failed: shard.failed.iter().map(|(id, failed)| (*id, failed.said())).collect(),
        };
        self.shards.iter().map(of).collect()
    }

    /// Reads that take too long.
    fn note_late(&mut self, now: Now) {
        let late = |read: &Read| !read.late && now.at.since(read.since) >= READ_DEADLINE;
        let late: Vec<ReadId> =
            self.reads.iter().filter(|(_, read)| late(read)).map(|(id, _)| *id).collect();
        for id in late {
            let Some(read) = self.reads.get_mut(&id) else { continue };
            read.late = true;
            let taken = now.at.since(read.since).as_secs();
            let words = match read.handed {
                true => format!("the shard has not taken it for {taken} s"),
                false => format!(
                    "reading {} has taken {taken} s and goes on: is its disk or its mount away? It is \
                     taken as soon as it has been read",
                    read.spec.path
                ),
            };
            let (key, adapter) = (read.key, read.spec.id);
            self.failed(now, key, adapter, WireError::new(ErrorCode::DeadlineExceeded, words));
        }
    }

    /// An adapter that is to go.
    fn unwanted(&self) -> Option<(ShardKey, AdapterId)> {
        self.shards.iter().find_map(|(key, shard)| {
            let wanted = self.wanted.of(&shard.deployment);
            let mut here = shard.held.iter().chain(&shard.left);
            // One that is just being handed over must be there first.
            let goes = |(id, kept): &(&AdapterId, &Kept)| {
                !is_in(wanted, **id, kept) && !self.is_read(*key, **id)
            };
            here.find(goes).map(|(id, _)| (*key, *id))
        })
    }

    /// An adapter that is to be read now: what was never tried before what has failed.
    fn due(&self, now: Now) -> Option<(ShardKey, AdapterSpec)> {
        let all = self.shards.iter().flat_map(|(key, shard)| {
            let wanted = self.wanted.of(&shard.deployment).iter();
            wanted.filter_map(move |spec| {
                let there =
                    shard.held.contains_key(&spec.id) || shard.silent.contains_key(&spec.id);
                let failed = shard.failed.get(&spec.id);
                let early = failed.is_some_and(|failed| now.at < failed.next.at);
                let due = !there && !early && !self.is_read(*key, spec.id);
                due.then(|| (failed.map_or(0, |failed| failed.times), *key, spec))
            })
        });
        let first = all.min_by_key(|(times, ..)| *times);
        first.map(|(_, key, spec)| (key, spec.clone()))
    }

    /// Why no read is begun, where others hang.
    fn in_the_way(&self, spec: &AdapterSpec, now: Now) -> Option<WireError> {
        let hang: Vec<&Read> = self.reads.values().filter(|read| read.late).collect();
        let words = match hang.iter().find(|read| read.spec.path == spec.path) {
            Some(read) => format!(
                "reading {} for another try or shard goes on since {} s: nothing else is read there \
                 before that ends; is its disk or its mount away? If it is there again, restart the worker",
                spec.path,
                now.at.since(read.since).as_secs()
            ),
            None if hang.len() >= READS_MAX => {
                let folders: BTreeSet<&str> = hang.iter().map(|read| &*read.spec.path).collect();
                let folders: Vec<&str> = folders.into_iter().collect();
                format!(
                    "{} reads of adapters hang at this worker ({}), and no other is begun until one of \
                     them ends: look at the disks and mounts of these folders; if they stay away, restart \
                     the worker",
                    hang.len(),
                    folders.join(", ")
                )
            }
            None => return None,
        };
        Some(WireError::new(ErrorCode::Overloaded, words))
    }

    fn failed(&mut self, now: Now, key: ShardKey, id: AdapterId, error: WireError) {
        let Some(shard) = self.shards.get_mut(&key) else { return };
        // What nobody wants any more is not tried again.
        if !self.wanted.of(&shard.deployment).iter().any(|spec| spec.id == id) {
            return;
        }
        tracing::warn!("{id} is not loaded at {key}: {error}");
        let failed = Failed::again(shard.failed.get(&id), now, error);
        shard.failed.insert(id, failed);
    }

    /// What did not fit may fit now.
    fn there_is_room(&mut self) {
        for failed in self.shards.values_mut().flat_map(|shard| shard.failed.values_mut()) {
            if failed.error.code == ErrorCode::DoesNotFit {
                failed.next.at = Instant::default();
            }
        }
    }

    fn is_wanted(&self, key: ShardKey, spec: &AdapterSpec) -> bool {
        let shard = self.shards.get(&key);
        shard.is_some_and(|shard| self.wanted.of(&shard.deployment).contains(spec))
    }

    fn is_read(&self, key: ShardKey, id: AdapterId) -> bool {
        self.reads.values().any(|read| read.key == key && read.spec.id == id)
    }

    /// What all but this read of this adapter takes, and how much of it by adapters that are to go.
    fn used_beside(&self, read: ReadId, key: ShardKey, id: AdapterId) -> (Bytes, Bytes) {
        let sum = |shelf: &Shelf| shelf.values().map(|kept| kept.bytes).sum::<Bytes>();
        let (mut used, mut leaving) = (Bytes(0), Bytes(0));
        for (at, shard) in &self.shards {
            // It takes the place of what may be there of it already.
            let here = |(left, _): &(&AdapterId, &Kept)| (*at, **left) != (key, id);
            let left: Bytes = shard.left.iter().filter(here).map(|(_, kept)| kept.bytes).sum();
            used = used + shard.memory + sum(&shard.held) + left + sum(&shard.silent);
            leaving = leaving + sum(&shard.silent);
        }
        for stopped in self.stopped.values() {
            used = used + stopped.memory + sum(&stopped.shelf);
        }
        let others =
            self.reads.iter().filter(|(other, other_read)| **other != read && !other_read.handed);
        (used + others.map(|(_, read)| read.takes).sum(), leaving)
    }
}

/// Whether this very adapter is among those that there should be.
fn is_in(wanted: &[AdapterSpec], id: AdapterId, kept: &Kept) -> bool {
    wanted.iter().any(|spec| spec.id == id && spec.fingerprint == kept.fingerprint)
}

#[cfg(test)]
#[path = "ledger_test.rs"]
mod tests;
