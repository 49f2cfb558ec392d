//! The exact search: which crews take which layers, as a shortest way through a table.
//!
//! ```text
//! cell (column, stages, place, layers) = so many layers placed, with these workers used, in so many stages,
//!                                        the last of them in that place
//!   ─► a crew that the column leaves free takes layers..end where its memory allows ─► the crew's column
//!
//! back:    what is left to pay from each cell at the least (time and bytes: differences of sums over layers, so
//!          the best end of a stage is the least of a window that slides: each cell is looked at once a crew)
//! forward: of the ways that pay no more than that, the one whose slowest stage is the fastest, then the most even
//! ```
//!
//! A column is a set of workers that are used; what the columns are, and which crews (the ranks of a stage)
//! lead from one to another, is given ([`Space`](super::space::Space)). What a stage costs depends on the cell
//! and on the stage alone, so the best way to a cell is part of the best way through it: the result is the
//! best of all layouts of the space. Columns only grow, so each is complete when its turn comes.

use std::borrow::Cow;

use shoal_protocol::mesh::Objective;
use shoal_protocol::units::LayerRange;

use super::cost::Times;
use super::window::{Aim, Cost, NEVER, Sums, Window, first_stage, plus, slowest_stage};

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

/// Of latency: the time of a token, the bytes that are read anew, the slowest stage, the sum of squares of the
/// stages' times. Of throughput: the slowest stage or way, the bytes, the time of a token, the squares.
pub(super) type Score = (u64, u64, u64, u64);

/// A crew and its layers, in pipeline order.
pub(super) type Way = Vec<(usize, LayerRange)>;

/// The table's sizes.
#[derive(Clone, Copy)]
struct Size {
    counts: usize,
    places: usize,
    width: usize,
}

impl Size {
    fn at(self, (column, count, place): (usize, usize, usize)) -> usize {
        ((column * self.counts + count) * self.places + place) * self.width
    }

    fn per_column(self) -> usize {
        self.at((1, 0, 0))
    }
}

