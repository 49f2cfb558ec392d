//! How a replica is: the observations about its current layout, boiled down to what follows.

use std::time::Duration;

use shoal_protocol::control::{ShardReport, ShardState};
use shoal_protocol::error::{ErrorCode, Fault, WireError};
use shoal_protocol::id::NodeId;
use shoal_protocol::plan::ReplicaPlan;
use shoal_protocol::units::{Bytes, Instant};

use super::words::place_of;
use super::{LINK_SETTLE, LINK_SETTLE_LOOK, Observed, RECONNECT_GRACE, Watched, pairs, patience};

/// How a replica is.
#[derive(Debug)]
pub(super) enum Health {
    /// Every shard takes steps.
    Ready {
        /// Where.
        reason: String,
    },
    /// Nothing is wrong; it takes time.
    Loading {
        /// When it will have taken too long.
        until: Option<Instant>,
        /// What is still missing.
        reason: String,
    },
    /// Something is wrong that may explain or mend itself until then.
    Awaiting {
        /// When to look again.
        until: Instant,
        /// What is wrong.
        reason: String,
    },
    /// It needs a new layout. The reason is empty where it has had none.
    NeedsPlan {
        /// Why.
        reason: String,
        /// The workers that it failed at, where that says something about them.
        blame: Vec<NodeId>,
    },
    /// No layout would help.
    Hopeless {
        /// The worker's words.
        reason: String,
        /// The worker whose copy of the model it is, where others' may be good.
        files_at: Option<NodeId>,
    },
}

/// Looks at the layout's workers first, since a shard that failed because a worker died is no news,
/// then at what the shards say. Remembers what it saw in `history`.
pub(super) fn of(plan: Option<&ReplicaPlan>, observed: &Observed, watched: &mut Watched) -> Health {
    let Some(plan) = plan else { return needs_plan(String::new()) };
    let now = observed.now;
    if watched.generation != plan.generation {
        *watched = Watched { generation: plan.generation, ..Watched::default() };
    }
    if let Some(health) = of_workers(plan, observed, watched) {
        watched.ready_since = None;
        watched.standing.clear();
        return health;
    }
    let shards = current_shards(plan, observed);
    if let Some((node, error)) = failed(&shards) {
        watched.ready_since = None;
        let silence = |node| observed.workers.get(&node).map(|worker| worker.silent_for);
        let silence = plan.nodes().filter_map(silence).max().unwrap_or_default();
        let health = of_failure(node, error, silence, now, watched);
        let heard = watched.unlinked_since.is_some_and(|since| silence < now.since(since));
        if heard && matches!(health, Health::NeedsPlan { .. }) {
            watched.apart = pairs::silent(&shards);
        }
        return health;
    }
    watched.unlinked_since = None;
    if observed.follows {
        // Nobody was told anything from here, so nothing is overdue here either: whoever becomes the
        // leader gives everybody the whole time.
        watched.standing.clear();
    }
    let outlook = patience::look(&shards, now, &mut watched.standing);
    if outlook.missing.is_empty() {
        watched.ready_since.get_or_insert(now);
        return Health::Ready { reason: format!("{} {}", plan.generation, place_of(plan)) };
    }
    watched.ready_since = None;
    if !outlook.overdue.is_empty() {
        let misses = |one, other| {
            let worker = observed.workers.get(&one);
            worker.is_some_and(|worker| worker.facts.missing.contains(&other))
        };
        watched.apart = pairs::unlinked(plan, &shards, misses);
        let (blame, words): (_, Vec<_>) = outlook.overdue.into_iter().unzip();
        return Health::NeedsPlan { reason: words.join(", "), blame };
    }
    let reason = format!("{}: {}", plan.generation, outlook.missing.join(", "));
    Health::Loading { until: outlook.until, reason }
}

/// It needs a new layout, and no worker is to blame.
pub(super) fn needs_plan(reason: String) -> Health {
    Health::NeedsPlan { reason, blame: Vec::new() }
}

/// Whether every shard of a layout takes steps, as far as was heard.
pub(super) fn is_up(plan: &ReplicaPlan, observed: &Observed) -> bool {
    let connected = |node| observed.workers.get(&node).is_some_and(|worker| worker.connected);
    let ready = |(node, shard): Shard<'_>| connected(node) && progress(node, shard).is_none();
    current_shards(plan, observed).into_iter().all(ready)
}

