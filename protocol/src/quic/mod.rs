//! The transport shell: QUIC endpoints with mutual TLS, one ALPN per conversation, framed streams.
//!
//! ```text
//! Endpoint::bind ─► connect(address, who, alpn) ─► Connection ─► open_bi / open_uni ─► FrameSender
//!                └► accept ─► Accepting::establish ─► Connection ─► accept_bi / accept_uni ─► FrameReceiver
//! ```
//!
//! A `Connection` exists only after the peer's certificate has been checked against the cluster's
//! CA and its node id read; nothing that a peer sends is parsed before. The two exceptions are the
//! conversations of [`Alpn::without_client_certificate`], whose messages are bounded to 4 KiB.
//!
//! There is no plaintext mode.

mod accept;
mod alpn;
mod aside;
pub mod ca;
mod connection;
mod context;
mod endpoint;
mod error;
pub mod identity;
pub mod join;
mod pulse;
pub mod renew;
mod settings;
mod stream;
mod tls;

pub use accept::Accepting;
pub use alpn::{Alpn, Expect};
pub use aside::aside;
pub use connection::{Connection, LinkStats};
pub use context::AdminContext;
pub use endpoint::Endpoint;
pub use error::{AcceptError, ConnectError, EndpointError};
pub use identity::Identity;
pub use pulse::{Loss, Pulse, SharedLease, Silence};
pub use settings::{IDLE_TIMEOUT, KEEP_ALIVE};
pub use stream::{FrameHead, FrameReceiver, FrameSender, RecvError, SendError};

/// Connections ended on purpose carry one of these codes.
pub mod close_code {
    /// Nothing is wrong; the conversation is over.
    pub const DONE: u32 = 0;
    /// The node is stopping.
    pub const DRAINING: u32 = 1;
    /// The peer may not have this conversation.
    pub const REFUSED: u32 = 2;
    /// The peer broke the protocol.
    pub const PROTOCOL: u32 = 3;
    /// The layout has changed.
    pub const STALE: u32 = 4;
    /// The peer was a node of this cluster, and is none any more, for good. Whoever is older than this code
    /// takes it for any other end.
    pub const REMOVED: u32 = 5;
}
