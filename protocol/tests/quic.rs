//! The transport over real sockets: who is let in, and what frames cost.
#![cfg(feature = "quic")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use shoal_protocol::activation::LinkHello;
use shoal_protocol::frame::{Flat, FrameKind};
use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::join::{JoinReply, JoinRequest, JoinToken, MESSAGE_LEN_MAX};
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_protocol::quic::join::{JoinError, join};
use shoal_protocol::quic::{
    AcceptError, Alpn, ConnectError, Connection, Endpoint, Expect, RecvError,
};

const SOON: Duration = Duration::from_secs(5);

fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

fn authority() -> CertificateAuthority {
    CertificateAuthority::create(SystemTime::now()).unwrap()
}

fn endpoint(ca: &CertificateAuthority, node: NodeId, accepts: &[Alpn]) -> Endpoint {
    let identity = ca.issue_identity(node, SystemTime::now()).unwrap();
    Endpoint::bind(loopback(), Arc::new(identity), accepts).unwrap()
}

/// Connects and accepts at once; each side's result.
async fn meet(
    client: &Endpoint,
    server: &Endpoint,
    expect: Expect,
    alpn: Alpn,
) -> (Result<Connection, ConnectError>, Result<Connection, AcceptError>) {
    let accept = async { server.accept().await.unwrap().establish().await };
    tokio::join!(client.connect(server.local_address(), expect, alpn, SOON), accept)
}

#[tokio::test]
async fn both_sides_know_each_other() {
    let ca = authority();
    let worker = endpoint(&ca, NodeId::worker(3), &[]);
    let coordinator = endpoint(&ca, NodeId::coordinator(1), &[Alpn::Control, Alpn::Join]);
    let (client, server) =
        meet(&worker, &coordinator, Expect::Role(Role::Coordinator), Alpn::Control).await;
    let (client, server) = (client.unwrap(), server.unwrap());
    assert_eq!(client.peer(), Some(NodeId::coordinator(1)));
    assert_eq!(server.peer(), Some(NodeId::worker(3)));
    assert_eq!(server.alpn(), Alpn::Control);
}

#[tokio::test]
async fn another_clusters_node_is_not_let_in() {
    let stranger = endpoint(&authority(), NodeId::worker(1), &[]);
    let server = endpoint(&authority(), NodeId::worker(2), &[Alpn::Activations]);
    let (client, server) =
        meet(&stranger, &server, Expect::Role(Role::Worker), Alpn::Activations).await;
    assert!(matches!(client, Err(ConnectError::Handshake { .. })), "{client:?}");
    assert!(matches!(server, Err(AcceptError::Handshake { .. })), "{server:?}");
}

#[tokio::test]
async fn a_role_may_only_begin_its_own_conversations() {
    let ca = authority();
    let server = endpoint(&ca, NodeId::coordinator(1), &Alpn::ALL);
    // Who may begin each. What a new conversation allows is to be written down here.
    let may = |alpn| match alpn {
        Alpn::Requests | Alpn::Raft => [Role::Coordinator].as_slice(),
        Alpn::Activations | Alpn::Control | Alpn::Blobs => &[Role::Worker],
        Alpn::Admin => &[Role::Admin],
        Alpn::Join | Alpn::Renew => &[Role::Coordinator, Role::Worker, Role::Admin],
    };
    for alpn in Alpn::ALL {
        for node in [NodeId::coordinator(2), NodeId::worker(1), NodeId::admin(1)] {
            let client = endpoint(&ca, node, &[]);
            let (_, accepted) = meet(&client, &server, Expect::Role(Role::Coordinator), alpn).await;
            match accepted {
                Ok(connection) => {
                    assert_eq!((connection.peer(), connection.alpn()), (Some(node), alpn));
                    assert!(may(alpn).contains(&node.role), "{node} began {alpn}");
                }
                Err(AcceptError::Role { .. }) => {
                    assert!(!may(alpn).contains(&node.role), "{node} may not begin {alpn}");
                }
                Err(other) => panic!("{node}, {alpn}: {other}"),
            }
        }
    }
}

