//! ○ A worker's process: the real `Lifecycle` and `Orders`, with loads, links and memory as the
//! simulator has them. What computes is in `head`.

use std::collections::{BTreeMap, BTreeSet};

use shoal_protocol::control::{DeviceInfo, Register, Report, ShardCounters};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{Attempt, Incarnation, NodeId, RequestId};
use shoal_protocol::liveness::{Detector, Verdict};
use shoal_protocol::plan::{Assignment, Numerics};
use shoal_protocol::units::{Bytes, Instant};
use shoal_protocol::version::VersionRange;
use shoal_shard_worker::agent::lifecycle::{
    Action, Event as Told, Lifecycle, LoadId, ShardKey, Stop,
};
use shoal_shard_worker::agent::orders::Orders;

use super::agents::{BEAT_US, Link, beat};
use super::bug::Bug;
use super::executor::address;
use super::head::Running;
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
    pub loads: BTreeMap<LoadId, Bytes>,
    /// What runs, with what it holds.
    pub shards: BTreeMap<ShardKey, Shard>,
    /// The memory of shards that have stopped: for an heir, or not free yet.
    pub left: BTreeMap<ShardKey, Bytes>,
    /// All layouts of which a shard has ever run in this life.
    pub ran: BTreeSet<ShardKey>,
    /// What its heads compute.
    pub running: BTreeMap<(RequestId, Attempt), Running>,
}

/// A shard that runs.
pub struct Shard {
    /// What it is.
    pub assignment: Assignment,
    /// What it holds.
    pub bytes: Bytes,
    /// The others of its layout, as far as it is linked with them.
    pub ring: BTreeMap<NodeId, (u64, Detector)>,
    /// Whether it has been told that it is linked.
    pub linked: bool,
    /// Whether it has lost a link.
    pub broken: bool,
}

