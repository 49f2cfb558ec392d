//! The best end of a next stage, for every start at once: ends that are allowed slide along with the start.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::iter::Rev;
use std::ops::{Range, RangeInclusive};

/// What it takes to the end, the more important first.
pub(super) type Cost = (u64, u64);

/// From here there is no way to the end.
pub(super) const NEVER: Cost = (u64::MAX, u64::MAX);

/// What is looked for: where the first stage is, and what comes first.
#[derive(Clone, Copy)]
pub(super) struct Aim {
    /// What the way back costs follows from it.
    pub first: usize,
    /// Time before bytes, or the other way round.
    pub time_first: bool,
    /// No way is busy for longer.
    pub most: u64,
}

impl Aim {
    /// In order.
    pub fn cost(self, time: u64, read: u64) -> Cost {
        if self.time_first { (time, read) } else { (read, time) }
    }
}

/// A crew's layers as sums over those before each one.
pub(super) struct Sums<'a> {
    pub time: &'a [u64],
    /// Bytes that it reads anew.
    pub read: Cow<'a, [u64]>,
    /// The last end that a stage may have which starts there and is not the last one.
    pub ends: Vec<u32>,
    /// Whether a last stage may start there.
    pub last: Vec<bool>,
}

/// Both parts.
pub(super) fn plus(a: Cost, b: Cost) -> Cost {
    (a.0.saturating_add(b.0), a.1.saturating_add(b.1))
}

impl Sums<'_> {
    /// What a stage reads anew.
    pub fn read(&self, start: usize, end: usize) -> u64 {
        self.read[end] - self.read[start]
    }

    /// How far a stage may reach that starts there or before.
    pub fn farthest(&self, start: usize) -> usize {
        let layers = self.ends.len();
        let Some(end) = self.ends.get(start) else { return start };
        let all = self.last[start] || self.last[0];
        if all { layers } else { self.ends[0].max(*end) as usize }
    }

    /// The first start from which a stage may reach that layer or one behind it.
    pub fn nearest(&self, end: usize) -> usize {
        if self.last[0] || self.ends[0] as usize >= end {
            return 0;
        }
        let middle = 1 + self.ends[1..].partition_point(|reach| (*reach as usize) < end);
        let last = 1 + self.last[1..].partition_point(|fits| !fits);
        middle.min(last)
    }

    /// Of these starts the last one first, and before it the layers at which a stage that starts there may end.
    fn walk(&self, starts: &RangeInclusive<usize>, least: usize) -> Rev<Range<usize>> {
        let layers = self.ends.len();
        let last = (*starts.end()).min(layers.saturating_sub(1));
        let end_of = |start: usize| self.ends.get(start).map_or(0, |end| *end as usize);
        // The first stage may reach further than those behind it.
        let first = if least.max(*starts.start()) == 0 { end_of(0) } else { 0 };
        let ends = end_of(last).max(first);
        ((*starts.start()).max(least)..ends.max(last + 1).min(layers)).rev()
    }

    fn before(&self, aim: Aim, layer: usize) -> Cost {
        aim.cost(self.time[layer], self.read[layer])
    }
}

/// The ends of a stage that its start allows, the best of them in front. Starts go down, so ends leave at
/// the far side and come at the near one.
#[derive(Default)]
pub(super) struct Window {
    ends: VecDeque<(u32, Cost)>,
}

impl Window {
    /// By start, of those in `starts` from 1 on: the least to pay where this crew takes the next stage, without the
    /// way to it.
    pub fn least(
        &mut self,
        sums: &Sums<'_>,
        behind: &[Cost],
        aim: Aim,
        (back, starts): (u64, &RangeInclusive<usize>),
        out: &mut [Cost],
    ) {
        let layers = behind.len() - 1;
        self.ends.clear();
        for start in sums.walk(starts, 1) {
            let near = start + 1;
            if near < layers && behind[near] != NEVER {
                let cost = plus(sums.before(aim, near), behind[near]);
                while self.ends.back().is_some_and(|(_, other)| *other >= cost) {
                    self.ends.pop_back();
                }
                self.ends.push_back((near as u32, cost));
            }
            if start > *starts.end() {
                continue;
            }
            while self.ends.front().is_some_and(|(end, _)| *end > sums.ends[start]) {
                self.ends.pop_front();
            }
            let before = sums.before(aim, start);
            let mut least = self.ends.front().map_or(NEVER, |(_, cost)| minus(*cost, before));
            if sums.last[start] && behind[layers] != NEVER {
                let all = plus(sums.before(aim, layers), aim.cost(back, 0));
                least = least.min(plus(minus(all, before), behind[layers]));
            }
            out[start] = least;
        }
    }
}

/// Both parts: what is before a layer is part of what is behind it.
fn minus(a: Cost, b: Cost) -> Cost {
    (a.0 - b.0, a.1 - b.1)
}

/// The least to pay where this crew is the first stage.
pub(super) fn first_stage(sums: &Sums<'_>, behind: &[Cost], aim: Aim) -> Cost {
    let last = sums.last[0].then_some(behind.len() - 1);
    let ends = (1..=sums.ends[0] as usize).chain(last).filter(|end| behind[*end] != NEVER);
    let costs = ends.map(|end| plus(sums.before(aim, end), behind[end]));
    costs.min().unwrap_or(NEVER)
}

