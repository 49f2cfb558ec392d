//! ○ An operator who cannot leave a cluster alone: while faults go on it scales, drains, undeploys,
//! deploys again and lets a worker join, at whichever coordinator it finds; when they are over it sees to
//! it that what was there at first is wanted again.

use shoal_coordinator::control::state::{
    Change, ClusterState, DeploymentCommand, DrainCommand, Effect, KeyFingerprint, NodeCommand,
};
use shoal_protocol::id::{DeploymentName, NodeId, Role};
use shoal_protocol::plan::StagesAsked;

use super::coordinator::{Answered, Purpose};
use super::genesis::{self, DEPLOYMENTS};
use super::invariants::registers::{Ask, Told};
use super::wire::{Event, Wish};
use super::world::World;

/// Once all is calm: how often it looks whether its last wishes are there.
const LOOK_US: u64 = 700_000;

impl World {
    /// The operator's next idea.
    pub fn alter(&mut self) {
        let later = if self.calm { LOOK_US } else { self.dice.range(150_000, 1_400_000) };
        self.at(self.now + later, Event::Alter);
        let there: Vec<NodeId> = self.coordinators.keys().copied().collect();
        let Some(at) = self.dice.pick(&there) else { return };
        if self.is_frozen(at) {
            return;
        }
        let (now, bug, calm) = (self.now, self.bug, self.calm);
        let idea = if calm { None } else { self.idea() };
        if let Some(Change::Deployment(DeploymentCommand::Remove { name })) = &idea {
            self.operator.removed.insert(name.clone());
        }
        self.turn(at, |world, process, _| {
            let change = if calm { astray(&process.state) } else { idea };
            let Some(change) = change else { return };
            let call = world.noted(&change);
            process.ask(now, Purpose::Alter(call), Wish::Change(change), bug);
        });
    }

    /// Notes a change in the history: the number of the call.
    fn noted(&mut self, change: &Change) -> usize {
        let ask = match change {
            Change::Drain(DrainCommand::Begin { node }) => Some((drained(*node), 0, Ask::Set(1))),
            Change::Drain(DrainCommand::End { node }) => Some((drained(*node), 0, Ask::Set(0))),
            Change::Deployment(DeploymentCommand::Create { spec, .. }) => {
                Some((copies(&spec.name), 1, Ask::Create))
            }
            Change::Deployment(DeploymentCommand::Remove { name }) => {
                Some((copies(name), 1, Ask::Remove))
            }
            Change::Deployment(DeploymentCommand::Scale { name, replicas, .. }) => {
                Some((copies(name), 1, Ask::Scale(*replicas)))
            }
            _ => None,
        };
        let now = self.now;
        let called = ask.map(|(name, first, ask)| {
            let call = self.history.registers.call(&name, first, ask, now);
            (name, call)
        });
        self.history.calls.push(called);
        self.history.calls.len() - 1
    }

    fn idea(&mut self) -> Option<Change> {
        let names: Vec<&str> = DEPLOYMENTS.iter().map(|(name, ..)| *name).collect();
        let name = self.dice.pick(&names)?;
        let (_, layers, stages) = *DEPLOYMENTS.iter().find(|(of, ..)| *of == name)?;
        let workers: Vec<NodeId> = self.workers.keys().copied().collect();
        let node = self.dice.pick(&workers)?;
        // Cut into fewer, "m" fits on no worker.
        let cut = stages + self.dice.range(0, 2) as u32;
        let scale = |name: &str, replicas, stages| {
            let name = DeploymentName::new(name).ok()?;
            Some(Change::Deployment(DeploymentCommand::Scale { name, replicas, stages }))
        };
        match self.dice.range(0, 14) {
            0..=2 => scale(name, Some(1 + u32::from(self.dice.one_in(2))), StagesAsked::Same),
            3 | 4 => scale(name, None, StagesAsked::Exactly(cut)),
            5..=7 => Some(Change::Drain(DrainCommand::Begin { node })),
            8..=10 => Some(Change::Drain(DrainCommand::End { node })),
            11 => {
                let name = DeploymentName::new(name).ok()?;
                Some(Change::Deployment(DeploymentCommand::Remove { name }))
            }
            12 => Some(genesis::deployment(name, layers, stages)),
            _ if workers.len() < 6 => {
                let mut key = [3; 32];
                key[..8].copy_from_slice(&self.now.to_le_bytes());
                let key = KeyFingerprint(key);
                Some(Change::Node(NodeCommand::Enrol { role: Role::Worker, key }))
            }
            _ => None,
        }
    }

    /// The store has answered the operator.
    pub fn altered(&mut self, call: usize, answer: &Answered) {
        let told = match answer {
            Ok(_) => Some(Told::Made),
            Err(no) if no.refused => Some(Told::Refused),
            Err(_) => None,
        };
        let called = self.history.calls.get(call).cloned().flatten();
        if let (Some((name, call)), Some(told)) = (called, told) {
            self.history.registers.told(&name, call, self.now, told);
        }
        let Ok(effects) = answer else { return };
        self.checks.changes += 1;
        if let Some(Effect::NodeAdded { node }) = effects.first()
            && node.role == Role::Worker
        {
            self.workers.insert(*node, genesis::worker());
            self.start(*node);
        }
    }
}

fn drained(node: NodeId) -> String {
    format!("{node} drained")
}

fn copies(name: &DeploymentName) -> String {
    format!("replicas of {name}")
}

/// What the state says of each register: its name, what it was at first, and what it is.
pub fn wanted(state: &ClusterState) -> Vec<(String, u32, u32)> {
    let nodes = state.nodes.workers().map(|(node, _)| node);
    let flags = nodes.map(|node| (drained(node), 0, u32::from(state.drains.contains(node))));
    let counts = DEPLOYMENTS.iter().filter_map(|(name, ..)| {
        let name = DeploymentName::new(*name).ok()?;
        let count = state.deployments.get(&name).map_or(0, |d| d.replicas.len() as u32);
        Some((copies(&name), 1, count))
    });
    flags.chain(counts).collect()
}

/// What is still to be changed so that all is as it was at first.
pub fn astray(state: &ClusterState) -> Option<Change> {
    if let Some((node, _)) = state.drains.iter().next() {
        return Some(Change::Drain(DrainCommand::End { node }));
    }
    for (name, layers, stages) in DEPLOYMENTS {
        let known = state.deployments.iter().find(|(of, _)| of.as_str() == name);
        match known {
            None => return Some(genesis::deployment(name, layers, stages)),
            Some((name, deployment)) if deployment.replicas.len() != 1 => {
                let (name, replicas, stages) = (name.clone(), Some(1), StagesAsked::Same);
                return Some(Change::Deployment(DeploymentCommand::Scale {
                    name,
                    replicas,
                    stages,
                }));
            }
            Some(_) => {}
        }
    }
    None
}
