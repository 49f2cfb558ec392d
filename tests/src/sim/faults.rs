//! ○ What goes wrong, drawn by the dice, and its end: then everything has to heal.

use std::collections::BTreeSet;

use shoal_coordinator::control::state::{Change, CoordinatorCommand, KeyFingerprint, NodeCommand};
use shoal_protocol::id::{DeploymentName, Incarnation, NodeId, Role};

use super::bug::Bug;
use super::coordinator::{Answered, Coordinator, Purpose};
use super::disk::Disk;
use super::executor::address;
use super::wire::{Event, Wish};
use super::world::World;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing gets from here to there.
    Cut(NodeId, NodeId),
    /// Nothing gets from or to a machine.
    Isolate(NodeId),
    /// All ways are open again.
    Mend,
    /// The network loses, doubles and delays, or does so no longer.
    Rough(bool),
    /// A process ends; what it wrote is there.
    Kill(NodeId),
    /// A machine ends; what was not synced is gone.
    PowerCut(NodeId),
    /// A coordinator loses its power for a moment.
    Flicker(NodeId),
    /// The others reach each other only by way of this coordinator, whose power flickers.
    Torn(NodeId),
    /// All coordinators lose their power at once.
    Blackout,
    /// A machine stops for so many milliseconds, and goes on.
    Freeze(NodeId, u64),
    /// Everything at a machine takes so many times as long.
    Slow(NodeId, u64),
    /// Writes fail for so many milliseconds.
    DiskError(NodeId, u64),
    /// A coordinator loses its disk: it is replaced by another.
    LoseDisk(NodeId),
    /// A worker never comes back.
    Gone(NodeId),
}

/// The replacement of a coordinator, step by step.
#[derive(Default)]
pub struct Operator {
    old: Option<NodeId>,
    new: Option<NodeId>,
    step: u8,
    asked: Option<u64>,
    /// Deployments that were, or may have been, removed at some time.
    pub removed: BTreeSet<DeploymentName>,
}

impl Operator {
    /// Whether nothing is left to do.
    pub fn is_done(&self) -> bool {
        self.old.is_none() || self.step > 3
    }

    fn begin(&mut self, old: NodeId) {
        (self.old, self.new, self.step, self.asked) = (Some(old), None, 0, None);
    }
}

impl World {
    /// Draws the faults of this run, up to `until`.
    pub fn plan_faults(&mut self, until: u64) {
        let coordinators: Vec<NodeId> = self.coordinators.keys().copied().collect();
        let workers: Vec<NodeId> = self.workers.keys().copied().collect();
        let all: Vec<NodeId> = coordinators.iter().chain(&workers).copied().collect();
        let Some(unlucky) = self.dice.pick(&coordinators) else { return };
        let Some(doomed) = self.dice.pick(&workers) else { return };
        let (loses, goes) = (self.dice.one_in(5), self.dice.one_in(4));
        let mut at = self.dice.range(200_000, 900_000);
        let count = self.dice.range(4, 16);
        for nth in 0..count {
            let Some(machine) = self.dice.pick(&all) else { return };
            let Some(coordinator) = self.dice.pick(&coordinators) else { return };
            let Some(other) = self.dice.pick(&all) else { return };
            let Some(worker) = self.dice.pick(&workers) else { return };
            let fault = match self.dice.range(0, 24) {
                18..=20 => Fault::Torn(coordinator),
                21 | 22 => Fault::Freeze(worker, self.dice.range(400, 2_500)),
                23 => Fault::Cut(worker, coordinator),
                0 | 1 => Fault::Cut(machine, other),
                2 => Fault::Isolate(machine),
                3 | 4 => Fault::Mend,
                5 | 6 => Fault::Rough(true),
                7 => Fault::Rough(false),
                8 | 9 => Fault::Kill(machine),
                10 | 11 => Fault::PowerCut(coordinator),
                12 => Fault::Blackout,
                13 | 14 => Fault::Freeze(machine, self.dice.range(30, 1_500)),
                15 => Fault::Slow(machine, self.dice.range(2, 8)),
                16 => Fault::DiskError(coordinator, self.dice.range(5, 800)),
                _ if nth > 2 && goes => Fault::Gone(doomed),
                _ => Fault::Kill(machine),
            };
            self.at(at.min(until - 1), Event::Fault(fault));
            at += self.dice.range(10_000, 900_000).min(until / count);
        }
        if loses {
            let when = self.dice.range(until / 4, until);
            self.at(when, Event::Fault(Fault::LoseDisk(unlucky)));
        }
        self.at(until, Event::Calm);
    }

    /// Something goes wrong.
    pub fn fault(&mut self, fault: Fault) {
        if self.calm {
            return;
        }
        self.checks.faults += 1;
        match fault {
            Fault::Cut(from, to) => drop(self.net.cut.insert((from, to))),
            Fault::Isolate(node) => {
                for other in self.machines() {
                    self.net.cut.extend([(node, other), (other, node)]);
                }
            }
            Fault::Mend => self.net.cut.clear(),
            Fault::Rough(rough) => self.net.rough = rough,
            Fault::Kill(node) => self.kill(node, false),
            Fault::PowerCut(node) => self.kill(node, true),
            Fault::Flicker(node) => {
                self.kill(node, true);
                let back = self.now + self.dice.range(500, 15_000);
                self.at(back, Event::Start { at: node });
            }
            Fault::Torn(node) => {
                let all = self.coordinators.keys().copied();
                let others: Vec<NodeId> = all.filter(|other| *other != node).collect();
                for from in &others {
                    let ways = others.iter().filter(|to| *to != from).map(|to| (*from, *to));
                    self.net.cut.extend(ways);
                }
                for _ in 0..12 {
                    let at = self.now + self.dice.range(0, 1_500_000);
                    self.at(at, Event::Fault(Fault::Flicker(node)));
                }
            }
            Fault::Blackout => {
                let all: Vec<NodeId> = self.coordinators.keys().copied().collect();
                all.into_iter().for_each(|node| self.kill(node, true));
            }
            Fault::Freeze(node, ms) => self.freeze(node, self.now + ms * 1_000),
            Fault::Slow(node, factor) => drop(self.net.slow.insert(node, factor)),
            Fault::DiskError(node, ms) => {
                let until = self.now + ms * 1_000;
                if let Some(machine) = self.coordinators.get_mut(&node) {
                    machine.disk_fails_until = until;
                }
            }
            Fault::LoseDisk(node) => self.lose_disk(node),
            Fault::Gone(node) => {
                self.gone = Some(node);
                self.kill(node, false);
            }
        }
    }

