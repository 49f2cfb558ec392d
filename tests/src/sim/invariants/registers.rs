//! **What is wanted is linearizable.** Whether a worker is drained and how many replicas a deployment
//! has are registers: all changes and reads of one fit one order in which each takes effect at a moment
//! between its beginning and its end, and each saw what the one before it had left. Of a change that
//! nobody answered nobody knows; it may have been made at any time since, or never.
//!
//! The search is Wing and Gong's ("Testing and verifying concurrent objects", 1993) with Lowe's memory of
//! what was tried; the registers are independent, so each is searched by itself.

use std::collections::{BTreeMap, HashSet};

use crate::sim::world::World;

/// Operations on one register that are searched, as many as bits in what is remembered of them: reads beyond
/// that are left out, evenly.
const OPERATIONS_MAX: usize = u128::BITS as usize;

/// What an operation asks of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Look.
    Read,
    /// Make it so, whatever it was.
    Set(u32),
    /// Make it so if it is anything.
    Scale(Option<u32>),
    /// Make it one if it is nothing.
    Create,
    /// Make it nothing if it is anything.
    Remove,
}

/// What it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It was made.
    Made,
    /// It was refused.
    Refused,
    /// This is there.
    Seen(u32),
}

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// What for.
    pub ask: Ask,
    /// When it began.
    pub began: u64,
    /// When it ended, and how; `None`: nobody knows whether it was made.
    pub ended: Option<(u64, Told)>,
}

/// All registers by name, with what they were at first.
#[derive(Default)]
pub struct Registers(BTreeMap<String, (u32, Vec<Call>)>);

impl Registers {
    /// A register is asked something: the number of the call.
    pub fn call(&mut self, name: &str, first: u32, ask: Ask, now: u64) -> usize {
        let (_, calls) = self.0.entry(name.to_owned()).or_insert((first, Vec::new()));
        calls.push(Call { ask, began: now, ended: None });
        calls.len() - 1
    }

    /// And it answers.
    pub fn told(&mut self, name: &str, call: usize, now: u64, told: Told) {
        let calls = self.0.get_mut(name).map(|(_, calls)| calls);
        if let Some(call) = calls.and_then(|calls| calls.get_mut(call)) {
            call.ended = Some((now, told));
        }
    }
}

impl Call {
    /// What it makes of a value; `None` where it cannot have been told what it was told.
    fn step(&self, value: u32) -> Option<u32> {
        let refused = self.ended.is_some_and(|(_, told)| told == Told::Refused);
        match (self.ask, self.ended) {
            (Ask::Read, Some((_, Told::Seen(seen)))) => (seen == value).then_some(value),
            (Ask::Set(to), _) => (!refused).then_some(to),
            (Ask::Create, _) if refused => (value > 0).then_some(value),
            (Ask::Create, _) => (value == 0).then_some(1),
            (Ask::Scale(_) | Ask::Remove, _) if refused => (value == 0).then_some(0),
            (Ask::Scale(to), _) => (value > 0).then_some(to.unwrap_or(value)),
            (Ask::Remove, _) => (value > 0).then_some(0),
            (Ask::Read, _) => None,
        }
    }
}

/// What a search comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Searched {
    /// Some order explains what everybody was told.
    Explained,
    /// None does.
    Wrong,
    /// There are more changes than can be searched, which shows nothing.
    TooLong,
}

/// Those that are searched, in their order: reads that are too many are left out from everywhere alike.
fn searchable(calls: &[Call]) -> Option<Vec<Call>> {
    // A read of which nothing came says nothing.
    let useful = |call: &&Call| call.ask != Ask::Read || call.ended.is_some();
    let calls: Vec<Call> = calls.iter().filter(useful).copied().collect();
    let reads = calls.iter().filter(|call| call.ask == Ask::Read).count();
    let room = OPERATIONS_MAX.checked_sub(calls.len() - reads)?.min(reads);
    let mut seen = 0;
    let stays = |call: &Call| {
        if call.ask != Ask::Read {
            return true;
        }
        seen += 1;
        // Of every `reads` as many as there is room for.
        seen * room / reads > (seen - 1) * room / reads
    };
    Some(calls.into_iter().filter(stays).collect())
}

