//! Views as text for people. Every function is pure and returns what is to be printed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;
use shoal_protocol::admin::{
    ChangeView, ClusterView, DeploymentPhase, DeploymentView, PlanView, ReplicaView, WorkerView,
};
use shoal_protocol::control::{ShardReport, ShardState};
use shoal_protocol::id::{NodeId, ReplicaId, StageIndex};
use shoal_protocol::plan::{ReplicaPlan, ShardPlan};
use shoal_protocol::presence::PresenceView;

use super::coordinators;

/// Spaces between two columns.
const GAP: usize = 2;

/// What stands in a cell that has nothing to say.
const NOTHING: &str = "-";

/// Rows under a head, each column as wide as its widest cell; below them what is too long for a cell.
#[derive(Clone, Debug)]
pub struct Table {
    head: Vec<&'static str>,
    rows: Vec<Vec<String>>,
    notes: Vec<String>,
}

impl Table {
    /// A table with these columns.
    pub fn new(head: &[&'static str]) -> Self {
        Self { head: head.to_vec(), rows: Vec::new(), notes: Vec::new() }
    }

    /// Adds a row; cells beyond the head's columns are dropped, missing ones stay empty.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into_iter().take(self.head.len()).collect());
    }

    /// Says something about `what` below the rows; an empty text says nothing.
    pub fn note(&mut self, what: &str, text: &str) {
        let mut lines = text.lines().filter(|line| !line.trim().is_empty());
        if let Some(first) = lines.next() {
            self.notes.push(format!("{what}: {first}"));
            self.notes.extend(lines.map(|line| format!("  {line}")));
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width_of = |column: usize| {
            let cells =
                self.rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count());
            cells.chain([self.head[column].len()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.head.len()).map(width_of).collect();
        let mut line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut text = String::new();
            for (cell, width) in cells.zip(&widths) {
                let pad = width + GAP - cell.chars().count();
                text.push_str(cell);
                text.extend(std::iter::repeat_n(' ', pad));
            }
            writeln!(f, "{}", text.trim_end())
        };
        line(&mut self.head.iter().copied())?;
        self.rows.iter().try_for_each(|row| line(&mut row.iter().map(String::as_str)))?;
        self.notes.iter().try_for_each(|note| writeln!(f, "  {note}"))
    }
}

/// `shoal status`.
pub fn status(view: &ClusterView, presence: Option<&PresenceView>) -> String {
    let c = &view.coordinator;
    let mut out = format!(
        "coordinator {} (pid {}, shoal {})\n  public API  {}/v1\n  cluster     {}\n",
        c.id,
        c.pid,
        c.build,
        super::json::url(c.api, c.tls),
        c.cluster
    );
    if let Some(why) = presence.and_then(|presence| presence.no_majority.as_deref()) {
        out.push_str(&format!("  {why}; what is served goes on\n"));
    }
    out.push('\n');
    if view.coordinators.len() > 1 {
        out.push_str(&coordinators::table(view, presence).to_string());
        out.push('\n');
    }
    if view.workers.is_empty() {
        out.push_str(
            "no worker has joined; `shoal token create --role worker` makes a token for one\n",
        );
    } else {
        out.push_str(&workers(view).to_string());
    }
    out.push('\n');
    if view.deployments.is_empty() {
        out.push_str("nothing is deployed; `shoal deploy MODEL` serves a model\n");
        return out;
    }
    out.push_str(&deployments(view).to_string());
    let stages = stages(view, |_| true);
    if !stages.rows.is_empty() {
        out.push('\n');
        out.push_str(&stages.to_string());
    }
    out
}

fn workers(view: &ClusterView) -> Table {
    let mut table =
        Table::new(&["WORKER", "LINK", "PID", "ADDRESS", "DEVICE", "MEMORY", "THREADS", "SHARDS"]);
    // The cluster keeps every identity that it gave; who left for good is no row for ever.
    let (here, gone): (Vec<&WorkerView>, Vec<&WorkerView>) =
        view.workers.iter().partition(|worker| worker.connected || is_needed(view, worker.id));
    let names: Vec<String> = gone.iter().map(|worker| worker.id.to_string()).collect();
    if !names.is_empty() {
        table.note("not connected, and nothing is placed on them", &names.join(", "));
    }
    for worker in here {
        let device = worker.devices.first();
        let or_nothing = |text: Option<String>| text.unwrap_or_else(|| NOTHING.to_owned());
        table.row([
            worker.id.to_string(),
            link(worker).to_owned(),
            or_nothing((worker.pid != 0).then(|| worker.pid.to_string())),
            or_nothing(worker.address.map(|a| a.to_string())),
            or_nothing(device.map(|d| format!("{} ({})", d.name, d.description))),
            or_nothing(device.map(|d| d.memory.to_string())),
            or_nothing(device.map(|d| d.threads.to_string())),
            worker.shards.len().to_string(),
        ]);
    }
    table
}

fn link(worker: &WorkerView) -> &'static str {
    match (worker.connected, worker.draining) {
        (true, false) => "up",
        (true, true) => "draining",
        (false, false) => "down",
        (false, true) => "down, draining",
    }
}

