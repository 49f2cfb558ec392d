//! The simulator's dose for every change: thousands of seeds, the same trace twice, a few planted
//! bugs, and the patches of all the others. `make sim SEEDS=100000` is for the patient, `make sim-bugs`
//! for whoever changes the simulator or an invariant.

use std::path::Path;

use shoal_tests::planted;
use shoal_tests::sim::hunt::{hunt, replay};
use shoal_tests::sim::{Bug, run};

/// Seeds of each run of the tests.
const SEEDS: u64 = 2_000;

/// How many of the bugs that are switched on at run time may go uncaught.
const MISSED_MAX: usize = 1;

/// Patches of the real cores, at least.
const PLANTED_MIN: usize = 20;

#[test]
fn the_same_seed_gives_the_same_trace_twice() {
    for seed in 1..=20 {
        assert_eq!(run(seed, None), run(seed, None), "{}", replay(seed, None));
    }
    assert_ne!(run(1, None).hash, run(2, None).hash, "the seed does nothing");
}

#[test]
fn nothing_that_must_not_be_is_in_any_seed() {
    let caught = hunt(1, SEEDS, None, 1);
    if let Some(first) = caught.first {
        let violation = first.violation.expect("it failed");
        panic!("{}: {}\nagain: {}", violation.invariant, violation.words, replay(first.seed, None));
    }
    assert_eq!(caught.seeds, SEEDS);
    let [_, faults, tokens, losses, _, reigns, compactions, operations, ..] = caught.counts;
    let [.., preemptions, changes, reused] = caught.counts;
    // A simulator in which nothing goes wrong shows nothing.
    for (what, count, least) in [
        ("faults", faults, SEEDS),
        ("tokens", tokens, 50 * SEEDS),
        ("attempts lost", losses, SEEDS / 2),
        ("reigns", reigns, SEEDS),
        ("compactions", compactions, SEEDS),
        ("operations", operations, 10 * SEEDS),
        ("preemptions", preemptions, SEEDS),
        ("changes", changes, SEEDS),
        ("prompts reused", reused, SEEDS),
    ] {
        assert!(count >= least, "only {count} {what} in {SEEDS} seeds");
    }
}

#[test]
fn nearly_all_bugs_that_are_switched_on_are_caught_within_the_same_seeds() {
    let missed: Vec<&str> = Bug::ALL
        .iter()
        .filter(|bug| hunt(1, SEEDS, Some(**bug), 1).first.is_none())
        .map(|bug| bug.label())
        .collect();
    assert!(missed.len() <= MISSED_MAX, "not caught: {missed:?}");
}

#[test]
fn every_patch_that_plants_a_bug_in_a_real_core_fits_the_tree_and_stands_in_the_table() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace");
    let all = planted::all(root).unwrap_or_else(|error| panic!("{error}"));
    assert!(all.len() >= PLANTED_MIN, "{} patches", all.len());
    let table = std::fs::read_to_string(root.join("docs/planted-bugs.md")).expect("the table");
    for planted in &all {
        let files = planted.apply(root).unwrap_or_else(|error| panic!("{error}"));
        for (path, text) in files {
            let before = std::fs::read_to_string(root.join(&path)).expect("it was read before");
            assert_ne!(before, text, "{} changes nothing in {path}", planted.name);
        }
        let row = format!("| `{}` |", planted.name);
        assert!(table.contains(&row), "{} is not in docs/planted-bugs.md", planted.name);
    }
}
