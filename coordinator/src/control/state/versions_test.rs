//! What may be proposed while builds are mixed, and what a state looks like on the disk before and after.

use shoal_protocol::id::{DeploymentName, Role};
use shoal_protocol::model::EncoderSpec;
use shoal_protocol::plan::{DeploymentSpec, ModelRef, ModelSource};

use super::*;
use crate::control::state::cluster_test::{C1, Cluster};
use crate::control::state::{KeyFingerprint, snapshot};

const C2: NodeId = NodeId::coordinator(2);
const W1: NodeId = NodeId::worker(1);

impl Cluster {
    /// Two coordinators and a worker, as version 1 has them.
    fn of_version_1() -> Self {
        let mut cluster = Self::of(&[Role::Coordinator, Role::Coordinator, Role::Worker]);
        cluster.announce(C1, 1, 11);
        cluster.announce(C2, 1, 12);
        cluster.apply(start(1)).unwrap();
        cluster
    }

    fn format(&self) -> u8 {
        snapshot::encode(&self.state).unwrap()[7]
    }
}

fn start(incarnation: u64) -> Change {
    let incarnation = Incarnation(incarnation);
    Change::Node(NodeCommand::Start { node: W1, incarnation, build: "0.1.0".into() })
}

fn speaks(incarnation: u64, protocol: u16) -> Change {
    let incarnation = Incarnation(incarnation);
    let build = "0.2.0".to_owned();
    Change::Version(VersionCommand::Start { node: W1, incarnation, build, protocol })
}

#[test]
fn a_new_command_waits_for_every_coordinator() {
    let mut cluster = Cluster::of_version_1();
    assert_eq!(cluster.state.lowest_protocol(), 1);
    let held = Err(Refusal::HeldBack { needs: 2, by: vec![C1, C2], more: 0 });
    assert_eq!(cluster.apply(speaks(1, 2)), held, "it reached a log that version 1 reads");
    assert_eq!(cluster.format(), snapshot::FORMAT, "version 1 does not know that answer");
    cluster.apply(start(1)).unwrap();
    assert_eq!(cluster.format(), snapshot::PLAIN, "nobody remembers it any more");
    // One that was not heard, one that has been started again since, one that has come since.
    let held = |node| Err(Refusal::HeldBack { needs: 2, by: vec![node], more: 0 });
    assert_eq!(cluster.raise(2, &[(C1, 11)]), held(C2));
    assert_eq!(cluster.raise(2, &[(C1, 10), (C2, 12)]), held(C1));
    assert_eq!(cluster.raise(2, &[(C1, 11), (C2, 12)]), Ok(vec![Effect::ProtocolRaised { to: 2 }]));
    assert_eq!(cluster.raise(2, &[]), Ok(vec![]), "it is raised already");
    assert_eq!(cluster.format(), snapshot::FORMAT);
    assert_eq!(cluster.state.protocol_of(C2), 2);
    assert_eq!(cluster.state.lowest_protocol(), 1, "nothing is known of the worker");
    cluster.apply(speaks(1, 2)).unwrap();
    assert_eq!(cluster.state.lowest_protocol(), 2);
}

#[test]
fn a_worker_that_goes_back_takes_the_version_back_with_it() {
    let mut cluster = Cluster::of_version_1();
    cluster.raise(2, &[(C1, 11), (C2, 12)]).unwrap();
    cluster.apply(speaks(2, 2)).unwrap();
    assert_eq!(cluster.state.lowest_protocol(), 2);
    cluster.apply(start(3)).unwrap();
    assert_eq!(cluster.state.lowest_protocol(), 1, "start 3 has not said what it speaks");
    assert!(cluster.apply(speaks(2, 2)).is_err(), "an older start spoke for a newer one");
    // What has never run holds nothing back, and what is gone neither.
    let (role, key) = (Role::Worker, KeyFingerprint([8; 32]));
    cluster.apply(Change::Node(NodeCommand::Enrol { role, key })).unwrap();
    cluster.apply(Change::Node(NodeCommand::Remove { node: W1 })).unwrap();
    assert_eq!(cluster.state.lowest_protocol(), 2);
}

#[test]
fn what_was_decided_for_workers_binds_those_that_come_later() {
    let mut cluster = Cluster::of_version_1();
    let finish = || Change::Version(VersionCommand::Finish { to: 2 });
    let held = |by: &[NodeId]| Err(Refusal::HeldBack { needs: 2, by: by.to_vec(), more: 0 });
    assert_eq!(cluster.apply(finish()), held(&[C1, C2, W1]));
    cluster.raise(2, &[(C1, 11), (C2, 12)]).unwrap();
    assert_eq!(cluster.apply(finish()), held(&[W1]));
    cluster.apply(speaks(2, 2)).unwrap();
    assert_eq!(cluster.state.versions.workers(), 1, "coordinators alone see what a worker speaks");
    for _ in 0..2 {
        assert_eq!(cluster.apply(finish()), Ok(vec![]));
        assert_eq!(cluster.state.versions.workers(), 2);
    }
    // Whoever proposes these has not heard of it yet.
    let before = cluster.state.nodes.clone();
    for old in [start(3), speaks(3, 1)] {
        assert_eq!(cluster.apply(old), held(&[W1]), "an older build came back");
        assert_eq!(cluster.state.nodes, before);
    }
    assert_eq!(cluster.state.lowest_protocol(), 2);
    assert_eq!(cluster.apply(start(2)), Ok(vec![]), "it is the start that is on record");
    cluster.apply(speaks(2, 2)).unwrap();
}

