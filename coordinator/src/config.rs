//! What a coordinator is told at its start.

use std::net::SocketAddr;
use std::path::PathBuf;

use shoal_protocol::join::JoinToken;
use shoal_protocol::model::BuiltinModel;
use shoal_protocol::trace::Tracer;

use crate::api::tls;
pub use crate::control::store::StoreConfig;
pub use crate::control::store::etcd::url::{BadUrl, EtcdUrl};
pub use crate::control::store::etcd::{EtcdConfig, TlsFiles};
use crate::router::policy::Policy;

/// What a coordinator is told at its start.
#[derive(Clone, Debug)]
pub struct CoordinatorConfig {
    /// Where identity, the CA and the context file are kept; created if need be. One
    /// coordinator at a time: a second one on the same folder is refused.
    pub data: PathBuf,
    /// Where the replicated state is kept.
    pub store: StoreConfig,
    /// Where it takes the public API (TCP). It must be a loopback address as long as there is no API
    /// key, since whoever reaches it may use it then. Port 0 picks a free one.
    pub listen: SocketAddr,
    /// The public API's certificate; `None`: plain HTTP.
    pub tls: Option<tls::TlsFiles>,
    /// Where it takes the cluster's conversations (UDP): workers, joiners, operators. Any address,
    /// since every one of them is mutually authenticated. Port 0 picks a free one.
    pub cluster: SocketAddr,
    /// Where others reach `cluster`; `None`: under that very address.
    pub advertise: Option<SocketAddr>,
    /// Cluster addresses of coordinators of the cluster to join; empty: it founds one. Later starts
    /// find both in `data`.
    pub join: Vec<SocketAddr>,
    /// Needed to join alone.
    pub token: Option<JoinToken>,
    /// The models inside the binary.
    pub builtin: Vec<BuiltinModel>,
    /// How it chooses among the replicas of a deployment.
    pub policy: Policy,
    /// Where it tells what it does for requests that are traced; it also decides which are.
    pub tracer: Tracer,
    /// Whether `Policy::Score` takes a prompt's blocks that a replica was sent before for computed.
    pub prefix_affinity: bool,
    /// Whether whoever may use the public API may load and unload adapters through it too.
    pub runtime_adapters: bool,
}
