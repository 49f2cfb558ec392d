//! Which workers may make up a stage, and in which orders they are tried.
//!
//! | space | columns | what it holds |
//! |---|---|---|
//! | kinds | how many workers of each kind are used | every order of all workers, every crew inside a place |
//! | chain | how far along a chain of all workers | every choice of them in that order, crews side by side |
//!
//! Workers that are alike in place, rate and memory, and hold nothing yet, are of one kind: which of them is
//! taken makes no difference. The first space is used where it is small enough to be searched in some
//! milliseconds: up to some ten workers that all differ, or hundreds of few kinds.

use std::net::IpAddr;

use shoal_protocol::id::NodeId;
use shoal_protocol::plan::ReplicaPlan;
use shoal_protocol::units::LayerRange;

use super::{Candidate, Inventory, Link};

/// Rates within one part of so many of each other count as equal, as the slowest of them: two measurements
/// of one machine differ by as much.
const ALIKE: u64 = 10;

/// The same for workers of one machine, which measure themselves at the same time and take each other's
/// memory. Who is held back has half or less.
const ALIKE_HERE: u64 = 3;

/// The most columns, crews, and steps over them (columns x crews x layers x stages, where these are given) of
/// a space of kinds: a step takes some ten nanoseconds, so this is some milliseconds. Ten workers that all differ
/// have 640 crews of up to eight ranks.
const COLUMNS_MAX: usize = 4096;
const CREWS_MAX: usize = 640;
const WORK_MAX: u64 = 300_000;
const CELLS_MAX: usize = 200_000;

/// The same of steps in several places, weighed: so that ten workers that all differ are searched in every order
/// in whatever zones they are.
const PLACES_WORK_MAX: u64 = 600_000;

/// How much longer a step takes with so many places, in elevenths: each is tried as that of the first stage, and
/// ten parts of a step do not depend on the place before it.
pub(super) fn weight(places: usize) -> u64 {
    let places = places.max(1) as u64;
    places * (10 + places)
}

/// A worker as the search sees it.
#[derive(Clone, Debug)]
pub(super) struct Member<'w> {
    pub worker: &'w Candidate,
    /// Its rate, or that of those that are like it.
    pub rate: u64,
    pub place: usize,
    /// The layers and the rank that it has now, where as many ranks are asked for.
    pub held: Option<Held>,
    /// Its machine, where it shares that with another one.
    pub shares: Option<IpAddr>,
}

/// A shard that a worker has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Held {
    pub layers: (u32, u32),
    pub rank: u32,
    pub ranks: u32,
}

/// The workers, by place, the fastest first.
pub(super) fn members<'w>(
    inventory: &Inventory,
    workers: &[&'w Candidate],
    previous: Option<&ReplicaPlan>,
    places: &[usize],
) -> Vec<Member<'w>> {
    let rates = rates(inventory, workers);
    let held = |node: NodeId| {
        previous?.stages.iter().find_map(|stage| {
            let rank = stage.shards.iter().position(|shard| shard.node == node)? as u32;
            let layers = (stage.layers.start, stage.layers.end);
            Some(Held { layers, rank, ranks: stage.shards.len() as u32 })
        })
    };
    let mut members: Vec<_> = workers
        .iter()
        .zip(rates)
        .zip(places)
        .map(|((worker, rate), place)| Member {
            worker,
            rate,
            place: *place,
            held: held(worker.node),
            shares: worker.machine.map(|machine| machine.0).filter(|_| {
                let beside = |other: &&&Candidate| is_one_machine(worker, other);
                workers.iter().filter(beside).nth(1).is_some()
            }),
        })
        .collect();
    members.sort_by_key(|m| {
        let free = std::cmp::Reverse(m.worker.free());
        (m.place, std::cmp::Reverse(m.rate), m.shares, free, m.held, m.worker.used, m.worker.node)
    });
    members
}

/// What each worker reads in a second, where those that are alike count as equal.
fn rates(inventory: &Inventory, workers: &[&Candidate]) -> Vec<u64> {
    let mut rates: Vec<u64> = workers.iter().map(|worker| inventory.rate(worker)).collect();
    let mut done = vec![false; workers.len()];
    for first in 0..workers.len() {
        let here =
            |other: &usize| first == *other || is_one_machine(workers[first], workers[*other]);
        if !done[first] {
            let here: Vec<usize> = (first..workers.len()).filter(here).collect();
            here.iter().for_each(|worker| done[*worker] = true);
            level(&mut rates, here, ALIKE_HERE);
        }
    }
    level(&mut rates, (0..workers.len()).collect(), ALIKE);
    rates
}

