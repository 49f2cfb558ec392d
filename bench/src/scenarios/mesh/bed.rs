//! A cluster of worker processes on which meshes are made and measured.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use shoal_protocol::admin::{AdminCall, AdminReply, ClusterView, PlanView};
use shoal_protocol::id::DeploymentName;
use shoal_protocol::mesh::{MeshAsk, MeshAsked, Objective, Reduction};
use shoal_protocol::plan::{ModelSource, Precision, StagePlan};

use crate::admin::{Admin, is_ready};
use crate::client;
use crate::measure::Series;
use crate::processes::{Host, Plan, Processes};
use crate::workload::prompt;

/// Tokens of a prompt: decoding is what is measured.
const PROMPT: usize = 16;

/// How long one answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// The cluster.
pub(in crate::scenarios) struct Bed {
    pub cluster: Processes,
    admin: Admin,
    agent: ureq::Agent,
}

/// What is to be served.
#[derive(Clone, Copy, Debug)]
pub(in crate::scenarios) struct Wanted<'a> {
    pub model: &'a Path,
    pub vocab: u32,
    pub precision: Option<Precision>,
    /// `2x2`, `auto`; or `even 2`: that many stages, as if nothing were known of the workers.
    pub mesh: &'a str,
    pub objective: Objective,
    pub reduction: Option<Reduction>,
}

/// What is served.
pub(in crate::scenarios) struct Served {
    pub name: String,
    pub vocab: u32,
}

impl Bed {
    /// With these workers; a coordinator that is reached there.
    pub fn start(hosts: Vec<Host>, address: Option<String>) -> Result<Self> {
        let plan = Plan { coordinators: vec![Vec::new()], hosts, address, ..Plan::default() };
        let cluster = Processes::start(&plan)?;
        let admin = cluster.admin(0)?;
        crate::processes::pass(RATES_PAUSE);
        Ok(Self { cluster, admin, agent: client::agent(ANSWER_TIMEOUT) })
    }

    /// Serves it and waits until it is ready.
    pub fn serve(&self, name: &str, wanted: Wanted<'_>) -> Result<Served> {
        let Wanted { model, vocab, precision, mesh, objective, reduction } = wanted;
        let deployment = DeploymentName::new(name)?;
        let path = model.to_str().context("the model's path is not UTF-8")?.to_owned();
        let source = ModelSource::Folder { path };
        let call = match mesh.strip_prefix("even ") {
            Some(stages) => {
                let stages = Some(stages.parse()?);
                AdminCall::Deploy { name: deployment, source, stages, precision, replicas: 1 }
            }
            None => {
                let mesh = mesh.parse::<MeshAsked>().map_err(anyhow::Error::msg)?;
                let ask = MeshAsk {
                    mesh: Some(mesh),
                    objective: Some(objective),
                    reduction,
                    kv: None,
                    activations: None,
                };
                AdminCall::DeployMesh { name: deployment, source, precision, replicas: 1, ask }
            }
        };
        self.admin.call(call).with_context(|| format!("{name}: {mesh}"))?;
        self.admin.wait_until(&format!("{name} ready"), |view| is_ready(view, name))?;
        Ok(Served { name: name.to_owned(), vocab })
    }

    /// Takes it away and waits until it is gone.
    pub fn remove(&self, served: Served) -> Result<()> {
        self.admin.call(AdminCall::Undeploy { name: DeploymentName::new(&served.name)? })?;
        let gone = |view: &ClusterView| {
            let none = !view.deployments.iter().any(|d| d.name.as_str() == served.name);
            // What others hold stays.
            let empty = view.workers.iter().all(|worker| worker.shards.is_empty());
            none && (empty || !view.deployments.is_empty())
        };
        self.admin.wait_until("without it", gone).map(drop)
    }

