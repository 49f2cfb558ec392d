//! Coordinator ↔ coordinator (`shoal-raft`).
//!
//! Whoever has something to say dials. The first message on a bidirectional stream says what the stream
//! is for; after `Welcome` a log stream carries messages of the log one way, each in a `Message` frame
//! whose body is the crate's own encoding.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::control::CoordinatorAddress;
use crate::error::WireError;
use crate::id::{Incarnation, NodeId};
use crate::trust::CaFingerprint;
use crate::version::VersionRange;

/// The largest hello or reply: sixteen addresses, or a CA's key.
pub const MESSAGE_LEN_MAX: usize = 64 << 10;

/// The largest message of the log: a snapshot of the whole state, of which a thousand nodes and a
/// hundred deployments are a few MiB.
pub const LOG_MESSAGE_LEN_MAX: usize = 64 << 20;

/// What a coordinator says first on a stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PeerRequest {
    /// Messages of the log follow.
    Log(PeerHello),
    /// Send me the CA's key: I vote.
    CaKey {
        /// The protocol versions it speaks.
        versions: VersionRange,
    },
    /// Send me the key of this CA, which is to take the place of the one that signs, or has. Between
    /// coordinators that speak version 2.
    CaKeyOf {
        /// The protocol versions it speaks.
        versions: VersionRange,
        /// Which.
        ca: CaFingerprint,
    },
}

/// Who dials.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerHello {
    /// The protocol versions it speaks.
    pub versions: VersionRange,
    /// Its identity; the certificate must say the same.
    pub node: NodeId,
    /// Its start number.
    pub incarnation: Incarnation,
    /// Drawn at its start: two processes with one start number are not the same.
    pub boot: u64,
    /// Where it takes the cluster's conversations.
    pub cluster: SocketAddr,
    /// The version of its binary.
    pub build: String,
}

/// The answer.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub enum PeerReply {
    /// To `Log`: go on.
    Welcome {
        /// The version that both will speak.
        version: u16,
        /// The coordinators that it knows.
        coordinators: Vec<CoordinatorAddress>,
    },
    /// To `CaKey` and `CaKeyOf`.
    CaKey {
        /// The CA as its file has it.
        authority: Vec<u8>,
    },
    /// No.
    Refused(WireError),
}

impl std::fmt::Debug for PeerReply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PeerReply::Welcome { version, coordinators } => {
                write!(f, "Welcome {{ version: {version}, coordinators: {coordinators:?} }}")
            }
            // A key is in it.
            PeerReply::CaKey { .. } => f.write_str("CaKey"),
            PeerReply::Refused(error) => write!(f, "Refused({error})"),
        }
    }
}
