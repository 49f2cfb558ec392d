//! Two machines, simulated by network namespaces, with a slow way between them.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use shoal_protocol::mesh::Objective;
use tempfile::TempDir;

use super::bed::{Bed, Wanted, predicted_ms, words};
use super::relay::End;
use crate::measure::Series;
use crate::measure::report::Section;
use crate::processes::Host;
use crate::scenarios::Settings;
use crate::workload::model::Shape;

/// Tokens of a stream: as many as take about [`STREAM_MS`].
const TOKENS: (u32, u32) = (6, 24);
const STREAM_MS: f64 = 1500.0;

/// How often each mesh is made, and streams of each time.
const ROUNDS: usize = 3;

/// What a worker may take: less than half of the model with room for a conversation, more than a quarter. So
/// neither one worker nor one machine has room for all of it.
const MEMORY: &str = "400MiB";
const MEMORY_SMALL: &str = "48MiB";

/// The meshes, the pure ones first.
const MESHES: [&str; 4] = ["4x1", "1x4", "2x2", "auto"];

/// This machine's end of the way, and the other one's.
const HERE: &str = "10.213.77.1";
const THERE: &str = "10.213.77.2";
const NAMESPACE: &str = "shoal-bench-b";
const DEVICES: [&str; 2] = ["shoalbench0", "shoalbench1"];

/// A choice may be slower than the better pure mesh by so much: what two runs differ by.
const NOISE: f64 = 0.97;

/// Another machine: a network namespace. It goes with this.
struct Machine {
    /// How the way to it is slow, and what makes it so.
    how: &'static str,
    _relays: Option<(TempDir, End, End)>,
}

impl Machine {
    /// With a way of so many milliseconds to it.
    fn make(latency_ms: u32) -> Result<Self> {
        // What a run that was killed has left.
        let _ = ip(&["netns", "del", NAMESPACE]);
        let _ = ip(&["link", "del", DEVICES[0]]);
        ip(&["netns", "add", NAMESPACE])?;
        // From here on it is taken away again.
        let mut machine = Self { how: "`tc netem` on a `veth` pair", _relays: None };
        ip(&["-n", NAMESPACE, "link", "set", "lo", "up"])?;
        if let Err(error) = netem(latency_ms) {
            eprintln!("  no netem ({error:#}): packets are relayed");
            let _ = ip(&["link", "del", DEVICES[0]]);
            machine.how = "a relay of packets between two tunnels, as there is no `tc netem` here";
            machine._relays = Some(relayed(latency_ms)?);
        }
        Ok(machine)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The pair of devices goes with the namespace that has one of them.
        let _ = ip(&["netns", "del", NAMESPACE]);
    }
}

/// A pair of devices that the kernel delays.
fn netem(latency_ms: u32) -> Result<()> {
    let peer = ["peer", "name", DEVICES[1], "netns", NAMESPACE];
    ip(&[&["link", "add", DEVICES[0], "type", "veth"][..], &peer].concat())?;
    let delay = format!("{latency_ms}ms");
    let queue = |before: &[&str], device: &str| {
        let queue =
            ["qdisc", "add", "dev", device, "root", "netem", "delay", &delay, "limit", "10000"];
        run_program("tc", &[before, &queue].concat())
    };
    queue(&[], DEVICES[0])?;
    queue(&["-n", NAMESPACE], DEVICES[1])?;
    up(&[], DEVICES[0], [HERE, THERE])?;
    up(&["-n", NAMESPACE], DEVICES[1], [THERE, HERE])
}

/// Two tunnels whose packets two processes of ours delay.
fn relayed(latency_ms: u32) -> Result<(TempDir, End, End)> {
    let folder = tempfile::tempdir()?;
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    let delay = Duration::from_millis(u64::from(latency_ms));
    let here = End::start(&[], DEVICES[0], (&a, &b), delay)?;
    let there = End::start(&["ip", "netns", "exec", NAMESPACE], DEVICES[1], (&b, &a), delay)?;
    up(&[], DEVICES[0], [HERE, THERE])?;
    up(&["-n", NAMESPACE], DEVICES[1], [THERE, HERE])?;
    Ok((folder, here, there))
}

