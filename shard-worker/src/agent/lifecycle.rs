//! What this worker's shards are and what they should be: Empty → Loading → Linking → Ready →
//! Draining → Empty, for each generation of each replica.
//!
//! Pure. The agent tells it what the coordinator wants (always all of it) and what was observed; it
//! answers with actions. It refuses the past, keeps within the memory budget, and lets a new
//! generation take over weights that are loaded already.
//!
//! ```text
//!            Load             Start              Linked
//!   Waiting ──────► Loading ─────────► Linking ─────────► Ready
//!      │ Adopt: the weights of the        │  Broken          │
//!      │ generation before are kept       └──────► Failed ◄──┘
//!      └──────────────────────────────► Linking
//!   not wanted any more: Stop{Retire}; replaced: Stop{Now}; the memory is free at `Stopped`
//! ```
//!
//! While a replica moves, two of its generations are wanted at once: the one that serves and the next
//! one. A generation that goes while a later one is here already is not replaced but retired: what
//! runs there may finish.

use std::collections::BTreeMap;

use shoal_protocol::control::{ShardCounters, ShardReport, ShardState};
use shoal_protocol::error::WireError;
use shoal_protocol::id::{Generation, ReplicaId};
use shoal_protocol::plan::{Assignment, ShardMemory};
use shoal_protocol::units::Bytes;

pub use super::sameness::memory_of;
use super::sameness::{does_not_fit, is_same_layout, is_stale, same_weights, why_replaced};

/// One shard of this worker: it has at most one for each generation of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardKey {
    /// The replica.
    pub replica: ReplicaId,
    /// Its layout.
    pub generation: Generation,
}

impl ShardKey {
    /// The shard that an assignment describes.
    pub fn of(assignment: &Assignment) -> Self {
        Self { replica: assignment.replica.id, generation: assignment.replica.generation }
    }
}

impl std::fmt::Display for ShardKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.replica, self.generation)
    }
}

/// The number of one load, so that a load may outlive the generation that began it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LoadId(pub u64);

/// What the lifecycle is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// What the coordinator wants: all of it.
    Assigned(Vec<Assignment>),
    /// A load has read so many bytes out of so many.
    Progress(LoadId, Bytes, Bytes),
    /// A load is complete.
    Loaded(LoadId),
    /// A load failed; what it held is free.
    LoadFailed(LoadId, WireError),
    /// Both links of a shard are up, or it needs none.
    Linked(ShardKey),
    /// A shard cannot go on. It keeps its weights until it is stopped.
    Broken(ShardKey, WireError),
    /// A shard has stopped; `kept`: the agent holds its weights for the next generation.
    Stopped {
        /// Which.
        key: ShardKey,
        /// Whether its weights are still there.
        kept: bool,
    },
    /// The process is to end: let everything out.
    Drain,
}

/// How a shard is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// This worker goes: what runs may finish, within the drain deadline; then the weights are dropped.
    Drain,
    /// The whole layout goes, on all its workers: what runs may finish, and what is still on its way to
    /// the head is taken; then the weights are dropped.
    Retire,
    /// At once, and the weights are dropped.
    Now,
    /// At once; the weights are kept for the next generation.
    Keep,
}

/// What the agent is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Read the weights of an assignment.
    Load(LoadId, Assignment),
    /// Give a load up: nobody wants it any more. It still ends with `Loaded` or `LoadFailed`.
    Cancel(LoadId),
    /// Drop what a load has given: nobody wants it any more.
    Discard(LoadId),
    /// Run an assignment with the weights of a load.
    Start(LoadId, Assignment),
    /// Run an assignment with the weights that the stopped shard left.
    Adopt(ShardKey, Assignment),
    /// Drop the weights that the stopped shard left.
    Forget(ShardKey),
    /// Stop a shard that runs or has failed, with words for its streams and its neighbours.
    Stop(ShardKey, Stop, String),
}

/// Where a wanted shard is.
#[derive(Clone, Debug, PartialEq)]
enum Phase {
    /// For the memory, or the weights, of a shard that is being stopped.
    Waiting { adopt: Option<ShardKey> },
    /// Reading weights.
    Loading { load: LoadId, done: Bytes, total: Bytes },
    /// The shard runs; its links are not all up.
    Linking,
    /// The shard runs.
    Ready,
    /// It failed before it ran: it holds nothing.
    NotLoaded(WireError),
    /// It ran and failed: it holds its weights.
    Broken(WireError),
}

#[derive(Clone, Debug)]
struct Slot {
    assignment: Assignment,
    phase: Phase,
}

