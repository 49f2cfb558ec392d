//! Adapters as the log and the snapshot have them.

use shoal_protocol::id::{Incarnation, NodeId, Role};
use shoal_protocol::plan::{DeploymentSpec, ModelRef, ModelSource};

use super::*;
use crate::control::shape::{ModelShape, small_pretend};
use crate::control::state::cluster_test::{C1, Cluster};
use crate::control::state::{
    Change, DeploymentCommand, Effect, NodeCommand, Refusal, VersionCommand, snapshot,
};

const W1: NodeId = NodeId::worker(1);

impl Cluster {
    /// Of a coordinator and a worker, with deployment `m`, before anybody is known to speak anything.
    fn with_a_worker() -> Self {
        let mut cluster = Self::of(&[Role::Coordinator, Role::Worker]);
        cluster.announce(C1, 1, 1);
        let (incarnation, build) = (Incarnation(1), "0.1.0".to_owned());
        let start = NodeCommand::Start { node: W1, incarnation, build };
        cluster.apply(Change::Node(start)).unwrap();
        cluster.apply(create("m")).unwrap();
        cluster
    }

    /// The same, of which everybody speaks version 3.
    fn of_today() -> Self {
        let mut cluster = Self::with_a_worker();
        cluster.raise(3, &[(C1, 1)]).unwrap();
        cluster.start(3).unwrap();
        cluster
    }

    fn start(&mut self, protocol: u16) -> Result<Vec<Effect>, Refusal> {
        let incarnation = Incarnation(1 + u64::from(protocol));
        let build = "0.1.0".to_owned();
        let start = VersionCommand::Start { node: W1, incarnation, build, protocol };
        self.apply(Change::Version(start))
    }

    /// The number that it was given.
    fn load(&mut self, adapter: &str, deployment: &str) -> Result<u32, Refusal> {
        let effects = self.apply(load(adapter, deployment))?;
        match effects[..] {
            [Effect::AdapterLoaded { id, .. }] => Ok(id.0),
            _ => panic!("{effects:?}"),
        }
    }

    fn unload(&mut self, adapter: &str) -> Result<Vec<Effect>, Refusal> {
        self.apply(Change::Adapter(AdapterCommand::Unload { name: name(adapter) }))
    }

    fn wanted(&self) -> Vec<(String, Vec<u32>)> {
        let numbers = |of: &DeploymentAdapters| of.adapters.iter().map(|one| one.id.0).collect();
        let wanted = self.state.adapters.wanted().deployments;
        wanted.iter().map(|of| (of.deployment.to_string(), numbers(of))).collect()
    }
}

fn name(text: &str) -> DeploymentName {
    DeploymentName::new(text).unwrap()
}

fn create(deployment: &str) -> Change {
    let shape = small_pretend(2, 1);
    let source = ModelSource::Pretend(shape.clone());
    let model = ModelRef { source, fingerprint: shape.fingerprint() };
    let spec = DeploymentSpec { name: name(deployment), model, stages: Some(1), precision: None };
    let shape = ModelShape::Pretend(shape);
    Change::Deployment(DeploymentCommand::Create { spec, shape, replicas: 1 })
}

fn load(adapter: &str, deployment: &str) -> Change {
    Change::Adapter(AdapterCommand::Load {
        name: name(adapter),
        deployment: name(deployment),
        path: format!("/adapters/{adapter}"),
        fingerprint: [3; 32],
    })
}

#[test]
fn an_adapter_waits_until_coordinators_and_workers_know_of_adapters() {
    let mut cluster = Cluster::with_a_worker();
    cluster.raise(2, &[(C1, 1)]).unwrap();
    let held = |by: &[NodeId]| Err(Refusal::HeldBack { needs: 3, by: by.to_vec(), more: 0 });
    assert_eq!(cluster.load("a", "m"), held(&[C1, W1]));
    cluster.raise(3, &[(C1, 1)]).unwrap();
    assert_eq!(cluster.load("a", "m"), held(&[W1]));
    cluster.start(3).unwrap();
    assert_eq!(cluster.load("a", "m"), Ok(1));
    let late = cluster.start(2);
    assert!(late.is_err(), "an older worker would answer for it with the base's words: {late:?}");
}

