//! ○ Everything, in one thread: machines, network, clients, and the queue of what happens next.

use std::collections::BTreeMap;

use shoal_protocol::id::{DeploymentName, NodeId};

use super::bug::Bug;
use super::clients::{Client, Clients};
use super::coordinator::Coordinator;
use super::dice::{Dice, mix};
use super::faults::Operator;
use super::genesis;
use super::history::History;
use super::invariants::Checks;
use super::net::{Net, Parcel};
use super::wire::{Datagram, Event, Payload};
use super::worker::Worker;

/// Events of one run: far more than any seed that heals has.
const EVENTS_MAX: u64 = 3_000_000;

/// A simulated cluster.
pub struct World {
    /// Microseconds since the beginning.
    pub now: u64,
    /// What was planted.
    pub bug: Option<Bug>,
    /// Chance.
    pub dice: Dice,
    /// Between the machines.
    pub net: Net,
    /// Machines with coordinators.
    pub coordinators: BTreeMap<NodeId, Coordinator>,
    /// Machines with workers.
    pub workers: BTreeMap<NodeId, Worker>,
    /// Those who ask for answers.
    pub clients: Clients,
    /// Changes and reads.
    pub history: History,
    /// Who replaces coordinators.
    pub operator: Operator,
    /// What must always be so.
    pub checks: Checks,
    /// A worker that does not come back.
    pub gone: Option<NodeId>,
    /// Whether faults are over.
    pub calm: bool,
    /// Since when.
    pub calm_since: u64,
    /// Whether all has healed.
    pub finished: bool,
    /// Of everything that happened, in order.
    pub hash: u64,
    /// Events so far.
    pub events: u64,
    frozen: BTreeMap<NodeId, u64>,
    queue: BTreeMap<(u64, u64), Event>,
    order: u64,
    numbers: u64,
}

impl World {
    /// A cluster that is about to start, and what will happen to it.
    pub fn new(seed: u64, bug: Option<Bug>) -> Self {
        let mut world = Self {
            now: 0,
            bug,
            dice: Dice::new(seed),
            net: Net::default(),
            coordinators: BTreeMap::new(),
            workers: BTreeMap::new(),
            clients: Clients::default(),
            history: History::default(),
            operator: Operator::default(),
            checks: Checks::default(),
            gone: None,
            calm: false,
            calm_since: 0,
            finished: false,
            hash: seed,
            events: 0,
            frozen: BTreeMap::new(),
            queue: BTreeMap::new(),
            order: 0,
            numbers: 0,
        };
        genesis::populate(&mut world);
        for node in world.machines() {
            world.start(node);
        }
        world.at(1_000, Event::Operate);
        if bug == Some(Bug::SkipSync) {
            for at in world.machines() {
                world.at(300_000, Event::Sync { at });
            }
        }
        let until = world.dice.range(1_500_000, 5_000_000);
        world.plan_faults(until);
        if world.dice.one_in(2) {
            world.at(400_000, Event::Alter);
        }
        for client in 0..world.dice.range(4, 14) {
            let name = if world.dice.one_in(3) { "n" } else { "m" };
            let Ok(name) = DeploymentName::new(name) else { continue };
            let wants = Client::draw(&mut world.dice, name);
            world.clients.by_number.insert(client, wants);
            let when = world.dice.range(0, until);
            world.at(when, Event::Ask { client });
            if world.dice.one_in(6) {
                let hangs_up = when + world.dice.range(50_000, 1_500_000);
                world.at(hangs_up, Event::HangUp { client });
            }
        }
        world
    }

