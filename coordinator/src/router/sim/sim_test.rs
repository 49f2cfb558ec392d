use super::scenarios::{SERVICES, TURNS, black_hole, fail_fast, gray, healthy, turning};
use super::*;

const SEEDS: [u64; 3] = [1, 2, 3];

fn p99(scenario: &Scenario, chooser: Chooser) -> f64 {
    median(SEEDS.iter().map(|seed| run(scenario, chooser, *seed).quantile(0.99)).collect())
}

#[test]
fn a_gray_failure_is_routed_around() {
    for (name, service) in SERVICES {
        let scenario = gray(service, 60.0);
        let score = p99(&scenario, Chooser::Router(Policy::Score));
        let wrr = p99(&scenario, Chooser::Router(Policy::DynamicWrr));
        let oracle = p99(&scenario, Chooser::Oracle);
        assert!(score * 5.0 <= wrr, "{name}: {score} s, and {wrr} s by weighted round robin");
        assert!(score <= oracle * 1.2, "{name}: {score} s, and {oracle} s by an oracle");
    }
}

#[test]
fn without_a_fault_the_default_is_no_worse_than_taking_turns() {
    for (name, service) in SERVICES {
        let scenario = healthy(service, 60.0);
        let score = p99(&scenario, Chooser::Router(Policy::Score));
        let turns = p99(&scenario, Chooser::Router(Policy::RoundRobin));
        assert!(score <= turns * 1.02, "{name}: {score} s, and {turns} s in turn");
    }
}

#[test]
fn a_replica_that_turns_slow_is_left_within_three_seconds_and_comes_back() {
    for (name, service) in SERVICES {
        let scenario = turning(service, 60.0);
        let figures = run(&scenario, Chooser::Router(Policy::Score), 1);
        let (start, end) = TURNS;
        let shed = figures.until(start as usize, |share| share < 0.10);
        assert!(shed.is_some_and(|s| s <= 3), "{name}: {shed:?}");
        let back = figures.until(end as usize, |share| share > 0.9 * 0.25);
        assert!(back.is_some_and(|s| s <= 20), "{name}: {back:?}");
    }
}

#[test]
fn failing_fast_attracts_nothing_and_costs_no_request() {
    for (name, service) in SERVICES {
        for policy in Policy::ALL {
            let figures = run(&fail_fast(service, 60.0), Chooser::Router(policy), 1);
            assert_eq!(figures.errors, 0, "{name}, {policy}");
            let share = figures.share(21, 50);
            // Weighted turns never take a weight to nothing, and each probe is a request.
            let most = if policy == Policy::Score { 0.02 } else { 0.03 };
            assert!(share < most, "{name}, {policy}: {share} while it failed");
            let back = figures.share(60, 70);
            // Weighted turns win their weight back by requests alone.
            let least = if policy == Policy::Score { 0.15 } else { 0.10 };
            assert!(back > least, "{name}, {policy}: {back} when it was well again");
        }
    }
}

#[test]
fn a_black_hole_costs_no_request() {
    for (name, service) in SERVICES {
        let figures = run(&black_hole(service, 60.0), Chooser::Router(Policy::Score), 1);
        assert_eq!(figures.errors, 0, "{name}");
        let share = figures.share(22, 50);
        assert!(share < 0.02, "{name}: {share} while it was silent");
    }
}

#[test]
fn the_same_seed_gives_the_same_figures() {
    let scenario = gray(SERVICES[1].1, 10.0);
    for chooser in [Chooser::Router(Policy::Score), Chooser::Oracle] {
        let [a, b] = [1, 1].map(|seed| run(&scenario, chooser, seed));
        assert_eq!(a.times, b.times);
        assert_ne!(a.times, run(&scenario, chooser, 2).times);
    }
}
