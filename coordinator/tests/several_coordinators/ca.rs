//! One CA after another: who has its key, and who is believed meanwhile.

use std::path::Path;
use std::time::SystemTime;

use shoal_coordinator::Ended;
use shoal_protocol::access::AccessCall;
use shoal_protocol::admin::{AdminCall, AdminReply, Vote};
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_protocol::quic::{AdminContext, Alpn, Expect};
use shoal_protocol::trust::fingerprint;

use super::cluster::{C, Cluster, LOOK, hex};
use crate::control_support::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_ca_rotates_while_the_leader_dies_and_its_old_certificates_open_nothing() {
    let mut cluster = Cluster::of_three().await;
    let leader = cluster.leader(0).await;
    let (asked, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let old = AdminContext::load(cluster.node(asked).admin_context()).unwrap().unwrap();
    let token = cluster.operator(asked).await.token(Role::Worker, 1, 600).await;
    let before = cluster.cas(asked).await.cas[0].fingerprint.clone();
    assert_eq!(before, hex(&fingerprint(&old.identity.ca)));

    cluster.rotate(asked, false).await;
    cluster.kill(leader);
    assert_ne!(cluster.leader(other).await, leader);
    // Said again it goes on with the same one.
    cluster.rotate(other, false).await;
    cluster.restart(leader).await;
    let view = cluster.until_rotated(asked, 1).await;
    assert_eq!((view.cas.len(), &view.past[0].fingerprint), (1, &before));
    let signing = view.cas[0].fingerprint.clone();
    for index in 0..3 {
        let view = cluster.until_rotated(index, 1).await;
        assert_eq!(view.cas[0].fingerprint, signing);
        assert_eq!(cluster.shows(index), signing);
    }
    // What the old CA signed is refused, and who knows the old CA alone knows the cluster by it.
    for index in 0..3 {
        let client = endpoint(old.identity.clone());
        let address = cluster.node(index).cluster_address();
        let expect = Expect::Role(Role::Coordinator);
        let connection = client.connect(address, expect, Alpn::Admin, DEADLINE).await.unwrap();
        within("the end", connection.closed()).await;
        assert!(connection.was_distrusted(), "{:?}", connection.close_reason());
    }
    // A token from before lets in still.
    let joined = try_join(cluster.node(other).cluster_address(), &token).await.unwrap();
    assert_eq!(hex(&joined.shows()), signing);

    // Once more, and then all of them start again.
    cluster.access(asked, AccessCall::RemoveNode { node: joined.node, force: true }).await;
    cluster.rotate(other, false).await;
    cluster.until_rotated(other, 2).await;
    for index in 0..3 {
        cluster.kill(index);
    }
    for index in 0..3 {
        cluster.restart(index).await;
    }
    for index in 0..3 {
        cluster.leader(index).await;
        let view = cluster.until_rotated(index, 2).await;
        assert_eq!(cluster.shows(index), view.cas[0].fingerprint);
        cluster.operator(index).await.token(Role::Worker, 1, 60).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_was_off_during_two_rotations_comes_back_where_the_majority_lacks_it() {
    let mut cluster = Cluster::of_three().await;
    let leader = cluster.leader(0).await;
    // The founder holds the oldest key, and was let in by nobody.
    let (off, asked) = if leader == 0 { (1, 0) } else { (0, leader) };
    cluster.rotate(asked, false).await;
    cluster.until_rotated(asked, 1).await;
    cluster.kill(off);
    cluster.rotate(asked, true).await;
    let view = cluster.until_rotated(asked, 2).await;
    // Without the third there is no majority before the one that was off is believed again.
    cluster.kill(3 - off - asked);
    cluster.restart(off).await;
    let signing = &view.cas[0].fingerprint;
    // It writes its operator a context when it has the key.
    let back = async {
        let context = cluster.node(off).admin_context();
        while hex(&AdminContext::load(context).unwrap().unwrap().identity.shows()) != *signing {
            tokio::time::sleep(LOOK).await;
        }
    };
    let believed = tokio::time::timeout(DEADLINE * 4, back).await;
    assert!(believed.is_ok(), "no certificate of the CA that signs");
    let came = cluster.until_rotated(off, 2).await;
    assert_eq!(came.cas, view.cas);
    assert_eq!(cluster.shows(off), *signing);
    within("a certificate of it", async {
        let call = AccessCall::RenewAdmin { csr: csr() };
        while matches!(cluster.access(off, call.clone()).await, AdminReply::Refused(_)) {
            tokio::time::sleep(LOOK).await;
        }
    })
    .await;
}

/// A disk that takes its time to sync must not hold up what the coordinators say to each other: here it hangs under
/// the leader, beside which no other thread is left to the runtime.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_leader_whose_disk_hangs_while_the_ca_is_rotated_leads_on() {
    let cluster = Cluster::of_three().await;
    let leader = cluster.leader(0).await;
    let asked = (leader + 1) % 3;
    let hangs = Hanging::beside(&cluster.data(leader).join("identity"));
    cluster.rotate(asked, false).await;
    // The others have come along, by a log that the leader drives.
    within("all but the leader's part", async {
        loop {
            let rotation = cluster.cas(asked).await.rotation.unwrap();
            if rotation.waits_for == [C[leader]] {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    })
    .await;
    for index in 0..3 {
        assert_eq!(cluster.leader(index).await, leader);
    }
    drop(hangs);
    let view = cluster.until_rotated(asked, 1).await;
    assert_eq!(cluster.shows(leader), view.cas[0].fingerprint);
}

/// Where a file's scratch file is to be there is a pipe that nobody reads: whoever opens it waits, until this is
/// dropped, or a test that waits for the one who waits has failed.
struct Hanging {
    over: Option<std::sync::mpsc::SyncSender<()>>,
    ends: Option<std::thread::JoinHandle<()>>,
}

impl Hanging {
    fn beside(file: &Path) -> Self {
        let pipe = file.with_extension(format!("scratch-{}", std::process::id()));
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        let (over, is_over) = std::sync::mpsc::sync_channel(0);
        let ends = std::thread::spawn(move || {
            let _ = is_over.recv_timeout(DEADLINE * 2);
            // For both, it opens without waiting, and lets the other one in.
            let read = std::fs::OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
            std::fs::remove_file(&pipe).unwrap();
            drop(read);
        });
        Self { over: Some(over), ends: Some(ends) }
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        drop(self.over.take());
        let _ = self.ends.take().map(std::thread::JoinHandle::join);
    }
}

/// It knows the CA alone that nobody believes any more, and nobody believes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_removed_coordinator_that_comes_back_after_a_rotation_hears_of_it_and_ends_for_good() {
    let mut cluster = Cluster::of_three().await;
    let leader = cluster.leader(0).await;
    let (off, other) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.kill(off);
    cluster.join(leader).await;
    let call = AdminCall::ChangeVoters { add: vec![C[3]], remove: vec![C[off]] };
    let reply = cluster.operator(leader).await.call_slowly(call).await;
    assert!(matches!(reply, AdminReply::Accepted), "{reply:?}");
    cluster.until_votes(leader, &C.into_iter().filter(|c| *c != C[off]).collect::<Vec<_>>()).await;
    cluster.rotate(leader, true).await;
    cluster.until_rotated(other, 1).await;
    cluster.restart(off).await;
    let Ended { why, for_good, condemned } =
        within("the end of it", cluster.nodes[off].as_mut().unwrap().failed()).await;
    assert!(for_good && !condemned, "another start is told so again: {why}");
    let name = format!("{} was removed from this cluster", C[off]);
    assert!(why.starts_with(&name) && why.contains("empty"), "{why}");
}

pub(super) fn ca() -> CertificateAuthority {
    CertificateAuthority::create(SystemTime::now()).unwrap()
}

fn csr() -> Vec<u8> {
    let someone = ca().issue_identity(NodeId::admin(1), SystemTime::now());
    someone.unwrap().renewal_request().unwrap()
}

/// One that does not vote has no key, and its certificates are not made by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_learner_has_its_certificate_from_a_coordinator_that_has_the_key() {
    let mut cluster = Cluster::of_one().await;
    cluster.join(0).await;
    until(cluster.node(0), "does it learn", |view| {
        view.coordinators.iter().any(|peer| peer.id == C[1] && peer.vote == Vote::Learner)
    })
    .await;
    let before = cluster.shows(1);
    cluster.rotate(0, false).await;
    let view = cluster.until_rotated(0, 1).await;
    assert_ne!(cluster.shows(1), before);
    assert_eq!(cluster.shows(1), view.cas[0].fingerprint);
    assert!(!cluster.data(1).join("ca.key").exists());
    assert!(!cluster.data(1).join("ca-next.key").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_is_held_back_by_an_older_worker_by_name() {
    let cluster = Cluster::of_one().await;
    let token = cluster.operator(0).await.token(Role::Worker, 1, 60).await;
    let address = cluster.node(0).cluster_address();
    let identity = try_join(address, &token).await.unwrap();
    let versions = shoal_protocol::version::VersionRange { min: 1, max: 1 };
    let manners = Manners { versions, ..Manners::default() };
    let _worker = FakeWorker::connect(address, &identity, manners).await.unwrap();
    let refused = refusal(cluster.access(0, AccessCall::RotateCa { skip_absent: true }).await);
    assert_eq!(refused.code, ErrorCode::VersionMismatch);
    within("its name", async {
        loop {
            let call = AccessCall::RotateCa { skip_absent: true };
            if refusal(cluster.access(0, call).await).message.contains("w1") {
                return;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
}
