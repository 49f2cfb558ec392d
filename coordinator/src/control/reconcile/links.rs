//! What is known of the ways between workers, for the planner: measured where it can be, rounded so that a
//! round that measures a little more or less plans the same.
//!
//! | known from | what |
//! |---|---|
//! | `Fact::Link` | what a worker says itself |
//! | a shard's link to the next stage | its smoothed round trip, halved, once it has sent something |
//! | the control links of two workers | one cannot be nearer to the other than their round trips to this coordinator differ |
//!
//! Workers with one address are on one machine: near, whatever was measured while it was busy. What none of
//! these says is left to the planner: near, or far between two zones.

use std::time::Duration;

use shoal_protocol::id::NodeId;
use shoal_protocol::plan::ReplicaPlan;

use super::super::planner::{Candidate, Link, Links, pair};
use super::super::state::ClusterState;
use super::Observed;

/// The longest way that is believed: beyond it a number is a mistake, or a link that is being lost.
const LATENCY_MAX: Duration = Duration::from_secs(10);

/// All ways that are known to be longer than inside a place.
pub(super) fn links(target: &ClusterState, observed: &Observed, workers: &[Candidate]) -> Links {
    let mut links = Links::new();
    // On one machine a long round trip says that it is busy.
    let host = |node| observed.workers.get(&node).map(|w| w.register.activations.ip());
    let mut note = |a: NodeId, b: NodeId, latency: Duration, bytes_per_s: Option<u64>| {
        let known = |node| workers.iter().find(|worker| worker.node == node);
        let (Some(one), Some(other)) = (known(a), known(b)) else { return };
        if host(a).is_some() && host(a) == host(b) {
            return;
        }
        let latency_ns = rounded(latency);
        // What is said of a bandwidth counts; else it follows from the zones.
        let usual = match (&one.zone, &other.zone) {
            (Some(one), Some(other)) if one != other => Link::FAR,
            _ => Link::NEAR,
        };
        let bytes_per_s = bytes_per_s.unwrap_or(usual.bytes_per_s);
        if a == b || (latency_ns <= usual.latency_ns && bytes_per_s >= usual.bytes_per_s) {
            return;
        }
        let link = Link { latency_ns: latency_ns.max(Link::NEAR.latency_ns), bytes_per_s };
        links.insert(pair(a, b), link);
    };
    for (index, a) in workers.iter().enumerate() {
        for b in &workers[..index] {
            let rtt = |node| observed.workers.get(&node).and_then(|worker| worker.rtt);
            if let (Some(one), Some(other)) = (rtt(a.node), rtt(b.node)) {
                note(a.node, b.node, one.abs_diff(other) / 2, None);
            }
        }
    }
    for plan in target.plans.iter() {
        for (from, to, rtt) in hops(plan, observed) {
            note(from, to, rtt / 2, None);
        }
    }
    for (node, worker) in &observed.workers {
        for (to, (latency_us, bytes_per_s)) in &worker.facts.links {
            note(*node, *to, Duration::from_micros(u64::from(*latency_us)), *bytes_per_s);
        }
    }
    links
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
fn rounded(latency: Duration) -> u64 {
    let us = latency.min(LATENCY_MAX).as_micros() as u64;
    let ns = us.max(1).next_power_of_two().saturating_mul(1000);
    // 3/4 of a power of two and more are rounded up, less is rounded down.
    let ns = if us.saturating_mul(4) >= (ns / 1000).saturating_mul(3) { ns } else { ns / 2 };
    if ns <= Link::NEAR_MAX_NS { 0 } else { ns }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_near_is_near_and_the_rest_is_rounded() {
        let check = |us: u64, expected_us: u64| {
            assert_eq!(rounded(Duration::from_micros(us)), expected_us * 1000, "{us} µs");
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
