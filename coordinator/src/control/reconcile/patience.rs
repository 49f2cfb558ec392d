//! How long a shard may stand still on its way from being told to taking steps.
//!
//! ```text
//! told ─ TOLD ─► loading ─ LOADING, again with each piece ─► linking ─ LINKING, once all have loaded ─► ready
//! ```
//!
//! A large model may load for an hour, so what is bounded is the time without progress. What is
//! overdue ends the generation: the next one takes over what was loaded, and whoever looks at the
//! deployment reads which worker it was and in which phase.

use std::collections::BTreeMap;
use std::time::Duration;

use shoal_protocol::control::{ShardReport, ShardState};
use shoal_protocol::id::NodeId;
use shoal_protocol::units::{Bytes, Instant};

use super::health::progress;

/// From being told to the first word about it. A worker's agent answers at once and never waits for
/// its shards; this is several control links that break and come back.
pub const TOLD: Duration = Duration::from_secs(10);

/// Without one more byte, or while a shard of the generation before is let go. A step that runs there
/// ends within a minute; a network file system that has not delivered anything for twice as long
/// will not.
pub const LOADING: Duration = Duration::from_secs(120);

/// From the moment at which all weights are there. A dial that times out fits in (2 s to connect, 2 s for
/// its hello), and one behind it that does not. Streams wait for it: of two workers that do not reach each
/// other it is all their stall.
pub const LINKING: Duration = Duration::from_secs(8);

/// Where a shard stands, and since when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    step: Step,
    since: Instant,
}

/// A step that is another than the last one is progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Told,
    Loading(Bytes),
    /// It could link, and others still load.
    Loaded,
    Linking,
    Draining,
}

/// What the shards that are not ready come to.
#[derive(Debug, Default)]
pub(super) struct Outlook {
    /// What is missing, in stage order; empty where all take steps.
    pub missing: Vec<String>,
    /// Where it has taken too long, in words.
    pub overdue: Vec<(NodeId, String)>,
    /// When the next one of them will have taken too long.
    pub until: Option<Instant>,
}

/// Looks at all shards of a layout, none of which has failed.
pub(super) fn look(
    shards: &[(NodeId, Option<&ShardReport>)],
    now: Instant,
    standing: &mut BTreeMap<NodeId, Standing>,
) -> Outlook {
    let state = |shard: &Option<&ShardReport>| shard.map(|shard| shard.state.clone());
    let all_loaded = shards
        .iter()
        .all(|(_, shard)| matches!(state(shard), Some(ShardState::Linking | ShardState::Ready)));
    let mut outlook = Outlook::default();
    for (node, shard) in shards {
        let Some(words) = progress(*node, *shard) else {
            standing.remove(node);
            continue;
        };
        outlook.missing.push(words);
        let step = match state(shard) {
            None => Step::Told,
            Some(ShardState::Loading { done, .. }) => Step::Loading(done),
            Some(ShardState::Linking) if !all_loaded => Step::Loaded,
            Some(ShardState::Draining) => Step::Draining,
            Some(ShardState::Linking | ShardState::Ready | ShardState::Failed(_)) => Step::Linking,
        };
        let here = standing.entry(*node).or_insert(Standing { step, since: now });
        if here.step != step {
            *here = Standing { step, since: now };
        }
        let Some(limit) = step.limit() else { continue };
        let until = here.since + limit;
        if now >= until {
            let words = format!("{node} {} for {:.0?}", step.words(), now.since(here.since));
            outlook.overdue.push((*node, words));
        } else if outlook.until.is_none_or(|other| until < other) {
            outlook.until = Some(until);
        }
    }
    outlook
}

impl Step {
    /// How long it may take; `None` where it waits for others, who have limits of their own.
    fn limit(self) -> Option<Duration> {
        match self {
            Step::Told => Some(TOLD),
            Step::Loading(_) | Step::Draining => Some(LOADING),
            Step::Loaded => None,
            Step::Linking => Some(LINKING),
        }
    }

    /// What goes between a worker and a length of time.
    fn words(self) -> String {
        match self {
            Step::Told => "was told its shard and has not begun to load it".to_owned(),
            Step::Loading(done) => format!("has loaded {done} and nothing more"),
            Step::Loaded => "waits for others to load".to_owned(),
            Step::Linking => "has loaded its shard and has not linked it".to_owned(),
            Step::Draining => "has been letting the shard go that was there before".to_owned(),
        }
    }
}
