//! A whole cluster in one thread, under a clock, a network and disks of its own, from a seed.
//!
//! ```text
//! seed ─► dice ─► faults, delays, elections ─► events in order of time ─► shells ─► real cores
//!                                                                            └► invariants ─► Report
//! ```
//!
//! Real are: `Voter` with its log, `Proposals` and `Reads`, `ClusterState`, `reconcile` and the
//! planner, the router, `Recovery` and `Sequence`, `Lifecycle` and `Orders` of the workers, their
//! `Engine`, `StageTable` and sampler, and the `Detector` of both ends. The shells around them are
//! written anew here, as thin as they can be; so a mistake in a real shell is not found here, but by
//! the tests with real processes. What computes is a hash with a KV cache. `docs/decisions/018-the-simulator.md` says what is left out.

mod agents;
mod bug;
mod changes;
mod clients;
mod coordinator;
mod desk;
mod dice;
mod disk;
mod executor;
mod faults;
mod genesis;
mod head;
mod history;
pub mod hunt;
mod invariants;
mod model;
mod net;
mod ring;
mod shard;
mod waits;
mod wire;
mod worker;
mod world;

pub use bug::Bug;
pub use invariants::Violation;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use world::World;

/// How much is counted of a run.
pub const COUNTS: usize = 12;

/// What a run came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// What was not as it must be.
    pub violation: Option<Violation>,
    /// Of everything that happened.
    pub hash: u64,
    /// How much time passed in it.
    pub simulated: Duration,
    /// Events, faults, tokens, attempts that were lost, events of old attempts, reigns, compactions,
    /// operations, quarantined answers, preemptions, changes by the operator, prompts of which a head had
    /// some already.
    pub counts: [u64; COUNTS],
}

/// Runs one seed.
pub fn run(seed: u64, bug: Option<Bug>) -> Report {
    let mut world = World::new(seed, bug);
    let ended = catch_unwind(AssertUnwindSafe(|| world.run()));
    if let Err(panic) = ended {
        let words = panic.downcast_ref::<&str>().map(|words| (*words).to_owned());
        let words = words.or_else(|| panic.downcast_ref::<String>().cloned());
        world.core_panicked(&words.unwrap_or_default());
    }
    let checks = &world.checks;
    Report {
        seed,
        violation: checks.found().cloned(),
        hash: world.hash,
        simulated: Duration::from_micros(world.now),
        counts: [
            world.events,
            checks.faults,
            checks.tokens,
            checks.losses,
            checks.stale,
            checks.reigns() as u64,
            checks.compactions,
            world.history.operations.len() as u64,
            checks.quarantined,
            checks.preemptions,
            checks.changes,
            checks.reused,
        ],
    }
}
