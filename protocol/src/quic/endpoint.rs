//! A UDP socket, who listens on it, and connections whose peer is known.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Duration;

use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::{ConnectionError, TransportConfig, VarInt};
use rustls_pki_types::CertificateDer;

use super::close_code;
use super::driver::{Driver, Runtime};
use super::identity::{Identity, NoNode, TLS_NAME, node_of};
use super::settings;
use super::stream::{FrameReceiver, FrameSender};
use super::tls::{self, TlsError};
use crate::id::{NodeId, Role};

/// How long a handshake may take, on either side.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

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
}

impl Alpn {
    const ALL: [Alpn; 5] =
        [Alpn::Requests, Alpn::Activations, Alpn::Control, Alpn::Admin, Alpn::Join];

    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Alpn::Requests => "shoal-req",
            Alpn::Activations => "shoal-act",
            Alpn::Control => "shoal-ctl",
            Alpn::Admin => "shoal-admin",
            Alpn::Join => "shoal-join",
        }
    }

    pub(super) fn as_bytes(self) -> &'static [u8] {
        self.as_str().as_bytes()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|alpn| alpn.as_bytes() == bytes)
    }

    /// Whether the client has no certificate yet.
    pub fn without_client_certificate(self) -> bool {
        self == Alpn::Join
    }

    /// Whether a client of this role may begin the conversation.
    fn admits(self, client: Role) -> bool {
        match self {
            Alpn::Requests => client == Role::Coordinator,
            Alpn::Activations | Alpn::Control => client == Role::Worker,
            Alpn::Admin => client == Role::Admin,
            Alpn::Join => true,
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
    fn admits(self, node: NodeId) -> bool {
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

/// An endpoint that could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The address is taken or not ours.
    #[error("cannot listen on {address} (UDP): {source}; `:0` as the port picks a free one")]
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

/// One UDP socket with one driver task on the runtime that called `bind`.
#[derive(Clone, Debug)]
pub struct Endpoint {
    inner: quinn::Endpoint,
    /// Shared by all clones, so that a renewed certificate reaches each of them.
    identity: Arc<RwLock<Option<Arc<Identity>>>>,
    accepts: Arc<[Alpn]>,
    transport: Arc<TransportConfig>,
    address: SocketAddr,
}

impl Endpoint {
    /// Opens a socket. `accepts` may be empty: then nobody can connect to it.
    pub fn bind(
        address: SocketAddr,
        identity: Arc<Identity>,
        accepts: &[Alpn],
    ) -> Result<Self, EndpointError> {
        let mut endpoint = Self::open(address)?;
        endpoint.accepts = accepts.into();
        endpoint.renew(identity)?;
        Ok(endpoint)
    }

    /// Shows this certificate from now on; connections that are there stay as they are.
    pub fn renew(&self, identity: Arc<Identity>) -> Result<(), EndpointError> {
        if !self.accepts.is_empty() {
            let tls = QuicServerConfig::try_from(tls::server(&identity, &self.accepts)?)
                .map_err(|error| TlsError(error.to_string()))?;
            let mut server = quinn::ServerConfig::with_crypto(Arc::new(tls));
            server.transport_config(Arc::clone(&self.transport));
            self.inner.set_server_config(Some(server));
        }
        // A panic under the lock leaves one identity or the other, both whole.
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = Some(identity);
        Ok(())
    }

    /// Opens a socket of somebody who has no identity yet.
    pub(super) fn open(address: SocketAddr) -> Result<Self, EndpointError> {
        let failed = |source| EndpointError::Bind { address, source };
        let domain = socket2::Domain::for_address(address);
        let socket =
            socket2::Socket::new(domain, socket2::Type::DGRAM, Some(socket2::Protocol::UDP))
                .map_err(failed)?;
        let granted = settings::size_buffers(&socket).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        socket.bind(&address.into()).map_err(failed)?;
        let runtime: Arc<dyn quinn::Runtime> = Arc::new(Runtime::current());
        let config = quinn::EndpointConfig::default();
        let inner = quinn::Endpoint::new(config, None, socket.into(), runtime).map_err(failed)?;
        let local = inner.local_addr().map_err(failed)?;
        tracing::debug!(%local, granted, "socket open");
        Ok(Self {
            inner,
            identity: Arc::default(),
            accepts: Arc::default(),
            transport: settings::transport(granted, local),
            address: local,
        })
    }

    /// What it shows to others; `None` for a joiner that has nothing yet.
    pub fn identity(&self) -> Option<Arc<Identity>> {
        self.identity.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where it listens.
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// Connects to `expect` at `address`, within `deadline`. Nothing is sent to anybody else.
    pub async fn connect(
        &self,
        address: SocketAddr,
        expect: Expect,
        alpn: Alpn,
        deadline: Duration,
    ) -> Result<Connection, ConnectError> {
        let identity =
            self.identity().ok_or_else(|| TlsError("this endpoint has no identity".to_owned()))?;
        let config = tls::client(&identity, alpn)?;
        let (inner, driver) =
            self.handshake(address, config, &expect.to_string(), deadline).await?;
        let node = peer_node(&inner).ok_or(NoNode::NotOneName).and_then(|r| r);
        let node = match node {
            Ok(node) => node,
            Err(source) => {
                inner.close(VarInt::from_u32(close_code::REFUSED), b"no node in the certificate");
                return Err(ConnectError::NoNode { address, source });
            }
        };
        if !expect.admits(node) {
            inner.close(VarInt::from_u32(close_code::REFUSED), b"somebody else was expected");
            return Err(ConnectError::WrongPeer {
                address,
                expect: expect.to_string(),
                found: node,
            });
        }
        Ok(Connection { inner, driver, peer: Some(node), alpn })
    }

    /// Connects without a certificate to a node whose CA has this fingerprint.
    pub(super) async fn connect_pinned(
        &self,
        address: SocketAddr,
        ca_fingerprint: [u8; 32],
        alpn: Alpn,
        deadline: Duration,
    ) -> Result<Connection, ConnectError> {
        let config = tls::pinned_client(ca_fingerprint, alpn)?;
        let (inner, driver) = self.handshake(address, config, "a coordinator", deadline).await?;
        let peer = peer_node(&inner).and_then(Result::ok);
        Ok(Connection { inner, driver, peer, alpn })
    }

    async fn handshake(
        &self,
        address: SocketAddr,
        tls: rustls::ClientConfig,
        expect: &str,
        deadline: Duration,
    ) -> Result<(quinn::Connection, Weak<Driver>), ConnectError> {
        let tls = QuicClientConfig::try_from(tls).map_err(|error| TlsError(error.to_string()))?;
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(Arc::clone(&self.transport));
        let connecting = self
            .inner
            .connect_with(config, address, TLS_NAME)
            .map_err(|source| ConnectError::Address { address, source })?;
        let driver = Driver::spawned_here();
        let deadline = deadline.min(HANDSHAKE_TIMEOUT);
        match tokio::time::timeout(deadline, connecting).await {
            Ok(Ok(connection)) => Ok((connection, driver)),
            Ok(Err(source)) => {
                Err(ConnectError::Handshake { address, expect: expect.to_owned(), source })
            }
            Err(_) => Err(ConnectError::Timeout { address, expect: expect.to_owned(), deadline }),
        }
    }

    /// The next client that knocks; `None` once the endpoint is closed. Call `establish` in a task of
    /// its own, so that a slow client does not hold up the others.
    pub async fn accept(&self) -> Option<Accepting> {
        self.inner.accept().await.map(Accepting)
    }

    /// Ends all connections, with a reason that the peers can log.
    pub fn close(&self, code: u32, reason: &str) {
        self.inner.close(VarInt::from_u32(code), reason.as_bytes());
    }

    /// Waits until the peers have heard of the end, at most `deadline`.
    pub async fn drained(&self, deadline: Duration) {
        let _ = tokio::time::timeout(deadline, self.inner.wait_idle()).await;
    }
}

/// A client before its handshake.
#[derive(Debug)]
pub struct Accepting(quinn::Incoming);

impl Accepting {
    /// Who knocks.
    pub fn remote_address(&self) -> SocketAddr {
        self.0.remote_address()
    }

    /// Does the handshake and checks certificate and role against the conversation.
    pub async fn establish(self) -> Result<Connection, AcceptError> {
        let address = self.0.remote_address();
        let failed = |why: String| AcceptError::Handshake { address, why };
        let connecting = self.0.accept().map_err(|error| failed(error.to_string()))?;
        let inner = tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting)
            .await
            .map_err(|_| failed(format!("it took longer than {HANDSHAKE_TIMEOUT:?}")))?
            .map_err(|error| failed(error.to_string()))?;
        let refuse = |error: AcceptError| {
            inner.close(VarInt::from_u32(close_code::REFUSED), b"not allowed");
            error
        };
        let handshake =
            inner.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
        let alpn =
            handshake.and_then(|data| data.protocol).and_then(|name| Alpn::from_bytes(&name));
        // TLS has already refused a client that offers none of our protocols.
        let alpn = alpn.ok_or_else(|| refuse(failed("no protocol was agreed on".to_owned())))?;
        let peer = match peer_node(&inner) {
            Some(Ok(node)) => Some(node),
            Some(Err(source)) => return Err(refuse(AcceptError::NoNode { address, source })),
            None if alpn.without_client_certificate() => None,
            None => return Err(refuse(AcceptError::NoCertificate { address, alpn })),
        };
        if let Some(node) = peer.filter(|node| !alpn.admits(node.role)) {
            return Err(refuse(AcceptError::Role { address, node, alpn }));
        }
        // Only who has dialled sends from threads of its own.
        Ok(Connection { inner, driver: Weak::new(), peer, alpn })
    }

    /// Turns the client away.
    pub fn refuse(self) {
        self.0.refuse();
    }
}

fn peer_node(connection: &quinn::Connection) -> Option<Result<NodeId, NoNode>> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.first().map(node_of)
}

/// What a connection's transport has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Packets declared lost.
    pub lost_packets: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Bytes sent in UDP datagrams.
    pub sent_bytes: u64,
    /// Sends to the kernel: fewer than packets where segmentation offload works.
    pub sends: u64,
    /// The path's packet size.
    pub mtu: u16,
}

/// A connection to a peer that TLS has proven to be who it says.
#[derive(Clone, Debug)]
pub struct Connection {
    inner: quinn::Connection,
    driver: Weak<Driver>,
    peer: Option<NodeId>,
    alpn: Alpn,
}

impl Connection {
    /// Who is at the other end; `None` in the conversations without a client certificate.
    pub fn peer(&self) -> Option<NodeId> {
        self.peer
    }

    /// Which conversation this is.
    pub fn alpn(&self) -> Alpn {
        self.alpn
    }

    /// Where the peer is.
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.remote_address()
    }

    /// The local address by which the peer is reached, where the system tells.
    pub fn local_ip(&self) -> Option<std::net::IpAddr> {
        self.inner.local_ip()
    }

    /// A new stream in both directions.
    pub async fn open_bi(&self) -> Result<(FrameSender, FrameReceiver), ConnectionError> {
        let (send, receive) = self.inner.open_bi().await?;
        Ok((FrameSender::new(send), FrameReceiver::new(receive)))
    }

    /// A new stream to the peer.
    pub async fn open_uni(&self) -> Result<FrameSender, ConnectionError> {
        self.inner.open_uni().await.map(FrameSender::new)
    }

    /// The next stream that the peer opens in both directions.
    pub async fn accept_bi(&self) -> Result<(FrameSender, FrameReceiver), ConnectionError> {
        let (send, receive) = self.inner.accept_bi().await?;
        Ok((FrameSender::new(send), FrameReceiver::new(receive)))
    }

    /// The next stream that the peer opens to us.
    pub async fn accept_uni(&self) -> Result<FrameReceiver, ConnectionError> {
        self.inner.accept_uni().await.map(FrameReceiver::new)
    }

    /// Sends what was written to its streams from the caller's thread, rather than when the runtime's
    /// thread has woken up for it. Only where this side has dialled; else it does nothing, and what was
    /// written is sent as ever.
    pub fn send_here(&self) {
        if let Some(driver) = self.driver.upgrade() {
            driver.run_here();
        }
    }

    /// Ends the connection, with a reason that the peer can log.
    pub fn close(&self, code: u32, reason: &str) {
        self.inner.close(VarInt::from_u32(code), reason.as_bytes());
    }

    /// Waits for the end of the connection and says why it ended.
    pub async fn closed(&self) -> ConnectionError {
        self.inner.closed().await
    }

    /// Why the connection has ended, where it has.
    pub fn close_reason(&self) -> Option<ConnectionError> {
        self.inner.close_reason()
    }

    /// What the transport has counted.
    pub fn stats(&self) -> LinkStats {
        let stats = self.inner.stats();
        LinkStats {
            rtt: stats.path.rtt,
            lost_packets: stats.path.lost_packets,
            sent_packets: stats.path.sent_packets,
            sent_bytes: stats.udp_tx.bytes,
            sends: stats.udp_tx.ios,
            mtu: stats.path.current_mtu,
        }
    }
}