    /// Lets everything happen until all has healed, or something is wrong.
    pub fn run(&mut self) {
        while !self.finished && self.checks.found().is_none() {
            let Some(((at, _), event)) = self.queue.pop_first() else {
                return self.violate("simulator", "nothing is left to happen".into());
            };
            self.now = at;
            self.events += 1;
            if self.events > EVENTS_MAX {
                return self.violate("simulator", "too much happens".into());
            }
            if let Some(until) = machine(&event).and_then(|node| self.frozen_until(node)) {
                self.at(until, event);
                continue;
            }
            let (a, b) = trace_of(&event);
            self.trace(at ^ a << 48 ^ b << 32);
            self.happen(event);
        }
        if self.finished {
            self.check_history();
            self.check_registers();
            self.check_once();
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Tick { at, life } => {
                if self.coordinators.get(&at).and_then(|c| c.process.as_ref()).map(|p| p.life)
                    == Some(life)
                {
                    self.coordinator_tick(at, life);
                }
            }
            Event::Written { at, life, good } => self.written(at, life, good),
            Event::Sync { at } => {
                let bug = self.bug;
                if let Some(machine) = self.coordinators.get_mut(&at) {
                    machine.disk.sync(bug);
                }
                self.at(self.now + 300_000, Event::Sync { at });
            }
            Event::SnapshotSent { at, life, to, arrived } => {
                self.snapshot_sent(at, life, to, arrived);
            }
            Event::Reconcile { at, life } => self.executor_round(at, life),
            Event::Datagram { to, datagram } => self.datagram_arrived(to, datagram),
            Event::Channel { from, to } => self.channel(from, to),
            Event::Look { at, life, peer, session } => self.look_at_link(at, life, peer, session),
            Event::RingLook { at, life, peer, key } => self.ring_look(at, life, peer, key),
            Event::Beats { at, life } => {
                self.coordinator_beats(at, life);
                self.worker_beats(at, life);
            }
            Event::Connect { at, life } => self.connect(at, life),
            Event::Report { at, life } => self.report_due(at, life),
            Event::Loaded { at, life, load } => {
                let told = shoal_shard_worker::agent::lifecycle::Event::Loaded(load);
                self.worker(at, life, |world, process| world.tell(at, process, told));
            }
            Event::Stopped { at, life, key, kept } => self.stopped(at, life, key, kept),
            Event::Freed { at, life, key } => {
                self.worker(at, life, |_, process| process.left.remove(&key));
            }
            Event::Ring { at, life, key } => self.ring(at, life, key),
            Event::Wake { at, life, key } => self.wake(at, life, key),
            Event::Samples { at, life, key } => {
                self.worker(at, life, |world, process| world.drawn(at, process, key));
            }
            Event::Leave { at, life, key } => self.leave_look(at, life, key),
            Event::Fault(fault) => self.fault(fault),
            Event::Start { at } => self.start(at),
            Event::Calm => self.calm_down(),
            Event::Ask { client } => self.client_asks(client),
            Event::HangUp { client } => self.client_hangs_up(client),
            Event::Operate => self.operate(),
            Event::Alter => self.alter(),
            Event::Replace => self.replace_coordinator(),
            Event::Check => self.check_healing(),
        }
    }

    fn datagram_arrived(&mut self, to: NodeId, datagram: Datagram) {
        match datagram {
            Datagram::Raft(message) => self.raft_message(to, *message),
            Datagram::Beat { from, session } => self.heard_beat(to, from, session),
            ring => self.ring_datagram(to, ring),
        }
    }

    fn channel(&mut self, from: NodeId, to: NodeId) {
        loop {
            match self.net.take(self.now, (from, to)) {
                Err(later) => return self.at(later, Event::Channel { from, to }),
                Ok(None) => return,
                Ok(Some(Parcel { life, payload })) => {
                    let there = self.coordinators.get(&to).and_then(|c| c.process.as_ref());
                    match there {
                        Some(process) if life == 0 || process.life == life => {
                            self.to_coordinator(to, payload);
                        }
                        Some(_) => {}
                        None => self.to_worker(to, life, payload),
                    }
                }
            }
        }
    }

    /// Something will happen.
    pub fn at(&mut self, at: u64, event: Event) {
        self.order += 1;
        self.queue.insert((at.max(self.now), self.order), event);
    }

