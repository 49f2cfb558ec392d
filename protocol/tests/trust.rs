//! One CA takes the place of another, over real sockets: who believes whom at which step.
#![cfg(feature = "quic")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::de::DeserializeOwned;
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::join::{Hex, JoinReply, JoinRequest, JoinToken, MESSAGE_LEN_MAX, RenewRequest};
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_protocol::quic::join::{JoinError, join};
use shoal_protocol::quic::renew::{is_elsewhere, renew, unused_token};
use shoal_protocol::quic::{Alpn, ConnectError, Connection, Endpoint, Expect, Identity};
use shoal_protocol::trust::Trust;

const SOON: Duration = Duration::from_secs(5);
const HOUR: Duration = Duration::from_secs(3600);
const C1: NodeId = NodeId::coordinator(1);
const W1: NodeId = NodeId::worker(1);

fn endpoint(identity: Identity, accepts: &[Alpn]) -> Endpoint {
    let loopback: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    Endpoint::bind(loopback, Arc::new(identity), accepts).unwrap()
}

fn ca() -> CertificateAuthority {
    CertificateAuthority::create(SystemTime::now()).unwrap()
}

/// CAs of which each took the place of the one before it.
struct Line(Vec<CertificateAuthority>);

impl Line {
    fn of(n: usize) -> Self {
        Self((0..n).map(|_| ca()).collect())
    }

    /// Believing the last `believed`, of which the last signs.
    fn trust(&self, believed: usize) -> Trust {
        let newest_first = || self.0.iter().rev();
        let cas = newest_first().take(believed).map(|ca| ca.certificate().to_vec()).collect();
        let lineage = self.0.windows(2).rev().flat_map(|pair| {
            let introduction = pair[0].introduce(&pair[1], SystemTime::now()).unwrap();
            [introduction, pair[0].certificate().to_vec()]
        });
        Trust { revision: self.0.len() as u64, cas, lineage: lineage.collect() }
    }

    fn identity(&self, ca: usize, node: NodeId) -> Identity {
        self.0[ca].issue_identity(node, SystemTime::now()).unwrap()
    }

    /// Of the newest CA.
    fn fresh(&self, node: NodeId, believed: usize) -> Identity {
        self.identity(self.0.len() - 1, node).trusting(self.trust(believed))
    }
}

/// Whether a conversation comes about, in both eyes.
async fn meet(client: Identity, server: Identity, alpn: Alpn) -> Result<(), &'static str> {
    let server = endpoint(server, &[alpn]);
    let client = endpoint(client, &[]);
    let accept = async { server.accept().await.unwrap().establish().await };
    let expect = Expect::Role(server.identity().unwrap().node.role);
    let (connected, accepted) =
        tokio::join!(client.connect(server.local_address(), expect, alpn, SOON), accept);
    match (connected, accepted) {
        (Ok(connection), Ok(_)) if !connection.was_distrusted() => Ok(()),
        (Err(error), _) => {
            assert!(error.is_distrust(), "{error}");
            Err("the server")
        }
        (Ok(connection), _) => {
            connection.closed().await;
            assert!(connection.was_distrusted());
            Err("the client")
        }
    }
}

#[tokio::test]
async fn while_both_are_believed_nobody_is_refused_whatever_they_know() {
    let line = Line::of(2);
    let both = line.trust(2);
    let (old_both, new_both) = (line.identity(0, W1).trusting(both.clone()), line.fresh(W1, 2));
    // Has not heard of it at all: what is shown to it comes with the old one's introduction.
    let unaware = line.identity(0, W1);
    for a in [&old_both, &new_both, &unaware] {
        for b in [&old_both, &new_both, &unaware] {
            let met = meet(a.clone(), b.clone(), Alpn::Activations).await;
            let knows = |x: &Identity| x.roots().len() == 2;
            // Two that both show the old one need to know no other.
            assert_eq!(met, Ok(()), "{} {}", knows(a), knows(b));
        }
    }
}