/// A shard that holds memory and is not wanted any more.
#[derive(Clone, Debug)]
struct Leaving {
    assignment: Assignment,
}

/// All shards of one worker.
#[derive(Debug)]
pub struct Lifecycle {
    budget: Bytes,
    wanted: BTreeMap<ShardKey, Slot>,
    leaving: BTreeMap<ShardKey, Leaving>,
    abandoned: BTreeMap<LoadId, Bytes>,
    /// The newest generation that was ever wanted of each replica: nothing before it comes back.
    newest: BTreeMap<ReplicaId, Generation>,
    /// What the coordinator wants and cannot have: its generation is used up.
    stale: BTreeMap<ShardKey, Assignment>,
    loads: u64,
    draining: bool,
    actions: Vec<Action>,
}

impl Lifecycle {
    /// A worker without shards that may hold `budget` bytes.
    pub fn new(budget: Bytes) -> Self {
        Self {
            budget,
            wanted: BTreeMap::new(),
            leaving: BTreeMap::new(),
            abandoned: BTreeMap::new(),
            newest: BTreeMap::new(),
            stale: BTreeMap::new(),
            loads: 0,
            draining: false,
            actions: Vec::new(),
        }
    }

    /// Takes an event and says what is to be done, in this order.
    pub fn handle(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Assigned(assignments) => self.assign(assignments),
            Event::Progress(load, done, total) => {
                if let Some(slot) = self.loading(load) {
                    slot.phase = Phase::Loading { load, done, total };
                }
            }
            Event::Loaded(load) => self.loaded(load),
            Event::LoadFailed(load, error) => {
                self.abandoned.remove(&load);
                if let Some(slot) = self.loading(load) {
                    slot.phase = Phase::NotLoaded(error);
                }
            }
            Event::Linked(key) => {
                if let Some(slot) = self.slot(key)
                    && slot.phase == Phase::Linking
                {
                    slot.phase = Phase::Ready;
                }
            }
            Event::Broken(key, error) => {
                if let Some(slot) = self.slot(key)
                    && matches!(slot.phase, Phase::Linking | Phase::Ready)
                {
                    slot.phase = Phase::Broken(error);
                }
            }
            Event::Stopped { key, kept } => self.stopped(key, kept),
            Event::Drain => {
                self.draining = true;
                self.assign(Vec::new());
            }
        }
        self.begin_waiting();
        std::mem::take(&mut self.actions)
    }

    /// Whether nothing runs and nothing is being let go.
    pub fn is_empty(&self) -> bool {
        self.wanted.is_empty() && self.leaving.is_empty() && self.abandoned.is_empty()
    }

    /// Every shard with its state; `counters` knows those that run.
    ///
    /// A refused assignment is a line of its own, under the newest generation that is known here: the
    /// coordinator must plan one above it. A shard that has that generation is not what is wanted, so
    /// the refusal stands in its place.
    pub fn report(&self, mut counters: impl FnMut(ShardKey) -> ShardCounters) -> Vec<ShardReport> {
        let mut line = |assignment: &Assignment, state| ShardReport {
            replica: assignment.replica.id,
            generation: assignment.replica.generation,
            stage: assignment.stage,
            state,
            memory: memory_of(assignment),
            counters: counters(ShardKey::of(assignment)),
        };
        let leaving = self.leaving.values().map(|l| (&l.assignment, ShardState::Draining));
        let is_newest = |key: &ShardKey| self.newest.get(&key.replica) == Some(&key.generation);
        let refused = |key: &ShardKey| {
            is_newest(key) && self.stale.keys().any(|stale| stale.replica == key.replica)
        };
        let wanted = self.wanted.iter().filter(|(key, _)| !refused(key));
        let wanted = wanted.map(|(_, slot)| (&slot.assignment, slot.state()));
        let mut lines: Vec<_> =
            leaving.chain(wanted).map(|(assignment, state)| line(assignment, state)).collect();
        lines.extend(self.stale.iter().map(|(told, assignment)| {
            let newest = self.newest.get(&told.replica).copied().unwrap_or_default();
            let state = ShardState::Failed(is_stale(*told, newest));
            match self.wanted.get(&ShardKey { generation: newest, ..*told }) {
                Some(slot) => ShardReport { generation: newest, ..line(&slot.assignment, state) },
                None => {
                    let memory = ShardMemory::default();
                    ShardReport { generation: newest, memory, ..line(assignment, state) }
                }
            }
        }));
        lines
    }

    fn assign(&mut self, assignments: Vec<Assignment>) {
        // By replica, the older generation first.
        let mut assignments: BTreeMap<ShardKey, Assignment> =
            assignments.into_iter().map(|a| (ShardKey::of(&a), a)).collect();
        let stop = if self.draining { Stop::Drain } else { Stop::Retire };
        if self.draining {
            assignments.clear();
        }
        self.stale.clear();
        // What the past wants ends nothing: what runs stays until there is a layout after it.
        let past: Vec<ReplicaId> = assignments
            .iter()
            .filter(|(key, assignment)| self.is_past(**key, assignment))
            .map(|(key, _)| key.replica)
            .collect();
        let wanted = |key: &ShardKey| assignments.contains_key(key) || past.contains(&key.replica);
        let gone: Vec<ShardKey> = self.wanted.keys().copied().filter(|key| !wanted(key)).collect();
        let heirs: Vec<ShardKey> =
            gone.iter().filter_map(|key| self.heir(*key, &assignments)).collect();
        for key in gone {
            // Whatever is replaced is let go when its heir takes its weights.
            if heirs.iter().any(|heir| heir.replica == key.replica) {
                continue;
            }
            if let Some(slot) = self.wanted.remove(&key) {
                let why = format!("{key} is not wanted on this worker any more");
                self.let_go(slot, stop, why);
            }
        }
        for (key, assignment) in assignments {
            self.take(key, assignment, heirs.contains(&key));
        }
    }

    /// The new generation that takes the place of one that is gone: the first that was not here before.
    /// Where a later one is here already there is none, because it was made to take over.
    fn heir(&self, gone: ShardKey, all: &BTreeMap<ShardKey, Assignment>) -> Option<ShardKey> {
        let of_replica = |key: &&ShardKey| key.replica == gone.replica;
        let newest = self.newest.get(&gone.replica).copied();
        let here = all.keys().filter(of_replica).any(|key| self.wanted.contains_key(key));
        let new = |key: &&ShardKey| newest.is_none_or(|newest| key.generation > newest);
        all.keys().filter(of_replica).find(new).copied().filter(|_| !here)
    }

    /// Whether an assignment is of the past, or a second layout under a number that is taken: the
    /// coordinator's data is older than what this worker knows.
    fn is_past(&self, key: ShardKey, assignment: &Assignment) -> bool {
        let newest = self.newest.get(&key.replica).copied();
        match self.wanted.get(&key) {
            // What we are already. A neighbour that has started again has another address, which
            // its links have told us; that asks for a new generation, not for this one again.
            Some(slot) => !is_same_layout(&slot.assignment, assignment),
            // The newest one may have been withdrawn and be wanted again, as after a coordinator's
            // restart.
            None => newest.is_some_and(|newest| key.generation < newest),
        }
    }

    fn take(&mut self, key: ShardKey, assignment: Assignment, replaces: bool) {
        if self.is_past(key, &assignment) {
            self.stale.insert(key, assignment);
        } else if !self.wanted.contains_key(&key) {
            let newest = self.newest.entry(key.replica).or_default();
            *newest = key.generation.max(*newest);
            self.begin(key, assignment, replaces);
        }
    }

    /// Begins a generation; in the place of those that are gone, if it `replaces` them.
    fn begin(&mut self, key: ShardKey, assignment: Assignment, replaces: bool) {
        let mut phase = Phase::Waiting { adopt: None };
        let old: Vec<ShardKey> = match replaces {
            true => self.wanted.keys().copied().filter(|k| k.replica == key.replica).collect(),
            false => Vec::new(),
        };
        // The newest of them has the weights that are worth keeping.
        for (behind, old) in old.into_iter().rev().enumerate() {
            let Some(old) = self.wanted.remove(&old) else { continue };
            let same = behind == 0 && same_weights(&old.assignment, &assignment);
            let (from, why) = (old.key(), why_replaced(&old.assignment, &assignment));
            match old.phase {
                // The load goes on, for the new generation.
                Phase::Loading { .. } if same => phase = old.phase,
                Phase::Waiting { adopt } if same => phase = Phase::Waiting { adopt },
                _ => {
                    let keep = same && old.runs();
                    self.let_go(old, if same { Stop::Keep } else { Stop::Now }, why);
                    if keep {
                        phase = Phase::Waiting { adopt: Some(from) };
                    }
                }
            }
        }
        self.wanted.insert(key, Slot { assignment, phase });
    }

    /// Stops what is not wanted any more.
    fn let_go(&mut self, slot: Slot, stop: Stop, why: String) {
        let key = slot.key();
        match slot.phase {
            // Weights that were kept for it are forgotten once their shard has stopped.
            Phase::Waiting { .. } | Phase::NotLoaded(_) => {}
            Phase::Loading { load, .. } => {
                self.actions.push(Action::Cancel(load));
                self.abandoned.insert(load, memory_of(&slot.assignment).total());
            }
            Phase::Linking | Phase::Ready | Phase::Broken(_) => {
                self.actions.push(Action::Stop(key, stop, why));
                self.leaving.insert(key, Leaving { assignment: slot.assignment });
            }
        }
    }

    fn loaded(&mut self, load: LoadId) {
        if self.abandoned.remove(&load).is_some() {
            self.actions.push(Action::Discard(load));
        } else if let Some(slot) = self.loading(load) {
            slot.phase = Phase::Linking;
            let assignment = slot.assignment.clone();
            self.actions.push(Action::Start(load, assignment));
        }
    }

    fn stopped(&mut self, key: ShardKey, kept: bool) {
        self.leaving.remove(&key);
        let heir =
            self.wanted.values_mut().find(|slot| slot.phase == Phase::Waiting { adopt: Some(key) });
        match (heir, kept) {
            (Some(slot), true) => {
                slot.phase = Phase::Linking;
                self.actions.push(Action::Adopt(key, slot.assignment.clone()));
            }
            (Some(slot), false) => slot.phase = Phase::Waiting { adopt: None },
            (None, true) => self.actions.push(Action::Forget(key)),
            (None, false) => {}
        }
    }

    /// Starts the loads for which there is memory; refuses those for which there never will be.
    fn begin_waiting(&mut self) {
        let waiting: Vec<ShardKey> = self
            .wanted
            .iter()
            .filter(|(_, slot)| slot.phase == Phase::Waiting { adopt: None })
            // The same shard may still be on its way out.
            .filter(|(key, _)| !self.leaving.contains_key(key))
            .map(|(key, _)| *key)
            .collect();
        for key in waiting {
            let leaving: Bytes =
                self.leaving.values().map(|l| memory_of(&l.assignment).total()).sum();
            let leaving = leaving + self.abandoned.values().copied().sum();
            let held: Bytes = self.wanted.values().map(Slot::holds).sum();
            let Some(slot) = self.wanted.get_mut(&key) else { continue };
            let needs = memory_of(&slot.assignment);
            if needs.total() + held > self.budget {
                slot.phase = Phase::NotLoaded(does_not_fit(&slot.assignment, held, self.budget));
            } else if needs.total() + held + leaving <= self.budget {
                let load = LoadId(self.loads);
                self.loads += 1;
                slot.phase = Phase::Loading { load, done: Bytes(0), total: needs.weights };
                self.actions.push(Action::Load(load, slot.assignment.clone()));
            }
        }
    }

    fn slot(&mut self, key: ShardKey) -> Option<&mut Slot> {
        self.wanted.get_mut(&key)
    }

    fn loading(&mut self, load: LoadId) -> Option<&mut Slot> {
        self.wanted
            .values_mut()
            .find(|slot| matches!(slot.phase, Phase::Loading { load: l, .. } if l == load))
    }
}

