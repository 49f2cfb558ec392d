use super::scenarios::{SERVICES, black_hole, fail_fast, gray, healthy, turning};
use super::*;

const SEEDS: [u64; 3] = [1, 2, 3];

fn p99(scenario: &Scenario, chooser: Chooser) -> f64 {
    median(SEEDS.iter().map(|seed| run(scenario, chooser, *seed).quantile(0.99)).collect())
}

fn show(scenario: &Scenario, service: &str) {
    let choosers = Policy::ALL.into_iter().map(Chooser::Router).chain([Chooser::Oracle]);
    for chooser in choosers {
        let figures = run(scenario, chooser, 1);
        println!(
            "{service:6} {:11} {:12} p50 {:7.3} p99 {:7.3} p99.9 {:7.3} err {:.3} bad {:.3} retries {}",
            scenario.name, chooser.name(), figures.quantile(0.5), figures.quantile(0.99), figures.quantile(0.999),
            figures.error_percent(), figures.share(10, 70), figures.retries
        );
    }
}

#[test]
#[ignore = "prints"]
fn show_all() {
    for (name, service) in SERVICES {
        for make in [healthy, gray, scenarios::ten, scenarios::routers, turning, fail_fast, black_hole] {
            show(&make(service, 60.0), name);
        }
    }
}
