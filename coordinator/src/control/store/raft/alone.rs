//! ○ The log of one voter, made from what one of several had: for when the others are lost for ever.
//!
//! ```text
//! Saved ─► Heritage: the state after every entry ─► give_up(me) ─► a Write: one snapshot, one voter, an epoch above all
//! ```
//!
//! Every entry that is here is kept, also those of which this voter had not heard that they are
//! committed: it hears that with the next message alone, so the last change that an operator was
//! told of may be one of them. What it never had is lost. Nobody may do this while a majority lives.

use std::collections::BTreeSet;

use raft::prelude::{ConfState, HardState};
use shoal_protocol::id::{Incarnation, NodeId, Role};

use super::core::{CoreError, Saved, Write, command_of};
use super::log::{Applied, snapshot_of};
use crate::control::state::{
    Change, ClusterState, Command, CoordinatorCommand, Refusal, Timestamp, snapshot,
};

/// The lower bits of an epoch count elections; each such recovery begins above them. Those who are
/// given up would have to hold four thousand million elections to be heard by a worker again.
const ELECTIONS_BITS: u32 = 32;

/// Numbers of nodes that are left out: those who are given up may have let nodes in that this one
/// never heard of, and a number is never given twice. More than a rack joins at once between two
/// messages of a log.
const NUMBERS_SKIPPED: u32 = 100;

/// Why a log cannot go on with one voter.
#[derive(Debug, thiserror::Error)]
pub enum AloneError {
    /// There is nothing to go on with.
    #[error("it holds no log yet: this coordinator has joined and never heard of the others")]
    NoLog,
    /// It has no say.
    #[error(
        "{me} does not vote, so others may know more than it does: take one that votes (or voted), or \
         restore one from a backup"
    )]
    NoVoter {
        /// Whose log it is.
        me: NodeId,
    },
    /// Nobody is there to be given up.
    #[error(
        "{me} is the only coordinator already: start it (where that is refused for what another one once said, put its \
         backup in its place again)"
    )]
    Already {
        /// Whose log it is.
        me: NodeId,
    },
    /// Others were named than there are.
    #[error("{} would be given up, and {} was said", names(.lost), names(.said))]
    Others {
        /// Those that there are.
        lost: Vec<NodeId>,
        /// Those that were named.
        said: Vec<NodeId>,
    },
    /// The log cannot be read.
    #[error(transparent)]
    Log(#[from] CoreError),
    /// The state refuses.
    #[error("the state refuses it: {0}")]
    State(#[from] Refusal),
}

/// Names, with commas.
fn names(nodes: &[NodeId]) -> String {
    match nodes {
        [] => "nobody".to_owned(),
        nodes => nodes.iter().map(NodeId::to_string).collect::<Vec<_>>().join(","),
    }
}

/// What a voter has of a log.
pub(super) struct Heritage {
    /// After all entries.
    pub state: ClusterState,
    /// The last entry.
    pub last: u64,
    /// The latest epoch that it has heard of.
    pub epoch: u64,
}

impl Heritage {
    /// All that is in a file.
    pub fn of(saved: &Saved) -> Result<Self, AloneError> {
        let meta = saved.snapshot.get_metadata();
        if meta.index == 0 {
            return Err(AloneError::NoLog);
        }
        let mut state = snapshot::decode(&saved.snapshot.data).map_err(CoreError::from)?;
        for entry in &saved.entries {
            if let Some(command) = command_of(entry)? {
                // What it came to stays in the state, for whoever asks.
                let _ = state.apply(&command);
            }
        }
        let last = saved.entries.last();
        let last_term = last.map_or(meta.term, |entry| entry.term);
        Ok(Self {
            state,
            last: last.map_or(meta.index, |entry| entry.index),
            epoch: saved.hard.term.max(last_term),
        })
    }

    /// Everybody else who votes or learns; an error where this one may not go on without them.
    pub fn others(&self, me: NodeId) -> Result<Vec<NodeId>, AloneError> {
        let all = self.state.nodes.iter().map(|(node, _)| node);
        let others: Vec<NodeId> =
            all.filter(|node| node.role == Role::Coordinator && *node != me).collect();
        match () {
            () if others.is_empty() => Err(AloneError::Already { me }),
            () if !self.state.coordinators.voters().contains(&me) => {
                Err(AloneError::NoVoter { me })
            }
            () => Ok(others),
        }
    }

    /// What is to stand in the file of a log in which `me` votes alone and nobody else belongs. All of
    /// `give_up` must be named, so that nobody is given up by accident.
    pub fn alone(
        mut self,
        me: NodeId,
        incarnation: Incarnation,
        at: Timestamp,
        give_up: &[NodeId],
    ) -> Result<(Write, u64), AloneError> {
        let lost = self.others(me)?;
        let named: BTreeSet<_> = give_up.iter().copied().collect();
        if named != lost.iter().copied().collect() {
            return Err(AloneError::Others { lost, said: give_up.to_vec() });
        }
        let voters = CoordinatorCommand::SetVoters { voters: BTreeSet::from([me]) };
        let removed = lost.iter().map(|node| CoordinatorCommand::Remove { node: *node });
        for (change, sequence) in std::iter::once(voters).chain(removed).zip(1..) {
            let change = Change::Coordinator(change);
            self.state.apply(&Command { client: me, incarnation, sequence, at, change })?;
        }
        self.state.nodes.skip(NUMBERS_SKIPPED);
        let epoch = ((self.epoch >> ELECTIONS_BITS) + 1) << ELECTIONS_BITS;
        let index = self.last + 1;
        let conf = ConfState { voters: vec![u64::from(me.number)], ..Default::default() };
        let applied = Applied { index, term: epoch, state: self.state.into() };
        let snapshot = snapshot_of(&applied, &conf).map_err(CoreError::from)?;
        let hard = HardState { term: epoch, commit: index, ..Default::default() };
        let write = Write { snapshot: Some(snapshot), entries: Vec::new(), hard: Some(hard) };
        Ok((write, epoch))
    }
}

#[cfg(test)]
#[path = "alone_test.rs"]
mod tests;
