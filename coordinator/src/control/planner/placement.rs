//! Where to cut the layers, and which worker takes which piece.
//!
//! The cut is exact: of all cuts whose stages fit the memory of distinct workers, in any order of
//! the workers, it takes one whose slowest stage is the fastest, and of those one with the least sum
//! of squares, so that the others are even too. Workers with equal free memory are
//! interchangeable, so the table is over *how many* workers of each kind are used, not over which.

use shoal_protocol::plan::{ReplicaLimits, ReplicaPlan};
use shoal_protocol::units::{Bytes, LayerRange};

use super::Candidate;
use super::apart::{Apart, arrange, is_torn_ring};
use super::memory::{Costs, Needs};

/// The most combinations of kinds of workers that the table has columns for: nine workers that all
/// differ, or hundreds of few kinds. Beyond it the most similar kinds count as the smaller one,
/// which can cost balance but never memory.
const COLUMNS_MAX: usize = 512;

/// One stage of a cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Its layers.
    pub layers: LayerRange,
    /// The free memory that its worker must have: that of its kind.
    pub free: Bytes,
}

/// Workers with this much free memory, or a little more.
struct Kind {
    free: Bytes,
    count: usize,
}

/// The best cut into exactly this many stages; `None` where nothing fits.
pub(super) fn cut(
    costs: &Costs<'_>,
    limits: &ReplicaLimits,
    workers: &[&Candidate],
    stages: usize,
) -> Option<Vec<Cut>> {
    let table = Table::new(costs, limits, kinds(workers, stages), stages);
    if !table.has_room() {
        return None;
    }
    let slowest = table.search(|so_far, stage| so_far.max(stage), u64::MAX)?.0;
    let square = |stage: u128| stage.saturating_mul(stage);
    let (_, cuts) =
        table.search(|so_far, stage| so_far.saturating_add(square(stage)), slowest as u64)?;
    Some(cuts)
}

/// The kinds of workers, the roomiest first.
fn kinds(workers: &[&Candidate], stages: usize) -> Vec<Kind> {
    let mut free: Vec<_> = workers.iter().map(|worker| worker.free()).collect();
    free.sort_by(|a, b| b.cmp(a));
    let mut kinds: Vec<Kind> = Vec::new();
    for free in free {
        match kinds.last_mut() {
            Some(kind) if kind.free == free => kind.count += 1,
            _ => kinds.push(Kind { free, count: 1 }),
        }
    }
    while columns(&kinds, stages) > COLUMNS_MAX && kinds.len() > 1 {
        let gap = |i: &usize| kinds[i - 1].free.saturating_sub(kinds[*i].free);
        // `1..len` is not empty, since there are two kinds at least.
        let similar = (1..kinds.len()).min_by_key(gap).unwrap_or(1);
        let roomier = kinds.remove(similar - 1);
        kinds[similar - 1].count += roomier.count;
    }
    kinds
}

fn columns(kinds: &[Kind], stages: usize) -> usize {
    kinds.iter().fold(1, |n: usize, kind| n.saturating_mul(kind.count.min(stages) + 1))
}

/// Cells by (workers used of each kind, layers placed): the best way to get there.
struct Table<'a> {
    costs: &'a Costs<'a>,
    kinds: Vec<Kind>,
    stages: usize,
    /// The step between columns for each kind: columns are numbers in a mixed base.
    strides: Vec<usize>,
    columns: usize,
    needs: Needs,
}

#[derive(Clone, Copy)]
struct Cell {
    cost: u128,
    /// The layers placed before the last stage, and the kind of its worker.
    from: u32,
    kind: usize,
}

impl<'a> Table<'a> {
    fn new(costs: &'a Costs<'a>, limits: &ReplicaLimits, kinds: Vec<Kind>, stages: usize) -> Self {
        let mut strides = Vec::new();
        let mut columns = 1;
        for kind in &kinds {
            strides.push(columns);
            columns *= kind.count.min(stages) + 1;
        }
        Self { costs, kinds, stages, strides, columns, needs: costs.needs(limits) }
    }

    /// Whether the roomiest workers have room for all layers, if each could have those that it has most room for:
    /// looked at before the table, since most numbers of stages fail there.
    fn has_room(&self) -> bool {
        let layers = self.costs.layers();
        let free = self.kinds.iter().flat_map(|kind| std::iter::repeat_n(kind.free, kind.count));
        let mut most = (Bytes(0), 0);
        let mut sum = 0_u64;
        for free in free.take(self.stages) {
            if most.0 != free {
                let ends = |start| self.ends(start, (free, 0, u64::MAX)).last();
                let longest = |start| ends(start).map_or(0, |end| end - start);
                most = (free, (0..layers).map(longest).max().unwrap_or(0));
            }
            if most.1 == 0 {
                return false;
            }
            sum += u64::from(most.1);
        }
        sum >= u64::from(layers)
    }

    /// The ends of a stage that starts there, on a worker with so much room. Longer stages need and take more,
    /// apart from the last one, which has nothing to send on.
    fn ends(
        &self,
        start: u32,
        (free, following, stage_max): (Bytes, u32, u64),
    ) -> impl Iterator<Item = u32> {
        let layers = self.costs.layers();
        let fits = move |end: &u32| {
            let range = LayerRange::new(start, *end);
            self.needs.of(range) <= free && self.costs.step(range) <= stage_max
        };
        let middle = start + 1..=layers.saturating_sub(following.max(1));
        let last = (following == 0).then_some(layers).filter(fits);
        middle.take_while(fits).chain(last)
    }

