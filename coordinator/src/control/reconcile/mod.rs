//! ○ (target, observed) → actions with reasons.
//!
//! ```text
//! for each replica:  how is it? (health) ─► fine, wait, or a new layout (planner) ─► Adopt
//!                    fine, and to be moved ─► Prepare beside it; ready ─► Promote, failed ─► Abandon
//! for each worker:   what should it be? ─► differs from what it was told ─► Assign
//! ```
//!
//! A new layout is only proposed here; workers are told of it in the next round, after the state
//! has taken it. What must be remembered between rounds (who ran under which start number, how often
//! a replica was planned anew) goes in and comes out as [`History`], so that the function has no
//! memory of its own. It converges from any state, and a round that changes nothing has no action.

mod health;
mod links;
mod moves;
mod pace;
mod pairs;
mod patience;
mod preview;
mod replica;
mod spread;
mod suspects;
mod tell;
mod words;

use std::collections::BTreeMap;
use std::time::Duration;

use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::control::{DeviceInfo, Register, Report};
use shoal_protocol::id::{DeploymentName, Generation, Incarnation, NodeId, ReplicaId};
use shoal_protocol::mesh::{Facts, MACHINE, MeshAsk};
use shoal_protocol::plan::{Assignment, DeploymentSpec, ReplicaPlan};
use shoal_protocol::units::{Bytes, Instant};
use shoal_protocol::version::KNOWS_MESHES;

use super::planner::{Apart, Candidate, Inventory, Job, Links, PlanRefusal, Rate, plan};
use super::shape::ModelShape;
use super::state::{ClusterState, PlanCommand};
use patience::Standing;
pub use preview::{Preview, preview};
use suspects::{Suspects, Unreadable};

/// How long a coordinator that has just started waits for the workers of a layout before it counts
/// them as lost. They try again every second, and their shards may still be serving.
pub const RECONNECT_GRACE: Duration = Duration::from_secs(5);

/// How long a shard that lost its link waits at most for a better explanation. Most often it takes two
/// beats: a worker that has died is given up on its control link at about the same time as on its
/// other links, and where all workers of the layout were heard since, none of them has died. The
/// detector takes 1.2 s at worst.
pub const LINK_SETTLE: Duration = Duration::from_secs(2);

/// How often to see who was heard meanwhile: two beats of a worker at which work flows.
pub const LINK_SETTLE_LOOK: Duration = Duration::from_millis(20);

/// The wait after the second layout in a row that did not last; it doubles with each further one.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(250);

/// The longest such wait: a person who has mended the cause should not have to wait longer.
pub const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// A layout that was ready for so long counts as a success: what ends it then is a loss, not a layout
/// that does not work, and the next one is made at once.
pub const STABLE_AFTER: Duration = Duration::from_secs(2);

/// What this coordinator sees of the workers, and what it remembers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// The time.
    pub now: Instant,
    /// When this coordinator began to listen, or to lead.
    pub since: Instant,
    /// Whether another one leads, or nobody: then nothing is done here, nobody is blamed for what
    /// nobody was told from here, and what is to be done is only foreseen.
    pub follows: bool,
    /// Whether this is a copy on which a change is tried: what would come in its own time belongs to no change.
    pub tried: bool,
    /// The workers that have registered since then.
    pub workers: BTreeMap<NodeId, ObservedWorker>,
    /// What the last round left.
    pub history: BTreeMap<ReplicaId, History>,
}

/// One worker, as it registered and reported.
#[derive(Clone, Debug, PartialEq)]
pub struct ObservedWorker {
    /// Whether its control link is up.
    pub connected: bool,
    /// How long ago it was last heard on that link.
    pub silent_for: Duration,
    /// What it registered with, under addresses that others reach.
    pub register: Register,
    /// Its last report.
    pub report: Report,
    /// What it has said of itself besides.
    pub facts: Facts,
    /// The smoothed round trip of its control link.
    pub rtt: Option<Duration>,
    /// What it was last told to be on its present connection; `None` before the first time.
    pub pushed: Option<Vec<Assignment>>,
}

