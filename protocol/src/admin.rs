//! CLI ↔ coordinator (`shoal-admin`): one bidirectional stream per call.
//!
//! The caller sends one request; the coordinator answers with one reply, or, for `Watch`, with a
//! view on every change until the caller closes. Views are read-only copies for people and scripts
//! (`shoal status --json` prints them as they are).

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::access::{AccessCall, AccessReply};
use crate::adapters::{AdapterCall, AdapterReply};
use crate::control::{DeviceInfo, HeadReport, ShardReport};
use crate::error::WireError;
use crate::id::{DeploymentName, NodeId, ReplicaId, Role};
use crate::mesh::MeshAsk;
use crate::plan::{ModelSource, Plan, Precision, ReplicaPlan, StagesAsked};
use crate::presence::PresenceView;
use crate::upgrade::{UpgradeCall, UpgradeView};
use crate::version::VersionRange;

/// The largest admin message.
pub const MESSAGE_LEN_MAX: usize = 16 << 20;

/// What an operator asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdminRequest {
    /// The protocol versions the caller speaks.
    pub versions: VersionRange,
    /// What.
    pub call: AdminCall,
}

/// The calls of the admin API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum AdminCall {
    /// The whole cluster.
    Status,
    /// The whole cluster, again on every change.
    Watch,
    /// Serve a model.
    Deploy {
        /// What clients will call it.
        name: DeploymentName,
        /// Where it is.
        source: ModelSource,
        /// Pipeline stages; `None`: as many as workers, at most one a layer.
        stages: Option<u32>,
        /// `None`: as stored.
        precision: Option<Precision>,
        /// Full copies of the model.
        replicas: u32,
    },
    /// Stop serving a model.
    Undeploy {
        /// Which.
        name: DeploymentName,
    },
    /// Make a join token.
    CreateToken {
        /// What its user will be.
        role: Role,
        /// How often it may be used.
        uses: u32,
        /// How long it is good for, in seconds.
        expires_s: u64,
    },
    /// The plan of a deployment, with the arithmetic.
    ExplainPlan {
        /// Which.
        name: DeploymentName,
    },
    /// Change which coordinators vote: all in one step.
    ChangeVoters {
        /// These get a vote.
        add: Vec<NodeId>,
        /// These belong to the cluster no longer.
        remove: Vec<NodeId>,
    },
    /// API keys, join tokens and nodes.
    Access(AccessCall),
    /// Serve a model with another number of replicas or stages, spread over the workers that there are
    /// now.
    Scale {
        /// Which.
        name: DeploymentName,
        /// Full copies of the model; `None`: as many as there are.
        replicas: Option<u32>,
        /// Pipeline stages of each.
        stages: StagesAsked,
        /// Change nothing, and answer with `Change`.
        dry_run: bool,
    },
    /// Move everything off a worker, and place nothing new on it; or allow it again.
    Drain {
        /// Which.
        node: NodeId,
        /// Whether it is to hold nothing.
        draining: bool,
        /// Change nothing, and answer with `Change`.
        dry_run: bool,
    },
    /// Protocol versions, and the end of an upgrade. Since version 2.
    Upgrade(UpgradeCall),
    /// As `Deploy`, with a mesh instead of stages. Since version 3.
    DeployMesh {
        /// What clients will call it.
        name: DeploymentName,
        /// Where it is.
        source: ModelSource,
        /// `None`: as stored.
        precision: Option<Precision>,
        /// Full copies of the model.
        replicas: u32,
        /// What is asked of the planner.
        ask: MeshAsk,
    },
    /// As `Scale`, with a mesh instead of stages. Since version 3.
    ScaleMesh {
        /// Which.
        name: DeploymentName,
        /// Full copies of the model; `None`: as many as there are.
        replicas: Option<u32>,
        /// What is asked of the planner; what it does not say stays.
        ask: MeshAsk,
        /// Change nothing, and answer with `Change`.
        dry_run: bool,
    },
    /// Adapters beside a deployment. Since version 3.
    Adapters(AdapterCall),
    /// Which coordinators are there? Since version 3.
    Presence,
}

/// What the coordinator answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum AdminReply {
    /// To `Status` and `Watch`.
    Status(Box<ClusterView>),
    /// To `Deploy` and `Undeploy`: accepted and durable.
    Accepted,
    /// To `CreateToken`.
    Token {
        /// Give it to `shoal worker --token`.
        token: String,
    },
    /// To `ExplainPlan`.
    Plan(Box<PlanView>),
    /// Refused; nothing has changed.
    Refused(WireError),
    /// To `Access`.
    Access(AccessReply),
    /// To a dry run: what would change.
    Change(Box<ChangeView>),
    /// To `Upgrade`.
    Upgrade(UpgradeView),
    /// To `Adapters`.
    Adapters(AdapterReply),
    /// To `Presence`.
    Presence(PresenceView),
}

