//! The control plane over real sockets: joining, deploying, losing a worker, starting again.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![allow(clippy::large_futures, reason = "a test has one of them")]

mod control_support;

use control_support::*;
use shoal_coordinator::{Coordinator, CoordinatorConfig, StartError};
use shoal_protocol::access::{AccessCall, AccessReply, KeyLimits, KeyName, KeyStanding};
use shoal_protocol::admin::{AdminCall, AdminReply, DeploymentPhase};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{DeploymentName, Generation, NodeId, Role};
use shoal_protocol::join::JoinToken;
use shoal_protocol::plan::ModelSource;
use shoal_protocol::quic::join::JoinError;
use shoal_protocol::quic::{Alpn, Expect, Identity};
use shoal_protocol::units::LayerRange;
use shoal_protocol::version::VersionRange;

struct Cluster {
    coordinator: Coordinator,
    operator: Operator,
    identities: Vec<Identity>,
    workers: Vec<FakeWorker>,
    data: tempfile::TempDir,
}

impl Cluster {
    async fn with_workers(n: u32) -> Self {
        let data = tempfile::tempdir().unwrap();
        let coordinator = start(config(data.path())).await.unwrap();
        let operator = Operator::of(&coordinator);
        let mut cluster =
            Self { coordinator, operator, identities: Vec::new(), workers: Vec::new(), data };
        if n > 0 {
            let token = cluster.operator.token(Role::Worker, n, 3600).await;
            for _ in 0..n {
                let address = cluster.coordinator.cluster_address();
                let identity = try_join(address, &token).await.unwrap();
                cluster.identities.push(identity);
            }
            for index in 0..n as usize {
                let worker = cluster.connect(index, Manners::default()).await.unwrap();
                cluster.workers.push(worker);
            }
        }
        cluster
    }

    async fn connect(&self, index: usize, manners: Manners) -> Result<FakeWorker, WireError> {
        let address = self.coordinator.cluster_address();
        FakeWorker::connect(address, &self.identities[index], manners).await
    }

    async fn deploy_and_wait(&self, generation: u64) {
        let reply = self.operator.deploy("m", ModelSource::Pretend(pretend()), None).await;
        assert_eq!(reply, AdminReply::Accepted);
        self.until_ready(generation).await;
    }

    async fn until_ready(&self, generation: u64) {
        until(&self.coordinator, "ready", |view| {
            deployment(view, "m").is_some_and(|m| m.phase == DeploymentPhase::Ready)
                && view.plan.replicas[0].generation == Generation(generation)
        })
        .await;
    }

    fn layers(&self) -> Vec<(NodeId, LayerRange)> {
        let view = self.coordinator.view();
        let stages = view.plan.replicas[0].stages.iter();
        stages.map(|stage| (stage.shards[0].node, stage.layers)).collect()
    }
}

fn refused(result: Result<Identity, JoinError>) -> ErrorCode {
    match result {
        Err(JoinError::Refused(error)) => error.code,
        other => panic!("not refused by the coordinator: {other:?}"),
    }
}

#[tokio::test]
async fn a_token_lets_in_as_many_as_it_says() {
    let cluster = Cluster::with_workers(0).await;
    let address = cluster.coordinator.cluster_address();
    let token = cluster.operator.token(Role::Worker, 2, 3600).await;

    // Somebody else's CA: refused by the joiner, before the secret leaves it.
    let stranger = JoinToken { ca_fingerprint: [9; 32], ..token.clone() };
    assert!(matches!(try_join(address, &stranger).await, Err(JoinError::Connect(_))));
    let guess = JoinToken { secret: [9; 32], ..token.clone() };
    assert_eq!(refused(try_join(address, &guess).await), ErrorCode::BadToken);

    assert_eq!(try_join(address, &token).await.unwrap().node, NodeId::worker(1));
    assert_eq!(try_join(address, &token).await.unwrap().node, NodeId::worker(2));
    assert_eq!(refused(try_join(address, &token).await), ErrorCode::BadToken);
    assert_eq!(cluster.coordinator.view().workers.len(), 2);
}