impl ObservedWorker {
    /// Its devices as people see them: with the zone, where it stands in one.
    pub fn devices(&self) -> Vec<DeviceInfo> {
        let mut devices = self.register.devices.clone();
        if let Some(zone) = &self.facts.zone {
            devices.iter_mut().for_each(|d| d.description.push_str(&format!(", zone {zone}")));
        }
        devices
    }
}

/// What is remembered of one replica between rounds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Its layout.
    current: Watched,
    /// The one that is being made beside it.
    next: Watched,
    /// New layouts in a row, none of which was ready for `STABLE_AFTER`.
    failures: u32,
    /// No new layout before.
    not_before: Instant,
    /// What the planner last said no to, and its words.
    refused: Option<(Question, String)>,
    /// What a move was last not possible for, and why.
    stuck: Option<(moves::Wish, String)>,
    /// Whether it shares a worker with another replica.
    stacked: spread::Stacked,
    /// Workers at which layouts have failed.
    suspects: Suspects,
    /// Workers that do not reach each other.
    pairs: pairs::Pairs,
    /// How fast the workers of the layout are.
    paces: pace::Paces,
    /// Workers whose copies of the model are not good.
    unreadable: Unreadable,
    /// The last layout that was counted among them.
    blamed: Generation,
    /// What a follower's planner last said yes to.
    foreseen: Option<Question>,
}

/// What a planner is asked; where it is the same again, so is the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Question {
    /// How often the deployment was asked for: what was asked the last time may be something else.
    asked: u64,
    /// The workers there are.
    inventory: Inventory,
}

impl Question {
    /// Ways count where the planner looks at them. They are measured all the time, and what is shown of that
    /// is no part of the question.
    fn new(asked: u64, ask: MeshAsk, inventory: &Inventory) -> Self {
        let (workers, apart) = (inventory.workers.clone(), inventory.apart.clone());
        let links = if ask.is_measured() { inventory.links.clone() } else { Links::default() };
        Self { asked, inventory: Inventory { workers, apart, links, ..Inventory::default() } }
    }
}

/// What is remembered of one layout between rounds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Watched {
    /// The layout that the other fields are about.
    generation: Generation,
    /// The start numbers under which its workers took it.
    incarnations: BTreeMap<NodeId, Incarnation>,
    /// Where its shards stand that are not ready.
    standing: BTreeMap<NodeId, Standing>,
    /// Since when a shard has had no link.
    unlinked_since: Option<Instant>,
    /// Since when the coordinator has missed all of its workers, or some that it missed then.
    alone_since: Option<Instant>,
    /// Since when all of it has been ready.
    ready_since: Option<Instant>,
    /// Its workers that were found not to reach each other, until they are counted: once.
    apart: Vec<(NodeId, NodeId)>,
    /// Whether they were.
    apart_counted: bool,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Propose this layout.
    Adopt {
        /// The layout.
        plan: Box<ReplicaPlan>,
        /// Why.
        reason: String,
    },
    /// Propose this layout beside the one that serves.
    Prepare {
        /// The layout.
        plan: Box<ReplicaPlan>,
        /// What it is made for.
        asked: u64,
        /// Why.
        reason: String,
    },
    /// Propose that the next layout takes over: all of it is ready.
    Promote {
        /// The replica.
        replica: ReplicaId,
        /// The next layout.
        generation: Generation,
    },
    /// Propose that the next layout is given up.
    Abandon {
        /// The replica.
        replica: ReplicaId,
        /// The next layout.
        generation: Generation,
        /// Why.
        reason: String,
    },
    /// Propose to note that a layout is as was asked for.
    Confirm {
        /// The replica.
        replica: ReplicaId,
        /// Its layout.
        generation: Generation,
        /// What it was asked for.
        asked: u64,
    },
    /// Tell a worker all that it should be.
    Assign {
        /// The worker.
        node: NodeId,
        /// All of it.
        assignments: Vec<Assignment>,
        /// Why.
        reason: String,
    },
}