fn deployments(view: &ClusterView) -> Table {
    let mut table = Table::new(&[
        "DEPLOYMENT",
        "PHASE",
        "REPLICAS",
        "MESH",
        "PRECISION",
        "NUMERICS",
        "GENERATION",
    ]);
    for deployment in &view.deployments {
        let replica = replicas(view, deployment).next();
        let of = |text: fn(&ReplicaPlan) -> String| replica.map_or(NOTHING.to_owned(), text);
        table.row([
            deployment.name.to_string(),
            phase(deployment.phase).to_owned(),
            serving(view, deployment),
            of(ReplicaPlan::mesh),
            of(|r| r.precision.to_string()),
            of(numerics),
            of(|r| r.generation.to_string()),
        ]);
        table.note(deployment.name.as_str(), &deployment.reason);
    }
    table
}

/// The contract, and what it does not promise.
fn numerics(replica: &ReplicaPlan) -> String {
    match replica.numerics.sums() {
        false => replica.numerics.to_string(),
        true => format!("{}, resume not exact", replica.numerics),
    }
}

/// `1/2`: replicas that take requests, of those that are wanted; and `2/2, both on w1` where the loss of one
/// worker takes several of them.
fn serving(view: &ClusterView, deployment: &DeploymentView) -> String {
    let serving = deployment.replicas.iter().filter(|replica| is_ready(replica)).count();
    let mut out = format!("{serving}/{}", deployment.replicas.len());
    // As many replicas at once, and the workers on which they are.
    let mut groups: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for Shared { worker, replicas } in shared(view, deployment) {
        groups.entry(replicas.len()).or_default().push(worker.to_string());
    }
    for (count, workers) in groups.into_iter().rev() {
        let how_many = match count {
            2 if serving == 2 => "both".to_owned(),
            _ if serving == count => "all".to_owned(),
            _ => count.to_string(),
        };
        out.push_str(&format!(", {how_many} on {}", workers.join(" and ")));
    }
    out
}

fn is_ready(replica: &ReplicaView) -> bool {
    replica.phase == DeploymentPhase::Ready
}

/// A worker whose loss takes several replicas of a deployment.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Shared {
    worker: NodeId,
    /// Those that take requests and have a layer there.
    replicas: Vec<ReplicaId>,
}

/// The workers that several replicas of a deployment share, of those that take requests.
pub fn shared(view: &ClusterView, deployment: &DeploymentView) -> Vec<Shared> {
    let ready =
        |id| deployment.replicas.iter().any(|replica| replica.id == id && is_ready(replica));
    let mut on: BTreeMap<NodeId, Vec<ReplicaId>> = BTreeMap::new();
    for replica in replicas(view, deployment).filter(|replica| ready(replica.id)) {
        let nodes: BTreeSet<NodeId> = replica.nodes().collect();
        nodes.into_iter().for_each(|node| on.entry(node).or_default().push(replica.id));
    }
    let several = on.into_iter().filter(|(_, replicas)| replicas.len() > 1);
    several.map(|(worker, replicas)| Shared { worker, replicas }).collect()
}