    /// How many workers of a kind a column uses.
    fn used(&self, column: usize, kind: usize) -> usize {
        column / self.strides[kind] % (self.kinds[kind].count.min(self.stages) + 1)
    }

    /// The least cost and its cut, where the cost of a cut is folded over the cost of its stages and
    /// no stage may cost more than `stage_max`.
    fn search(
        &self,
        fold: impl Fn(u128, u128) -> u128,
        stage_max: u64,
    ) -> Option<(u128, Vec<Cut>)> {
        let layers = self.costs.layers();
        let width = layers as usize + 1;
        let mut cells: Vec<Option<Cell>> = vec![None; self.columns * width];
        cells[0] = Some(Cell { cost: 0, from: 0, kind: 0 });
        let mut best: Option<(u128, usize)> = None;
        // A stage only adds to a column's number, so columns are complete when their turn comes.
        for column in 0..self.columns {
            let placed: usize = (0..self.kinds.len()).map(|kind| self.used(column, kind)).sum();
            if placed == self.stages {
                if let Some(cell) = cells[column * width + layers as usize]
                    && best.is_none_or(|(cost, _)| cell.cost < cost)
                {
                    best = Some((cell.cost, column));
                }
                continue;
            }
            if placed > self.stages {
                continue;
            }
            // Each stage that follows has a layer at least.
            let following = (self.stages - placed - 1) as u32;
            for start in 0..layers {
                let Some(cell) = cells[column * width + start as usize] else { continue };
                for kind in 0..self.kinds.len() {
                    if self.used(column, kind) == self.kinds[kind].count.min(self.stages) {
                        continue;
                    }
                    let next = (column + self.strides[kind]) * width;
                    for end in self.ends(start, (self.kinds[kind].free, following, stage_max)) {
                        let step = self.costs.step(LayerRange::new(start, end));
                        let cost = fold(cell.cost, u128::from(step));
                        let target = &mut cells[next + end as usize];
                        if target.is_none_or(|other| cost < other.cost) {
                            *target = Some(Cell { cost, from: start, kind });
                        }
                    }
                }
            }
        }
        let (cost, mut column) = best?;
        let mut cuts = Vec::with_capacity(self.stages);
        let mut end = layers;
        while let Some(cell) = cells[column * width + end as usize].filter(|_| end > 0) {
            let layers = LayerRange::new(cell.from, end);
            cuts.push(Cut { layers, free: self.kinds[cell.kind].free });
            column -= self.strides[cell.kind];
            end = cell.from;
        }
        cuts.reverse();
        Some((cost, cuts))
    }
}

/// A worker for each stage: of those with room for it, first the one that has most bytes of it
/// already, then the least loaded, then the one with the lowest number.
///
/// Pairs are taken greedily, the largest overlap first. Every stage finds a worker: a stage asks for
/// the memory of its kind, a cut uses no more workers of a kind than there are, and the tightest
/// fitting kind is served first.
///
/// Where neighbours would be apart, they are searched for in the same order of preference.
pub(super) fn name_workers<'w>(
    cuts: &[Cut],
    workers: &[&'w Candidate],
    previous: Option<&ReplicaPlan>,
    costs: &Costs<'_>,
    apart: &Apart,
) -> Vec<&'w Candidate> {
    let mut named: Vec<Option<&'w Candidate>> = vec![None; cuts.len()];
    // The kind that a worker was counted under: the roomiest one that it has room for.
    let kinds = kinds(workers, cuts.len());
    let kind_of =
        |worker: &Candidate| kinds.iter().map(|kind| kind.free).find(|free| *free <= worker.free());
    let mut pairs: Vec<(u64, usize, &'w Candidate)> = Vec::new();
    for (stage, cut) in cuts.iter().enumerate() {
        for &worker in workers.iter().filter(|worker| kind_of(worker) == Some(cut.free)) {
            pairs.push((overlap(cut.layers, worker, previous, costs), stage, worker));
        }
    }
    pairs.sort_by(|a, b| {
        (b.0.cmp(&a.0)).then((a.2.used, a.1, a.2.node).cmp(&(b.2.used, b.1, b.2.node)))
    });
    for (_, stage, worker) in pairs {
        let taken = named.iter().flatten().any(|other| other.node == worker.node);
        if named[stage].is_none() && !taken {
            named[stage] = Some(worker);
        }
    }
    let named: Vec<_> = named.into_iter().flatten().collect();
    let nodes: Vec<_> = named.iter().map(|worker| worker.node).collect();
    if !is_torn_ring(&nodes, apart) {
        return named;
    }
    let choices = |cut: &Cut| {
        let mut able: Vec<_> =
            workers.iter().copied().filter(|w| kind_of(w) == Some(cut.free)).collect();
        let order = |w: &Candidate| {
            (std::cmp::Reverse(overlap(cut.layers, w, previous, costs)), w.used, w.node)
        };
        able.sort_by_key(|worker| order(worker));
        able
    };
    arrange(cuts, choices, apart).unwrap_or(named)
}

/// Weight bytes of these layers that the worker had in the previous layout.
fn overlap(
    layers: LayerRange,
    worker: &Candidate,
    previous: Option<&ReplicaPlan>,
    costs: &Costs<'_>,
) -> u64 {
    let stages = previous.map(|plan| plan.stages.as_slice()).unwrap_or_default();
    stages
        .iter()
        .filter(|stage| stage.shards.iter().any(|shard| shard.node == worker.node))
        .map(|stage| {
            let start = stage.layers.start.max(layers.start);
            let end = stage.layers.end.min(layers.end);
            if start < end { costs.weights(LayerRange::new(start, end)).0 } else { 0 }
        })
        .sum()
}
