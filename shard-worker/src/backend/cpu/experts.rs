//! Which experts a row uses.
//!
//! Contract n1: a softmax is `e^(x - max)`, summed in lanes, folded, and divided. An expert is chosen by
//! its score, with its correction added; of equals the lower id. A row's weights are summed in id order.

use shoal_protocol::model::{Moe, Scoring};

use super::isa::Kernel;
use super::math::exp;
use super::rows::by_lanes;
use super::simd::{LANES, Simd};

/// A set of experts or groups; there are 2,048 of either at most, as `config.json` is read.
#[derive(Clone, Copy)]
struct Set([u64; 32]);

impl Set {
    const EMPTY: Set = Set([0; 32]);

    fn add(&mut self, id: usize) {
        self.0[id / 64] |= 1 << (id % 64);
    }

    fn has(&self, id: usize) -> bool {
        self.0[id / 64] >> (id % 64) & 1 == 1
    }
}

/// Adds the best so many of `ids` that pass `allowed` to a set; of equals the lower one.
fn best(
    count: usize,
    ids: std::ops::Range<usize>,
    allowed: impl Fn(usize) -> bool,
    score: impl Fn(usize) -> f32,
) -> Set {
    let mut chosen = Set::EMPTY;
    for _ in 0..count {
        let mut best: Option<(usize, f32)> = None;
        for id in ids.clone().filter(|id| allowed(*id) && !chosen.has(*id)) {
            let score = score(id);
            if best.is_none_or(|(_, top)| score > top) {
                best = Some((id, score));
            }
        }
        if let Some((id, _)) = best {
            chosen.add(id);
        }
    }
    chosen
}

/// Chooses the experts of one row.
pub struct RouteRow<'a> {
    /// The router's logits, replaced by what the experts weigh.
    pub scores: &'a mut [f32],
    /// The mixture.
    pub moe: &'a Moe,
    /// Added to scores for the choice.
    pub correction: Option<&'a [f32]>,
    /// Ids, ascending, and their weights.
    pub routes: &'a mut [f32],
}

impl Kernel for RouteRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's.
        unsafe {
            match self.moe.scoring {
                Scoring::Softmax => softmax::<S>(self.scores),
                Scoring::Sigmoid => sigmoid::<S>(self.scores),
            }
        }
        let Self { scores, moe, correction, routes } = self;
        let score = |id: usize| match correction {
            Some(correction) => scores[id] + correction[id],
            None => scores[id],
        };
        let experts = 0..scores.len();
        let groups = moe.groups.map(|groups| {
            let size = scores.len() / groups.groups as usize;
            let of = |group: usize| {
                let own = group * size..(group + 1) * size;
                let top = best(groups.best as usize, own.clone(), |_| true, score);
                own.filter(|id| top.has(*id)).map(score).fold(0.0, |sum: f32, score| sum + score)
            };
            (size, best(groups.kept as usize, 0..groups.groups as usize, |_| true, of))
        });
        let allowed = |id: usize| groups.as_ref().is_none_or(|(size, kept)| kept.has(id / size));
        let top_k = moe.top_k as usize;
        let chosen = best(top_k, experts.clone(), allowed, score);
        let (ids, weights) = routes.split_at_mut(top_k);
        // What `best` could not fill, which a checked mixture does not leave, weighs nothing.
        weights.fill(0.0);
        ids.fill(-1.0);
        let mut sum = 0.0;
        for (i, id) in experts.filter(|id| chosen.has(*id)).enumerate().take(top_k) {
            ids[i] = id as f32;
            weights[i] = scores[id];
            sum += scores[id];
        }
        for weight in weights {
            let normalised = if moe.normalise { *weight / sum } else { *weight };
            *weight = normalised * moe.scale;
        }
    }
}

#[inline(always)]
unsafe fn softmax<S: Simd>(scores: &mut [f32]) {
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, x| if *x > max { *x } else { max });
    // SAFETY: the offsets are below the length; the caller's for the rest.
    unsafe {
        let mut sums = S::splat(0.0);
        by_lanes!(scores.len(), |at, lanes| {
            let to = scores.as_mut_ptr().add(at);
            S::store_first(to, exp::<S>(S::sub(S::load_first(to, lanes), S::splat(max))), lanes);
            sums = S::add(sums, S::load_first(to, lanes));
        });
        let sum = S::splat(S::fold_add(sums));
        by_lanes!(scores.len(), |at, lanes| {
            let to = scores.as_mut_ptr().add(at);
            S::store_first(to, S::div(S::load_first(to, lanes), sum), lanes);
        });
    }
}

#[inline(always)]
unsafe fn sigmoid<S: Simd>(scores: &mut [f32]) {
    // SAFETY: the offsets are below the length; the caller's for the rest.
    unsafe {
        let one = S::splat(1.0);
        by_lanes!(scores.len(), |at, lanes| {
            let to = scores.as_mut_ptr().add(at);
            let e = exp::<S>(S::sub(S::splat(0.0), S::load_first(to, lanes)));
            S::store_first(to, S::div(one, S::add(one, e)), lanes);
        });
    }
}

/// The rows that chose an expert, and what it weighs for each; `routes` is `rows x width`.
pub fn chosen(
    routes: &[f32],
    (rows, width): (usize, usize),
    expert: u32,
) -> impl Iterator<Item = (usize, f32)> {
    routes.chunks_exact(width).take(rows).enumerate().filter_map(move |(row, route)| {
        let (ids, weights) = route.split_at(width / 2);
        let at = ids.iter().position(|id| *id == expert as f32)?;
        Some((row, weights[at]))
    })
}
