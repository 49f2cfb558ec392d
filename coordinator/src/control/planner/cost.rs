//! What a layout costs in time, as far as that is known before it is made.
//!
//! ```text
//! a token = of each stage: its layers, each as long as its slowest rank reads the layer's weights
//!                          + what its ranks tell each other: rounds and bytes as the worker's layers have them
//!         + a hop between stages (latency + the hidden state of a row over the bandwidth)
//!         + the way back of the token (latency)
//! ```
//!
//! All in whole nanoseconds, layer by layer, so that equal layouts have equal times. Where nobody has
//! measured a rate or a way, the named constants here stand in for it, and `shoal plan --explain` says so.

use std::collections::BTreeMap;

use shoal_protocol::id::NodeId;
use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{ModelSpec, Split};
use shoal_protocol::plan::Precision;
use shoal_protocol::units::LayerRange;

use super::memory::Costs;
use super::split::{Slice, slice};
use super::{Candidate, Inventory, ModelShape, Rate};

/// Activations travel as f32.
const F32: u64 = 4;

const SECOND_NS: u64 = 1_000_000_000;

/// The longest that a layer is thought to take, a day: sums of any number of layers stay numbers.
const LAYER_NS_MAX: u64 = 24 * 3600 * SECOND_NS;

/// The way between two workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// One way.
    pub latency_ns: u64,
    /// Once it flows.
    pub bytes_per_s: u64,
}

/// Ways that are known to be longer than those inside a place, the lower number first.
pub type Links = BTreeMap<(NodeId, NodeId), Link>;

impl Link {
    /// Inside a host, a rack, a zone, where nothing else is known: what QUIC takes between two processes of
    /// one machine that must be woken, and what it carries there.
    pub const NEAR: Self = Self { latency_ns: 100_000, bytes_per_s: 1_000_000_000 };

    /// Between the ranks of a stage on one machine, which have a socket of its kernel to themselves: a round takes 15 µs
    /// there, and they do not come to it at the same moment.
    pub const BESIDE: Self = Self { latency_ns: 50_000, bytes_per_s: 2_000_000_000 };

    /// Between zones, where nothing was measured: another building, and a gigabit.
    pub const FAR: Self = Self { latency_ns: 1_000_000, bytes_per_s: 125_000_000 };

    /// Two workers with no slower way between them are in one place: their ranks may make up a stage.
    pub const NEAR_MAX_NS: u64 = 400_000;

    /// How long so many bytes take to be there.
    pub fn time(self, bytes: u64) -> u64 {
        self.latency_ns.saturating_add(self.occupied(bytes))
    }

    /// How long so many bytes keep it busy.
    pub fn occupied(self, bytes: u64) -> u64 {
        ns(bytes, self.bytes_per_s)
    }

    /// Between the ranks of this crew, where this is the worst way between any two of its members: none is longer than
    /// between machines where all are on one.
    pub(super) fn of_ranks(self, crew: &[&Candidate]) -> Self {
        let machine = |worker: &&Candidate| worker.machine.map(|machine| machine.0);
        let first = crew.first().and_then(machine);
        match first.is_some() && crew.iter().all(|worker| machine(worker) == first) {
            true => Self::BESIDE,
            false => self,
        }
    }

    /// Neither is better than with either.
    pub(super) fn worse(self, other: Self) -> Self {
        Self {
            latency_ns: self.latency_ns.max(other.latency_ns),
            bytes_per_s: self.bytes_per_s.min(other.bytes_per_s),
        }
    }
}

impl Inventory {
    /// The way between two of its workers.
    pub fn link(&self, a: &Candidate, b: &Candidate) -> Link {
        let known = self.links.get(&super::pair(a.node, b.node));
        known.copied().unwrap_or(match (&a.zone, &b.zone) {
            (Some(a), Some(b)) if a != b => Link::FAR,
            _ => Link::NEAR,
        })
    }

    /// What one of its workers reads in a second; of which nothing is known, as much as the slowest of those
    /// of which something is.
    pub fn rate(&self, worker: &Candidate) -> u64 {
        let slowest =
            || self.workers.iter().filter_map(|other| other.rate).map(|r| r.bytes_per_s).min();
        let known = worker.rate.map(|rate| rate.bytes_per_s).or_else(slowest);
        known.unwrap_or(Rate::ASSUMED.bytes_per_s).max(1)
    }
}

