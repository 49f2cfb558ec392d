//! ○ A worker's process: the real `Lifecycle` and `Orders`, with loads, links and memory as the
//! simulator has them. What runs is in `shard` and `head`, its links in `ring`.

use std::collections::{BTreeMap, BTreeSet};

use shoal_protocol::control::{DeviceInfo, Register, Report, ShardCounters};
use shoal_protocol::id::{Incarnation, NodeId};
use shoal_protocol::plan::{Assignment, Numerics};
use shoal_protocol::units::Bytes;
use shoal_protocol::version::VersionRange;
use shoal_shard_worker::agent::lifecycle::{Action, Event as Told, Lifecycle, LoadId, ShardKey};
use shoal_shard_worker::agent::orders::Orders;

use super::agents::{BEAT_US, Link};
use super::bug::Bug;
use super::executor::address;
use super::shard::{Shard, Weights};
use super::wire::{Datagram, Event, Payload};
use super::world::World;

/// How often a worker looks for coordinators that it does not talk to, as the agent does.
const CONNECT_US: u64 = 1_000_000;

/// How often it reports where nothing changes (`REPORT_INTERVAL`).
const REPORT_US: u64 = 250_000;

/// A machine with a worker.
pub struct Worker {
    /// What its shards may hold.
    pub budget: Bytes,
    /// Counts its starts; on its disk.
    pub incarnation: u64,
    /// What runs.
    pub process: Option<WorkerProcess>,
}

/// One life of a worker.
pub struct WorkerProcess {
    /// Its number.
    pub life: u64,
    incarnation: Incarnation,
    /// What its shards are and should be.
    pub lifecycle: Lifecycle,
    orders: Orders,
    /// The conversations with coordinators.
    pub links: BTreeMap<NodeId, Link>,
    /// The epochs in which it was told something, latest last.
    pub obeyed: u64,
    /// What loads hold.
    pub loads: BTreeMap<LoadId, Weights>,
    /// What runs, with what it holds.
    pub shards: BTreeMap<ShardKey, Shard>,
    /// The memory of shards that have stopped: for an heir, or not free yet.
    pub left: BTreeMap<ShardKey, Weights>,
    /// All layouts of which a shard has ever run in this life.
    pub ran: BTreeSet<ShardKey>,
}

impl WorkerProcess {
    /// All memory that it really holds.
    pub fn held(&self) -> u64 {
        let shards = self.shards.values().map(|shard| shard.weights.bytes.0);
        let rest = self.loads.values().chain(self.left.values()).map(|weights| weights.bytes.0);
        shards.chain(rest).sum()
    }
}

impl World {
    /// Starts the process of a worker.
    pub fn start_worker(&mut self, id: NodeId) {
        let life = self.new_life();
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.incarnation += 1;
        worker.process = Some(WorkerProcess {
            life,
            incarnation: Incarnation(worker.incarnation),
            lifecycle: Lifecycle::new(worker.budget),
            orders: Orders::default(),
            links: BTreeMap::new(),
            obeyed: 0,
            loads: BTreeMap::new(),
            shards: BTreeMap::new(),
            left: BTreeMap::new(),
            ran: BTreeSet::new(),
        });
        let first = self.now + self.dice.range(1_000, 50_000);
        self.at(first, Event::Connect { at: id, life });
        self.at(first, Event::Beats { at: id, life });
        self.at(first, Event::Report { at: id, life });
    }

