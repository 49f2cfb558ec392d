//! Every message with which a conversation with a coordinator can begin, said by every role: those who
//! may not say it are refused, and nothing is answered.
//!
//! Each list is also a `match` without a wildcard: a new variant does not compile here before somebody
//! has said who may send it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![allow(dead_code, reason = "not every test needs all of the support")]

mod control_support;

use control_support::*;
use serde::Serialize;
use shoal_coordinator::Coordinator;
use shoal_protocol::access::{AccessCall, AccessReply, KeyLimits, KeyName};
use shoal_protocol::adapters::AdapterCall;
use shoal_protocol::admin::{AdminCall, AdminReply, AdminRequest};
use shoal_protocol::control::{CoordinatorMessage, Report, WorkerMessage};
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{DeploymentName, Incarnation, NodeId, Role};
use shoal_protocol::join::{JoinReply, JoinRequest, RenewRequest};
use shoal_protocol::mesh::MeshAsk;
use shoal_protocol::peer::{PeerHello, PeerReply, PeerRequest};
use shoal_protocol::plan::{ModelSource, StagesAsked};
use shoal_protocol::quic::{Alpn, Connection, Expect, Identity};
use shoal_protocol::upgrade::UpgradeCall;
use shoal_protocol::version::VersionRange;

/// Examples of a closed list: one for each variant, which the compiler counts.
macro_rules! every {
    ($type:ty { $($pattern:pat => $example:expr),+ $(,)? }) => {{
        let known = |message: &$type| match message { $($pattern => ()),+ };
        let all: Vec<$type> = vec![$($example),+];
        all.iter().for_each(known);
        $(assert!(all.iter().any(|message| matches!(message, $pattern)));)+
        all
    }};
}

const ROLES: [Role; 3] = [Role::Coordinator, Role::Worker, Role::Admin];

/// A cluster of one, and a member of each role that is not it.
struct Cast {
    coordinator: Coordinator,
    operator: Operator,
    members: Vec<Identity>,
    _data: tempfile::TempDir,
}

impl Cast {
    async fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        let coordinator = start(config(data.path())).await.unwrap();
        let operator = Operator::of(&coordinator);
        let mut members = Vec::new();
        for role in ROLES {
            let token = operator.token(role, 1, 3600).await;
            members.push(try_join(coordinator.cluster_address(), &token).await.unwrap());
        }
        Self { coordinator, operator, members, _data: data }
    }

    fn of(&self, role: Role) -> &Identity {
        self.members.iter().find(|identity| identity.node.role == role).unwrap()
    }

    async fn connect(&self, role: Role, alpn: Alpn) -> Connection {
        let client = endpoint(self.of(role).clone());
        let (address, expect) =
            (self.coordinator.cluster_address(), Expect::Role(Role::Coordinator));
        client.connect(address, expect, alpn, DEADLINE).await.unwrap()
    }

    /// What comes of a message at the beginning of a conversation: an answer, or the words with which
    /// the connection was ended.
    async fn say<M: Serialize, R: serde::de::DeserializeOwned>(
        &self,
        role: Role,
        alpn: Alpn,
        message: &M,
    ) -> Result<R, String> {
        let max = shoal_protocol::control::MESSAGE_LEN_MAX;
        let connection = self.connect(role, alpn).await;
        let exchange = async {
            let (mut sender, mut receiver) = connection.open_bi().await.ok()?;
            sender.send_message(message, max).await.ok()?;
            receiver.message::<R>(max).await.ok()?
        };
        match within("an answer or an end", exchange).await {
            Some(answer) => Ok(answer),
            None => Err(within("the end", connection.closed()).await.to_string()),
        }
    }

    /// Nobody but `may` is answered.
    async fn refused<M, R>(&self, alpn: Alpn, message: &M, may: Role)
    where
        M: Serialize + std::fmt::Debug,
        R: serde::de::DeserializeOwned + std::fmt::Debug,
    {
        for role in ROLES.into_iter().filter(|role| *role != may) {
            let said: Result<R, String> = self.say(role, alpn, message).await;
            let why = said.expect_err("it was answered");
            assert!(why.contains("not allowed"), "{role}, {message:?}: {why}");
        }
    }

    async fn nodes(&self) -> usize {
        match self.operator.call(AdminCall::Access(AccessCall::ListNodes)).await {
            AdminReply::Access(AccessReply::Nodes(nodes)) => nodes.len(),
            other => panic!("{other:?}"),
        }
    }
}

fn name() -> DeploymentName {
    DeploymentName::new("m").unwrap()
}

