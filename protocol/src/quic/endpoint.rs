//! A UDP socket, and who listens on it.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ConnectionError, TransportConfig, TransportErrorCode, VarInt};

use super::accept::{Accepting, Handshakes};
use super::alpn::{Alpn, Expect};
use super::close_code;
use super::connection::{Connection, peer_node};
use super::error::{ConnectError, EndpointError};
use super::identity::{Identity, NoNode, TLS_NAME};
use super::settings;
use super::tls::{self, TlsError};

/// How long a handshake may take, on either side.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// TLS's alert where no known authority has signed a certificate (RFC 8446, 6.2).
const UNKNOWN_CA: u8 = 48;

/// One UDP socket with one driver task on the runtime that called `bind`.
#[derive(Clone, Debug)]
pub struct Endpoint {
    inner: quinn::Endpoint,
    /// Shared by all clones, so that a renewed certificate reaches each of them.
    identity: Arc<RwLock<Option<Arc<Identity>>>>,
    accepts: Arc<[Alpn]>,
    transport: Arc<TransportConfig>,
    address: SocketAddr,
    /// Shared by all clones too.
    pub(super) handshakes: Handshakes,
}

impl Endpoint {
    /// Opens a socket. `accepts` may be empty: then nobody can connect to it.
    pub fn bind(
        address: SocketAddr,
        identity: Arc<Identity>,
        accepts: &[Alpn],
    ) -> Result<Self, EndpointError> {
        let endpoint = Self::reserve(address, accepts)?;
        endpoint.renew(identity)?;
        Ok(endpoint)
    }

    /// Opens a socket for somebody who does not know yet who it is: nobody gets in before `renew` says so.
    pub fn reserve(address: SocketAddr, accepts: &[Alpn]) -> Result<Self, EndpointError> {
        let mut endpoint = Self::open(address)?;
        endpoint.accepts = accepts.into();
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
        let runtime: Arc<dyn quinn::Runtime> = Arc::new(quinn::TokioRuntime);
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
            handshakes: Handshakes::default(),
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
        let inner = self.handshake(address, config, &expect.to_string(), deadline).await?;
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
        Ok(Connection::new(inner, Some(node), alpn))
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
        let connected = self.handshake(address, config, "a coordinator", deadline).await;
        let inner = connected.map_err(|error| match error {
            ConnectError::Handshake { source: ConnectionError::TransportError(why), .. }
                if why.code == TransportErrorCode::crypto(UNKNOWN_CA) =>
            {
                ConnectError::OtherCluster { address }
            }
            error => error,
        })?;
        let peer = peer_node(&inner).and_then(Result::ok);
        Ok(Connection::new(inner, peer, alpn))
    }

    async fn handshake(
        &self,
        address: SocketAddr,
        tls: rustls::ClientConfig,
        expect: &str,
        deadline: Duration,
    ) -> Result<quinn::Connection, ConnectError> {
        let tls = QuicClientConfig::try_from(tls).map_err(|error| TlsError(error.to_string()))?;
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(Arc::clone(&self.transport));
        let connecting = self
            .inner
            .connect_with(config, address, TLS_NAME)
            .map_err(|source| ConnectError::Address { address, source })?;
        let deadline = deadline.min(HANDSHAKE_TIMEOUT);
        match tokio::time::timeout(deadline, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(source)) => {
                Err(ConnectError::Handshake { address, expect: expect.to_owned(), source })
            }
            Err(_) => Err(ConnectError::Timeout { address, expect: expect.to_owned(), deadline }),
        }
    }

    /// The next client that knocks; `None` once the endpoint is closed. Call `establish` in a task of
    /// its own, so that a slow client does not hold up the others. Those for whom there is no place are
    /// turned away here. Cancel safe.
    pub async fn accept(&self) -> Option<Accepting> {
        loop {
            let incoming = self.inner.accept().await?;
            if let Some(accepting) = self.handshakes.admit(incoming) {
                return Some(accepting);
            }
            // There may be thousands of them, and there are other tasks.
            tokio::task::yield_now().await;
        }
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
