//! ○ What clients of the control plane saw: changes and reads, with when they began and ended.

use shoal_coordinator::control::state::{Change, Effect, KeyFingerprint, NodeCommand};
use shoal_protocol::id::{NodeId, Role};

use super::changes;
use super::coordinator::{Answered, Process, Purpose};
use super::invariants::registers::{Ask, Registers, Told};
use super::wire::{Event, Wish};
use super::world::World;

/// Operations, by number.
#[derive(Default)]
pub struct History {
    /// All of them, in the order in which they began.
    pub operations: Vec<Operation>,
    /// What is wanted of each worker and deployment.
    pub registers: Registers,
    /// The calls of the operator: of which register, and the number there.
    pub calls: Vec<Option<(String, usize)>>,
}

/// One of them.
#[derive(Clone, Debug)]
pub struct Operation {
    /// When it was asked for.
    pub began: u64,
    /// When it was answered, and how; `None`: nobody knows whether it was made.
    pub ended: Option<(u64, Outcome)>,
    /// Whether it only looks.
    pub reads: bool,
}

/// What an operation came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A node was enrolled under this number.
    Enrolled(u32),
    /// There are so many.
    Seen(u32),
    /// An error: for a change, nobody knows.
    Unknown,
}

/// The key that the nth operation enrols, so that one that is made twice shows.
fn key(number: usize) -> KeyFingerprint {
    let mut key = [7; 32];
    key[..8].copy_from_slice(&(number as u64).to_le_bytes());
    KeyFingerprint(key)
}

impl World {
    /// Somebody asks for a change, or reads, somewhere.
    pub fn operate(&mut self) {
        if !self.calm {
            let next = self.now + self.dice.range(10_000, 160_000);
            self.at(next, Event::Operate);
        }
        let lives: Vec<NodeId> = self.coordinators.keys().copied().collect();
        let Some(at) = self.dice.pick(&lives) else { return };
        let number = self.history.operations.len();
        let reads = self.dice.one_in(2);
        let wish = match reads {
            true => Wish::Read,
            false => {
                let enrol = NodeCommand::Enrol { role: Role::Admin, key: key(number) };
                Wish::Change(Change::Node(enrol))
            }
        };
        if self.is_frozen(at) {
            return;
        }
        let operation = Operation { began: self.now, ended: None, reads };
        self.history.operations.push(operation);
        let bug = self.bug;
        self.turn(at, |world, process, _| {
            process.ask(world.now, Purpose::Operation(number), wish, bug);
        });
    }

    /// The store has answered somebody.
    pub fn store_answered(
        &mut self,
        id: NodeId,
        process: &mut Process,
        purpose: Purpose,
        answer: Answered,
    ) {
        match purpose {
            Purpose::Operation(number) => {
                let admins = admins(process);
                let Some(operation) = self.history.operations.get_mut(number) else { return };
                let outcome = match (&answer, operation.reads) {
                    (Ok(_), true) => Outcome::Seen(admins),
                    (Ok(effects), false) => match effects.first() {
                        Some(Effect::NodeAdded { node }) => Outcome::Enrolled(node.number),
                        _ => Outcome::Unknown,
                    },
                    (Err(_), _) => Outcome::Unknown,
                };
                operation.ended = Some((self.now, outcome));
                let began = operation.began;
                if let Outcome::Seen(_) = outcome {
                    for (name, first, value) in changes::wanted(&process.state) {
                        let registers = &mut self.history.registers;
                        let call = registers.call(&name, first, Ask::Read, began);
                        registers.told(&name, call, self.now, Told::Seen(value));
                    }
                }
                self.trace(number as u64);
            }
            Purpose::Proof | Purpose::Adopt => {
                self.executor_answered(id, process, purpose, &answer);
            }
            Purpose::Alter(call) => self.altered(call, &answer),
            Purpose::Replace(step) => self.replaced(step, &answer),
            Purpose::Admit(..) | Purpose::Announce => {}
        }
    }
}

/// How many were enrolled, as this process shows it.
fn admins(process: &Process) -> u32 {
    process.state.nodes.iter().filter(|(node, _)| node.role == Role::Admin).count() as u32
}
