//! The router: a bad replica in the simulator under each policy, and the time of a pick.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use shoal_coordinator::router::admission::AdmissionLimits;
use shoal_coordinator::router::book::Outcome;
use shoal_coordinator::router::dice::Dice;
use shoal_coordinator::router::policy::Policy;
use shoal_coordinator::router::sim::scenarios::{self, SERVICES, TURNS};
use shoal_coordinator::router::sim::{
    Chooser, Figures, Scenario, Service, median, run as simulate,
};
use shoal_coordinator::router::{RouteRequest, Router};
use shoal_coordinator::serving::{ServedDeployment, ServedReplica, ServingTable};
use shoal_protocol::id::{DeploymentName, Generation, NodeId, ReplicaId};
use shoal_protocol::units::Instant;

use super::nanoseconds;
use crate::measure::report::Section;
use crate::measure::{Report, Series};

/// Each figure is the median of runs with these seeds; the tests have others.
const SEEDS: [u64; 7] = [11, 12, 13, 14, 15, 16, 17];

/// What the default policy must be against weighted round robin, and against the oracle.
const AGAINST_WRR: f64 = 5.0;
const AGAINST_ORACLE: f64 = 1.2;

/// Runs it.
pub fn run(report: &mut Report) -> Result<()> {
    report.sections.push(bounds());
    report.sections.push(others());
    report.sections.push(picks()?);
    Ok(())
}

const CHOOSERS: [Chooser; 6] = [
    Chooser::Router(Policy::Score),
    Chooser::Router(Policy::DynamicWrr),
    Chooser::Router(Policy::RoundRobin),
    Chooser::Router(Policy::P2c),
    Chooser::Router(Policy::PeakEwma),
    Chooser::Oracle,
];

fn all(scenario: &Scenario, chooser: Chooser) -> Vec<Figures> {
    SEEDS.iter().map(|seed| simulate(scenario, chooser, *seed)).collect()
}

fn of(runs: &[Figures], figure: impl Fn(&Figures) -> f64) -> f64 {
    median(runs.iter().map(figure).collect())
}

fn line(runs: &[Figures]) -> String {
    format!(
        "p50 {:.2} s, p99 {:.2} s, p99.9 {:.2} s, errors {:.2} %, bad share {:.1} %",
        of(runs, |f| f.quantile(0.5)),
        of(runs, |f| f.quantile(0.99)),
        of(runs, |f| f.quantile(0.999)),
        of(runs, Figures::error_percent),
        100.0 * of(runs, |f| f.share(10, f.shares.len())),
    )
}

fn bounds() -> Section {
    let mut section = Section::new(
        "Routing: gray failure",
        "Simulated, medians over 7 seeds: one of 4 replicas four times slower, Poisson arrivals of \
         70 % of what three and a quarter carry, 10 s warm-up. `steps`, `mixed` and `rows` are \
         replicas whose steps, rows or both cost time.",
    );
    for (name, service) in SERVICES {
        for seconds in [30.0, 60.0, 120.0] {
            let scenario = scenarios::gray(service, seconds);
            let p99 = |runs: &[Figures]| of(runs, |f| f.quantile(0.99));
            let runs: Vec<_> = CHOOSERS.iter().map(|chooser| all(&scenario, *chooser)).collect();
            for (chooser, runs) in CHOOSERS.iter().zip(&runs) {
                section.seen(format!("{name}, {seconds} s, {}", chooser.name()), line(runs));
            }
            let [score, wrr, .., oracle] = &runs[..] else { continue };
            let gain = p99(wrr) / p99(score);
            let what = format!("{name}, {seconds} s: p99 of dynamic_wrr over score");
            section.at_least(what, gain, format!("{gain:.1}"), AGAINST_WRR);
            let loss = p99(score) / p99(oracle);
            let what = format!("{name}, {seconds} s: p99 of score over oracle");
            section.at_most(what, loss, format!("{loss:.3}"), AGAINST_ORACLE);
        }
    }
    section
}

fn others() -> Section {
    let mut section = Section::new(
        "Routing: other bad days",
        "As above, `mixed`, 60 s. `turns slow`, `fail-fast` and `black hole` begin at 20 s and end \
         at 50 s; shed: seconds until two seconds with under 2 % for the bad one (10 % where it is \
         slow); back: until 90 % of a fair share.",
    );
    let makes: [fn(Service, f64) -> Scenario; 6] = [
        scenarios::healthy,
        scenarios::ten,
        scenarios::routers,
        scenarios::turning,
        scenarios::fail_fast,
        scenarios::black_hole,
    ];
    for make in makes {
        let scenario = make(scenarios::MIXED, 60.0);
        for chooser in CHOOSERS {
            let runs = all(&scenario, chooser);
            let mut text = line(&runs);
            if !scenario.faults.is_empty() {
                let least = if scenario.name == "turns slow" { 0.10 } else { 0.02 };
                text.push_str(&times(&runs, least));
            }
            section.seen(format!("{}, {}", scenario.name, chooser.name()), text);
        }
    }
    section
}