    /// The plan of what is served, with its arithmetic.
    pub fn explain(&self, served: &Served) -> Result<PlanView> {
        let name = DeploymentName::new(&served.name)?;
        match self.admin.call(AdminCall::ExplainPlan { name })? {
            AdminReply::Plan(plan) => Ok(*plan),
            other => bail!("{other:?} where a plan was expected"),
        }
    }

    /// Answers a prompt of so many tokens with so many.
    pub fn answer(&self, served: &Served, prompt_tokens: usize, tokens: u32) -> Result<()> {
        let body = client::body(&served.name, &prompt(3, prompt_tokens, served.vocab), tokens);
        client::stream(&self.agent, &self.cluster.url(0), &body, |_| true).map(drop)
    }

    /// So many streams at once, of a prompt of so many tokens and an answer of so many.
    pub fn all_at_once(&self, served: &Served, streams: usize, each: (usize, u32)) -> Result<()> {
        std::thread::scope(|scope| {
            let one = || self.answer(served, each.0, each.1);
            let running: Vec<_> = (0..streams).map(|_| scope.spawn(one)).collect();
            let joined = running.into_iter().map(|thread| match thread.join() {
                Ok(done) => done,
                Err(_) => bail!("a client thread panicked"),
            });
            joined.collect()
        })
    }

    /// Milliseconds between tokens of one stream.
    pub fn token_ms(&self, served: &Served, tokens: u32) -> Result<f64> {
        let body = client::body(&served.name, &prompt(7, PROMPT, served.vocab), tokens);
        let mut times: Vec<Instant> = Vec::with_capacity(tokens as usize);
        let url = self.cluster.url(0);
        client::stream(&self.agent, &url, &body, |at| {
            times.push(at);
            true
        })?;
        let (Some(first), Some(last)) = (times.first(), times.last()) else {
            bail!("no tokens of {}", served.name)
        };
        ensure!(times.len() > 1, "one token of {}", served.name);
        Ok((*last - *first).as_secs_f64() * 1e3 / (times.len() - 1) as f64)
    }

    /// Milliseconds from a prompt to the first token, and between the tokens of the answer.
    pub fn timed(&self, served: &Served, prompt: &[u32], tokens: u32) -> Result<[f64; 2]> {
        let body = client::body(&served.name, prompt, tokens);
        let begun = Instant::now();
        let mut times = Vec::with_capacity(tokens as usize);
        client::stream(&self.agent, &self.cluster.url(0), &body, |at| {
            times.push(at);
            true
        })?;
        let (Some(first), Some(last)) = (times.first(), times.last()) else {
            bail!("no tokens of {}", served.name)
        };
        let each = (*last - *first).as_secs_f64() * 1e3 / (times.len() - 1).max(1) as f64;
        Ok([(*first - begun).as_secs_f64() * 1e3, each])
    }

    /// Tokens in a second of a stream for each of these prompts at once, while all of them decode.
    pub fn together(&self, served: &Served, prompts: &[Vec<u32>], tokens: u32) -> Result<f64> {
        let url = self.cluster.url(0);
        let one = |prompt: &[u32]| {
            let body = client::body(&served.name, prompt, tokens);
            let mut times = Vec::with_capacity(tokens as usize);
            client::stream(&self.agent, &url, &body, |at| {
                times.push(at);
                true
            })?;
            anyhow::Ok(times)
        };
        let times = std::thread::scope(|scope| {
            let running: Vec<_> =
                prompts.iter().map(|prompt| scope.spawn(move || one(prompt))).collect();
            let joined = running.into_iter().map(|thread| match thread.join() {
                Ok(times) => times,
                Err(_) => bail!("a client thread panicked"),
            });
            joined.collect::<Result<Vec<Vec<Instant>>>>()
        })?;
        let begun = times.iter().filter_map(|times| times.first()).max().context("no stream")?;
        let ended = times.iter().filter_map(|times| times.last()).min().context("no stream")?;
        ensure!(begun < ended, "the streams of {} do not meet", served.name);
        let within = |at: &&Instant| *at > begun && *at <= ended;
        let count: usize = times.iter().map(|times| times.iter().filter(within).count()).sum();
        Ok(count as f64 / (*ended - *begun).as_secs_f64())
    }

