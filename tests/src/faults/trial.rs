//! One cluster, and one fault after the other on it.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use shoal_protocol::admin::{ClusterView, DeploymentPhase};
use shoal_protocol::plan::{ModelSource, PretendSpec};

use super::client::{Stream, full_prefill};
use super::report::Row;
use super::strike::Struck;
use super::{Fault, Parts, Scene};
use crate::proc::Cluster;
use crate::proc::cluster::{Options, START_TIMEOUT};
use crate::proc::disk;
use crate::proc::logs::now_of_day;

/// Coordinators, all of which vote.
pub const COORDINATORS: usize = 3;

/// Workers: two for each deployment's stages; where one is lost, another holds two shards.
pub const WORKERS: usize = 4;

/// What is served.
pub const DEPLOYMENTS: [&str; 2] = ["one", "two"];

/// Streams at once, over both deployments.
const STREAMS: usize = 4;

/// Tokens of a stream: at 1 ms and more each it outlasts detection, an election and a new layout.
const TOKENS: usize = 400;

/// A pause that is longer than usual by less says nothing of a fault: two steps of this model.
const STALLED: Duration = Duration::from_millis(20);

/// The last lines that are shown of a run that failed.
const LAST_WORDS: usize = 40;

/// A cluster that serves.
pub struct Trial {
    pub(super) cluster: Cluster,
    scene: Scene,
    /// What each deployment answers, undisturbed.
    expected: Vec<Vec<u64>>,
    /// The longest gaps of undisturbed streams, sorted.
    pub(super) usual: Vec<Duration>,
    /// How long a prompt as long as a whole answer takes to its first token: the median of five.
    pub(super) full_prefill: Duration,
    /// Lines that were there before the run.
    told: usize,
}

impl Trial {
    pub fn new(scene: Scene) -> Result<Self> {
        let options = Options { relayed: scene == Scene::Relayed, disks: scene == Scene::Direct };
        let cluster = Cluster::start_for(options, COORDINATORS, WORKERS)?;
        for (seed, name) in DEPLOYMENTS.iter().enumerate() {
            let model = PretendSpec {
                layers: 4,
                hidden: 64,
                vocab: 1000,
                max_context: 2048,
                seed: seed as u64 + 1,
                layer_step_ns: 250_000,
                layer_row_ns: 0,
                layer_weight_bytes: 1 << 20,
            };
            cluster.admin(0)?.deploy(name, ModelSource::Pretend(model), 2)?;
        }
        let mut trial = Self {
            cluster,
            scene,
            expected: Vec::new(),
            usual: Vec::new(),
            full_prefill: Duration::ZERO,
            told: 0,
        };
        trial.until_ready()?;
        trial.look_at_the_undisturbed()?;
        Ok(trial)
    }

    fn look_at_the_undisturbed(&mut self) -> Result<()> {
        for deployment in 0..DEPLOYMENTS.len() {
            let mut first = None;
            for coordinator in 0..COORDINATORS {
                let seen = self.stream(coordinator, deployment).finish()?;
                if let Some(error) = seen.error {
                    bail!("an undisturbed stream failed: {error}");
                }
                self.usual.push(seen.longest);
                if first.get_or_insert(seen.tokens.clone()) != &seen.tokens {
                    bail!("two undisturbed streams differ");
                }
            }
            self.expected.extend(first);
        }
        self.usual.sort();
        let prefill = |_| full_prefill(&self.cluster.api(0), DEPLOYMENTS[0], TOKENS + 32);
        let mut prefills: Vec<_> = (0..5).map(prefill).collect::<Result<_>>()?;
        prefills.sort();
        self.full_prefill = prefills[prefills.len() / 2];
        Ok(())
    }

