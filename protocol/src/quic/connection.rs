//! A connection whose peer is known.

use std::net::SocketAddr;
use std::time::Duration;

use quinn::{ConnectionError, SendDatagramError, VarInt};
use rustls_pki_types::CertificateDer;

use super::alpn::Alpn;
use super::error::is_distrust;
use super::identity::{NoNode, node_of};
use super::stream::{FrameReceiver, FrameSender};
use crate::id::NodeId;

/// What a connection's transport has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Packets declared lost.
    pub lost_packets: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Frames of the transport that came in packets whose seal was good.
    pub received_frames: u64,
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
    peer: Option<NodeId>,
    alpn: Alpn,
}

impl Connection {
    pub(super) fn new(inner: quinn::Connection, peer: Option<NodeId>, alpn: Alpn) -> Self {
        Self { inner, peer, alpn }
    }

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

    /// Bytes that both ends can work out and nobody else, others for each label (RFC 5705, RFC 8446 7.5);
    /// nothing where the transport has none.
    pub fn shared_secret(&self, label: &str) -> Option<[u8; 32]> {
        let mut secret = [0; 32];
        self.inner.export_keying_material(&mut secret, label.as_bytes(), &[]).ok()?;
        Some(secret)
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

    /// Sends a small message that may be lost. It goes before what waits in streams.
    pub(super) fn send_datagram(&self, message: bytes::Bytes) -> Result<(), SendDatagramError> {
        self.inner.send_datagram(message)
    }

    /// The next small message of the peer. Cancel safe.
    pub(super) async fn read_datagram(&self) -> Result<bytes::Bytes, ConnectionError> {
        self.inner.read_datagram().await
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

    /// Whether it has ended because one side did not believe the other's certificate. A client hears that
    /// only after its handshake.
    pub fn was_distrusted(&self) -> bool {
        self.close_reason().is_some_and(|reason| is_distrust(&reason))
    }

    /// What the peer said, where it has ended the connection because this node was removed from the cluster.
    pub fn removal(&self) -> Option<String> {
        match self.close_reason()? {
            ConnectionError::ApplicationClosed(close)
                if close.error_code == VarInt::from_u32(super::close_code::REMOVED) =>
            {
                Some(String::from_utf8_lossy(&close.reason).into_owned())
            }
            _ => None,
        }
    }

    /// What the transport has counted.
    pub fn stats(&self) -> LinkStats {
        let stats = self.inner.stats();
        LinkStats {
            rtt: stats.path.rtt,
            lost_packets: stats.path.lost_packets,
            sent_packets: stats.path.sent_packets,
            received_frames: stats.frame_rx.acks
                + stats.frame_rx.datagram
                + stats.frame_rx.ping
                + stats.frame_rx.stream
                + stats.frame_rx.max_data
                + stats.frame_rx.max_stream_data,
            sent_bytes: stats.udp_tx.bytes,
            sends: stats.udp_tx.ios,
            mtu: stats.path.current_mtu,
        }
    }
}

/// What the peer's certificate says, where it has shown one.
pub(super) fn peer_node(connection: &quinn::Connection) -> Option<Result<NodeId, NoNode>> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.first().map(node_of)
}
