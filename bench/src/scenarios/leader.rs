//! The leader is killed: how soon another leads, and what streams through the others see of it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use shoal_protocol::plan::PretendSpec;

use super::Settings;
use crate::client::{Running, body};
use crate::measure::Series;
use crate::measure::report::Section;
use crate::measure::stats::significant;
use crate::news::now_of_day;
use crate::processes::{Plan, Processes, pass};
use crate::workload::prompt;

const COORDINATORS: usize = 3;

/// Streams through each coordinator that does not lead.
const STREAMS: usize = 2;

/// A window: an election and what follows it, and some hundred tokens of each stream.
const WINDOW: Duration = Duration::from_secs(1);

/// Until another leads; more is no election any more.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a new leader may take, in milliseconds.
const MEDIAN_MS: f64 = 400.0;
const P99_MS: f64 = 700.0;

/// How much longer the p99 of gaps may become while the leader dies.
const LONGER: f64 = 1.05;

/// 5 ms a token over two stages.
const MODEL: PretendSpec = PretendSpec {
    layers: 2,
    hidden: 64,
    vocab: 1000,
    max_context: 4096,
    seed: 3,
    layer_step_ns: 2_500_000,
    layer_row_ns: 0,
    layer_weight_bytes: 1 << 20,
};

/// What the rounds gave.
#[derive(Default)]
struct Seen {
    /// Milliseconds from the kill until another leads.
    took: Series,
    /// The p99 of gaps of the two undisturbed windows and of the one with the kill, by round.
    first: Series,
    second: Series,
    killed: Series,
    /// The longest gaps of the same windows.
    worst: [Series; 2],
}

/// Runs it.
pub fn run(settings: &Settings) -> Result<Section> {
    let mut section = Section::new(
        "Leader killed",
        format!(
            "{COORDINATORS} coordinators and 2 workers, real processes. In each of {} rounds {} streams of 5 ms a token run \
             through the coordinators that do not lead, for two undisturbed windows of {WINDOW:?} and one that begins \
             with kill -9 of the leader, which is started again behind it. A window's figure is the p99 of its gaps \
             between tokens. The new leader counts from the kill to its own log line, which it writes after its first \
             linearizable read. The timers' arithmetic: heartbeats each 50 ms, ticks of 10 ms; each follower stands after \
             200 to 360 ms without one, the first of two after 253 ms in the mean, 25 ms of which have passed at the \
             kill; then two round trips with two syncs (PreVote, vote), a proof, and a second round where both stand at once.",
            settings.trials,
            STREAMS * (COORDINATORS - 1),
        ),
    );
    let plan = Plan {
        coordinators: vec![Vec::new(); COORDINATORS],
        workers: vec![Vec::new(); 2],
        ..Plan::default()
    };
    let mut cluster = Processes::start(&plan)?;
    cluster.admin(0)?.deploy("leader", MODEL, 2, 1)?;
    let mut seen = Seen::default();
    for round in 0..settings.trials {
        let took = once(&mut cluster, round, &mut seen)?;
        eprintln!("  round {round}: another led after {took:.0} ms");
    }
    report(&mut section, &seen);
    Ok(section)
}

fn once(cluster: &mut Processes, round: usize, seen: &mut Seen) -> Result<f64> {
    let leader = cluster.leader(round % COORDINATORS)?;
    let others: Vec<_> = (0..COORDINATORS).filter(|index| *index != leader).collect();
    for index in &others {
        let led = cluster.leader(*index)?;
        ensure!(led == leader, "the coordinators do not agree on who leads");
    }
    let streams: Vec<_> = (0..STREAMS * others.len())
        .map(|i| {
            let asked = body("leader", &prompt(i as u64, 32, 1000), 3000);
            Running::start(cluster.url(others[i % others.len()]), asked, PATIENCE)
        })
        .collect();
    for stream in &streams {
        stream.wait_until_begun()?;
    }
    let starts = [Instant::now(), Instant::now() + WINDOW, Instant::now() + 2 * WINDOW];
    // Kills come at any moment between two heartbeats.
    let phase = Duration::from_millis(7 * (round as u64 % 8));
    pass((starts[2] + phase).saturating_duration_since(Instant::now()));
    let (at, killed) = (now_of_day()?, Instant::now());
    cluster.kill_coordinator(leader);
    let leads = cluster.news.wait(at, PATIENCE, |line| {
        line.who != format!("c{}", leader + 1) && line.text.contains("this coordinator leads")
    });
    let (took, _) = leads.context("nobody leads")?;
    pass((killed + WINDOW).saturating_duration_since(Instant::now()));
    let windows = [starts[0], starts[1], killed].map(|from| -> Series {
        streams.iter().flat_map(|stream| stream.gaps(from, WINDOW)).collect()
    });
    drop(streams);
    let expected = STREAMS * others.len() * 100;
    ensure!(windows.iter().all(|w| w.len() >= expected), "a stream broke off: {windows:?}");
    seen.took.push(took);
    let [first, second, killed] = windows;
    seen.worst[0].push(first.quantile(1.0).max(second.quantile(1.0)));
    seen.worst[1].push(killed.quantile(1.0));
    seen.first.push(first.quantile(0.99));
    seen.second.push(second.quantile(0.99));
    seen.killed.push(killed.quantile(0.99));
    cluster.restart_coordinator(leader)?;
    cluster.wait_for_workers(leader)?;
    Ok(took)
}

fn report(section: &mut Section, seen: &Seen) {
    let deaths = seen.took.len();
    let (median, p99) = (seen.took.median(), seen.took.quantile(0.99));
    let text = format!("{} ms", seen.took);
    section.at_most(
        format!("a new leader, median of {deaths} deaths, ms"),
        median,
        text,
        MEDIAN_MS,
    );
    section.at_most("a new leader, p99, ms", p99, format!("{p99:.0} ms"), P99_MS);
    let mut undisturbed = seen.first.clone();
    undisturbed.extend(seen.second.iter());
    let windows = undisturbed.len();
    section
        .seen(format!("p99 of gaps, ms, {windows} undisturbed windows"), undisturbed.to_string());
    section.seen(format!("p99 of gaps, ms, {deaths} windows with a kill"), seen.killed.to_string());
    let ratio = seen.killed.over(&seen.second);
    let beside = seen.second.over(&seen.first);
    section.seen("p99 of gaps, undisturbed over undisturbed, pairs", beside.to_string());
    let (low, high) = (undisturbed.quantile(0.0), undisturbed.quantile(1.0));
    let median = seen.killed.median();
    let within = (low..=high).contains(&median);
    let word = if within { "within" } else { "outside of" };
    section.judged(
        "p99 of gaps, kill over undisturbed, pairs",
        format!("{ratio}; its median {word} the undisturbed spread"),
        format!("≤ {LONGER}, or within the spread"),
        ratio.median() <= LONGER || within,
    );
    let beyond = seen.killed.iter().filter(|p99| *p99 > high).count();
    section
        .seen("windows with a kill whose p99 is beyond every undisturbed one", beyond.to_string());
    section.seen(
        "longest gap, ms, median of rounds: undisturbed, with a kill",
        format!("{}, {}", significant(seen.worst[0].median()), significant(seen.worst[1].median())),
    );
}
