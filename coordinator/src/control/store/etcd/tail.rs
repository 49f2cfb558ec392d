//! ○ This coordinator's copy of the log's end: what it does with what it hears.
//!
//! ```text
//! heard: command n ─► n ≤ applied: known │ n = applied + 1: applied │ beyond: a gap ─► load again
//!        head n    ─► n = applied: its revision is what the next append compares │ beyond: a gap
//!        n is gone ─► n ≤ applied: trimmed behind us │ beyond: trimmed under us ─► load again
//! ```

use std::sync::Arc;

use shoal_protocol::id::{Incarnation, NodeId};

use super::entry::{self, EntryError, EntryId};
use crate::control::state::{Change, ClusterState, Command, Effect, Refusal, Timestamp};

/// Commands behind the snapshot before a new one is written: replaying so many takes milliseconds,
/// reading them a few round trips.
pub const COMPACT_EVERY: u64 = 256;

/// What was heard of the log, by watching or by asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// A command.
    Command {
        /// Its number.
        index: u64,
        /// What stands there.
        bytes: Vec<u8>,
    },
    /// The number of the last command.
    Head {
        /// The number; 0 where there is none yet.
        index: u64,
        /// The revision that wrote it; 0 where there is none yet.
        revision: i64,
    },
    /// A command was trimmed: it is in a snapshot.
    Gone {
        /// Its number.
        index: u64,
    },
}

/// What cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// Commands are missing in between. They are in a snapshot, or the watch has dropped them.
    #[error("the log jumps from command {from} to {to}")]
    Gap {
        /// The last one that was applied.
        from: u64,
        /// The next one that was heard of.
        to: u64,
    },
    /// A command is not what was written.
    #[error("command {index} is damaged: {why}")]
    Entry {
        /// Which.
        index: u64,
        /// Why.
        why: String,
    },
    /// The log is shorter than it was.
    #[error(
        "it holds {found} commands where this coordinator has seen {applied}: it was restored from \
         an old backup, or emptied, or it is another one; put the newer state back, or start every \
         coordinator again to go on with the older one"
    )]
    WentBack {
        /// What was applied.
        applied: u64,
        /// What is there now.
        found: u64,
    },
}

/// Who proposes, and its start.
pub type Proposer = (NodeId, Incarnation);

/// A command that can be appended, and what it will come to.
#[derive(Clone, Debug)]
pub struct Staged {
    /// Which it is.
    pub id: EntryId,
    /// As it will stand in the log.
    pub bytes: Vec<u8>,
    command: Command,
    state: ClusterState,
    effects: Vec<Effect>,
}

/// Why a change cannot be staged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unstaged {
    /// The state, as it is here, refuses it.
    Refused(Refusal),
    /// It cannot be written.
    Unwritable(EntryError),
}

/// The state, and where in the log it is.
#[derive(Clone, Debug)]
pub struct Tail {
    state: Arc<ClusterState>,
    /// The last command in the state.
    applied: u64,
    /// The revision that wrote it into the head.
    head: i64,
    /// The last command that is known to be in a snapshot.
    trimmed: u64,
    /// A command of ours whose answer was lost, and what it came to once it is seen.
    awaited: Option<Awaited>,
}

#[derive(Clone, Debug)]
struct Awaited {
    id: EntryId,
    command: Command,
    effects: Option<Vec<Effect>>,
}

impl Tail {
    /// The state of a snapshot; 0 and the empty state where there is none.
    pub fn new(state: ClusterState, index: u64) -> Self {
        Self { state: Arc::new(state), applied: index, head: 0, trimmed: index, awaited: None }
    }

    /// The state.
    pub fn state(&self) -> &Arc<ClusterState> {
        &self.state
    }

    /// The number of the last command in the state.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// The revision of the head that goes with it.
    pub fn head(&self) -> i64 {
        self.head
    }

    /// Whether a snapshot should be written.
    pub fn is_long(&self) -> bool {
        self.applied - self.trimmed >= COMPACT_EVERY
    }

