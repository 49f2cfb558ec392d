//! Transport settings: ours to own, because the defaults are made for the Internet.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

/// How often an idle connection proves that it lives. A killed peer sends nothing over UDP, so
/// silence is the only sign.
pub const KEEP_ALIVE: Duration = Duration::from_millis(250);

/// How long silence lasts before a peer counts as lost.
pub const IDLE_TIMEOUT: Duration = Duration::from_millis(1500);

/// What we ask of the kernel for each socket's buffers.
const SOCKET_BUFFER: usize = 8 << 20;

/// The largest packet: ten segments of this size in one GSO send stay under UDP's 65,507 bytes. One
/// more byte a segment and the send fails with EMSGSIZE, which looks like loss.
const MTU_MAX: u16 = 6500;

/// Streams that a peer may have open at once: requests in flight on one connection to a head.
const STREAMS_MAX: u32 = 4096;

/// Bytes of beats that wait in either direction: a second's worth of them. Older ones are dropped, and
/// say nothing any more.
const DATAGRAMS_BUFFER: usize = 4 << 10;

/// The least credit window: one frame of a decode step and some records, whatever the kernel gave.
const WINDOW_MIN: usize = 64 << 10;

/// Asks for large socket buffers and returns the receive buffer that was granted, in bytes.
pub(super) fn size_buffers(socket: &socket2::Socket) -> std::io::Result<usize> {
    // A refusal is no error: what counts is what is read back.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    // The kernel reports twice the payload space that it grants.
    Ok(socket.recv_buffer_size()? / 2)
}

/// Settings for a socket whose receive buffer holds `granted` bytes.
///
/// The credit window is at most half of it: what is in flight then fits the buffer together with
/// the kernel's own cost per packet, so a busy receiver delays the sender and loses nothing.
pub(super) fn transport(granted: usize, local: SocketAddr) -> Arc<TransportConfig> {
    let window = (granted / 2).clamp(WINDOW_MIN, SOCKET_BUFFER);
    let mut congestion = CubicConfig::default();
    // On a LAN the credit window is the bound that matters; slow start from ten packets would cost
    // several round trips on the first prompt of each link. Loss still shrinks the window.
    congestion.initial_window(window as u64);

    let mut config = TransportConfig::default();
    config
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(IdleTimeout::from(
            VarInt::from_u32(IDLE_TIMEOUT.as_millis() as u32),
        )))
        .receive_window(VarInt::from_u32(window as u32))
        .stream_receive_window(VarInt::from_u32(window as u32))
        .send_window(SOCKET_BUFFER as u64)
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(STREAMS_MAX))
        .datagram_receive_buffer_size(Some(DATAGRAMS_BUFFER))
        .datagram_send_buffer_size(DATAGRAMS_BUFFER)
        .enable_segmentation_offload(true)
        .congestion_controller_factory(Arc::new(congestion));
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(MTU_MAX);
    config.mtu_discovery_config(Some(discovery));
    if local.ip().is_loopback() {
        // Loopback takes 64 KiB packets; there is nothing to discover.
        config.initial_mtu(MTU_MAX);
        config.initial_rtt(Duration::from_millis(1));
    }
    Arc::new(config)
}