#[tokio::test]
async fn roles_bound_what_a_certificate_may_ask() {
    let cluster = Cluster::with_workers(1).await;
    let address = cluster.coordinator.cluster_address();
    let token = cluster.operator.token(Role::Admin, 1, 3600).await;
    let admin = try_join(address, &token).await.unwrap();
    assert_eq!(admin.node, NodeId::admin(2));
    for (identity, alpn) in [(&admin, Alpn::Control), (&cluster.identities[0], Alpn::Admin)] {
        let endpoint = endpoint(identity.clone());
        let expect = Expect::Role(Role::Coordinator);
        let connection = endpoint.connect(address, expect, alpn, DEADLINE).await.unwrap();
        // The handshake is complete on this side before the other one has looked at the role.
        let reason = within("the refusal", connection.closed()).await.to_string();
        assert!(reason.contains("not allowed"), "{alpn}: {reason}");
    }
}

#[tokio::test]
async fn a_deployment_is_assigned_becomes_ready_and_goes() {
    let mut cluster = Cluster::with_workers(3).await;
    cluster.deploy_and_wait(1).await;
    let range = LayerRange::new;
    let expected = [
        (NodeId::worker(1), range(0, 2)),
        (NodeId::worker(2), range(2, 4)),
        (NodeId::worker(3), range(4, 6)),
    ];
    assert_eq!(cluster.layers(), expected);
    let told = cluster.workers[1].until_told(|told| !told.is_empty()).await;
    assert_eq!(told[0].layers(), range(2, 4));
    assert_eq!(told[0].peers.len(), 3);

    let name = DeploymentName::new("m").unwrap();
    let reply = cluster.operator.call(AdminCall::ExplainPlan { name: name.clone() }).await;
    let AdminReply::Plan(plan) = reply else { panic!("{reply:?}") };
    assert!(plan.explanation[1].contains("stage 0 on w1 cpu: layers 0..2: 200.0 MiB weights"));
    let again = cluster.operator.deploy("m", ModelSource::Pretend(pretend()), None).await;
    assert_eq!(refusal(again).code, ErrorCode::AlreadyExists);

    let reply = cluster.operator.call(AdminCall::Undeploy { name: name.clone() }).await;
    assert_eq!(reply, AdminReply::Accepted);
    for worker in &mut cluster.workers {
        worker.until_told(|told| told.is_empty()).await;
    }
    let reply = cluster.operator.call(AdminCall::Undeploy { name }).await;
    assert_eq!(refusal(reply).code, ErrorCode::NotFound);
}

#[tokio::test]
async fn a_lost_worker_makes_a_new_generation() {
    let mut cluster = Cluster::with_workers(3).await;
    cluster.deploy_and_wait(1).await;
    cluster.workers.remove(1).die();
    cluster.until_ready(2).await;
    let range = LayerRange::new;
    let expected = [(NodeId::worker(1), range(0, 3)), (NodeId::worker(3), range(3, 6))];
    assert_eq!(cluster.layers(), expected);
    // It is back and another goes: its layers go to it.
    let manners = Manners { incarnation: 2, ..Manners::default() };
    let back = cluster.connect(1, manners).await.unwrap();
    cluster.workers.push(back);
    cluster.workers.remove(0).die();
    cluster.until_ready(3).await;
    let nodes: Vec<_> = cluster.layers().iter().map(|(node, _)| *node).collect();
    assert_eq!(nodes, [NodeId::worker(2), NodeId::worker(3)]);
}

#[tokio::test]
async fn workers_that_know_more_than_the_state_are_believed() {
    let mut cluster = Cluster::with_workers(2).await;
    let seen = Generation(7);
    cluster.workers.remove(1).die();
    let manners = Manners { incarnation: 2, seen, ..Manners::default() };
    let worker = cluster.connect(1, manners).await.unwrap();
    cluster.workers.push(worker);
    cluster.deploy_and_wait(8).await;
}

