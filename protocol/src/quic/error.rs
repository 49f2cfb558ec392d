//! What can go wrong before there is a connection.

use std::net::SocketAddr;
use std::time::Duration;

use quinn::{ConnectionError, TransportErrorCode};

use super::alpn::Alpn;
use super::identity::NoNode;
use super::tls::TlsError;
use crate::id::NodeId;

/// An endpoint that could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The address is taken or not ours.
    #[error("cannot listen on {address} (UDP): {source}; {}", bind_advice(source))]
    Bind {
        /// Which address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The identity does not work.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// What to do about an address on which nobody can listen.
pub fn bind_advice(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrNotAvailable => "give an address of this machine",
        _ => "`:0` as the port picks a free one",
    }
}

/// A connection that did not come about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The identity does not work.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The address cannot be used.
    #[error("cannot connect to {address}: {source}")]
    Address {
        /// Which address.
        address: SocketAddr,
        /// Why.
        source: quinn::ConnectError,
    },
    /// The handshake failed.
    #[error("cannot reach {expect} at {address}: {source}")]
    Handshake {
        /// Which address.
        address: SocketAddr,
        /// Who should be there.
        expect: String,
        /// Why.
        source: ConnectionError,
    },
    /// Whoever is there belongs to another cluster than the token.
    #[error(
        "the coordinator at {address} is of another cluster than this token or certificate, or its CA was \
         rotated too often since; a token that was made there (`shoal token create`) lets it in"
    )]
    OtherCluster {
        /// Which address.
        address: SocketAddr,
    },
    /// No answer in time.
    #[error("no answer from {expect} at {address} within {deadline:?}")]
    Timeout {
        /// Which address.
        address: SocketAddr,
        /// Who should be there.
        expect: String,
        /// How long we waited.
        deadline: Duration,
    },
    /// Somebody else is at the address.
    #[error("{found} is at {address} where {expect} was expected")]
    WrongPeer {
        /// Which address.
        address: SocketAddr,
        /// Who should be there.
        expect: String,
        /// Who is there.
        found: NodeId,
    },
    /// The peer's certificate names nobody.
    #[error("the node at {address} cannot be told: {source}")]
    NoNode {
        /// Which address.
        address: SocketAddr,
        /// Why.
        source: NoNode,
    },
}

/// TLS's alerts about certificates (RFC 8446, 6.2): bad, unsupported, revoked, expired, unknown, and of an
/// unknown authority.
const CERTIFICATE_ALERTS: [u8; 6] = [42, 43, 44, 45, 46, 48];

/// Whether one side did not believe the other's certificate.
pub(super) fn is_distrust(error: &ConnectionError) -> bool {
    let code = match error {
        ConnectionError::TransportError(error) => error.code,
        ConnectionError::ConnectionClosed(close) => close.error_code,
        _ => return false,
    };
    CERTIFICATE_ALERTS.into_iter().any(|alert| code == TransportErrorCode::crypto(alert))
}

/// TLS's alert about a certificate whose time is over, or has not come.
const OUT_OF_TIME: u8 = 45;

impl ConnectError {
    /// Whether the certificates are out of their time, by the clock of one side.
    pub fn is_of_clocks(&self) -> bool {
        let code = match self {
            ConnectError::Handshake { source: ConnectionError::TransportError(error), .. } => {
                error.code
            }
            _ => return false,
        };
        code == TransportErrorCode::crypto(OUT_OF_TIME)
    }

    /// Whether one side did not believe the other's certificate: it may have expired, or be of a CA
    /// that is believed no more, or not yet.
    pub fn is_distrust(&self) -> bool {
        matches!(self, ConnectError::Handshake { source, .. } if is_distrust(source))
    }
}

/// A connection that was not let in.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// The handshake failed or took too long.
    #[error("the handshake with {address} failed: {why}")]
    Handshake {
        /// Who tried.
        address: SocketAddr,
        /// Why it failed.
        why: String,
    },
    /// The client has no certificate and needs one.
    #[error("{address} began {alpn} without a certificate")]
    NoCertificate {
        /// Who tried.
        address: SocketAddr,
        /// What they wanted.
        alpn: Alpn,
    },
    /// The certificate names nobody.
    #[error("{address} cannot be told: {source}")]
    NoNode {
        /// Who tried.
        address: SocketAddr,
        /// Why.
        source: NoNode,
    },
    /// The certificate's role may not have this conversation.
    #[error("{node} at {address} may not begin {alpn}")]
    Role {
        /// Who tried.
        address: SocketAddr,
        /// What their certificate says.
        node: NodeId,
        /// What they wanted.
        alpn: Alpn,
    },
}
