//! How places enter the search: what a row takes to the next stage depends on where the last one is.
//!
//! | | a cell knows of its last stage | the place of the first stage | exact |
//! |---|---|---|---|
//! | `each` | its place | each in turn, for the way back | yes |
//! | `near_or_far` | whether it is in the place where its column is | all at once | where all ways between places are alike |
//!
//! The first takes places x places as long as one place does: with a zone for each of 64 workers thousands of
//! times. The second takes twice as long, however many places there are. It counts the worst way from any place
//! that is earlier in the chain, and the worst way back: more than is there, never less, and the same where nobody
//! has measured ways between zones. What stays in one place is looked at by itself, with the first.

use super::Link;

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Topology {
    /// What a row takes from a state to a place, in nanoseconds.
    hops: Vec<Vec<u64>>,
    /// How long it keeps the way busy.
    busy: Vec<Vec<u64>>,
    /// What a token takes that goes back from a place to the first one.
    backs: Vec<Vec<u64>>,
    firsts: Vec<usize>,
    /// By column of a chain, whether another place begins there; none where states are places.
    borders: Option<Vec<bool>>,
}

/// The last stage is in another place than the column.
const FAR: usize = 0;

/// It is in the same.
const NEAR: usize = 1;

impl Topology {
    /// A state for each place; stages that might be first are in `firsts`.
    pub fn each(links: &[Vec<Link>], row_bytes: u64, firsts: Vec<usize>) -> Self {
        let of = |time: &dyn Fn(&Link) -> u64| -> Vec<Vec<u64>> {
            links.iter().map(|row| row.iter().map(time).collect()).collect()
        };
        Self {
            hops: of(&|link| link.time(row_bytes)),
            busy: of(&|link| link.occupied(row_bytes)),
            backs: of(&|link| link.latency_ns),
            firsts,
            borders: None,
        }
    }

    /// Of a chain whose workers are in these places.
    pub fn near_or_far(links: &[Vec<Link>], row_bytes: u64, chain: &[usize]) -> Self {
        // The worst way between a place and those that have been left before it comes.
        let mut into: Vec<Option<Link>> = vec![None; links.len()];
        let mut seen: Vec<usize> = Vec::new();
        for place in chain {
            if seen.contains(place) {
                continue;
            }
            let ways = seen.iter().map(|other| links[*other][*place]);
            into[*place] = ways.reduce(Link::worse);
            seen.push(*place);
        }
        let own = |place: usize| links[place][place];
        let far = |place: usize| into[place].unwrap_or_else(|| own(place));
        let of = |time: &dyn Fn(Link) -> u64| -> Vec<Vec<u64>> {
            let places = 0..links.len();
            let of_far = places.clone().map(|place| time(far(place)));
            vec![of_far.collect(), places.map(|place| time(own(place))).collect()]
        };
        let back = |place: usize| vec![far(place).worse(own(place)).latency_ns];
        let mut borders = vec![true];
        borders.extend(chain.windows(2).map(|pair| pair[0] != pair[1]));
        borders.push(false);
        Self {
            hops: of(&|link| link.time(row_bytes)),
            busy: of(&|link| link.occupied(row_bytes)),
            backs: (0..links.len()).map(back).collect(),
            firsts: vec![0],
            borders: Some(borders),
        }
    }

    /// How many states a cell may have.
    pub fn states(&self) -> usize {
        self.hops.len()
    }

    /// What is tried in turn.
    pub fn firsts(&self) -> &[usize] {
        &self.firsts
    }

    /// From a stage in this state to a place.
    pub fn hop(&self, state: usize, place: usize) -> u64 {
        self.hops[state][place]
    }

    /// How long a row keeps that way busy.
    pub fn busy(&self, state: usize, place: usize) -> u64 {
        self.busy[state][place]
    }

    /// From a last stage to the first.
    pub fn back(&self, place: usize, first: usize) -> u64 {
        self.backs[place][first]
    }

    /// Whether a first stage may be there.
    pub fn begins(&self, first: usize, place: usize) -> bool {
        self.borders.is_some() || first == place
    }

    /// The state before there is any stage.
    pub fn start(&self, first: usize) -> usize {
        if self.borders.is_some() { FAR } else { first }
    }

    /// The state behind a stage in this place, where the next column is that.
    pub fn after(&self, column: usize, place: usize) -> usize {
        match &self.borders {
            Some(borders) if borders[column] => FAR,
            Some(_) => NEAR,
            None => place,
        }
    }

    /// What a state becomes when workers are left out up to that column.
    pub fn passed(&self, column: usize, state: usize) -> usize {
        match &self.borders {
            Some(borders) if borders[column] => FAR,
            _ => state,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_knows_whether_it_has_left_a_place() {
        let way = |ms: u64| Link { latency_ns: ms * 1_000_000, bytes_per_s: 1_000_000_000 };
        let links = vec![
            vec![way(1), way(10), way(20)],
            vec![way(10), way(2), way(30)],
            vec![way(20), way(30), way(3)],
        ];
        let topology = Topology::near_or_far(&links, 0, &[0, 0, 1, 2, 2]);
        let ms = |ns: u64| ns / 1_000_000;
        // Behind a worker of the first place: near before the second one, far at the border.
        assert_eq!((topology.after(1, 0), topology.after(2, 0)), (NEAR, FAR));
        assert_eq!((topology.passed(1, NEAR), topology.passed(2, NEAR)), (NEAR, FAR));
        assert_eq!((ms(topology.hop(NEAR, 0)), ms(topology.hop(FAR, 1))), (1, 10));
        // The worst way from any place before, and so back.
        assert_eq!((ms(topology.hop(FAR, 2)), ms(topology.hop(NEAR, 2))), (30, 3));
        assert_eq!(ms(topology.back(2, 0)), 30);
        assert!(topology.begins(0, 2) && topology.states() == 2);
        let each = Topology::each(&links, 0, vec![0, 1, 2]);
        assert_eq!((each.after(3, 2), each.start(1), each.states()), (2, 1, 3));
        assert!(!each.begins(0, 2) && ms(each.back(2, 0)) == 20);
    }
}
