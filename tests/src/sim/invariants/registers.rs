//! **What is wanted is linearizable.** Whether a worker is drained and how many replicas a deployment
//! has are registers: all changes and reads of one fit one order in which each takes effect at a moment
//! between its beginning and its end, and each saw what the one before it had left. Of a change that
//! nobody answered nobody knows; it may have been made at any time since, or never.
//!
//! The search is Wing and Gong's ("Testing and verifying concurrent objects", 1993) with Lowe's memory of
//! what was tried; the registers are independent, so each is searched by itself.

use std::collections::{BTreeMap, HashSet};

use crate::sim::world::World;

/// Operations on one register that are searched: reads beyond that are left out.
const OPERATIONS_MAX: usize = 128;

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

/// Whether some order explains what everybody was told.
pub fn linearizable(first: u32, calls: &[Call]) -> bool {
    // A read of which nothing came says nothing.
    let useful = |call: &&Call| call.ask != Ask::Read || call.ended.is_some();
    let mut calls: Vec<Call> = calls.iter().filter(useful).copied().collect();
    while calls.len() > OPERATIONS_MAX {
        let Some(read) = calls.iter().rposition(|call| call.ask == Ask::Read) else { return true };
        calls.remove(read);
    }
    let known = calls.iter().enumerate().filter(|(_, call)| call.ended.is_some());
    let goal = known.fold(0u128, |goal, (i, _)| goal | 1 << i);
    let (mut tried, mut todo) = (HashSet::new(), vec![(0u128, first)]);
    while let Some((made, value)) = todo.pop() {
        if made & goal == goal {
            return true;
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
    false
}

impl World {
    /// Checks what was said of each register.
    pub fn check_registers(&mut self) {
        let registers = self.history.registers.0.iter();
        let wrong = registers.filter(|(_, (first, calls))| !linearizable(*first, calls));
        let words = wrong.map(|(name, (_, calls))| format!("{name}: {calls:?}")).next();
        if let Some(words) = words {
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
            assert_eq!(linearizable(0, calls), expected, "{calls:?}");
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
}
