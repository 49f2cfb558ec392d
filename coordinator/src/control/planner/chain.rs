//! The exact search: which crews take which layers, as a shortest way through a table.
//!
//! ```text
//! cell (column, stages, state, layers) = so many layers placed, with these workers used, in so many stages,
//!                                        the last of them in a place as the state says (`topology`)
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
use std::ops::{Range, RangeInclusive};

use shoal_protocol::mesh::Objective;
use shoal_protocol::units::LayerRange;

use super::cells::{Cell, Even, Size, Way, way};
use super::cost::Times;
use super::topology::Topology;
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
    /// What ways take.
    pub topology: &'a Topology,
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

impl Problem<'_> {
    /// The best of all layouts, and how good it is.
    pub fn search(&self, objective: Objective) -> Option<(Score, Way)> {
        match objective {
            Objective::Latency => {
                let ((time, read), even, way) = self.within(u64::MAX, true)?;
                Some(((time, read, even.0, even.1), way))
            }
            Objective::Throughput => {
                // What is slower than the bound is not wanted.
                let most = self.slowest(&self.sums(self.bound)).filter(|m| *m <= self.bound)?;
                let ((read, time), even, way) = self.within(most, false)?;
                Some(((most, read, time, even.1), way))
            }
        }
    }

    fn size(&self) -> Size {
        let (states, width) = (self.topology.states(), self.layers as usize + 1);
        let mut cells = 0;
        let column = |(before, behind): (usize, usize)| {
            let counts = match self.stages.map(|stages| stages as usize) {
                Some(stages) => stages.saturating_sub(behind)..stages.min(before) + 1,
                None => 0..1,
            };
            let at = cells;
            cells += counts.len() * states * width;
            (counts, at)
        };
        let columns = self.most_stages().into_iter().map(column).collect();
        Size { states, width, columns, cells }
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
        let (sums, size) = (self.sums(most), self.size());
        let mut best: Option<(Cost, Even, Way)> = None;
        for first in self.topology.firsts() {
            let aim = Aim { first: *first, time_first, most };
            let table = self.back(&size, aim, &sums);
            let least = table[size.start(self.topology.start(*first))?];
            let worse = best.as_ref().is_some_and(|(cost, ..)| *cost < least);
            if least == NEVER || worse || (time_first && least.0 > self.bound) {
                continue;
            }
            let Some((even, way)) = self.forward(&size, aim, &sums, &table) else { continue };
            if best.as_ref().is_none_or(|(cost, other, _)| (least, even) < (*cost, *other)) {
                best = Some((least, even, way));
            }
        }
        best
    }

    /// What is left to pay from each cell at the least.
    fn back(&self, size: &Size, aim: Aim, sums: &[Sums<'_>]) -> Vec<Cost> {
        let mut table = vec![NEVER; size.cells];
        let mut window = Window::default();
        let mut here = vec![NEVER; size.width];
        let (topology, bands) = (self.topology, self.bands(sums));
        self.each_move(
            size,
            &bands,
            &mut table,
            (0, 0),
            |table, (count, at), (crew, starts), to| {
                let there = self.crews[crew].place;
                let (own, behind) = table.split_at_mut(to);
                let (behind, cells) = (&behind[..size.width], inner(starts, size.width));
                let back = topology.back(there, aim.first);
                window.least(&sums[crew], behind, aim, (back, starts), &mut here);
                for from in 0..size.states {
                    if topology.busy(from, there) > aim.most {
                        continue;
                    }
                    let hop = aim.cost(topology.hop(from, there), 0);
                    let row = &mut own[at + from * size.width..][cells.clone()];
                    for (cell, cost) in row.iter_mut().zip(&here[cells.clone()]) {
                        if *cost != NEVER {
                            *cell = (*cell).min(plus(*cost, hop));
                        }
                    }
                }
                if count == 0 && starts.contains(&0) && topology.begins(aim.first, there) {
                    let cell = &mut own[at + topology.start(aim.first) * size.width];
                    *cell = (*cell).min(first_stage(&sums[crew], behind, aim));
                }
            },
        );
        table
    }

    /// The least time for which the slowest stage or way of any layout is busy.
    fn slowest(&self, sums: &[Sums<'_>]) -> Option<u64> {
        let (size, bands) = (self.size(), self.bands(sums));
        let mut table = vec![u64::MAX; size.cells];
        let mut stairs = Vec::with_capacity(size.width);
        let mut here = vec![u64::MAX; size.width];
        self.each_move(&size, &bands, &mut table, 0, |table, (count, at), (crew, starts), to| {
            let there = self.crews[crew].place;
            let (own, behind) = table.split_at_mut(to);
            let (behind, cells) = (&behind[..size.width], inner(starts, size.width));
            slowest_stage(&sums[crew], behind, starts, &mut stairs, &mut here);
            for from in 0..size.states {
                let busy = self.topology.busy(from, there);
                let row = &mut own[at + from * size.width..][..size.width];
                for (cell, slowest) in row[cells.clone()].iter_mut().zip(&here[cells.clone()]) {
                    *cell = (*cell).min((*slowest).max(busy));
                }
                // Wherever the first stage is: no way leads to it.
                if count == 0 && starts.contains(&0) {
                    row[0] = row[0].min(here[0]);
                }
            }
        });
        Some(table[size.start(0)?]).filter(|slowest| *slowest != u64::MAX)
    }

    /// By column: the layers that may be placed there, since those before it have room for so many, and those behind
    /// it for the rest. Nothing else is looked at.
    fn bands(&self, sums: &[Sums<'_>]) -> Vec<RangeInclusive<usize>> {
        let layers = self.layers as usize;
        let mut far = vec![None; self.moves.len()];
        far[0] = Some(0);
        for (column, moves) in self.moves.iter().enumerate() {
            let Some(at) = far[column] else { continue };
            for (to, crew) in moves {
                let end = crew.map_or(at, |crew| sums[crew].farthest(at));
                far[*to] = far[*to].max(Some(end));
            }
        }
        let mut near = vec![layers; self.moves.len()];
        for (column, moves) in self.moves.iter().enumerate().rev() {
            let start = |(to, crew): &(usize, Option<usize>)| {
                crew.map_or(near[*to], |crew| sums[crew].nearest(near[*to]))
            };
            near[column] = moves.iter().map(start).min().unwrap_or(layers).min(layers);
        }
        let band = |(near, far): (usize, Option<usize>)| near..=far.unwrap_or(0);
        near.into_iter().zip(far).map(band).collect()
    }

    /// Every crew from every column, the last column first: `(table, (stages before, its row there), (crew, where
    /// it may start), the row behind it)`. Columns only grow, so what is behind one is complete when its turn comes.
    fn each_move<T: Copy + Ord>(
        &self,
        size: &Size,
        bands: &[RangeInclusive<usize>],
        table: &mut [T],
        end: T,
        mut take: impl FnMut(&mut [T], (usize, usize), (usize, &RangeInclusive<usize>), usize),
    ) {
        let layers = size.width - 1;
        let rows = size.states * size.width;
        for (column, moves) in self.moves.iter().enumerate().rev() {
            let (counts, begin) = &size.columns[column];
            for (inside, count) in counts.clone().enumerate() {
                let at = begin + inside * rows;
                let all = self.stages.map(|stages| stages as usize == count);
                if all != Some(false) {
                    (0..size.states)
                        .for_each(|state| table[at + state * size.width + layers] = end);
                }
                if all == Some(true) {
                    continue;
                }
                let next = if self.stages.is_some() { count + 1 } else { 0 };
                for (to, crew) in moves {
                    match crew {
                        Some(crew) => {
                            let state = self.topology.after(*to, self.crews[*crew].place);
                            let to = size.at((*to, next, state));
                            if let Some(to) = to.filter(|_| !bands[column].is_empty()) {
                                take(table, (count, at), (*crew, &bands[column]), to);
                            }
                        }
                        None => self.leave_out(size, table, (at, count), *to),
                    }
                }
            }
        }
    }

    /// What is left to pay where the workers up to a column are left out.
    fn leave_out<T: Copy + Ord>(
        &self,
        size: &Size,
        table: &mut [T],
        (at, count): (usize, usize),
        column: usize,
    ) {
        let Some(to) = size.at((column, count, 0)) else { return };
        let (own, behind) = table.split_at_mut(to);
        for state in 0..size.states {
            let passed = self.topology.passed(column, state);
            let other = &behind[passed * size.width..][..size.width];
            let row = &mut own[at + state * size.width..][..size.width];
            row.iter_mut().zip(other).for_each(|(cell, other)| *cell = (*cell).min(*other));
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
    fn forward(
        &self,
        size: &Size,
        aim: Aim,
        sums: &[Sums<'_>],
        table: &[Cost],
    ) -> Option<(Even, Way)> {
        let mut cells = vec![Cell::EMPTY; table.len()];
        // So small that equals are told apart, and so large that a sum of squares fits.
        let whole = self.times.iter().filter_map(|times| times.before().last()).max();
        let unit = whole.map_or(1, |whole| (whole >> SQUARE_BITS).max(1));
        let begin = size.start(self.topology.start(aim.first))?;
        cells[begin] = Cell { even: (0, 0), ..Cell::EMPTY };
        let mut best: Option<(Even, usize)> = None;
        for (column, (counts, at)) in size.columns.iter().enumerate() {
            let rows = counts.clone().flat_map(|count| (0..size.states).map(move |s| (count, s)));
            for (row, (count, state)) in rows.enumerate() {
                for start in 0..size.width {
                    let at = at + row * size.width + start;
                    let even = cells[at].even;
                    if even == NEVER {
                        continue;
                    }
                    if start + 1 == size.width {
                        if best.is_none_or(|(other, _)| even < other) {
                            best = Some((even, at));
                        }
                        continue;
                    }
                    let here = Here { at, start, count, state, unit };
                    self.go_on(size, aim, (column, here), (sums, table, &mut cells));
                }
            }
        }
        let (even, at) = best?;
        Some((even, way(&cells, at, size.width)))
    }

    /// Every move from a cell.
    fn go_on(
        &self,
        size: &Size,
        aim: Aim,
        (column, here): (usize, Here),
        (sums, table, cells): (&[Sums<'_>], &[Cost], &mut [Cell]),
    ) {
        let Here { at, start, count, state, .. } = here;
        let (cell, topology) = (cells[at], self.topology);
        for (to, crew) in &self.moves[column] {
            let Some(crew) = *crew else {
                if let Some(to) = size.at((*to, count, topology.passed(*to, state)))
                    && table[to + start] == table[at]
                {
                    cell.put(&mut cells[to + start]);
                }
                continue;
            };
            let there = self.crews[crew].place;
            let no_way = match start {
                0 => !topology.begins(aim.first, there),
                _ => topology.busy(state, there) > aim.most,
            };
            let next = if self.stages.is_some() { count + 1 } else { 0 };
            let to = size.at((*to, next, topology.after(*to, there)));
            let Some(to) = to.filter(|_| !no_way) else { continue };
            let step = Step { at, crew, start, left: table[at], from: state, unit: here.unit };
            let rows = (&table[to..to + size.width], &mut cells[to..to + size.width]);
            self.extend(aim, step, (&sums[crew], cell.even), rows);
        }
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
        let hop = if start == 0 { 0 } else { self.topology.hop(from, there) };
        let layers = behind.len() - 1;
        let last = sums.last[start].then_some(layers);
        for end in (start + 1..=sums.ends[start] as usize).chain(last) {
            if behind[end] == NEVER {
                continue;
            }
            let returns = end == layers && start > 0;
            let back = if returns { self.topology.back(there, aim.first) } else { 0 };
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

/// These starts of stages, but for the first stage's.
fn inner(starts: &RangeInclusive<usize>, width: usize) -> Range<usize> {
    let end = (*starts.end() + 1).min(width - 1);
    (*starts.start()).max(1).min(end)..end
}

/// Times of so many bits are squared: the sum of thousands of squares fits.
const SQUARE_BITS: u32 = 26;

/// One cell that moves lead away from.
#[derive(Clone, Copy)]
struct Here {
    at: usize,
    start: usize,
    count: usize,
    state: usize,
    /// In which times are squared.
    unit: u64,
}

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