/// The whole cluster, as the answering coordinator sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterView {
    /// The answering coordinator.
    pub coordinator: CoordinatorView,
    /// All workers, by number.
    pub workers: Vec<WorkerView>,
    /// All deployments, by name.
    pub deployments: Vec<DeploymentView>,
    /// The current plan.
    pub plan: Plan,
    /// All coordinators, by number.
    pub coordinators: Vec<PeerView>,
}

/// A coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoordinatorView {
    /// Its identity.
    pub id: NodeId,
    /// Its process.
    pub pid: u32,
    /// The version of its binary.
    pub build: String,
    /// Where it takes the public API.
    pub api: SocketAddr,
    /// Where it takes the cluster's conversations.
    pub cluster: SocketAddr,
    /// Whether the public API speaks TLS.
    pub tls: bool,
}

/// A coordinator, as the log knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerView {
    /// Its identity.
    pub id: NodeId,
    /// Where it takes the cluster's conversations.
    pub cluster: SocketAddr,
    /// The version of its binary.
    pub build: String,
    /// What it may do.
    pub vote: Vote,
    /// Whether it leads, as far as the answering coordinator knows.
    pub leads: bool,
}

/// What a coordinator may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vote {
    /// It votes.
    Voter,
    /// It takes the log and will vote when it has caught up.
    Promoted,
    /// It takes the log and has no say.
    Learner,
    /// The log does not know it yet.
    Joining,
}

impl Vote {
    /// The word of the CLI.
    pub fn as_str(self) -> &'static str {
        match self {
            Vote::Voter => "votes",
            Vote::Promoted => "catches up, then votes",
            Vote::Learner => "learns",
            Vote::Joining => "joins",
        }
    }
}

/// A worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerView {
    /// Its identity.
    pub id: NodeId,
    /// Whether its control link is up.
    pub connected: bool,
    /// Its process; 0 before it first registered.
    pub pid: u32,
    /// The version of its binary.
    pub build: String,
    /// Where it takes activations.
    pub address: Option<SocketAddr>,
    /// Its devices.
    pub devices: Vec<DeviceInfo>,
    /// Its shards.
    pub shards: Vec<ShardReport>,
    /// Its heads.
    pub heads: Vec<HeadReport>,
    /// Whether it is to hold nothing: what runs there moves elsewhere.
    pub draining: bool,
}

/// A deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeploymentView {
    /// What clients call it.
    pub name: DeploymentName,
    /// Where the model is.
    pub source: ModelSource,
    /// Whether requests are served.
    pub phase: DeploymentPhase,
    /// Why it is in that phase, for people; what is missing where something is.
    pub reason: String,
    /// Pipeline stages that were asked for; `None`: as many as there are workers for each replica.
    pub stages: Option<u32>,
    /// How often it was asked for: once by `Deploy`, and with each `Scale`.
    pub asked: u64,
    /// Its replicas: as many as are wanted.
    pub replicas: Vec<ReplicaView>,
}

impl DeploymentView {
    /// Whether it is served as was asked for, and nothing is under way.
    pub fn is_settled(&self) -> bool {
        self.replicas.iter().all(|replica| replica.settled)
    }
}

/// A replica, whether it has a layout or not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplicaView {
    /// Its number.
    pub id: ReplicaId,
    /// Whether it takes requests.
    pub phase: DeploymentPhase,
    /// Why, for people.
    pub reason: String,
    /// Whether it is served as was asked for, and nothing is under way.
    pub settled: bool,
    /// The layout that is being made beside the one that serves.
    pub next: Option<ReplicaPlan>,
}

/// Where a deployment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeploymentPhase {
    /// There is no plan that fits; more workers are needed.
    Waiting,
    /// Shards are loading.
    Loading,
    /// Requests are served.
    Ready,
    /// It cannot be served as it is; the reason says what to do.
    Failed,
}

/// What a change would come to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChangeView {
    /// The layouts that would be replaced or dropped.
    pub before: Vec<ReplicaPlan>,
    /// The layouts that would take their place.
    pub after: Vec<ReplicaPlan>,
    /// The same in words, with bytes and speeds, line by line.
    pub explanation: Vec<String>,
}

/// The plan of one deployment, explained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanView {
    /// Its replicas.
    pub replicas: Vec<ReplicaPlan>,
    /// The arithmetic, line by line, for people.
    pub explanation: Vec<String>,
}
