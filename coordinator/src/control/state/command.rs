//! The closed list of commands: who may issue each, and when it is legal.
//!
//! | command | issued by | legal when |
//! |---|---|---|
//! | [`NodeCommand::Enrol`] | a coordinator, for itself and for its operator's certificate | always |
//! | [`NodeCommand::Join`] | a coordinator, for whoever shows a join token | the token is known, not expired, not used up |
//! | [`NodeCommand::Start`] | a coordinator, when a worker registers | the node is known, the incarnation not older than the last one |
//! | [`TokenCommand::Create`] | an admin | uses and expiry within bounds |
//! | [`DeploymentCommand::Create`] | an admin | the name is free |
//! | [`DeploymentCommand::Remove`] | an admin | the name is taken |
//! | [`CoordinatorCommand::Announce`] | a coordinator, for itself or for one that has connected to it | the node is known, its start is not older than the last one |
//! | [`CoordinatorCommand::SetVoters`] | an admin | all have announced themselves; 1, 3 or 5 |
//! | [`CoordinatorCommand::KeyReceived`] | a coordinator, for itself | it has announced itself |
//! | [`CoordinatorCommand::Remove`] | an admin | it does not vote |
//! | [`DeploymentCommand::Scale`] | an admin | the name is taken, the number of replicas within bounds |
//! | [`DeploymentCommand::CreateMesh`], [`DeploymentCommand::ScaleMesh`] | an admin | as `Create` and `Scale`, and all coordinators speak version 3 |
//! | [`PlanCommand::Adopt`] | the reconciler | the generation is newer than the last one, the layout is whole, its workers are known |
//! | [`NodeCommand::Remove`] | an admin | the node is known, no coordinator, and not the cluster's own admin |
//! | [`TokenCommand::Revoke`] | an admin | the token is known |
//! | [`KeyCommand::Create`] | an admin | no good key has the name, no key ever had the hash, limits and expiry within bounds |
//! | [`KeyCommand::Revoke`] | an admin | the key is known and not revoked yet |
//! | [`PlanCommand::Prepare`] | the reconciler | the same, and there is a layout that serves meanwhile |
//! | [`PlanCommand::Promote`], [`PlanCommand::Abandon`] | the reconciler | the generation is the one that was prepared |
//! | [`PlanCommand::Confirm`] | the reconciler | the generation is the one that serves |
//! | [`DrainCommand::Begin`], [`DrainCommand::End`] | an admin | the node is a worker of this cluster |
//! | [`VersionCommand::Raise`] | the leader, when it has heard all coordinators | those it heard are those there are, and none was started since |
//! | [`VersionCommand::Start`] | a coordinator, when a worker registers | as `NodeCommand::Start`, and all coordinators speak version 2 |
//! | [`VersionCommand::Finish`] | an admin | every member speaks the version |
//! | [`AuthorityCommand`] | an admin begins; the leader; a coordinator, for itself | the rotation is to that CA, and not further than this |
//! | [`AdapterCommand::Load`] | an admin | the deployment is there, the name is free, not too many, everybody speaks version 3 |
//! | [`AdapterCommand::Unload`] | an admin | the adapter is there |
//!
//! Besides, each needs that those whom it concerns understand it ([`needs`](super::versions::needs)). A
//! command keeps its shape for ever; a new one stands at the end of its enum.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use shoal_protocol::access::KeyName;
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{
    AdapterId, DeploymentName, Generation, Incarnation, NodeId, PlanRevision, ReplicaId, Role,
};
use shoal_protocol::trust::CaFingerprint;

pub use super::too_many::{Advice, Noun};
use super::{
    AdapterCommand, AuthorityCommand, CoordinatorCommand, DeploymentCommand, DrainCommand,
    KeyCommand, NodeCommand, PlanCommand, TokenCommand, VersionCommand, versions,
};

/// Seconds since 1970, UTC, as the proposer's clock had it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// The stamp of a point in time that a shell has read off its clock; before 1970 counts as 1970.
    pub fn of(time: SystemTime) -> Self {
        Self(time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
    }
}

impl std::ops::Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration.as_secs()))
    }
}

/// One change of the replicated state, as it stands in the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// The coordinator that proposed it.
    pub client: NodeId,
    /// The start of that coordinator: one that was restarted does not know which of its commands are
    /// still on their way, so it begins a new count.
    pub incarnation: Incarnation,
    /// Grows with each command since that start.
    pub sequence: u64,
    /// When it was proposed.
    pub at: Timestamp,
    /// What is to change.
    pub change: Change,
}

