//! What each fault does, and how it is undone.

use std::any::Any;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use shoal_protocol::admin::AdminCall;
use shoal_protocol::id::Role;

use super::Fault;
use super::client::{pass, prompt};
use super::garbage::{Noise, Targets};
use super::report::Row;
use super::trial::{COORDINATORS, DEPLOYMENTS, Trial};
use crate::api::Api;
use crate::proc::cluster::START_TIMEOUT;
use crate::proc::relay::{Hits, Network};
use crate::proc::{Cluster, Signal, signal, wait_until_gone};

/// How long a frozen process stays frozen, and a partition lasts: longer than any silence that is
/// waited for.
const LASTS: Duration = Duration::from_secs(3);

/// A slow process runs a tenth of each of these.
const CYCLE: Duration = Duration::from_millis(20);

/// Changes until a full disk is noticed at the latest: each adds an entry to the log, and a page
/// holds a dozen.
const CHANGES_MAX: usize = 300;

/// One in so many datagrams is damaged.
const DAMAGED_ONE_IN: u32 = 20;

/// A fault on its way.
pub struct Struck {
    pub fault: Fault,
    /// The worker that it hits.
    pub worker: usize,
    /// The one at the other end of that one's layout.
    pub neighbour: usize,
    /// The coordinator that it hits.
    pub coordinator: usize,
    /// Ends when it is dropped.
    pub under_way: Vec<Box<dyn Any>>,
}

impl Struck {
    /// Does it. Returns at once where it lasts until the streams have ended.
    pub fn strike(&mut self, trial: &mut Trial, row: &mut Row) -> Result<()> {
        let Self { fault, worker, coordinator, .. } = *self;
        let targets = match fault {
            Fault::GarbageOutside | Fault::GarbageInside => {
                Some(Targets::of(&trial.cluster, &trial.view(0)?)?)
            }
            _ => None,
        };
        let cluster = &mut trial.cluster;
        match fault {
            Fault::KillHead | Fault::KillLast => cluster.signal_worker(worker, Signal::KILL)?,
            Fault::FreezeWorker => {
                cluster.signal_worker(worker, Signal::STOP)?;
                pass(LASTS);
                cluster.signal_worker(worker, Signal::CONT)?;
            }
            Fault::SlowWorker => {
                let pid = cluster.worker_pid(worker).context("it runs")?;
                self.under_way.push(Box::new(SlowDown::start(pid)));
            }
            Fault::RestartWorker => cluster.signal_worker(worker, Signal::TERM)?,
            Fault::KillLeader | Fault::KillFollower | Fault::KillServing => {
                cluster.signal_coordinator(coordinator, Signal::KILL)?;
            }
            Fault::FreezeLeader => {
                cluster.signal_coordinator(coordinator, Signal::STOP)?;
                pass(LASTS);
                cluster.signal_coordinator(coordinator, Signal::CONT)?;
            }
            Fault::RestartLeader | Fault::StopServing => {
                cluster.signal_coordinator(coordinator, Signal::TERM)?;
            }
            Fault::KillBoth => {
                cluster.signal_worker(worker, Signal::KILL)?;
                cluster.signal_coordinator(coordinator, Signal::KILL)?;
            }
            Fault::FillLeader | Fault::FillFollower => {
                let (disk, pid) = cluster.coordinator_disk(coordinator)?;
                disk.fill(pid)?;
                self.change_until_noticed(trial, row)?;
            }
            Fault::FillWorker => {
                let (disk, pid) = cluster.worker_disk(worker)?;
                disk.fill(pid)?;
                cluster.signal_worker(worker, Signal::KILL)?;
            }
            Fault::GarbageOutside => {
                let targets = targets.context("they were looked up")?;
                self.under_way.push(Box::new(Noise::of_a_stranger(targets)?));
            }
            Fault::GarbageInside => {
                let targets = targets.context("they were looked up")?;
                self.under_way.push(Box::new(Noise::of_members(targets)?));
            }
            Fault::CutLeader
            | Fault::CutWorker
            | Fault::CutWorkerOneWay
            | Fault::CutPair
            | Fault::CutPairOneWay
            | Fault::DamageWorker => self.strike_network(cluster, row)?,
        }
        if fault == Fault::StopServing {
            row.note(asked_while_it_stops(&trial.cluster.api(coordinator)));
        }
        Ok(())
    }