fn access_calls() -> Vec<AccessCall> {
    let (key, node) = (KeyName::new("k").unwrap(), NodeId::worker(1));
    every!(AccessCall {
        AccessCall::CreateKey { .. } => AccessCall::CreateKey {
            name: key.clone(),
            limits: KeyLimits::default(),
            expires_s: None,
        },
        AccessCall::ListKeys => AccessCall::ListKeys,
        AccessCall::RevokeKey { .. } => AccessCall::RevokeKey { name: key.clone() },
        AccessCall::ListTokens => AccessCall::ListTokens,
        AccessCall::RevokeToken { .. } => AccessCall::RevokeToken { id: "00".into() },
        AccessCall::ListNodes => AccessCall::ListNodes,
        AccessCall::RemoveNode { .. } => AccessCall::RemoveNode { node, force: true },
        AccessCall::RotateCa { .. } => AccessCall::RotateCa { skip_absent: true },
        AccessCall::ListCas => AccessCall::ListCas,
        AccessCall::RenewAdmin { .. } => AccessCall::RenewAdmin { csr: vec![1] },
        AccessCall::ListNodesKnown => AccessCall::ListNodesKnown,
    })
}

fn admin_calls() -> Vec<AdminCall> {
    let mut calls = every!(AdminCall {
        AdminCall::Status => AdminCall::Status,
        AdminCall::Watch => AdminCall::Watch,
        AdminCall::Deploy { .. } => AdminCall::Deploy {
            name: name(),
            source: ModelSource::Pretend(pretend()),
            stages: None,
            precision: None,
            replicas: 1,
        },
        AdminCall::Undeploy { .. } => AdminCall::Undeploy { name: name() },
        AdminCall::CreateToken { .. } =>
            AdminCall::CreateToken { role: Role::Admin, uses: 1, expires_s: 60 },
        AdminCall::ExplainPlan { .. } => AdminCall::ExplainPlan { name: name() },
        AdminCall::ChangeVoters { .. } =>
            AdminCall::ChangeVoters { add: vec![NodeId::coordinator(2)], remove: vec![] },
        AdminCall::Access(_) => AdminCall::Access(AccessCall::ListKeys),
        AdminCall::Scale { .. } => AdminCall::Scale {
            name: name(),
            replicas: Some(2),
            stages: StagesAsked::Same,
            dry_run: true,
        },
        AdminCall::Drain { .. } =>
            AdminCall::Drain { node: NodeId::worker(1), draining: true, dry_run: true },
        AdminCall::Upgrade(_) => AdminCall::Upgrade(UpgradeCall::Finish),
        AdminCall::DeployMesh { .. } => AdminCall::DeployMesh {
            name: name(),
            source: ModelSource::Pretend(pretend()),
            precision: None,
            replicas: 1,
            ask: MeshAsk::default(),
        },
        AdminCall::ScaleMesh { .. } => AdminCall::ScaleMesh {
            name: name(),
            replicas: Some(2),
            ask: MeshAsk::default(),
            dry_run: true,
        },
        AdminCall::Adapters(_) => AdminCall::Adapters(AdapterCall::Unload { name: name() }),
        AdminCall::Presence => AdminCall::Presence,
    });
    calls.extend(access_calls().into_iter().map(AdminCall::Access));
    calls
}

#[tokio::test]
async fn no_admin_call_is_answered_but_to_an_admin() {
    let cast = Cast::new().await;
    let before = cast.nodes().await;
    for call in admin_calls() {
        let request = AdminRequest { versions: VersionRange::OURS, call };
        cast.refused::<_, AdminReply>(Alpn::Admin, &request, Role::Admin).await;
    }
    // Nothing of it was done.
    assert_eq!(cast.nodes().await, before);
    let tokens = cast.operator.call(AdminCall::Access(AccessCall::ListTokens)).await;
    assert_eq!(tokens, AdminReply::Access(AccessReply::Tokens(vec![])));
    let keys = cast.operator.call(AdminCall::Access(AccessCall::ListKeys)).await;
    assert_eq!(keys, AdminReply::Access(AccessReply::Keys(vec![])));
}

fn hello(node: NodeId) -> PeerHello {
    PeerHello {
        versions: VersionRange::OURS,
        node,
        incarnation: Incarnation(1),
        boot: 1,
        cluster: ([127, 0, 0, 1], 9).into(),
        build: "test".into(),
    }
}

#[tokio::test]
async fn no_request_of_a_coordinator_is_answered_but_to_a_coordinator() {
    let cast = Cast::new().await;
    let (versions, other) = (VersionRange::OURS, NodeId::coordinator(1));
    let ca = cast.of(Role::Coordinator).shows();
    let requests = every!(PeerRequest {
        PeerRequest::Log(_) => PeerRequest::Log(hello(other)),
        PeerRequest::CaKey { .. } => PeerRequest::CaKey { versions },
        PeerRequest::CaKeyOf { .. } => PeerRequest::CaKeyOf { versions, ca },
    });
    for request in requests {
        cast.refused::<_, PeerReply>(Alpn::Raft, &request, Role::Coordinator).await;
        // And a coordinator that does not vote, or says that it is another one, is refused by words.
        let said: Result<PeerReply, String> =
            cast.say(Role::Coordinator, Alpn::Raft, &request).await;
        match said.unwrap() {
            PeerReply::Refused(error) => assert!(
                [ErrorCode::NotReady, ErrorCode::InvalidRequest].contains(&error.code),
                "{request:?}: {error}"
            ),
            other => panic!("{request:?} was answered with {other:?}"),
        }
    }
}

