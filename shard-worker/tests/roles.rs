//! Every frame with which a conversation with a worker can begin, said by every role: those who may not
//! begin it are refused, and nothing is answered.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(dead_code, reason = "not every test needs all of the support")]

mod cluster;

use bytes::Bytes;
use cluster::*;
use shoal_protocol::activation::LinkHello;
use shoal_protocol::frame::FrameKind;
use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::quic::{Alpn, Expect};

/// Members other than the worker that is asked.
const MEMBERS: [NodeId; 3] = [NodeId::coordinator(2), NodeId::worker(2), NodeId::admin(1)];

/// Who may begin a conversation with a frame; nobody where it is never the first. A new kind does not
/// compile here before somebody has said who may send it.
fn may_begin(kind: FrameKind) -> Option<(Alpn, Role)> {
    match kind {
        FrameKind::LinkHello => Some((Alpn::Activations, Role::Worker)),
        // A request that is traced begins with its mark, and one that may share with whom.
        FrameKind::Generate | FrameKind::Trace | FrameKind::Tenant => {
            Some((Alpn::Requests, Role::Coordinator))
        }
        FrameKind::Open
        | FrameKind::Step
        | FrameKind::Close
        | FrameKind::Samples
        | FrameKind::Partial
        | FrameKind::Near
        | FrameKind::Token
        | FrameKind::Done
        | FrameKind::Failed
        | FrameKind::Vector
        | FrameKind::Reused
        | FrameKind::Message => None,
    }
}

#[tokio::test]
async fn no_frame_is_answered_but_to_the_role_that_may_send_it() {
    let cluster = Cluster::new();
    let worker = cluster.worker(1).await;
    let conversations = [
        (Alpn::Requests, worker.register.requests),
        (Alpn::Activations, worker.register.activations),
    ];
    for (alpn, address) in conversations {
        for node in MEMBERS {
            let client = cluster.endpoint(node, &[]);
            for kind in FrameKind::ALL {
                let expect = Expect::Node(worker.node());
                let connection = client.connect(address, expect, alpn, PATIENCE).await.unwrap();
                let answered = async {
                    let (mut sender, mut receiver) = connection.open_bi().await.ok()?;
                    let hello = LinkHello::default();
                    sender.send(*kind, &hello, Bytes::new(), Bytes::new()).await.ok()?;
                    sender.finish();
                    receiver.next().await.ok()?
                };
                assert!(within(answered).await.is_none(), "{node} was answered: {alpn}, {kind:?}");
                let role_may = match alpn {
                    Alpn::Requests => node.role == Role::Coordinator,
                    _ => node.role == Role::Worker,
                };
                if !role_may {
                    let reason = within(connection.closed()).await.to_string();
                    assert!(reason.contains("not allowed"), "{node}, {alpn}, {kind:?}: {reason}");
                    let begins = may_begin(*kind);
                    assert!(begins.is_none_or(|begins| begins != (alpn, node.role)));
                }
                connection.close(0, "");
            }
        }
    }
    // What else there is does not begin: TLS agrees on the one conversation of each socket alone.
    for (held, address) in conversations {
        for alpn in Alpn::ALL.into_iter().filter(|alpn| *alpn != held) {
            for node in MEMBERS {
                let client = cluster.endpoint(node, &[]);
                let expect = Expect::Node(worker.node());
                assert!(client.connect(address, expect, alpn, PATIENCE).await.is_err());
            }
        }
    }
}