impl WorkerProcess {
    /// All memory that it really holds.
    pub fn held(&self) -> u64 {
        let shards = self.shards.values().map(|shard| shard.bytes.0);
        let rest = self.loads.values().chain(self.left.values()).map(|bytes| bytes.0);
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
            running: BTreeMap::new(),
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
            Payload::Generate { from, life, generate } => {
                world.generate(id, process, (from, life), *generate);
            }
            Payload::Cancel { request, attempt } => {
                process.running.remove(&(request, attempt));
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
                    let shard = shard_memory(&assignment);
                    process.loads.insert(load, shard);
                    let slow = self.net.slow.get(&id).copied().unwrap_or(1);
                    let at = self.now + slow * self.dice.range(30_000, 250_000);
                    self.at(at, Event::Loaded { at: id, life, load });
                }
                Action::Cancel(_) => {}
                Action::Discard(load) => drop(process.loads.remove(&load)),
                Action::Start(load, assignment) => {
                    let bytes = process.loads.remove(&load).unwrap_or_default();
                    self.run_shard(id, process, assignment, bytes);
                }
                Action::Adopt(from, assignment) => {
                    let bytes = process.left.remove(&from).unwrap_or_default();
                    self.run_shard(id, process, assignment, bytes);
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
        bytes: Bytes,
    ) {
        let key = ShardKey::of(&assignment);
        let ring = BTreeMap::new();
        let shard = Shard { assignment, bytes, ring, linked: false, broken: false };
        process.shards.insert(key, shard);
        process.ran.insert(key);
        let life = process.life;
        self.at(self.now + 1_000, Event::Ring { at: id, life, key });
    }

    fn stop_shard(&mut self, id: NodeId, process: &mut WorkerProcess, key: ShardKey, how: Stop) {
        let code = match how {
            Stop::Drain | Stop::Retire => ErrorCode::Draining,
            Stop::Now | Stop::Keep => ErrorCode::StaleGeneration,
        };
        self.fail_answers(id, process, key, code);
        let bytes = process.shards.remove(&key).map_or(Bytes(0), |shard| shard.bytes);
        process.left.insert(key, bytes);
        let (life, kept) = (process.life, how == Stop::Keep);
        let mut at = self.now + self.dice.range(2_000, 60_000);
        if self.bug == Some(Bug::StoppedTooEarly) && !kept {
            self.at(at + 400_000, Event::Freed { at: id, life, key });
            at = self.now + 500;
        }
        self.at(at, Event::Stopped { at: id, life, key, kept });
    }

    /// A shard has stopped.
    pub fn stopped(&mut self, id: NodeId, life: u64, key: ShardKey, kept: bool) {
        self.worker(id, life, |world, process| {
            if !kept && world.bug != Some(Bug::StoppedTooEarly) {
                process.left.remove(&key);
            }
            world.tell(id, process, Told::Stopped { key, kept });
        });
    }

    /// A shard looks for the others of its layout.
    pub fn ring(&mut self, id: NodeId, life: u64, key: ShardKey) {
        self.worker(id, life, |world, process| {
            let Some(shard) = process.shards.get(&key).filter(|shard| !shard.broken) else {
                return;
            };
            let others: BTreeSet<NodeId> =
                shard.assignment.replica.nodes().filter(|node| *node != id).collect();
            let missing: Vec<NodeId> =
                others.iter().copied().filter(|node| !shard.ring.contains_key(node)).collect();
            let early = world.bug == Some(Bug::ReadyBeforeLinked);
            if (missing.is_empty() || early) && !shard.linked {
                if let Some(shard) = process.shards.get_mut(&key) {
                    shard.linked = true;
                }
                world.check_ring(id, process, key);
                world.tell(id, process, Told::Linked(key));
            }
            if !missing.is_empty() {
                world.at(world.now + 100_000, Event::Ring { at: id, life, key });
            }
            for node in missing {
                world.datagram(id, node, Datagram::RingHello { from: id, life, key });
            }
        });
    }

    /// A datagram of another shard.
    pub fn ring_datagram(&mut self, id: NodeId, datagram: Datagram) {
        let (from, theirs, key) = match datagram {
            Datagram::RingHello { from, life, key }
            | Datagram::RingOk { from, life, key }
            | Datagram::RingBeat { from, life, key } => (from, life, key),
            _ => return,
        };
        self.worker(id, 0, |world, process| {
            let life = process.life;
            let loose = world.bug == Some(Bug::IgnoreGeneration);
            let fits = |ours: &ShardKey| *ours == key || loose && ours.replica == key.replica;
            let Some(ours) = process.shards.keys().copied().rfind(fits) else { return };
            let Some(shard) = process.shards.get_mut(&ours).filter(|shard| !shard.broken) else {
                return;
            };
            match shard.ring.get_mut(&from) {
                Some((known, _)) if *known != theirs => {
                    return world.broken(id, process, ours, &format!("{from} was started again"));
                }
                Some((_, detector)) => detector.heard(Instant(world.now), Some(beat())),
                None if matches!(datagram, Datagram::RingBeat { .. }) => return,
                None => {
                    let mut detector = Detector::new(Instant(world.now));
                    detector.heard(Instant(world.now), Some(beat()));
                    let look = detector.next_look().0;
                    shard.ring.insert(from, (theirs, detector));
                    let peer = from;
                    world.at(look, Event::RingLook { at: id, life, peer, key: ours });
                    world.at(world.now, Event::Ring { at: id, life, key: ours });
                }
            }
            if matches!(datagram, Datagram::RingHello { .. }) {
                world.datagram(id, from, Datagram::RingOk { from: id, life, key });
            }
        });
    }

    /// A neighbour is looked at.
    pub fn ring_look(&mut self, id: NodeId, life: u64, peer: NodeId, key: ShardKey) {
        self.worker(id, life, |world, process| {
            let Some(shard) = process.shards.get_mut(&key) else { return };
            let Some((_, detector)) = shard.ring.get_mut(&peer) else { return };
            if detector.look(Instant(world.now)) == Verdict::Dead {
                return world.broken(id, process, key, &format!("{peer} is silent"));
            }
            let next = detector.next_look().0.max(world.now + 1_000);
            world.at(next, Event::RingLook { at: id, life, peer, key });
        });
    }

    fn broken(&mut self, id: NodeId, process: &mut WorkerProcess, key: ShardKey, why: &str) {
        let Some(shard) = process.shards.get_mut(&key) else { return };
        if std::mem::replace(&mut shard.broken, true) {
            return;
        }
        self.fail_answers(id, process, key, ErrorCode::WorkerLost);
        let error = WireError::new(ErrorCode::WorkerLost, why);
        self.tell(id, process, Told::Broken(key, error));
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

fn shard_memory(assignment: &Assignment) -> Bytes {
    let stage = assignment.replica.stages.get(assignment.stage.0 as usize);
    let shard = stage.and_then(|stage| stage.shards.first());
    shard.map_or(Bytes(0), |shard| shard.memory.total())
}
