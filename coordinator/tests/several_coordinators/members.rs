//! Coordinators that come, lead, die, are replaced and come back.

use std::path::Path;

use shoal_coordinator::alone::{go_on_alone, survey};
use shoal_coordinator::config::CoordinatorConfig;
use shoal_coordinator::{Coordinator, Ended};
use shoal_protocol::admin::{AdminCall, AdminReply, PeerView, Vote};
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::quic::Identity;
use shoal_protocol::trust::Trust;

use super::ca::ca;
use super::cluster::{C, Cluster, LOOK, start_when_free};
use crate::control_support::*;

#[tokio::test(flavor = "multi_thread")]
async fn one_becomes_three_and_each_takes_changes() {
    let cluster = Cluster::of_three().await;
    for index in 0..3 {
        // Each of them has the CA's key, so each of them writes its operator a context.
        cluster.operator(index).await;
    }
    // A follower forwards what it is asked, and a worker joins through any of them.
    let leader = cluster.leader(0).await;
    let follower = (0..3).find(|index| *index != leader).unwrap();
    let token = cluster.operator(follower).await.token(Role::Worker, 1, 60).await;
    let address = cluster.node((leader + 2) % 3).cluster_address();
    let worker = try_join(address, &token).await.unwrap();
    assert_eq!(worker.node, NodeId::worker(1));
    let refused = refusal(cluster.deploy(follower, "m").await);
    assert_eq!(refused.code, ErrorCode::NotReady, "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_even_number_of_voters_is_refused_with_advice() {
    let mut cluster = Cluster::of_one().await;
    cluster.join(0).await;
    until(cluster.node(0), "does it learn", |view| {
        view.coordinators.iter().any(|peer| peer.id == C[1] && peer.vote == Vote::Learner)
    })
    .await;
    let add = AdminCall::ChangeVoters { add: vec![C[1]], remove: vec![] };
    let refused = refusal(cluster.operator(0).await.call(add).await);
    assert!(refused.message.contains("say 1, 3 or 5"), "{refused}");
    let stranger = AdminCall::ChangeVoters { add: vec![C[1], C[3]], remove: vec![] };
    let refused = refusal(cluster.operator(0).await.call(stranger).await);
    assert!(refused.message.contains("c4 is not a node"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_killed_and_nothing_that_was_made_is_lost() {
    let mut cluster = Cluster::of_three().await;
    let leader = cluster.leader(0).await;
    let survivor = (0..3).find(|index| *index != leader).unwrap();
    let token = cluster.operator(leader).await.token(Role::Worker, 2, 60).await;
    cluster.kill(leader);
    assert_ne!(cluster.leader(survivor).await, leader);
    let address = cluster.node(survivor).cluster_address();
    let joined = within("a join without the old leader", async {
        loop {
            // The certificate authority's key may still be on its way to a new voter.
            match try_join(address, &token).await {
                Ok(identity) => return identity,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    })
    .await;
    assert_eq!(joined.node, NodeId::worker(1));
    cluster.restart(leader).await;
    until(cluster.node(leader), "does it know the worker", |view| view.workers.len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_stop_at_once_and_find_everything_again() {
    let mut cluster = Cluster::of_three().await;
    cluster.operator(0).await.token(Role::Worker, 1, 60).await;
    for index in 0..3 {
        cluster.kill(index);
    }
    for index in 0..3 {
        cluster.restart(index).await;
    }
    for index in 0..3 {
        cluster.until_votes(index, &C[..3]).await;
        cluster.leader(index).await;
    }
    cluster.operator(1).await.token(Role::Worker, 1, 60).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_majority_changes_are_refused_and_the_view_stays() {
    let mut cluster = Cluster::of_three().await;
    cluster.kill(1);
    cluster.kill(2);
    let call = AdminCall::CreateToken { role: Role::Worker, uses: 1, expires_s: 60 };
    let refused =
        tokio::time::timeout(DEADLINE * 2, cluster.operator(0).await.call_slowly(call)).await;
    let refused = refusal(refused.unwrap());
    assert_eq!(refused.code, ErrorCode::StorageFailed, "{refused}");
    assert_eq!(cluster.node(0).view().coordinators.len(), 3);
    cluster.restart(1).await;
    cluster.leader(0).await;
    cluster.operator(0).await.token(Role::Worker, 1, 60).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_coordinator_is_replaced_and_its_old_folder_is_refused() {
    let mut cluster = Cluster::of_three().await;
    let lost = (0..3).find(|index| *index != 0).unwrap();
    cluster.kill(lost);
    cluster.join(0).await;
    until(cluster.node(0), "does it learn", |view| {
        view.coordinators.iter().any(|peer| peer.id == C[3] && peer.vote == Vote::Learner)
    })
    .await;
    let call = AdminCall::ChangeVoters { add: vec![C[3]], remove: vec![C[lost]] };
    let reply =
        tokio::time::timeout(DEADLINE * 2, cluster.operator(0).await.call_slowly(call)).await;
    assert!(matches!(reply.unwrap(), AdminReply::Accepted));
    let expected: Vec<_> = C.iter().copied().filter(|id| *id != C[lost]).collect();
    cluster.until_votes(3, &expected).await;
    cluster.operator(3).await.token(Role::Worker, 1, 60).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_whose_token_is_refused_asks_nobody_else() {
    let cluster = Cluster::of_one().await;
    let token = cluster.operator(0).await.token(Role::Coordinator, 1, 60).await;
    let address = cluster.node(0).cluster_address();
    try_join(address, &token).await.unwrap();
    // What another one would say of it would hide why.
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let join = vec![address, nobody.local_addr().unwrap()];
    let folder = tempfile::tempdir().unwrap();
    let config = CoordinatorConfig { join, token: Some(token), ..config(folder.path()) };
    let error = start(config).await.unwrap_err().to_string();
    assert!(error.contains("used up"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_up_after_a_vote_has_it_gone_through_with() {
    let mut cluster = Cluster::of_three().await;
    cluster.kill(2);
    cluster.join(0).await;
    until(cluster.node(0), "does it learn", |view| {
        view.coordinators.iter().any(|peer| peer.id == C[3] && peer.vote == Vote::Learner)
    })
    .await;
    let operator = cluster.operator(0).await;
    let call =
        operator.call_slowly(AdminCall::ChangeVoters { add: vec![C[3]], remove: vec![C[2]] });
    // It votes before it has the CA's key, and is removed after that.
    tokio::select! {
        reply = call => assert!(matches!(reply, AdminReply::Accepted), "{reply:?}"),
        () = cluster.until_votes(0, &[C[0], C[1], C[3]]) => {}
    }
    let gone = async {
        while cluster.node(0).view().coordinators.iter().any(|peer| peer.id == C[2]) {
            tokio::time::sleep(LOOK).await;
        }
    };
    let removed = tokio::time::timeout(DEADLINE * 2, gone).await;
    assert!(removed.is_ok(), "{:#?}", cluster.node(0).view().coordinators);
}

/// A backup of a data folder is older than what its coordinator has promised since.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_backup_is_refused_by_the_others_and_ends_with_advice() {
    let mut cluster = Cluster::of_three().await;
    cluster.kill(2);
    let backup = tempfile::tempdir().unwrap();
    cluster.restart(2).await;
    cluster.leader(2).await;
    cluster.nodes[2].take().unwrap().drain().await;
    copy(cluster.data(2), backup.path());
    // It runs on, twice; then the backup is put back.
    for _ in 0..2 {
        cluster.restart(2).await;
        let node = C[2];
        until(cluster.node(0), "is it seen", |view| {
            view.coordinators.iter().any(|peer| peer.id == node)
        })
        .await;
        cluster.operator(2).await.token(Role::Worker, 1, 60).await;
        cluster.nodes[2].take().unwrap().drain().await;
    }
    let mut ghost = start_when_free(config(backup.path())).await;
    let ended = within("the refusal", ghost.failed()).await;
    let why = &ended.why;
    assert!(ended.for_good, "another start would end so too: {why}");
    assert!(why.contains("an old backup or a copy"), "{why}");
    assert!(why.contains("shoal coordinators remove c3"), "{why}");
    // Each start has a higher number: the next ones would not be told so. What was said once stays.
    ghost.give_up(&ended).await;
    for _ in 0..3 {
        let again =
            Coordinator::start(config(backup.path())).await.expect_err("it is an old backup");
        assert!(again.needs_a_person(), "{again}");
        assert!(again.to_string().contains("an old backup or a copy"), "{again}");
    }
}

/// The founder's folder from when it was alone: its own log says that it is a majority by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_founders_backup_from_when_it_was_alone_ends_with_advice_and_takes_nothing_over() {
    let mut cluster = Cluster::of_one().await;
    let backup = tempfile::tempdir().unwrap();
    cluster.nodes[0].take().unwrap().drain().await;
    copy(cluster.data(0), backup.path());
    cluster.restart(0).await;
    cluster.join(0).await;
    cluster.join(0).await;
    let add = vec![C[1], C[2]];
    let reply =
        cluster.operator(0).await.call(AdminCall::ChangeVoters { add, remove: vec![] }).await;
    assert!(matches!(reply, AdminReply::Accepted), "{reply:?}");
    cluster.nodes[0].take().unwrap().drain().await;

    let address = CoordinatorConfig { cluster: cluster.addresses[0], ..config(backup.path()) };
    let mut ghost = start_when_free(address).await;
    let Ended { why, for_good, .. } = within("the end of it", ghost.failed()).await;
    assert!(for_good, "{why}");
    assert!(why.contains("this data folder is an old backup"), "{why}");
    assert!(why.contains("shoal coordinators remove c1"), "{why}");
    drop(ghost);
    // The others go on, and take back the one that is as it was left.
    cluster.leader(1).await;
    cluster.operator(1).await.token(Role::Worker, 1, 60).await;
    cluster.restart(0).await;
    cluster.leader(0).await;
    cluster.until_votes(0, &C[..3]).await;
}

/// Each works the new voters out from a copy in which the other's are not yet.
#[tokio::test(flavor = "multi_thread")]
async fn two_replacements_at_once_are_both_made() {
    let mut cluster = Cluster::of_three().await;
    cluster.join(0).await;
    cluster.join(0).await;
    until(cluster.node(0), "do they learn", |view| {
        let learns = |peer: &&PeerView| peer.vote == Vote::Learner;
        view.coordinators.iter().filter(learns).count() == 2
    })
    .await;
    let (one, other) = (cluster.operator(0).await, cluster.operator(0).await);
    let replace = |old: usize, new: u32| AdminCall::ChangeVoters {
        add: vec![NodeId::coordinator(new)],
        remove: vec![C[old]],
    };
    let both =
        async { tokio::join!(one.call_slowly(replace(1, 4)), other.call_slowly(replace(2, 5))) };
    let (first, second) = tokio::time::timeout(DEADLINE * 3, both).await.unwrap();
    assert!(matches!(first, AdminReply::Accepted), "{first:?}");
    assert!(matches!(second, AdminReply::Accepted), "{second:?}");
    let expected = [1, 4, 5].map(NodeId::coordinator);
    cluster.until_votes(0, &expected).await;
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_state_is_not_voted_with_again() {
    let mut cluster = Cluster::of_three().await;
    cluster.kill(2);
    let data = cluster.data(2).to_owned();
    within("the file", async {
        while std::fs::remove_file(data.join("state.redb")).is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let error = start(config(&data)).await.unwrap_err().to_string();
    assert!(error.contains("has an identity but not the cluster's state"), "{error}");
}

/// What etcd calls `--force-new-cluster`.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_goes_on_alone_and_those_it_gave_up_are_refused() {
    let mut cluster = Cluster::of_three().await;
    let worker = cluster.operator(0).await.token(Role::Worker, 2, 600).await;
    cluster.nodes[2].take().unwrap().drain().await;
    let data = cluster.data(2).to_owned();
    // While one of the others answers, nobody is given up.
    let alive = go_on_alone(&data, &C[..2]).await.unwrap_err().to_string();
    assert!(alive.contains("c1 answers at") && alive.contains("--replace"), "{alive}");
    cluster.kill(0);
    cluster.kill(1);
    let unnamed = go_on_alone(&data, &C[..1]).await.unwrap_err().to_string();
    assert!(unnamed.contains("c1,c2 would be given up"), "{unnamed}");
    // It heard of a CA that signs since, whose key is not here.
    let identity = Identity::load(&data.join("identity")).unwrap().unwrap();
    let cas = vec![ca().certificate().to_vec(), identity.ca.clone()];
    let heard = Trust { revision: identity.trust.revision + 1, cas, lineage: Vec::new() };
    identity.trusting(heard).save(&data.join("identity")).unwrap();
    let keyless = go_on_alone(&data, &C[..2]).await.unwrap_err().to_string();
    assert!(keyless.contains("does not hold the key"), "{keyless}");
    identity.save(&data.join("identity")).unwrap();
    let found = survey(&data).unwrap();
    let done = go_on_alone(&data, &C[..2]).await.unwrap();
    assert!(done.copy.exists() && done.me == C[2]);
    assert!(done.epoch > found.epoch + (1 << 31), "{} after {}", done.epoch, found.epoch);

    cluster.restart(2).await;
    cluster.until_votes(2, &C[2..3]).await;
    assert_eq!(cluster.node(2).view().coordinators.len(), 1);
    // What was made before is there, and changes are taken.
    let joined = try_join(cluster.node(2).cluster_address(), &worker).await.unwrap();
    assert_eq!(joined.node.role, Role::Worker);

    // The lost ones come back, both of them: a majority of what was.
    cluster.restart(0).await;
    cluster.restart(1).await;
    // Whoever of them leads asks the one that went on; the other one does when that one has ended.
    let mut ghosts = tokio::task::JoinSet::new();
    for index in 0..2 {
        let mut ghost = cluster.nodes[index].take().unwrap();
        ghosts.spawn(async move { (index, within("the refusal", ghost.failed()).await) });
    }
    while let Some(ended) = ghosts.join_next().await {
        let (index, Ended { why, for_good, condemned }) = ended.unwrap();
        // Whoever went on alone may have been wrong, and these two a majority: their folders stay good.
        assert!(for_good && !condemned, "{why}");
        let name = format!("c{} was removed from this cluster", index + 1);
        assert!(why.contains(&name) && why.contains("empty"), "{why}");
    }
    let again = survey(&data).map(drop);
    assert!(again.is_err(), "it runs: {again:?}");
}
