//! What the coordinator adds: to a request, and in processor time to the tokens that flow through it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use shoal_coordinator::dispatch::{AnswerEvent, Dispatcher, Sequence, Target};
use shoal_protocol::id::{Attempt, NodeId, ReplicaId, RequestId, Role};
use shoal_protocol::join::JoinToken;
use shoal_protocol::plan::PretendSpec;
use shoal_protocol::quic::{Endpoint, join};
use shoal_protocol::request::SamplingRecord;
use tokio::runtime::Runtime;

use super::Settings;
use crate::admin::ADMIN_TIMEOUT;
use crate::client::{Running, agent, body};
use crate::measure::Series;
use crate::measure::report::Section;
use crate::measure::stats::significant;
use crate::news::now_of_day;
use crate::processes::{Plan, Processes, pass};
use crate::workload::prompt;

/// Requests of one token, in blocks taken in turn.
const BLOCKS: usize = 20;
const BLOCK: usize = 100;

/// Streams at once, and how long they are watched; twice.
const STREAMS: usize = 40;
const WATCHED: Duration = Duration::from_secs(10);

/// What the router may add, in microseconds.
const ADDED_US: f64 = 100.0;

/// No time but that of the way.
const QUICK: PretendSpec = PretendSpec {
    layers: 1,
    hidden: 64,
    vocab: 1000,
    max_context: 4096,
    seed: 8,
    layer_step_ns: 0,
    layer_row_ns: 0,
    layer_weight_bytes: 1 << 20,
};

/// 40 ms a token: `STREAMS` streams are a thousand tokens a second.
const STEADY: PretendSpec = PretendSpec { layer_step_ns: 40_000_000, seed: 9, ..QUICK };

/// Runs it.
pub fn run(_: &Settings) -> Result<Section> {
    let mut section = Section::new(
        "What the coordinator adds",
        format!(
            "One coordinator, one worker, a model that takes no time. `direct`: this process asks the head over QUIC, as \
             a coordinator does, without a router. `through`: the same requests (32 tokens in, 1 out) over HTTP through \
             the coordinator: its HTTP, JSON, tokens, router, QUIC. {BLOCKS} blocks of {BLOCK} requests each, in turn. \
             `route` and `dispatch` are the coordinator's own metric of the same requests: the choice of a replica \
             (filters, policy, lock); and from the checked request to the head that was asked. \
             Processor time: {STREAMS} streams of 25 tokens a second each for {WATCHED:?}, the whole process less the same \
             process with no stream: HTTP, JSON, detokenising, QUIC, and the kernel's own work for all of them. \
             Beside it the floor: a thread that only writes as many chunks of the same length to as many sockets. \
             What choosing takes of it is under `Routing: picks`."
        ),
    );
    let plan =
        Plan { coordinators: vec![Vec::new()], workers: vec![Vec::new()], ..Plan::default() };
    let cluster = Processes::start(&plan)?;
    let view = cluster.admin(0)?.deploy("quick", QUICK, 1, 1)?;
    let replica = view.plan.replicas.first().context("it has a layout")?;
    let direct = Direct::open(&cluster, replica.id, replica.stages[0].shards[0].node)?;
    added(&mut section, &cluster, &direct)?;
    cluster.admin(0)?.deploy("steady", STEADY, 1, 1)?;
    processor(&mut section, &cluster)?;
    Ok(section)
}