#[tokio::test]
async fn what_left_is_refused_and_leads_only_forward() {
    let line = Line::of(2);
    let old = line.identity(0, W1);
    let new = line.fresh(C1, 1);
    assert_eq!(meet(old.clone(), new.clone(), Alpn::Control).await, Err("the client"));
    // The other way round: who knows the new one alone does not believe what the old one signs.
    let dials = line.fresh(W1, 1);
    let server = line.identity(0, C1);
    assert_eq!(meet(dials, server, Alpn::Control).await, Err("the server"));
    // A certificate that the old CA signs and whose chain holds the introduction opens nothing.
    let forged = old.trusting(line.trust(1));
    assert_eq!(meet(forged, new, Alpn::Control).await, Err("the client"));
}

async fn serve<R: DeserializeOwned>(
    server: &Endpoint,
    answer: impl Fn(&R) -> JoinReply,
) -> Option<R> {
    let connection: Connection = server.accept().await?.establish().await.ok()?;
    let (mut sender, mut receiver) = connection.accept_bi().await.ok()?;
    let request: R = receiver.message(MESSAGE_LEN_MAX).await.ok()??;
    sender.send_message(&answer(&request), MESSAGE_LEN_MAX).await.unwrap();
    sender.finish();
    connection.closed().await;
    Some(request)
}

fn admitted(line: &Line, csr: &[u8], node: NodeId) -> JoinReply {
    let signs = line.0.last().unwrap();
    let certificate = signs.issue(csr, node, SystemTime::now()).unwrap();
    JoinReply::Admitted { node, certificate, trust: line.trust(2).for_workers() }
}

#[tokio::test]
async fn a_node_that_was_off_comes_back_from_as_long_ago_as_the_past_goes() {
    for n in 2..=5 {
        let line = Line::of(n);
        let server = endpoint(line.fresh(C1, 1), &[Alpn::Renew, Alpn::Control]);
        let old = line.identity(0, W1);
        let answer = |request: &RenewRequest| admitted(&line, &request.csr, request.node);
        let (_, renewed) =
            tokio::join!(serve(&server, answer), renew(server.local_address(), &old, SOON));
        let renewed = renewed.unwrap();
        assert_eq!((renewed.node, &renewed.key), (W1, &old.key));
        assert_eq!(renewed.shows(), line.0[n - 1].fingerprint());
        assert_eq!(meet(renewed, line.fresh(C1, 1), Alpn::Control).await, Ok(()));
    }
}

/// What a node may end for, and what it waits out.
#[tokio::test]
async fn who_has_to_do_with_a_node_no_more_is_told_from_who_cannot_help_it_now() {
    let line = Line::of(2);
    let mine = line.identity(0, W1);
    let says = async |answer: JoinReply| {
        let server = endpoint(line.fresh(C1, 1), &[Alpn::Renew]);
        let answer = |_: &RenewRequest| answer.clone();
        let (_, renewed) =
            tokio::join!(serve(&server, answer), renew(server.local_address(), &mine, SOON));
        renewed.unwrap_err().refuses_the_node()
    };
    let error = |code| WireError::new(code, "words");
    for (code, expected) in [
        (ErrorCode::NotFound, true),
        (ErrorCode::PermissionDenied, true),
        (ErrorCode::NotReady, false),
        (ErrorCode::Overloaded, false),
        (ErrorCode::Draining, false),
    ] {
        assert_eq!(says(JoinReply::Refused(error(code))).await, expected, "{code}");
    }
    assert!(says(JoinReply::Removed(error(ErrorCode::PermissionDenied))).await);

    let shows = async |server: Identity| {
        let server = endpoint(server, &[Alpn::Renew]);
        let accept = async { server.accept().await.unwrap().establish().await };
        let (_, renewed) = tokio::join!(accept, renew(server.local_address(), &mine, SOON));
        renewed.unwrap_err().refuses_the_node()
    };
    assert!(shows(ca().issue_identity(C1, SystemTime::now()).unwrap()).await, "another cluster");
    // Two clocks differ.
    for time in [SystemTime::now() - 48 * HOUR, SystemTime::now() + 48 * HOUR] {
        assert!(!shows(line.0[0].issue_identity(C1, time).unwrap()).await);
    }
    let nobody = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let silent = renew(nobody.local_addr().unwrap(), &mine, Duration::from_millis(200)).await;
    assert!(!silent.unwrap_err().refuses_the_node());
    assert!(!is_elsewhere(nobody.local_addr().unwrap(), &mine, Duration::from_millis(200)).await);
}

