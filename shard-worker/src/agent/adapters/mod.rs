//! ● Brings the adapters that there should be to the shards that run here, and says which they have.
//!
//! ```text
//! Adapters ─► wanted ─┐
//! shard begins, ends ─┴─► Ledger (○) ─► a thread: open, compare, count, read ─► ShardAdapters
//!         sessions ◄─ what each has ◄─┘                                            │
//!                                     └─────────── loaded, failed, let go ◄────────┘
//! ```
//!
//! Nothing waits for a disk or a shard but what is about it: a mount may hang for ever.

mod ledger;
mod tries;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use shoal_protocol::adapters::{AdapterSpec, HeldAdapters, WantedAdapters};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::model::Adapter;
use shoal_protocol::plan::Assignment;
use shoal_protocol::units::{Bytes, Instant};
use tokio::sync::{oneshot, watch};

use self::ledger::{Ledger, Next, NotLoaded, ReadId};
use self::tries::Now;
use super::lifecycle::ShardKey;
use super::models::Models;
use super::sameness::memory_of;
use crate::model::AdapterSlices;
use crate::stage::{AdapterOrderError, ShardAdapters};

/// What the agent tells its keeper.
#[derive(Clone, Debug)]
pub(super) struct Adapters {
    state: Arc<Mutex<State>>,
    changed: Arc<watch::Sender<u64>>,
    origin: std::time::Instant,
}

#[derive(Debug)]
struct State {
    ledger: Ledger,
    shards: BTreeMap<ShardKey, (Assignment, ShardAdapters)>,
}

/// What a thread reads.
struct Order {
    read: ReadId,
    spec: AdapterSpec,
    assignment: Assignment,
    models: Models,
}

impl Adapters {
    /// No adapter is wanted, and no shard runs. All together may hold `budget`.
    pub fn new(budget: Bytes) -> Self {
        let state = State { ledger: Ledger::new(budget), shards: BTreeMap::new() };
        let changed = Arc::new(watch::Sender::new(0));
        Self { state: Arc::new(Mutex::new(state)), changed, origin: std::time::Instant::now() }
    }

    /// A coordinator says what there should be.
    pub fn want(&self, wanted: WantedAdapters) {
        if !wanted.is_bounded() {
            tracing::warn!("a coordinator names more adapters than a cluster may have");
            return;
        }
        self.with(|state| {
            // Whatever the keeper is busy with: no head begins with what is to go.
            for (key, id) in state.ledger.want(wanted) {
                if let Some((_, adapters)) = state.shards.get(&key) {
                    adapters.turn_away(id);
                }
            }
        });
    }

    /// A shard runs; where it took over another one's model, with what that one had.
    pub fn begin(
        &self,
        key: ShardKey,
        assignment: Assignment,
        adapters: ShardAdapters,
        heir_of: Option<ShardKey>,
    ) {
        let deployment = assignment.replica.deployment.clone();
        let memory = memory_of(&assignment).total();
        self.with(|state| {
            state.ledger.begin(key, (deployment, memory), heir_of);
            state.shards.insert(key, (assignment, adapters));
        });
    }

    /// A shard is being stopped.
    pub fn end(&self, key: ShardKey) {
        self.with(|state| {
            state.ledger.end(key);
            state.shards.remove(&key);
        });
    }