    /// Tokens in a second of so many streams at once, from each one's first token to its last.
    pub fn tokens_a_second(&self, served: &Served, streams: usize, tokens: u32) -> Result<f64> {
        std::thread::scope(|scope| {
            let running: Vec<_> =
                (0..streams).map(|_| scope.spawn(|| self.token_ms(served, tokens))).collect();
            let rates = running.into_iter().map(|thread| match thread.join() {
                Ok(ms) => ms.map(|ms| 1e3 / ms),
                Err(_) => bail!("a client thread panicked"),
            });
            rates.sum()
        })
    }

    /// Milliseconds between tokens of several streams, one after the other.
    pub fn tokens_ms(&self, served: &Served, streams: usize, tokens: u32) -> Result<Series> {
        (0..streams)
            .map(|_| self.token_ms(served, tokens))
            .collect::<Result<Vec<f64>>>()
            .map(|all| all.into_iter().collect())
    }

    /// Tokens in a second of so many streams at once.
    pub fn many(&self, served: &Served, streams: u64, tokens: u32) -> Result<f64> {
        let url = self.cluster.url(0);
        let start = Instant::now();
        let one = |seed: u64| {
            let body = client::body(&served.name, &prompt(seed, PROMPT, served.vocab), tokens);
            client::stream(&self.agent, &url, &body, |_| true)
        };
        let counts = std::thread::scope(|scope| {
            let running: Vec<_> = (0..streams).map(|seed| scope.spawn(move || one(seed))).collect();
            let joined = running.into_iter().map(|thread| match thread.join() {
                Ok(count) => count,
                Err(_) => bail!("a client thread panicked"),
            });
            joined.collect::<Result<Vec<usize>>>()
        })?;
        Ok(counts.iter().sum::<usize>() as f64 / start.elapsed().as_secs_f64())
    }
}

/// How long workers have to measure themselves, one after the other, a moment after they are connected.
const RATES_PAUSE: Duration = Duration::from_secs(3);

/// The line of an explanation that begins like that.
pub(super) fn line<'a>(plan: &'a PlanView, start: &str) -> Result<&'a str> {
    let found = plan.explanation.iter().find(|line| line.starts_with(start));
    found.map(String::as_str).with_context(|| format!("no `{start}` in {:?}", plan.explanation))
}

/// The number behind some words of an explanation, before the next word.
pub(super) fn number(text: &str, behind: &str) -> Result<f64> {
    let (_, rest) =
        text.split_once(behind).with_context(|| format!("no `{behind}` in `{text}`"))?;
    let word = rest.split_whitespace().next().unwrap_or_default();
    word.parse().with_context(|| format!("`{word}` is no number in `{text}`"))
}

/// Predicted milliseconds a token of one stream.
pub(super) fn predicted_ms(plan: &PlanView) -> Result<f64> {
    number(line(plan, "predicted: ")?, "predicted: ")
}

/// Predicted milliseconds a step of a full pipeline.
pub(super) fn predicted_full_ms(plan: &PlanView) -> Result<f64> {
    number(line(plan, "predicted: ")?, "of one stream, ")
}

/// `w1+w2:0..12 w3+w4:12..24`.
pub(in crate::scenarios) fn words(plan: &PlanView) -> String {
    let stage = |stage: &StagePlan| {
        let nodes: Vec<_> = stage.shards.iter().map(|shard| shard.node.to_string()).collect();
        format!("{}:{}", nodes.join("+"), stage.layers)
    };
    let stages = plan.replicas.iter().flat_map(|replica| &replica.stages);
    stages.map(stage).collect::<Vec<_>>().join(" ")
}
