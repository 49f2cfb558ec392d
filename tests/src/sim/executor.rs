//! ○ Reconciliation's hands (as `control/executor.rs` is): look, decide, do, and show what is served.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use shoal_coordinator::control::reconcile::{
    Action, Decision, History, Observed, ObservedWorker, reconcile,
};
use shoal_coordinator::control::state::Change;
use shoal_coordinator::control::store::Standing;
use shoal_coordinator::serving::{ServedDeployment, ServedReplica, ServingTable};
use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::id::{NodeId, ReplicaId};
use shoal_protocol::units::Instant;

use super::bug::Bug;
use super::coordinator::{Answered, Process, Purpose};
use super::wire::{Event, Payload, Wish};
use super::world::World;

/// As in the executor.
const PERIOD_US: u64 = 1_000_000;
const PAUSE_US: u64 = 5_000;
const PROOF_PATIENCE_US: u64 = 500_000;

/// What the executor remembers.
#[derive(Default)]
pub struct Executor {
    history: BTreeMap<ReplicaId, History>,
    pub(super) leads: Option<u64>,
    busy: Busy,
    wake: u64,
    /// Actions that wait for the one before them.
    todo: VecDeque<Action>,
    under: Standing,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Busy {
    #[default]
    No,
    Proving {
        until: u64,
    },
    Adopting,
}

impl Executor {
    /// Whether it waits for nothing but change.
    pub fn is_idle(&self) -> bool {
        self.busy == Busy::No && self.todo.is_empty()
    }
}

impl std::fmt::Debug for Executor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (leads, busy, wake, todo) = (self.leads, self.busy, self.wake, self.todo.len());
        write!(f, "executor: leads {leads:?}, busy {busy:?}, wake {wake}, {todo} to do")
    }
}

impl World {
    /// Something has changed: the executor looks in a moment.
    pub fn look_soon(&mut self, id: NodeId, process: &mut Process) {
        self.look_at(id, process, self.now + PAUSE_US);
    }

    fn look_at(&mut self, id: NodeId, process: &mut Process, at: u64) {
        let executor = &mut process.executor;
        if executor.wake > self.now && executor.wake <= at {
            return;
        }
        executor.wake = at;
        self.at(at, Event::Reconcile { at: id, life: process.life });
    }

    /// A round of a coordinator's executor, where one is due.
    pub fn executor_round(&mut self, id: NodeId, life: u64) {
        self.turn(id, |world, process, _| {
            if process.life == life && world.now >= process.executor.wake {
                world.executor_step(id, process);
            }
        });
    }

    fn executor_step(&mut self, id: NodeId, process: &mut Process) {
        match process.executor.busy {
            Busy::Adopting => return,
            Busy::Proving { until } if self.now < until => return,
            Busy::Proving { .. } => {
                process.executor.busy = Busy::No;
                process.executor.leads = None;
            }
            Busy::No => {
                if self.needs_proof(process) {
                    let until = self.now + PROOF_PATIENCE_US;
                    process.executor.busy = Busy::Proving { until };
                    process.executor.under = process.standing;
                    process.ask(self.now, Purpose::Proof, Wish::Read, self.bug);
                    self.look_at(id, process, until);
                    return;
                }
            }
        }
        self.decide(id, process);
    }

    fn needs_proof(&mut self, process: &mut Process) -> bool {
        let standing = process.standing;
        if self.bug == Some(Bug::FollowerActs) && standing.leader.is_some() {
            process.executor.leads = Some(standing.epoch);
            return false;
        }
        if !standing.leading {
            process.executor.leads = None;
            return false;
        }
        let outranked = process.agents.workers.values().any(|known| known.outranked.is_some());
        process.executor.leads != Some(standing.epoch) || outranked
    }

    /// The store has answered the executor.
    pub fn executor_answered(
        &mut self,
        id: NodeId,
        process: &mut Process,
        purpose: Purpose,
        answer: &Answered,
    ) {
        match (purpose, process.executor.busy) {
            (Purpose::Proof, Busy::Proving { .. }) => {
                process.executor.busy = Busy::No;
                if answer.is_err() || process.standing != process.executor.under {
                    process.executor.leads = None;
                } else {
                    self.proven(process);
                }
                self.decide(id, process);
            }
            (Purpose::Adopt, Busy::Adopting) => {
                process.executor.busy = Busy::No;
                self.act(id, process);
            }
            _ => {}
        }
    }

    fn proven(&mut self, process: &mut Process) {
        let epoch = process.standing.epoch;
        if process.executor.leads != Some(epoch) {
            process.agents.workers.values_mut().for_each(|known| known.pushed = None);
            process.executor.leads = Some(epoch);
        }
        for known in process.agents.workers.values_mut() {
            let Some(later) = known.outranked.take() else { continue };
            if later >= epoch {
                known.floor = known.floor.max(later + 1);
                known.pushed = None;
            }
        }
    }

