//! Faults on real processes: a cluster under load, a fault, and what its clients saw of it.
//!
//! ```text
//! for each fault, so often: streams run ─► fault ─► they run to their end ─► compared with undisturbed ones ─► heal
//! ```
//!
//! Every stream is compared token by token with what the same request gave before any fault. Real
//! models and real clients are in the e2e tests; here the tokens are a pretend model's, so that a run
//! takes seconds and any token that is lost, doubled or another shows.
//!
//! Faults of the network need one that can be cut (`proc::relay`), which hides what a killed process's
//! host says; so there are two clusters, one after the other ([`Scene`]).

mod client;
mod garbage;
mod parts;
mod report;
mod strike;
mod trial;

use std::fmt;

use anyhow::{Context, Result};

pub use parts::Parts;
pub use report::{Report, Row};
pub use strike::SlowDown;
use trial::Trial;

/// What is done to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// kill -9 of a worker with the head of the first deployment.
    KillHead,
    /// kill -9 of the worker with its last stage.
    KillLast,
    /// SIGSTOP of a worker, SIGCONT three seconds later.
    FreezeWorker,
    /// A worker runs a tenth of the time, until the streams have ended.
    SlowWorker,
    /// SIGTERM of a worker: it drains, and is started again.
    RestartWorker,
    /// kill -9 of the coordinator that leads; streams go through the others.
    KillLeader,
    /// kill -9 of a coordinator that follows; streams go through the others.
    KillFollower,
    /// SIGSTOP of the leader, SIGCONT three seconds later; streams go through the others.
    FreezeLeader,
    /// SIGTERM of the leader, which is started again; streams go through the others.
    RestartLeader,
    /// kill -9 of a worker and of the leader at once.
    KillBoth,
    /// kill -9 of the coordinator that the clients talk to.
    KillServing,
    /// SIGTERM of the coordinator that the clients talk to.
    StopServing,
    /// The leader's disk is full.
    FillLeader,
    /// A follower's disk is full.
    FillFollower,
    /// A worker's disk is full; it is killed, cannot start, and can once there is room.
    FillWorker,
    /// Noise at every port, UDP and TCP, from a stranger.
    GarbageOutside,
    /// Noise inside conversations that a node's certificate opens.
    GarbageInside,
    /// The leader and the other coordinators do not reach each other; workers and clients reach all.
    CutLeader,
    /// A worker and the coordinators do not reach each other.
    CutWorker,
    /// Two workers of a layout do not reach each other.
    CutPair,
    /// One of two workers does not reach the other.
    CutPairOneWay,
    /// What a worker's coordinators send does not reach it; what it sends does.
    CutWorkerOneWay,
    /// One in twenty datagrams to a worker has a bit turned.
    DamageWorker,
}

/// What a fault needs around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scene {
    /// Processes that reach each other directly, each with a disk of its own.
    Direct,
    /// A network that can be cut.
    Relayed,
}

impl Fault {
    /// Every kind.
    pub const ALL: [Fault; 23] = [
        Fault::KillHead,
        Fault::KillLast,
        Fault::FreezeWorker,
        Fault::SlowWorker,
        Fault::RestartWorker,
        Fault::KillLeader,
        Fault::KillFollower,
        Fault::FreezeLeader,
        Fault::RestartLeader,
        Fault::KillBoth,
        Fault::KillServing,
        Fault::StopServing,
        Fault::FillLeader,
        Fault::FillFollower,
        Fault::FillWorker,
        Fault::GarbageOutside,
        Fault::GarbageInside,
        Fault::CutLeader,
        Fault::CutWorker,
        Fault::CutPair,
        Fault::CutPairOneWay,
        Fault::CutWorkerOneWay,
        Fault::DamageWorker,
    ];

    /// Where it is done.
    pub fn scene(self) -> Scene {
        match self {
            Fault::CutLeader
            | Fault::CutWorker
            | Fault::CutPair
            | Fault::CutPairOneWay
            | Fault::CutWorkerOneWay
            | Fault::DamageWorker => Scene::Relayed,
            _ => Scene::Direct,
        }
    }

    /// Whether the clients talk to the very process that it hits.
    pub fn breaks_its_clients(self) -> bool {
        matches!(self, Fault::KillServing | Fault::StopServing)
    }

    /// Whether clients keep away from the coordinator that it hits.
    fn is_avoided(self) -> bool {
        matches!(
            self,
            Fault::KillLeader
                | Fault::KillFollower
                | Fault::FreezeLeader
                | Fault::RestartLeader
                | Fault::KillBoth
        )
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::KillHead => "kill -9 a worker with a head",
            Fault::KillLast => "kill -9 a worker with a last stage",
            Fault::FreezeWorker => "SIGSTOP a worker, SIGCONT after 3 s",
            Fault::SlowWorker => "a worker runs 10 % of the time",
            Fault::RestartWorker => "SIGTERM a worker, start it again",
            Fault::KillLeader => "kill -9 the leader",
            Fault::KillFollower => "kill -9 a follower",
            Fault::FreezeLeader => "SIGSTOP the leader, SIGCONT after 3 s",
            Fault::RestartLeader => "SIGTERM the leader, start it again",
            Fault::KillBoth => "kill -9 a worker and the leader",
            Fault::KillServing => "kill -9 the coordinator of the clients (*)",
            Fault::StopServing => "SIGTERM the coordinator of the clients (*)",
            Fault::FillLeader => "the leader's disk is full",
            Fault::FillFollower => "a follower's disk is full",
            Fault::FillWorker => "a worker's disk is full, kill -9, start, room, start",
            Fault::GarbageOutside => "noise at every port",
            Fault::GarbageInside => "noise behind a node's certificate",
            Fault::CutLeader => "the leader cut from the followers, 3 s",
            Fault::CutWorker => "a worker cut from all coordinators, 3 s",
            Fault::CutPair => "two neighbours cut from each other",
            Fault::CutPairOneWay => "two neighbours cut, one way",
            Fault::CutWorkerOneWay => "a worker hears no coordinator, 3 s",
            Fault::DamageWorker => "1 of 20 datagrams to a worker damaged",
        })
    }
}

/// Does each of these faults so often.
pub fn run(faults: &[Fault], times: usize, mut say: impl FnMut(&str)) -> Result<Report> {
    let mut report = Report::default();
    for scene in [Scene::Direct, Scene::Relayed] {
        let here: Vec<_> = faults.iter().filter(|fault| fault.scene() == scene).collect();
        if here.is_empty() {
            continue;
        }
        let mut trial = Trial::new(scene)?;
        report.begin(&trial);
        for fault in here {
            let mut row = Row::new(*fault);
            for n in 0..times {
                let at = std::time::Instant::now();
                trial.once(*fault, n, &mut row).with_context(|| {
                    format!("{fault}, run {n}; the last words were:\n{}", trial.last_words())
                })?;
                say(&format!("{fault}: {} of {times} ({:.1?})", n + 1, at.elapsed()));
            }
            report.rows.push(row.finished());
        }
    }
    report.usual.sort();
    Ok(report)
}
