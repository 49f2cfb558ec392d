//! ● Reconciliation's hands: on every change, look, decide, do, and show what is served.
//!
//! ```text
//! state ──┐
//! agents ─┼─► reconcile ─┬─► proposals ─► store      ┌─► ServingTable ─► api, router
//! time ───┘              └─► Assign ─► agents        └─► ClusterView ─► admin, `shoal up`
//! ```
//!
//! It keeps nothing but what the last decision gave it for the next one. An action that fails is not
//! repeated here: the next round sees that it is still to be done. Acting may take as long as the store
//! does, so it goes on beside the looking: meanwhile a round shows and decides nothing.
//!
//! Every coordinator looks and shows; the leader alone acts, and only once it has made sure that its
//! copy of the state holds all that the leaders before it decided. Otherwise it would tell workers to
//! be what they were.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::admin::{
    ClusterView, CoordinatorView, DeploymentPhase, DeploymentView, ReplicaView, WorkerView,
};
use shoal_protocol::id::{DeploymentName, NodeId, ReplicaId};
use shoal_protocol::plan::ReplicaPlan;
use shoal_protocol::units::Instant;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::adapters;
use super::agents::Agents;
use super::folders::Folders;
use super::models::Models;
use super::reconcile::{
    Action, Decision, History, Observed, ObservedWorker, Phase, Stand, reconcile,
};
use super::state::{Change, ClusterState};
use super::store::{ControlStore, ProposeError, Standing};
use crate::serving::{ServedDeployment, ServedReplica, ServingTable};

/// How often to look even if nothing changes: what could not be done is tried again so soon.
const PERIOD: Duration = Duration::from_secs(1);

/// Changes that follow each other sooner are looked at together: reports of many workers come in
/// bursts.
const PAUSE: Duration = Duration::from_millis(5);

/// How long a coordinator that votes alone waits before it outranks the leader that its workers have heard:
/// its folder may be an old backup, and another coordinator that knows better says so within two seconds.
const ALONE_PATIENCE: Duration = Duration::from_secs(3);

/// How long a round waits for proof that this coordinator leads. The next round asks again.
const PROOF_PATIENCE: Duration = Duration::from_millis(500);

/// Carries decisions out until it is told to stop.
#[derive(Debug)]
pub struct Executor {
    store: ControlStore,
    agents: Agents,
    coordinator: CoordinatorView,
    /// When this coordinator started: the origin of the time that reconciliation is told.
    origin: std::time::Instant,
    history: BTreeMap<ReplicaId, History>,
    /// The epoch in which this coordinator is proven to lead with a current state.
    leads: Option<u64>,
    /// When it began to look as it does now, as a leader or as one that follows: a worker that has no way
    /// here may serve others all the while.
    since: Instant,
    /// Since when workers have said that they have heard a later leader.
    outranked_since: Option<Instant>,
    reconcile: Reconcile,
    folders: Folders,
    shown: Shown,
}

/// What decides: `reconcile`, but in tests.
type Reconcile = fn(&ClusterState, &Observed) -> Decision;

/// Where the executor shows what is.
#[derive(Debug)]
pub struct Shown {
    /// For the request plane.
    pub table: watch::Sender<Arc<ServingTable>>,
    /// For people.
    pub view: watch::Sender<Arc<ClusterView>>,
}

impl Executor {
    /// An executor that has done nothing yet.
    pub fn new(
        store: ControlStore,
        agents: Agents,
        models: Models,
        coordinator: CoordinatorView,
        shown: Shown,
    ) -> Self {
        Self {
            store,
            agents,
            coordinator,
            origin: std::time::Instant::now(),
            history: BTreeMap::new(),
            leads: None,
            since: Instant(0),
            outranked_since: None,
            reconcile,
            folders: Folders::new(models),
            shown,
        }
    }

