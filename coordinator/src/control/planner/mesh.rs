//! Stages, ranks and layers chosen together, by what was measured.
//!
//! ```text
//! ask ─► how many stages and ranks may be ─► most generous limits under which any layout fits
//!     ─► space (which crews, which orders) ─► chain (exact search) ─► seats ─► ReplicaPlan
//! ```
//!
//! Of layouts with the least predicted time per token (or whose slowest stage is the fastest) it takes one
//! that reads the fewest bytes anew, and of those the most even one. Who asked for nothing gets a stage for each worker and layers spread
//! evenly, as `placement` makes them: no measurement moves a layer there.

use shoal_protocol::id::RankIndex;
use shoal_protocol::mesh::{MeshAsked, Objective, Reduction};
use shoal_protocol::plan::{Numerics, ReplicaLimits, ReplicaPlan, ShardPlan, StagePlan};
use shoal_protocol::units::{Bytes, LayerRange};

use super::cells::Way;
use super::chain::{Problem, Score, Weights};
use super::cost::{Slices, row_bytes, seats};
use super::memory::{self, Costs};
use super::refusal::MeshFit;
use super::space::{self, Bounds, Member, Space};
use super::spaces::{self, Spaces, rates_of};
use super::split::{RankSums, ranks_max};
use super::{Candidate, Inventory, Job, ModelShape, PlanRefusal, candidates, refusal};

/// The numbers of ranks that are tried where it is left open. Beyond the last one the ranks tell each other
/// more than they save, on any network that we know; each costs some milliseconds of planning.
const RANKS_TRIED: [usize; 6] = [1, 2, 3, 4, 6, 8];

/// What may be chosen.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub stages: Option<u32>,
    pub ranks: Vec<usize>,
    /// Whether the number of ranks is asked for: then nobody has to say that it computes as one.
    pub explicit: bool,
    pub objective: Objective,
    pub reduction: Reduction,
}

/// By stage: its layers, and its workers in rank order.
type Stages<'w> = Vec<(LayerRange, Vec<&'w Candidate>)>;

/// A layout as the search found it.
struct Found<'w> {
    score: Score,
    limits: ReplicaLimits,
    stages: Stages<'w>,
}

/// The layout for a job that asks for more than stages.
pub(super) fn plan(
    inventory: &Inventory,
    job: &Job<'_>,
    share: usize,
) -> Result<ReplicaPlan, PlanRefusal> {
    let mut workers = candidates(inventory, Numerics::N1)?;
    let mut wanted = wanted(job, workers.len())?;
    if !wanted.explicit && !workers.iter().all(|worker| worker.speaks_ranks) {
        // Whoever has a stage of a layout is told all of it, also where others have the ranks.
        wanted.ranks = vec![1];
    }
    if wanted.ranks.iter().all(|ranks| *ranks > 1) {
        let all = workers.len();
        workers.retain(|worker| worker.speaks_ranks);
        let needs = wanted.stages.unwrap_or(1) as usize * wanted.ranks[0];
        if workers.len() < needs {
            return Err(PlanRefusal::NoRanks { able: workers.len(), workers: all });
        }
    }
    let precision = job.spec.precision.unwrap_or(job.shape.stored());
    let kv = job.ask.kv.unwrap_or_default();
    let most = wanted.ranks.iter().copied().max().unwrap_or(1);
    let slices = Slices::new(job.shape, most as u32, (wanted.reduction, precision));
    let of = |ranks: usize| -> Vec<Costs<'_>> {
        let needed = ranks == 1 || wanted.ranks.contains(&ranks);
        let shapes = slices.of(ranks).iter().filter(|_| needed);
        shapes.map(|slice| Costs::of_rank(slice, precision).holding_kv(kv)).collect()
    };
    let costs: Vec<Vec<Costs<'_>>> = (1..=most).map(of).collect();
    let weights = costs.iter().map(|ranks| spaces::weights(ranks)).collect();
    let search =
        Search { inventory, job, wanted: &wanted, costs: &costs, weights, workers: &workers };
    let found = match wanted.stages {
        // Any of them: how many follows from the mesh.
        Some(_) => search.best(workers.len()),
        // Its share of the workers; more only where it does not fit otherwise.
        None => search.best(share).or_else(|| search.best(workers.len())),
    };
    let Some(found) = found else {
        return Err(search.refusal());
    };
    Ok(search.plan(found))
}