#[tokio::test]
async fn a_token_that_names_a_ca_from_before_goes_on() {
    let line = Line::of(3);
    let server = endpoint(line.fresh(C1, 1), &[Alpn::Join]);
    let token = |fingerprint| JoinToken {
        role: Role::Worker,
        ca_fingerprint: fingerprint,
        secret: [7; 32],
    };
    let answer = |request: &JoinRequest| admitted(&line, &request.csr, W1);
    let old = token(line.0[0].fingerprint());
    let (request, joined) =
        tokio::join!(serve(&server, answer), join(server.local_address(), &old, SOON));
    assert_eq!(request.unwrap().secret, old.secret);
    assert_eq!(joined.unwrap().shows(), line.0[2].fingerprint());

    // One that is not of this line is told nothing.
    let other = token(ca().fingerprint());
    let never = |_: &JoinRequest| unreachable!("the secret was sent");
    let (request, joined) =
        tokio::join!(serve(&server, never), join(server.local_address(), &other, SOON));
    assert!(request.is_none());
    let refused = matches!(joined, Err(JoinError::Connect(ConnectError::OtherCluster { .. })));
    assert!(refused, "{joined:?}");
}

#[test]
fn a_file_says_whom_to_believe_and_older_builds_read_its_first_part() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("identity");
    let line = Line::of(2);
    let plain = line.identity(0, W1);
    plain.save(&path).unwrap();
    let before = std::fs::read(&path).unwrap();
    assert_eq!(Identity::load(&path).unwrap(), Some(plain.clone()));
    let told = plain.trusting(line.trust(2));
    told.save(&path).unwrap();
    assert_eq!(Identity::load(&path).unwrap(), Some(told));
    assert!(std::fs::read(&path).unwrap().starts_with(&before));
    std::fs::write(&path, [&before[..], &[9, 9]].concat()).unwrap();
    assert!(Identity::load(&path).is_err());
}

#[test]
fn a_certificate_of_a_ca_that_is_not_believed_is_not_taken() {
    let line = Line::of(2);
    let mine = line.identity(0, W1);
    let csr = mine.renewal_request().unwrap();
    let next = line.0[1].issue(&csr, W1, SystemTime::now()).unwrap();
    assert!(mine.renewed(next.clone()).is_err());
    let renewed = mine.trusting(line.trust(2)).renewed(next).unwrap();
    assert_eq!(renewed.shows(), line.0[1].fingerprint());
}

#[test]
fn a_token_of_another_cluster_is_told_from_one_that_was_used() {
    let now = SystemTime::now();
    let [ours, next, other] = [ca(), ca(), ca()];
    let told = |me: &Identity, ca: &CertificateAuthority| {
        let (ca_fingerprint, secret) = (ca.fingerprint(), [7; 32]);
        unused_token(me, &JoinToken { role: Role::Worker, ca_fingerprint, secret })
    };
    let me = ours.issue_identity(NodeId::worker(4), now).unwrap();
    assert!(told(&me, &ours).contains("of the same cluster"));
    let said = told(&me, &other);
    let words = ["w4's", "empty --data", &Hex(&other.fingerprint()[..6]).to_string()];
    assert!(words.iter().all(|word| said.contains(*word)), "{said}");
    // One that was made while this worker was off, after a rotation that it has missed, is of its cluster: it says
    // that it does not know, and goes on.
    assert!(told(&me, &next).contains("rotated before or since"));
    // After a rotation a worker does not know the CA of its token any more, and a coordinator does.
    let trust = Trust {
        revision: 4,
        cas: vec![next.certificate().to_vec()],
        lineage: vec![ours.introduce(&next, now).unwrap(), ours.certificate().to_vec()],
    };
    let worker = me.trusting(trust.for_workers());
    let worker = Identity { ca: next.certificate().to_vec(), ..worker };
    assert!(told(&worker, &ours).contains("rotated before or since"));
    let coordinator = next.issue_identity(NodeId::coordinator(2), now).unwrap().trusting(trust);
    assert!(told(&coordinator, &ours).contains("of the same cluster"));
    assert!(told(&coordinator, &other).contains("does not know"));
}
