//! What is known of the way between two workers, from whom, and what the planner counts with: for `--explain`.

use std::collections::BTreeMap;
use std::fmt;

use shoal_protocol::id::NodeId;
use shoal_protocol::plan::ReplicaPlan;

use super::{Inventory, Link, pair};

/// The most ways of a layout that are shown one by one.
const SHOWN_MAX: usize = 16;

/// Where a figure comes from, the better the later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// Their round trips to this coordinator differ by twice as much.
    Control,
    /// A shard's link to the next stage.
    Shard,
    /// A worker, of its links.
    Worker,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Control => "at least, by their round trips to the coordinator",
            Source::Shard => "by a shard's round trips",
            Source::Worker => "by round trips of the workers' links",
        })
    }
}

/// What was measured of one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Seen {
    /// One way, in nanoseconds.
    pub latency: Option<(Source, u64)>,
    /// Of large transfers between them, in either direction.
    pub bytes_per_s: Option<u64>,
    /// Both are on one machine: they are near, whatever was measured while it was busy.
    pub one_machine: bool,
}

/// What was measured of which ways, the lower number first.
pub type SeenWays = BTreeMap<(NodeId, NodeId), Seen>;

impl Seen {
    /// Of two sources the better one counts; of one source the least, since a busy machine only makes a way
    /// seem longer. What follows from the control links is the least that it can be: there the most counts.
    pub fn latency(&mut self, source: Source, ns: u64) {
        self.latency = Some(match self.latency {
            Some((before, known)) if before > source => (before, known),
            Some((before, known)) if before == source => match source {
                Source::Control => (source, known.max(ns)),
                Source::Shard | Source::Worker => (source, known.min(ns)),
            },
            _ => (source, ns),
        });
    }

    /// Of two ends whoever saw more.
    pub fn bandwidth(&mut self, bytes_per_s: u64) {
        self.bytes_per_s = self.bytes_per_s.max(Some(bytes_per_s));
    }
}

fn ms(ns: u64) -> String {
    format!("{:.3} ms", ns as f64 / 1e6)
}

fn mb(bytes_per_s: u64) -> String {
    format!("{} MB/s", bytes_per_s / 1_000_000)
}

/// A way in words: `w1-w2: 0.061 ms one way (…), 812 MB/s (…); counts as …`.
fn line(pair: (NodeId, NodeId), seen: Seen, counts: Link) -> String {
    let latency = match seen.latency {
        Some((source, ns)) => format!("{} one way ({source})", ms(ns)),
        None => "nobody has measured how long it is".to_owned(),
    };
    let bandwidth = match seen.bytes_per_s {
        Some(bytes) => format!("{} (by large transfers)", mb(bytes)),
        None => "nothing large has been sent over it".to_owned(),
    };
    let one = match seen.one_machine {
        true if counts == Link::BESIDE => ", as ranks on one machine",
        true => ", as both are on one machine",
        false => "",
    };
    format!(
        "way {}-{}: {latency}; {bandwidth}; counts as {} and {}{one}",
        pair.0,
        pair.1,
        ms(counts.latency_ns),
        mb(counts.bytes_per_s),
    )
}

/// Whether these two are ranks of one stage.
fn of_ranks(plan: &ReplicaPlan, pair: (NodeId, NodeId)) -> bool {
    plan.stages.iter().any(|stage| {
        let has = |node| stage.shards.iter().any(|shard| shard.node == node);
        has(pair.0) && has(pair.1)
    })
}

/// The ways that a layout uses, a line each.
pub(super) fn lines(plan: &ReplicaPlan, inventory: &Inventory) -> Vec<String> {
    let mut used = Vec::new();
    let mut note = |a: NodeId, b: NodeId| {
        if a != b && !used.contains(&pair(a, b)) {
            used.push(pair(a, b));
        }
    };
    let heads: Vec<NodeId> =
        plan.stages.iter().filter_map(|stage| Some(stage.shards.first()?.node)).collect();
    for (from, to) in heads.iter().zip(heads.iter().cycle().skip(1)) {
        note(*from, *to);
    }
    for stage in &plan.stages {
        for (index, a) in stage.shards.iter().enumerate() {
            stage.shards[..index].iter().for_each(|b| note(b.node, a.node));
        }
    }
    let find = |node| inventory.workers.iter().find(|worker| worker.node == node);
    let mut lines: Vec<String> = used
        .iter()
        .take(SHOWN_MAX)
        .filter_map(|pair| {
            let ends = [find(pair.0)?, find(pair.1)?];
            let link = inventory.link(ends[0], ends[1]);
            let counts = if of_ranks(plan, *pair) { link.of_ranks(&ends) } else { link };
            let seen = inventory.seen.get(pair).copied().unwrap_or_default();
            Some(line(*pair, seen, counts))
        })
        .collect();
    if used.len() > SHOWN_MAX {
        lines.push(format!("and {} ways more", used.len() - SHOWN_MAX));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_better_source_counts_and_is_named() {
        let mut seen = Seen::default();
        seen.latency(Source::Control, 2_000_000);
        seen.latency(Source::Control, 1_000_000);
        assert_eq!(seen.latency, Some((Source::Control, 2_000_000)));
        seen.latency(Source::Worker, 700_000);
        seen.latency(Source::Worker, 600_000);
        seen.latency(Source::Shard, 100_000);
        seen.bandwidth(90_000_000);
        seen.bandwidth(80_000_000);
        let pair = (NodeId::worker(1), NodeId::worker(2));
        let counts = Link { latency_ns: 512_000, bytes_per_s: 67_108_864 };
        assert_eq!(
            line(pair, seen, counts),
            "way w1-w2: 0.600 ms one way (by round trips of the workers' links); 90 MB/s (by large transfers); \
             counts as 0.512 ms and 67 MB/s"
        );
        let unknown = Seen { one_machine: true, ..Seen::default() };
        let words = line(pair, unknown, Link::NEAR);
        assert!(words.ends_with("counts as 0.100 ms and 1000 MB/s, as both are on one machine"));
    }
}