fn added(section: &mut Section, cluster: &Processes, direct: &Direct) -> Result<()> {
    let (agent, url) = (agent(Duration::from_secs(120)), cluster.url(0));
    let ids = prompt(1, 32, QUICK.vocab);
    let asked = json!({
        "model": "quick", "prompt": ids, "max_tokens": 1, "temperature": 0, "ignore_eos": true
    });
    let through = || -> Result<f64> {
        let start = Instant::now();
        let mut response = agent.post(format!("{url}/v1/completions")).send_json(&asked)?;
        let answer: Value = response.body_mut().read_json()?;
        ensure!(answer["usage"]["completion_tokens"] == 1, "no answer: {answer}");
        Ok(start.elapsed().as_secs_f64() * 1e6)
    };
    // Connections, pages and branches of both are warm.
    for number in 0..BLOCK {
        through()?;
        direct.ask(&ids, number as u64)?;
    }
    let before = Way::read(&agent, &url)?;
    let mut p50 = [Series::default(), Series::default()];
    let mut p99 = [Series::default(), Series::default()];
    for block in 0..BLOCKS {
        let mut times = [Series::default(), Series::default()];
        for number in 0..BLOCK {
            times[0].push(direct.ask(&ids, (block * BLOCK + number) as u64)?);
        }
        for _ in 0..BLOCK {
            times[1].push(through()?);
        }
        for (which, times) in times.iter().enumerate() {
            p50[which].push(times.median());
            p99[which].push(times.quantile(0.99));
        }
    }
    let way = Way::read(&agent, &url)?.since(&before);
    for (which, name) in ["direct", "through"].into_iter().enumerate() {
        let (half, most) = (&p50[which], &p99[which]);
        section.seen(format!("a request, {name}, µs, p50 of a block"), half.to_string());
        section.seen(format!("a request, {name}, µs, p99 of a block"), most.to_string());
    }
    for (name, [direct, through]) in [("p50", &p50), ("p99", &p99)] {
        let added: Series = through.iter().zip(direct.iter()).map(|(a, b)| a - b).collect();
        let what = format!("added by all that is not the head, µs, {name} of a block, pairs");
        section.seen(what, added.to_string());
    }
    for (part, at_most) in [("route", true), ("dispatch", false)] {
        let (mean, p99) = way.of(part)?;
        let (what, seen) =
            (format!("added by `{part}`, µs, p99"), format!("≤ {p99}, mean {}", significant(mean)));
        if at_most {
            section.at_most(what, p99, seen, ADDED_US);
        } else {
            section.seen(what, seen);
        }
    }
    Ok(())
}

fn processor(section: &mut Section, cluster: &Processes) -> Result<()> {
    let idle = over(cluster, || Ok(0.0))?.0;
    let streams: Vec<_> = (0..STREAMS)
        .map(|i| {
            let asked = body("steady", &prompt(i as u64, 8, QUICK.vocab), 2000);
            Running::start(cluster.url(0), asked, Duration::from_secs(120))
        })
        .collect();
    for stream in &streams {
        stream.wait_until_begun()?;
    }
    let start = Instant::now();
    let (busy, rate) = over(cluster, || {
        let tokens: usize = streams.iter().map(|s| s.gaps(start, WATCHED).len()).sum();
        Ok(tokens as f64 / WATCHED.as_secs_f64())
    })?;
    drop(streams);
    ensure!(rate > 500.0, "only {rate} tokens a second flowed");
    section.seen("tokens/s while the processor was watched", significant(rate));
    section.seen("percent of a core, no stream", significant(100.0 * idle));
    section.seen("percent of a core, with the streams", significant(100.0 * busy));
    let each = 100.0 * (busy - idle) / rate * 1000.0;
    section.seen("whole coordinator, percent of a core per 1,000 tokens/s", significant(each));
    let floor = floor()?;
    section
        .seen("bare writes to as many sockets, percent of a core per 1,000/s", significant(floor));
    Ok(())
}

/// Bytes of a chunk of `STEADY`'s answers, with HTTP's own framing.
const CHUNK: usize = 220;

/// Percent of a core that a thread takes per 1,000 chunks a second, written one by one to `STREAMS`
/// sockets with a reader each, in bursts as steps end.
fn floor() -> Result<f64> {
    const BURSTS: usize = 75;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut writers = Vec::new();
    for _ in 0..STREAMS {
        let mut reader = TcpStream::connect(listener.local_addr()?)?;
        let (writer, _) = listener.accept()?;
        writer.set_nodelay(true)?;
        writers.push(writer);
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while reader.read(&mut chunk).is_ok_and(|read| read > 0) {}
        });
    }
    let before = thread_seconds()?;
    for _ in 0..BURSTS {
        for writer in &mut writers {
            writer.write_all(&[b'x'; CHUNK])?;
        }
        pass(Duration::from_millis(40));
    }
    let took = thread_seconds()? - before;
    Ok(100.0 * took * 1000.0 / (BURSTS * STREAMS) as f64)
}

/// Seconds that this thread has computed.
fn thread_seconds() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanoseconds = text.split_whitespace().next().context("an empty schedstat")?;
    Ok(nanoseconds.parse::<f64>()? / 1e9)
}

/// The share of a core that the coordinator takes while `WATCHED` passes, and what is known at its end.
fn over(cluster: &Processes, end: impl FnOnce() -> Result<f64>) -> Result<(f64, f64)> {
    let (start, before) = (Instant::now(), cluster.coordinator_seconds(0)?);
    pass(WATCHED);
    let took = cluster.coordinator_seconds(0)? - before;
    Ok((took / start.elapsed().as_secs_f64(), end()?))
}

