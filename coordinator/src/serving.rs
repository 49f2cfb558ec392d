//! What the request plane needs to know of the control plane: one immutable table, replaced whole
//! on every change and handed over in a `tokio::sync::watch`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::control::{HeadReport, ShardReport};
use shoal_protocol::id::{AdapterId, DeploymentName, Generation, NodeId, ReplicaId};
use shoal_protocol::prefix::PrefixReport;

/// Everything that can be served, and what cannot be and why.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServingTable {
    /// All deployments by name.
    pub deployments: BTreeMap<DeploymentName, Arc<ServedDeployment>>,
    /// All adapters by name: to clients each is a model of its own, at the replicas of its base model.
    pub adapters: BTreeMap<DeploymentName, Arc<ServedDeployment>>,
    /// All shards as last reported, with the worker they are on: for `/metrics`.
    pub shards: Vec<(NodeId, ShardReport)>,
    /// What heads said of blocks that are shared: for `/metrics`.
    pub prefixes: Vec<PrefixReport>,
    /// Workers whose control link is up.
    pub workers_connected: usize,
    /// Workers in the replicated state.
    pub workers_total: usize,
    /// The protocol version that every member of the cluster speaks; 0 where that is not known.
    pub protocol: u16,
}

impl ServingTable {
    /// What clients mean by a name: a deployment or an adapter.
    pub fn get(&self, name: &DeploymentName) -> Option<&Arc<ServedDeployment>> {
        self.deployments.get(name).or_else(|| self.adapters.get(name))
    }
}

/// An adapter beside a deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedAdapter {
    /// The number that requests for it carry.
    pub id: AdapterId,
    /// What its files are. A state that was restored gives numbers again.
    pub fingerprint: [u8; 32],
    /// The deployment of its base model.
    pub base: DeploymentName,
}

/// What a deployment makes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ServedKind {
    /// Text, token by token.
    #[default]
    Generate,
    /// An embedding.
    Embed {
        /// How many numbers.
        width: u32,
        /// Whether the model brings it to length 1.
        normalize: bool,
    },
    /// How well a document answers a query.
    Rank {
        /// How many scores its head gives; one is a ranking's.
        labels: u32,
    },
}

impl ServedKind {
    /// The word for it in `/v1/models` and in metrics.
    pub fn label(self) -> &'static str {
        match self {
            ServedKind::Generate => "generate",
            ServedKind::Embed { .. } => "embed",
            ServedKind::Rank { .. } => "rank",
        }
    }
}

/// One deployment as the request plane sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct ServedDeployment {
    /// What clients call it.
    pub name: DeploymentName,
    /// When it was deployed: seconds since 1970.
    pub created: u64,
    /// The folder with tokenizer.json and its companions, readable by this coordinator.
    /// `None` for a pretend model, which takes and gives token ids alone.
    pub folder: Option<PathBuf>,
    /// The vocabulary's size.
    pub vocab: u32,
    /// The longest context, prompt and answer together, in tokens.
    pub context_max: u32,
    /// What it makes of a request.
    pub kind: ServedKind,
    /// Its replicas; none while there is no plan.
    pub replicas: Vec<ServedReplica>,
    /// Why it is not ready, where it is not.
    pub reason: String,
    /// Whether there is anything to wait for.
    pub phase: DeploymentPhase,
    /// Where it is an adapter; its replicas are those of its base model then, ready where they have it.
    pub adapter: Option<ServedAdapter>,
}

impl ServedDeployment {
    /// The deployment whose replicas answer.
    pub fn base(&self) -> &DeploymentName {
        self.adapter.as_ref().map_or(&self.name, |adapter| &adapter.base)
    }

    /// The number that requests carry.
    pub fn adapter_id(&self) -> Option<AdapterId> {
        self.adapter.as_ref().map(|adapter| adapter.id)
    }
}

/// One replica as the router sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct ServedReplica {
    /// The replica.
    pub id: ReplicaId,
    /// Its layout.
    pub generation: Generation,
    /// The worker with the head.
    pub head: NodeId,
    /// Where that worker takes `shoal-req`; `None` while it is not connected.
    pub requests: Option<SocketAddr>,
    /// Whether every shard is ready and every worker connected.
    pub ready: bool,
    /// The head's last report.
    pub load: Option<HeadReport>,
}
