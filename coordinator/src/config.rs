//! What a coordinator is told at its start.

use std::net::SocketAddr;
use std::path::PathBuf;

use shoal_protocol::model::BuiltinModel;

use crate::api::tls::TlsFiles;

/// What a coordinator is told at its start.
#[derive(Clone, Debug)]
pub struct CoordinatorConfig {
    /// Where the replicated state, the CA and the context file are kept; created if need be. One
    /// coordinator at a time: a second one on the same folder is refused.
    pub data: PathBuf,
    /// Where it takes the public API (TCP). It must be a loopback address as long as there is no API
    /// key, since whoever reaches it may use it then. Port 0 picks a free one.
    pub listen: SocketAddr,
    /// The public API's certificate; `None`: plain HTTP.
    pub tls: Option<TlsFiles>,
    /// Where it takes the cluster's conversations (UDP): workers, joiners, operators. Any address,
    /// since every one of them is mutually authenticated. Port 0 picks a free one.
    pub cluster: SocketAddr,
    /// The models inside the binary.
    pub builtin: Vec<BuiltinModel>,
}