#[test]
fn a_number_that_was_given_is_remembered_when_nothing_else_is_left() {
    let mut cluster = Cluster::of_today();
    let before = snapshot::encode(&cluster.state).unwrap().len();
    assert_eq!(cluster.load("a", "m"), Ok(1));
    cluster.unload("a").unwrap();
    assert_eq!(cluster.wanted(), []);
    let bytes = snapshot::encode(&cluster.state).unwrap();
    assert!(bytes.len() > before);
    cluster.state = snapshot::decode(&bytes).unwrap();
    assert_eq!(cluster.load("a", "m"), Ok(2));
}

#[test]
fn a_number_is_never_given_twice_and_a_name_means_one_model() {
    let mut cluster = Cluster::of_today();
    assert_eq!(cluster.load("a", "m"), Ok(1));
    assert_eq!(cluster.load("b", "m"), Ok(2));
    assert_eq!(cluster.wanted(), [("m".to_owned(), vec![1, 2])]);
    assert_eq!(cluster.load("a", "m"), Err(Refusal::AdapterNameTaken { name: name("a") }));
    assert_eq!(cluster.load("m", "m"), Err(Refusal::NameTaken { name: name("m") }));
    assert_eq!(cluster.load("c", "n"), Err(Refusal::UnknownDeployment { name: name("n") }));
    assert_eq!(cluster.apply(create("a")), Err(Refusal::AdapterNameTaken { name: name("a") }));
    let before = cluster.state.adapters.wanted().revision;
    cluster.unload("a").unwrap();
    assert_eq!(cluster.unload("a"), Err(Refusal::UnknownAdapter { name: name("a") }));
    assert_eq!(cluster.state.adapters.wanted().revision, before + 1, "a refusal changes nothing");
    assert_eq!(cluster.load("a", "m"), Ok(3));
    // What is named from a working folder is another folder on each node.
    let at = |path: &str| AdapterCommand::Load {
        name: name("d"),
        deployment: name("m"),
        path: path.to_owned(),
        fingerprint: [0; 32],
    };
    for path in ["adapters/d", "org/d@main", "./d", ""] {
        let refused = cluster.apply(Change::Adapter(at(path)));
        assert_eq!(refused, Err(Refusal::BadAdapterPath), "{path}");
    }
    // A commit of the hub is the same everywhere.
    cluster.apply(Change::Adapter(at(&format!("org/d@{}", "0123456789".repeat(4))))).unwrap();
}

#[test]
fn a_deployment_takes_its_adapters_along_and_their_names_are_free() {
    let mut cluster = Cluster::of_today();
    cluster.apply(create("n")).unwrap();
    cluster.load("a", "m").unwrap();
    cluster.load("b", "n").unwrap();
    let before = cluster.state.adapters.wanted().revision;
    cluster.apply(Change::Deployment(DeploymentCommand::Remove { name: name("m") })).unwrap();
    assert_eq!(cluster.wanted(), [("n".to_owned(), vec![2])]);
    assert_eq!(cluster.state.adapters.wanted().revision, before + 1, "workers hear of it");
    cluster.apply(create("a")).unwrap();
}

#[test]
fn a_deployment_has_a_bound_of_adapters() {
    let mut cluster = Cluster::of_today();
    for number in 0..ADAPTERS_MAX {
        cluster.load(&format!("a{number}"), "m").unwrap();
    }
    let refused = cluster.load("more", "m").unwrap_err().to_string();
    assert!(refused.contains("64 adapters of this deployment already"), "{refused}");
    assert!(cluster.state.adapters.wanted().is_bounded());
}
