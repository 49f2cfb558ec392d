//! ● Brings the adapters that there should be to the shards that run here, and says which they have.
//!
//! ```text
//! Adapters ─► wanted ─┐
//! shard begins, ends ─┴─► keeper: open, compare, count, read ─► ShardAdapters ─► what each has ─► sessions
//! ```
//!
//! What fails is said, and not tried again until there is another list or another layout.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use shoal_protocol::adapters::{AdapterSpec, HeldAdapters, WantedAdapters};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{AdapterId, ReplicaId};
use shoal_protocol::model::Adapter;
use shoal_protocol::plan::Assignment;
use shoal_protocol::units::Bytes;
use tokio::sync::watch;

use super::lifecycle::ShardKey;
use super::models::Models;
use super::sameness::memory_of;
use crate::model::AdapterSlices;
use crate::stage::{AdapterOrderError, ShardAdapters};

/// What tells two adapters apart, whatever their numbers: a state that was restored gives some again.
type Fingerprint = [u8; 32];

/// What the agent tells its keeper.
#[derive(Clone, Debug)]
pub(super) struct Adapters {
    state: Arc<Mutex<State>>,
    changed: Arc<watch::Sender<u64>>,
}

#[derive(Debug, Default)]
struct State {
    wanted: WantedAdapters,
    shards: BTreeMap<ShardKey, Running>,
    /// What shards that have stopped had: their model may serve the replica's next layout, with all that
    /// lies in it.
    left: BTreeMap<ReplicaId, BTreeMap<AdapterId, Fingerprint>>,
}

/// A shard that runs, and what it has.
#[derive(Clone, Debug)]
struct Running {
    assignment: Assignment,
    adapters: ShardAdapters,
    /// With the bytes that each takes.
    held: BTreeMap<AdapterId, (Fingerprint, Bytes)>,
    failed: BTreeMap<AdapterId, WireError>,
    /// What may lie in its model from a layout before.
    left: BTreeMap<AdapterId, Fingerprint>,
    /// Those of which nothing is said: they go behind their last sequence, or came too late.
    silent: BTreeMap<AdapterId, Fingerprint>,
}

/// What is to be done next.
enum Next {
    Load(ShardKey, Box<Running>, AdapterSpec),
    Unload(ShardKey, ShardAdapters, AdapterId),
}

impl Adapters {
    /// No adapter is wanted, and no shard runs.
    pub fn new() -> Self {
        Self { state: Arc::default(), changed: Arc::new(watch::Sender::new(0)) }
    }

    /// A coordinator says what there should be. Their copies of the state are not equally new.
    pub fn want(&self, wanted: WantedAdapters) {
        if !wanted.is_bounded() {
            tracing::warn!("a coordinator names more adapters than a cluster may have");
            return;
        }
        self.with(|state| {
            if wanted.revision > state.wanted.revision {
                state.shards.values_mut().for_each(|shard| shard.failed.clear());
                state.wanted = wanted;
            }
            // Whatever the keeper is busy with: no head begins with what is to go.
            for shard in state.shards.values() {
                let wanted = state.wanted.of(&shard.assignment.replica.deployment);
                let gone = shard.held.iter().filter(|(id, (at, _))| !is_in(wanted, **id, at));
                gone.for_each(|(id, _)| shard.adapters.turn_away(*id));
            }
        });
    }

    /// A shard runs.
    pub fn begin(&self, key: ShardKey, assignment: Assignment, adapters: ShardAdapters) {
        self.with(|state| {
            let left = state.left.remove(&key.replica).unwrap_or_default();
            let (held, failed, silent) = Default::default();
            let running = Running { assignment, adapters, held, failed, left, silent };
            state.shards.insert(key, running);
        });
    }