/// What is wrong with the workers of a layout; `None` where all are there as they were.
fn of_workers(plan: &ReplicaPlan, observed: &Observed, history: &mut Watched) -> Option<Health> {
    let mut unheard = Vec::new();
    let mut changed = Vec::new();
    // All of them at once: it is this coordinator that was not there for a while. Whoever comes back
    // first must not get everything.
    let connected = |node| observed.workers.get(&node).is_some_and(|worker| worker.connected);
    if !plan.nodes().any(connected) && plan.nodes().all(|node| observed.workers.contains_key(&node))
    {
        history.alone_since.get_or_insert(observed.now);
    }
    let alone = history.alone_since.map(|since| since + RECONNECT_GRACE);
    let alone = alone.filter(|until| observed.now < *until);
    for node in plan.nodes() {
        match observed.workers.get(&node) {
            None => unheard.push(node.to_string()),
            Some(worker) if !worker.connected && alone.is_some() => unheard.push(node.to_string()),
            Some(worker) if !worker.connected => changed.push(format!("{node} was lost")),
            Some(worker) => {
                let now = worker.register.incarnation;
                let then = *history.incarnations.entry(node).or_insert(now);
                if then == now {
                    continue;
                }
                // A leader that had not seen it before its new start has told it the same layout
                // again: whoever follows must not wait for another one for ever.
                let taken = |shard: &ShardReport| {
                    (shard.replica, shard.generation) == (plan.id, plan.generation)
                };
                if observed.follows && worker.report.shards.iter().any(taken) {
                    history.incarnations.insert(node, now);
                } else {
                    changed.push(format!("{node} was started again"));
                }
            }
        }
    }
    if !changed.is_empty() {
        return Some(needs_plan(changed.join(", ")));
    }
    if unheard.is_empty() {
        history.alone_since = None;
        return None;
    }
    if let Some(until) = alone {
        let reason = format!(
            "no worker of it is connected; this coordinator waits a moment for {}",
            unheard.join(", ")
        );
        return Some(Health::Awaiting { until, reason });
    }
    let until = observed.since + RECONNECT_GRACE;
    if observed.now < until {
        let reason =
            format!("this coordinator has just started and waits for {}", unheard.join(", "));
        return Some(Health::Awaiting { until, reason });
    }
    let reason = format!("{} did not come back", unheard.join(", "));
    Some(needs_plan(reason))
}

/// `silence`: how long ago the last one of the layout's workers was heard.
fn of_failure(
    node: NodeId,
    error: &WireError,
    silence: Duration,
    now: Instant,
    history: &mut Watched,
) -> Health {
    let reason = format!("{node}: {error}");
    if cannot_be_mended(error) {
        let files_at = (error.code == ErrorCode::BadModel).then_some(node);
        return Health::Hopeless { reason, files_at };
    }
    if error.code == ErrorCode::WorkerLost {
        let since = *history.unlinked_since.get_or_insert(now);
        let all_heard = silence < now.since(since);
        if !all_heard && now < since + LINK_SETTLE {
            // That somebody was heard is no event.
            return Health::Awaiting { until: now + LINK_SETTLE_LOOK, reason };
        }
        if all_heard {
            let reason =
                format!("{reason}; all its workers were heard since, so it is a link or a shard");
            return needs_plan(reason);
        }
    }
    // A link has two ends, and a number that is used up says nothing about the worker.
    let innocent = matches!(error.code, ErrorCode::WorkerLost | ErrorCode::StaleGeneration);
    Health::NeedsPlan { reason, blame: if innocent { Vec::new() } else { vec![node] } }
}

/// Whether the same layout would fail again: the model or the request is wrong, not the cluster.
fn cannot_be_mended(error: &WireError) -> bool {
    error.code == ErrorCode::VersionMismatch
        || (error.code.fault() == Fault::Caller && error.code != ErrorCode::Cancelled)
}

pub(super) type Shard<'a> = (NodeId, Option<&'a ShardReport>);

/// What each worker of a layout says of its shard in this generation, in stage order. A worker that
/// refuses it names the newest generation that it knows instead.
pub(super) fn current_shards<'a>(plan: &ReplicaPlan, observed: &'a Observed) -> Vec<Shard<'a>> {
    let report = |node: NodeId| {
        let worker = observed.workers.get(&node)?;
        let mut shards = worker.report.shards.iter().filter(|shard| shard.replica == plan.id);
        shards.find(|shard| shard.generation == plan.generation || refuses(shard, plan))
    };
    plan.nodes().map(|node| (node, report(node))).collect()
}

/// Whether a worker was told this layout and knows that its number is used up. What it refused before
/// it was told this one is no news.
fn refuses(shard: &ShardReport, plan: &ReplicaPlan) -> bool {
    let stale = |error: &WireError| error.code == ErrorCode::StaleGeneration;
    shard.generation >= plan.generation
        && matches!(&shard.state, ShardState::Failed(error) if stale(error))
}

/// The failure that says most: one that cannot be mended before one that can, a cause before a link
/// that was lost in its wake.
fn failed<'a>(shards: &[Shard<'a>]) -> Option<(NodeId, &'a WireError)> {
    let failures = shards.iter().filter_map(|(node, shard)| match &shard.as_ref()?.state {
        ShardState::Failed(error) => Some((*node, error)),
        _ => None,
    });
    failures
        .min_by_key(|(_, error)| (!cannot_be_mended(error), error.code == ErrorCode::WorkerLost))
}

/// What a shard still lacks; `None` where it takes steps.
pub(super) fn progress(node: NodeId, shard: Option<&ShardReport>) -> Option<String> {
    match shard.map(|shard| &shard.state) {
        None => Some(format!("{node} is told")),
        Some(ShardState::Loading { total: Bytes(0), .. }) => Some(format!("{node} loads")),
        Some(ShardState::Loading { done, total }) => {
            let percent = done.0.saturating_mul(100) / total.0;
            Some(format!("{node} has loaded {percent} % of {total}"))
        }
        Some(ShardState::Linking) => Some(format!("{node} links")),
        Some(ShardState::Draining) => Some(format!("{node} drains")),
        // `failed` has looked at it before.
        Some(ShardState::Failed(error)) => Some(format!("{node} failed: {error}")),
        Some(ShardState::Ready) => None,
    }
}
