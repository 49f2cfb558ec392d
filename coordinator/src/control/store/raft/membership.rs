//! ○ From the coordinators of the state to the members of the log, one step at a time.
//!
//! Every coordinator that has announced itself belongs to the log: as a learner first, which takes the
//! log and has no say. Those of the state's `voters` vote as soon as all of them have caught up: all in
//! one joint change, so that two that are added never wait for each other's health.

use std::collections::BTreeSet;

use raft::prelude::{ConfChangeType, ConfChangeV2, ConfState};

use super::core::joint;
use crate::control::state::ClusterState;

/// A learner that lacks no more entries than this has caught up: they are one message.
pub(super) const NEAR: u64 = 64;

/// Who shall belong to the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    pub voters: BTreeSet<u64>,
    pub learners: BTreeSet<u64>,
}

/// The next step towards it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    /// Change the members.
    Change(ConfChangeV2),
    /// The leader is to lose its vote: another leads first.
    Handover { to: u64 },
}

/// What the state says.
pub(super) fn wanted(state: &ClusterState) -> Wanted {
    let voters: BTreeSet<u64> =
        state.coordinators.voters().iter().map(|node| u64::from(node.number)).collect();
    let all = state.coordinators.iter().map(|(node, _)| u64::from(node.number));
    let learners = all.filter(|id| !voters.contains(id)).collect();
    Wanted { voters, learners }
}

/// The next step from `conf` to `wanted`; `None` where there is none now.
pub(super) fn next(
    wanted: &Wanted,
    conf: &ConfState,
    me: u64,
    caught_up: impl Fn(u64) -> bool,
) -> Option<Step> {
    // A joint change is under way; the leader ends it by itself.
    if !conf.voters_outgoing.is_empty() || wanted.voters.is_empty() {
        return None;
    }
    let voters: BTreeSet<u64> = conf.voters.iter().copied().collect();
    let learners: BTreeSet<u64> = conf.learners.iter().copied().collect();
    let change = |changes| Some(Step::Change(joint(changes)));

    // Whoever is new learns first, and whoever is gone goes from those that have no say.
    let known = |id: &&u64| voters.contains(id) || learners.contains(id);
    let news = wanted.voters.iter().chain(&wanted.learners).filter(|id| !known(id));
    let add = news.map(|id| (ConfChangeType::AddLearnerNode, *id));
    let stays = |id: &&u64| wanted.voters.contains(id) || wanted.learners.contains(id);
    let gone = learners.iter().filter(|id| !stays(id));
    let drop = gone.map(|id| (ConfChangeType::RemoveNode, *id));
    let changes: Vec<_> = add.chain(drop).collect();
    if !changes.is_empty() {
        return change(changes);
    }
    if voters == wanted.voters {
        return None;
    }
    // One who has not caught up would hold up every change that needs its vote.
    let promoted: Vec<u64> = wanted.voters.difference(&voters).copied().collect();
    if !promoted.iter().all(|id| caught_up(*id)) {
        return None;
    }
    if !wanted.voters.contains(&me) {
        let stay = wanted.voters.intersection(&voters).find(|id| caught_up(**id));
        if let Some(to) = stay {
            return Some(Step::Handover { to: *to });
        }
    }
    let promote = promoted.iter().map(|id| (ConfChangeType::AddNode, *id));
    let demote = voters.difference(&wanted.voters).map(|id| match wanted.learners.contains(id) {
        true => (ConfChangeType::AddLearnerNode, *id),
        false => (ConfChangeType::RemoveNode, *id),
    });
    change(promote.chain(demote).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ConfChangeType::{AddLearnerNode, AddNode, RemoveNode};

    fn conf(voters: &[u64], learners: &[u64]) -> ConfState {
        ConfState { voters: voters.to_vec(), learners: learners.to_vec(), ..Default::default() }
    }

    fn wanted(voters: &[u64], learners: &[u64]) -> Wanted {
        let set = |ids: &[u64]| ids.iter().copied().collect();
        Wanted { voters: set(voters), learners: set(learners) }
    }

    fn change(changes: &[(ConfChangeType, u64)]) -> Option<Step> {
        Some(Step::Change(joint(changes.to_vec())))
    }

    #[test]
    fn members_follow_the_state_one_step_at_a_time() {
        let check = |voters: &[u64], learners: &[u64], now: ConfState, near: &[u64], expected| {
            let found = next(&wanted(voters, learners), &now, 1, |id| near.contains(&id));
            assert_eq!(found, expected, "{voters:?} {learners:?} from {now:?}");
        };
        check(&[1], &[], conf(&[1], &[]), &[1], None);
        check(&[1], &[2], conf(&[1], &[]), &[1], change(&[(AddLearnerNode, 2)]));
        // New voters learn first, both at once, and vote when both have caught up.
        let both = change(&[(AddLearnerNode, 2), (AddLearnerNode, 3)]);
        check(&[1, 2, 3], &[], conf(&[1], &[]), &[1], both);
        check(&[1, 2, 3], &[], conf(&[1], &[2, 3]), &[1, 2], None);
        let promote = change(&[(AddNode, 2), (AddNode, 3)]);
        check(&[1, 2, 3], &[], conf(&[1], &[2, 3]), &[1, 2, 3], promote);
        // One is replaced by another in one change.
        let replace = change(&[(AddNode, 4), (RemoveNode, 3)]);
        check(&[1, 2, 4], &[], conf(&[1, 2, 3], &[4]), &[1, 2, 4], replace);
        // A voter that loses its vote and stays learns on.
        let demote = change(&[(AddLearnerNode, 2), (AddLearnerNode, 3)]);
        check(&[1], &[2, 3], conf(&[1, 2, 3], &[]), &[1, 2, 3], demote);
        check(&[1], &[], conf(&[1], &[9]), &[1], change(&[(RemoveNode, 9)]));
        // The leader hands over before it loses its vote.
        check(&[2], &[1, 3], conf(&[1, 2, 3], &[]), &[1, 2, 3], Some(Step::Handover { to: 2 }));
    }

    #[test]
    fn nothing_is_proposed_while_a_joint_change_is_under_way() {
        let mut now = conf(&[1, 2], &[]);
        now.voters_outgoing = vec![1];
        assert_eq!(next(&wanted(&[1], &[]), &now, 1, |_| true), None);
        assert_eq!(next(&Wanted::default(), &conf(&[1], &[]), 1, |_| true), None);
    }
}
