//! How long a token is expected to take through a layout, stage by stage: what `shoal plan --explain` shows
//! and what the planner has chosen by.

use shoal_protocol::mesh::Reduction;
use shoal_protocol::plan::{ReplicaPlan, StagePlan};

use super::cost::{Link, Slices, Times, row_bytes, shared};
use super::memory::Costs;
use super::{Candidate, Inventory, ModelShape, Rate};

/// One stage's part of a token's time, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct StageTime {
    /// Its layers.
    pub compute_ns: u64,
    /// What its ranks tell each other.
    pub told_ns: u64,
    /// The way to the next stage, or of the token back to the head.
    pub hop_ns: u64,
}

impl StageTime {
    /// How long the stage is busy with it.
    pub fn busy_ns(&self) -> u64 {
        self.compute_ns.saturating_add(self.told_ns)
    }
}

/// A token's time.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Prediction {
    /// By stage.
    pub stages: Vec<StageTime>,
    /// What a full pipeline waits for each step: the slowest stage, where all stages compute at once and those of one
    /// machine share what it reads. The planner counts each as if it were alone ([`Prediction::slowest_ns`]).
    pub full_ns: u64,
    /// Whether every worker's rate was measured.
    pub measured: bool,
}

impl Prediction {
    /// All of it: what one stream waits for each token.
    pub fn token_ns(&self) -> u64 {
        self.stages.iter().map(|stage| stage.busy_ns() + stage.hop_ns).sum()
    }

    /// The slowest stage by itself.
    pub fn slowest_ns(&self) -> u64 {
        self.stages.iter().map(StageTime::busy_ns).max().unwrap_or(0)
    }
}

/// What is expected of a layout on these workers. One that is not there counts as one of which nothing is
/// known.
pub fn predict(plan: &ReplicaPlan, shape: &ModelShape, inventory: &Inventory) -> Prediction {
    let find = |node| inventory.workers.iter().find(|worker| worker.node == node);
    let crews: Vec<Vec<Option<&Candidate>>> = plan
        .stages
        .iter()
        .map(|s| s.shards.iter().map(|shard| find(shard.node)).collect())
        .collect();
    let most = crews.iter().map(Vec::len).max().unwrap_or(1);
    let way = |a: Option<&Candidate>, b: Option<&Candidate>| match (a, b) {
        (Some(a), Some(b)) => inventory.link(a, b),
        _ => Link::NEAR,
    };
    let reduction = Reduction::of(plan.numerics);
    let slices = Slices::new(shape, most as u32, (reduction, plan.precision));
    let head = crews.first().and_then(|crew| crew.first().copied().flatten());
    let costs_of = |ranks: usize| -> Vec<Costs<'_>> {
        slices.of(ranks).iter().map(|slice| Costs::of_rank(slice, plan.precision)).collect()
    };
    // What each of some workers reads while the others do.
    let rates_of = |workers: &[Option<&Candidate>]| -> Vec<u64> {
        let present: Vec<_> =
            workers.iter().flatten().map(|worker| (*worker, inventory.rate(worker))).collect();
        let mut known = shared(&present).into_iter();
        let rate = |worker: &Option<&Candidate>| worker.and_then(|_| known.next());
        workers.iter().map(rate).map(|rate| rate.unwrap_or(Rate::ASSUMED.bytes_per_s)).collect()
    };
    let of = |(index, (stage, crew)): (usize, (&StagePlan, &Vec<Option<&Candidate>>))| {
        let costs = costs_of(crew.len());
        let rates = rates_of(crew);
        let pairs = crew.iter().flat_map(|a| crew.iter().map(move |b| (*a, *b)));
        let link = pairs.map(|(a, b)| way(a, b)).fold(Link::NEAR, Link::worse);
        let all_there: Option<Vec<&Candidate>> = crew.iter().copied().collect();
        let link = all_there.map_or(link, |crew| link.of_ranks(&crew));
        let compute_ns = Times::compute_only(shape, &costs, &rates).of(stage.layers);
        let all = Times::new(shape, &costs, &rates, (link, reduction)).of(stage.layers);
        let last = crew.first().copied().flatten();
        let hop_ns = match crews.get(index + 1) {
            Some(next) => way(last, next.first().copied().flatten()).time(row_bytes(shape)),
            None if index > 0 => way(last, head).latency_ns,
            None => 0,
        };
        StageTime { compute_ns, told_ns: all - compute_ns, hop_ns }
    };
    let known = |worker: &Option<&Candidate>| worker.is_some_and(|worker| worker.rate.is_some());
    let stages: Vec<StageTime> = plan.stages.iter().zip(&crews).enumerate().map(of).collect();
    let together = rates_of(&crews.concat());
    let mut together = &together[..];
    let full = plan.stages.iter().zip(&crews).zip(&stages).map(|((stage, crew), alone)| {
        let (rates, behind) = together.split_at(crew.len());
        together = behind;
        let compute_ns = Times::compute_only(shape, &costs_of(crew.len()), rates).of(stage.layers);
        compute_ns.saturating_add(alone.told_ns)
    });
    let full_ns = full.max().unwrap_or(0);
    Prediction { stages, full_ns, measured: crews.iter().flatten().all(known) }
}
