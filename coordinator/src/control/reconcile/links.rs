//! What is known of the ways between workers, for the planner: measured where it can be, rounded so that a
//! round that measures a little more or less plans the same.
//!
//! | known from | what |
//! |---|---|
//! | the control links of two workers | one cannot be nearer to the other than their round trips to this coordinator differ |
//! | a shard's link to the next stage | its smoothed round trip, halved, once it has sent something |
//! | `Fact::Link` | what a worker says of its links: the least round trip of the last few, and the bytes in a second of the fastest of the last few large transfers |
//!
//! The last one that says anything counts, and of several that say the same kind of thing the least: a busy
//! machine only makes a way seem longer. Workers with one address are on one machine: near, whatever was
//! measured while it was busy. What none of these says is left to the planner: near, or far between two zones.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use shoal_protocol::id::NodeId;
use shoal_protocol::plan::ReplicaPlan;

use super::super::planner::{Candidate, Link, Links, Seen, SeenWays, Source, pair};
use super::super::state::ClusterState;
use super::Observed;

/// The longest way that is believed: beyond it a number is a mistake, or a link that is being lost.
const LATENCY_MAX: Duration = Duration::from_secs(10);

/// All ways that are known to be longer than inside a place, and what was measured of any.
pub(super) fn links(
    target: &ClusterState,
    observed: &Observed,
    workers: &[Candidate],
) -> (Links, SeenWays) {
    let seen = seen(target, observed, workers);
    let by_node: BTreeMap<_, _> = workers.iter().map(|worker| (worker.node, worker)).collect();
    let links = seen.iter().filter_map(|(pair, seen)| {
        // On one machine a long round trip says that it is busy.
        let (Some(one), Some(other), false) =
            (by_node.get(&pair.0), by_node.get(&pair.1), seen.one_machine)
        else {
            return None;
        };
        // What is known of a latency or a bandwidth counts; else it follows from the zones.
        let usual = match (&one.zone, &other.zone) {
            (Some(one), Some(other)) if one != other => Link::FAR,
            _ => Link::NEAR,
        };
        let (source, ns) = seen.latency?;
        // The least that it can be says nothing of a way that is taken to be longer.
        let usual_ns = usual.latency_ns;
        let latency_ns = match source {
            Source::Control => rounded(ns).max(usual_ns),
            Source::Shard | Source::Worker => rounded(ns).max(Link::NEAR.latency_ns),
        };
        let bytes_per_s = seen.bytes_per_s.map_or(usual.bytes_per_s, power_of_two);
        let link = Link { latency_ns, bytes_per_s };
        (link != usual).then_some((*pair, link))
    });
    (links.collect(), seen)
}

/// What was measured of the ways between these workers, and by whom.
fn seen(target: &ClusterState, observed: &Observed, workers: &[Candidate]) -> SeenWays {
    let mut ways = SeenWays::new();
    let known: BTreeSet<_> = workers.iter().map(|worker| worker.node).collect();
    let host = |node| observed.workers.get(&node).map(|w| w.register.activations.ip());
    let mut note = |a: NodeId, b: NodeId, note: &dyn Fn(&mut Seen)| {
        if a != b && known.contains(&a) && known.contains(&b) {
            let seen = ways.entry(pair(a, b)).or_insert_with(|| Seen {
                one_machine: host(a).is_some() && host(a) == host(b),
                ..Seen::default()
            });
            note(seen);
        }
    };
    for (index, a) in workers.iter().enumerate() {
        for b in &workers[..index] {
            let rtt = |node| observed.workers.get(&node).and_then(|worker| worker.rtt);
            if let (Some(one), Some(other)) = (rtt(a.node), rtt(b.node)) {
                let least = ns(one.abs_diff(other) / 2);
                note(a.node, b.node, &|seen| seen.latency(Source::Control, least));
            }
        }
    }
    for plan in target.plans.iter() {
        for (from, to, rtt) in hops(plan, observed) {
            note(from, to, &|seen| seen.latency(Source::Shard, ns(rtt / 2)));
        }
    }
    for (node, worker) in &observed.workers {
        for (to, (latency_us, bytes_per_s)) in &worker.facts.links {
            note(*node, *to, &|seen| {
                let latency = Duration::from_micros(u64::from(*latency_us));
                seen.latency(Source::Worker, ns(latency));
                bytes_per_s.iter().for_each(|bytes| seen.bandwidth(*bytes));
            });
        }
    }
    ways
}

fn ns(duration: Duration) -> u64 {
    duration.min(LATENCY_MAX).as_nanos() as u64
}

