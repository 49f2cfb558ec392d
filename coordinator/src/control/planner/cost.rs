//! What a layout costs in time, as far as that is known before it is made.
//!
//! ```text
//! a token = of each stage: its layers, each as long as its slowest rank reads the layer's weights
//!                          + what its ranks tell each other, twice a layer (four times where sums are exact)
//!         + a hop between stages (latency + the hidden state of a row over the bandwidth)
//!         + the way back of the token (latency)
//! ```
//!
//! All in whole nanoseconds, layer by layer, so that equal layouts have equal times. Where nobody has
//! measured a rate or a way, the named constants here stand in for it, and `shoal plan --explain` says so.

use std::collections::BTreeMap;

use shoal_protocol::id::NodeId;
use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::Split;
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

/// What the ranks of a stage tell each other in one layer: (how often, bytes that each receives in all).
fn told(shape: &ModelShape, ranks: u64, reduction: Reduction) -> (u64, u64) {
    let others = ranks.saturating_sub(1);
    let (hidden, query, intermediate) = match shape {
        ModelShape::Checkpoint(m) => (m.hidden, m.query_width(), m.intermediate),
        ModelShape::Encoder(m) => (m.hidden, m.hidden, m.intermediate),
        ModelShape::Pretend(m) => (m.hidden, m.hidden, m.hidden),
    };
    let (hidden, query, intermediate) =
        (u64::from(hidden), u64::from(query), u64::from(intermediate));
    match reduction {
        // Whole partial sums of the attention's and the MLP's output, from each of the others.
        Reduction::Sum => (2, 2 * others * hidden * F32),
        // The others' parts of both inputs, and of both outputs.
        Reduction::Exact => {
            let all = (query + hidden + intermediate + hidden) * F32;
            (4, all * others / ranks.max(1))
        }
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
        let compute = Self::compute_only(shape, costs, rates);
        let (link, reduction) = told_over;
        let talk = Self::talk(shape, costs.len() as u64, link, reduction);
        let layers = compute.before.len() as u64 - 1;
        let mut before = compute.before;
        for (layer, sum) in before.iter_mut().enumerate().skip(1) {
            // The embedding's parts are put together before the first layer, the vocabulary's after the last.
            let ends = u64::from(layer >= 1) + u64::from(layer as u64 == layers);
            *sum = sum.saturating_add(talk.0 * layer as u64 + talk.1 * ends);
        }
        Self { before }
    }

    /// The same without what the ranks tell each other.
    pub fn compute_only(shape: &ModelShape, costs: &[Costs<'_>], rates: &[u64]) -> Self {
        let layers = shape.layers();
        let mut before = Vec::with_capacity(layers as usize + 1);
        let mut sum = 0_u64;
        before.push(sum);
        for layer in 0..layers {
            let range = LayerRange::new(layer, layer + 1);
            let of = |(costs, rate): (&Costs<'_>, &u64)| ns(costs.step(range), *rate);
            let slowest = costs.iter().zip(rates).map(of).max().unwrap_or(0);
            let layer = modelled(shape, costs.len()).unwrap_or(slowest);
            sum = sum.saturating_add(layer.min(LAYER_NS_MAX));
            before.push(sum);
        }
        Self { before }
    }

    /// What one layer's talk takes, and that at each end of a model.
    pub fn talk(shape: &ModelShape, ranks: u64, link: Link, reduction: Reduction) -> (u64, u64) {
        if ranks <= 1 {
            return (0, 0);
        }
        let (times, bytes) = told(shape, ranks, reduction);
        (times * link.latency_ns + link.occupied(bytes), link.time(row_bytes(shape)))
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