    /// Looks, decides and does, on every change and once a second, until `stop` becomes true.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut state_changed = self.store.watch();
        let mut agents_changed = self.agents.changed();
        let mut standing_changed = self.store.standing();
        let mut last_phases = BTreeMap::new();
        // One at most. It ends with this.
        let mut acting = JoinSet::new();
        let mut acts_under = Standing::default();
        loop {
            // Marked as seen before they are looked at, so that no change in between is lost.
            agents_changed.mark_unchanged();
            let standing = *standing_changed.borrow_and_update();
            if standing != acts_under {
                acting.shutdown().await;
            }
            while acting.try_join_next().is_some() {}
            self.prove(standing).await;
            if self.leads.is_none() {
                acting.shutdown().await;
            }
            let state = Arc::clone(&state_changed.borrow_and_update());
            let looks_only = !acting.is_empty();
            let mut decision = match self.decide(&state, looks_only).await {
                Decided::This(decision) => decision,
                // What was shown last is nearer to what is than nothing.
                Decided::Panicked => {
                    tokio::select! {
                        () = tokio::time::sleep(PERIOD) => continue,
                        _ = stop.wait_for(|stop| *stop) => return,
                    }
                }
                Decided::Ending => return,
            };
            decision.actions.retain(|_| !looks_only);
            log(&decision, &mut last_phases);
            self.folders.look(&state).await;
            self.show(&state, &decision);
            if !looks_only {
                self.history = decision.history;
                if let Some(epoch) = self.leads.filter(|_| !decision.actions.is_empty()) {
                    acts_under = standing;
                    let hands = Hands { store: self.store.clone(), agents: self.agents.clone() };
                    acting.spawn(hands.act(decision.actions, standing, epoch));
                }
            }
            let wake = decision.wake_at.map_or(PERIOD, |at| at.since(self.now()).min(PERIOD));
            tokio::select! {
                changed = state_changed.changed() => if changed.is_err() { return },
                changed = agents_changed.changed() => if changed.is_err() { return },
                changed = standing_changed.changed() => if changed.is_err() { return },
                // What was only looked at meanwhile is decided now.
                Some(_) = acting.join_next(), if looks_only => {}
                () = tokio::time::sleep(wake) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Sees whether this coordinator leads, and whether its workers believe it.
    async fn prove(&mut self, standing: Standing) {
        let outranked = self.agents.outranked();
        if outranked.is_empty() {
            self.outranked_since = None;
        }
        if !standing.leading {
            if self.leads.take().is_some() {
                tracing::info!(leader = ?standing.leader, "this coordinator does not lead any more");
            }
            return;
        }
        if self.leads == Some(standing.epoch) && outranked.is_empty() {
            return;
        }
        let read = tokio::time::timeout(PROOF_PATIENCE, self.store.prove(standing.epoch)).await;
        if !matches!(read, Ok(Ok(_))) || *self.store.standing().borrow() != standing {
            self.leads = None;
            return;
        }
        if self.leads != Some(standing.epoch) {
            tracing::info!(epoch = standing.epoch, "this coordinator leads");
            self.agents.begin_to_lead();
            self.leads = Some(standing.epoch);
            self.since = self.now();
        }
        if outranked.is_empty() {
            return;
        }
        let now = self.now();
        let since = *self.outranked_since.get_or_insert(now);
        let alone = self.store.members().borrow().voters.len() == 1;
        if !alone || now.since(since) >= ALONE_PATIENCE {
            self.agents.outrank(standing.epoch, &outranked);
        }
    }

    fn now(&self) -> Instant {
        Instant(self.origin.elapsed().as_micros().min(u128::from(u64::MAX)) as u64)
    }

    /// The workers that have registered here and belong to the cluster.
    fn members(&self, state: &ClusterState) -> BTreeMap<NodeId, ObservedWorker> {
        let mut workers = self.agents.observe();
        workers.retain(|node, _| state.nodes.get(*node).is_some());
        workers
    }

    /// Whoever looks only sees what it would decide, and keeps what it remembers: nothing is counted.
    async fn decide(&mut self, state: &Arc<ClusterState>, looks_only: bool) -> Decided {
        let history = match looks_only {
            true => self.history.clone(),
            false => std::mem::take(&mut self.history),
        };
        let observed = Observed {
            now: self.now(),
            since: self.since,
            follows: self.leads.is_none(),
            tried: false,
            workers: self.members(state),
            history,
        };
        let (state, reconcile) = (Arc::clone(state), self.reconcile);
        // Planning a large model for many workers takes a while; the timers must not wait for it.
        let decided = tokio::task::spawn_blocking(move || reconcile(&state, &observed)).await;
        match decided {
            Ok(decision) => Decided::This(decision),
            Err(error) if error.is_panic() => {
                tracing::error!(%error, "reconciliation failed; it starts anew without its memory");
                Decided::Panicked
            }
            Err(_) => Decided::Ending,
        }
    }

    fn show(&self, state: &ClusterState, decision: &Decision) {
        let seen = self.members(state);
        let stands = self.stands(state, decision);
        let table = self.table(state, &stands, &seen);
        // Whoever waits for a change wakes for a change.
        self.shown.table.send_if_modified(|shown| {
            let changed = **shown != table;
            if changed {
                *shown = Arc::new(table);
            }
            changed
        });
        let mut view = view(&self.coordinator, state, &stands, &seen);
        view.coordinators = super::voters::view(state, &self.store);
        self.shown.view.send_if_modified(|shown| {
            let changed = **shown != view;
            if changed {
                *shown = Arc::new(view);
            }
            changed
        });
    }

    /// Where each deployment and each of its replicas is. Without its tokenizer a head could be asked,
    /// and not answered for.
    fn stands(&self, state: &ClusterState, decision: &Decision) -> Stands {
        let mut stands = Stands::default();
        for (name, deployment) in state.deployments.iter() {
            let unseen = || "it has not been looked at yet".to_owned();
            let mut phase = decision
                .phases
                .get(name)
                .cloned()
                .unwrap_or_else(|| Phase { phase: DeploymentPhase::Waiting, reason: unseen() });
            let missing = self.folders.of(name).err();
            if let (Some(reason), DeploymentPhase::Ready) = (&missing, phase.phase) {
                phase = Phase { phase: DeploymentPhase::Loading, reason: reason.clone() };
            }
            stands.deployments.insert(name.clone(), phase);
            for id in &deployment.replicas {
                let mut stand = decision.replicas.get(id).cloned().unwrap_or_else(|| Stand {
                    phase: DeploymentPhase::Waiting,
                    reason: unseen(),
                    settled: false,
                });
                if let (Some(reason), DeploymentPhase::Ready) = (&missing, stand.phase) {
                    let phase = DeploymentPhase::Loading;
                    stand = Stand { phase, reason: reason.clone(), settled: false };
                }
                stands.replicas.insert(*id, stand);
            }
        }
        stands
    }

    fn table(
        &self,
        state: &ClusterState,
        stands: &Stands,
        seen: &BTreeMap<NodeId, ObservedWorker>,
    ) -> ServingTable {
        let connected = || seen.iter().filter(|(_, worker)| worker.connected);
        let shards = connected()
            .flat_map(|(node, worker)| worker.report.shards.iter().map(|s| (*node, s.clone())));
        let mut table = ServingTable {
            deployments: BTreeMap::new(),
            adapters: BTreeMap::new(),
            shards: shards.collect(),
            prefixes: self.agents.prefixes(),
            workers_connected: connected().count(),
            workers_total: state.nodes.workers().count(),
            protocol: state.lowest_protocol(),
        };
        for (name, deployment) in state.deployments.iter() {
            let Some(Phase { phase, reason }) = stands.deployments.get(name).cloned() else {
                continue;
            };
            let folder = self.folders.of(name).ok().flatten();
            let plans: Vec<_> =
                deployment.replicas.iter().filter_map(|id| state.plans.get(*id)).collect();
            // What each of them can answer: which one is asked is the router's choice.
            let context_max = plans.iter().map(|plan| plan.limits.context_max).min();
            let served = ServedDeployment {
                name: name.clone(),
                created: deployment.created.0,
                folder,
                vocab: deployment.shape.vocab(),
                context_max: context_max.unwrap_or(deployment.shape.context_max()),
                kind: deployment.shape.kind(),
                replicas: plans.iter().filter_map(|plan| served(plan, stands, seen)).collect(),
                reason,
                phase,
                adapter: None,
            };
            table.deployments.insert(name.clone(), Arc::new(served));
        }
        adapters::serve(state, &mut table, &self.agents.held_adapters());
        table
    }
}

/// What a round came to.
enum Decided {
    This(Decision),
    Panicked,
    /// The runtime is.
    Ending,
}

/// What acts, beside the looking.
struct Hands {
    store: ControlStore,
    agents: Agents,
}

impl Hands {
    /// Does what was decided under this standing, in order, for as long as it is so and the store takes it.
    async fn act(self, actions: Vec<Action>, standing: Standing, epoch: u64) {
        for action in actions {
            if *self.store.standing().borrow() != standing {
                return;
            }
            let Some(command) = action.proposal() else {
                if let Action::Assign { node, assignments, .. } = action {
                    self.agents.assign(node, epoch, assignments);
                }
                continue;
            };
            // What was not taken is decided anew from what is there then.
            match self.store.propose_under(Change::Plan(command), Some(standing.epoch)).await {
                Ok(_) => {}
                Err(error @ ProposeError::Refused(_)) => {
                    tracing::warn!(%error, "not taken: {action}")
                }
                Err(error) => return tracing::warn!(%error, "not taken: {action}"),
            }
        }
    }
}

/// Where everything is, for people and for the router.
#[derive(Debug, Default)]
struct Stands {
    deployments: BTreeMap<DeploymentName, Phase>,
    replicas: BTreeMap<ReplicaId, Stand>,
}

/// A replica as the router sees it.
fn served(
    plan: &ReplicaPlan,
    stands: &Stands,
    seen: &BTreeMap<NodeId, ObservedWorker>,
) -> Option<ServedReplica> {
    let head = plan.head()?;
    let worker = seen.get(&head).filter(|worker| worker.connected);
    let load = worker.and_then(|worker| {
        let mut heads = worker.report.heads.iter();
        heads.find(|head| head.replica == plan.id && head.generation == plan.generation)
    });
    let stand = stands.replicas.get(&plan.id);
    Some(ServedReplica {
        id: plan.id,
        generation: plan.generation,
        head,
        requests: worker.map(|worker| worker.register.requests),
        ready: stand.is_some_and(|stand| stand.phase == DeploymentPhase::Ready),
        load: load.copied(),
    })
}

/// The cluster as people see it.
fn view(
    coordinator: &CoordinatorView,
    state: &ClusterState,
    stands: &Stands,
    seen: &BTreeMap<NodeId, ObservedWorker>,
) -> ClusterView {
    let workers = state.nodes.workers().map(|(id, node)| match seen.get(&id) {
        Some(worker) => WorkerView {
            id,
            connected: worker.connected,
            pid: worker.register.pid,
            build: worker.register.build.clone(),
            address: Some(worker.register.activations),
            devices: worker.devices(),
            shards: worker.report.shards.clone(),
            heads: worker.report.heads.clone(),
            draining: state.drains.contains(id),
        },
        None => WorkerView {
            id,
            connected: false,
            pid: 0,
            build: node.build.clone(),
            address: None,
            devices: Vec::new(),
            shards: Vec::new(),
            heads: Vec::new(),
            draining: state.drains.contains(id),
        },
    });
    let deployments = state.deployments.iter().filter_map(|(name, deployment)| {
        let Phase { phase, reason } = stands.deployments.get(name).cloned()?;
        let reason = deployment.shape.or_kind(reason);
        let source = deployment.spec.model.source.clone();
        let replicas = deployment.replicas.iter().filter_map(|id| {
            let Stand { phase, reason, settled } = stands.replicas.get(id).cloned()?;
            let next = state.plans.next(*id).cloned();
            Some(ReplicaView { id: *id, phase, reason, settled, next })
        });
        Some(DeploymentView {
            name: name.clone(),
            source,
            phase,
            reason,
            stages: deployment.spec.stages,
            asked: deployment.asked,
            replicas: replicas.collect(),
        })
    });
    ClusterView {
        coordinator: coordinator.clone(),
        workers: workers.collect(),
        deployments: deployments.collect(),
        plan: state.plans.to_plan(),
        coordinators: Vec::new(),
    }
}

/// Says what is done, and where each deployment is when that has changed.
fn log(decision: &Decision, last: &mut BTreeMap<DeploymentName, Phase>) {
    for action in &decision.actions {
        tracing::info!("{action}");
    }
    for (name, at) in &decision.phases {
        let Phase { phase, reason } = at;
        match last.get(name) {
            Some(before) if before == at => {}
            // Progress changes with every report; who wants it asks for it.
            Some(before) if before.phase == *phase && *phase == DeploymentPhase::Loading => {
                tracing::debug!(deployment = %name, "{phase:?}: {reason}");
            }
            _ => tracing::info!(deployment = %name, "{phase:?}: {reason}"),
        }
    }
    last.clone_from(&decision.phases);
}

#[cfg(test)]
#[path = "executor_test.rs"]
mod tests;