/// Whether some order explains what everybody was told.
pub fn linearizable(first: u32, calls: &[Call]) -> Searched {
    let Some(calls) = searchable(calls) else { return Searched::TooLong };
    let known = calls.iter().enumerate().filter(|(_, call)| call.ended.is_some());
    let goal = known.fold(0u128, |goal, (i, _)| goal | 1 << i);
    let (mut tried, mut todo) = (HashSet::new(), vec![(0u128, first)]);
    while let Some((made, value)) = todo.pop() {
        if made & goal == goal {
            return Searched::Explained;
        }
        if !tried.insert((made, value)) {
            continue;
        }
        let left = || calls.iter().enumerate().filter(|(i, _)| made & 1 << i == 0);
        // Nothing that began after the end of something left can be before it.
        let ends = left().filter_map(|(_, call)| call.ended);
        let until = ends.map(|(end, _)| end).min().unwrap_or(u64::MAX);
        for (i, call) in left().filter(|(_, call)| call.began <= until) {
            if let Some(next) = call.step(value) {
                todo.push((made | 1 << i, next));
            }
        }
    }
    Searched::Wrong
}

impl World {
    /// Checks what was said of each register.
    pub fn check_registers(&mut self) {
        let registers = self.history.registers.0.iter();
        let searched =
            registers.map(|(name, (first, calls))| (name, linearizable(*first, calls), calls));
        let wrong = searched.filter(|(_, searched, _)| *searched != Searched::Explained);
        let mut words = wrong.map(|(name, searched, calls)| match searched {
            Searched::TooLong => format!("{name}: {} calls are too many to search", calls.len()),
            _ => format!("{name}: {calls:?}"),
        });
        let first = words.next();
        if let Some(words) = first {
            self.violate("registers", words);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(ask: Ask, began: u64, ended: Option<(u64, Told)>) -> Call {
        Call { ask, began, ended }
    }

    fn read(began: u64, end: u64, seen: u32) -> Call {
        call(Ask::Read, began, Some((end, Told::Seen(seen))))
    }

    #[test]
    fn an_order_is_found_where_there_is_one() {
        let made = |ask, began, end| call(ask, began, Some((end, Told::Made)));
        let check = |calls: &[Call], expected| {
            let explained = linearizable(0, calls) == Searched::Explained;
            assert_eq!(explained, expected, "{calls:?}");
        };
        check(&[made(Ask::Set(1), 0, 9), read(1, 2, 0), read(3, 4, 1)], true);
        // The first to look has seen it, the next has not.
        check(&[made(Ask::Set(1), 0, 9), read(1, 2, 1), read(3, 4, 0)], false);
        check(&[made(Ask::Set(1), 0, 1), read(2, 3, 0)], false);
        // Nobody knows when, if at all.
        let unknown = call(Ask::Set(1), 0, None);
        check(&[unknown, read(1, 2, 0), read(3, 4, 0)], true);
        check(&[unknown, read(1, 2, 0), read(3, 4, 1)], true);
        check(&[unknown, read(1, 2, 1), read(3, 4, 0)], false);
        check(&[read(1, 2, 1), call(Ask::Set(1), 3, None)], false);
        // Two cannot both find nothing.
        check(&[made(Ask::Create, 0, 5), made(Ask::Create, 1, 6)], false);
        let refused = call(Ask::Create, 1, Some((6, Told::Refused)));
        check(&[made(Ask::Create, 0, 5), refused], true);
        check(&[made(Ask::Create, 0, 5), made(Ask::Remove, 1, 6), read(7, 8, 0)], true);
        check(&[call(Ask::Scale(Some(2)), 0, Some((1, Told::Refused))), read(2, 3, 0)], true);
    }

    #[test]
    fn too_many_changes_are_no_proof_and_reads_are_left_out_from_everywhere() {
        let set = |at: u64| call(Ask::Set(at as u32), at, Some((at, Told::Made)));
        let changes: Vec<Call> = (1..=OPERATIONS_MAX as u64).map(set).collect();
        assert_eq!(linearizable(0, &changes), Searched::Explained);
        let more: Vec<Call> = (1..=OPERATIONS_MAX as u64 + 1).map(set).collect();
        assert_eq!(linearizable(0, &more), Searched::TooLong);
        // Reads from beginning to end, of which every second stays.
        let last = 2 * OPERATIONS_MAX as u64;
        let reads: Vec<Call> = (1..=last).map(|at| read(at, at, 0)).collect();
        let kept = searchable(&reads).unwrap_or_default();
        assert_eq!(kept.len(), OPERATIONS_MAX);
        assert!(kept.windows(2).all(|two| two[1].began - two[0].began == 2), "{kept:?}");
        // The last of them alone has seen what was never there.
        let mut wrong = reads;
        wrong.push(read(last + 1, last + 1, 7));
        wrong.push(read(last + 2, last + 2, 7));
        assert_eq!(linearizable(0, &wrong), Searched::Wrong);
    }
}
