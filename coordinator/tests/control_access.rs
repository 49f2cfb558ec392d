//! Who belongs to a cluster, over real sockets: nodes that come back after a week, and nodes that are
//! told to go.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod control_support;

use std::time::{Duration, SystemTime};

use control_support::*;
use shoal_coordinator::Coordinator;
use shoal_protocol::access::{AccessCall, AccessReply};
use shoal_protocol::admin::{AdminCall, AdminReply, DeploymentPhase};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{Generation, NodeId, Role};
use shoal_protocol::plan::ModelSource;
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_protocol::quic::join::JoinError;
use shoal_protocol::quic::renew::{RenewError, is_due, renew};
use shoal_protocol::quic::{Alpn, Expect, Identity};

const WEEK: Duration = Duration::from_secs(7 * 86_400);

struct Cluster {
    coordinator: Coordinator,
    operator: Operator,
    identities: Vec<Identity>,
    data: tempfile::TempDir,
}

impl Cluster {
    async fn with_identities(n: u32) -> Self {
        let data = tempfile::tempdir().unwrap();
        let coordinator = start(config(data.path())).await.unwrap();
        let operator = Operator::of(&coordinator);
        let mut identities = Vec::new();
        for _ in 0..n {
            let token = operator.token(Role::Worker, 1, 3600).await;
            identities.push(try_join(coordinator.cluster_address(), &token).await.unwrap());
        }
        Self { coordinator, operator, identities, data }
    }

    async fn access(&self, call: AccessCall) -> Result<AccessReply, WireError> {
        match self.operator.call(AdminCall::Access(call)).await {
            AdminReply::Access(reply) => Ok(reply),
            other => Err(refusal(other)),
        }
    }

    async fn connect(&self, identity: &Identity) -> Result<FakeWorker, WireError> {
        let address = self.coordinator.cluster_address();
        FakeWorker::connect(address, identity, Manners::default()).await
    }

    async fn renew(&self, identity: &Identity) -> Result<Identity, RenewError> {
        let address = self.coordinator.cluster_address();
        within("the renewal", renew(address, identity, DEADLINE)).await
    }

    async fn remove(&self, node: NodeId, force: bool) -> Result<AccessReply, WireError> {
        self.access(AccessCall::RemoveNode { node, force }).await
    }

    /// The same node with a certificate of a week ago.
    fn a_week_old(&self, identity: &Identity) -> Identity {
        let ca = CertificateAuthority::load(&self.data.path().join("ca.key")).unwrap().unwrap();
        let csr = identity.renewal_request().unwrap();
        let old = ca.issue(&csr, identity.node, SystemTime::now() - WEEK).unwrap();
        identity.renewed(old).unwrap()
    }

    /// Why the coordinator ends a conversation that this node begins.
    async fn turned_away(&self, identity: &Identity, alpn: Alpn) -> String {
        let endpoint = endpoint(identity.clone());
        let expect = Expect::Role(Role::Coordinator);
        let address = self.coordinator.cluster_address();
        let connection = endpoint.connect(address, expect, alpn, DEADLINE).await.unwrap();
        within("the end", connection.closed()).await.to_string()
    }
}

#[tokio::test]
async fn a_cluster_that_was_off_for_a_week_comes_back_by_itself() {
    let cluster = Cluster::with_identities(2).await;
    let old: Vec<Identity> = cluster.identities.iter().map(|i| cluster.a_week_old(i)).collect();
    let Cluster { coordinator, identities, data, .. } = cluster;
    within("the drain", coordinator.drain()).await;
    // Its own certificate and its operator's are made anew at each start.
    let coordinator = start(config(data.path())).await.unwrap();
    let operator = Operator::of(&coordinator);
    let cluster = Cluster { coordinator, operator, identities, data };

    for (old, fresh) in old.iter().zip(&cluster.identities) {
        assert!(is_due(old, SystemTime::now()) && !is_due(fresh, SystemTime::now()));
        let reason = cluster.turned_away(old, Alpn::Control).await;
        assert!(reason.contains("certificate"), "{}: {reason}", old.node);
        let renewed = cluster.renew(old).await.unwrap();
        assert_eq!((renewed.node, &renewed.key), (old.node, &old.key));
        assert!(!is_due(&renewed, SystemTime::now()));
        cluster.connect(&renewed).await.unwrap().die();
    }
}

