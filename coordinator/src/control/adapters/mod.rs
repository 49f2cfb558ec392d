//! ● Adapters beside deployments: opened and compared here first, then committed, told to the workers,
//! and waited for.
//!
//! ```text
//! AdapterCall ─► open, compare with the base ─► store ─► tell ─► agents ══shoal-ctl══► workers: load
//!     answer ◄─ every replica has it, or one cannot: taken back ◄── Stand (○) ◄── Held ◄──┘
//! ```

mod readers;
mod stand;

use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::adapters::{AdapterCall, AdapterReply, AdapterView};
use shoal_protocol::blob::name;
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{AdapterId, DeploymentName};
use shoal_protocol::model::Adapter as Opened;
use tokio::sync::watch;

pub use stand::{Held, Stand, serve, stands, view};

use self::readers::{Readers, read_in_time};
use super::agents::Agents;
use super::models::Models;
use super::shape::ModelShape;
use super::state::{Adapter, AdapterCommand, Change, Effect, Refusal};
use super::store::ControlStore;
use crate::serving::{ServedDeployment, ServingTable};

/// How long whoever loads an adapter waits until it is wherever its base model is. A large one over a
/// network file system takes a while; the CLI waits for two minutes (`cluster::client`).
const LOAD_PATIENCE: Duration = Duration::from_secs(60);

/// How long it may take until it is on record that everybody understands what adapters are: a cluster that
/// has just begun records it within a few seconds.
const NEEDS_PATIENCE: Duration = Duration::from_secs(10);

/// How long an operator waits for what clients are served to follow what was decided: some rounds of the
/// reconciler.
const SHOW_PATIENCE: Duration = Duration::from_secs(2);

static READERS: Readers = Readers::new();

/// Answers what operators ask about adapters.
#[derive(Clone, Debug)]
pub struct AdapterServer {
    /// The replicated state.
    pub store: ControlStore,
    /// The connected workers.
    pub agents: Agents,
    /// Where those of the hub come from.
    pub models: Models,
    /// What clients are served.
    pub table: watch::Receiver<Arc<ServingTable>>,
}

/// What an operator wants to be loaded.
struct Wish {
    name: DeploymentName,
    deployment: DeploymentName,
    path: String,
}

/// What came of waiting.
enum Loaded {
    Everywhere,
    /// It goes on.
    Slowly,
    Nowhere(WireError),
    /// Somebody has unloaded it meanwhile.
    Gone,
}

impl AdapterServer {
    /// One call; `who` asks it, for the log. It is gone through with, whether they stay or hang up: an
    /// adapter that turns out not to be loadable is taken back.
    pub async fn answer(&self, who: String, call: AdapterCall) -> Result<AdapterReply, WireError> {
        let server = self.clone();
        let work = tokio::spawn(async move { server.do_it(&who, call).await });
        work.await.unwrap_or_else(|error| {
            Err(WireError::new(ErrorCode::Internal, format!("changing adapters: {error}")))
        })
    }

    async fn do_it(&self, who: &str, call: AdapterCall) -> Result<AdapterReply, WireError> {
        match call {
            AdapterCall::List => {
                let (state, held) = (self.store.read().await?, self.agents.held_adapters());
                let all = state.adapters.iter();
                let all = all.map(|(name, adapter)| view(&state, name, adapter, &held));
                Ok(AdapterReply::List(all.collect()))
            }
            AdapterCall::Load { name, deployment, path } => {
                self.load(who, Wish { name, deployment, path }).await
            }
            AdapterCall::Unload { name } => {
                self.unload(&name).await?;
                tracing::info!(who, adapter = %name, "adapter unloaded");
                Ok(AdapterReply::Accepted { adapter: None })
            }
        }
    }

    async fn load(&self, who: &str, wish: Wish) -> Result<AdapterReply, WireError> {
        let (path, fingerprint) = self.open(&wish).await?;
        let Wish { name, deployment, .. } = wish;
        let load = AdapterCommand::Load {
            name: name.clone(),
            deployment: deployment.clone(),
            path: path.clone(),
            fingerprint,
        };
        let load = Change::Adapter(load);
        let mut state = self.store.watch();
        let permitted = state.wait_for(|state| state.permits(&load).is_ok());
        // What holds it back after that, the proposal says.
        let _ = tokio::time::timeout(NEEDS_PATIENCE, permitted).await;
        let effects = self.store.propose(load).await?;
        let number = |effect: &Effect| match effect {
            Effect::AdapterLoaded { id, .. } => Some(*id),
            _ => None,
        };
        let Some(id) = effects.iter().find_map(number) else {
            return Err(Refusal::UnknownAdapter { name }.into());
        };
        tracing::info!(who, adapter = %name, %deployment, path, "adapter to be loaded");
        let loaded = tokio::time::timeout(LOAD_PATIENCE, self.loaded(&name, id)).await;
        match loaded.unwrap_or(Loaded::Slowly) {
            Loaded::Slowly => Ok(AdapterReply::Accepted { adapter: self.view_of(&name) }),
            Loaded::Everywhere => {
                let adapter = self.view_of(&name);
                let ready = |one: &ServedDeployment| one.replicas.iter().all(|r| r.ready);
                self.show(&name, |one| {
                    one.is_some_and(|one| one.adapter_id() == Some(id) && ready(one))
                })
                .await;
                Ok(AdapterReply::Accepted { adapter })
            }
            Loaded::Gone => Err(Refusal::UnknownAdapter { name }.into()),
            Loaded::Nowhere(why) => {
                let is_ours = |at: &Adapter| at.id == id;
                if self.store.state().adapters.get(&name).is_some_and(is_ours) {
                    self.unload(&name).await?;
                }
                tracing::warn!(who, adapter = %name, "taken back: {why}");
                let words = format!("adapter `{name}` was not loaded: {}", why.message);
                Err(WireError::new(why.code, words))
            }
        }
    }