/// Where a deployment is, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Phase {
    /// Where.
    pub phase: DeploymentPhase,
    /// Why, for people.
    pub reason: String,
}

/// Where a replica is, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stand {
    /// Where.
    pub phase: DeploymentPhase,
    /// Why, for people.
    pub reason: String,
    /// Whether it is served as was asked for, and nothing is under way.
    pub settled: bool,
}

impl Action {
    /// What is to be proposed to the state; `None` where a worker is to be told.
    pub fn proposal(&self) -> Option<PlanCommand> {
        Some(match self {
            Action::Assign { .. } => return None,
            Action::Adopt { plan, .. } => PlanCommand::Adopt { plan: plan.clone() },
            Action::Prepare { plan, asked, .. } => {
                PlanCommand::Prepare { plan: plan.clone(), asked: *asked }
            }
            Action::Promote { replica, generation } => {
                PlanCommand::Promote { replica: *replica, generation: *generation }
            }
            Action::Abandon { replica, generation, .. } => {
                PlanCommand::Abandon { replica: *replica, generation: *generation }
            }
            Action::Confirm { replica, generation, asked } => {
                PlanCommand::Confirm { replica: *replica, generation: *generation, asked: *asked }
            }
        })
    }
}

/// All that one round comes to. Prints as a list of actions with reasons.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// What is to be done, in this order.
    pub actions: Vec<Action>,
    /// Where each deployment is.
    pub phases: BTreeMap<DeploymentName, Phase>,
    /// Where each replica is.
    pub replicas: BTreeMap<ReplicaId, Stand>,
    /// What the next round should be given.
    pub history: BTreeMap<ReplicaId, History>,
    /// When to look again even if nothing changes.
    pub wake_at: Option<Instant>,
}

/// One round.
pub fn reconcile(target: &ClusterState, observed: &Observed) -> Decision {
    let plans = target.plans.all().cloned().collect();
    let apart = apart(observed);
    let mut round = Round { target, observed, plans, apart, decision: Decision::default() };
    for (name, deployment) in target.deployments.iter() {
        for replica in &deployment.replicas {
            let stand = round.replica(deployment, *replica);
            round.decision.replicas.insert(*replica, stand);
        }
        let stands = deployment
            .replicas
            .iter()
            .filter_map(|id| Some((*id, round.decision.replicas.get(id)?)));
        let phase = words::phase_of(stands);
        round.decision.phases.insert(name.clone(), phase);
    }
    let connected = observed.workers.iter().filter(|(_, worker)| worker.connected);
    for (node, worker) in connected.filter(|_| !observed.follows) {
        round.assign(*node, worker);
    }
    round.decision
}

struct Round<'a> {
    target: &'a ClusterState,
    observed: &'a Observed,
    /// The layouts of the state, and those that this round proposes: what they use of a worker is not
    /// free for the next one.
    plans: Vec<ReplicaPlan>,
    /// What any replica knows of workers that do not reach each other.
    apart: Apart,
    decision: Decision,
}

impl Round<'_> {
    fn wake(&mut self, at: Instant) {
        let earlier = self.decision.wake_at.is_none_or(|other| at < other);
        if earlier {
            self.decision.wake_at = Some(at);
        }
    }
}

/// Whose memory counts as free.
#[derive(Clone, Copy, Debug)]
struct Seeker<'a> {
    /// The deployment.
    name: &'a DeploymentName,
    /// The replica.
    replica: ReplicaId,
    /// Whether what it has now is free for it: the new layout takes its place.
    instead: bool,
}

/// The connected workers, with what the replicas of the state use of them: what a new deployment can
/// have.
pub fn inventory(target: &ClusterState, observed: &Observed, name: &DeploymentName) -> Inventory {
    inventory_for(target, observed, name, ReplicaId(0))
}