    /// A snapshot holds the commands up to here.
    pub fn trim(&mut self, index: u64) {
        self.trimmed = self.trimmed.max(index.min(self.applied));
    }

    /// Takes one thing that was heard.
    pub fn hear(&mut self, heard: &Heard) -> Result<(), Lost> {
        match heard {
            Heard::Command { index, .. } if *index <= self.applied => Ok(()),
            Heard::Command { index, bytes } if *index == self.applied + 1 => {
                self.apply(*index, bytes)
            }
            Heard::Head { index, revision } if *index == self.applied => {
                self.head = self.head.max(*revision);
                Ok(())
            }
            // An event from before what we have appended or read since.
            Heard::Head { index, .. } if *index < self.applied => Ok(()),
            Heard::Gone { index } if *index <= self.applied => {
                self.trim(*index);
                Ok(())
            }
            Heard::Command { index, .. } | Heard::Head { index, .. } | Heard::Gone { index } => {
                Err(Lost::Gap { from: self.applied, to: *index })
            }
        }
    }

    fn apply(&mut self, index: u64, bytes: &[u8]) -> Result<(), Lost> {
        let lost = |why: String| Lost::Entry { index, why };
        let (id, command) = entry::decode(bytes).map_err(|error| lost(error.to_string()))?;
        let mut state = ClusterState::clone(&self.state);
        // Only commands that were taken are written.
        let effects = state
            .apply(&command)
            .map_err(|refusal| lost(format!("it does not apply: {refusal}")))?;
        self.state = Arc::new(state);
        self.applied = index;
        if let Some(awaited) = self.awaited.as_mut().filter(|awaited| awaited.id == id) {
            awaited.effects = Some(effects);
        }
        Ok(())
    }

    /// Makes a change a command behind the last one, on a copy.
    pub fn stage(
        &self,
        (client, incarnation): Proposer,
        now: Timestamp,
        id: EntryId,
        change: Change,
    ) -> Result<Staged, Unstaged> {
        let sequence = self.state.last_sequence(client, incarnation) + 1;
        let command = Command { client, incarnation, sequence, at: now, change };
        let mut state = ClusterState::clone(&self.state);
        let effects = state.apply(&command).map_err(Unstaged::Refused)?;
        let bytes = entry::encode(id, &command).map_err(Unstaged::Unwritable)?;
        Ok(Staged { id, bytes, command, state, effects })
    }

    /// The command was appended behind the last one.
    pub fn settle(&mut self, staged: Staged, revision: i64) -> Vec<Effect> {
        self.state = Arc::new(staged.state);
        self.applied += 1;
        self.head = revision;
        staged.effects
    }

    /// Nobody knows whether the command was appended: look out for it.
    pub fn await_answer(&mut self, staged: &Staged) {
        let command = staged.command.clone();
        self.awaited = Some(Awaited { id: staged.id, command, effects: None });
    }

    /// What the awaited command came to, where it was seen; it is not awaited any more then.
    pub fn take_answer(&mut self) -> Option<Vec<Effect>> {
        let effects = self.awaited.as_mut()?.effects.take()?;
        self.awaited = None;
        Some(effects)
    }

    /// Nothing is awaited any more.
    pub fn forget(&mut self) {
        self.awaited = None;
    }

    /// Replaces it by what was loaded. What was awaited may be inside.
    pub fn replace(&mut self, loaded: Tail) -> Result<(), Lost> {
        if loaded.applied < self.applied {
            return Err(Lost::WentBack { applied: self.applied, found: loaded.applied });
        }
        let mut awaited = self.awaited.take();
        if let Some(awaited) = &mut awaited {
            awaited.effects = loaded.state.result_of(&awaited.command).and_then(Result::ok);
        }
        *self = Self { awaited, ..loaded };
        Ok(())
    }
}

#[cfg(test)]
#[path = "tail_test.rs"]
mod tests;