    async fn unload(&self, name: &DeploymentName) -> Result<(), WireError> {
        let unload = AdapterCommand::Unload { name: name.clone() };
        let effects = self.store.propose(Change::Adapter(unload)).await?;
        let number = |effect: &Effect| match effect {
            Effect::AdapterUnloaded { id, .. } => Some(*id),
            _ => None,
        };
        let gone: Option<AdapterId> = effects.iter().find_map(number);
        self.show(name, |one| one.is_none_or(|one| one.adapter_id() != gone)).await;
        Ok(())
    }

    /// Waits until clients are served what was decided: who is told that it is done and asks then must not
    /// hear what was before.
    async fn show(&self, name: &DeploymentName, is_so: impl Fn(Option<&ServedDeployment>) -> bool) {
        let mut table = self.table.clone();
        let shown = table.wait_for(|table| is_so(table.adapters.get(name).map(|one| one.as_ref())));
        // Where it takes longer they see it later.
        let _ = tokio::time::timeout(SHOW_PATIENCE, shown).await;
    }

    /// Reads the adapter and compares it with its base model: where every node finds it, and its
    /// fingerprint. Names that are taken are refused here already, before the disk is touched.
    async fn open(&self, wish: &Wish) -> Result<(String, [u8; 32]), WireError> {
        let Wish { name, deployment, path } = wish;
        let state = self.store.state();
        let unknown = || Refusal::UnknownDeployment { name: deployment.clone() };
        let of = state.deployments.get(deployment).ok_or_else(unknown)?;
        if state.deployments.get(name).is_some() {
            return Err(is_a_deployment(name));
        }
        if state.adapters.get(name).is_some() {
            return Err(Refusal::AdapterNameTaken { name: name.clone() }.into());
        }
        if !path.starts_with('/') && name::parse_adapter(path).is_err() {
            return Err(Refusal::BadAdapterPath.into());
        }
        let ModelShape::Checkpoint(base) = &of.shape else {
            let words = format!(
                "`{deployment}` has no adapters: they stand beside the projections of models that \
                 write text"
            );
            return Err(WireError::new(ErrorCode::InvalidRequest, words));
        };
        let (base, asked, models) = (base.clone(), path.clone(), self.models.clone());
        let mut reader = READERS.begin(path)?;
        let opened = tokio::task::spawn_blocking(move || -> Result<_, WireError> {
            let pinned = models.pin_adapter(&asked)?;
            reader.is_pinned(&pinned)?;
            let opened = Opened::open(&models.adapter(&pinned)?, &base);
            drop(reader);
            Ok((pinned, opened))
        });
        let opened = read_in_time(path, opened).await?.map_err(|error| {
            WireError::new(ErrorCode::Internal, format!("reading the adapter: {error}"))
        })?;
        let (path, opened) = opened?;
        let bad = |error: &dyn std::fmt::Display| {
            let words = format!(
                "this is no adapter for `{deployment}`, as this coordinator reads it (coordinators and \
                 workers must find it under the same path): {error}"
            );
            WireError::new(ErrorCode::BadModel, words)
        };
        Ok((path, opened.map_err(|error| bad(&error))?.fingerprint()))
    }

    fn view_of(&self, name: &DeploymentName) -> Option<AdapterView> {
        let (state, held) = (self.store.state(), self.agents.held_adapters());
        let adapter = state.adapters.get(name)?;
        Some(view(&state, name, adapter, &held))
    }

    /// Waits until every replica that has a layout has it, or one of them cannot.
    async fn loaded(&self, name: &DeploymentName, id: AdapterId) -> Loaded {
        let (mut state, mut heard) = (self.store.watch(), self.agents.changed());
        loop {
            heard.mark_unchanged();
            let now = state.borrow_and_update().clone();
            let ours = now.adapters.get(name).filter(|adapter| adapter.id == id);
            let Some(adapter) = ours else { return Loaded::Gone };
            let stands = stands(&now, adapter, &self.agents.held_adapters());
            let failed = stands.iter().find_map(|(_, stand)| match stand {
                Stand::Failed(node, why) => Some((node, why)),
                _ => None,
            });
            if let Some((node, why)) = failed {
                return Loaded::Nowhere(WireError::new(
                    why.code,
                    format!("{node}: {}", why.message),
                ));
            }
            if stands.iter().all(|(_, stand)| *stand == Stand::Held) {
                return Loaded::Everywhere;
            }
            let changed = tokio::select! {
                changed = state.changed() => changed,
                changed = heard.changed() => changed,
            };
            if changed.is_err() {
                return Loaded::Slowly;
            }
        }
    }
}

/// Both are models to clients, which tell them apart by nothing but their names.
fn is_a_deployment(name: &DeploymentName) -> WireError {
    let words = format!(
        "`{name}` is the name of a deployment, and clients choose an adapter by its name as they do a deployment: \
         give the adapter another name"
    );
    WireError::new(ErrorCode::AlreadyExists, words)
}

/// Tells the workers which adapters there should be, on every change, until `stop` becomes true.
pub async fn tell(store: ControlStore, agents: Agents, mut stop: watch::Receiver<bool>) {
    let mut state = store.watch();
    loop {
        let wanted = state.borrow_and_update().adapters.wanted();
        agents.set_adapters(wanted);
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}