/// What is asked for, checked against the model.
fn wanted(job: &Job<'_>, workers: usize) -> Result<Wanted, PlanRefusal> {
    let layers = job.shape.layers();
    let (stages, ranks) = match (job.ask.mesh, job.spec.stages) {
        (Some(MeshAsked::Exactly(mesh)), _) => (Some(mesh.stages), Some(mesh.ranks)),
        // A number of stages is that of a mesh with one rank.
        (None, Some(stages)) => (Some(stages), Some(1)),
        (Some(MeshAsked::Auto) | None, _) => (None, None),
    };
    let reduction = job.ask.reduction.unwrap_or_default();
    let precision = job.spec.precision.unwrap_or(job.shape.stored());
    let (most, what) = ranks_max(job.shape, reduction, precision);
    match (stages, ranks) {
        (Some(0), _) | (_, Some(0)) => return Err(PlanRefusal::NoStages),
        (Some(stages), _) if stages > layers => {
            return Err(PlanRefusal::TooManyStages { stages, layers });
        }
        (_, Some(ranks)) if ranks > most => {
            let (exact, _) = ranks_max(job.shape, Reduction::Exact, precision);
            return Err(PlanRefusal::TooManyRanks(RankSums { units: most, what, ranks, exact }));
        }
        (Some(stages), Some(1)) if stages as usize > workers => {
            return Err(PlanRefusal::TooFewWorkers { stages, workers });
        }
        (Some(stages), Some(ranks)) if u64::from(stages) * u64::from(ranks) > workers as u64 => {
            return Err(PlanRefusal::TooFewForMesh { stages, ranks, workers, most, layers });
        }
        _ => {}
    }
    let tried = RANKS_TRIED.into_iter().filter(|n| *n <= workers && *n as u32 <= most);
    Ok(Wanted {
        stages,
        ranks: match ranks {
            Some(ranks) => vec![ranks as usize],
            None => tried.collect(),
        },
        explicit: ranks.is_some(),
        objective: job.ask.objective.unwrap_or_default(),
        reduction,
    })
}

struct Search<'a, 'w> {
    inventory: &'a Inventory,
    job: &'a Job<'a>,
    wanted: &'a Wanted,
    /// By ranks less one, then by rank.
    costs: &'a [Vec<Costs<'a>>],
    /// What stages of so many ranks (less one) hold.
    weights: Vec<Weights>,
    workers: &'a [&'w Candidate],
}

