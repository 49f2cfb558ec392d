//! What the search of meshes looks at: workers, the spaces of crews over them, and tables that crews share. All of
//! it but which layers fit is made once, however many limits are tried.

use std::collections::BTreeMap;

use shoal_protocol::mesh::Reduction;
use shoal_protocol::plan::ReplicaLimits;
use shoal_protocol::units::{Bytes, LayerRange};

use super::ModelShape;
use super::chain::{Crew, Reach, Weights};
use super::cost::{Link, Times, seats, shared};
use super::memory::{Costs, Needs};
use super::space::{self, Bounds, Member, Space};
use super::topology::Topology;

/// Crews x layers x stages of a chain, weighed with its places, up to which the place of each last stage is known:
/// a step takes some ten nanoseconds, and a chain is searched some four times.
const EACH_MAX: u64 = 100_000;

/// One space, and how places enter it.
pub(super) struct Searched {
    pub space: Space,
    pub topology: Topology,
    pub crews: Vec<Crew>,
    /// The least room of each crew, which counts for all of it: its ranks need about the same.
    rooms: Vec<Bytes>,
}

/// See the module.
pub(super) struct Spaces<'w> {
    pub members: Vec<Member<'w>>,
    pub all: Vec<Searched>,
    pub times: Vec<Times>,
    pub reaches: Vec<Reach>,
}