#[tokio::test]
async fn a_client_refuses_somebody_else() {
    let ca = authority();
    let client = endpoint(&ca, NodeId::worker(1), &[]);
    let server = endpoint(&ca, NodeId::worker(2), &[Alpn::Activations]);
    let (connected, _) =
        meet(&client, &server, Expect::Node(NodeId::worker(9)), Alpn::Activations).await;
    assert!(
        matches!(connected, Err(ConnectError::WrongPeer { found, .. }) if found == NodeId::worker(2))
    );
}

#[tokio::test]
async fn an_expired_certificate_is_not_let_in() {
    let ca = authority();
    let week_ago = SystemTime::now() - Duration::from_secs(7 * 24 * 3600);
    let identity = ca.issue_identity(NodeId::worker(1), week_ago).unwrap();
    let client = Endpoint::bind(loopback(), Arc::new(identity), &[]).unwrap();
    let server = endpoint(&ca, NodeId::worker(2), &[Alpn::Activations]);
    let (_, accepted) = meet(&client, &server, Expect::Role(Role::Worker), Alpn::Activations).await;
    assert!(matches!(accepted, Err(AcceptError::Handshake { .. })), "{accepted:?}");
}

/// Serves one join with whatever `reply` makes of the request; `None` where no request came.
async fn serve_join(
    server: &Endpoint,
    reply: impl Fn(&JoinRequest) -> JoinReply,
) -> Option<JoinRequest> {
    let connection = server.accept().await?.establish().await.ok()?;
    let (mut sender, mut receiver) = connection.accept_bi().await.ok()?;
    let request: JoinRequest = receiver.message(MESSAGE_LEN_MAX).await.ok()??;
    sender.send_message(&reply(&request), MESSAGE_LEN_MAX).await.unwrap();
    sender.finish();
    connection.closed().await;
    Some(request)
}

#[tokio::test]
async fn a_joiner_gets_a_certificate_that_works() {
    let ca = authority();
    let server = endpoint(&ca, NodeId::coordinator(1), &[Alpn::Control, Alpn::Join]);
    let token = JoinToken { role: Role::Worker, ca_fingerprint: ca.fingerprint(), secret: [7; 32] };
    let issue = |request: &JoinRequest| JoinReply::Joined {
        node: NodeId::worker(5),
        certificate: ca.issue(&request.csr, NodeId::worker(5), SystemTime::now()).unwrap(),
        ca: ca.certificate().to_vec(),
    };
    let (request, identity) =
        tokio::join!(serve_join(&server, issue), join(server.local_address(), &token, SOON));
    assert_eq!(request.unwrap().secret, token.secret);
    let client = Endpoint::bind(loopback(), Arc::new(identity.unwrap()), &[]).unwrap();
    let (_, accepted) =
        meet(&client, &server, Expect::Role(Role::Coordinator), Alpn::Control).await;
    assert_eq!(accepted.unwrap().peer(), Some(NodeId::worker(5)));
}

#[tokio::test]
async fn the_secret_is_not_sent_to_another_ca() {
    let server = endpoint(&authority(), NodeId::coordinator(1), &[Alpn::Join]);
    let token = JoinToken { role: Role::Worker, ca_fingerprint: [1; 32], secret: [7; 32] };
    let never = |_: &JoinRequest| unreachable!("the secret was sent");
    let (request, joined) =
        tokio::join!(serve_join(&server, never), join(server.local_address(), &token, SOON));
    assert!(request.is_none());
    assert!(
        matches!(joined, Err(JoinError::Connect(ConnectError::OtherCluster { .. }))),
        "{joined:?}"
    );
}