    /// Cuts or damages what the nodes send each other: some of it for a while, some until it is healed.
    fn strike_network(&self, cluster: &Cluster, row: &mut Row) -> Result<()> {
        let network = cluster.network()?;
        let worker = Cluster::worker_ip(self.worker);
        let neighbour = Cluster::worker_ip(self.neighbour);
        let coordinators = (0..COORDINATORS).map(Cluster::coordinator_ip);
        match self.fault {
            Fault::CutLeader => {
                let leader = Cluster::coordinator_ip(self.coordinator);
                both_ways(network, leader, coordinators.filter(|other| *other != leader));
            }
            Fault::CutWorker => both_ways(network, worker, coordinators),
            Fault::CutWorkerOneWay => coordinators.for_each(|other| network.cut(other, worker)),
            Fault::CutPair => both_ways(network, worker, [neighbour].into_iter()),
            Fault::CutPairOneWay => network.cut(worker, neighbour),
            Fault::DamageWorker => network.damage(worker, DAMAGED_ONE_IN),
            other => bail!("`{other}` is no fault of the network"),
        }
        match self.fault {
            Fault::CutLeader | Fault::CutWorker | Fault::CutWorkerOneWay => {
                pass(LASTS);
                mend(cluster, row)
            }
            _ => Ok(()),
        }
    }

    /// Undoes it, and waits until all is well.
    pub fn heal(mut self, trial: &mut Trial, row: &mut Row) -> Result<()> {
        let Self { fault, worker, coordinator, .. } = self;
        self.under_way.clear();
        match fault {
            Fault::KillHead | Fault::KillLast => trial.cluster.restart_worker(worker)?,
            Fault::RestartWorker => {
                ended(trial.cluster.worker_pid(worker))?;
                trial.cluster.restart_worker(worker)?;
            }
            Fault::KillLeader | Fault::KillFollower | Fault::KillServing => {
                trial.cluster.restart_coordinator(coordinator)?;
            }
            Fault::RestartLeader | Fault::StopServing => {
                ended(trial.cluster.coordinator_pid(coordinator))?;
                trial.cluster.restart_coordinator(coordinator)?;
            }
            Fault::KillBoth => {
                trial.cluster.restart_coordinator(coordinator)?;
                trial.cluster.restart_worker(worker)?;
            }
            Fault::FillLeader | Fault::FillFollower => self.room_again(trial, row)?,
            Fault::FillWorker => self.start_without_room(trial, row)?,
            Fault::CutPair | Fault::CutPairOneWay => self.no_neighbours(trial, row)?,
            Fault::DamageWorker => mend(&trial.cluster, row)?,
            Fault::FreezeWorker
            | Fault::FreezeLeader
            | Fault::SlowWorker
            | Fault::GarbageOutside
            | Fault::GarbageInside
            | Fault::CutLeader
            | Fault::CutWorker
            | Fault::CutWorkerOneWay => {}
        }
        trial.until_ready()
    }

    /// Changes the state until the coordinator whose disk is full has said so in its log. Others take
    /// the changes meanwhile, or it answers why not.
    fn change_until_noticed(&self, trial: &mut Trial, row: &mut Row) -> Result<()> {
        let name = format!("c{}", self.coordinator + 1);
        for made in 0..CHANGES_MAX {
            let words = "the control state cannot be written";
            let noticed = |(who, line): &(String, String)| *who == name && line.contains(words);
            if trial.said().iter().any(noticed) {
                row.note(format!("noticed after {made} changes at most"));
                return Ok(());
            }
            if let Err(error) = change(&trial.cluster, self.coordinator) {
                row.note(format!("it answered: {error}"));
            }
        }
        bail!("{name} took {CHANGES_MAX} changes with a full disk")
    }