/// What the ranks of a stage read in a second, by rank or in any order: those of one machine compute at the
/// same time and share what it reads.
pub(super) fn shared(crew: &[(&Candidate, u64)]) -> Vec<u64> {
    let of = |(worker, rate): &(&Candidate, u64)| {
        let Some((machine, Some(together))) = worker.machine else { return *rate };
        let here = |other: &&(&Candidate, u64)| other.0.machine.is_some_and(|m| m.0 == machine);
        let ranks = crew.iter().filter(here).count().max(1) as u64;
        (*rate).min((together / ranks).max(1))
    };
    crew.iter().map(of).collect()
}

fn ns(bytes: u64, bytes_per_s: u64) -> u64 {
    // Up to 18 GB at once, which is nearly always: a division of long numbers takes five times as long.
    if let Some(scaled) = bytes.checked_mul(SECOND_NS) {
        return scaled / bytes_per_s.max(1);
    }
    let ns = u128::from(bytes) * u128::from(SECOND_NS) / u128::from(bytes_per_s.max(1));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// A model as the ranks of a stage have it.
pub(super) struct Slices {
    ranks: Vec<Vec<Slice>>,
}

impl Slices {
    /// For stages of up to so many ranks, whose results are put together and whose weights are held like this.
    pub fn new(shape: &ModelShape, most: u32, how: (Reduction, Precision)) -> Self {
        let of =
            |ranks: u32| (0..ranks).map(|rank| slice(shape, Split { rank, ranks }, how)).collect();
        Self { ranks: (1..=most.max(1)).map(of).collect() }
    }

    /// Those of a stage of so many ranks, in rank order.
    pub fn of(&self, ranks: usize) -> &[Slice] {
        self.ranks.get(ranks.wrapping_sub(1)).map(Vec::as_slice).unwrap_or_default()
    }
}

/// What the ranks of a stage tell each other in one layer: (how often, bytes that each receives in all). The
/// rounds are those of the worker's layers (`shard-worker/src/model/layers`).
pub(super) fn told(shape: &ModelShape, layer: u32, ranks: u64, reduction: Reduction) -> (u64, u64) {
    let others = ranks.saturating_sub(1);
    let (hidden, query, inner, broad) = match shape {
        ModelShape::Checkpoint(m) => {
            // One norm over all heads: all queries and keys are gathered first, whatever is promised of sums.
            let broad = m.qk_norm && m.options.qk_norm_whole;
            let broad = if broad { m.query_width() + m.kv_width() } else { 0 };
            (m.hidden, m.attention_width(), inner(m, layer), u64::from(broad))
        }
        ModelShape::Encoder(m) => (m.hidden, m.hidden, Inner::Dense(m.intermediate.into()), 0),
        ModelShape::Pretend(m) => (m.hidden, m.hidden, Inner::Dense(m.hidden.into()), 0),
    };
    let (hidden, query) = (u64::from(hidden), u64::from(query));
    // (rounds, values of which each rank has a part and gets the rest)
    let (gathers, gathered) = match (reduction, inner) {
        (Reduction::Sum, _) => (0, 0),
        // The inputs and the outputs of attention's projection and of the MLP's.
        (Reduction::Exact, Inner::Dense(width)) => (4, query + hidden + width + hidden),
        // The results of a row's experts travel one by one, and a shared one is joined as a dense MLP is.
        (Reduction::Exact, Inner::Experts { used, shared: None }) => {
            (3, query + hidden + used * hidden)
        }
        (Reduction::Exact, Inner::Experts { used, shared: Some(width) }) => {
            (5, query + hidden + used * hidden + width + hidden)
        }
    };
    // Whole partial sums of the attention's and the MLP's output, from each of the others; experts and a shared
    // one are one sum.
    let (sums, summed) = match reduction {
        Reduction::Sum => (2, 2 * hidden),
        Reduction::Exact => (0, 0),
    };
    let rounds = gathers + sums + u64::from(broad > 0);
    let parts = (gathered + broad) * F32 * others / ranks.max(1);
    (rounds, parts + summed * F32 * others)
}

/// The second half of a layer.
enum Inner {
    /// An MLP of that width.
    Dense(u64),
    /// So many experts of a row; the width of the shared one.
    Experts { used: u64, shared: Option<u64> },
}

fn inner(model: &ModelSpec, layer: u32) -> Inner {
    match model.moe(layer) {
        Some(moe) => Inner::Experts { used: moe.top_k.into(), shared: moe.shared.map(u64::from) },
        None => Inner::Dense(model.intermediate.into()),
    }
}

/// The hidden state of one row.
pub(super) fn row_bytes(shape: &ModelShape) -> u64 {
    let hidden = match shape {
        ModelShape::Checkpoint(m) => m.hidden,
        ModelShape::Encoder(m) => m.hidden,
        ModelShape::Pretend(m) => m.hidden,
    };
    u64::from(hidden) * F32
}

/// How long the layers of a stage take: a sum over those before each one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Times {
    before: Vec<u64>,
}

