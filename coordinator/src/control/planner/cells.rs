//! The table of the exact search: where its cells lie, and the way that is read from them in the end.

use std::ops::Range;

use shoal_protocol::units::LayerRange;

use super::window::NEVER;

/// A crew and its layers, in pipeline order.
pub(super) type Way = Vec<(usize, LayerRange)>;

/// The table's sizes: of each column, which numbers of stages it has, and where they begin.
pub(super) struct Size {
    pub states: usize,
    pub width: usize,
    /// The numbers, and where the first of them begins.
    pub columns: Vec<(Range<usize>, usize)>,
    pub cells: usize,
}

impl Size {
    /// Where the row of a column, a number of stages and a state begins; `None` where no layout has so many stages.
    pub fn at(&self, (column, count, state): (usize, usize, usize)) -> Option<usize> {
        let (counts, at) = &self.columns[column];
        let inside = counts.contains(&count).then(|| count - counts.start)?;
        Some(at + (inside * self.states + state) * self.width)
    }

    /// Where the search begins; `None` where there is no layout of so many stages.
    pub fn start(&self, state: usize) -> Option<usize> {
        self.at((0, 0, state))
    }
}

/// The slowest stage, and the sum of squares of all: the less, the more even.
pub(super) type Even = (u64, u64);

#[derive(Clone, Copy)]
pub(super) struct Cell {
    pub even: Even,
    /// The cell before, and the crew that leads from there to here.
    pub from: u32,
    pub crew: u32,
}

/// Where there is nothing, and what is before the first stage.
const NONE: u32 = u32::MAX;

impl Cell {
    /// Nobody has come here yet.
    pub const EMPTY: Self = Self { even: NEVER, from: NONE, crew: NONE };

    /// Takes the place of what is there where it is better.
    pub fn put(self, target: &mut Self) {
        if self.even < target.even {
            *target = self;
        }
    }
}

/// The way to a cell.
pub(super) fn way(cells: &[Cell], end: usize, width: usize) -> Way {
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
