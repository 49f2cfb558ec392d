//! **A command is applied once, and a number is never given twice.** Each change enrols a key of its
//! own, so one that is applied twice shows as a key under two numbers.

use std::collections::BTreeMap;

use shoal_protocol::id::Role;

use crate::sim::history::Outcome;
use crate::sim::world::World;

impl World {
    /// Looks at a final state and at all acknowledgements.
    pub fn check_once(&mut self) {
        let mut wrong = Vec::new();
        let process = self.coordinators.values().find_map(|machine| machine.process.as_ref());
        let mut keys = BTreeMap::new();
        for (node, record) in process.into_iter().flat_map(|process| process.state.nodes.iter()) {
            if node.role != Role::Admin {
                continue;
            }
            if let Some(other) = keys.insert(record.key.0, node) {
                wrong.push(format!("one command enrolled both {other} and {node}"));
            }
        }
        let mut given = BTreeMap::new();
        for (number, operation) in self.history.operations.iter().enumerate() {
            let Some((_, Outcome::Enrolled(node))) = operation.ended else { continue };
            if let Some(other) = given.insert(node, number) {
                wrong.push(format!("operations {other} and {number} both got number {node}"));
            }
            if !keys.values().any(|known| known.number == node) {
                wrong.push(format!("operation {number} got number {node}, which nobody has"));
            }
        }
        if let Some(words) = wrong.into_iter().next() {
            self.violate("once", words);
        }
    }
}