/// The round trips that the shards of a layout report, from each stage to the next.
fn hops(plan: &ReplicaPlan, observed: &Observed) -> Vec<(NodeId, NodeId, Duration)> {
    let nodes: Vec<NodeId> =
        plan.stages.iter().filter_map(|stage| Some(stage.shards.first()?.node)).collect();
    let next = nodes.iter().skip(1).chain(nodes.first());
    let hops = nodes.iter().zip(next).filter_map(|(from, to)| {
        let worker = observed.workers.get(from)?;
        let mut shards = worker.report.shards.iter();
        let shard = shards.find(|s| s.replica == plan.id && s.generation == plan.generation)?;
        // Before anything was sent, the transport says what it begins with.
        let sent = shard.counters.sent_frames > 0 && shard.counters.link_rtt_us > 0;
        sent.then(|| (*from, *to, Duration::from_micros(shard.counters.link_rtt_us)))
    });
    hops.collect()
}

/// A power of two of microseconds, or 0 for what is near: so fine is no way known, and so the planner is
/// not asked again for a microsecond.
fn rounded(latency_ns: u64) -> u64 {
    let ns = power_of_two((latency_ns / 1000).max(1)).saturating_mul(1000);
    if ns <= Link::NEAR_MAX_NS { 0 } else { ns }
}

/// The nearest one: 3/4 of the next one and more are rounded up, less is rounded down.
fn power_of_two(value: u64) -> u64 {
    let above = value.max(1).checked_next_power_of_two().unwrap_or(1 << 63);
    if value / 3 >= above / 4 || value == above { above } else { above / 2 }
}

#[cfg(test)]
mod tests {
    use shoal_protocol::id::DeploymentName;
    use shoal_protocol::mesh::{MeshAsk, MeshAsked};
    use shoal_protocol::units::Bytes;

    use super::super::world_test::World;
    use super::super::{Question, inventory};
    use super::*;

    #[test]
    fn what_workers_measured_of_their_ways_is_planned_with() {
        let mut world = World::empty(4, Bytes::mib(420));
        // The first three are on machines of their own.
        for number in 1..=4_u8 {
            let host = number.min(3);
            let address = ([10, 0, 0, host], 4000 + u16::from(number)).into();
            world.worker(u32::from(number)).register.activations = address;
        }
        let w = NodeId::worker;
        // Both ends say something: the least round trip and the fastest transfer count.
        world.worker(1).facts.links.insert(w(2), (2100, Some(60_000_000)));
        world.worker(2).facts.links.insert(w(1), (2900, Some(70_000_000)));
        world.worker(1).facts.links.insert(w(3), (90, None));
        world.worker(3).facts.links.insert(w(4), (5000, Some(1_000_000)));
        let name = DeploymentName::new("m").unwrap();
        let found = inventory(&world.state, &world.observed, &name);
        let slow = Link { latency_ns: 2_048_000, bytes_per_s: 1 << 26 };
        assert_eq!(found.links.into_iter().collect::<Vec<_>>(), [((w(1), w(2)), slow)]);
        let seen = |a, b| found.seen[&(w(a), w(b))];
        assert_eq!(seen(1, 2).latency, Some((Source::Worker, 2_100_000)));
        assert_eq!(seen(1, 2).bytes_per_s, Some(70_000_000));
        assert_eq!(seen(1, 3).latency, Some((Source::Worker, 90_000)));
        assert!(seen(3, 4).one_machine, "near, whatever was measured while it was busy");
    }

    #[test]
    fn a_round_trip_that_is_a_little_longer_is_no_other_question() {
        let mut world = World::empty(2, Bytes::mib(420));
        let name = DeploymentName::new("m").unwrap();
        for (number, us) in [(1, 200), (2, 900)] {
            world.worker(number).rtt = Some(Duration::from_micros(us));
        }
        let before = inventory(&world.state, &world.observed, &name);
        world.worker(2).rtt = Some(Duration::from_micros(907));
        let after = inventory(&world.state, &world.observed, &name);
        assert_ne!(before.seen, after.seen);
        let measured = MeshAsk { mesh: Some(MeshAsked::Auto), ..MeshAsk::default() };
        for ask in [MeshAsk::default(), measured] {
            assert_eq!(Question::new(1, ask, &before), Question::new(1, ask, &after));
        }
    }

    #[test]
    fn what_is_near_is_near_and_the_rest_is_rounded() {
        let check = |us: u64, expected_us: u64| {
            let ns = ns(Duration::from_micros(us));
            assert_eq!(rounded(ns), expected_us * 1000, "{us} µs");
        };
        for us in [0, 1, 50, 128, 170, 300] {
            check(us, 0);
        }
        check(400, 512);
        check(1000, 1024);
        check(1100, 1024);
        check(10_000, 8192);
        check(13_000, 16_384);
        check(3_600_000_000, 8_388_608);
    }
}