fn times(runs: &[Figures], least: f64) -> String {
    let until = |start: f64, passes: &dyn Fn(f64) -> bool| {
        let found = |f: &Figures| f.until(start as usize, passes).map_or(f64::NAN, |s| s as f64);
        of(runs, found)
    };
    let shed = until(TURNS.0, &|share| share < least);
    let back = until(TURNS.1, &|share| share > 0.9 * 0.25);
    let retries = of(runs, |f| f.retries as f64);
    format!(", shed {shed} s, back {back} s, retries {retries}")
}

fn picks() -> Result<Section> {
    let mut section = Section::new(
        "Routing: picks",
        "Nanoseconds of a pick and of giving it back, 64 replicas with history and load, one thread.",
    );
    for policy in Policy::ALL {
        let (mut router, deployment) = busy(policy, 64)?;
        let mut dice = Dice::new(1);
        let mut now = 20_000_000;
        let request = RouteRequest {
            sequences: 1,
            prompt_tokens: 500,
            max_tokens: 200,
            ..RouteRequest::default()
        };
        let took = nanoseconds(|| {
            now += 10;
            let ticket = router.admit(Instant(now), dice.bits(), &deployment, &request);
            if let Ok(ticket) = &ticket {
                router.ended(Instant(now), 0, ticket, Outcome::NotJudged);
            }
            ticket.is_ok()
        });
        section.at_most(policy.name(), took.median(), took.to_string(), 1000.0);
    }
    whole_requests(&mut section)?;
    Ok(section)
}

/// Tokens of each answer.
const TOKENS: u64 = 100;

/// What the router adds to whole requests: the pick, every token's time, the end.
fn whole_requests(section: &mut Section) -> Result<()> {
    let (mut router, deployment) = busy(Policy::Score, 64)?;
    let mut dice = Dice::new(3);
    let request =
        RouteRequest { sequences: 1, prompt_tokens: 500, max_tokens: 200, ..Default::default() };
    let mut now = 20_000_000;
    let mut took = Series::default();
    for _ in 0..20_000 {
        now += 100;
        let start = std::time::Instant::now();
        let mut ticket = router.admit(Instant(now), dice.bits(), &deployment, &request)?;
        router.first_token(Instant(now + 40_000), &mut ticket, Duration::from_millis(30));
        for i in 1..TOKENS {
            router.token(Instant(now + 40_000 + i * 20_000), &mut ticket);
        }
        router.ended(Instant(now + 50_000 + TOKENS * 20_000), 0, &ticket, Outcome::Complete);
        took.push(start.elapsed().as_secs_f64() * 1e6);
    }
    let p99 = took.quantile(0.99);
    let what = format!("score, a whole request of {TOKENS} tokens: p99, µs");
    section.at_most(what, p99, format!("{p99:.1}"), 100.0);
    let core = took.median() / TOKENS as f64 * 1000.0 / 1e6 * 100.0;
    let what = "score, percent of a core per 1,000 tokens/s";
    section.at_most(what, core, format!("{core:.3}"), 1.0);
    Ok(())
}

fn busy(policy: Policy, replicas: u32) -> Result<(Router, ServedDeployment)> {
    let replica = |i: u32| ServedReplica {
        id: ReplicaId(i),
        generation: Generation(1),
        head: NodeId::worker(i + 1),
        requests: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 4000))),
        ready: true,
        load: None,
    };
    let deployment = ServedDeployment {
        name: DeploymentName::new("bench").context("a valid name")?,
        created: 0,
        folder: None,
        vocab: 1,
        context_max: 1 << 20,
        kind: shoal_coordinator::serving::ServedKind::Generate,
        adapter: None,
        replicas: (0..replicas).map(replica).collect(),
        phase: shoal_protocol::admin::DeploymentPhase::Ready,
        reason: String::new(),
    };
    let mut table = ServingTable::default();
    table.deployments.insert(deployment.name.clone(), deployment.clone().into());
    let mut router = Router::new(policy, AdmissionLimits::default());
    router.observe(Instant(0), &table);
    let request =
        RouteRequest { sequences: 1, prompt_tokens: 9, max_tokens: 99, ..Default::default() };
    let mut dice = Dice::new(2);
    for i in 0..u64::from(replicas) * 8 {
        let start = 10_000_000 + i * 1000;
        let mut ticket = router.admit(Instant(start), dice.bits(), &deployment, &request)?;
        router.first_token(Instant(start + 50_000), &mut ticket, Duration::from_millis(40));
        for token in 1..5 {
            router.token(Instant(start + 50_000 + token * 20_000), &mut ticket);
        }
    }
    Ok((router, deployment))
}
