//! ● Operators' changes of which coordinators vote, and how it stands.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::admin::{PeerView, Vote};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{NodeId, Role};
use tokio::time::{Instant, timeout_at};

use super::state::{Change, ClusterState, CoordinatorCommand, CoordinatorRecord, Refusal};
use super::store::{ControlStore, ProposeError};

/// How long a change may take before the operator is told that it goes on without them: two joint steps
/// and a snapshot over a slow link.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a coordinator that has joined may take to say where it is.
const ANNOUNCE_TIMEOUT: Duration = Duration::from_secs(5);

/// Gives votes to some and takes others out, all in one step, and waits until it is so.
///
/// What the log holds is the whole set of voters, worked out from a copy: two such changes at once may each
/// overlook the other, so each looks whether it still stands.
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
    // Refused by the state, with words, where it does not.
    let _ = tokio::time::timeout(ANNOUNCE_TIMEOUT, watch.wait_for(announced)).await;
    if store.is_elsewhere() {
        return change_elsewhere(store, add, remove).await;
    }
    let wish = Wish { add, remove };
    let until = Instant::now() + SETTLE_TIMEOUT;
    let mut left = remove.to_vec();
    loop {
        vote(store, wish, until).await?;
        match remove_all(store, &mut left).await {
            // Another operator's copy still had its vote.
            Err(ProposeError::Refused(Refusal::StillVotes { .. })) if Instant::now() < until => {}
            done => return done.map_err(WireError::from),
        }
    }
}

/// Has it decided, and waits until those vote who shall, with the CA's key where it is needed.
async fn vote(store: &ControlStore, wish: Wish<'_>, until: Instant) -> Result<(), WireError> {
    loop {
        // Another operator may wish for something else at the same time, from the same copy: whoever is
        // overruled wishes anew.
        if !decide(store, wish, until).await? {
            continue;
        }
        match timeout_at(until, settled(store, wish)).await {
            Ok(Settled::Yes) => break,
            // Nothing is waited for then, so nothing else would end this.
            Ok(Settled::Overruled) if Instant::now() >= until => return Err(late()),
            Ok(Settled::Overruled) => {}
            Ok(Settled::Stopped) => {
                return Err(stops());
            }
            Err(_) => return Err(late()),
        }
    }
    hold_the_key(store, wish.add, |state| state.coordinators.voters().clone()).await
}

/// Waits until whoever goes may go: see [`key_suffices`].
async fn hold_the_key(
    store: &ControlStore,
    come: &[NodeId],
    stay: impl Fn(&ClusterState) -> BTreeSet<NodeId>,
) -> Result<(), WireError> {
    let suffices = |state: &Arc<ClusterState>| key_suffices(state, come, &stay(state));
    match tokio::time::timeout(SETTLE_TIMEOUT, store.watch().wait_for(suffices)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) => Err(stops()),
        Err(_) => {
            let text = "they vote, but those that came do not all hold the CA's key yet, or nobody who stays \
                        does; the log of each says whether it is reached";
            Err(WireError::new(ErrorCode::DeadlineExceeded, text))
        }
    }
}

/// The last one that holds the CA's key must not be the first to be lost: who comes holds it, and somebody who
/// stays does. One that stays and is off holds up nothing: it gets the key when it is back.
fn key_suffices(state: &ClusterState, come: &[NodeId], stay: &BTreeSet<NodeId>) -> bool {
    let holds = |node: &NodeId| state.coordinators.get(*node).is_some_and(|r| r.holds_key);
    come.iter().filter(|node| stay.contains(node)).all(holds) && stay.iter().any(holds)
}

fn stops() -> WireError {
    WireError::new(ErrorCode::Draining, "this coordinator stops")
}

/// Another service has the log and does the voting: whoever has joined takes part, and one of those
/// that stay stands for the voters.
async fn change_elsewhere(
    store: &ControlStore,
    add: &[NodeId],
    remove: &[NodeId],
) -> Result<(), WireError> {
    let until = Instant::now() + SETTLE_TIMEOUT;
    let mut left = remove.to_vec();
    loop {
        stand_in(store, add, remove).await?;
        match remove_all(store, &mut left).await {
            // Another operator has it stand for them meanwhile.
            Err(ProposeError::Refused(Refusal::StillVotes { .. })) if Instant::now() < until => {}
            done => return done.map_err(WireError::from),
        }
    }
}

