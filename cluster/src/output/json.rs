//! Views as one line of JSON for scripts. The lines are a contract: fields are added, never renamed
//! or dropped, without another `version`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use serde::Serialize;
use shoal_protocol::admin::ClusterView;
use shoal_protocol::id::{DeploymentName, NodeId};

/// What `shoal up --json` prints when it is ready.
#[derive(Debug, Serialize)]
pub struct Ready<'a> {
    event: &'static str,
    version: u32,
    /// Paths of the API begin with `/v1` under it.
    pub url: String,
    context: &'a Path,
    model: &'a DeploymentName,
    /// `stages x ranks`.
    pub mesh: String,
    /// The number of the replica's layout.
    pub generation: u64,
    coordinator: ReadyCoordinator,
    workers: Vec<ReadyWorker>,
}

#[derive(Debug, Serialize)]
struct ReadyCoordinator {
    id: NodeId,
    pid: u32,
}

/// A worker; one without a stage has nulls.
#[derive(Debug, Serialize)]
struct ReadyWorker {
    id: NodeId,
    pid: u32,
    address: Option<SocketAddr>,
    /// Counted from 0 within the deployment.
    replica: Option<u32>,
    stage: Option<u32>,
    rank: Option<u32>,
    /// Half-open.
    layers: Option<[u32; 2]>,
    weight_bytes: u64,
    kv_bytes: u64,
}

/// The ready line of a deployment; `None` while it has no plan.
pub fn ready<'a>(
    view: &ClusterView,
    model: &'a DeploymentName,
    context: &'a Path,
) -> Option<Ready<'a>> {
    let replicas = || view.plan.replicas.iter().filter(|r| r.deployment == *model);
    let first = replicas().next()?;
    let workers = view.workers.iter().filter(|worker| worker.connected).map(|worker| {
        let shard = replicas().zip(0..).find_map(|(replica, replica_index)| {
            replica.stages.iter().zip(0..).find_map(|(stage, stage_index)| {
                let shard = stage.shards.iter().find(|shard| shard.node == worker.id)?;
                Some((replica_index, stage_index, stage.layers, shard))
            })
        });
        ReadyWorker {
            id: worker.id,
            pid: worker.pid,
            address: worker.address,
            replica: shard.map(|(replica, ..)| replica),
            stage: shard.map(|(_, stage, ..)| stage),
            rank: shard.map(|(_, _, _, shard)| shard.rank.0),
            layers: shard.map(|(_, _, layers, _)| [layers.start, layers.end]),
            weight_bytes: shard.map_or(0, |(_, _, _, shard)| shard.memory.weights.0),
            kv_bytes: shard.map_or(0, |(_, _, _, shard)| shard.memory.kv.0),
        }
    });
    Some(Ready {
        event: "ready",
        version: 1,
        url: url(view.coordinator.api, view.coordinator.tls),
        context,
        model,
        mesh: first.mesh(),
        generation: first.generation.0,
        coordinator: ReadyCoordinator { id: view.coordinator.id, pid: view.coordinator.pid },
        workers: workers.collect(),
    })
}

/// The URL of the public API at an address; one that listens everywhere is reached by loopback.
pub fn url(api: SocketAddr, tls: bool) -> String {
    let ip = match api.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    let scheme = if tls { "https" } else { "http" };
    format!("{scheme}://{}", SocketAddr::new(ip, api.port()))
}

/// One line without its line feed.
pub fn line<T: Serialize>(value: &T) -> Result<String, serde_json::Error> {
    serde_json::to_string(value)
}