/// The head, asked without a coordinator.
struct Direct {
    runtime: Runtime,
    dispatcher: Dispatcher,
    target: Target,
}

impl Direct {
    fn open(cluster: &Processes, replica: ReplicaId, head: NodeId) -> Result<Self> {
        let lately = now_of_day()? - 60_000.0;
        let said = cluster.news.wait(lately, Duration::ZERO, |line| {
            line.text.contains("worker registered") && line.text.contains(&format!("node={head} "))
        });
        let (_, line) = said.context("the coordinator did not say where the worker is")?;
        let (_, address) = line.text.split_once("requests=").context("no address of requests")?;
        let address: SocketAddr =
            address.split_whitespace().next().context("an empty address")?.parse()?;
        let token: JoinToken = cluster.admin(0)?.token(Role::Coordinator, 1)?.parse()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let dispatcher = runtime.block_on(async {
            let at = cluster.cluster_address(0).parse()?;
            let identity = join::join(at, &token, ADMIN_TIMEOUT).await?;
            let any = ([127, 0, 0, 1], 0).into();
            anyhow::Ok(Dispatcher::new(Endpoint::bind(any, Arc::new(identity), &[])?))
        })?;
        let target = Target { replica, head, address, trace: None, tenant: None };
        Ok(Self { runtime, dispatcher, target })
    }

    /// Microseconds of one request of one token.
    fn ask(&self, ids: &[u32], number: u64) -> Result<f64> {
        let sequence = Sequence {
            request: RequestId(1 << 40 | number),
            attempt: Attempt(0),
            choice: 0,
            prompt: ids.into(),
            received: Vec::new(),
            sampling: SamplingRecord::GREEDY,
            stop_tokens: Arc::from([]),
            max_tokens: 1,
            adapter: None,
            tenant: None,
            reused: 0,
        };
        let start = Instant::now();
        self.runtime.block_on(async {
            let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
            let mut answer = self.dispatcher.start(self.target, sequence, deadline).await?;
            loop {
                match answer.next().await? {
                    AnswerEvent::Token(_) => {}
                    AnswerEvent::Done { .. } | AnswerEvent::Vector(_) => return anyhow::Ok(()),
                }
            }
        })?;
        Ok(start.elapsed().as_secs_f64() * 1e6)
    }
}

/// The coordinator's metric of the way of requests: (part, bound in seconds) → requests up to there.
struct Way {
    buckets: Vec<(String, f64, f64)>,
    sums: Vec<(String, f64)>,
}

const METRIC: &str = "shoal_request_way_seconds";

impl Way {
    fn read(agent: &ureq::Agent, url: &str) -> Result<Self> {
        let text = agent.get(format!("{url}/metrics")).call()?.body_mut().read_to_string()?;
        let (mut buckets, mut sums) = (Vec::new(), Vec::new());
        let label = |line: &str, name: &str| {
            let (_, rest) = line.split_once(&format!("{name}=\""))?;
            Some(rest.split_once('"')?.0.to_owned())
        };
        for line in text.lines().filter(|line| line.starts_with(METRIC)) {
            let value = line.rsplit(' ').next().context("a value")?.parse()?;
            let part = label(line, "part").context("a part")?;
            match label(line, "le") {
                Some(le) => buckets.push((part, le.parse().unwrap_or(f64::INFINITY), value)),
                None if line.starts_with(&format!("{METRIC}_sum")) => sums.push((part, value)),
                None => {}
            }
        }
        Ok(Self { buckets, sums })
    }

    fn since(mut self, before: &Self) -> Self {
        for (now, then) in self.buckets.iter_mut().zip(&before.buckets) {
            now.2 -= then.2;
        }
        for (now, then) in self.sums.iter_mut().zip(&before.sums) {
            now.1 -= then.1;
        }
        self
    }

    /// Microseconds: the mean, and the bound below which 99 of 100 requests lie.
    fn of(&self, part: &str) -> Result<(f64, f64)> {
        let of_part: Vec<_> = self.buckets.iter().filter(|b| b.0 == part).collect();
        let count = of_part.last().map_or(0.0, |b| b.2);
        let sum = self.sums.iter().find(|s| s.0 == part).map_or(0.0, |s| s.1);
        if count < 1.0 {
            bail!("the metric {METRIC} counted nothing of `{part}`");
        }
        let bound = of_part.iter().find(|b| b.2 >= 0.99 * count).map_or(f64::INFINITY, |b| b.1);
        Ok((sum / count * 1e6, bound * 1e6))
    }
}