/// Sees to it that one stands for the voters that stays, and holds the CA's key.
async fn stand_in(
    store: &ControlStore,
    add: &[NodeId],
    remove: &[NodeId],
) -> Result<(), WireError> {
    let stays = |node: &NodeId| !remove.contains(node);
    let staying = |state: &ClusterState| -> BTreeSet<NodeId> {
        state.coordinators.iter().map(|(node, _)| node).filter(stays).collect()
    };
    let here = staying(&*store.read().await?);
    if let Some(node) = add.iter().find(|node| !here.contains(node)) {
        return Err(Refusal::UnknownNode { node: *node }.into());
    }
    hold_the_key(store, add, staying).await?;
    let state = store.state();
    if state.coordinators.voters().iter().all(stays) {
        return Ok(());
    }
    let holders =
        state.coordinators.iter().filter(|(node, record)| record.holds_key && stays(node));
    let voters: BTreeSet<_> = holders.map(|(node, _)| node).take(1).collect();
    let change = CoordinatorCommand::SetVoters { voters };
    store.propose(Change::Coordinator(change)).await?;
    Ok(())
}

/// Who is to vote, and who is not.
#[derive(Clone, Copy)]
struct Wish<'a> {
    add: &'a [NodeId],
    remove: &'a [NodeId],
}

impl Wish<'_> {
    /// The voters, with this wish fulfilled.
    fn on(&self, voters: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
        let all = voters.iter().chain(self.add).copied();
        all.filter(|node| !self.remove.contains(node)).collect()
    }

    fn is_fulfilled(&self, voters: &BTreeSet<NodeId>) -> bool {
        self.on(voters) == *voters
    }
}

/// Has it decided, from what is decided so far; `false` where somebody decided something else meanwhile.
async fn decide(store: &ControlStore, wish: Wish<'_>, until: Instant) -> Result<bool, WireError> {
    let state = store.read().await?;
    let voters = wish.on(state.coordinators.voters());
    if voters != *state.coordinators.voters() {
        let change = CoordinatorCommand::SetVoters { voters: voters.clone() };
        if let Err(error) = store.propose(Change::Coordinator(change)).await {
            let refused = matches!(error, ProposeError::Refused(_)) && Instant::now() < until;
            // What it was worked out from may be gone.
            if refused && wish.on(store.read().await?.coordinators.voters()) != voters {
                return Ok(false);
            }
            return Err(error.into());
        }
    }
    let stands = wish.is_fulfilled(store.state().coordinators.voters());
    Ok(stands || Instant::now() >= until)
}

enum Settled {
    Yes,
    Overruled,
    Stopped,
}

/// Waits until those vote who shall, or somebody has decided against the wish.
async fn settled(store: &ControlStore, wish: Wish<'_>) -> Settled {
    let (mut members, mut state) = (store.members(), store.watch());
    loop {
        let shall = state.borrow_and_update().coordinators.voters().clone();
        if !wish.is_fulfilled(&shall) {
            return Settled::Overruled;
        }
        let vote: BTreeSet<NodeId> = members.borrow_and_update().voters.iter().copied().collect();
        if vote == shall {
            return Settled::Yes;
        }
        let changed = tokio::select! {
            changed = members.changed() => changed,
            changed = state.changed() => changed,
        };
        if changed.is_err() {
            return Settled::Stopped;
        }
    }
}

fn late() -> WireError {
    let text = format!(
        "it is decided and goes on, but {SETTLE_TIMEOUT:?} were not enough: whoever is to vote must be running \
         and have caught up (`shoal coordinators list`)"
    );
    WireError::new(ErrorCode::DeadlineExceeded, text)
}