/// By start: the slowest stage from there on, at the least, where this crew takes the next one. Later ends are
/// worth a longer stage only where what is behind them is faster: `stairs` has those alone, the last one first.
pub(super) fn slowest_stage(
    sums: &Sums<'_>,
    behind: &[u64],
    starts: &RangeInclusive<usize>,
    stairs: &mut Vec<u32>,
    out: &mut [u64],
) {
    let layers = behind.len() - 1;
    stairs.clear();
    // How many of them are out of reach, and how many make a stage that takes longer than what is behind it.
    // While starts go down both only grow, but for those that leave.
    let (mut beyond, mut longer) = (0, 0);
    for start in sums.walk(starts, 0) {
        let near = start + 1;
        if near < layers && behind[near] != u64::MAX {
            while stairs.last().is_some_and(|end| behind[*end as usize] >= behind[near]) {
                stairs.pop();
            }
            stairs.push(near as u32);
            (beyond, longer) = (beyond.min(stairs.len() - 1), longer.min(stairs.len() - 1));
        }
        if start > *starts.end() {
            continue;
        }
        let is_beyond = |end: &u32| *end > sums.ends[start];
        if start == 0 {
            // The first stage has other things to hold, and may reach further.
            beyond = 0;
        }
        while stairs.get(beyond).is_some_and(is_beyond) {
            beyond += 1;
        }
        // From the near end on stages grow longer and what is behind them faster: the least is where they meet.
        let time = |end: u32| sums.time[end as usize] - sums.time[start];
        while stairs.get(longer).is_some_and(|end| time(*end) > behind[*end as usize]) {
            longer += 1;
        }
        let at = |index: usize| {
            let end = stairs.get(index).copied().filter(|end| !is_beyond(end))?;
            Some(time(end).max(behind[end as usize]))
        };
        let met = at(longer.max(beyond));
        let above = longer.checked_sub(1).and_then(at);
        let all =
            sums.last[start].then(|| (sums.time[layers] - sums.time[start]).max(behind[layers]));
        out[start] = [met, above, all].into_iter().flatten().min().unwrap_or(u64::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Numbers;
    use super::*;

    /// Sums of random steps.
    fn sums_of(steps: impl Iterator<Item = u64>) -> Vec<u64> {
        let mut sum = 0;
        let mut sums = vec![0];
        sums.extend(steps.map(|step| {
            sum += step;
            sum
        }));
        sums
    }

    #[test]
    fn the_best_end_of_a_window_is_the_best_of_all_that_are_allowed() {
        let mut numbers = Numbers(5);
        for _ in 0..300 {
            let layers = 1 + numbers.below(9) as usize;
            let time = sums_of((0..layers).map(|_| 1 + numbers.below(4)));
            let read = sums_of((0..layers).map(|_| numbers.below(3)));
            let mut ends: Vec<u32> = Vec::new();
            for start in 0..layers {
                let before = ends.iter().skip(1).max().copied().unwrap_or(0);
                let end = (start as u32).max(before) + numbers.below(3) as u32;
                ends.push(end.min(layers as u32 - 1));
            }
            let last = (0..layers).map(|_| numbers.below(2) == 0).collect();
            let cost = |numbers: &mut Numbers| match numbers.below(4) {
                0 => NEVER,
                _ => (numbers.below(9), numbers.below(9)),
            };
            let mut behind: Vec<Cost> = (0..layers).map(|_| cost(&mut numbers)).collect();
            behind.push((0, 0));
            let sums = Sums { time: &time, read: Cow::Borrowed(&read), ends, last };
            let allowed = |start: usize| {
                let last = sums.last[start].then_some(layers);
                (start + 1..=sums.ends[start] as usize).chain(last)
            };
            let aim = Aim { first: 0, time_first: numbers.below(2) == 0, most: u64::MAX };
            let back = numbers.below(3);
            let mut out = vec![NEVER; layers + 1];
            let starts = numbers.below(3) as usize..=numbers.below(1 + layers as u64) as usize;
            let looked_at = |start: &usize| starts.contains(start);
            Window::default().least(&sums, &behind, aim, (back, &starts), &mut out);
            let paid = |start: usize, end: usize, back: u64| {
                let back = if end == layers { back } else { 0 };
                let own = aim.cost(time[end] - time[start] + back, sums.read(start, end));
                plus(own, behind[end])
            };
            let open = |end: &usize| behind[*end] != NEVER;
            for (start, found) in out.iter().enumerate().take(layers).skip(1) {
                if !looked_at(&start) {
                    continue;
                }
                let best = allowed(start).filter(open).map(|end| paid(start, end, back)).min();
                assert_eq!(*found, best.unwrap_or(NEVER), "start {start}");
            }
            let best = allowed(0).filter(open).map(|end| paid(0, end, 0)).min();
            assert_eq!(first_stage(&sums, &behind, aim), best.unwrap_or(NEVER));

            let behind: Vec<u64> = behind.iter().map(|cost| cost.0).collect();
            let mut slowest = vec![u64::MAX; layers + 1];
            slowest_stage(&sums, &behind, &starts, &mut Vec::new(), &mut slowest);
            for start in (0..layers).filter(looked_at) {
                let of = |end: usize| (time[end] - time[start]).max(behind[end]);
                assert_eq!(slowest[start], allowed(start).map(of).min().unwrap_or(u64::MAX));
            }
        }
    }
}
