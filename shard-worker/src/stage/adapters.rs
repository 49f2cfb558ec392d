//! Adapters of a shard that runs: they come and go between two of its steps.
//!
//! ```text
//! worker ─► AdapterOrder ─► compute thread: packs, or forgets behind the last sequence ─► answer
//! head   ─► takes requests for what is loaded, from the answer on and until it is told to forget
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::AdapterId;
use tokio::sync::{mpsc, oneshot};

use super::table::StageTable;
use super::wire::StageInput;
use crate::model::{AdapterLoadError, AdapterSlices, ShardModel};

/// What the worker wants of a compute thread.
#[derive(Debug)]
pub enum AdapterOrder {
    /// Pack it and keep it.
    Load {
        /// Its number.
        id: AdapterId,
        /// What this shard holds of it.
        slices: AdapterSlices,
        /// Told how it went.
        done: oneshot::Sender<Result<(), AdapterLoadError>>,
    },
    /// Forget it as soon as no open sequence uses it.
    Unload {
        /// Its number.
        id: AdapterId,
        /// Told when it is gone.
        done: oneshot::Sender<()>,
    },
}

/// Why a shard did not take an adapter, or did not let it go.
#[derive(Debug, thiserror::Error)]
pub enum AdapterOrderError {
    /// It cannot be held.
    #[error(transparent)]
    Load(#[from] AdapterLoadError),
    /// The shard stops.
    #[error("the shard has stopped; its next layout is told again")]
    Stopped,
}

/// The adapters that go, at one compute thread.
#[derive(Debug, Default)]
pub(super) struct Leaving(BTreeMap<AdapterId, Vec<oneshot::Sender<()>>>);

impl Leaving {
    /// Does what is wanted, at once or behind the last sequence.
    pub(super) fn take(
        &mut self,
        order: AdapterOrder,
        table: &StageTable,
        model: &mut dyn ShardModel,
    ) {
        match order {
            AdapterOrder::Load { id, slices, done } => {
                // Who asked may be gone; then the shard stops.
                let _ = done.send(model.load_adapter(id, &slices));
            }
            AdapterOrder::Unload { id, done } => {
                self.0.entry(id).or_default().push(done);
                self.look(table, model);
            }
        }
    }

    /// Forgets what no sequence uses any more: asked when one has ended.
    pub(super) fn look(&mut self, table: &StageTable, model: &mut dyn ShardModel) {
        self.0.retain(|id, waiting| {
            if table.uses(*id) {
                return true;
            }
            model.unload_adapter(*id);
            for done in waiting.drain(..) {
                let _ = done.send(());
            }
            false
        });
    }
}

/// Which adapters a head takes requests for. Held for one look-up, never over an await.
#[derive(Clone, Debug, Default)]
pub struct Served(Arc<Mutex<BTreeSet<AdapterId>>>);

impl Served {
    /// Requests may name it, or no more.
    pub fn set(&self, id: AdapterId, is_served: bool) {
        let mut served = self.lock();
        if is_served {
            served.insert(id);
        } else {
            served.remove(&id);
        }
    }

    /// Why a request for it is turned away; the base model is always there.
    pub fn refusal(&self, id: Option<AdapterId>) -> Option<WireError> {
        let id = id.filter(|id| !self.lock().contains(id))?;
        let words = format!("{id} is not loaded at this replica: it comes or goes; try again");
        Some(WireError::new(ErrorCode::NotReady, words))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<AdapterId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Brings adapters to a shard that runs, and takes them away.
#[derive(Clone, Debug)]
pub struct ShardAdapters {
    /// It must not keep the compute thread's queue open.
    stage: mpsc::WeakSender<StageInput>,
    served: Served,
}

impl ShardAdapters {
    /// Of the shard with this queue, whose head looks at `served`.
    pub(super) fn new(stage: mpsc::WeakSender<StageInput>, served: Served) -> Self {
        Self { stage, served }
    }

    /// Takes an adapter between two steps; its head takes requests for it from then on. One that a layout
    /// before this one has left with the model is there already.
    pub async fn load(
        &self,
        id: AdapterId,
        slices: AdapterSlices,
    ) -> Result<(), AdapterOrderError> {
        let (done, loaded) = oneshot::channel();
        self.order(AdapterOrder::Load { id, slices, done }).await?;
        match loaded.await.map_err(|_| AdapterOrderError::Stopped)? {
            Ok(()) | Err(AdapterLoadError::Loaded(_)) => self.served.set(id, true),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Takes no requests for an adapter any more.
    pub fn turn_away(&self, id: AdapterId) {
        self.served.set(id, false);
    }

    /// Takes no requests for an adapter any more, and lets it go behind the last sequence that uses it.
    pub async fn unload(&self, id: AdapterId) -> Result<(), AdapterOrderError> {
        self.served.set(id, false);
        let (done, gone) = oneshot::channel();
        self.order(AdapterOrder::Unload { id, done }).await?;
        gone.await.map_err(|_| AdapterOrderError::Stopped)
    }

    async fn order(&self, order: AdapterOrder) -> Result<(), AdapterOrderError> {
        let stage = self.stage.upgrade().ok_or(AdapterOrderError::Stopped)?;
        stage.send(StageInput::Adapter(order)).await.map_err(|_| AdapterOrderError::Stopped)
    }
}
