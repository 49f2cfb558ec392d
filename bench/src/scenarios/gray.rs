//! One of four replicas answers right and four times too late: what each policy makes of it, on real
//! processes.

use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use shoal_protocol::plan::PretendSpec;

use super::Settings;
use crate::client::{agent, body, stream};
use crate::measure::Series;
use crate::measure::report::Section;
use crate::processes::{Plan, Processes, pass};
use crate::workload::{Dice, prompt};

/// The policies, each of a coordinator of its own: the same workers serve both in turn.
const POLICIES: [&str; 2] = ["score", "dynamic_wrr"];

const REPLICAS: usize = 4;

/// How much slower the bad one is, as `SHOAL_PRETEND_SLOWER` takes it.
const SLOWER: &str = "4";

/// Arrivals that are not measured, arrivals that are, and how long those may take to their end.
const WARM_UP: Duration = Duration::from_secs(8);
const MEASURED: Duration = Duration::from_secs(20);
const GRACE: Duration = Duration::from_secs(3);

/// Runs of each policy, in turn.
const RUNS: u64 = 2;

/// Rows cost: 2 ms for each token of a prompt or an answer, and 1 ms a step.
const MODEL: PretendSpec = PretendSpec {
    layers: 1,
    hidden: 64,
    vocab: 1000,
    max_context: 4096,
    seed: 6,
    layer_step_ns: 1_000_000,
    layer_row_ns: 2_000_000,
    layer_weight_bytes: 150 << 20,
};

/// Tokens of prompts and of answers: uniform from a half to one and a half times as many.
const PROMPT: u64 = 24;
const ANSWER: u64 = 24;

/// What a good replica carries, in requests a second: full steps make the step's own time small.
const CARRIES: f64 = 1000.0 / (2.0 * (PROMPT + ANSWER) as f64);

/// The share of what three good ones and the quarter of one carry.
const LOAD: f64 = 0.7;

/// What one request saw; where it was not complete in time, what had passed by then.
struct Seen {
    first: f64,
    whole: f64,
    complete: bool,
}

#[derive(Default)]
struct Figures {
    first: Series,
    whole: Series,
    incomplete: usize,
}

/// Runs it.
pub fn run(_: &Settings) -> Result<Section> {
    let rate = LOAD * 3.25 * CARRIES;
    let mut section = Section::new(
        "A replica four times slower, on real processes",
        format!(
            "{REPLICAS} replicas on a worker each, of which the first pretends to take four times as long. Open loop: \
             Poisson arrivals of {rate:.1} requests a second, which is {LOAD} of what three and a quarter carry, over \
             HTTP; {WARM_UP:?} of warm-up and {MEASURED:?} that are measured, {RUNS} runs of each policy in turn, the same \
             arrivals for both. A request that is not complete {GRACE:?} after the last arrival counts with the time \
             that it had until then, which flatters whoever is slow.",
        ),
    );
    let mut workers = vec![Vec::new(); REPLICAS];
    workers[0] = vec![("SHOAL_PRETEND_SLOWER", SLOWER)];
    let mut coordinators = POLICIES.map(|policy| vec!["--policy", policy]).to_vec();
    // Two cannot vote; this one is asked nothing.
    coordinators.push(Vec::new());
    let cluster = Processes::start(&Plan { coordinators, workers, ..Plan::default() })?;
    cluster.admin(0)?.deploy("gray", MODEL, 1, REPLICAS as u32)?;
    let mut all = POLICIES.map(|_| Figures::default());
    let mut p99 = POLICIES.map(|_| Series::default());
    for seed in 1..=RUNS {
        for (at, policy) in POLICIES.iter().enumerate() {
            let figures = arrivals(&cluster.url(at), rate, seed)
                .with_context(|| format!("{policy}, run {seed}"))?;
            eprintln!(
                "  {policy}: p99 of {} answers {:.2} s",
                figures.whole.len(),
                figures.whole.quantile(0.99)
            );
            p99[at].push(figures.whole.quantile(0.99));
            all[at].first.extend(figures.first.iter());
            all[at].whole.extend(figures.whole.iter());
            all[at].incomplete += figures.incomplete;
            // What is cancelled leaves the heads within a step; reports come each 250 ms.
            pass(Duration::from_secs(2));
        }
    }
    for (policy, figures) in POLICIES.iter().zip(&all) {
        let of = |series: &Series| {
            let q = |q| series.quantile(q);
            format!("p50 {:.2} s, p99 {:.2} s", q(0.5), q(0.99))
        };
        section.seen(format!("{policy}: time to the first token"), of(&figures.first));
        let requests = figures.whole.len();
        let incomplete = figures.incomplete;
        section.seen(
            format!("{policy}: whole answers ({requests} requests)"),
            format!("{}, {incomplete} not complete in time", of(&figures.whole)),
        );
    }
    let gain = p99[1].over(&p99[0]);
    section.at_least("p99 of dynamic_wrr over score", gain.median(), gain.to_string(), 5.0);
    Ok(section)
}

/// One run of arrivals through one coordinator.
fn arrivals(url: &str, rate: f64, seed: u64) -> Result<Figures> {
    let mut dice = Dice::new(seed);
    let start = Instant::now();
    let end = start + WARM_UP + MEASURED;
    let mut at = Duration::ZERO;
    let (sender, receiver) = sync_channel(4096);
    let mut measured = 0;
    while at < WARM_UP + MEASURED {
        let tokens = |dice: &mut Dice, mean: u64| mean / 2 + dice.below(mean + 1);
        let ids = prompt(dice.bits(), tokens(&mut dice, PROMPT) as usize, 1000);
        let asked = body("gray", &ids, tokens(&mut dice, ANSWER) as u32);
        pass((start + at).saturating_duration_since(Instant::now()));
        let counts = at >= WARM_UP;
        measured += usize::from(counts);
        let (url, sender) = (url.to_owned(), counts.then(|| sender.clone()));
        std::thread::spawn(move || {
            let seen = ask(&url, &asked, end + GRACE);
            if let Some(sender) = sender {
                let _ = sender.send(seen);
            }
        });
        let uniform = (dice.below(1 << 53) + 1) as f64 / (1u64 << 53) as f64;
        at += Duration::from_secs_f64(-uniform.ln() / rate);
    }
    drop(sender);
    let mut figures = Figures::default();
    for _ in 0..measured {
        let seen = receiver.recv_timeout(Duration::from_secs(60)).context("a client hangs")?;
        figures.first.push(seen.first);
        figures.whole.push(seen.whole);
        figures.incomplete += usize::from(!seen.complete);
    }
    ensure!(!figures.whole.is_empty(), "nothing arrived");
    Ok(figures)
}

fn ask(url: &str, asked: &serde_json::Value, until: Instant) -> Seen {
    let start = Instant::now();
    let mut first = None;
    let told = stream(&agent(until.saturating_duration_since(start)), url, asked, |at| {
        first.get_or_insert(at);
        true
    });
    let end = Instant::now();
    let since = |at: Instant| (at - start).as_secs_f64();
    Seen { first: since(first.unwrap_or(end)), whole: since(end), complete: told.is_ok() }
}