impl<'w> Search<'_, 'w> {
    /// The best layout on at most so many workers, under the most generous limits that any layout fits.
    fn best(&self, workers: usize) -> Option<Found<'w>> {
        let whole = &self.costs[0][0];
        let places = space::places(self.inventory, self.workers);
        // Ranks of a stage are in one place; where that is worse they may be anywhere, over the worst way.
        let one = vec![0; self.workers.len()];
        let apart =
            places.iter().any(|place| *place > 0) && self.wanted.ranks.iter().any(|r| *r > 1);
        let mut here = self.spaces(&places, workers);
        let mut everywhere = apart.then(|| self.spaces(&one, workers));
        let most = self.wanted.stages.map_or(workers.min(whole.layers() as usize), |s| s as usize);
        memory::limits_to_try(whole, most).into_iter().find_map(|limits| {
            let here = self.under(&limits, &mut here);
            let there = everywhere.as_mut().and_then(|spaces| self.under(&limits, spaces));
            match (here, there) {
                (Some(here), Some(there)) if there.score.0 < here.score.0 => Some(there),
                (Some(found), _) | (None, Some(found)) => Some(found),
                (None, None) => None,
            }
        })
    }

    /// What may be chosen of at most so many workers in these places.
    fn spaces(&self, places: &[usize], workers: usize) -> Spaces<'w> {
        let members = space::members(self.inventory, self.workers, self.job.previous, places);
        let bounds = Bounds {
            ranks: &self.wanted.ranks,
            workers,
            layers: self.costs[0][0].layers(),
            stages: self.wanted.stages,
            willing: !self.wanted.explicit,
        };
        let links = space::links(self.inventory, &members);
        let spaces = spaces::to_search(&members, &links, bounds, row_bytes(self.job.shape));
        Spaces::new(self.job.shape, (self.costs, self.wanted.reduction), (members, links), spaces)
    }

    /// The best layout under these limits. They allow for a step in flight in each of the most stages that
    /// there might be; fewer stages need less, so it is looked at again with that.
    fn under(&self, limits: &ReplicaLimits, spaces: &mut Spaces<'w>) -> Option<Found<'w>> {
        let mut in_flight = limits.steps_in_flight_max;
        let found = loop {
            let limits = ReplicaLimits { steps_in_flight_max: in_flight, ..limits.clone() };
            if let Some(found) = self.in_spaces(&limits, spaces, u64::MAX) {
                break found;
            }
            if self.wanted.stages.is_some() || in_flight <= 2 {
                return None;
            }
            in_flight = (in_flight / 2).max(2);
        };
        let needed = found.stages.len() as u32 + 1;
        let limits = ReplicaLimits { steps_in_flight_max: needed, ..limits.clone() };
        if needed >= found.limits.steps_in_flight_max {
            // More stages than steps were allowed for: one travels less, where there is no memory for it.
            return Some(found);
        }
        let again = self.in_spaces(&limits, spaces, found.score.0);
        let again = again
            .filter(|again| (again.stages.len() as u32) < needed && again.score <= found.score);
        Some(again.unwrap_or(Found { limits, ..found }))
    }

    /// The best layout of all spaces.
    fn in_spaces(
        &self,
        limits: &ReplicaLimits,
        spaces: &mut Spaces<'w>,
        bound: u64,
    ) -> Option<Found<'w>> {
        spaces.under(self.costs, limits);
        let mut best: Option<(Score, Way, usize)> = None;
        for (index, space) in spaces.all.iter().enumerate() {
            let problem = Problem {
                layers: self.costs[0][0].layers(),
                topology: &space.topology,
                crews: &space.crews,
                times: &spaces.times,
                reaches: &spaces.reaches,
                moves: &space.space.moves,
                stages: self.wanted.stages,
                weights: &self.weights,
                // What is worse than a space before is not looked at.
                bound: best.as_ref().map_or(bound, |best| best.0.0),
            };
            let Some((score, way)) = problem.search(self.wanted.objective) else { continue };
            if best.as_ref().is_none_or(|best| score < best.0) {
                best = Some((score, way, index));
            }
        }
        let (score, way, index) = best?;
        let stages = self.name(&way, &spaces.all[index].space, &spaces.members);
        Some(Found { score, limits: limits.clone(), stages })
    }

    /// The workers of a way: of each kind the first that are left, in rank order.
    fn name(&self, way: &Way, space: &Space, members: &[Member<'w>]) -> Stages<'w> {
        let kinds = space::kinds(members);
        let mut taken = vec![false; members.len()];
        let mut stages = Vec::with_capacity(way.len());
        for (crew, layers) in way {
            let mut here: Vec<usize> = Vec::new();
            for member in &space.crews[*crew] {
                let kind = kinds.iter().find(|kind| kind.contains(member));
                let free = kind.into_iter().flatten().copied().find(|m| !taken[*m]);
                let member = free.unwrap_or(*member);
                taken[member] = true;
                here.push(member);
            }
            // Among equals whoever had a rank keeps it.
            here.sort_by_key(|m| members[*m].held.map_or(u32::MAX, |held| held.rank));
            let rates = rates_of(members, &here);
            let mut seats = seats(&self.costs[here.len() - 1], &rates);
            keep_ranks(&mut seats, &rates, |m| members[here[m]].held.map(|held| held.rank));
            stages.push((*layers, seats.iter().map(|seat| members[here[*seat]].worker).collect()));
        }
        stages
    }

    fn plan(&self, found: Found<'w>) -> ReplicaPlan {
        let Found { limits, stages, .. } = found;
        let mut seats = Vec::new();
        for (layers, crew) in &stages {
            let layers = *layers;
            for (worker, costs) in crew.iter().zip(&self.costs[crew.len() - 1]) {
                let need = move |limits: &ReplicaLimits| costs.memory(layers, limits).total();
                seats.push((need, worker.free()));
            }
        }
        let limits = match self.job.shape {
            // Its blocks are numbers without memory, and are all there.
            ModelShape::Encoder(_) => limits,
            _ => memory::largest(limits, &seats),
        };
        let split = stages.iter().any(|(_, crew)| crew.len() > 1);
        let job = self.job;
        let whole = &self.costs[0][0];
        let stages = stages.iter().map(|(layers, crew)| StagePlan {
            layers: *layers,
            shards: crew
                .iter()
                .zip(&self.costs[crew.len() - 1])
                .zip(0..)
                .map(|((worker, costs), rank)| ShardPlan {
                    rank: RankIndex(rank),
                    node: worker.node,
                    device: worker.device.clone(),
                    memory: costs.memory(*layers, &limits),
                })
                .collect(),
        });
        ReplicaPlan {
            id: job.replica,
            deployment: job.spec.name.clone(),
            generation: job.generation,
            model: job.spec.model.clone(),
            precision: whole.precision(),
            numerics: Numerics::of(
                job.activations(whole.precision()),
                split && self.wanted.reduction == Reduction::Sum,
                whole.kv(),
            ),
            stages: stages.collect(),
            limits,
        }
    }

    /// Why nothing fits, and which meshes would.
    fn refusal(&self) -> PlanRefusal {
        let ranks = self.wanted.ranks.first().copied().unwrap_or(1);
        let stages = self.wanted.stages.unwrap_or(self.workers.len() as u32);
        if !self.wanted.explicit || ranks == 1 {
            let most = stages.min(self.costs[0][0].layers()) as usize;
            return refusal::does_not_fit(self.job, &self.costs[0][0], self.workers, most);
        }
        PlanRefusal::MeshDoesNotFit(Box::new(MeshFit {
            stages,
            ranks: ranks as u32,
            precision: self.costs[0][0].precision(),
            least: self.least_need(ranks, stages),
            workers: self
                .workers
                .iter()
                .map(|worker| (worker.node, worker.free(), worker.budget))
                .collect(),
        }))
    }

    /// What the largest shard of an even cut needs under the least generous limits.
    fn least_need(&self, ranks: usize, stages: u32) -> Bytes {
        let layers = self.costs[0][0].layers();
        let Some(limits) = memory::limits_to_try(&self.costs[0][0], stages as usize).pop() else {
            return Bytes(0);
        };
        let cut = |stage: u32| u64::from(stage) * u64::from(layers) / u64::from(stages.max(1));
        let range = |stage: u32| LayerRange::new(cut(stage) as u32, cut(stage + 1) as u32);
        let need = |costs: &Costs<'_>| {
            let of = |stage| costs.memory(range(stage), &limits).total();
            (0..stages).map(of).max()
        };
        self.costs[ranks - 1].iter().filter_map(need).max().unwrap_or_default()
    }
}

/// Whoever had a rank sits there again where one as fast sits there: it need not read its weights anew.
fn keep_ranks(seats: &mut [usize], rates: &[u64], held: impl Fn(usize) -> Option<u32>) {
    for rank in 0..seats.len() {
        let had = |member: &usize| held(*member) == Some(rank as u32);
        let Some(at) = seats.iter().position(had) else { continue };
        if !had(&seats[rank]) && rates[seats[at]] == rates[seats[rank]] {
            seats.swap(at, rank);
        }
    }
}

#[cfg(test)]
#[path = "mesh_test.rs"]
mod tests;