#[tokio::test]
async fn an_expired_certificate_is_renewed_for_the_key_on_record_alone() {
    let cluster = Cluster::with_identities(2).await;
    let [mine, other] = [&cluster.identities[0], &cluster.identities[1]];
    let refused = async |identity: &Identity| match cluster.renew(identity).await {
        Err(RenewError::Refused(error)) => error.code,
        other => panic!("not refused: {other:?}"),
    };
    // Who has w2's key says that it is w1.
    let posing = Identity { node: mine.node, ..other.clone() };
    assert_eq!(refused(&posing).await, ErrorCode::PermissionDenied);
    let nobody = Identity { node: NodeId::worker(77), ..mine.clone() };
    assert_eq!(refused(&nobody).await, ErrorCode::NotFound);
    // The coordinator's own identity is on record with the CA, not with a key that anybody has.
    let coordinator = Identity { node: NodeId::coordinator(1), ..mine.clone() };
    assert_eq!(refused(&coordinator).await, ErrorCode::PermissionDenied);

    // Another cluster's coordinator is asked nothing.
    let stranger = Cluster::with_identities(0).await;
    let elsewhere = stranger.renew(mine).await;
    assert!(matches!(elsewhere, Err(RenewError::Connect(_))), "{elsewhere:?}");

    cluster.remove(mine.node, false).await.unwrap();
    match cluster.renew(mine).await {
        Err(RenewError::Removed(why)) => {
            assert!(why.message.starts_with("w1 was removed from this cluster"), "{why}");
        }
        other => panic!("it is not told: {other:?}"),
    }
}

#[tokio::test]
async fn a_removed_worker_is_out_at_once_and_its_layers_go_elsewhere() {
    let cluster = Cluster::with_identities(3).await;
    let mut workers = Vec::new();
    for identity in &cluster.identities {
        workers.push(cluster.connect(identity).await.unwrap());
    }
    let deployed = cluster.operator.deploy("m", ModelSource::Pretend(pretend()), None).await;
    assert_eq!(deployed, AdminReply::Accepted);
    let ready = async |generation| {
        until(&cluster.coordinator, "ready", |view| {
            deployment(view, "m").is_some_and(|m| m.phase == DeploymentPhase::Ready)
                && view.plan.replicas[0].generation == Generation(generation)
        })
        .await
    };
    ready(1).await;
    let w2 = NodeId::worker(2);
    let error = cluster.remove(w2, false).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidRequest);
    for words in ["computes layers of m", "shoal drain w2", "--force"] {
        assert!(error.message.contains(words), "{error}");
    }

    cluster.remove(w2, true).await.unwrap();
    within("the end of its link", workers[1].gone()).await;
    let view = ready(2).await;
    let nodes: Vec<_> = view.plan.replicas[0].nodes().collect();
    assert_eq!(nodes, [NodeId::worker(1), NodeId::worker(3)]);
    assert!(view.workers.iter().all(|worker| worker.id != w2));

    // Its certificate is good for hours and opens nothing.
    let reason = cluster.turned_away(&cluster.identities[1], Alpn::Control).await;
    assert!(reason.contains("removed"), "{reason}");
    assert_eq!(cluster.remove(w2, true).await.unwrap_err().code, ErrorCode::NotFound);
    // Its number is never given again.
    let token = cluster.operator.token(Role::Worker, 1, 3600).await;
    let address = cluster.coordinator.cluster_address();
    assert_eq!(try_join(address, &token).await.unwrap().node, NodeId::worker(4));
    let listed = cluster.access(AccessCall::ListNodes).await.unwrap();
    let AccessReply::Nodes(nodes) = listed else { panic!("{listed:?}") };
    let shown: Vec<_> = nodes.iter().map(|n| (n.node.to_string(), n.connected, n.placed)).collect();
    let expected = [
        ("c1", Some(true), false),
        ("w1", Some(true), true),
        ("w3", Some(true), true),
        ("w4", Some(false), false),
        ("a1", None, false),
    ];
    let expected = expected.map(|(node, connected, placed)| (node.to_owned(), connected, placed));
    let sorted = |mut nodes: Vec<(String, Option<bool>, bool)>| {
        nodes.sort();
        nodes
    };
    assert_eq!(sorted(shown), sorted(expected.to_vec()));
    // It knows the same by itself.
    let known = cluster.access(AccessCall::ListNodesKnown).await.unwrap();
    let AccessReply::NodesKnown(known) = known else { panic!("{known:?}") };
    assert_eq!((known.nodes, known.no_majority), (nodes, None));
    assert!(known.as_of_s > 0);
}