impl Times {
    /// Of a stage whose ranks, in this order, read `rates` bytes in a second, and tell each other over `link`.
    pub fn new(
        shape: &ModelShape,
        costs: &[Costs<'_>],
        rates: &[u64],
        told_over: (Link, Reduction),
    ) -> Self {
        let mut all = Self::compute_only(shape, costs, rates);
        let (ranks, (link, reduction)) = (costs.len() as u64, told_over);
        if ranks <= 1 {
            return all;
        }
        // The embedding's parts are put together before the first layer, the vocabulary's after the last.
        let end = link.time(row_bytes(shape));
        let (mut talk, mut before) = (end, None);
        for (layer, sum) in all.before.iter_mut().enumerate().skip(1) {
            let round = told(shape, layer as u32 - 1, ranks, reduction);
            let took = match before {
                Some((same, took)) if same == round => took,
                _ => round.0.saturating_mul(link.latency_ns).saturating_add(link.occupied(round.1)),
            };
            before = Some((round, took));
            talk = talk.saturating_add(took);
            *sum = sum.saturating_add(talk);
        }
        if let Some(last) = all.before.last_mut() {
            *last = last.saturating_add(end);
        }
        all
    }

    /// The same without what the ranks tell each other.
    pub fn compute_only(shape: &ModelShape, costs: &[Costs<'_>], rates: &[u64]) -> Self {
        let layers = shape.layers();
        let mut before = Vec::with_capacity(layers as usize + 1);
        let mut sum = 0_u64;
        before.push(sum);
        // Most layers read what the one before has read.
        let mut took = 0;
        for layer in 0..layers {
            let range = LayerRange::new(layer, layer + 1);
            let past = LayerRange::new(layer.saturating_sub(1), layer);
            let same = |costs: &Costs<'_>| costs.step(past) == costs.step(range);
            if layer == 0 || !costs.iter().all(same) {
                let of = |(costs, rate): (&Costs<'_>, &u64)| ns(costs.step(range), *rate);
                let slowest = costs.iter().zip(rates).map(of).max().unwrap_or(0);
                took = modelled(shape, costs.len()).unwrap_or(slowest).min(LAYER_NS_MAX);
            }
            sum = sum.saturating_add(took);
            before.push(sum);
        }
        Self { before }
    }

    /// The sums, from 0 on.
    pub fn before(&self) -> &[u64] {
        &self.before
    }

    pub fn of(&self, range: LayerRange) -> u64 {
        self.before[range.end as usize] - self.before[range.start as usize]
    }
}

/// The modelled time of a layer of a pretend model that has one: no worker is faster than another there.
fn modelled(shape: &ModelShape, ranks: usize) -> Option<u64> {
    let ModelShape::Pretend(spec) = shape else { return None };
    let step = spec.layer_step_ns.saturating_add(spec.layer_row_ns);
    (step > 0).then(|| step / (ranks.max(1) as u64))
}

/// Each rank's worker: whoever is fastest takes the rank with the most to read. By index of `rates`.
pub(super) fn seats(costs: &[Costs<'_>], rates: &[u64]) -> Vec<usize> {
    let whole = |costs: &Costs<'_>| costs.step(LayerRange::new(0, costs.layers()));
    let mut heaviest: Vec<usize> = (0..costs.len()).collect();
    heaviest.sort_by_key(|rank| (std::cmp::Reverse(whole(&costs[*rank])), *rank));
    let mut fastest: Vec<usize> = (0..rates.len()).collect();
    fastest.sort_by_key(|worker| (std::cmp::Reverse(rates[*worker]), *worker));
    let mut seats = vec![0; costs.len()];
    for (rank, worker) in heaviest.into_iter().zip(fastest) {
        seats[rank] = worker;
    }
    seats
}
