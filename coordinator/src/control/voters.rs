//! ● Operators' changes of which coordinators vote, and how it stands.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::admin::{PeerView, Vote};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::NodeId;

use super::state::{Change, ClusterState, CoordinatorCommand, CoordinatorRecord, Refusal};
use super::store::{ControlStore, Members};

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
    if store.is_elsewhere() {
        return change_elsewhere(store, &state, add, remove).await;
    }
    let mut voters: BTreeSet<NodeId> = state.coordinators.voters().clone();
    voters.extend(add);
    voters.retain(|node| !remove.contains(node));
    if voters != *state.coordinators.voters() {
        let change = CoordinatorCommand::SetVoters { voters: voters.clone() };
        store.propose(Change::Coordinator(change)).await?;
    }
    let mut members = store.members();
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
    hold_the_key(store, &voters).await?;
    remove_all(store, remove).await
}

/// The last one that holds the CA's key must not be the first to be lost.
async fn hold_the_key(store: &ControlStore, nodes: &BTreeSet<NodeId>) -> Result<(), WireError> {
    let holds = |state: &Arc<ClusterState>| {
        nodes.iter().all(|node| state.coordinators.get(*node).is_some_and(|r| r.holds_key))
    };
    if tokio::time::timeout(SETTLE_TIMEOUT, store.watch().wait_for(holds)).await.is_err() {
        let text = "they vote, but not each of them holds the CA's key yet; the log of each says whether \
                    it is reached";
        return Err(WireError::new(ErrorCode::DeadlineExceeded, text));
    }
    Ok(())
}

/// Another service has the log and does the voting: whoever has joined takes part, and one of those
/// that stay stands for the voters.
async fn change_elsewhere(
    store: &ControlStore,
    state: &ClusterState,
    add: &[NodeId],
    remove: &[NodeId],
) -> Result<(), WireError> {
    let stays = |node: &NodeId| !remove.contains(node);
    let staying: BTreeSet<_> =
        state.coordinators.iter().map(|(node, _)| node).filter(stays).collect();
    let known = add.iter().find(|node| !staying.contains(node));
    if let Some(node) = known {
        return Err(Refusal::UnknownNode { node: *node }.into());
    }
    hold_the_key(store, &add.iter().copied().collect()).await?;
    if !state.coordinators.voters().iter().all(stays) {
        let voters: BTreeSet<_> = staying.first().copied().into_iter().collect();
        let change = CoordinatorCommand::SetVoters { voters: voters.clone() };
        store.propose(Change::Coordinator(change)).await?;
        hold_the_key(store, &voters).await?;
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
pub(super) fn view(state: &ClusterState, store: &ControlStore) -> Vec<PeerView> {
    let (members, standing) = (store.members(), *store.standing().borrow());
    let members = members.borrow();
    let vote = |node: NodeId, record: &CoordinatorRecord| {
        match (members.voters.contains(&node), members.learners.contains(&node)) {
            // All take part in who leads, and do all once they hold the CA's key.
            _ if store.is_elsewhere() && record.holds_key => Vote::Voter,
            (true, _) => Vote::Voter,
            (_, true) if state.coordinators.voters().contains(&node) => Vote::Promoted,
            (_, true) => Vote::Learner,
            _ => Vote::Joining,
        }
    };
    let all = state.coordinators.iter();
    all.map(|(id, record)| PeerView {
        id,
        cluster: record.cluster,
        build: state.nodes.get(id).map(|node| node.build.clone()).unwrap_or_default(),
        vote: vote(id, record),
        leads: standing.leader == Some(id),
    })
    .collect()
}