#[tokio::test]
async fn where_nobody_can_take_a_removed_workers_place_the_others_let_go_too() {
    let cluster = Cluster::with_identities(2).await;
    let mut first = cluster.connect(&cluster.identities[0]).await.unwrap();
    let _second = cluster.connect(&cluster.identities[1]).await.unwrap();
    cluster.operator.deploy("m", ModelSource::Pretend(pretend()), None).await;
    first.until_told(|told| !told.is_empty()).await;
    // 600 MiB do not fit into the one that is left.
    cluster.remove(NodeId::worker(2), true).await.unwrap();
    first.until_told(<[_]>::is_empty).await;
    until(&cluster.coordinator, "waiting", |view| {
        deployment(view, "m").is_some_and(|m| {
            m.phase == DeploymentPhase::Waiting && m.reason.starts_with("w2 was removed")
        })
    })
    .await;
}

#[tokio::test]
async fn a_removed_admin_is_out_and_the_clusters_own_nodes_stay() {
    let cluster = Cluster::with_identities(0).await;
    let token = cluster.operator.token(Role::Admin, 1, 3600).await;
    let address = cluster.coordinator.cluster_address();
    let admin = try_join(address, &token).await.unwrap();
    let endpoint = endpoint(admin.clone());
    let expect = Expect::Role(Role::Coordinator);
    let open = endpoint.connect(address, expect, Alpn::Admin, DEADLINE).await.unwrap();
    cluster.remove(admin.node, false).await.unwrap();
    let reason = within("the end", open.closed()).await.to_string();
    assert!(reason.contains("removed"), "{reason}");
    assert!(cluster.turned_away(&admin, Alpn::Admin).await.contains("removed"));
    for node in [NodeId::coordinator(1), NodeId::admin(1)] {
        let error = cluster.remove(node, true).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidRequest, "{error}");
    }
}

#[tokio::test]
async fn a_token_that_was_taken_back_lets_nobody_in() {
    let cluster = Cluster::with_identities(0).await;
    let keep = cluster.operator.token(Role::Worker, 3, 3600).await;
    let gone = cluster.operator.token(Role::Worker, 1, 3600).await;
    let list = async || match cluster.access(AccessCall::ListTokens).await.unwrap() {
        AccessReply::Tokens(tokens) => tokens,
        other => panic!("{other:?}"),
    };
    let tokens = list().await;
    assert_eq!(tokens.iter().map(|token| token.uses_left).collect::<Vec<_>>(), [3, 1]);
    assert!(tokens.iter().all(|token| token.id.len() == 12 && token.role == Role::Worker));
    let revoke = async |id: &str| cluster.access(AccessCall::RevokeToken { id: id.into() }).await;
    revoke(&tokens[1].id).await.unwrap();
    assert_eq!(revoke(&tokens[1].id).await.unwrap_err().code, ErrorCode::NotFound);
    assert_eq!(revoke("").await.unwrap_err().code, ErrorCode::NotFound);
    assert_eq!(list().await, tokens[..1]);

    let address = cluster.coordinator.cluster_address();
    match try_join(address, &gone).await {
        Err(JoinError::Refused(error)) => assert_eq!(error.code, ErrorCode::BadToken),
        other => panic!("let in: {other:?}"),
    }
    try_join(address, &keep).await.unwrap();
    assert_eq!(list().await[0].uses_left, 2);
}