    /// How disks are filled, where this cluster has some.
    pub fn disks(&self) -> Option<&'static str> {
        let disk = |index| Some(self.cluster.coordinator_disk(index).ok()?.0);
        let disks: Vec<_> = (0..COORDINATORS).filter_map(disk).collect();
        (self.scene == Scene::Direct).then(|| disk::means(&disks))
    }

    fn stream(&self, coordinator: usize, deployment: usize) -> Stream {
        let name = DEPLOYMENTS[deployment];
        Stream::start(self.cluster.api(coordinator), name, deployment, TOKENS)
    }

    /// Until everybody is connected to every coordinator and serves.
    pub fn until_ready(&self) -> Result<()> {
        for coordinator in 0..COORDINATORS {
            let admin = self.cluster.admin(coordinator)?;
            admin.wait_until("all connected", START_TIMEOUT, |view| {
                view.workers.iter().filter(|worker| worker.connected).count() == WORKERS
            })?;
        }
        self.until_served()
    }

    /// Until both deployments are ready in everybody's eyes.
    pub fn until_served(&self) -> Result<()> {
        for coordinator in 0..COORDINATORS {
            let admin = self.cluster.admin(coordinator)?;
            for name in DEPLOYMENTS {
                admin.wait_for_phase(name, DeploymentPhase::Ready, START_TIMEOUT)?;
            }
        }
        Ok(())
    }

    /// What a coordinator sees now.
    pub fn view(&self, seen_by: usize) -> Result<ClusterView> {
        self.cluster.admin(seen_by)?.wait_until("there", START_TIMEOUT, |_| true)
    }

    /// The workers of a deployment's layout, in the order of its stages.
    pub fn holders(&self, seen_by: usize, deployment: &str) -> Result<Vec<usize>> {
        let view = self.view(seen_by)?;
        let plan = view.plan.replicas.iter().find(|r| r.deployment.as_str() == deployment);
        let plan = plan.context("the deployment has a layout")?;
        Ok(plan.nodes().map(|node| node.number as usize - 1).collect())
    }

    /// One run of one fault.
    pub fn once(&mut self, fault: Fault, n: usize, row: &mut Row) -> Result<()> {
        self.told = self.cluster.said().len();
        let leader = self.cluster.leader(0)?;
        let coordinator = match fault {
            Fault::KillFollower | Fault::FillFollower => (leader + 1 + n % 2) % COORDINATORS,
            Fault::KillServing | Fault::StopServing => n % COORDINATORS,
            _ => leader,
        };
        let clients: Vec<_> = (0..COORDINATORS)
            .filter(|index| !fault.is_avoided() || *index != coordinator)
            .filter(|index| !fault.breaks_its_clients() || *index == coordinator)
            .collect();
        let holders = self.holders(clients[0], DEPLOYMENTS[n % DEPLOYMENTS.len()])?;
        let last = fault == Fault::KillLast;
        let worker = if last { holders[holders.len() - 1] } else { holders[0] };
        let neighbour = holders[holders.len() - 1];
        let streams: Vec<_> = (0..STREAMS)
            .map(|i| self.stream(clients[i % clients.len()], i % DEPLOYMENTS.len()))
            .collect();
        for stream in &streams {
            stream.wait_until_begun(START_TIMEOUT)?;
        }
        let at = now_of_day()?;
        let mut struck = Struck { fault, worker, neighbour, coordinator, under_way: Vec::new() };
        struck.strike(self, row)?;
        let mut worst = (Duration::ZERO, 0.0);
        let mut stalls = Vec::new();
        for stream in streams {
            let seen = stream.finish()?;
            row.judge(&seen, &self.expected[seen.deployment]);
            if seen.error.is_none() {
                stalls.push(seen.longest);
                worst = if seen.longest > worst.0 { (seen.longest, seen.until) } else { worst };
            } else {
                self.ask_again(coordinator, seen.deployment, row)?;
            }
        }
        self.take_apart(at, worst, &stalls, row);
        struck.heal(self, row)?;
        row.runs += 1;
        self.no_panics()
    }

    /// Whoever lost its coordinator asks another one, and has all of its answer.
    fn ask_again(&self, not: usize, deployment: usize, row: &mut Row) -> Result<()> {
        if !row.fault.breaks_its_clients() {
            return Ok(());
        }
        let seen = self.stream((not + 1) % COORDINATORS, deployment).finish()?;
        if seen.error.is_some() || seen.tokens != self.expected[deployment] {
            bail!("asked again elsewhere: {:?}, {} tokens", seen.error, seen.tokens.len());
        }
        row.note("each client that lost its coordinator had all of its answer from another one");
        Ok(())
    }

    fn take_apart(
        &mut self,
        at: f64,
        (longest, until): (Duration, f64),
        stalls: &[Duration],
        row: &mut Row,
    ) {
        let usual = self.usual.last().copied().unwrap_or_default();
        let least = usual + STALLED;
        let count = stalls.iter().filter(|stall| **stall > least).count() as u32;
        if longest <= least {
            return;
        }
        let prefills = self.full_prefill * count;
        let Some(parts) = Parts::of(&self.cluster.said()[self.told..], at, until) else { return };
        let bound = parts.bound(prefills);
        row.within.0 += stalls.iter().filter(|stall| **stall <= bound).count();
        row.within.1 += stalls.len();
        row.parts.push(parts);
    }

    /// What was said in this run.
    pub fn said(&mut self) -> &[(String, String)] {
        let told = self.told;
        &self.cluster.said()[told..]
    }

    fn no_panics(&mut self) -> Result<()> {
        match self.said().iter().find(|(_, line)| line.contains("panicked at")) {
            Some((who, line)) => bail!("{who}: {line}"),
            None => Ok(()),
        }
    }

    /// The last lines of all, for a run that failed.
    pub fn last_words(&mut self) -> String {
        let mut lines: Vec<_> =
            self.said().iter().map(|(who, line)| format!("{line} [{who}]")).collect();
        lines.sort();
        lines.split_off(lines.len().saturating_sub(LAST_WORDS)).join("\n")
    }
}
