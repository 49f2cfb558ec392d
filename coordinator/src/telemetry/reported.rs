//! What heads and shards reported, as metrics. The counts grow at their owners and may begin again
//! at zero when a shard is made anew, as any process's counters do.

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{CounterVec, GaugeVec, IntGauge, Opts};
use shoal_protocol::control::{HeadReport, ShardCounters, ShardReport, ShardState};
use shoal_protocol::id::{NodeId, ReplicaId};
use shoal_protocol::prefix::PrefixReport;

use crate::serving::{ServedReplica, ServingTable};

/// A gauge of the heads of a deployment.
type HeadGauge = (&'static str, &'static str, fn(&[HeadReport]) -> f64);

const HEAD_GAUGES: &[HeadGauge] = &[
    ("vllm:num_requests_running", "Sequences that run.", |heads| {
        heads.iter().map(|head| f64::from(head.running)).sum()
    }),
    ("vllm:num_requests_waiting", "Sequences that wait at their head.", |heads| {
        heads.iter().map(|head| f64::from(head.waiting)).sum()
    }),
    ("vllm:kv_cache_usage_perc", "The share of the KV blocks in use, 0 to 1.", |heads| {
        let used: f64 = heads.iter().map(|head| f64::from(head.blocks_used)).sum();
        let total: f64 = heads.iter().map(|head| f64::from(head.blocks_total)).sum();
        if total > 0.0 { used / total } else { 0.0 }
    }),
    ("shoal_replicas_ready", "Replicas that are ready.", |heads| heads.len() as f64),
];

/// A counter of the heads of a deployment.
type HeadCounter = (&'static str, &'static str, fn(&HeadReport) -> u64);

const HEAD_COUNTERS: &[HeadCounter] = &[
    (
        "vllm:num_preemptions_total",
        "Sequences that had to give up their KV blocks and start again.",
        |head| head.preemptions,
    ),
    ("shoal_head_prompt_tokens_total", "Prompt tokens computed.", |head| head.prompt_tokens),
    ("shoal_head_generated_tokens_total", "Tokens generated.", |head| head.generated_tokens),
    ("shoal_head_steps_total", "Steps issued.", |head| head.steps),
];

/// A counter of the blocks that the heads of a deployment share.
type PrefixCounter = (&'static str, &'static str, fn(&PrefixReport) -> u64);

const PREFIX_COUNTERS: &[PrefixCounter] = &[
    ("vllm:prefix_cache_queries_total", "Prompt tokens that were looked for.", |p| p.tokens_asked),
    ("vllm:prefix_cache_hits_total", "Prompt tokens that were found.", |p| p.tokens_found),
    ("shoal_prefix_lookups_total", "Sequences that looked for their beginning.", |p| p.lookups),
    ("shoal_prefix_hits_total", "Sequences that found some of it.", |p| p.hits),
    (
        "shoal_prefix_evictions_total",
        "KV blocks whose content was known and that were given to others.",
        |p| p.evictions,
    ),
];

/// A gauge of the same.
type PrefixGauge = (&'static str, &'static str, fn(&PrefixReport) -> u32);

const PREFIX_GAUGES: &[PrefixGauge] = &[
    ("shoal_prefix_blocks", "KV blocks whose content is known.", |p| p.blocks_known),
    ("shoal_prefix_blocks_idle", "Those of them that no sequence uses.", |p| p.blocks_idle),
];

/// A counter of a shard or of the link behind it, in the unit of its name.
type ShardCounter = (&'static str, &'static str, fn(&ShardCounters) -> f64);

const SHARD_COUNTERS: &[ShardCounter] = &[
    ("shoal_stage_steps_total", "Steps computed by a stage.", |c| c.steps as f64),
    ("shoal_stage_rows_total", "Rows (tokens of a step) computed by a stage.", |c| c.rows as f64),
    ("shoal_stage_compute_seconds_total", "Time that a stage computed.", |c| {
        c.compute_us as f64 / 1e6
    }),
    ("shoal_hop_sent_bytes_total", "Bytes sent to the next stage.", |c| c.sent_bytes as f64),
    ("shoal_hop_sent_frames_total", "Frames sent to the next stage.", |c| c.sent_frames as f64),
    (
        "shoal_hop_send_seconds_total",
        "Time between a stage's send and the wire's acceptance of its frames.",
        |c| c.send_us as f64 / 1e6,
    ),
    (
        "shoal_hop_lost_packets_total",
        "Packets to the next stage that the transport declared lost.",
        |c| c.lost_packets as f64,
    ),
    (
        "shoal_link_suspicions_total",
        "How often a stage took a neighbour for dead and waited: all but the last were stalls.",
        |c| c.suspicions as f64,
    ),
];