    /// The model of a shard that has stopped serves no other: it is dropped.
    pub fn gone(&self, key: ShardKey) {
        self.with(|state| state.ledger.gone(key));
    }

    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        let done = self.look(action);
        self.changed.send_modify(|n| *n += 1);
        done
    }

    /// The same, unnoticed.
    fn look<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn now(&self) -> Now {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Now { at: Instant(0) + self.origin.elapsed(), unix_s: unix.as_secs() }
    }

    /// Does what is to be done for as long as the agent lives.
    pub async fn keep(self, models: Models, said: watch::Sender<Vec<HeldAdapters>>) {
        let mut changed = self.changed.subscribe();
        loop {
            changed.mark_unchanged();
            while let Some(next) = self.look(|state| state.ledger.next(self.now())) {
                self.act(next, &models);
            }
            self.say(&said);
            let wake = self.look(|state| state.ledger.wake_at());
            tokio::select! {
                changed = changed.changed() => if changed.is_err() { return },
                () = self.sleep_until(wake) => {}
            }
        }
    }

    async fn sleep_until(&self, at: Option<Instant>) {
        match at {
            Some(Instant(us)) => {
                let at = self.origin + Duration::from_micros(us);
                tokio::time::sleep_until(at.into()).await;
            }
            None => std::future::pending().await,
        }
    }

    fn say(&self, said: &watch::Sender<Vec<HeldAdapters>>) {
        let news = self.look(|state| state.ledger.said());
        said.send_if_modified(|last| {
            let changed = *last != news;
            *last = news;
            changed
        });
    }

    /// Begins it. Nothing here waits.
    fn act(&self, next: Next, models: &Models) {
        match next {
            Next::Unload(key, id) => {
                let shard = self.look(|state| state.shards.get(&key).map(|(_, at)| at.clone()));
                let (keeper, Some(shard)) = (self.clone(), shard) else { return };
                // It may take as long as the longest answer.
                tokio::spawn(async move {
                    // Where the shard has stopped it lies in the model still.
                    if shard.unload(id).await.is_ok() {
                        keeper.with(|state| state.ledger.unloaded(key, id));
                    }
                });
            }
            Next::Read(read, key, spec) => {
                let shard = self.look(|state| state.shards.get(&key).cloned());
                let (keeper, models) = (self.clone(), models.clone());
                tokio::spawn(async move {
                    let loaded = match shard {
                        Some((assignment, adapters)) => {
                            let order = Order { read, spec, assignment, models };
                            keeper.load(order, adapters).await
                        }
                        None => Err(NotLoaded::Moot),
                    };
                    let now = keeper.now();
                    keeper.with(|state| state.ledger.done(now, read, loaded));
                });
            }
        }
    }

    /// Reads what a shard holds of an adapter, and hands it over.
    async fn load(&self, order: Order, adapters: ShardAdapters) -> Result<(), NotLoaded> {
        let (read, id) = (order.read, order.spec.id);
        let slices = self.read(order).await?;
        if !self.look(|state| state.ledger.may_take(read)) {
            return Err(NotLoaded::Moot);
        }
        match adapters.load(id, slices).await {
            Ok(()) => Ok(()),
            Err(AdapterOrderError::Stopped) => Err(NotLoaded::Moot),
            Err(AdapterOrderError::Load(error)) => {
                let error = WireError::new(ErrorCode::ComputeFailed, error.to_string());
                Err(NotLoaded::Refused(error))
            }
        }
    }

    /// On a thread of its own: a runtime would wait for one that hangs when it ends.
    async fn read(&self, order: Order) -> Result<AdapterSlices, NotLoaded> {
        let (keeper, (done, slices)) = (self.clone(), oneshot::channel());
        let name = format!("read-adapter-{}", order.spec.id.0);
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            // Nobody waits where the agent has ended.
            let _ = done.send(keeper.read_now(&order));
        });
        let broken = |words: String| NotLoaded::Refused(WireError::new(ErrorCode::Internal, words));
        thread.map_err(|error| broken(format!("cannot start a thread to read: {error}")))?;
        slices.await.map_err(|_| broken("reading an adapter panicked".to_owned()))?
    }

    /// Opens an adapter, compares it with the base model and with what the coordinator read, and reads
    /// this shard's part of it.
    fn read_now(&self, order: &Order) -> Result<AdapterSlices, NotLoaded> {
        let Order { read, spec, assignment, models } = order;
        let replica = &assignment.replica;
        let checkpoint = models.open(&replica.model.source, &AtomicBool::new(false));
        let checkpoint = checkpoint.map_err(NotLoaded::Refused)?;
        let base = checkpoint.spec();
        let bad = |words: String| NotLoaded::Refused(WireError::new(ErrorCode::BadModel, words));
        let folder = models.adapter(&spec.path).map_err(NotLoaded::Refused)?;
        let adapter = Adapter::open(&folder, base).map_err(|e| bad(e.to_string()))?;
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
        self.look(|state| state.ledger.reserve(*read, takes))?;
        let slices = AdapterSlices::read(&adapter, base, &part, layers);
        slices.map_err(|error| bad(error.to_string()))
    }
}
