//! ○ How every run begins: three coordinators that vote, four workers, two deployments, all of it in
//! the log's first snapshot. How a cluster comes to that is other tests' business.

use std::collections::BTreeSet;

use raft::prelude::{ConfState, HardState, Snapshot, SnapshotMetadata};
use shoal_coordinator::control::shape::ModelShape;
use shoal_coordinator::control::state::{
    Change, ClusterState, Command, CoordinatorCommand, DeploymentCommand, KeyFingerprint,
    NodeCommand, Timestamp, snapshot,
};
use shoal_coordinator::control::store::raft::core::Saved;
use shoal_protocol::id::{DeploymentName, Incarnation, NodeId, Role};
use shoal_protocol::plan::{DeploymentSpec, ModelRef, ModelSource, PretendSpec};
use shoal_protocol::units::Bytes;

use super::coordinator::Coordinator;
use super::disk::Disk;
use super::executor::address;
use super::model::VOCAB;
use super::worker::Worker;
use super::world::World;

/// What is served at first: name, layers, stages.
pub const DEPLOYMENTS: [(&str, u32, u32); 2] = [("m", 6, 2), ("n", 2, 1)];

/// Puts the machines there.
pub fn populate(world: &mut World) {
    let saved = || Saved { hard: hard(), snapshot: first_snapshot(), entries: Vec::new() };
    for number in 1..=3 {
        let mut disk = Disk::with(saved());
        disk.incarnation = 1;
        let skew = world.dice.range(0, 7_200) as i64 - 3_600;
        let machine = Coordinator { disk, skew, ..Coordinator::default() };
        world.coordinators.insert(NodeId::coordinator(number), machine);
    }
    for number in 1..=4 {
        world.workers.insert(NodeId::worker(number), worker());
    }
}

/// A machine for a worker.
pub fn worker() -> Worker {
    Worker { budget: Bytes::mib(420), incarnation: 0, process: None }
}

fn hard() -> HardState {
    HardState { term: 1, commit: 1, ..HardState::default() }
}

fn first_snapshot() -> Snapshot {
    let conf = ConfState { voters: vec![1, 2, 3], ..ConfState::default() };
    let mut meta = SnapshotMetadata { index: 1, term: 1, ..SnapshotMetadata::default() };
    meta.set_conf_state(conf);
    let data = snapshot::encode(&first_state()).unwrap_or_default();
    let mut snapshot = Snapshot { data, ..Snapshot::default() };
    snapshot.set_metadata(meta);
    snapshot
}

fn first_state() -> ClusterState {
    let mut state = ClusterState::default();
    let mut changes = Vec::new();
    let key = KeyFingerprint([0; 32]);
    let enrol = |role| Change::Node(NodeCommand::Enrol { role, key });
    for number in 1..=3 {
        changes.push(enrol(Role::Coordinator));
        let node = NodeId::coordinator(number);
        changes.push(Change::Coordinator(CoordinatorCommand::Announce {
            node,
            incarnation: Incarnation(1),
            boot: u64::MAX - u64::from(number),
            cluster: address(node, 0, 7_000),
            build: "sim".into(),
        }));
    }
    let voters: BTreeSet<NodeId> = (1..=3).map(NodeId::coordinator).collect();
    changes.push(Change::Coordinator(CoordinatorCommand::SetVoters { voters }));
    changes.extend((1..=4).map(|_| enrol(Role::Worker)));
    changes.extend(DEPLOYMENTS.map(|(name, layers, stages)| deployment(name, layers, stages)));
    for (sequence, change) in (1..).zip(changes) {
        let command = Command {
            client: NodeId::admin(1),
            incarnation: Incarnation(1),
            sequence,
            at: Timestamp(1_000),
            change,
        };
        // Whatever were refused would be missed by `heals`.
        let _ = state.apply(&command);
    }
    state
}

/// How many layers the model of a deployment has.
pub fn layers(name: &DeploymentName) -> u32 {
    let all = DEPLOYMENTS.iter();
    all.filter(|(of, ..)| *of == name.as_str()).map(|(_, layers, _)| *layers).next().unwrap_or(1)
}

/// Asks for a deployment.
pub fn deployment(name: &str, layers: u32, stages: u32) -> Change {
    let spec = PretendSpec {
        layers,
        hidden: 8,
        vocab: VOCAB,
        max_context: 256,
        seed: 1,
        layer_step_ns: 0,
        layer_row_ns: 0,
        layer_weight_bytes: 100 << 20,
    };
    let fingerprint = spec.fingerprint();
    let shape = ModelShape::Pretend(spec.clone());
    #[allow(clippy::unwrap_used)] // A name in this file.
    let name = DeploymentName::new(name).unwrap();
    let model = ModelRef { source: ModelSource::Pretend(spec), fingerprint };
    let spec = DeploymentSpec { name, model, stages: Some(stages), precision: None };
    Change::Deployment(DeploymentCommand::Create { spec, shape, replicas: 1 })
}