/// What a change would come to.
pub fn change(view: &ChangeView) -> String {
    let mut out = String::new();
    for (when, plans) in [("before", &view.before), ("after", &view.after)] {
        for plan in plans {
            let stages = plan.stages.iter().map(|stage| {
                let nodes: Vec<_> = stage.shards.iter().map(|s| s.node.to_string()).collect();
                format!("{} on {}", stage.layers, nodes.join("+"))
            });
            let stages: Vec<_> = stages.collect();
            out.push_str(&format!(
                "{when:<6}  {} of {}, {} {}: {}\n",
                plan.id,
                plan.deployment,
                plan.generation,
                plan.mesh(),
                stages.join(", ")
            ));
        }
    }
    if !out.is_empty() {
        out.push('\n');
    }
    for line in &view.explanation {
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Where each stage of the chosen deployments runs.
pub fn stages(view: &ClusterView, wanted: impl Fn(&DeploymentView) -> bool) -> Table {
    let mut table =
        Table::new(&["STAGE", "LAYERS", "WORKER", "PID", "STATE", "WEIGHTS", "KV", "STEPS", "OF"]);
    for deployment in view.deployments.iter().filter(|d| wanted(d)) {
        let nexts = deployment.replicas.iter().filter_map(|replica| replica.next.as_ref());
        let current = replicas(view, deployment).map(|replica| (replica, ""));
        for (replica, which) in current.chain(nexts.map(|next| (next, " next"))) {
            for (index, stage) in replica.stages.iter().enumerate() {
                for shard in &stage.shards {
                    let report = report_of(view, replica, StageIndex(index as u32), shard);
                    let worker = view.workers.iter().find(|w| w.id == shard.node);
                    table.row([
                        format!("{index}.{}", shard.rank.0),
                        stage.layers.to_string(),
                        shard.node.to_string(),
                        worker.map_or(NOTHING.to_owned(), |w| w.pid.to_string()),
                        report.map_or("absent".to_owned(), |r| state(&r.state)),
                        shard.memory.weights.to_string(),
                        shard.memory.kv.to_string(),
                        report.map_or(NOTHING.to_owned(), |r| r.counters.steps.to_string()),
                        format!("{} {}{which}", deployment.name, replica.id),
                    ]);
                    if let Some(ShardState::Failed(error)) = report.map(|r| &r.state) {
                        table.note(&format!("{} on {}", replica.id, shard.node), &error.message);
                    }
                }
            }
        }
    }
    table
}

/// `shoal plan NAME`, with the arithmetic where `explain` is set.
pub fn plan(view: &PlanView, explain: bool) -> String {
    let mut out = String::new();
    for replica in &view.replicas {
        let limits = &replica.limits;
        out.push_str(&format!(
            "{} of {}: mesh {}, generation {}, {} weights, numerics {}\n",
            replica.id,
            replica.deployment,
            replica.mesh(),
            replica.generation.0,
            replica.precision,
            numerics(replica)
        ));
        out.push_str(&format!(
            "  context {} tokens, {} KV blocks, at most {} sequences, {} rows a step, {} steps in flight\n\n",
            limits.context_max,
            limits.kv_blocks,
            limits.sequences_max,
            limits.step_rows_max,
            limits.steps_in_flight_max
        ));
        let mut table = Table::new(&[
            "STAGE",
            "LAYERS",
            "WORKER",
            "DEVICE",
            "WEIGHTS",
            "KV",
            "ACTIVATIONS",
            "TOTAL",
        ]);
        for (index, stage) in replica.stages.iter().enumerate() {
            for shard in &stage.shards {
                table.row([
                    format!("{index}.{}", shard.rank.0),
                    stage.layers.to_string(),
                    shard.node.to_string(),
                    shard.device.clone(),
                    shard.memory.weights.to_string(),
                    shard.memory.kv.to_string(),
                    shard.memory.activations.to_string(),
                    shard.memory.total().to_string(),
                ]);
            }
        }
        out.push_str(&table.to_string());
    }
    if view.replicas.is_empty() {
        out.push_str("there is no plan yet\n");
    }
    // Without a plan the explanation is the only thing that can be shown.
    if explain || view.replicas.is_empty() {
        out.push('\n');
        for line in &view.explanation {
            out.push_str(line.trim_end());
            out.push('\n');
        }
    }
    out
}

/// The replicas of a deployment, in plan order.
pub fn replicas<'a>(
    view: &'a ClusterView,
    deployment: &'a DeploymentView,
) -> impl Iterator<Item = &'a ReplicaPlan> {
    view.plan.replicas.iter().filter(|r| r.deployment == deployment.name)
}

/// Whether a stage of any plan is on a worker.
fn is_needed(view: &ClusterView, node: NodeId) -> bool {
    let stages = view.plan.replicas.iter().flat_map(|replica| &replica.stages);
    stages.flat_map(|stage| &stage.shards).any(|shard| shard.node == node)
}

/// What a worker says of one shard of a replica's current layout.
pub fn report_of<'a>(
    view: &'a ClusterView,
    replica: &ReplicaPlan,
    stage: StageIndex,
    shard: &ShardPlan,
) -> Option<&'a ShardReport> {
    let node: NodeId = shard.node;
    let worker = view.workers.iter().find(|w| w.id == node && w.connected)?;
    worker
        .shards
        .iter()
        .find(|r| r.replica == replica.id && r.generation == replica.generation && r.stage == stage)
}

fn phase(phase: DeploymentPhase) -> &'static str {
    match phase {
        DeploymentPhase::Waiting => "waiting",
        DeploymentPhase::Loading => "loading",
        DeploymentPhase::Ready => "ready",
        DeploymentPhase::Failed => "failed",
    }
}

fn state(state: &ShardState) -> String {
    match state {
        ShardState::Loading { done, total } => format!("loading {}", percent(done.0, total.0)),
        ShardState::Linking => "linking".to_owned(),
        ShardState::Ready => "ready".to_owned(),
        ShardState::Draining => "draining".to_owned(),
        ShardState::Failed(_) => "failed".to_owned(),
    }
}

/// `done` of `total` in whole percent; all of nothing is 100 %.
pub fn percent(done: u64, total: u64) -> String {
    let percent = match total {
        0 => 100,
        _ => (u128::from(done.min(total)) * 100 / u128::from(total)) as u64,
    };
    format!("{percent} %")
}
