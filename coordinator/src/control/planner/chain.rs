//! The exact search: which crews take which layers, as a shortest way through a table.
//!
//! ```text
//! cell (column, stages, place, layers) = the best way to have placed so many layers, with these workers used,
//!                                        in so many stages, the last of them in that place
//!   ─► a crew that the column leaves free takes layers..end where its memory allows ─► the crew's column
//! ```
//!
//! A column is a set of workers that are used; what the columns are, and which crews (the ranks of a stage)
//! lead from one to another, is given ([`Space`](super::space::Space)). What a stage costs depends on the cell
//! and on the stage alone, so the best way to a cell is part of the best way through it: the result is the
//! best of all layouts of the space. Columns only grow, so each is complete when its turn comes.

use shoal_protocol::units::LayerRange;

use super::cost::Times;

/// The ranks of a stage that might be, as the table sees them.
#[derive(Clone, Debug)]
pub(super) struct Crew {
    /// Its workers, by their number in the space, in no order.
    pub members: Vec<usize>,
    /// Where they are.
    pub place: usize,
    /// How long layers take: an index.
    pub times: usize,
    /// Which layers fit: an index.
    pub reach: usize,
    /// How many weight bytes it has of which layers already, by rank.
    pub held: Vec<(u32, LayerRange)>,
}

/// Which layers fit the memory of a crew: the end behind which nothing fits, by start.
#[derive(Clone, Debug)]
pub(super) struct Reach {
    /// For stages that are not the last.
    pub middle: Vec<u32>,
    /// Whether a last stage that starts there fits.
    pub last: Vec<bool>,
}

/// One problem.
pub(super) struct Problem<'a> {
    pub layers: u32,
    /// What a row takes from place to place, in nanoseconds.
    pub hops: &'a [Vec<u64>],
    /// How long it keeps the way busy.
    pub busy: &'a [Vec<u64>],
    /// What a token takes that goes back to the head.
    pub backs: &'a [Vec<u64>],
    pub crews: &'a [Crew],
    pub times: &'a [Times],
    pub reaches: &'a [Reach],
    /// From each column: to which one, and with which crew; without one its workers are left out.
    pub moves: &'a [Vec<(usize, Option<usize>)>],
    /// Exactly so many stages.
    pub stages: Option<u32>,
    /// Of stages with so many ranks (less one).
    pub weights: &'a [Weights],
    /// Nothing is wanted whose first score is above this.
    pub bound: u64,
}

/// Weight bytes of the layers before each one.
#[derive(Clone, Debug)]
pub(super) struct Weights {
    /// Of all ranks together.
    pub all: Vec<u64>,
    pub by_rank: Vec<Vec<u64>>,
}

/// What is to be least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    /// The sum of all times, then the bytes that are read anew, then the sum of squares of the stages' times,
    /// so that equals are even.
    Sum,
    /// The longest time for which a stage or a way between two is busy.
    Slowest,
    /// The bytes that are read anew, then the sum, then that of squares, where no stage and no way is busy for
    /// longer than this.
    Within(u64),
}

/// First the first, then the second, then the third.
pub(super) type Score = (u64, u64, u64);

/// A crew and its layers, in pipeline order.
pub(super) type Way = Vec<(usize, LayerRange)>;

/// What a stage's row and its token travel, in nanoseconds.
#[derive(Clone, Copy, Default)]
struct Ways {
    hop: u64,
    busy: u64,
    back: u64,
}

#[derive(Clone, Copy)]
struct Cell {
    score: Score,
    from: u32,
    crew: u32,
}

/// Where there is nothing, and what is before the first stage.
const NONE: u32 = u32::MAX;

impl Cell {
    /// Nobody has come here yet.
    const EMPTY: Self = Self { score: (u64::MAX, u64::MAX, u64::MAX), from: NONE, crew: NONE };
    const START: Self = Self { score: (0, 0, 0), from: NONE, crew: NONE };

    fn is_empty(&self) -> bool {
        self.score.0 == u64::MAX
    }

    /// Takes the place of what is there where it is better.
    fn put(self, target: &mut Self) {
        if self.score < target.score {
            *target = self;
        }
    }
}

