//! The simulator's dose for every change: thousands of seeds, the same trace twice, and the planted
//! bugs. `make sim SEEDS=100000` is for the patient.

use shoal_tests::sim::hunt::{hunt, replay};
use shoal_tests::sim::{Bug, run};

/// Seeds of each run of the tests.
const SEEDS: u64 = 2_000;

/// How many bugs may go uncaught.
const MISSED_MAX: usize = 1;

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
    let [_, faults, tokens, losses, _, reigns, compactions, operations, _, preemptions, changes] =
        caught.counts;
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
    ] {
        assert!(count >= least, "only {count} {what} in {SEEDS} seeds");
    }
}

#[test]
fn all_planted_bugs_but_one_at_most_are_caught_within_the_same_seeds() {
    assert!(Bug::ALL.len() >= 20);
    let missed: Vec<&str> = Bug::ALL
        .iter()
        .filter(|bug| hunt(1, SEEDS, Some(**bug), 1).first.is_none())
        .map(|bug| bug.label())
        .collect();
    assert!(missed.len() <= MISSED_MAX, "not caught: {missed:?}");
}