    /// Sends a datagram; whether a copy of it will arrive.
    pub fn datagram(&mut self, from: NodeId, to: NodeId, datagram: Datagram) -> bool {
        let copies = self.net.datagram(&mut self.dice, from, to);
        for delay in &copies {
            let datagram = datagram.clone();
            self.at(self.now + delay, Event::Datagram { to, datagram });
        }
        !copies.is_empty()
    }

    /// Sends something on a stream to a process.
    pub fn send(&mut self, from: NodeId, to: NodeId, life: u64, payload: Payload) {
        self.send_later(0, from, to, life, payload);
    }

    /// The same, in so many microseconds: nothing that is sent meanwhile overtakes it.
    pub fn send_later(
        &mut self,
        later: u64,
        from: NodeId,
        to: NodeId,
        life: u64,
        payload: Payload,
    ) {
        let parcel = Parcel { life, payload };
        let at = self.net.send(self.now + later, &mut self.dice, (from, to), parcel);
        self.at(at, Event::Channel { from, to });
    }

    /// All machines.
    pub fn machines(&self) -> Vec<NodeId> {
        self.coordinators.keys().chain(self.workers.keys()).copied().collect()
    }

    /// Whether a machine stands still.
    pub fn is_frozen(&self, node: NodeId) -> bool {
        self.frozen_until(node).is_some()
    }

    fn frozen_until(&self, node: NodeId) -> Option<u64> {
        self.frozen.get(&node).copied().filter(|until| *until > self.now)
    }

    /// A machine stands still until then.
    pub fn freeze(&mut self, node: NodeId, until: u64) {
        self.frozen.insert(node, until);
    }

    /// All machines go on.
    pub fn thaw(&mut self) {
        self.frozen.clear();
    }

    /// The number of a new process.
    pub fn new_life(&mut self) -> u64 {
        self.number()
    }

    /// A number that was never given before.
    pub fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Adds something that happened to the trace.
    pub fn trace(&mut self, what: u64) {
        self.hash = mix(self.hash ^ what).wrapping_add(what);
    }

    /// Something is not as it must be.
    pub fn violate(&mut self, invariant: &'static str, words: String) {
        self.checks.violate(invariant, words);
    }
}

/// Whose process an event needs.
fn machine(event: &Event) -> Option<NodeId> {
    match event {
        Event::Tick { at, .. }
        | Event::Written { at, .. }
        | Event::SnapshotSent { at, .. }
        | Event::Reconcile { at, .. }
        | Event::Look { at, .. }
        | Event::RingLook { at, .. }
        | Event::Beats { at, .. }
        | Event::Connect { at, .. }
        | Event::Report { at, .. }
        | Event::Loaded { at, .. }
        | Event::Stopped { at, .. }
        | Event::Ring { at, .. }
        | Event::Wake { at, .. }
        | Event::Samples { at, .. }
        | Event::Leave { at, .. } => Some(*at),
        Event::Datagram { to, .. } | Event::Channel { to, .. } => Some(*to),
        _ => None,
    }
}

/// What of an event goes into the trace.
fn trace_of(event: &Event) -> (u64, u64) {
    let node = |node: NodeId| (u64::from(node.number) << 4) | node.role as u64;
    let kind = match event {
        Event::Tick { .. } => 1,
        Event::Written { .. } => 2,
        Event::Datagram { .. } => 3,
        Event::Channel { .. } => 4,
        Event::Reconcile { .. } => 5,
        Event::Look { .. } | Event::RingLook { .. } => 6,
        Event::Beats { .. } | Event::Connect { .. } | Event::Report { .. } => 7,
        Event::Loaded { .. } | Event::Stopped { .. } | Event::Ring { .. } => 8,
        Event::Wake { .. } | Event::Samples { .. } | Event::Leave { .. } => 9,
        Event::Fault(_) => 10,
        _ => 11,
    };
    (kind, machine(event).map_or(0, node))
}