    fn kill(&mut self, node: NodeId, power: bool) {
        let bug = self.bug;
        if let Some(machine) = self.coordinators.get_mut(&node) {
            machine.process = None;
            match power {
                true => machine.disk.power_cut(),
                false => machine.disk.sync(bug),
            }
        } else if let Some(worker) = self.workers.get_mut(&node) {
            worker.process = None;
        }
        let back = self.now + self.dice.range(20_000, 1_500_000);
        self.at(back, Event::Start { at: node });
    }

    fn lose_disk(&mut self, node: NodeId) {
        if !self.operator.is_done() || self.operator.old.is_some() {
            return;
        }
        let Some(machine) = self.coordinators.get_mut(&node) else { return };
        machine.process = None;
        if self.bug == Some(Bug::OldIdOnNewDisk) {
            let incarnation = machine.disk.incarnation;
            machine.disk = Disk::default();
            machine.disk.incarnation = incarnation;
            let back = self.now + 30_000;
            return self.at(back, Event::Start { at: node });
        }
        self.coordinators.remove(&node);
        self.operator.begin(node);
        self.at(self.now + 300_000, Event::Replace);
    }

    /// All faults are over.
    pub fn calm_down(&mut self) {
        self.calm = true;
        self.calm_since = self.now;
        self.net.cut.clear();
        self.net.rough = false;
        self.net.slow.clear();
        self.thaw();
        let nodes = self.machines();
        for node in nodes {
            if let Some(machine) = self.coordinators.get_mut(&node) {
                machine.disk_fails_until = 0;
            }
            self.start(node);
        }
        self.at(self.now + 50_000, Event::Check);
    }

    /// Starts a machine's process, where there is none and it is to come back.
    pub fn start(&mut self, node: NodeId) {
        if self.gone == Some(node) {
            return;
        }
        if self.coordinators.get(&node).is_some_and(|machine| machine.process.is_none()) {
            self.start_coordinator(node);
        } else if self.workers.get(&node).is_some_and(|worker| worker.process.is_none()) {
            self.start_worker(node);
        }
    }

    /// The operator's next step.
    pub fn replace_coordinator(&mut self) {
        if self.operator.is_done() {
            return;
        }
        self.at(self.now + 200_000, Event::Replace);
        let waits = self.operator.asked.is_some_and(|asked| self.now < asked + 3_000_000);
        let there: Vec<NodeId> = self.coordinators.keys().copied().collect();
        let Some(at) = self.dice.pick(&there) else { return };
        if waits || self.is_frozen(at) {
            return;
        }
        let (Some(old), new) = (self.operator.old, self.operator.new) else { return };
        let boot = u64::MAX - u64::from(new.map_or(0, |new| new.number));
        let now = self.now;
        let step = self.operator.step;
        let mut key = [9; 32];
        key[..8].copy_from_slice(&now.to_le_bytes());
        let (mut asked, bug) = (false, self.bug);
        self.turn(at, |_, process, _| {
            let change = match (step, new) {
                (0, _) => Change::Node(NodeCommand::Enrol {
                    role: Role::Coordinator,
                    key: KeyFingerprint(key),
                }),
                (1, Some(node)) => Change::Coordinator(CoordinatorCommand::Announce {
                    node,
                    incarnation: Incarnation(1),
                    boot,
                    cluster: address(node, 0, 7_000),
                    build: "sim".into(),
                }),
                (2, Some(new)) => {
                    let voters = process.state.coordinators.voters().iter().copied();
                    let mut voters: BTreeSet<NodeId> = voters.filter(|v| *v != old).collect();
                    voters.insert(new);
                    Change::Coordinator(CoordinatorCommand::SetVoters { voters })
                }
                _ => Change::Coordinator(CoordinatorCommand::Remove { node: old }),
            };
            asked = true;
            process.ask(now, Purpose::Replace(step), Wish::Change(change), bug);
        });
        if asked {
            self.operator.asked = Some(now);
        }
    }

    /// The store has answered the operator.
    pub fn replaced(&mut self, step: u8, answer: &Answered) {
        use shoal_coordinator::control::state::Effect;
        if self.operator.step != step {
            return;
        }
        self.operator.asked = None;
        let Ok(effects) = answer else {
            // Said before, and made after all.
            if step == 3 && answer.as_ref().is_err_and(|no| no.why.contains("not a node")) {
                self.operator.step += 1;
            }
            return;
        };
        if let (0, Some(Effect::NodeAdded { node })) = (step, effects.first()) {
            self.operator.new = Some(*node);
        }
        self.operator.step += 1;
        if let (1, Some(new)) = (step, self.operator.new) {
            self.coordinators.insert(new, Coordinator::default());
            self.at(self.now, Event::Start { at: new });
        }
    }
}
