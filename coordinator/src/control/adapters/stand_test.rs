use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{AdapterId, Generation, Incarnation, RankIndex, ReplicaId, Role};
use shoal_protocol::plan::{
    DeploymentSpec, ModelRef, ModelSource, Numerics, Precision, ReplicaLimits, ShardMemory,
    ShardPlan, StagePlan,
};
use shoal_protocol::units::LayerRange;

use super::*;
use crate::control::shape::{ModelShape, small_pretend};
use crate::control::state::{
    AdapterCommand, Change, Command, CoordinatorCommand, DeploymentCommand, KeyFingerprint,
    NodeCommand, PlanCommand, Timestamp, VersionCommand,
};
use crate::serving::ServedKind;

const C1: NodeId = NodeId::coordinator(1);
const ONE: AdapterId = AdapterId(1);

fn name(text: &str) -> DeploymentName {
    DeploymentName::new(text).unwrap()
}

fn model() -> ModelRef {
    let shape = small_pretend(2, 1);
    ModelRef { source: ModelSource::Pretend(shape.clone()), fingerprint: shape.fingerprint() }
}

/// Two stages, on w1 and w2.
fn plan(generation: u64) -> ReplicaPlan {
    let stage = |index: u32| {
        let (rank, node) = (RankIndex(0), NodeId::worker(index + 1));
        let shard = ShardPlan { rank, node, device: "cpu".into(), memory: ShardMemory::default() };
        StagePlan { layers: LayerRange::new(index, index + 1), shards: vec![shard] }
    };
    ReplicaPlan {
        id: ReplicaId(1),
        deployment: name("m"),
        generation: Generation(generation),
        model: model(),
        precision: Precision::F32,
        numerics: Numerics::N1,
        stages: (0..2).map(stage).collect(),
        limits: ReplicaLimits {
            kv_blocks: 4,
            context_max: 64,
            step_rows_max: 8,
            sequences_max: 4,
            steps_in_flight_max: 3,
        },
    }
}

/// `m` over two workers, and adapter `a` beside it.
fn state() -> ClusterState {
    let (mut state, mut sequence) = (ClusterState::default(), 0);
    let mut apply = |change| {
        sequence += 1;
        let (incarnation, at) = (Incarnation(1), Timestamp(5));
        state.apply(&Command { client: C1, incarnation, sequence, at, change }).unwrap();
    };
    for (role, key) in [(Role::Coordinator, 1), (Role::Worker, 2), (Role::Worker, 3)] {
        let key = KeyFingerprint([key; 32]);
        apply(Change::Node(NodeCommand::Enrol { role, key }));
    }
    let cluster = "127.0.0.1:1".parse().unwrap();
    let (incarnation, build) = (Incarnation(1), String::new());
    let announce = CoordinatorCommand::Announce { node: C1, incarnation, boot: 1, cluster, build };
    apply(Change::Coordinator(announce));
    apply(Change::Version(VersionCommand::Raise { to: 3, heard: [(C1, 1)].into() }));
    let spec = DeploymentSpec { name: name("m"), model: model(), stages: None, precision: None };
    let shape = ModelShape::Pretend(small_pretend(2, 1));
    apply(Change::Deployment(DeploymentCommand::Create { spec, shape, replicas: 1 }));
    apply(Change::Plan(PlanCommand::Adopt { plan: Box::new(plan(1)) }));
    let (path, fingerprint) = ("/a".to_owned(), [0; 32]);
    let (name, deployment) = (name("a"), name("m"));
    apply(Change::Adapter(AdapterCommand::Load { name, deployment, path, fingerprint }));
    state
}

fn says(worker: u32, generation: u64, held: &[AdapterId]) -> (NodeId, Vec<HeldAdapters>) {
    let (replica, generation) = (ReplicaId(1), Generation(generation));
    let held = HeldAdapters {
        replica,
        generation,
        held: held.iter().map(|id| (*id, [0; 32])).collect(),
        failed: Vec::new(),
    };
    (NodeId::worker(worker), vec![held])
}

fn base() -> Arc<ServedDeployment> {
    let replica = ServedReplica {
        id: ReplicaId(1),
        generation: Generation(1),
        head: NodeId::worker(1),
        requests: None,
        ready: true,
        load: None,
    };
    Arc::new(ServedDeployment {
        name: name("m"),
        created: 1,
        folder: None,
        vocab: 10,
        context_max: 64,
        kind: ServedKind::Generate,
        replicas: vec![replica],
        reason: String::new(),
        phase: DeploymentPhase::Ready,
        adapter: None,
    })
}

#[test]
fn a_layout_takes_requests_only_where_all_its_shards_have_the_adapter() {
    let state = state();
    let mut table = ServingTable::default();
    table.deployments.insert(name("m"), base());
    let mut at = |held: Held| {
        serve(&state, &mut table, &held);
        let served = table.get(&name("a")).unwrap();
        (served.phase, served.replicas[0].ready, served.reason.clone(), served.adapter_id())
    };
    let loading = |who: &str| {
        let words = format!("adapter `a` is being loaded: {who} has not said that r1 has it");
        (DeploymentPhase::Loading, false, words, Some(ONE))
    };
    assert_eq!(at(Held::new()), loading("w1"));
    assert_eq!(at([says(1, 1, &[ONE])].into()), loading("w2"));
    assert_eq!(at([says(1, 1, &[ONE]), says(2, 1, &[AdapterId(2)])].into()), loading("w2"));
    assert_eq!(
        at([says(1, 1, &[ONE]), says(2, 2, &[ONE])].into()),
        loading("w2"),
        "of another layout"
    );
    let ready = (DeploymentPhase::Ready, true, String::new(), Some(ONE));
    assert_eq!(at([says(1, 1, &[ONE]), says(2, 1, &[ONE])].into()), ready);
}

#[test]
fn what_failed_is_said_and_not_waited_for() {
    let state = state();
    let (node, mut said) = says(2, 1, &[]);
    said[0].failed.push((ONE, WireError::new(ErrorCode::BadModel, "no such folder")));
    let held = [says(1, 1, &[ONE]), (node, said)].into();
    let mut table = ServingTable::default();
    table.deployments.insert(name("m"), base());
    serve(&state, &mut table, &held);
    let served = table.get(&name("a")).unwrap();
    let words = "w2 cannot load it for r1: no such folder";
    assert_eq!((served.phase, served.reason.as_str()), (DeploymentPhase::Failed, words));
    let adapter = state.adapters.get(&name("a")).unwrap();
    let seen = view(&state, &name("a"), adapter, &held);
    assert_eq!((seen.held, seen.replicas, seen.reason.as_str()), (0, 1, words));
}

#[test]
fn another_adapter_under_the_same_number_is_not_this_one() {
    let state = state();
    let adapter = state.adapters.get(&name("a")).expect("it is there");
    let mut held: Held = [says(1, 1, &[adapter.id]), says(2, 1, &[adapter.id])].into();
    let stand = |held: &Held| stands(&state, adapter, held)[0].1.clone();
    assert_eq!(stand(&held), Stand::Held);
    held.get_mut(&NodeId::worker(2)).expect("it said something")[0].held[0].1 = [9; 32];
    assert_eq!(stand(&held), Stand::Coming(NodeId::worker(2)));
}
