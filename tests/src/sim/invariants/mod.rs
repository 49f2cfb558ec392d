//! ○ What must always be so: one file each, and what they remember.
//!
//! The shells report to [`Checks`] what happens; the first thing that must not be ends the run.

mod blocks;
mod committed_stays;
mod cores;
mod disks;
mod heals;
mod latest_leader;
mod linear;
mod memory;
mod once;
mod one_leader;
mod one_plan;
mod one_voice;
mod places;
pub mod registers;
mod stages;
mod streams;

use std::collections::BTreeMap;
use std::sync::Arc;

use shoal_coordinator::control::state::{ClusterState, Command};
use shoal_protocol::id::{Generation, Incarnation, NodeId, ReplicaId};
use shoal_protocol::plan::ReplicaPlan;

/// Something that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which invariant.
    pub invariant: &'static str,
    /// What was seen.
    pub words: String,
}

/// What the invariants remember of a run, and what is counted.
#[derive(Default)]
pub struct Checks {
    found: Option<Violation>,
    /// Who led in each term.
    reigns: BTreeMap<u64, NodeId>,
    /// The state behind each entry that was applied.
    states: BTreeMap<u64, Arc<ClusterState>>,
    /// The layout behind each number that was given.
    layouts: BTreeMap<(ReplicaId, Generation), ReplicaPlan>,
    offers: BTreeMap<(NodeId, Incarnation, u64), u32>,
    /// Snapshots that took the place of entries.
    pub compactions: u64,
    /// Attempts at heads.
    pub attempts: u64,
    /// Attempts that were lost.
    pub losses: u64,
    /// Events of old attempts.
    pub stale: u64,
    /// Answers that were given up as poisonous.
    pub quarantined: u64,
    /// Sequences that had to give their blocks back.
    pub preemptions: u64,
    /// Changes of what is to be.
    pub changes: u64,
    /// Prompts of which a head had some already.
    pub reused: u64,
    /// Tokens that heads made.
    pub tokens: u64,
    /// Things that went wrong.
    pub faults: u64,
}

impl Checks {
    /// Notes the first violation.
    pub fn violate(&mut self, invariant: &'static str, words: String) {
        self.found.get_or_insert(Violation { invariant, words });
    }

    /// The first violation.
    pub fn found(&self) -> Option<&Violation> {
        self.found.as_ref()
    }

    /// Leaders that were seen.
    pub fn reigns(&self) -> usize {
        self.reigns.len()
    }

    /// How often a command was offered before.
    pub fn offered(&mut self, command: &Command) -> u32 {
        let times =
            self.offers.entry((command.client, command.incarnation, command.sequence)).or_default();
        *times += 1;
        *times - 1
    }
}