    fn members(&self, process: &Process) -> BTreeMap<NodeId, ObservedWorker> {
        let of = |(node, known): (&NodeId, &super::agents::Known)| {
            process.state.nodes.get(*node)?;
            let silent =
                known.link.as_ref().map(|link| link.detector.silent_for(Instant(self.now)));
            let worker = ObservedWorker {
                connected: known.link.is_some(),
                silent_for: silent.unwrap_or(Duration::MAX),
                register: known.register.clone(),
                report: known.report.clone(),
                facts: Default::default(),
                rtt: None,
                pushed: known.pushed.clone(),
            };
            Some((*node, worker))
        };
        process.agents.workers.iter().filter_map(of).collect()
    }

    fn decide(&mut self, id: NodeId, process: &mut Process) {
        let observed = Observed {
            now: Instant(self.now - process.started),
            since: Instant(0),
            follows: process.executor.leads.is_none(),
            tried: false,
            workers: self.members(process),
            history: std::mem::take(&mut process.executor.history),
        };
        let decision = reconcile(&process.state, &observed);
        self.show_table(process, &decision, &observed.workers);
        let wake =
            decision.wake_at.map_or(PERIOD_US, |at| at.since(observed.now).as_micros() as u64);
        process.executor.history = decision.history;
        process.executor.under = process.standing;
        process.executor.todo = decision.actions.into();
        process.executor.wake = 0;
        self.look_at(id, process, self.now + wake.clamp(PAUSE_US, PERIOD_US));
        self.act(id, process);
    }

    fn act(&mut self, id: NodeId, process: &mut Process) {
        while let Some(action) = process.executor.todo.pop_front() {
            let Some(epoch) = process.executor.leads else { break };
            if process.standing != process.executor.under {
                break;
            }
            if let Some(command) = action.proposal() {
                process.executor.busy = Busy::Adopting;
                let wish = Wish::Change(Change::Plan(command));
                process.ask(self.now, Purpose::Adopt, wish, self.bug);
                return;
            }
            let Action::Assign { node, assignments, .. } = action else { continue };
            let Some(known) = process.agents.workers.get_mut(&node) else { continue };
            let Some(link) = &known.link else { continue };
            let (life, session) = (link.life, link.session);
            let epoch = epoch.max(known.floor);
            known.pushed = Some(assignments.clone());
            self.checks.told(id, epoch, known.floor);
            let assign = Payload::Assign { from: id, session, epoch, assignments };
            self.send(id, node, life, assign);
        }
        process.executor.todo.clear();
        self.look_soon_if_changed(id, process);
    }

    /// What has changed while the executor was busy is looked at now.
    fn look_soon_if_changed(&mut self, id: NodeId, process: &mut Process) {
        if process.executor.wake <= self.now {
            self.look_soon(id, process);
        }
    }

    fn show_table(
        &mut self,
        process: &mut Process,
        decision: &Decision,
        seen: &BTreeMap<NodeId, ObservedWorker>,
    ) {
        let state = &process.state;
        let connected = || seen.values().filter(|worker| worker.connected);
        let mut table = ServingTable {
            deployments: BTreeMap::new(),
            adapters: BTreeMap::new(),
            shards: Vec::new(),
            prefixes: Vec::new(),
            workers_connected: connected().count(),
            workers_total: state.nodes.workers().count(),
            protocol: state.lowest_protocol(),
        };
        for (name, deployment) in state.deployments.iter() {
            let Some(phase) = decision.phases.get(name) else { continue };
            let ready = phase.phase == DeploymentPhase::Ready;
            let plans = deployment.replicas.iter().filter_map(|id| state.plans.get(*id));
            let replicas = plans.filter_map(|plan| {
                let head = plan.head()?;
                let worker = seen.get(&head).filter(|worker| worker.connected);
                let heads = worker.into_iter().flat_map(|worker| &worker.report.heads);
                let load = heads
                    .filter(|h| h.replica == plan.id && h.generation == plan.generation)
                    .copied()
                    .next();
                Some(ServedReplica {
                    id: plan.id,
                    generation: plan.generation,
                    head,
                    requests: worker.map(|worker| worker.register.requests),
                    ready,
                    load,
                })
            });
            let served = ServedDeployment {
                name: name.clone(),
                created: deployment.created.0,
                folder: None,
                vocab: deployment.shape.vocab(),
                context_max: deployment.shape.context_max(),
                kind: shoal_coordinator::serving::ServedKind::Generate,
                adapter: None,
                replicas: replicas.collect(),
                reason: phase.reason.clone(),
                phase: phase.phase,
            };
            table.deployments.insert(name.clone(), Arc::new(served));
        }
        process.desk.table = Arc::new(table);
        process.desk.router.observe(Instant(self.now), &process.desk.table);
    }
}

/// Where a worker takes requests and activations: nobody connects there.
pub fn address(node: NodeId, life: u64, port: u16) -> SocketAddr {
    let low = (life % 20_000) as u16;
    SocketAddr::from(([10, 0, 0, node.number as u8], port + low))
}