/// What is to change, by noun.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant, reason = "few are alive at once")]
pub enum Change {
    /// Who belongs to the cluster.
    Node(NodeCommand),
    /// Who may join it.
    Token(TokenCommand),
    /// What is to be served.
    Deployment(DeploymentCommand),
    /// Where it is served.
    Plan(PlanCommand),
    /// Which coordinators there are.
    Coordinator(CoordinatorCommand),
    /// Who may use the public API.
    Key(KeyCommand),
    /// Which workers are to hold nothing.
    Drain(DrainCommand),
    /// Who speaks which version of the protocol.
    Version(VersionCommand),
    /// Which CAs are believed. For clusters of which everybody speaks version 2.
    Authority(AuthorityCommand),
    /// Which adapters are served. For clusters of which everybody speaks version 3.
    Adapter(AdapterCommand),
}

/// What has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Effect {
    /// A node has an identity.
    NodeAdded {
        /// The identity.
        node: NodeId,
    },
    /// A node runs under a new incarnation.
    NodeStarted {
        /// Which.
        node: NodeId,
        /// The incarnation.
        incarnation: Incarnation,
    },
    /// A token may be used.
    TokenCreated {
        /// What its users will be.
        role: Role,
    },
    /// A deployment is to be served.
    DeploymentCreated {
        /// Which.
        name: DeploymentName,
        /// The replica that it was given.
        replica: ReplicaId,
    },
    /// A deployment is no longer to be served.
    DeploymentRemoved {
        /// Which.
        name: DeploymentName,
    },
    /// A replica has a new layout.
    PlanAdopted {
        /// The revision of the whole plan.
        revision: PlanRevision,
        /// The replica.
        replica: ReplicaId,
        /// Its layout.
        generation: Generation,
    },
    /// A replica has no layout any more.
    PlanRemoved {
        /// The revision of the whole plan.
        revision: PlanRevision,
        /// The replica.
        replica: ReplicaId,
    },
    /// Other coordinators vote.
    VotersChanged {
        /// All of them.
        voters: Vec<NodeId>,
    },
    /// A node belongs to the cluster no longer.
    NodeRemoved {
        /// Which.
        node: NodeId,
    },
    /// The public API has a key more.
    KeyCreated {
        /// Which.
        name: KeyName,
    },
    /// A key opens nothing any more.
    KeyRevoked {
        /// Which.
        name: KeyName,
    },
    /// A token may not be used any more.
    TokenRevoked {
        /// What its users would have been.
        role: Role,
    },
    /// A deployment is to be served in another way.
    DeploymentScaled {
        /// Which.
        name: DeploymentName,
        /// The replicas that it was given.
        given: Vec<ReplicaId>,
        /// The replicas that were taken from it.
        taken: Vec<ReplicaId>,
    },
    /// A replica's next layout is to be made beside the one that serves.
    PlanPrepared {
        /// The revision of the whole plan.
        revision: PlanRevision,
        /// The replica.
        replica: ReplicaId,
        /// The layout that is to be made.
        generation: Generation,
    },
    /// A replica's next layout is given up; the one that serves goes on.
    PlanAbandoned {
        /// The revision of the whole plan.
        revision: PlanRevision,
        /// The replica.
        replica: ReplicaId,
        /// The layout that was given up.
        generation: Generation,
    },
    /// A replica's layout is as was asked for.
    PlanConfirmed {
        /// The replica.
        replica: ReplicaId,
    },
    /// A worker is to hold nothing, or may hold something again.
    DrainChanged {
        /// Which.
        node: NodeId,
        /// Whether it is to hold nothing.
        draining: bool,
    },
    /// All coordinators speak a newer version: the log may hold what it brought.
    ProtocolRaised {
        /// The version.
        to: u16,
    },
    /// Another CA is believed, signs, or is believed no more.
    AuthorityChanged {
        /// The one to come, or that has come.
        ca: CaFingerprint,
    },
    /// An adapter is to be served.
    AdapterLoaded {
        /// Which.
        name: DeploymentName,
        /// The number that it was given.
        id: AdapterId,
    },
    /// An adapter is served no more.
    AdapterUnloaded {
        /// Which.
        name: DeploymentName,
        /// The number that it had.
        id: AdapterId,
    },
}