    /// Does something with a worker's process, if it still is that one; 0: whichever it is.
    pub fn worker<T>(
        &mut self,
        id: NodeId,
        life: u64,
        work: impl FnOnce(&mut World, &mut WorkerProcess) -> T,
    ) -> Option<T> {
        let mut process = self.workers.get_mut(&id)?.process.take()?;
        let done = (life == 0 || process.life == life).then(|| work(self, &mut process));
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.process = Some(process);
        }
        done
    }

    /// A worker looks for coordinators that it does not talk to.
    pub fn connect(&mut self, id: NodeId, life: u64) {
        let coordinators: Vec<NodeId> = self.coordinators.keys().copied().collect();
        let budget = self.workers.get(&id).map_or(Bytes(0), |worker| worker.budget);
        self.worker(id, life, |world, process| {
            world.at(world.now + CONNECT_US, Event::Connect { at: id, life });
            for coordinator in coordinators {
                if process.links.contains_key(&coordinator) {
                    continue;
                }
                let session = world.number();
                let device = DeviceInfo {
                    name: "cpu".into(),
                    description: String::new(),
                    memory: budget,
                    threads: 1,
                };
                let register = Register {
                    versions: VersionRange::OURS,
                    build: "sim".into(),
                    node: id,
                    incarnation: process.incarnation,
                    pid: 1,
                    requests: address(id, life, 10_000),
                    activations: address(id, life, 40_000),
                    devices: vec![device],
                    numerics: vec![Numerics::N1],
                };
                let register = Box::new(register);
                let hello = Payload::Hello { from: id, session, life, register };
                world.send(id, coordinator, 0, hello);
            }
        });
    }

    /// Something has arrived for a worker on a stream.
    #[allow(clippy::wrong_self_convention)] // Where to, not into what.
    pub fn to_worker(&mut self, id: NodeId, life: u64, payload: Payload) {
        self.worker(id, life, |world, process| match payload {
            Payload::Welcome { from, session, life: theirs } => {
                let link = Link::new(world.now, session, theirs);
                let look = link.detector.next_look().0;
                world.at(look, Event::Look { at: id, life: process.life, peer: from, session });
                process.links.insert(from, link);
                world.report(id, process);
            }
            Payload::Assign { from, session, epoch, assignments } => {
                world.assigned(id, process, (from, session), epoch, assignments);
            }
            Payload::Generate { from, life, generate, tenant } => {
                world.generate(id, process, (from, life), (*generate, tenant));
            }
            Payload::Cancel { request, attempt, choice } => {
                world.cancelled(id, process, (request, attempt, choice));
            }
            Payload::Frame { key, frame } => world.stage_takes(id, process, key, *frame),
            Payload::Bye { from, key } => {
                let linked = process.shards.get(&key).is_some_and(|s| s.ring.contains_key(&from));
                if linked {
                    world.broken(id, process, key, &format!("{from} has left"));
                }
            }
            _ => {}
        });
    }

    fn assigned(
        &mut self,
        id: NodeId,
        process: &mut WorkerProcess,
        (from, session): (NodeId, u64),
        epoch: u64,
        assignments: Vec<Assignment>,
    ) {
        let Some(link) = process.links.get(&from).filter(|link| link.session == session) else {
            return;
        };
        let life = link.life;
        if let Err(outranked) = process.orders.admit(from, epoch)
            && self.bug != Some(Bug::IgnoreEpoch)
        {
            let payload = Payload::Outranked { from: id, session, epoch: outranked.later };
            self.send(id, from, life, payload);
            return;
        }
        self.checks.obeyed(id, process.obeyed, epoch);
        process.obeyed = epoch;
        self.tell(id, process, Told::Assigned(assignments));
    }

    /// Tells the lifecycle something and does what it says.
    pub fn tell(&mut self, id: NodeId, process: &mut WorkerProcess, told: Told) {
        let life = process.life;
        for action in process.lifecycle.handle(told) {
            match action {
                Action::Load(load, assignment) => {
                    process.loads.insert(load, Weights::of(&assignment));
                    let slow = self.net.slow.get(&id).copied().unwrap_or(1);
                    let at = self.now + slow * self.dice.range(30_000, 250_000);
                    self.at(at, Event::Loaded { at: id, life, load });
                }
                Action::Cancel(_) => {}
                Action::Discard(load) => drop(process.loads.remove(&load)),
                Action::Start(load, assignment) => {
                    let weights = process.loads.remove(&load).unwrap_or_default();
                    self.run_shard(id, process, assignment, weights);
                }
                Action::Adopt(from, assignment) => {
                    let weights = process.left.remove(&from).unwrap_or_default();
                    self.run_shard(id, process, assignment, weights);
                }
                Action::Forget(key) => drop(process.left.remove(&key)),
                Action::Stop(key, how, _) => self.stop_shard(id, process, key, how),
            }
        }
        self.checks.memory(id, process.held(), self.workers.get(&id).map_or(0, |w| w.budget.0));
        self.report(id, process);
    }

    fn run_shard(
        &mut self,
        id: NodeId,
        process: &mut WorkerProcess,
        assignment: Assignment,
        weights: Weights,
    ) {
        let key = ShardKey::of(&assignment);
        process.shards.insert(key, Shard::new(assignment, weights));
        process.ran.insert(key);
        let life = process.life;
        self.at(self.now + 1_000, Event::Ring { at: id, life, key });
    }

    /// A worker's beats.
    pub fn worker_beats(&mut self, id: NodeId, life: u64) {
        self.worker(id, life, |world, process| {
            world.at(world.now + BEAT_US, Event::Beats { at: id, life });
            for (node, link) in &process.links {
                let beat = Datagram::Beat { from: id, session: link.session };
                world.datagram(id, *node, beat);
            }
            for (key, shard) in process.shards.iter().filter(|(_, shard)| !shard.broken) {
                for node in shard.ring.keys() {
                    let beat = Datagram::RingBeat { from: id, life, key: *key };
                    world.datagram(id, *node, beat);
                }
            }
        });
    }

    /// Its report is due.
    pub fn report_due(&mut self, id: NodeId, life: u64) {
        self.at(self.now + REPORT_US, Event::Report { at: id, life });
        self.worker(id, life, |world, process| world.report(id, process));
    }

    fn report(&mut self, id: NodeId, process: &mut WorkerProcess) {
        let shards = process.lifecycle.report(|_| ShardCounters::default());
        let heads = process.heads();
        for (node, link) in &process.links {
            let report = Report { shards: shards.clone(), heads: heads.clone() };
            let payload = Payload::Report { from: id, session: link.session, report };
            self.send(id, *node, link.life, payload);
        }
    }
}
