//! Who gets a place when many knock.

use std::net::Ipv4Addr;
use std::time::{Duration, SystemTime};

use super::*;
use crate::id::{NodeId, Role};
use crate::quic::ca::CertificateAuthority;
use crate::quic::{ConnectError, Endpoint, Expect};

const SOON: Duration = Duration::from_secs(5);
const SMALL: Bounds = Bounds { all: 6, unproven: 3, of_one_source: 2 };

fn source(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

#[test]
fn strangers_leave_room_for_members() {
    let mut counts = Counts::default();
    // Made-up addresses, among them a member's.
    for _ in 0..SMALL.unproven {
        assert_eq!(counts.door(SMALL, source(1), false), Door::Open);
        counts.enter(source(1), false);
    }
    assert_eq!(counts.door(SMALL, source(1), false), Door::Prove);
    // The member itself has its full share, and so has each stranger.
    for _ in 0..SMALL.of_one_source {
        assert_eq!(counts.door(SMALL, source(1), true), Door::Open);
        counts.enter(source(1), true);
    }
    assert_eq!(counts.door(SMALL, source(1), true), Door::Shut);
    assert_eq!(counts.door(SMALL, source(2), true), Door::Open);
    counts.enter(source(2), true);
    assert_eq!(counts.door(SMALL, source(3), true), Door::Shut, "the house is full");
    // Places are given back.
    counts.leave(source(1), true);
    assert_eq!(counts.door(SMALL, source(1), true), Door::Open);
    counts.leave(source(1), true);
    counts.leave(source(2), true);
    assert!(counts.proven.is_empty());
    assert_eq!((counts.all, counts.unproven), (3, 3));
    counts.leave(source(1), false);
    assert_eq!(counts.door(SMALL, source(4), false), Door::Open);
}

#[test]
fn an_ipv6_network_is_one_source() {
    let source = |text: &str| source_of(text.parse().unwrap());
    assert_eq!(source("2001:db8::1"), source("2001:db8::ffff:1"));
    assert_ne!(source("2001:db8::1"), source("2001:db8:0:1::1"));
    assert_eq!(source("::ffff:10.0.0.1"), source("10.0.0.1"));
    assert_ne!(source("10.0.0.2"), source("10.0.0.1"));
}

#[tokio::test]
async fn a_busy_socket_asks_for_a_proof_and_bounds_each_source() {
    let ca = CertificateAuthority::create(SystemTime::now()).unwrap();
    let endpoint = |node, accepts: &[Alpn]| {
        let identity = ca.issue_identity(node, SystemTime::now()).unwrap();
        Endpoint::bind((Ipv4Addr::LOCALHOST, 0).into(), Arc::new(identity), accepts).unwrap()
    };
    let mut server = endpoint(NodeId::coordinator(1), &[Alpn::Control]);
    server.handshakes.bounds = Bounds { all: 4, unproven: 1, of_one_source: 1 };
    let client = endpoint(NodeId::worker(1), &[]);
    let knock = || {
        let (client, address) = (client.clone(), server.local_address());
        let expect = Expect::Role(Role::Coordinator);
        tokio::spawn(async move { client.connect(address, expect, Alpn::Control, SOON).await })
    };
    let next = async || tokio::time::timeout(SOON, server.accept()).await.unwrap().unwrap();

    let first = knock();
    let unproven = next().await;
    assert!(!unproven.place.proven);
    // The second one is let in once it has shown that it is where it says.
    let second = knock();
    let proven = next().await;
    assert!(proven.place.proven);
    let third = knock();
    tokio::select! {
        refused = third => {
            let refused = refused.unwrap();
            assert!(matches!(refused, Err(ConnectError::Handshake { .. })), "{refused:?}");
        }
        _ = server.accept() => panic!("more than one of a source"),
    }
    // Both go on as if nothing had been; then there is room again.
    for (accepting, client) in [(proven, second), (unproven, first)] {
        let (accepted, connected) = tokio::join!(accepting.establish(), client);
        assert_eq!(accepted.unwrap().peer(), Some(NodeId::worker(1)));
        connected.unwrap().unwrap();
    }
    assert_eq!(server.handshakes.lock().all, 0);
}

#[tokio::test]
async fn without_a_certificate_there_are_the_conversations_of_strangers_alone() {
    let ca = CertificateAuthority::create(SystemTime::now()).unwrap();
    let any = (Ipv4Addr::LOCALHOST, 0).into();
    let identity = ca.issue_identity(NodeId::coordinator(1), SystemTime::now()).unwrap();
    let server = Endpoint::bind(any, Arc::new(identity), &Alpn::ALL).unwrap();
    for alpn in Alpn::ALL {
        let client = Endpoint::open(any).unwrap();
        let address = server.local_address();
        let accept = async { server.accept().await.unwrap().establish().await };
        let connect = client.connect_pinned(address, ca.fingerprint(), alpn, SOON);
        match tokio::join!(connect, accept).1 {
            Ok(connection) => {
                assert!(matches!(alpn, Alpn::Join | Alpn::Renew), "{alpn} was begun by nobody");
                assert_eq!((connection.peer(), connection.alpn()), (None, alpn));
            }
            Err(AcceptError::NoCertificate { .. }) => {
                assert!(!alpn.without_client_certificate(), "{alpn}");
            }
            Err(other) => panic!("{alpn}: {other}"),
        }
    }
}