/// Why a command was refused. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The client has sent newer commands since.
    #[error("{client} sent command {sequence} after command {last}; the newer one stands")]
    Superseded {
        /// The client.
        client: NodeId,
        /// What it sent now.
        sequence: u64,
        /// What it had sent before.
        last: u64,
    },
    /// No such node.
    #[error("{node} is not a node of this cluster; join it with a new token")]
    UnknownNode {
        /// Which.
        node: NodeId,
    },
    /// A process whose identity was started again since.
    #[error(
        "{node} registered as its start number {}, but start number {} has been seen: a newer process has this identity; end the older one", incarnation.0, last.0
    )]
    OldIncarnation {
        /// The identity.
        node: NodeId,
        /// What registered.
        incarnation: Incarnation,
        /// What had registered before.
        last: Incarnation,
    },
    /// Too many of something.
    #[error("there are {max} {what} already; {advice}")]
    TooMany {
        /// Of what.
        what: Noun,
        /// The bound.
        max: usize,
        /// What to do.
        advice: Advice,
    },
    /// The token is not known: never made, used up and forgotten, or of another cluster.
    #[error(
        "this join token is unknown, expired or used up; make a new one with `shoal token create --role worker`"
    )]
    BadToken,
    /// The use count of a new token is out of bounds.
    #[error("a token can be used 1 to {max} times, not {uses}", max = super::tokens::USES_MAX)]
    BadUses {
        /// What was asked.
        uses: u32,
    },
    /// The expiry of a new token is out of bounds.
    #[error("a token expires after 1 second to {} days", super::tokens::EXPIRY_MAX.as_secs() / 86_400)]
    BadExpiry,
    /// The name is taken.
    #[error(
        "a deployment named `{name}` exists already; `shoal undeploy {name}` first, or choose another with --name"
    )]
    NameTaken {
        /// Which.
        name: DeploymentName,
    },
    /// No such deployment.
    #[error("there is no deployment named `{name}`; `shoal status` lists them")]
    UnknownDeployment {
        /// Which.
        name: DeploymentName,
    },
    /// A plan that was made for something that has changed since.
    #[error("{replica} is at {current}, so a plan for {offered} comes too late")]
    StalePlan {
        /// The replica.
        replica: ReplicaId,
        /// Its layout.
        current: Generation,
        /// The layout that was offered.
        offered: Generation,
    },
    /// So many coordinators cannot vote.
    #[error(
        "{count} coordinators cannot vote: say 1, 3 or 5, since an even number survives no more losses \
         than one less; add or remove two at once, or let another take the place of one (`shoal coordinators \
         add NEW --replace OLD`)"
    )]
    BadVoters {
        /// How many were asked for.
        count: usize,
    },
    /// A coordinator that votes cannot be removed.
    #[error("{node} votes; `shoal coordinators remove` takes its vote first")]
    StillVotes {
        /// Which.
        node: NodeId,
    },
    /// A plan that does not hold together.
    #[error("the plan for {replica} is refused: {fault}")]
    BadPlan {
        /// The replica.
        replica: ReplicaId,
        /// What is wrong.
        fault: String,
    },
    /// A good key has the name.
    #[error(
        "an API key named `{name}` exists already; `shoal keys revoke {name}` first, or choose another name"
    )]
    KeyNameTaken {
        /// Which.
        name: KeyName,
    },
    /// No key was ever called that, as far as the list goes back.
    #[error("there is no API key named `{name}`; `shoal keys list` shows them")]
    UnknownKey {
        /// Which.
        name: KeyName,
    },
    /// It opens nothing already.
    #[error("the API key `{name}` was revoked before; `shoal keys list` shows when")]
    KeyRevokedBefore {
        /// Which.
        name: KeyName,
    },
    /// The same secret twice.
    #[error("this API key is or was in use already; make a new one with `shoal keys create NAME`")]
    KeyUsedBefore,
    /// A limit of a new key is out of bounds.
    #[error("a key's limit is 1 to {max}, not {limit}", max = super::keys::LIMIT_MAX)]
    BadKeyLimit {
        /// What was asked.
        limit: u32,
    },
    /// The expiry of a new key is out of bounds.
    #[error("a key expires after 1 second to {} days, or never", super::keys::EXPIRY_MAX.as_secs() / 86_400)]
    BadKeyExpiry,
    /// A node that is not removed like this.
    #[error("{node} cannot be removed: {}", match node.role {
        Role::Coordinator => "it is a coordinator, and has a vote: `shoal coordinators remove` takes that first",
        _ => "it is the admin that the coordinators write their context files for",
    })]
    NotToBeRemoved {
        /// Which.
        node: NodeId,
    },
    /// The number of replicas is out of bounds.
    #[error("a deployment has 1 to {max} replicas, not {replicas}; `shoal undeploy` ends it", max = super::deployments::REPLICAS_MAX)]
    BadReplicas {
        /// What was asked.
        replicas: u32,
    },
    /// What is not a worker holds no shards.
    #[error(
        "{node} is no worker, so there is nothing to move off it; `shoal status` lists the workers"
    )]
    NotAWorker {
        /// Which.
        node: NodeId,
    },
    /// Somebody whom it concerns would not understand it.
    #[error("this needs protocol version {needs}; {}", versions::names(by, *more))]
    HeldBack {
        /// The version that all of them must speak.
        needs: u16,
        /// Those who do not, or have not said.
        by: Vec<NodeId>,
        /// How many more there are.
        more: u32,
    },
    /// One rotation at a time.
    #[error("a CA takes the place of another already; `shoal ca list` shows how far it is")]
    RotationUnderWay,
    /// A step of a rotation that is not under way, or is at another step.
    #[error(
        "the rotation of the CA has gone on, or was given up; `shoal ca list` shows how far it is"
    )]
    StaleRotation,
    /// The name is an adapter's.
    #[error(
        "`{name}` is an adapter's name already; `shoal adapters unload {name}` first, or choose another"
    )]
    AdapterNameTaken {
        /// Which.
        name: DeploymentName,
    },
    /// No such adapter.
    #[error("there is no adapter named `{name}`; `shoal adapters list` shows them")]
    UnknownAdapter {
        /// Which.
        name: DeploymentName,
    },
    /// A path that means another folder on another node, or none.
    #[error(
        "an adapter is a folder, from the root since each node has its own working folder, or org/name or \
         org/name@revision of the hub; of at most {max} bytes", max = shoal_protocol::adapters::PATH_LEN_MAX
    )]
    BadAdapterPath,
}