impl Problem<'_> {
    /// The best of all layouts, and how good it is.
    pub fn search(&self, objective: Objective) -> Option<(Score, Way)> {
        match objective {
            Objective::Latency => {
                let ((time, read), even, way) = self.within(u64::MAX, true)?;
                Some(((time, read, even.0, even.1), way))
            }
            Objective::Throughput => {
                let sums = self.sums(u64::MAX);
                let firsts = (0..self.hops.len()).filter_map(|first| self.slowest(first, &sums));
                let most = firsts.min().filter(|most| *most <= self.bound)?;
                let ((read, time), even, way) = self.within(most, false)?;
                Some(((most, read, time, even.1), way))
            }
        }
    }

    fn size(&self) -> Size {
        Size {
            counts: self.stages.map_or(1, |stages| stages as usize + 1),
            places: self.hops.len(),
            width: self.layers as usize + 1,
        }
    }

    /// Of each crew, where no stage takes longer than that.
    fn sums(&self, most: u64) -> Vec<Sums<'_>> {
        self.crews.iter().map(|crew| self.sums_of(crew, most)).collect()
    }

    fn sums_of(&self, crew: &Crew, most: u64) -> Sums<'_> {
        let (time, reach) = (self.times[crew.times].before(), &self.reaches[crew.reach]);
        let weights = &self.weights[crew.members.len() - 1];
        let layers = self.layers as usize;
        let mut end = 0;
        let mut ends = Vec::with_capacity(layers);
        for (start, fits) in reach.middle.iter().enumerate() {
            end = end.max(start);
            while end + 1 < layers && time[end + 1] - time[start] <= most {
                end += 1;
            }
            ends.push(end.min(*fits as usize) as u32);
        }
        let in_time = |start: usize| most == u64::MAX || time[layers] - time[start] <= most;
        let last = reach.last.iter().enumerate().map(|(start, fits)| *fits && in_time(start));
        let read = match crew.held.is_empty() {
            true => Cow::Borrowed(&weights.all[..]),
            false => Cow::Owned(read_anew(weights, &crew.held)),
        };
        Sums { time, read, ends, last: last.collect() }
    }

    /// The best of the layouts in which no stage and no way is busy for longer than `most`: what it takes, how
    /// even it is, and the way. With several places each is tried as that of the first stage.
    fn within(&self, most: u64, time_first: bool) -> Option<(Cost, Even, Way)> {
        let sums = self.sums(most);
        let mut best: Option<(Cost, Even, Way)> = None;
        for first in 0..self.hops.len() {
            let aim = Aim { first, time_first, most };
            let table = self.back(aim, &sums);
            let least = table[self.size().at((0, 0, first))];
            let worse = best.as_ref().is_some_and(|(cost, ..)| *cost < least);
            if least == NEVER || worse || (time_first && least.0 > self.bound) {
                continue;
            }
            let Some((even, way)) = self.forward(aim, &sums, &table) else { continue };
            if best.as_ref().is_none_or(|(cost, other, _)| (least, even) < (*cost, *other)) {
                best = Some((least, even, way));
            }
        }
        best
    }

    /// What is left to pay from each cell at the least.
    fn back(&self, aim: Aim, sums: &[Sums<'_>]) -> Vec<Cost> {
        let size = self.size();
        let mut table = vec![NEVER; self.moves.len() * size.per_column()];
        let mut window = Window::default();
        let mut here = vec![NEVER; size.width];
        self.each_move(&mut table, (0, 0), |table, (count, at), crew, to| {
            let there = self.crews[crew].place;
            let (own, behind) = table.split_at_mut(to);
            let behind = &behind[..size.width];
            let back = self.backs[there][aim.first];
            window.least(&sums[crew], behind, aim, back, &mut here);
            for from in 0..size.places {
                if self.busy[from][there] > aim.most {
                    continue;
                }
                let hop = aim.cost(self.hops[from][there], 0);
                let row = &mut own[at + from * size.width..][..size.width];
                for (cell, cost) in row.iter_mut().zip(&here).skip(1) {
                    if *cost != NEVER {
                        *cell = (*cell).min(plus(*cost, hop));
                    }
                }
            }
            if count == 0 && there == aim.first {
                let cell = &mut own[at + aim.first * size.width];
                *cell = (*cell).min(first_stage(&sums[crew], behind, aim));
            }
        });
        table
    }

    /// The least time for which the slowest stage or way of any layout is busy.
    fn slowest(&self, first: usize, sums: &[Sums<'_>]) -> Option<u64> {
        let size = self.size();
        let mut table = vec![u64::MAX; self.moves.len() * size.per_column()];
        let mut stairs = Vec::with_capacity(size.width);
        let mut here = vec![u64::MAX; size.width];
        self.each_move(&mut table, 0, |table, (count, at), crew, to| {
            let there = self.crews[crew].place;
            let (own, behind) = table.split_at_mut(to);
            slowest_stage(&sums[crew], &behind[..size.width], &mut stairs, &mut here);
            for from in 0..size.places {
                let row = &mut own[at + from * size.width..][..size.width];
                for (cell, slowest) in row.iter_mut().zip(&here).skip(1) {
                    *cell = (*cell).min((*slowest).max(self.busy[from][there]));
                }
            }
            if count == 0 && there == first {
                let cell = &mut own[at + first * size.width];
                *cell = (*cell).min(here[0]);
            }
        });
        Some(table[size.at((0, 0, first))]).filter(|slowest| *slowest != u64::MAX)
    }

    /// Every crew from every column, the last column first: `(table, (stages before, its row there), crew, the
    /// row behind it)`. Columns only grow, so what is behind one is complete when its turn comes.
    fn each_move<T: Copy + Ord>(
        &self,
        table: &mut [T],
        end: T,
        mut take: impl FnMut(&mut [T], (usize, usize), usize, usize),
    ) {
        let size = self.size();
        let layers = size.width - 1;
        let most = self.most_stages();
        for (column, moves) in self.moves.iter().enumerate().rev() {
            let (before, behind) = most[column];
            let least = (size.counts - 1).saturating_sub(behind);
            for count in least..size.counts.min(before + 1) {
                let at = size.at((column, count, 0));
                let all = self.stages.map(|stages| stages as usize == count);
                if all != Some(false) {
                    (0..size.places)
                        .for_each(|place| table[at + place * size.width + layers] = end);
                }
                if all == Some(true) {
                    continue;
                }
                let next = if self.stages.is_some() { count + 1 } else { 0 };
                for (to, crew) in moves {
                    match crew {
                        Some(crew) => {
                            let to = size.at((*to, next, self.crews[*crew].place));
                            take(table, (count, at), *crew, to);
                        }
                        // The place stays in the cell: it is that of the last stage, not of who is left out.
                        None => {
                            let (own, behind) = table.split_at_mut(size.at((*to, count, 0)));
                            let rows = size.places * size.width;
                            for (cell, other) in own[at..at + rows].iter_mut().zip(behind) {
                                *cell = (*cell).min(*other);
                            }
                        }
                    }
                }
            }
        }
    }

    /// The most stages that can be before each column, and behind it.
    fn most_stages(&self) -> Vec<(usize, usize)> {
        let mut most = vec![(0, 0); self.moves.len()];
        let stage = |crew: &Option<usize>| usize::from(crew.is_some());
        for (column, moves) in self.moves.iter().enumerate() {
            for (to, crew) in moves {
                most[*to].0 = most[*to].0.max(most[column].0 + stage(crew));
            }
        }
        for (column, moves) in self.moves.iter().enumerate().rev() {
            let behind = moves.iter().map(|(to, crew)| most[*to].1 + stage(crew));
            most[column].1 = behind.max().unwrap_or(0);
        }
        most
    }

    /// Of the ways that cost what is left to pay and no more, the most even one.
    fn forward(&self, aim: Aim, sums: &[Sums<'_>], table: &[Cost]) -> Option<(Even, Way)> {
        let size = self.size();
        let mut cells = vec![Cell::EMPTY; table.len()];
        // So small that equals are told apart, and so large that a sum of squares fits.
        let whole = self.times.iter().filter_map(|times| times.before().last()).max();
        let unit = whole.map_or(1, |whole| (whole >> SQUARE_BITS).max(1));
        cells[size.at((0, 0, aim.first))] = Cell { even: (0, 0), ..Cell::EMPTY };
        let mut best: Option<(Even, usize)> = None;
        for (column, moves) in self.moves.iter().enumerate() {
            for inside in 0..size.per_column() {
                let at = column * size.per_column() + inside;
                let cell = cells[at];
                if cell.even == NEVER {
                    continue;
                }
                let start = inside % size.width;
                let place = inside / size.width % size.places;
                let count = inside / size.width / size.places;
                if start + 1 == size.width {
                    if best.is_none_or(|(other, _)| cell.even < other) {
                        best = Some((cell.even, at));
                    }
                    continue;
                }
                for (to, crew) in moves {
                    let Some(crew) = *crew else {
                        let to = to * size.per_column() + inside;
                        if table[to] == table[at] {
                            cell.put(&mut cells[to]);
                        }
                        continue;
                    };
                    let there = self.crews[crew].place;
                    if start == 0 && there != aim.first
                        || start > 0 && self.busy[place][there] > aim.most
                    {
                        continue;
                    }
                    let next = if self.stages.is_some() { count + 1 } else { 0 };
                    let to = size.at((*to, next, there));
                    let step = Step { at, crew, start, left: table[at], from: place, unit };
                    let rows = (&table[to..to + size.width], &mut cells[to..to + size.width]);
                    self.extend(aim, step, (&sums[crew], cell.even), rows);
                }
            }
        }
        let (even, at) = best?;
        Some((even, way(&cells, at, size.width)))
    }

    /// Gives a crew every range of layers from a cell on with which no more is paid than must be.
    fn extend(
        &self,
        aim: Aim,
        step: Step,
        (sums, even): (&Sums<'_>, Even),
        (behind, row): (&[Cost], &mut [Cell]),
    ) {
        let Step { at, crew, start, left, from, unit } = step;
        let there = self.crews[crew].place;
        let hop = if start == 0 { 0 } else { self.hops[from][there] };
        let layers = behind.len() - 1;
        let last = sums.last[start].then_some(layers);
        for end in (start + 1..=sums.ends[start] as usize).chain(last) {
            if behind[end] == NEVER {
                continue;
            }
            let back = if end == layers && start > 0 { self.backs[there][aim.first] } else { 0 };
            let time = sums.time[end] - sums.time[start];
            let paid =
                aim.cost(time.saturating_add(hop).saturating_add(back), sums.read(start, end));
            if plus(paid, behind[end]) == left {
                let square = (time / unit).saturating_mul(time / unit);
                let even = (even.0.max(time), even.1.saturating_add(square));
                Cell { even, from: at as u32, crew: crew as u32 }.put(&mut row[end]);
            }
        }
    }
}

/// Times of so many bits are squared: the sum of thousands of squares fits.
const SQUARE_BITS: u32 = 26;

/// One crew tried from one cell, from which so much is left to pay.
#[derive(Clone, Copy)]
struct Step {
    at: usize,
    crew: usize,
    start: usize,
    left: Cost,
    from: usize,
    /// In which times are squared.
    unit: u64,
}

/// The slowest stage, and the sum of squares of all: the less, the more even.
type Even = (u64, u64);

#[derive(Clone, Copy)]
struct Cell {
    even: Even,
    from: u32,
    crew: u32,
}

/// Where there is nothing, and what is before the first stage.
const NONE: u32 = u32::MAX;

impl Cell {
    /// Nobody has come here yet.
    const EMPTY: Self = Self { even: NEVER, from: NONE, crew: NONE };

    /// Takes the place of what is there where it is better.
    fn put(self, target: &mut Self) {
        if self.even < target.even {
            *target = self;
        }
    }
}

fn way(cells: &[Cell], end: usize, width: usize) -> Way {
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

/// Weight bytes before each layer that ranks do not have which hold these.
fn read_anew(weights: &Weights, held: &[(u32, LayerRange)]) -> Vec<u64> {
    let kept = |layer: usize| -> u64 {
        let of = |(rank, held): &(u32, LayerRange)| {
            let before = weights.by_rank.get(*rank as usize)?;
            let (start, end) = (held.start as usize, (held.end as usize).min(layer));
            Some(if start < end { before[end] - before[start] } else { 0 })
        };
        held.iter().filter_map(of).sum()
    };
    weights.all.iter().enumerate().map(|(layer, all)| all.saturating_sub(kept(layer))).collect()
}