impl Problem<'_> {
    /// The best of all layouts, and how good it is.
    pub fn search(&self, goal: Goal) -> Option<(Score, Way)> {
        let places = self.hops.len();
        // What the way back costs follows from where the first stage is: with several places each is tried.
        let firsts = (0..places).filter_map(|first| self.search_from(goal, first));
        firsts.reduce(|best, next| if next.0 < best.0 { next } else { best })
    }

    fn search_from(&self, goal: Goal, first: usize) -> Option<(Score, Way)> {
        let (places, width) = (self.hops.len(), self.layers as usize + 1);
        let counts = self.stages.map_or(1, |stages| stages as usize + 1);
        let per_column = counts * places * width;
        let rest = self.rest();
        let mut cells = vec![Cell::EMPTY; self.moves.len() * per_column];
        cells[first * width] = Cell::START;
        let mut best: Option<(Score, usize)> = None;
        for (column, moves) in self.moves.iter().enumerate() {
            for inside in 0..per_column {
                let at = column * per_column + inside;
                let cell = cells[at];
                if cell.is_empty() {
                    continue;
                }
                let start = (inside % width) as u32;
                let place = inside / width % places;
                let count = inside / width / places;
                let all = self.stages.is_some_and(|stages| stages as usize == count);
                if start == self.layers {
                    let enough = all || self.stages.is_none();
                    if enough && best.is_none_or(|(other, _)| cell.score < other) {
                        best = Some((cell.score, at));
                    }
                    continue;
                }
                for (to, crew) in moves {
                    let Some(crew) = *crew else {
                        // The place stays in the cell: it is that of the last stage, not of who is left out.
                        cell.put(&mut cells[to * per_column + inside]);
                        continue;
                    };
                    let there = self.crews[crew].place;
                    if all || (start == 0 && there != first) {
                        continue;
                    }
                    let next = if self.stages.is_some() { count + 1 } else { 0 };
                    let into = ((to * counts + next) * places + there) * width;
                    let step =
                        Step { goal, at, crew, start, ways: self.ways(start, place, there, first) };
                    self.extend(step, cell.score, &rest, &mut cells[into..into + width]);
                }
            }
        }
        let (score, at) = best?;
        Some((score, self.way(&cells, at, width)))
    }

    /// What a stage's row and its token travel. One stage alone sends nothing on, and nothing back.
    fn ways(&self, start: u32, from: usize, there: usize, first: usize) -> Ways {
        if start == 0 {
            return Ways::default();
        }
        Ways {
            hop: self.hops[from][there],
            busy: self.busy[from][there],
            back: self.backs[there][first],
        }
    }

    /// What the layers from each one on take at the least.
    fn rest(&self) -> Vec<u64> {
        let mut rest = vec![0_u64; self.layers as usize + 1];
        for layer in (0..self.layers).rev() {
            let one = LayerRange::new(layer, layer + 1);
            let least = self.times.iter().map(|times| times.of(one)).min().unwrap_or(0);
            rest[layer as usize] = rest[layer as usize + 1].saturating_add(least);
        }
        rest
    }

    /// Gives a crew every range of layers from `start` on that fits it.
    fn extend(&self, step: Step, score: Score, rest: &[u64], row: &mut [Cell]) {
        let Step { goal, at, crew, start, ways } = step;
        let Crew { times, reach, members, held, .. } = &self.crews[crew];
        let (times, reach) = (&self.times[*times], &self.reaches[*reach]);
        let last = reach.last[start as usize].then_some(self.layers);
        let ends = (start + 1..=reach.middle[start as usize]).chain(last);
        let weights = &self.weights[members.len() - 1];
        for end in ends {
            let range = LayerRange::new(start, end);
            let time = times.of(range);
            let Ways { mut hop, busy, back } = ways;
            if end == self.layers {
                hop = hop.saturating_add(back);
            }
            // In microseconds, so that a sum of squares of seconds fits.
            let square = score.2.saturating_add((time / 1000).saturating_mul(time / 1000));
            let sum = |sum: u64| sum.saturating_add(time).saturating_add(hop);
            let read = |sum: u64| sum.saturating_add(read_anew(weights, held, range));
            let score = match goal {
                Goal::Sum => {
                    let time = sum(score.0);
                    if time.saturating_add(rest[end as usize]) > self.bound {
                        continue;
                    }
                    (time, read(score.1), square)
                }
                Goal::Slowest => {
                    let slowest = score.0.max(time).max(busy);
                    if slowest > self.bound {
                        continue;
                    }
                    (slowest, 0, 0)
                }
                Goal::Within(most) if time > most || busy > most => continue,
                Goal::Within(_) => (read(score.0), sum(score.1), square),
            };
            let cell = Cell { score, from: at as u32, crew: crew as u32 };
            cell.put(&mut row[end as usize]);
        }
    }

    fn way(&self, cells: &[Cell], end: usize, width: usize) -> Way {
        let mut way = Vec::new();
        let mut at = end;
        while let Some(cell) = cells.get(at).filter(|cell| cell.from != NONE) {
            let from = cell.from as usize;
            let layers = LayerRange::new((from % width) as u32, (at % width) as u32);
            way.push((cell.crew as usize, layers));
            at = from;
        }
        way.reverse();
        way
    }
}

/// One crew tried from one cell.
#[derive(Clone, Copy)]
struct Step {
    goal: Goal,
    at: usize,
    crew: usize,
    start: u32,
    ways: Ways,
}

/// Weight bytes of these layers that the crew does not have yet.
fn read_anew(weights: &Weights, held: &[(u32, LayerRange)], range: LayerRange) -> u64 {
    let of = |before: &[u64], start: u32, end: u32| {
        if start < end { before[end as usize] - before[start as usize] } else { 0 }
    };
    let kept = held.iter().filter_map(|(rank, held)| {
        let before = weights.by_rank.get(*rank as usize)?;
        Some(of(before, held.start.max(range.start), held.end.min(range.end)))
    });
    of(&weights.all, range.start, range.end).saturating_sub(kept.sum())
}