impl Slot {
    fn key(&self) -> ShardKey {
        ShardKey::of(&self.assignment)
    }

    /// Whether there is a shard to stop.
    fn runs(&self) -> bool {
        matches!(self.phase, Phase::Linking | Phase::Ready | Phase::Broken(_))
    }

    /// What it holds, or will hold without asking again.
    fn holds(&self) -> Bytes {
        match self.phase {
            // Weights that it waits for are counted with the shard that is leaving.
            Phase::Waiting { .. } | Phase::NotLoaded(_) => Bytes(0),
            Phase::Loading { .. } | Phase::Linking | Phase::Ready | Phase::Broken(_) => {
                memory_of(&self.assignment).total()
            }
        }
    }

    fn state(&self) -> ShardState {
        let total = memory_of(&self.assignment).weights;
        match &self.phase {
            Phase::Waiting { .. } => ShardState::Loading { done: Bytes(0), total },
            Phase::Loading { done, total, .. } => {
                ShardState::Loading { done: *done, total: *total }
            }
            Phase::Linking => ShardState::Linking,
            Phase::Ready => ShardState::Ready,
            Phase::NotLoaded(error) | Phase::Broken(error) => ShardState::Failed(error.clone()),
        }
    }
}

#[cfg(test)]
#[path = "lifecycle_test.rs"]
mod lifecycle_test;