/// All families that follow from the table.
pub fn families(
    table: &ServingTable,
    stale_events: u64,
) -> Result<Vec<MetricFamily>, prometheus::Error> {
    let mut families = Vec::new();
    heads(table, &mut families)?;
    shards(table, &mut families)?;
    cluster(table, stale_events, &mut families)?;
    Ok(families)
}

fn heads(table: &ServingTable, out: &mut Vec<MetricFamily>) -> Result<(), prometheus::Error> {
    let deployments: Vec<(&str, Vec<HeadReport>)> = table
        .deployments
        .values()
        .map(|deployment| {
            let ready = deployment.replicas.iter().filter(|replica| replica.ready);
            let reports = ready.map(|replica| replica.load.unwrap_or_default()).collect();
            (deployment.name.as_str(), reports)
        })
        .collect();
    for (name, help, value) in HEAD_GAUGES {
        let vec = GaugeVec::new(Opts::new(*name, *help), &["model_name"])?;
        for (model, heads) in &deployments {
            vec.with_label_values(&[*model]).set(value(heads));
        }
        out.extend(vec.collect());
    }
    for (name, help, value) in HEAD_COUNTERS {
        let vec = CounterVec::new(Opts::new(*name, *help), &["model_name"])?;
        for (model, heads) in &deployments {
            let sum = heads.iter().map(value).sum::<u64>();
            vec.with_label_values(&[*model]).inc_by(sum as f64);
        }
        out.extend(vec.collect());
    }
    prefixes(table, out)?;
    let kind = "1: what a deployment makes of requests (generate, embed, rank).";
    let kind = GaugeVec::new(Opts::new("shoal_deployment_kind", kind), &["model_name", "kind"])?;
    for deployment in table.deployments.values() {
        kind.with_label_values(&[deployment.name.as_str(), deployment.kind.label()]).set(1.0);
    }
    out.extend(kind.collect());
    Ok(())
}

fn prefixes(table: &ServingTable, out: &mut Vec<MetricFamily>) -> Result<(), prometheus::Error> {
    let of = |replica: &ServedReplica| {
        let of_it =
            |p: &&PrefixReport| (p.replica, p.generation) == (replica.id, replica.generation);
        table.prefixes.iter().find(of_it).copied().unwrap_or_default()
    };
    let deployments: Vec<(&str, Vec<PrefixReport>)> = table
        .deployments
        .values()
        .map(|deployment| {
            let ready = deployment.replicas.iter().filter(|replica| replica.ready);
            (deployment.name.as_str(), ready.map(of).collect())
        })
        .collect();
    for (name, help, value) in PREFIX_COUNTERS {
        let vec = CounterVec::new(Opts::new(*name, *help), &["model_name"])?;
        for (model, heads) in &deployments {
            let sum = heads.iter().map(value).sum::<u64>();
            vec.with_label_values(&[*model]).inc_by(sum as f64);
        }
        out.extend(vec.collect());
    }
    for (name, help, value) in PREFIX_GAUGES {
        let vec = GaugeVec::new(Opts::new(*name, *help), &["model_name"])?;
        for (model, heads) in &deployments {
            let sum = heads.iter().map(|p| f64::from(value(p))).sum();
            vec.with_label_values(&[*model]).set(sum);
        }
        out.extend(vec.collect());
    }
    Ok(())
}

fn shards(table: &ServingTable, out: &mut Vec<MetricFamily>) -> Result<(), prometheus::Error> {
    const LABELS: &[&str] = &["model_name", "replica", "stage", "node"];
    let labels = |node: &NodeId, shard: &ShardReport| {
        [
            model_of(table, shard.replica).to_owned(),
            shard.replica.to_string(),
            shard.stage.to_string(),
            node.to_string(),
        ]
    };
    for (name, help, value) in SHARD_COUNTERS {
        let vec = CounterVec::new(Opts::new(*name, *help), LABELS)?;
        for (node, shard) in &table.shards {
            vec.with_label_values(&labels(node, shard)).inc_by(value(&shard.counters));
        }
        out.extend(vec.collect());
    }
    let rtt = "The smoothed round-trip time to the next stage; 0 where there is no link.";
    let rtt = GaugeVec::new(Opts::new("shoal_hop_rtt_seconds", rtt), LABELS)?;
    let ready = "1 where a shard takes steps, else 0.";
    let ready = GaugeVec::new(Opts::new("shoal_shard_ready", ready), LABELS)?;
    let suspects = "Neighbours of a stage that are silent for longer than any stall of late.";
    let suspects = GaugeVec::new(Opts::new("shoal_link_suspects", suspects), LABELS)?;
    for (node, shard) in &table.shards {
        let labels = labels(node, shard);
        suspects.with_label_values(&labels).set(shard.counters.suspects as f64);
        rtt.with_label_values(&labels).set(shard.counters.link_rtt_us as f64 / 1e6);
        let is_ready = shard.state == ShardState::Ready;
        ready.with_label_values(&labels).set(f64::from(u8::from(is_ready)));
    }
    out.extend(rtt.collect());
    out.extend(suspects.collect());
    out.extend(ready.collect());
    Ok(())
}