fn is_one_machine(a: &Candidate, b: &Candidate) -> bool {
    a.machine.zip(b.machine).is_some_and(|(a, b)| a.0 == b.0)
}

/// Of these workers, gives those whose rates are within one part of so many of each other that of the
/// slowest of them.
fn level(rates: &mut [u64], mut workers: Vec<usize>, part: u64) {
    workers.sort_unstable_by_key(|worker| rates[*worker]);
    let mut class = 0_u64;
    for worker in workers {
        if rates[worker] > class.saturating_add(class / part) {
            class = rates[worker];
        }
        rates[worker] = class;
    }
}

/// The place of each worker: those between whom no way is longer than in a zone are in one.
pub(super) fn places(inventory: &Inventory, workers: &[&Candidate]) -> Vec<usize> {
    let mut place: Vec<usize> = (0..workers.len()).collect();
    for b in 1..workers.len() {
        for a in 0..b {
            if inventory.link(workers[a], workers[b]).latency_ns <= Link::NEAR_MAX_NS
                && place[a] != place[b]
            {
                let (from, to) = (place[a].max(place[b]), place[a].min(place[b]));
                place.iter_mut().filter(|p| **p == from).for_each(|p| *p = to);
            }
        }
    }
    let mut names = place.clone();
    names.sort_unstable();
    names.dedup();
    place.iter().map(|p| names.binary_search(p).unwrap_or(0)).collect()
}

/// The worst way between any two workers of each two places.
pub(super) fn links(inventory: &Inventory, members: &[Member<'_>]) -> Vec<Vec<Link>> {
    let places = members.iter().map(|m| m.place + 1).max().unwrap_or(1);
    let mut links = vec![vec![Link::NEAR; places]; places];
    for (index, a) in members.iter().enumerate() {
        for b in &members[..index] {
            let link = inventory.link(a.worker, b.worker);
            for (from, to) in [(a.place, b.place), (b.place, a.place)] {
                links[from][to] = links[from][to].worse(link);
            }
        }
    }
    links
}

/// What may be chosen, and in which order. Crews are lists of members.
#[derive(Debug, Default)]
pub(super) struct Space {
    pub crews: Vec<Vec<usize>>,
    pub moves: Vec<Vec<(usize, Option<usize>)>>,
}

/// What a space is made for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds<'a> {
    /// The numbers of ranks that a stage may have, ascending.
    pub ranks: &'a [usize],
    /// How many workers may be used.
    pub workers: usize,
    pub layers: u32,
    /// The number of stages, where it is given.
    pub stages: Option<u32>,
    /// Whether a crew needs members that say that they compute as ranks.
    pub willing: bool,
}

impl Bounds<'_> {
    fn may(&self, members: &[Member<'_>], crew: &[usize]) -> bool {
        let place = crew.first().map(|first| members[*first].place);
        let one_place = crew.iter().all(|m| Some(members[*m].place) == place);
        let able = |m: &usize| members[*m].worker.ranks_most as usize >= crew.len();
        one_place && (crew.len() == 1 || !self.willing || crew.iter().all(able))
    }
}

