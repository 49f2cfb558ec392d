//! Adapters of deployments: what coordinators and workers say of them (`shoal-ctl`), and operators
//! (`shoal-admin`). Since version 3.
//!
//! ```text
//! operator ─► AdapterCall ─► coordinator: reads, compares, commits
//! coordinator ─► Adapters: all that there should be ─► worker: reads, compares, loads beside what runs
//!             ◄─ Adapters: what its shards have, and why not the rest ◄─┘
//! ```

use serde::{Deserialize, Serialize};

use crate::error::WireError;
use crate::id::{AdapterId, DeploymentName, Generation, ReplicaId};

/// The most adapters of one deployment. Each is held by every shard, and each of those that a step's rows
/// use costs two small products a projection; beyond a few dozen a second deployment serves better.
pub const ADAPTERS_MAX: usize = 64;

/// The most in one cluster: a message that names all of them is far below its bound.
pub const ADAPTERS_OF_CLUSTER_MAX: usize = 1024;

/// The longest path of an adapter, in bytes.
pub const PATH_LEN_MAX: usize = 1024;

/// One adapter of a deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterSpec {
    /// Never used twice.
    pub id: AdapterId,
    /// The name that requests choose it by.
    pub name: DeploymentName,
    /// The folder, which each worker reads under this path; or `org/name@commit` of the hub, which each
    /// fetches.
    pub path: String,
    /// What `model::Adapter::fingerprint` says of it.
    pub fingerprint: [u8; 32],
}

/// All adapters of a deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploymentAdapters {
    /// Which deployment.
    pub deployment: DeploymentName,
    /// At most [`ADAPTERS_MAX`].
    pub adapters: Vec<AdapterSpec>,
}

/// All adapters that there should be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantedAdapters {
    /// Grows with each change: a worker does not go back to an older list.
    pub revision: u64,
    /// Those deployments that have some.
    pub deployments: Vec<DeploymentAdapters>,
}

impl WantedAdapters {
    /// Whether it keeps the bounds.
    pub fn is_bounded(&self) -> bool {
        let of = |d: &DeploymentAdapters| d.adapters.len();
        let path = |a: &AdapterSpec| a.path.len() <= PATH_LEN_MAX;
        self.deployments.iter().map(of).sum::<usize>() <= ADAPTERS_OF_CLUSTER_MAX
            && self.deployments.iter().all(|d| of(d) <= ADAPTERS_MAX && d.adapters.iter().all(path))
    }

    /// Those of a deployment.
    pub fn of(&self, deployment: &DeploymentName) -> &[AdapterSpec] {
        let found = self.deployments.iter().find(|d| d.deployment == *deployment);
        found.map_or(&[], |found| &found.adapters)
    }
}

/// What one shard of a worker has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldAdapters {
    /// The replica.
    pub replica: ReplicaId,
    /// Its layout.
    pub generation: Generation,
    /// Those that can be used, with what their files were: a state that was restored gives numbers again.
    pub held: Vec<(AdapterId, [u8; 32])>,
    /// Those that cannot, and why.
    pub failed: Vec<(AdapterId, WireError)>,
}

impl HeldAdapters {
    /// Whether it keeps the bounds: those of one deployment, and those that are on their way out.
    pub fn is_bounded(&self) -> bool {
        self.held.len() + self.failed.len() <= 2 * ADAPTERS_MAX
    }
}

/// What an operator asks about adapters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdapterCall {
    /// Serve an adapter beside its base model.
    Load {
        /// What clients will call it.
        name: DeploymentName,
        /// The deployment of its base model.
        deployment: DeploymentName,
        /// Its folder, from the root, the same on each node; or `org/name[@revision]` of the hub.
        path: String,
    },
    /// Stop serving one. Answers that use it end first.
    Unload {
        /// Which.
        name: DeploymentName,
    },
    /// Which are there?
    List,
}

/// An adapter, for people and scripts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterView {
    /// What clients call it.
    pub name: DeploymentName,
    /// Its number.
    pub id: AdapterId,
    /// The deployment of its base model.
    pub deployment: DeploymentName,
    /// Its folder, or `org/name@commit` of the hub.
    pub path: String,
    /// When it was asked for: seconds since 1970.
    pub created_s: u64,
    /// Replicas of which all shards have it.
    pub held: u32,
    /// Replicas that have a layout.
    pub replicas: u32,
    /// Why the others have it not; empty where all have it.
    pub reason: String,
}

/// What operators are answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdapterReply {
    /// To `Load` and `Unload`: accepted and durable. To `Load` it has been loaded wherever its base model
    /// is served, or still is being loaded.
    Accepted {
        /// How it stands; `None`: it is gone.
        adapter: Option<AdapterView>,
    },
    /// To `List`, by name.
    List(Vec<AdapterView>),
}