fn cluster(
    table: &ServingTable,
    stale_events: u64,
    out: &mut Vec<MetricFamily>,
) -> Result<(), prometheus::Error> {
    let gauges = [
        ("shoal_workers_connected", "Workers whose control link is up.", table.workers_connected),
        ("shoal_workers", "Workers of the cluster, connected or not.", table.workers_total),
    ];
    for (name, help, value) in gauges {
        let gauge = IntGauge::new(name, help)?;
        gauge.set(value as i64);
        out.extend(gauge.collect());
    }
    let stale = prometheus::IntCounter::new(
        "shoal_stale_events_total",
        "Token events of an older attempt, or that came twice, and were dropped.",
    )?;
    stale.inc_by(stale_events);
    out.extend(stale.collect());
    Ok(())
}

/// The deployment that a replica belongs to; empty while it is being torn down.
fn model_of(table: &ServingTable, replica: ReplicaId) -> &str {
    let owns =
        |replicas: &[crate::serving::ServedReplica]| replicas.iter().any(|r| r.id == replica);
    table
        .deployments
        .values()
        .find(|deployment| owns(&deployment.replicas))
        .map_or("", |deployment| deployment.name.as_str())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use prometheus::TextEncoder;
    use shoal_protocol::id::{DeploymentName, Generation};

    use super::*;
    use crate::serving::ServedDeployment;

    #[test]
    fn heads_are_summed_by_model_and_shards_stand_alone() {
        let replica = |id: u32, running| ServedReplica {
            id: ReplicaId(id),
            generation: Generation(1),
            head: NodeId::worker(1),
            requests: None,
            ready: true,
            load: Some(HeadReport {
                running,
                waiting: 2,
                blocks_used: 10,
                blocks_total: 40,
                preemptions: 3,
                ..HeadReport::default()
            }),
        };
        let name = DeploymentName::new("org/m").expect("a name");
        let deployment = ServedDeployment {
            name: name.clone(),
            created: 0,
            folder: None,
            vocab: 1,
            context_max: 1,
            kind: crate::serving::ServedKind::Generate,
            adapter: None,
            replicas: vec![replica(4, 1), replica(5, 6)],
            reason: String::new(),
            phase: shoal_protocol::admin::DeploymentPhase::Ready,
        };
        let mut table =
            ServingTable { workers_total: 3, workers_connected: 2, ..Default::default() };
        table.deployments.insert(name, Arc::new(deployment));
        let prefix = |replica, generation| PrefixReport {
            replica: ReplicaId(replica),
            generation: Generation(generation),
            blocks_known: 7,
            tokens_found: 48,
            ..PrefixReport::default()
        };
        // The last one is of a layout that was replaced.
        table.prefixes = vec![prefix(4, 1), prefix(5, 1), prefix(5, 0)];
        let shard = ShardReport {
            replica: ReplicaId(5),
            generation: Generation(1),
            stage: Default::default(),
            state: ShardState::Ready,
            memory: Default::default(),
            counters: ShardCounters {
                compute_us: 2_500_000,
                link_rtt_us: 90,
                ..ShardCounters::default()
            },
        };
        table.shards.push((NodeId::worker(2), shard));
        let families = families(&table, 4).expect("valid names");
        let text = TextEncoder::new().encode_to_string(&families).expect("renders");
        for line in [
            "vllm:num_requests_running{model_name=\"org/m\"} 7",
            "vllm:num_requests_waiting{model_name=\"org/m\"} 4",
            "vllm:kv_cache_usage_perc{model_name=\"org/m\"} 0.25",
            "vllm:num_preemptions_total{model_name=\"org/m\"} 6",
            "shoal_workers_connected 2",
            "shoal_stale_events_total 4",
        ] {
            assert!(text.lines().any(|found| found == line), "no `{line}` in\n{text}");
        }
        let start = "shoal_stage_compute_seconds_total{model_name=\"org/m\",node=\"w2\",replica=";
        assert!(text.lines().any(|l| l.starts_with(start) && l.ends_with(" 2.5")), "{text}");
        let start = "shoal_hop_rtt_seconds{";
        assert!(text.lines().any(|l| l.starts_with(start) && l.ends_with(" 0.00009")), "{text}");
    }
}