impl Space {
    /// Every order of all members; `None` where that is too much.
    pub fn of_kinds(members: &[Member<'_>], bounds: Bounds<'_>) -> Option<Self> {
        let kinds = kinds(members);
        let mut strides = Vec::with_capacity(kinds.len());
        let mut columns = 1_usize;
        for kind in &kinds {
            strides.push(columns);
            columns = columns.checked_mul(kind.len() + 1).filter(|n| *n <= COLUMNS_MAX)?;
        }
        let places = members.iter().map(|m| m.place + 1).max().unwrap_or(1);
        let counts = bounds.stages.map_or(1, |stages| stages as usize + 1);
        if columns * counts * places * (bounds.layers as usize + 1) > CELLS_MAX {
            return None;
        }
        let work_max = if places > 1 { PLACES_WORK_MAX } else { WORK_MAX } * weight(1);
        let used = |column: usize, kind: usize| column / strides[kind] % (kinds[kind].len() + 1);
        // A crew is a number of workers of each kind: as many as it has of a kind, its first ones.
        let mut crews: Vec<(Vec<usize>, Vec<usize>)> = Vec::new();
        for ranks in bounds.ranks {
            let mut counts = vec![0; kinds.len()];
            crews_of(&kinds, &mut counts, (0, *ranks), &mut |counts| {
                let taken = counts.iter().enumerate().flat_map(|(k, n)| kinds[k][..*n].iter());
                let crew: Vec<usize> = taken.copied().collect();
                if bounds.may(members, &crew) {
                    crews.push((counts.to_vec(), crew));
                }
                crews.len() <= CREWS_MAX
            });
            if crews.len() > CREWS_MAX {
                return None;
            }
        }
        let a_move = u64::from(bounds.layers) * counts as u64 * weight(places);
        let mut work = 0_u64;
        let mut moves = Vec::with_capacity(columns);
        for column in 0..columns {
            let taken: usize = (0..kinds.len()).map(|kind| used(column, kind)).sum();
            let mut out = Vec::new();
            for (index, (counts, crew)) in crews.iter().enumerate() {
                let free =
                    counts.iter().enumerate().all(|(k, n)| used(column, k) + n <= kinds[k].len());
                if free && taken + crew.len() <= bounds.workers {
                    let step: usize =
                        counts.iter().zip(&strides).map(|(n, stride)| n * stride).sum();
                    out.push((column + step, Some(index)));
                }
            }
            work = work.saturating_add(out.len() as u64 * a_move);
            if work > work_max {
                return None;
            }
            moves.push(out);
        }
        Some(Self { crews: crews.into_iter().map(|(_, crew)| crew).collect(), moves })
    }

    /// The places of its crews, each once.
    pub fn places(&self, members: &[Member<'_>]) -> Vec<usize> {
        let mut places: Vec<usize> = self.crews.iter().map(|crew| members[crew[0]].place).collect();
        places.sort_unstable();
        places.dedup();
        places
    }

    /// The members in this order.
    pub fn of_chain(members: &[Member<'_>], order: &[usize], bounds: Bounds<'_>) -> Self {
        let mut space = Self::default();
        // With many workers, numbers of ranks between powers of two are left out.
        let ranks = bounds.ranks.iter().filter(|n| n.is_power_of_two() || bounds.ranks.len() == 1);
        let ranks: Vec<usize> = ranks.copied().collect();
        for at in 0..order.len() {
            let mut out = vec![(at + 1, None)];
            for ranks in &ranks {
                let Some(crew) = order.get(at..at + ranks) else { continue };
                if bounds.may(members, crew) {
                    out.push((at + ranks, Some(space.crews.len())));
                    space.crews.push(crew.to_vec());
                }
            }
            space.moves.push(out);
        }
        space.moves.push(Vec::new());
        space
    }
}

/// Members that are alike, each list in the order of preference.
pub(super) fn kinds(members: &[Member<'_>]) -> Vec<Vec<usize>> {
    let mut kinds: Vec<Vec<usize>> = Vec::new();
    let like = |m: &Member<'_>| {
        (m.place, m.rate, m.worker.free(), m.worker.ranks_most, m.held.is_some(), m.shares)
    };
    for (index, member) in members.iter().enumerate() {
        let same = |kind: &&mut Vec<usize>| {
            // What holds something is like nobody else.
            member.held.is_none() && like(&members[kind[0]]) == like(member)
        };
        match kinds.iter_mut().find(same) {
            Some(kind) => kind.push(index),
            None => kinds.push(vec![index]),
        }
    }
    kinds
}

/// All ways to take `left` workers of kinds from `kind` on; ends where `found` says so.
fn crews_of(
    kinds: &[Vec<usize>],
    counts: &mut Vec<usize>,
    (kind, left): (usize, usize),
    found: &mut dyn FnMut(&[usize]) -> bool,
) -> bool {
    if left == 0 {
        return found(counts);
    }
    let Some(here) = kinds.get(kind) else { return true };
    for n in (0..=here.len().min(left)).rev() {
        counts[kind] = n;
        let goes_on = crews_of(kinds, counts, (kind + 1, left - n), found);
        counts[kind] = 0;
        if !goes_on {
            return false;
        }
    }
    true
}

/// The orders that are tried where there are too many workers for all: the fastest first, the roomiest
/// first, as they are now.
pub(super) fn orders(members: &[Member<'_>]) -> Vec<Vec<usize>> {
    let all: Vec<usize> = (0..members.len()).collect();
    let mut roomiest = all.clone();
    roomiest.sort_by_key(|m| {
        let m = &members[*m];
        (m.place, std::cmp::Reverse(m.worker.free()), std::cmp::Reverse(m.rate), m.worker.node)
    });
    let mut present = all.clone();
    present.sort_by_key(|m| (members[*m].held.map_or(u32::MAX, |held| held.layers.0), *m));
    let mut orders = vec![all];
    for order in [roomiest, present] {
        if !orders.contains(&order) {
            orders.push(order);
        }
    }
    orders
}

impl Held {
    /// What of it counts where a stage has so many ranks.
    pub fn of(self, ranks: usize) -> Option<(u32, LayerRange)> {
        let layers = LayerRange::new(self.layers.0, self.layers.1);
        (self.ranks as usize == ranks).then_some((self.rank, layers))
    }
}