impl<'w> Spaces<'w> {
    /// Of members, the ways between their places, and these spaces.
    pub fn new(
        shape: &ModelShape,
        (costs, reduction): (&[Vec<Costs<'_>>], Reduction),
        (members, links): (Vec<Member<'w>>, Vec<Vec<Link>>),
        spaces: Vec<(Space, Topology)>,
    ) -> Self {
        let mut times = Vec::new();
        let mut times_of: BTreeMap<(Vec<u64>, usize, bool), usize> = BTreeMap::new();
        let mut crew_of = |crew: &Vec<usize>| {
            let costs = &costs[crew.len() - 1];
            let place = members[crew[0]].place;
            let rates = rates_of(&members, crew);
            let by_rank: Vec<u64> = seats(costs, &rates).iter().map(|seat| rates[*seat]).collect();
            let next = times.len();
            let workers: Vec<_> = crew.iter().map(|m| members[*m].worker).collect();
            let link = links[place][place].of_ranks(&workers);
            let key = (by_rank, place, link == Link::BESIDE);
            let times = *times_of.entry(key).or_insert_with_key(|(by_rank, ..)| {
                times.push(Times::new(shape, costs, by_rank, (link, reduction)));
                next
            });
            let held = crew.iter().filter_map(|m| members[*m].held?.of(crew.len())).collect();
            Crew { members: crew.clone(), place, times, reach: 0, held }
        };
        let room = |crew: &Vec<usize>| crew.iter().map(|m| members[*m].worker.free()).min();
        let all = spaces
            .into_iter()
            .map(|(space, topology)| Searched {
                crews: space.crews.iter().map(&mut crew_of).collect(),
                rooms: space.crews.iter().map(|crew| room(crew).unwrap_or_default()).collect(),
                space,
                topology,
            })
            .collect();
        Self { members, all, times, reaches: Vec::new() }
    }

    /// Finds out which layers fit where under these limits.
    pub fn under(&mut self, costs: &[Vec<Costs<'_>>], limits: &ReplicaLimits) {
        self.reaches.clear();
        let mut reach_of: BTreeMap<(usize, Bytes), usize> = BTreeMap::new();
        // By number of ranks.
        let mut needs: BTreeMap<usize, Vec<Needs>> = BTreeMap::new();
        let layers = costs[0][0].layers();
        for space in &mut self.all {
            for (crew, room) in space.crews.iter_mut().zip(&space.rooms) {
                let ranks = crew.members.len();
                crew.reach = *reach_of.entry((ranks, *room)).or_insert_with(|| {
                    let needs =
                        needs.entry(ranks).or_insert_with(|| unlike(&costs[ranks - 1], limits));
                    self.reaches.push(reach(needs, layers, *room));
                    self.reaches.len() - 1
                });
            }
        }
    }
}

/// The spaces that are searched: all orders where that is little enough, else some chains.
pub(super) fn to_search(
    members: &[Member<'_>],
    links: &[Vec<Link>],
    bounds: Bounds<'_>,
    row_bytes: u64,
) -> Vec<(Space, Topology)> {
    if let Some(space) = Space::of_kinds(members, bounds) {
        let topology = Topology::each(links, row_bytes, space.places(members));
        return vec![(space, topology)];
    }
    let orders = space::orders(members).into_iter();
    let chain = |mut order: Vec<usize>| {
        order.truncate(bounds.workers);
        let space = Space::of_chain(members, &order, bounds);
        let stages = bounds.stages.map_or(1, |stages| {
            let spare = order.len().saturating_sub(stages as usize);
            spare.min(stages as usize) as u64 + 1
        });
        let steps = space.crews.len() as u64 * u64::from(bounds.layers) * stages;
        let places = space.places(members);
        let each = steps.saturating_mul(space::weight(places.len()));
        if each <= EACH_MAX * space::weight(1) {
            return vec![(space, Topology::each(links, row_bytes, places))];
        }
        near_or_far(space, (members, &order), links, (bounds, row_bytes))
    };
    orders.flat_map(chain).collect()
}

/// A chain that knows no more of places than whether it has left one, and by itself each part of it that is in one.
pub(super) fn near_or_far(
    space: Space,
    (members, order): (&[Member<'_>], &[usize]),
    links: &[Vec<Link>],
    (bounds, row_bytes): (Bounds<'_>, u64),
) -> Vec<(Space, Topology)> {
    let chain: Vec<usize> = order.iter().map(|m| members[*m].place).collect();
    let places = space.places(members);
    let mut spaces = vec![(space, Topology::near_or_far(links, row_bytes, &chain))];
    for place in places {
        let here: Vec<usize> =
            order.iter().copied().filter(|m| members[*m].place == place).collect();
        if here.len() > 1 {
            let space = Space::of_chain(members, &here, bounds);
            spaces.push((space, Topology::each(links, row_bytes, vec![place])));
        }
    }
    spaces
}

/// What the members of a crew read in a second while all of them compute.
pub(super) fn rates_of(members: &[Member<'_>], crew: &[usize]) -> Vec<u64> {
    let crew: Vec<_> = crew.iter().map(|m| (members[*m].worker, members[*m].rate)).collect();
    shared(&crew)
}

/// What the ranks of a stage hold.
pub(super) fn weights(costs: &[Costs<'_>]) -> Weights {
    let by_rank: Vec<Vec<u64>> = costs.iter().map(Costs::weights_before).collect();
    let layers = by_rank.first().map_or(0, Vec::len);
    let all = (0..layers).map(|layer| by_rank.iter().map(|before| before[layer]).sum()).collect();
    Weights { all, by_rank }
}

/// What ranks need of memory; of those that need the same the first.
fn unlike(costs: &[Costs<'_>], limits: &ReplicaLimits) -> Vec<Needs> {
    let mut unlike: Vec<Needs> = Vec::new();
    for needs in costs.iter().map(|costs| costs.needs(limits)) {
        if !unlike.contains(&needs) {
            unlike.push(needs);
        }
    }
    unlike
}

/// Which layers fit in so much room on each rank.
fn reach(ranks: &[Needs], layers: u32, room: Bytes) -> Reach {
    let fits = |start: u32, end: u32| {
        let range = LayerRange::new(start, end);
        ranks.iter().all(|needs| needs.of(range) <= room)
    };
    let mut middle = Vec::with_capacity(layers as usize);
    let mut end = 0;
    for start in 0..layers {
        // Fewer layers from further on never need more, the first ones aside.
        end = if start <= 1 { start } else { end.max(start) };
        while end + 1 < layers && fits(start, end + 1) {
            end += 1;
        }
        middle.push(end);
    }
    Reach { middle, last: (0..layers).map(|start| fits(start, layers)).collect() }
}