#[tokio::test]
async fn the_secret_is_not_sent_to_a_worker() {
    let ca = authority();
    let server = endpoint(&ca, NodeId::worker(1), &[Alpn::Join]);
    let token = JoinToken { role: Role::Admin, ca_fingerprint: ca.fingerprint(), secret: [7; 32] };
    let never = |_: &JoinRequest| unreachable!("the secret was sent");
    let (request, joined) =
        tokio::join!(serve_join(&server, never), join(server.local_address(), &token, SOON));
    assert!(request.is_none());
    assert!(matches!(joined, Err(JoinError::Broken { .. })), "{joined:?}");
}

#[tokio::test]
async fn without_a_certificate_there_is_only_join() {
    let ca = authority();
    // Everything but the ALPN is a joiner's: no certificate, the right CA pinned.
    let server = endpoint(&ca, NodeId::coordinator(1), &[Alpn::Control]);
    let token = JoinToken { role: Role::Worker, ca_fingerprint: ca.fingerprint(), secret: [7; 32] };
    let accept = async { server.accept().await.unwrap().establish().await };
    let (joined, accepted) = tokio::join!(join(server.local_address(), &token, SOON), accept);
    assert!(joined.is_err());
    assert!(matches!(accepted, Err(AcceptError::Handshake { .. })), "{accepted:?}");
}

/// A buffer that counts how often it is given back.
struct Counted(Vec<u8>, Arc<std::sync::atomic::AtomicUsize>);

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.1.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }
}

#[tokio::test]
async fn frames_arrive_whole_and_payloads_are_given_back() {
    let ca = authority();
    let client = endpoint(&ca, NodeId::worker(1), &[]);
    let server = endpoint(&ca, NodeId::worker(2), &[Alpn::Activations]);
    let (out, incoming) =
        meet(&client, &server, Expect::Node(NodeId::worker(2)), Alpn::Activations).await;
    let (out, incoming) = (out.unwrap(), incoming.unwrap());
    let released = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let payload: Vec<u8> = (0..300_000u32).map(|i| ((i * 31) >> 3) as u8).collect();

    let sending = async {
        let mut sender = out.open_uni().await.unwrap();
        for i in 0..20u64 {
            let hello = LinkHello { generation: i, ..LinkHello::default() };
            let owned = Bytes::from_owner(Counted(payload.clone(), Arc::clone(&released)));
            let address = owned.as_ptr();
            let same = owned.clone();
            sender
                .send(FrameKind::LinkHello, &hello, Bytes::from_static(b"rec"), owned)
                .await
                .unwrap();
            assert_eq!(same.as_ptr(), address, "the payload was handed over by reference");
        }
        sender.finish();
        sender.stopped().await;
    };
    let receiving = async {
        let mut receiver = incoming.accept_uni().await.unwrap();
        let mut count = 0;
        while let Some(head) = receiver.next().await.unwrap() {
            assert_eq!(LinkHello::read_from(head.header()).unwrap().generation, count);
            let mut records = [0; 3];
            receiver.read_into(&mut records).await.unwrap();
            let mut tensor = vec![0; head.body_len - 3];
            receiver.read_into(&mut tensor).await.unwrap();
            assert_eq!(tensor, payload);
            count += 1;
        }
        count
    };
    let ((), count) = tokio::join!(sending, receiving);
    assert_eq!(count, 20);
    assert_eq!(released.load(std::sync::atomic::Ordering::SeqCst), 20, "every buffer came back");
    assert_eq!(out.stats().lost_packets, 0);
    assert!(
        out.stats().sends * 2 < out.stats().sent_packets,
        "segmentation offload is at work: {:?}",
        out.stats()
    );
}

#[tokio::test]
async fn a_body_over_its_bound_is_refused_before_it_is_read() {
    let ca = authority();
    let client = endpoint(&ca, NodeId::worker(1), &[]);
    let server = endpoint(&ca, NodeId::coordinator(1), &[Alpn::Control]);
    let (out, incoming) =
        meet(&client, &server, Expect::Node(NodeId::coordinator(1)), Alpn::Control).await;
    let (mut sender, _) = out.unwrap().open_bi().await.unwrap();
    sender.send_message(&vec![0u8; 5000], 6000).await.unwrap();
    let (_, mut receiver) = incoming.unwrap().accept_bi().await.unwrap();
    let refused = receiver.message::<Vec<u8>>(4096).await;
    assert!(matches!(refused, Err(RecvError::Frame(_))), "{refused:?}");
}