impl Refusal {
    /// The code under which it crosses a wire.
    pub fn code(&self) -> ErrorCode {
        match self {
            Refusal::Superseded { .. } | Refusal::BadPlan { .. } => ErrorCode::Internal,
            Refusal::UnknownNode { .. } | Refusal::UnknownDeployment { .. } => ErrorCode::NotFound,
            Refusal::UnknownAdapter { .. } => ErrorCode::NotFound,
            Refusal::AdapterNameTaken { .. } => ErrorCode::AlreadyExists,
            Refusal::BadAdapterPath => ErrorCode::InvalidRequest,
            Refusal::OldIncarnation { .. } => ErrorCode::PermissionDenied,
            Refusal::TooMany { .. } => ErrorCode::InvalidRequest,
            Refusal::BadToken => ErrorCode::BadToken,
            Refusal::BadUses { .. }
            | Refusal::BadExpiry
            | Refusal::BadVoters { .. }
            | Refusal::StillVotes { .. }
            | Refusal::BadReplicas { .. }
            | Refusal::NotAWorker { .. } => ErrorCode::InvalidRequest,
            Refusal::NameTaken { .. } => ErrorCode::AlreadyExists,
            Refusal::StalePlan { .. } => ErrorCode::StaleGeneration,
            Refusal::HeldBack { .. } => ErrorCode::VersionMismatch,
            Refusal::RotationUnderWay => ErrorCode::AlreadyExists,
            Refusal::StaleRotation => ErrorCode::StaleGeneration,
            Refusal::UnknownKey { .. } => ErrorCode::NotFound,
            Refusal::KeyNameTaken { .. } | Refusal::KeyUsedBefore => ErrorCode::AlreadyExists,
            Refusal::KeyRevokedBefore { .. }
            | Refusal::BadKeyLimit { .. }
            | Refusal::NotToBeRemoved { .. }
            | Refusal::BadKeyExpiry => ErrorCode::InvalidRequest,
        }
    }
}

impl From<Refusal> for WireError {
    fn from(refusal: Refusal) -> Self {
        WireError::new(refusal.code(), refusal.to_string())
    }
}
