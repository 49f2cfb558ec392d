//! The simulator from a command line.
//!
//! ```text
//! shoal-sim --seeds 2000 [--from 1]       runs seeds: what `make sim` does
//! shoal-sim --seed 17 [--bug skip-sync]   runs one again and says what was wrong
//! shoal-sim --bugs [--seeds 2000]         plants each bug in turn and says which are caught
//! ```

use std::process::ExitCode;

use shoal_tests::sim::hunt::{hunt, replay};
use shoal_tests::sim::{Bug, run};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = args.iter().position(|arg| arg == name)?;
        args.get(at + 1).cloned()
    };
    let number = |name: &str, otherwise: u64| {
        value(name).and_then(|text| text.parse().ok()).unwrap_or(otherwise)
    };
    let bug = value("--bug").and_then(|label| Bug::of(&label));
    let (from, seeds) = (number("--from", 1), number("--seeds", 2000));
    if let Some(seed) = value("--seed").and_then(|text| text.parse().ok()) {
        return one(seed, bug);
    }
    // A core that panics has been caught: its words are in the report.
    std::panic::set_hook(Box::new(|_| {}));
    let asked = |name: &str| args.iter().any(|arg| arg == name);
    match (asked("--bugs"), asked("--first")) {
        (true, _) => bugs(from, seeds),
        (_, true) => first(from, seeds, bug),
        _ => many(from, seeds, bug),
    }
}

fn one(seed: u64, bug: Option<Bug>) -> ExitCode {
    let report = run(seed, bug);
    println!("seed {seed}: trace {:016x}, {:.1?} simulated", report.hash, report.simulated);
    println!("counts {:?}", report.counts);
    match report.violation {
        None => ExitCode::SUCCESS,
        Some(violation) => {
            println!("{}: {}", violation.invariant, violation.words);
            ExitCode::FAILURE
        }
    }
}

/// Ends with the first failure, in words for a program.
fn first(from: u64, seeds: u64, bug: Option<Bug>) -> ExitCode {
    let caught = hunt(from, seeds, bug, 1);
    let found = caught.first.and_then(|first| Some((first.seed, first.violation?)));
    let Some((seed, violation)) = found else { return ExitCode::SUCCESS };
    println!("first: {} at {seed}\n{}", violation.invariant, violation.words);
    ExitCode::FAILURE
}

fn many(from: u64, seeds: u64, bug: Option<Bug>) -> ExitCode {
    let caught = hunt(from, seeds, bug, 20);
    let seconds = caught.took.as_secs_f64();
    println!(
        "{} seeds in {seconds:.1} s: {:.0} seeds/s, {:.1} simulated hours",
        caught.seeds,
        caught.seeds as f64 / seconds,
        caught.simulated.as_secs_f64() / 3600.0
    );
    let [events, faults, tokens, losses, stale, reigns, compactions, operations, quarantined, ..] =
        caught.counts;
    let [.., preemptions, changes, reused] = caught.counts;
    println!(
        "{events} events, {faults} faults, {tokens} tokens, {losses} attempts lost, {stale} stale \
         events, {reigns} reigns, {compactions} compactions, {operations} operations, {quarantined} \
         quarantined, {preemptions} preemptions, {changes} changes, {reused} \
         prompts reused; the longest is seed {} with {:.1?}",
        caught.longest.1, caught.longest.0
    );
    let Some(first) = &caught.first else { return ExitCode::SUCCESS };
    if let Some(violation) = &first.violation {
        println!("{} failed; first {}: {}", caught.failed, violation.invariant, violation.words);
    }
    println!("again: {}", replay(first.seed, bug));
    ExitCode::FAILURE
}

fn bugs(from: u64, seeds: u64) -> ExitCode {
    let mut missed = 0;
    println!("| bug | caught by | at seed | of seeds run |");
    println!("|---|---|---|---|");
    for bug in Bug::ALL {
        let caught = hunt(from, seeds, Some(*bug), 1);
        match caught.first.as_ref().and_then(|first| Some((first, first.violation.as_ref()?))) {
            Some((first, violation)) => println!(
                "| `{}` | `{}` | {} | {} |",
                bug.label(),
                violation.invariant,
                first.seed,
                caught.seeds
            ),
            None => {
                missed += 1;
                println!("| `{}` | - | - | {} |", bug.label(), caught.seeds);
            }
        }
    }
    println!("caught {} of {}", Bug::ALL.len() - missed, Bug::ALL.len());
    ExitCode::from(u8::from(missed > 1))
}