#[tokio::test]
async fn who_registers_wrongly_is_refused() {
    let cluster = Cluster::with_workers(1).await;
    let register = async |manners| match cluster.connect(0, manners).await {
        Err(error) => error.code,
        Ok(worker) => panic!("{} was let in", worker.node),
    };
    let good = Manners::default;
    let posing = Manners { poses_as: Some(NodeId::worker(7)), ..good() };
    assert_eq!(register(posing).await, ErrorCode::PermissionDenied);
    let newer = Manners { versions: VersionRange { min: 900, max: 901 }, ..good() };
    assert_eq!(register(newer).await, ErrorCode::VersionMismatch);
    let second = cluster.connect(0, Manners { incarnation: 3, ..good() }).await.unwrap();
    assert_eq!(register(Manners { incarnation: 2, ..good() }).await, ErrorCode::PermissionDenied);
    second.die();
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_before_anything_loads() {
    let cluster = Cluster::with_workers(2).await;
    let deploy = async |source, stages| {
        let reply = cluster.operator.deploy("m", source, stages).await;
        refusal(reply)
    };
    let too_large =
        shoal_protocol::plan::PretendSpec { layer_weight_bytes: 200 << 20, ..pretend() };
    let error = deploy(ModelSource::Pretend(too_large), None).await;
    assert_eq!(error.code, ErrorCode::DoesNotFit);
    for words in ["stage 1, layers 3..6, needs at least", "w2 has 420.0 MiB", "1 more worker"] {
        assert!(error.message.contains(words), "{error}");
    }
    let error = deploy(ModelSource::Pretend(pretend()), Some(3)).await;
    assert_eq!(error.code, ErrorCode::DoesNotFit);
    let error = deploy(ModelSource::Folder { path: "models/m".into() }, None).await;
    assert_eq!(error.code, ErrorCode::InvalidRequest);
    let error = deploy(ModelSource::Folder { path: "/nowhere/at/all".into() }, None).await;
    assert_eq!(error.code, ErrorCode::BadModel);
    assert!(error.message.contains("/nowhere/at/all"), "{error}");
    let error = deploy(ModelSource::Builtin { name: "nemo".into() }, None).await;
    assert_eq!(error.code, ErrorCode::NotFound);

    let cannot = WireError::new(ErrorCode::BadModel, "no such folder");
    let manners = Manners { incarnation: 2, cannot_read: Some(cannot), ..Manners::default() };
    let blind = cluster.connect(1, manners).await.unwrap();
    let error = deploy(ModelSource::Pretend(pretend()), None).await;
    assert_eq!(error.code, ErrorCode::BadModel);
    assert!(error.message.starts_with("w2 cannot read"), "{error}");
    assert_eq!(cluster.coordinator.view().deployments, []);
    blind.die();
}

/// Starts on an address that a coordinator of this very process has just given back: the socket is
/// closed by a task of its own.
async fn start_when_free(config: CoordinatorConfig) -> Coordinator {
    within("the second start", async {
        loop {
            match start(config.clone()).await {
                Ok(coordinator) => return coordinator,
                Err(StartError::Cluster(_)) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_coordinator_that_starts_again_finds_everything_and_disturbs_nothing() {
    let mut cluster = Cluster::with_workers(2).await;
    cluster.deploy_and_wait(1).await;
    let token = cluster.operator.token(Role::Worker, 1, 3600).await;
    let address = cluster.coordinator.cluster_address();
    let Cluster { coordinator, identities, mut workers, data, .. } = cluster;
    within("the drain", coordinator.drain()).await;
    workers.drain(..).for_each(FakeWorker::die);

    let again =
        shoal_coordinator::config::CoordinatorConfig { cluster: address, ..config(data.path()) };
    let coordinator = start_when_free(again).await;
    let operator = Operator::of(&coordinator);
    let view = until(&coordinator, "shown", |view| !view.deployments.is_empty()).await;
    assert_eq!(deployment(&view, "m").unwrap().phase, DeploymentPhase::Loading);
    assert_eq!(view.workers.len(), 2);
    cluster = Cluster { coordinator, operator, identities, workers: Vec::new(), data };
    // The same processes, under the old CA: the layout stays what it was.
    for index in 0..2 {
        let worker = cluster.connect(index, Manners::default()).await.unwrap();
        cluster.workers.push(worker);
    }
    cluster.until_ready(1).await;
    // A token from before, and the next number.
    assert_eq!(try_join(address, &token).await.unwrap().node, NodeId::worker(3));
}

#[tokio::test]
async fn a_start_that_cannot_be_is_an_error_that_says_what_to_do() {
    let cluster = Cluster::with_workers(0).await;
    let other = tempfile::tempdir().unwrap();
    let check = async |config, words: &str| {
        let error = start(config).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains(words), "{text}");
        error
    };
    let mut open = config(other.path());
    open.listen = ([0, 0, 0, 0], 8000).into();
    check(open, "there is no API key").await;
    let mut busy = config(other.path());
    busy.listen = cluster.coordinator.api_address();
    check(busy, "`:0` as the port picks a free one").await;
    let mut busy = config(other.path());
    busy.cluster = cluster.coordinator.cluster_address();
    check(busy, "`:0` as the port picks a free one").await;
    check(config(cluster.data.path()), "another coordinator is running on this data folder").await;

    let Cluster { coordinator, data, .. } = cluster;
    within("the drain", coordinator.drain()).await;
    std::fs::remove_file(data.path().join("state.redb")).unwrap();
    let error = check(config(data.path()), "has an identity but not the cluster's state").await;
    assert!(matches!(error, StartError::Incomplete { .. }));
}

#[tokio::test]
async fn an_api_listens_for_others_once_there_is_a_good_key() {
    let cluster = Cluster::with_workers(0).await;
    let name = KeyName::new("alice").unwrap();
    let access =
        async |operator: &Operator, call| match operator.call(AdminCall::Access(call)).await {
            AdminReply::Access(reply) => Ok(reply),
            other => Err(refusal(other).code),
        };
    let create = |limits| AccessCall::CreateKey { name: name.clone(), limits, expires_s: None };
    let made = access(&cluster.operator, create(KeyLimits::default())).await.unwrap();
    let AccessReply::Key { secret } = made else { panic!("no key") };
    assert!(secret.starts_with("sk-shoal-") && secret.len() == 73, "{secret}");
    let again = access(&cluster.operator, create(KeyLimits::default())).await;
    assert_eq!(again, Err(ErrorCode::AlreadyExists));
    let none = KeyLimits { requests_per_minute: Some(0), concurrent: None };
    let bad =
        AccessCall::CreateKey { name: KeyName::new("b").unwrap(), limits: none, expires_s: None };
    assert_eq!(access(&cluster.operator, bad).await, Err(ErrorCode::InvalidRequest));
    let Cluster { coordinator, data, .. } = cluster;
    within("the drain", coordinator.drain()).await;

    // The secret is nowhere on the disk.
    for file in std::fs::read_dir(data.path()).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        let parts = [secret.as_bytes(), &secret.as_bytes()[9..]];
        assert!(!parts.iter().any(|part| bytes.windows(part.len()).any(|w| w == *part)));
    }
    let mut public = config(data.path());
    public.listen = ([0, 0, 0, 0], 0).into();
    let coordinator = start(public.clone()).await.unwrap();
    let operator = Operator::of(&coordinator);
    let revoke = AccessCall::RevokeKey { name: name.clone() };
    assert_eq!(access(&operator, revoke.clone()).await, Ok(AccessReply::Done));
    assert_eq!(access(&operator, revoke).await, Err(ErrorCode::InvalidRequest));
    let listed = access(&operator, AccessCall::ListKeys).await.unwrap();
    let AccessReply::Keys(keys) = listed else { panic!("no list") };
    assert_eq!(keys.len(), 1);
    assert!(keys[0].standing == KeyStanding::Revoked && keys[0].revoked_s.is_some());
    within("the drain", coordinator.drain()).await;
    let error = start(public).await.unwrap_err();
    assert!(matches!(error, StartError::NotLoopback { .. }), "{error}");
}

#[tokio::test]
async fn keys_are_for_their_owner_alone() {
    use std::os::unix::fs::PermissionsExt;

    let cluster = Cluster::with_workers(0).await;
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&cluster.data.path().join("ca.key")) & 0o777, 0o600);
    assert_eq!(mode(cluster.coordinator.admin_context()) & 0o777, 0o600);
}

#[tokio::test]
async fn a_worker_renews_its_certificate_for_its_own_key_alone() {
    let cluster = Cluster::with_workers(2).await;
    let [mine, other] = [&cluster.identities[0], &cluster.identities[1]];
    let ask = async |csr| {
        let manners = Manners { renew: Some(csr), ..Manners::default() };
        cluster.connect(0, manners).await.unwrap()
    };
    let mut worker = ask(mine.renewal_request().unwrap()).await;
    let renewed = within("the renewal", worker.renewed.wait_for(Option::is_some)).await;
    let certificate = renewed.unwrap().clone().unwrap();
    let renewed = mine.renewed(certificate.clone()).unwrap();
    assert_ne!(renewed.certificate, mine.certificate);
    assert!(other.renewed(certificate).is_err(), "w2 took the certificate of w1");
    // It is good for the next conversation.
    let address = cluster.coordinator.cluster_address();
    FakeWorker::connect(address, &renewed, Manners::default()).await.unwrap();

    // A key that is not on record ends the conversation.
    let mut thief = ask(other.renewal_request().unwrap()).await;
    assert!(within("the end", thief.renewed.wait_for(Option::is_some)).await.is_err());
}