    /// The others take changes without it; once there is room it takes part again.
    fn room_again(&self, trial: &mut Trial, row: &mut Row) -> Result<()> {
        let other = (self.coordinator + 1) % COORDINATORS;
        let until = Instant::now() + START_TIMEOUT;
        while let Err(error) = change(&trial.cluster, other) {
            if Instant::now() > until {
                return Err(error.context("no change is taken where there is room"));
            }
        }
        let (disk, pid) = trial.cluster.coordinator_disk(self.coordinator)?;
        disk.free(pid)?;
        let name = format!("c{}", self.coordinator + 1);
        let again = |(who, line): &(String, String)| {
            *who == name && line.contains("the control state can be written again")
        };
        while !trial.said().iter().any(again) {
            if Instant::now() > until {
                bail!("{name} has room again and does not say so");
            }
            pass(Duration::from_millis(50));
        }
        while let Err(error) = change(&trial.cluster, self.coordinator) {
            if Instant::now() > until {
                return Err(error.context("no change is taken where there is room again"));
            }
        }
        row.note("the others went on, and it took changes again once there was room");
        Ok(())
    }

    fn start_without_room(&self, trial: &mut Trial, row: &mut Row) -> Result<()> {
        let (disk, _) = trial.cluster.worker_disk(self.worker)?;
        if disk.is_mounted() {
            // Once more: what the process had is free since it was killed.
            disk.fill(None)?;
            match trial.cluster.restart_worker(self.worker) {
                Ok(()) => row.note("it started all the same"),
                Err(error) if error.to_string().contains("No space left") => {
                    row.note("its start says `No space left on device`");
                }
                Err(error) => return Err(error.context("the reason is not the disk")),
            }
        }
        let (disk, _) = trial.cluster.worker_disk(self.worker)?;
        disk.free(None)?;
        trial.cluster.restart_worker(self.worker)
    }

    /// The deployment is served while the two still do not reach each other, and they are not made
    /// neighbours again.
    fn no_neighbours(&self, trial: &mut Trial, row: &mut Row) -> Result<()> {
        trial.until_served()?;
        for name in DEPLOYMENTS {
            let holders = trial.holders(0, name)?;
            if holders.contains(&self.worker) && holders.contains(&self.neighbour) {
                bail!("{name} is served by two workers that do not reach each other: {holders:?}");
            }
        }
        mend(&trial.cluster, row)?;
        row.note("the next layout did not make them neighbours");
        Ok(())
    }
}

fn both_ways(network: &Network, one: IpAddr, others: impl Iterator<Item = IpAddr>) {
    for other in others {
        network.cut(one, other);
        network.cut(other, one);
    }
}

/// Everything passes again. A fault that has hit nothing has shown nothing.
fn mend(cluster: &Cluster, row: &mut Row) -> Result<()> {
    let Hits { dropped, damaged } = cluster.network()?.mend();
    ensure!(dropped + damaged > 0, "the network was told to drop or damage, and nothing was hit");
    row.hits.dropped += dropped;
    row.hits.damaged += damaged;
    Ok(())
}

/// What a client hears that asks a coordinator which was told to stop.
fn asked_while_it_stops(url: &str) -> String {
    match Api::new(url, DEPLOYMENTS[0]).complete(prompt(), json!({"max_tokens": 1})) {
        Ok(answer) => {
            let code = &answer.body["error"]["code"];
            format!("a new request meanwhile: HTTP {}, code {code}", answer.status)
        }
        Err(_) => "a new request meanwhile finds nobody there".to_owned(),
    }
}

/// A small change of the state, by way of a coordinator.
fn change(cluster: &Cluster, through: usize) -> Result<()> {
    let call = AdminCall::CreateToken { role: Role::Worker, uses: 1, expires_s: 1 };
    cluster.admin(through)?.call(call).map(drop)
}

/// Waits for the end of a process that was told to stop.
fn ended(pid: Option<u32>) -> Result<()> {
    let pid = pid.context("it ran")?;
    if !wait_until_gone(pid, START_TIMEOUT)? {
        bail!("{pid} did not end within {START_TIMEOUT:?}");
    }
    Ok(())
}

/// A process that runs a tenth of the time, until this is dropped.
#[derive(Debug)]
pub struct SlowDown {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl SlowDown {
    /// Slows it down.
    pub fn start(pid: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) && signal(pid, Signal::STOP).is_ok() {
                pass(CYCLE * 9 / 10);
                let _ = signal(pid, Signal::CONT);
                pass(CYCLE / 10);
            }
            let _ = signal(pid, Signal::CONT);
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for SlowDown {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
