//! What is asked of the planner, as the log and the snapshot have it.

use shoal_protocol::id::Role;
use shoal_protocol::mesh::{Mesh, Objective};
use shoal_protocol::plan::{DeploymentSpec, KvPrecision, ModelRef, ModelSource};

use super::*;
use crate::control::shape::{ModelShape, small_pretend};
use crate::control::state::cluster_test::{C1, Cluster};
use crate::control::state::{Change, DeploymentCommand, Refusal};

impl Cluster {
    /// Of one coordinator.
    fn of_one() -> Self {
        let mut cluster = Self::of(&[Role::Coordinator]);
        cluster.announce(C1, 1, 1);
        cluster
    }

    fn ask(&self) -> String {
        self.state.meshes.of(&name()).to_string()
    }

    fn stages(&self) -> Option<u32> {
        self.state.deployments.get(&name()).unwrap().spec.stages
    }
}

fn name() -> DeploymentName {
    DeploymentName::new("m").unwrap()
}

fn create(ask: MeshAsk) -> Change {
    let shape = small_pretend(6, 1);
    let source = ModelSource::Pretend(shape.clone());
    let model = ModelRef { source, fingerprint: shape.fingerprint() };
    let spec = DeploymentSpec { name: name(), model, stages: Some(2), precision: None };
    let shape = ModelShape::Pretend(shape);
    Change::Deployment(DeploymentCommand::CreateMesh { spec, shape, replicas: 1, ask })
}

fn scale(ask: MeshAsk) -> Change {
    Change::Deployment(DeploymentCommand::ScaleMesh { name: name(), replicas: None, ask })
}

fn two_by_two() -> MeshAsk {
    let mesh = Some(MeshAsked::Exactly(Mesh { stages: 2, ranks: 2 }));
    MeshAsk {
        mesh,
        objective: Some(Objective::Throughput),
        reduction: None,
        kv: None,
        activations: None,
    }
}

#[test]
fn a_mesh_waits_until_all_coordinators_know_of_meshes() {
    let mut cluster = Cluster::of_one();
    cluster.raise(2, &[(C1, 1)]).unwrap();
    let held = Err(Refusal::HeldBack { needs: 3, by: vec![C1], more: 0 });
    assert_eq!(cluster.apply(create(two_by_two())), held);
    cluster.raise(3, &[(C1, 1)]).unwrap();
    cluster.apply(create(two_by_two())).unwrap();
    assert_eq!(cluster.ask(), "mesh 2x2, objective throughput");
    assert_eq!(cluster.state.versions.workers(), 1, "older workers may stay: they get no rank");
}

#[test]
fn a_cache_of_fewer_bits_waits_until_workers_know_of_it_too_and_stays() {
    let mut cluster = Cluster::of_one();
    cluster.raise(2, &[(C1, 1)]).unwrap();
    let small = MeshAsk { kv: Some(KvPrecision::Q8_0), ..MeshAsk::default() };
    let held = Err(Refusal::HeldBack { needs: 3, by: vec![C1], more: 0 });
    assert_eq!(cluster.apply(create(small)), held);
    cluster.raise(3, &[(C1, 1)]).unwrap();
    cluster.apply(create(small)).unwrap();
    assert_eq!(cluster.state.versions.workers(), 3, "an older worker that comes now is refused");
    cluster.apply(scale(two_by_two())).unwrap();
    cluster.apply(scale(MeshAsk { kv: Some(KvPrecision::F32), ..MeshAsk::default() })).unwrap();
    assert_eq!(cluster.ask(), "mesh 2x2, objective throughput, KV q8_0");
}

#[test]
fn a_scale_changes_what_it_says_and_a_number_of_stages_ends_a_mesh() {
    let mut cluster = Cluster::of_one();
    cluster.raise(3, &[(C1, 1)]).unwrap();
    cluster.apply(create(two_by_two())).unwrap();
    let latency = MeshAsk { objective: Some(Objective::Latency), ..MeshAsk::default() };
    cluster.apply(scale(latency)).unwrap();
    assert_eq!(
        (cluster.ask().as_str(), cluster.stages()),
        ("mesh 2x2, objective latency", Some(2))
    );
    cluster.apply(scale(MeshAsk { mesh: Some(MeshAsked::Auto), ..MeshAsk::default() })).unwrap();
    assert_eq!((cluster.ask().as_str(), cluster.stages()), ("mesh auto, objective latency", None));
    let stages = |stages| {
        Change::Deployment(DeploymentCommand::Scale { name: name(), replicas: None, stages })
    };
    cluster.apply(stages(StagesAsked::Same)).unwrap();
    assert_eq!(cluster.ask(), "mesh auto, objective latency");
    cluster.apply(stages(StagesAsked::Exactly(3))).unwrap();
    assert_eq!((cluster.ask().as_str(), cluster.stages()), ("objective latency", Some(3)));
    cluster.apply(Change::Deployment(DeploymentCommand::Remove { name: name() })).unwrap();
    assert!(cluster.state.meshes.is_empty());
    assert!(cluster.apply(scale(two_by_two())).is_err(), "there is nothing to scale");
    assert!(cluster.state.meshes.is_empty());
}