#[test]
fn a_refusal_names_those_who_hold_a_change_back() {
    let check = |by: &[NodeId], expected: &str| {
        let words = held_back(2, by.to_vec()).to_string();
        assert!(words.contains(expected), "{words}");
    };
    check(&[], "needs protocol version 2; that all speak it is not on record yet");
    check(&[C2], "version 2; c2 is not known to speak it: upgrade");
    check(&[C1, W1], "c1 and w1 are not known");
    let many: Vec<_> = (1..=11).map(NodeId::worker).collect();
    check(&many, "w7, w8 and 3 more are not known");
}

/// What commit f403ba0 wrote, byte for byte: a state that holds nothing new is the same on both builds.
#[test]
fn a_state_that_holds_nothing_new_is_written_as_version_1_wrote_it() {
    let cluster = Cluster::of_version_1();
    let bytes = snapshot::encode(&cluster.state).unwrap();
    assert_eq!((cluster.format(), bytes.len()), (2, 226));
    assert_eq!(
        blake3::hash(&bytes).to_hex().as_str(),
        "6ad378581f780dddf6352eb487b09bc46156e348a46de3d3979a12c722ee09f0"
    );
}

#[test]
fn a_part_that_this_build_does_not_know_is_refused_by_name() {
    let mut cluster = Cluster::of_version_1();
    cluster.raise(2, &[(C1, 11), (C2, 12)]).unwrap();
    let mut bytes = snapshot::encode(&cluster.state).unwrap();
    // Its parts: how many, the first one's tag, its length, its bytes.
    let part = postcard::to_stdvec(&cluster.state.versions).unwrap();
    let tag = bytes.len() - part.len() - 2;
    assert_eq!(bytes[tag - 1..=tag], [1, 1]);
    bytes[tag] = 200;
    let sum = *blake3::hash(&bytes[40..]).as_bytes();
    bytes[8..40].copy_from_slice(&sum);
    assert_eq!(snapshot::decode(&bytes), Err(snapshot::SnapshotError::UnknownPart { tag: 200 }));
}

#[test]
fn weights_in_blocks_wait_until_all_know_them() {
    use crate::control::shape::{ModelShape, small_pretend};

    let create = |precision| {
        let pretend = small_pretend(2, 100);
        let model =
            ModelRef { source: ModelSource::Pretend(pretend.clone()), fingerprint: [0; 32] };
        let name = DeploymentName::new("m").unwrap();
        let spec = DeploymentSpec { name, model, stages: None, precision };
        let shape = ModelShape::Pretend(pretend);
        Change::Deployment(DeploymentCommand::Create { spec, shape, replicas: 1 })
    };
    assert_eq!(needs(&create(None)), Needs::NOTHING);
    assert_eq!(needs(&create(Some(Precision::Bf16))), Needs::NOTHING);
    assert_eq!(needs(&create(Some(Precision::Q8_0))), Needs::everybody(KNOWS_FORMATS));
    // So is a cache of fewer bits: its contract stands in what workers are told.
    assert_eq!(needs_of_kv(KvPrecision::F32), Needs::NOTHING);
    assert_eq!(needs_of_kv(KvPrecision::Q8_0), Needs::everybody(KNOWS_KV));
    assert_eq!(needs_of_activations(Activations::F32), Needs::NOTHING);
    assert_eq!(needs_of_activations(Activations::Int8), Needs::everybody(KNOWS_NUMBERS));
}

fn encoder() -> Change {
    let config = serde_json::json!({
        "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8, "num_attention_heads": 2,
        "num_hidden_layers": 2, "intermediate_size": 8, "vocab_size": 9, "max_position_embeddings": 16,
        "type_vocab_size": 2,
    });
    let shape = ModelShape::Encoder(EncoderSpec::from_config(&config).unwrap());
    let source = ModelSource::Folder { path: "/models/m".into() };
    let spec = DeploymentSpec {
        name: DeploymentName::new("m").unwrap(),
        model: ModelRef { source, fingerprint: [1; 32] },
        stages: None,
        precision: None,
    };
    Change::Deployment(DeploymentCommand::Create { spec, shape, replicas: 1 })
}

#[test]
fn an_encoder_waits_for_everybody_and_whoever_comes_later_must_know_it() {
    let mut cluster = Cluster::of_version_1();
    let held = |by: &[NodeId]| Err(Refusal::HeldBack { needs: 3, by: by.to_vec(), more: 0 });
    assert_eq!(cluster.apply(encoder()), held(&[C1, C2, W1]));
    cluster.raise(3, &[(C1, 11), (C2, 12)]).unwrap();
    assert_eq!(cluster.apply(encoder()), held(&[W1]));
    cluster.apply(speaks(1, 3)).unwrap();
    cluster.apply(encoder()).unwrap();
    assert_eq!(cluster.apply(speaks(2, 2)), held(&[W1]), "it would be told of what it cannot read");
}