    /// A shard is being stopped.
    pub fn end(&self, key: ShardKey) {
        self.with(|state| {
            let Some(shard) = state.shards.remove(&key) else { return };
            let left = state.left.entry(key.replica).or_default();
            left.extend(shard.held.into_iter().map(|(id, (fingerprint, _))| (id, fingerprint)));
            left.extend(shard.left.into_iter().chain(shard.silent));
            // A replica that has left this worker is not remembered for ever.
            let runs: BTreeSet<ReplicaId> = state.shards.keys().map(|key| key.replica).collect();
            state
                .left
                .retain(|id, left| !left.is_empty() && (*id == key.replica || runs.contains(id)));
        });
    }

    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        let done = action(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.send_modify(|n| *n += 1);
        done
    }

    fn look<T>(&self, action: impl FnOnce(&State) -> T) -> T {
        action(&self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Does what is to be done, one after another, for as long as the agent lives.
    pub async fn keep(self, models: Models, budget: Bytes, said: watch::Sender<Vec<HeldAdapters>>) {
        let mut changed = self.changed.subscribe();
        changed.mark_changed();
        while changed.changed().await.is_ok() {
            changed.borrow_and_update();
            while let Some(next) = self.look(State::next) {
                self.act(next, &models, budget).await;
                self.say(&said);
            }
            self.say(&said);
        }
    }

    fn say(&self, said: &watch::Sender<Vec<HeldAdapters>>) {
        let news = self.look(State::said);
        said.send_if_modified(|last| {
            let changed = *last != news;
            *last = news;
            changed
        });
    }

    async fn act(&self, next: Next, models: &Models, budget: Bytes) {
        match next {
            Next::Unload(key, shard, id) => {
                self.with(|state| {
                    let Some(shard) = state.shards.get_mut(&key) else { return };
                    let held = shard.held.remove(&id).map(|(fingerprint, _)| fingerprint);
                    if let Some(fingerprint) = shard.left.remove(&id).or(held) {
                        shard.silent.insert(id, fingerprint);
                    }
                });
                // It may take as long as the longest answer, for which nobody else is to wait.
                let keeper = self.clone();
                tokio::spawn(async move {
                    // Where the shard has stopped there is nothing to let go.
                    let _ = shard.unload(id).await;
                    keeper.with(|state| {
                        state.shards.get_mut(&key).map(|shard| shard.silent.remove(&id))
                    });
                });
            }
            Next::Load(key, running, spec) => {
                let (id, fingerprint) = (spec.id, spec.fingerprint);
                let used = self.look(State::used);
                let loaded = load(*running, spec, models.clone(), (used, budget)).await;
                self.with(|state| {
                    let Some(shard) = state.shards.get_mut(&key) else {
                        // Its shard has ended meanwhile, and its model may serve the next layout.
                        if loaded.is_ok() {
                            state.left.entry(key.replica).or_default().insert(id, fingerprint);
                        }
                        return;
                    };
                    shard.left.remove(&id);
                    match loaded {
                        Ok(bytes) => {
                            tracing::info!("{id} is loaded at {key}: {bytes}");
                            shard.held.insert(id, (fingerprint, bytes));
                        }
                        Err(NotLoaded::Stopped) => {
                            shard.silent.insert(id, fingerprint);
                        }
                        Err(NotLoaded::Refused(error)) => {
                            tracing::warn!("{id} is not loaded at {key}: {error}");
                            shard.failed.insert(id, error);
                        }
                    }
                });
            }
        }
    }
}

impl State {
    fn next(&self) -> Option<Next> {
        self.shards.iter().find_map(|(key, shard)| {
            let wanted = self.wanted.of(&shard.assignment.replica.deployment);
            let held = shard.held.iter().map(|(id, (fingerprint, _))| (id, fingerprint));
            let mut here = held.chain(&shard.left);
            if let Some((id, _)) = here.find(|(id, at)| !is_in(wanted, **id, at)) {
                return Some(Next::Unload(*key, shard.adapters.clone(), *id));
            }
            let known = |id: &AdapterId| {
                shard.held.contains_key(id)
                    || shard.failed.contains_key(id)
                    || shard.silent.contains_key(id)
            };
            let spec = wanted.iter().find(|spec| !known(&spec.id))?;
            Some(Next::Load(*key, Box::new(shard.clone()), spec.clone()))
        })
    }

    /// What shards that run and their adapters take.
    fn used(&self) -> Bytes {
        let of = |shard: &Running| {
            let held = shard.held.values().map(|(_, bytes)| *bytes).sum::<Bytes>();
            memory_of(&shard.assignment).total() + held
        };
        self.shards.values().map(of).sum()
    }

    fn said(&self) -> Vec<HeldAdapters> {
        if self.wanted.revision == 0 {
            return Vec::new();
        }
        let of = |(key, shard): (&ShardKey, &Running)| HeldAdapters {
            replica: key.replica,
            generation: key.generation,
            held: shard.held.iter().map(|(id, (fingerprint, _))| (*id, *fingerprint)).collect(),
            failed: shard.failed.iter().map(|(id, error)| (*id, error.clone())).collect(),
        };
        self.shards.iter().map(of).collect()
    }
}

/// Whether this very adapter is among those that there should be.
fn is_in(wanted: &[AdapterSpec], id: AdapterId, fingerprint: &Fingerprint) -> bool {
    wanted.iter().any(|spec| spec.id == id && spec.fingerprint == *fingerprint)
}

/// Why a shard has not got an adapter.
enum NotLoaded {
    /// It has ended meanwhile: that says nothing of the adapter.
    Stopped,
    Refused(WireError),
}

/// Reads what the shard holds of an adapter and hands it over; how many bytes it takes.
async fn load(
    running: Running,
    spec: AdapterSpec,
    models: Models,
    memory: (Bytes, Bytes),
) -> Result<Bytes, NotLoaded> {
    let Running { assignment, adapters, .. } = running;
    let id = spec.id;
    let read = tokio::task::spawn_blocking(move || read(&assignment, &spec, &models, memory));
    let read = read.await.unwrap_or_else(|error| {
        Err(WireError::new(ErrorCode::Internal, format!("reading an adapter panicked: {error}")))
    });
    let (slices, takes) = read.map_err(NotLoaded::Refused)?;
    match adapters.load(id, slices).await {
        Ok(()) => Ok(takes),
        Err(AdapterOrderError::Stopped) => Err(NotLoaded::Stopped),
        Err(AdapterOrderError::Load(error)) => {
            Err(NotLoaded::Refused(WireError::new(ErrorCode::ComputeFailed, error.to_string())))
        }
    }
}

/// Opens an adapter, compares it with the base model and with what the coordinator read, and reads this
/// shard's part of it.
fn read(
    assignment: &Assignment,
    spec: &AdapterSpec,
    models: &Models,
    (used, budget): (Bytes, Bytes),
) -> Result<(AdapterSlices, Bytes), WireError> {
    let replica = &assignment.replica;
    let checkpoint = models.open(&replica.model.source, &AtomicBool::new(false))?;
    let base = checkpoint.spec();
    let bad = |words: String| WireError::new(ErrorCode::BadModel, words);
    let adapter = Adapter::open(Path::new(&spec.path), base).map_err(|e| bad(e.to_string()))?;
    if adapter.fingerprint() != spec.fingerprint {
        return Err(bad(format!(
            "{}: these are not the files of adapter `{}` that the coordinator read; expected the same \
             content under this path on every node",
            spec.path, spec.name
        )));
    }
    let part = base
        .part(assignment.split(), replica.reduction(), replica.precision)
        .map_err(|e| bad(e.to_string()))?;
    let layers = assignment.layers();
    let takes = adapter.held_bytes(base, &part, layers)
        + adapter.scratch_bytes(base, &part, layers, replica.limits.step_rows_max);
    if used + takes > budget {
        let words = format!(
            "adapter `{}` takes {takes} here, and {used} of this worker's {budget} are in use; unload \
             another one, or give the worker more with --memory",
            spec.name
        );
        return Err(WireError::new(ErrorCode::DoesNotFit, words));
    }
    let slices = AdapterSlices::read(&adapter, base, &part, layers);
    Ok((slices.map_err(|error| bad(error.to_string()))?, takes))
}
