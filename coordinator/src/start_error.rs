//! Why a coordinator did not start, in words for whoever started it.

use std::net::SocketAddr;
use std::path::PathBuf;

use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::quic::EndpointError;
use shoal_protocol::quic::ca::CaError;
use shoal_protocol::quic::identity::IdentityError;
use shoal_protocol::quic::join::JoinError;

use crate::api::tls::TlsError;
use crate::control::authority::CertifyError;
use crate::control::store::{OpenError, ProposeError};

/// A coordinator that did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The public API would be open to others.
    #[error(
        "the API cannot listen on {address}: there is no API key, so whoever reaches it could use it; \
         listen on 127.0.0.1:{}, make a key with `shoal keys create NAME`, and start again with \
         {address} and the same --data", address.port()
    )]
    NotLoopback {
        /// The address.
        address: SocketAddr,
    },
    /// The data folder cannot be used.
    #[error("cannot use the data folder {}", path.display())]
    Data {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The replicated state cannot be read.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The replicated state cannot be written.
    #[error("cannot found the cluster: {0}")]
    Found(#[from] ProposeError),
    /// The CA cannot be used.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// Its certificate cannot be made.
    #[error(transparent)]
    Certify(#[from] CertifyError),
    /// One of the state and the CA's key is there, and the other is not.
    #[error(
        "{} has {found} but not {missing}: restore the data folder from a backup, or start a new \
         cluster on an empty one (its workers must join again)", path.display()
    )]
    Incomplete {
        /// The data folder.
        path: PathBuf,
        /// What is there.
        found: &'static str,
        /// What is not.
        missing: &'static str,
    },
    /// Another coordinator has founded a cluster in the same etcd, or is about to.
    #[error(
        "another coordinator is founding a cluster under the same prefix of this etcd: join it (`shoal token \
         create --role coordinator` there; --join ADDR --token T here), or use another prefix; if a \
         founding was cut off there, delete what is under the prefix and start again"
    )]
    FoundedByAnother,
    /// There is neither an identity nor a token.
    #[error(
        "{} is empty and no token is given; make one with `shoal token create --role coordinator` and \
         say --join ADDR --token T", path.display()
    )]
    NoToken {
        /// The data folder.
        path: PathBuf,
    },
    /// The token is for something else.
    #[error("this token is for a {role}; make one with `shoal token create --role coordinator`")]
    WrongToken {
        /// What it is for.
        role: Role,
    },
    /// The cluster did not let it in.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The identity is not a coordinator's.
    #[error("{} holds the identity of {node}, which is no coordinator; use another --data", path.display())]
    NoCoordinator {
        /// The data folder.
        path: PathBuf,
        /// Whose it is.
        node: NodeId,
    },
    /// The operator's context file cannot be written.
    #[error(transparent)]
    Context(#[from] IdentityError),
    /// The cluster's address cannot be used.
    #[error(transparent)]
    Cluster(#[from] EndpointError),
    /// The API's address cannot be used.
    #[error("cannot listen on {address} (TCP): {source}; `:0` as the port picks a free one")]
    Api {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The API's certificate cannot be used.
    #[error("the API's certificate: {0}")]
    Certificate(#[from] TlsError),
    /// The metrics cannot be set up.
    #[error("cannot set up the metrics: {0}")]
    Telemetry(#[from] prometheus::Error),
}

impl StartError {
    /// Whether the next start would fail so too, until a person gives it something else.
    pub fn needs_a_person(&self) -> bool {
        match self {
            Self::Incomplete { .. }
            | Self::NoToken { .. }
            | Self::WrongToken { .. }
            | Self::NoCoordinator { .. } => true,
            Self::Store(OpenError::Raft(error)) => error.needs_a_person(),
            _ => false,
        }
    }
}
