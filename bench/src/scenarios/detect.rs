//! Workers are killed and frozen while streams flow: how soon somebody gives them up.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result};
use shoal_protocol::admin::ClusterView;
use shoal_protocol::plan::PretendSpec;

use super::Settings;
use crate::admin::is_ready;
use crate::client::{Running, body};
use crate::measure::Series;
use crate::measure::report::Section;
use crate::news::now_of_day;
use crate::processes::{Plan, Processes, Signal, pass};
use crate::workload::prompt;

/// Deployments of two workers each; one worker of each is broken in a batch.
const DEPLOYMENTS: usize = 6;

/// Nobody starts for so long before the streams of a batch do. What is broken in a batch starts again behind
/// it and fights the others for these few cores, and where that was seen a dozen times within the last minute,
/// silence is believed after 1.2 s alone (`liveness::worst`): without the pause that is what would be measured.
const CALM: Duration = Duration::from_secs(60);

/// Streams flow for so long before a batch: after a thousand beats (each 10 ms) a link trusts what it
/// has seen of its own jitter, before that it assumes 40 ms.
const WARM_UP: Duration = Duration::from_millis(11_500);

/// Between two faults of a batch: longer than a detection, so that one does not hide another.
const APART: Duration = Duration::from_millis(300);

/// Until somebody gives a worker up; the transport's own idle time-out is half of it.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long streams may last: a batch and its warm-up.
const STREAM: Duration = Duration::from_secs(60);

/// What the median may be, in milliseconds.
const MEDIAN_MS: f64 = 50.0;

/// 10 ms a token over two stages. A worker has room for one of them: nothing moves, so that the links
/// of the others keep what they know.
const MODEL: PretendSpec = PretendSpec {
    layers: 2,
    hidden: 64,
    vocab: 1000,
    max_context: 8192,
    seed: 4,
    layer_step_ns: 5_000_000,
    layer_row_ns: 0,
    layer_weight_bytes: 150 << 20,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Kill,
    Freeze,
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            How::Kill => "kill -9",
            How::Freeze => "SIGSTOP",
        })
    }
}

/// Milliseconds until others gave a worker up.
#[derive(Default)]
struct Times {
    neighbour: Series,
    coordinator: Series,
    first: Series,
}

/// Runs it.
pub fn run(settings: &Settings) -> Result<Section> {
    let mut section = Section::new(
        "A worker killed or frozen",
        format!(
            "{} workers and a coordinator, real processes; {DEPLOYMENTS} deployments of two stages with a stream of \
             10 ms a token each. {CALM:?} after the last process has started again the streams begin, and {WARM_UP:?} later one worker of each is broken, {APART:?} apart, heads and last \
             stages, kills and freezes in turn. From the signal to the log lines of the neighbour that gives up its \
             link and of the coordinator that gives up its own: median / p99 / worst. {} faults of each kind.",
            2 * DEPLOYMENTS,
            settings.trials
        ),
    );
    let plan = Plan {
        coordinators: vec![Vec::new()],
        workers: vec![Vec::new(); 2 * DEPLOYMENTS],
        ..Plan::default()
    };
    let mut cluster = Processes::start(&plan)?;
    for deployment in 0..DEPLOYMENTS {
        cluster.admin(0)?.deploy(&name(deployment), MODEL, 2, 1)?;
    }
    let mut times = [Times::default(), Times::default()];
    let mut begun = 0;
    while begun < 2 * settings.trials {
        let count = DEPLOYMENTS.min(2 * settings.trials - begun);
        batch(&mut cluster, begun, count, &mut times)?;
        begun += count;
        eprintln!("  {begun} of {} faults", 2 * settings.trials);
    }
    for (how, times) in [How::Kill, How::Freeze].into_iter().zip(&times) {
        let trials = times.first.len();
        let what = |who: &str| format!("{how}, given up by {who}, ms ({trials} trials)");
        let rows = [
            ("whoever is first", &times.first),
            ("its neighbour", &times.neighbour),
            ("the coordinator", &times.coordinator),
        ];
        for (who, series) in rows {
            section.at_most(what(who), series.median(), series.tail(), MEDIAN_MS);
        }
    }
    Ok(section)
}

fn name(deployment: usize) -> String {
    format!("detect-{deployment}")
}

fn batch(
    cluster: &mut Processes,
    begun: usize,
    count: usize,
    times: &mut [Times; 2],
) -> Result<()> {
    let view = cluster.admin(0)?.wait_until("serving", |view| {
        (0..DEPLOYMENTS).all(|deployment| is_ready(view, &name(deployment)))
    })?;
    pass(CALM);
    let streams: Vec<_> = (0..DEPLOYMENTS)
        .map(|deployment| {
            let asked = body(&name(deployment), &prompt(deployment as u64, 20, 1000), 5000);
            Running::start(cluster.url(0), asked, STREAM)
        })
        .collect();
    for stream in &streams {
        stream.wait_until_begun()?;
    }
    pass(WARM_UP);
    let mut broken = Vec::new();
    for trial in begun..begun + count {
        let how = if trial % 2 == 0 { How::Kill } else { How::Freeze };
        // Both kinds hit heads and last stages.
        let worker = holder(&view, &name(trial - begun), trial / 2 % 2)?;
        let at = now_of_day()?;
        let signal = if how == How::Kill { Signal::KILL } else { Signal::STOP };
        cluster.signal_worker(worker, signal)?;
        broken.push((how, worker));
        let times = &mut times[usize::from(how == How::Freeze)];
        note(cluster, worker, at, times).with_context(|| format!("{how} of w{}", worker + 1))?;
        pass(APART);
    }
    drop(streams);
    for (how, worker) in broken {
        match how {
            How::Kill => cluster.restart_worker(worker)?,
            How::Freeze => cluster.signal_worker(worker, Signal::CONT)?,
        }
    }
    cluster.wait_for_workers(0).map(drop)
}

/// The index of the worker with a stage.
fn holder(view: &ClusterView, deployment: &str, stage: usize) -> Result<usize> {
    let plan = view.plan.replicas.iter().find(|r| r.deployment.as_str() == deployment);
    let stage = plan.and_then(|plan| plan.stages.get(stage)).context("it has such a stage")?;
    Ok(stage.shards[0].node.number as usize - 1)
}

fn note(cluster: &Processes, worker: usize, at: f64, times: &mut Times) -> Result<()> {
    let node = format!("w{}", worker + 1);
    let (link, control) = (format!("the link to {node} "), format!("node={node} "));
    let neighbour = cluster.news.wait(at, PATIENCE, |line| {
        line.who != node && line.text.contains("has failed") && line.text.contains(&link)
    });
    let coordinator = cluster.news.wait(at, PATIENCE, |line| {
        line.text.contains("control link ended") && line.text.contains(&control)
    });
    let (neighbour, _) = neighbour.context("no neighbour gave it up")?;
    let (coordinator, _) = coordinator.context("the coordinator did not give it up")?;
    times.neighbour.push(neighbour);
    times.coordinator.push(coordinator);
    times.first.push(neighbour.min(coordinator));
    Ok(())
}