/// Removes one after the other; those that are left are still there. One that is gone was removed by the same
/// words, whose answer was lost.
async fn remove_all(store: &ControlStore, left: &mut Vec<NodeId>) -> Result<(), ProposeError> {
    while let Some(node) = left.first().copied() {
        match store.propose(Change::Coordinator(CoordinatorCommand::Remove { node })).await {
            Err(ProposeError::Refused(refusal)) if is_gone(&refusal, &store.state()) => {}
            done => drop(done?),
        }
        left.remove(0);
    }
    Ok(())
}

/// Whether it is refused since the coordinator was removed already. A number that was never given is a slip
/// of the operator's.
fn is_gone(refusal: &Refusal, state: &ClusterState) -> bool {
    matches!(refusal, Refusal::UnknownNode { node }
        if node.role == Role::Coordinator && state.nodes.was_given(*node))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::state::{Command, KeyFingerprint, NodeCommand};
    use crate::control::store::raft::{self, WhenEmpty};
    use shoal_protocol::id::Incarnation;

    /// A state with so many coordinators that have joined, and what makes changes of it.
    fn joined(
        count: u32,
    ) -> (ClusterState, impl FnMut(&mut ClusterState, Change) -> Result<(), Refusal>) {
        let (mut state, mut sequence) = (ClusterState::default(), 0);
        let mut make = move |state: &mut ClusterState, change| {
            sequence += 1;
            let (client, incarnation, at) =
                (NodeId::coordinator(1), Incarnation(1), Default::default());
            let command = Command { client, incarnation, sequence, at, change };
            state.apply(&command).map(drop)
        };
        for _ in 0..count {
            let (role, key) = (Role::Coordinator, KeyFingerprint([1; 32]));
            make(&mut state, Change::Node(NodeCommand::Enrol { role, key })).unwrap();
        }
        (state, make)
    }

    #[test]
    fn who_is_off_without_the_key_holds_nobody_up_and_the_last_key_stays() {
        let (mut state, mut make) = joined(4);
        let c = |number| NodeId::coordinator(number);
        for number in 1..=4 {
            let (node, incarnation, boot) = (c(number), Incarnation(1), 7);
            let (cluster, build) = (([10, 0, 0, 1], 1).into(), String::new());
            let announce = CoordinatorCommand::Announce { node, incarnation, boot, cluster, build };
            make(&mut state, Change::Coordinator(announce)).unwrap();
        }
        let mut give = |state: &mut ClusterState, node| {
            make(state, Change::Coordinator(CoordinatorCommand::KeyReceived { node })).unwrap();
        };
        give(&mut state, c(1));
        give(&mut state, c(2));
        // c3 is off; c2 goes.
        assert!(key_suffices(&state, &[], &[c(1), c(3)].into()));
        // And c4 comes in its place.
        let stay = [c(1), c(3), c(4)].into();
        assert!(!key_suffices(&state, &[c(4)], &stay));
        give(&mut state, c(4));
        assert!(key_suffices(&state, &[c(4)], &stay));
        assert!(!key_suffices(&state, &[], &[c(3)].into()), "the keys would go");
    }

    #[tokio::test]
    async fn a_store_that_ends_does_not_count_as_a_key() {
        let data = tempfile::tempdir().unwrap();
        let me = NodeId::coordinator(1);
        let opened = raft::open(data.path(), me, WhenEmpty::Found, Box::new(|_| {}));
        let (store, thread) = opened.unwrap();
        tokio::task::spawn_blocking(move || thread.close()).await.unwrap();
        let ended = hold_the_key(&store, &[me], |_| [me].into()).await.unwrap_err();
        assert_eq!(ended.code, ErrorCode::Draining);
    }

    #[test]
    fn to_remove_a_coordinator_again_is_done_and_one_that_never_was_is_refused() {
        let (mut state, mut make) = joined(2);
        let remove = |number| {
            Change::Coordinator(CoordinatorCommand::Remove { node: NodeId::coordinator(number) })
        };
        make(&mut state, remove(2)).unwrap();
        let again = make(&mut state, remove(2)).unwrap_err();
        assert!(is_gone(&again, &state));
        let never = make(&mut state, remove(3)).unwrap_err();
        assert!(!is_gone(&never, &state));
    }
}