fn up(before: &[&str], device: &str, [own, peer]: [&str; 2]) -> Result<()> {
    let address = format!("{peer}/32");
    ip(&[before, &["addr", "add", own, "peer", &address, "dev", device]].concat())?;
    ip(&[before, &["link", "set", device, "up"]].concat())
}

fn ip(args: &[&str]) -> Result<()> {
    run_program("ip", args)
}

fn run_program(program: &str, args: &[&str]) -> Result<()> {
    let output =
        Command::new(program).args(args).output().with_context(|| format!("no {program}"))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {}: {}", args.join(" "), why.trim());
    }
    Ok(())
}

/// Runs it.
fn run_with(settings: &Settings, latency_ms: u32, section: &mut Section) -> Result<()> {
    let shape = settings.shape(Shape::MEDIUM);
    let model = shape.write(&settings.models, 1)?;
    let machine = Machine::make(latency_ms)?;
    section.seen("the way is slow by", machine.how);
    let memory = if settings.small { MEMORY_SMALL } else { MEMORY }.to_owned();
    let here = Host { memory, ..Host::default() };
    let prefix = ["ip", "netns", "exec", NAMESPACE].map(str::to_owned).to_vec();
    let there = Host { prefix, ..here.clone() };
    let hosts = vec![here.clone(), there.clone(), here, there];
    let bed = Bed::start(hosts, Some(HERE.to_owned()))?;
    let mut series = MESHES.map(|_| Series::default());
    let mut made = MESHES.map(|_| String::new());
    for round in 0..ROUNDS {
        for (index, mesh) in MESHES.into_iter().enumerate() {
            let wanted = Wanted {
                model: &model,
                vocab: shape.vocab,
                precision: None,
                mesh,
                objective: Objective::Latency,
                reduction: None,
            };
            let served = bed.serve("over-links", wanted)?;
            let first = bed.token_ms(&served, TOKENS.0)?;
            let tokens = ((STREAM_MS / first) as u32).clamp(TOKENS.0, TOKENS.1);
            let streams = bed.tokens_ms(&served, settings.pairs.div_ceil(ROUNDS), tokens)?;
            series[index].push(streams.median());
            // What its links have told by now counts too.
            let plan = bed.explain(&served)?;
            made[index] = format!("{}, predicted {:.1}", words(&plan), predicted_ms(&plan)?);
            if round == 0 {
                let ways = plan.explanation.iter().filter(|line| line.starts_with("way "));
                ways.for_each(|way| eprintln!("    {way}"));
            }
            bed.remove(served)?;
        }
    }
    for ((mesh, measured), made) in MESHES.iter().zip(&series).zip(&made) {
        section.seen(format!("{mesh} ({made}): ms a token"), measured.to_string());
    }
    let [stages, ranks, _, chosen] = &series;
    let (name, best) = match stages.median() <= ranks.median() {
        true => ("4x1", stages),
        false => ("1x4", ranks),
    };
    let ratio = best.over(chosen);
    section.at_least(
        format!("the planner's choice over the better pure mesh ({name}), tokens/s"),
        ratio.median(),
        ratio.to_string(),
        NOISE,
    );
    Ok(())
}

/// Runs it, where this machine lets us.
pub fn run(settings: &Settings, latency_ms: u32) -> Result<Section> {
    let mut section = Section::new(
        format!("Two machines, {latency_ms} ms apart"),
        format!(
            "Two workers in this network namespace and two in another one, {latency_ms} ms away in each direction; one thread and {MEMORY} a worker, so that \
             neither a worker nor a machine alone has room for the model; one stream of {} to {} tokens, each mesh made {ROUNDS} times \
             in turn. The planner's choice is `--mesh auto`; pure meshes are four stages, and four ranks. The goal is that the choice is as \
             fast as the better of them, but for {NOISE} by which two runs differ.",
            TOKENS.0, TOKENS.1
        ),
    );
    if let Err(error) = run_with(settings, latency_ms, &mut section) {
        // A machine without namespaces or without netem: said, and the rest goes on.
        section.seen("not measured on this machine", format!("{error:#}").replace('\n', " "));
    }
    Ok(section)
}