/// What a replica could have if it were planned anew.
pub fn inventory_for(
    target: &ClusterState,
    observed: &Observed,
    name: &DeploymentName,
    replica: ReplicaId,
) -> Inventory {
    let plans: Vec<_> = target.plans.all().cloned().collect();
    let workers = workers_for(target, observed, &plans, Seeker { name, replica, instead: true });
    inventory_of(target, observed, workers, apart(observed))
}

/// These workers, with the ways between them.
fn inventory_of(
    target: &ClusterState,
    observed: &Observed,
    workers: Vec<Candidate>,
    apart: Apart,
) -> Inventory {
    let (links, seen) = links::links(target, observed, &workers);
    Inventory { workers, apart, links, seen }
}

/// The pairs that any replica has found not to reach each other.
fn apart(observed: &Observed) -> Apart {
    observed.history.values().flat_map(|history| history.pairs.apart(observed.now)).collect()
}

/// The connected workers of this cluster that are not drained.
fn workers_for(
    target: &ClusterState,
    observed: &Observed,
    plans: &[ReplicaPlan],
    seeker: Seeker<'_>,
) -> Vec<Candidate> {
    let usable = observed
        .workers
        .iter()
        .filter(|(node, worker)| worker.connected && target.nodes.get(**node).is_some())
        .filter(|(node, _)| !target.drains.contains(**node));
    let candidates = usable.filter_map(|(node, worker)| {
        // One shard per worker and replica, so the first device is the one that counts.
        let device = worker.register.devices.first()?;
        let (mut used, mut sibling) = (Bytes(0), false);
        for plan in plans {
            let own = plan.id == seeker.replica;
            let shards = plan.stages.iter().flat_map(|stage| &stage.shards);
            for shard in shards.filter(|shard| shard.node == *node) {
                sibling |= !own && plan.deployment == *seeker.name;
                if !(own && seeker.instead) {
                    used = used + shard.memory.total();
                }
            }
        }
        Some(Candidate {
            node: *node,
            device: device.name.clone(),
            budget: device.memory,
            used,
            numerics: worker.register.numerics.clone(),
            sibling,
            rate: worker.facts.rates.get(&device.name).and_then(|rate| Rate::said(*rate)),
            zone: worker.facts.zone.clone(),
            speaks_ranks: worker.register.versions.max >= KNOWS_MESHES,
            ranks_most: worker.facts.ranks_most,
            machine: Some((
                worker.register.activations.ip(),
                worker.facts.rates.get(MACHINE).copied(),
            )),
        })
    });
    candidates.collect()
}

fn backoff(failures: u32) -> Duration {
    if failures == 0 {
        return Duration::ZERO;
    }
    BACKOFF_FIRST.saturating_mul(1 << (failures - 1).min(16)).min(BACKOFF_MAX)
}

/// What the planner says when asked for a layout that nobody will carry out: for `deploy`, before
/// anything is proposed.
pub fn dry_run(
    target: &ClusterState,
    observed: &Observed,
    spec: &DeploymentSpec,
    shape: &ModelShape,
    replicas: u32,
    ask: MeshAsk,
) -> Result<ReplicaPlan, PlanRefusal> {
    // No deployment has replica 0.
    let replica = ReplicaId(0);
    let replicas = replicas as usize;
    let generation = Generation(1);
    let job = Job { replica, generation, spec, shape, previous: None, replicas, ask };
    plan(&inventory(target, observed, &spec.name), &job)
}

#[cfg(test)]
#[path = "reconcile_test.rs"]
mod tests;

#[cfg(test)]
mod files_test;

#[cfg(test)]
mod gray_test;

#[cfg(test)]
mod takeover_test;

#[cfg(test)]
mod world_test;

#[cfg(test)]
mod moves_test;

#[cfg(test)]
mod random_test;
