//! ● Operators' changes of which coordinators vote, and how it stands.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::admin::{PeerView, Vote};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::NodeId;

use super::state::{Change, ClusterState, CoordinatorCommand};
use super::store::{ControlStore, Members, Standing};

/// How long a change may take before the operator is told that it goes on without them: two joint steps
/// and a snapshot over a slow link.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a coordinator that has joined may take to say where it is.
const ANNOUNCE_TIMEOUT: Duration = Duration::from_secs(5);

/// Gives votes to some and takes others out, all in one step, and waits until it is so.
pub(super) async fn change(
    store: &ControlStore,
    add: &[NodeId],
    remove: &[NodeId],
) -> Result<(), WireError> {
    store.read().await?;
    // Who has joined and not said yet where it is does so within a second.
    let announced = |state: &Arc<ClusterState>| {
        let coming = |node: &&NodeId| state.nodes.get(**node).is_some();
        add.iter().filter(coming).all(|node| state.coordinators.get(*node).is_some())
    };
    let mut watch = store.watch();
    let state = match tokio::time::timeout(ANNOUNCE_TIMEOUT, watch.wait_for(announced)).await {
        Ok(Ok(state)) => Arc::clone(&state),
        // Refused by the state, with words.
        _ => store.state(),
    };
    let mut voters: BTreeSet<NodeId> = state.coordinators.voters().clone();
    voters.extend(add);
    voters.retain(|node| !remove.contains(node));
    if voters != *state.coordinators.voters() {
        let change = CoordinatorCommand::SetVoters { voters: voters.clone() };
        store.propose(Change::Coordinator(change)).await?;
    }
    let mut members = store.members();
    if *members.borrow() == Members::default() {
        // Another service has the log; who votes is a matter of who gets the CA's key.
        return remove_all(store, remove).await;
    }
    let settled =
        |members: &Members| members.voters.iter().copied().collect::<BTreeSet<_>>() == voters;
    match tokio::time::timeout(SETTLE_TIMEOUT, members.wait_for(settled)).await {
        Ok(Ok(_)) => {}
        Ok(Err(_)) => return Err(WireError::new(ErrorCode::Draining, "this coordinator stops")),
        Err(_) => {
            let text = format!(
                "it is decided and goes on, but {SETTLE_TIMEOUT:?} were not enough: whoever is to vote must \
                 be running and have caught up (`shoal coordinators list`)"
            );
            return Err(WireError::new(ErrorCode::DeadlineExceeded, text));
        }
    }
    // The last one that holds the CA's key must not be the first to be lost.
    let holds = |state: &Arc<ClusterState>| {
        voters.iter().all(|node| state.coordinators.get(*node).is_some_and(|r| r.holds_key))
    };
    if tokio::time::timeout(SETTLE_TIMEOUT, store.watch().wait_for(holds)).await.is_err() {
        let text = "they vote, but not each of them holds the CA's key yet; the log of each says whether \
                    it is reached";
        return Err(WireError::new(ErrorCode::DeadlineExceeded, text));
    }
    remove_all(store, remove).await
}

async fn remove_all(store: &ControlStore, nodes: &[NodeId]) -> Result<(), WireError> {
    for node in nodes {
        let change = CoordinatorCommand::Remove { node: *node };
        store.propose(Change::Coordinator(change)).await?;
    }
    Ok(())
}

/// All coordinators, for people.
pub(super) fn view(state: &ClusterState, members: &Members, standing: Standing) -> Vec<PeerView> {
    let vote =
        |node: NodeId| match (members.voters.contains(&node), members.learners.contains(&node)) {
            (true, _) => Vote::Voter,
            (_, true) if state.coordinators.voters().contains(&node) => Vote::Promoted,
            (_, true) => Vote::Learner,
            _ => Vote::Joining,
        };
    let all = state.coordinators.iter();
    all.map(|(id, record)| PeerView {
        id,
        cluster: record.cluster,
        build: state.nodes.get(id).map(|node| node.build.clone()).unwrap_or_default(),
        vote: vote(id),
        leads: standing.leader == Some(id),
    })
    .collect()
}
