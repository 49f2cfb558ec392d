//! The conversations, who may begin each, and whom a client insists on.

use std::fmt;

use crate::id::{NodeId, Role};

/// The conversations, one ALPN each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// Coordinator → head.
    Requests,
    /// Stage → stage.
    Activations,
    /// Worker → coordinator.
    Control,
    /// CLI → coordinator.
    Admin,
    /// Joiner → coordinator, without a client certificate.
    Join,
    /// Coordinator → coordinator.
    Raft,
    /// Node whose certificate has expired → coordinator, without a client certificate.
    Renew,
    /// Worker → worker: chunks of weights.
    Blobs,
}

impl Alpn {
    /// All of them.
    pub const ALL: [Alpn; 8] = [
        Alpn::Requests,
        Alpn::Activations,
        Alpn::Control,
        Alpn::Admin,
        Alpn::Join,
        Alpn::Raft,
        Alpn::Renew,
        Alpn::Blobs,
    ];

    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Alpn::Requests => "shoal-req",
            Alpn::Activations => "shoal-act",
            Alpn::Control => "shoal-ctl",
            Alpn::Admin => "shoal-admin",
            Alpn::Join => "shoal-join",
            Alpn::Raft => "shoal-raft",
            Alpn::Renew => "shoal-renew",
            Alpn::Blobs => "shoal-blob",
        }
    }

    pub(super) fn as_bytes(self) -> &'static [u8] {
        self.as_str().as_bytes()
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|alpn| alpn.as_bytes() == bytes)
    }

    /// Whether the client has no certificate, or none any more.
    pub fn without_client_certificate(self) -> bool {
        matches!(self, Alpn::Join | Alpn::Renew)
    }

    /// Whether a client of this role may begin the conversation.
    pub(super) fn admits(self, client: Role) -> bool {
        match self {
            Alpn::Requests | Alpn::Raft => client == Role::Coordinator,
            Alpn::Activations | Alpn::Control | Alpn::Blobs => client == Role::Worker,
            Alpn::Admin => client == Role::Admin,
            Alpn::Join | Alpn::Renew => true,
        }
    }
}

impl fmt::Display for Alpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whom a client insists on finding at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// This node.
    Node(NodeId),
    /// Any node of this role.
    Role(Role),
}

impl Expect {
    pub(super) fn admits(self, node: NodeId) -> bool {
        match self {
            Expect::Node(expected) => node == expected,
            Expect::Role(role) => node.role == role,
        }
    }
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expect::Node(node) => node.fmt(f),
            Expect::Role(role) => write!(f, "a {role}"),
        }
    }
}