#[tokio::test]
async fn a_silent_peer_is_lost_within_two_seconds() {
    let ca = authority();
    let server = endpoint(&ca, NodeId::worker(2), &[Alpn::Activations]);
    let address = server.local_address();
    // The peer lives on a runtime of its own, which is then frozen as SIGSTOP would freeze it.
    let identity = ca.issue_identity(NodeId::worker(1), SystemTime::now()).unwrap();
    let (freeze, frozen) = std::sync::mpsc::sync_channel::<()>(1);
    let peer = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let connection = runtime.block_on(async {
            let endpoint = Endpoint::bind(loopback(), Arc::new(identity), &[]).unwrap();
            let expect = Expect::Node(NodeId::worker(2));
            let connection =
                endpoint.connect(address, expect, Alpn::Activations, SOON).await.unwrap();
            // Whoever opens a stream has finished the handshake.
            connection.open_uni().await.unwrap();
            connection
        });
        let _ = frozen.recv();
        drop(connection);
    });
    let connection = server.accept().await.unwrap().establish().await.unwrap();
    let start = std::time::Instant::now();
    let reason = connection.closed().await;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(reason.to_string().contains("timed out"), "{reason}");
    drop(freeze);
    peer.join().unwrap();
}

/// The public key that a certificate certifies.
fn public_key(certificate: &[u8]) -> Vec<u8> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).unwrap();
    parsed.public_key().raw.to_vec()
}

#[test]
fn damaged_signing_requests_certify_no_other_key() {
    let ca = authority();
    let key = rcgen::KeyPair::generate().unwrap();
    let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
    let issue = |csr: &[u8]| ca.issue(csr, NodeId::worker(1), SystemTime::now());
    let certified = public_key(&issue(&csr).unwrap());
    let mut refused = 0;
    for at in 0..csr.len() {
        for bit in 0..8 {
            let mut damaged = csr.clone();
            damaged[at] ^= 1 << bit;
            match issue(&damaged) {
                // The envelope's own tag is not covered by the signature; what counts is the key.
                Ok(certificate) => {
                    assert_eq!(public_key(&certificate), certified, "bit {bit} of byte {at}")
                }
                Err(_) => refused += 1,
            }
        }
        assert!(issue(&csr[..at]).is_err());
    }
    assert!(
        refused > csr.len() * 7,
        "only {refused} of {} damaged requests were refused",
        csr.len() * 8
    );
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_from_then_on() {
    let ca = authority();
    let worker = endpoint(&ca, NodeId::worker(3), &[]);
    let coordinator = endpoint(&ca, NodeId::coordinator(1), &[Alpn::Control]);
    let role = Expect::Role(Role::Coordinator);
    let (before, _kept) = meet(&worker, &coordinator, role, Alpn::Control).await;
    let renew = |endpoint: &Endpoint, node| {
        let identity = ca.issue_identity(node, SystemTime::now()).unwrap();
        // A clone, as the parts of a node hold them.
        endpoint.clone().renew(Arc::new(identity)).unwrap();
    };
    // Other names, so that they can be told apart.
    renew(&coordinator, NodeId::coordinator(2));
    renew(&worker, NodeId::worker(4));
    let (client, server) = meet(&worker, &coordinator, role, Alpn::Control).await;
    assert_eq!(client.unwrap().peer(), Some(NodeId::coordinator(2)));
    assert_eq!(server.unwrap().peer(), Some(NodeId::worker(4)));
    assert!(before.unwrap().close_reason().is_none(), "a renewal broke a connection");
}