#[tokio::test]
async fn nothing_a_worker_says_is_heard_but_from_a_worker_that_has_registered() {
    let cast = Cast::new().await;
    let identity = cast.of(Role::Worker).clone();
    let register = register(&identity, &endpoint(identity.clone()), &Manners::default());
    let messages = every!(WorkerMessage {
        WorkerMessage::Register(_) => WorkerMessage::Register(register.clone()),
        WorkerMessage::Report(_) => WorkerMessage::Report(Report::default()),
        WorkerMessage::Probed { .. } => WorkerMessage::Probed { probe: 1, result: Ok([0; 32]) },
        WorkerMessage::Renew { .. } =>
            WorkerMessage::Renew { csr: identity.renewal_request().unwrap() },
        WorkerMessage::Outranked { .. } => WorkerMessage::Outranked { epoch: u64::MAX },
        WorkerMessage::Trusts { .. } =>
            WorkerMessage::Trusts { trusts: vec![], shows: identity.shows() },
        WorkerMessage::Facts(_) => WorkerMessage::Facts(vec![]),
        WorkerMessage::Blobs { .. } =>
            WorkerMessage::Blobs { address: ([127, 0, 0, 1], 1).into(), news: vec![] },
        WorkerMessage::Adapters(_) => WorkerMessage::Adapters(vec![]),
        WorkerMessage::Prefixes(_) => WorkerMessage::Prefixes(vec![]),
    });
    for message in messages {
        cast.refused::<_, CoordinatorMessage>(Alpn::Control, &message, Role::Worker).await;
        let said: Result<CoordinatorMessage, String> =
            cast.say(Role::Worker, Alpn::Control, &message).await;
        match (&message, said) {
            (WorkerMessage::Register(_), Ok(CoordinatorMessage::Welcome { .. })) => {}
            (WorkerMessage::Register(_), other) => panic!("not registered: {other:?}"),
            (_, Ok(answer)) => panic!("{message:?} was answered with {answer:?}"),
            (_, Err(why)) => assert!(why.contains("is not its registration"), "{message:?}: {why}"),
        }
    }
    // Nobody registers as somebody else.
    let posing = register_as(register, NodeId::worker(9));
    let said: Result<CoordinatorMessage, String> =
        cast.say(Role::Worker, Alpn::Control, &WorkerMessage::Register(posing)).await;
    match said.unwrap() {
        CoordinatorMessage::Refused(error) => assert_eq!(error.code, ErrorCode::PermissionDenied),
        other => panic!("{other:?}"),
    }
}

fn register_as(
    register: shoal_protocol::control::Register,
    node: NodeId,
) -> shoal_protocol::control::Register {
    shoal_protocol::control::Register { node, ..register }
}

/// Strangers may begin these; what lets them in is a secret, or a key on record, whatever their role.
#[tokio::test]
async fn whoever_has_neither_a_token_nor_the_key_on_record_gets_no_certificate() {
    let cast = Cast::new().await;
    let versions = VersionRange::OURS;
    for role in ROLES {
        let csr = cast.of(role).renewal_request().unwrap();
        let joins = JoinRequest { versions, secret: [9; 32], csr: csr.clone() };
        match cast.say::<_, JoinReply>(role, Alpn::Join, &joins).await.unwrap() {
            JoinReply::Refused(error) => assert_eq!(error.code, ErrorCode::BadToken),
            other => panic!("{other:?}"),
        }
        for other in ROLES.into_iter().filter(|other| *other != role) {
            let renews = RenewRequest { versions, node: cast.of(other).node, csr: csr.clone() };
            match cast.say::<_, JoinReply>(role, Alpn::Renew, &renews).await.unwrap() {
                JoinReply::Refused(error) => assert_eq!(error.code, ErrorCode::PermissionDenied),
                other => panic!("{other:?}"),
            }
        }
    }
}

/// A coordinator takes no requests and no activations: TLS agrees on neither.
#[tokio::test]
async fn conversations_that_a_coordinator_does_not_hold_do_not_begin() {
    let cast = Cast::new().await;
    let held = |alpn: &Alpn| match alpn {
        Alpn::Control | Alpn::Admin | Alpn::Join | Alpn::Renew | Alpn::Raft => true,
        Alpn::Requests | Alpn::Activations | Alpn::Blobs => false,
    };
    for alpn in Alpn::ALL.into_iter().filter(|alpn| !held(alpn)) {
        for role in ROLES {
            let client = endpoint(cast.of(role).clone());
            let (address, expect) =
                (cast.coordinator.cluster_address(), Expect::Role(Role::Coordinator));
            assert!(client.connect(address, expect, alpn, DEADLINE).await.is_err());
        }
    }
}
