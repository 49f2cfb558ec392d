//! ○ One voter: the crate's algorithm and our state behind it, told the time and the dice.
//!
//! ```text
//! tick, step, propose, read, change ─► begin ─► Round{send, write} ─► the shell writes and syncs ─► finish ─► Done{send, answers}
//! ```
//!
//! The order is the point of it: what a message promises is on the disk before the message leaves
//! (`Round::write` comes before `Done::send`); what a leader may send at once is in `Round::send`.
//! A shell that cannot write drops the voter, and starts again from the disk.

use std::sync::Arc;

use prost::Message as _;
use raft::prelude::{
    ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry,
    EntryType, HardState, Message, Snapshot,
};
use raft::{Config, RawNode, ReadOnlyOption, Ready, SnapshotStatus, StateRole};

use super::bridge;
use super::log::{Applied, Log, snapshot_of};
use super::membership;
use crate::control::state::{ClusterState, Command, snapshot};

/// How often a voter is told that time has passed.
pub const TICK: std::time::Duration = std::time::Duration::from_millis(10);

/// Ticks between a leader's heartbeats.
const HEARTBEAT_TICKS: usize = 5;

/// Ticks without a leader before an election: each voter draws one in this range each time.
const ELECTION_TICKS: std::ops::Range<usize> = 20..37;

/// Entries in memory before they are replaced by a snapshot: replaying so many takes milliseconds.
pub(super) const COMPACT_EVERY: usize = 1024;

/// Entries that are kept behind a snapshot, for a voter that was away for a moment.
const KEEP_ENTRIES: u64 = 256;

/// Bytes of entries in one message: a few hundred commands, one turn of the network's window.
const MESSAGE_BYTES: u64 = 1 << 20;

/// Messages to one voter that it has not acknowledged: two hundred changes in a burst.
const INFLIGHT_MESSAGES: usize = 256;

/// What a voter finds when it starts.
pub struct Saved {
    /// Its term, vote and commit.
    pub hard: HardState,
    /// The last snapshot; one without an index is of a voter that knows nothing yet.
    pub snapshot: Snapshot,
    /// The entries behind it.
    pub entries: Vec<Entry>,
}

/// A voter of one log.
pub struct Voter {
    node: RawNode<Log>,
    dice: u64,
    ticks: u64,
    state: Arc<ClusterState>,
    /// Entries before a compaction, and those that stay behind it.
    compaction: (usize, u64),
    owed: Owed,
}

/// A commit that the crate told of after the write of its round, and will not tell of again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owed {
    Nothing,
    /// Written with the next change: it may only be learnt anew.
    Commit,
    /// Members changed with it: written at once. A voter that began anew with members of before would
    /// count the wrong majority.
    Members,
}

/// What is to be written, and what may be sent meanwhile.
pub struct Round {
    /// May leave before the write.
    pub send: Vec<Message>,
    /// Must be on the disk before `finish`.
    pub write: Write,
    ready: Ready,
}

/// What must be on the disk before anything is promised.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Write {
    /// Replaces all that is there.
    pub snapshot: Option<Snapshot>,
    /// Replace what is there from the first one's index on.
    pub entries: Vec<Entry>,
    /// Term, vote and commit.
    pub hard: Option<HardState>,
}

impl Write {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.snapshot.is_none() && self.entries.is_empty() && self.hard.is_none()
    }
}

/// What a round came to.
#[derive(Default)]
pub struct Done {
    /// May leave now.
    pub send: Vec<Message>,
    /// Whether the state has changed.
    pub applied: bool,
    /// Reads whose number is here, and at which index they are answered.
    pub reads: Vec<(u64, u64)>,
    /// A snapshot that may replace the entries in it on the disk.
    pub compact: Option<Snapshot>,
}

/// Entries that cannot be read: a newer build wrote them, or they are damaged.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// The crate refuses what it was started with.
    #[error("the log does not hold together: {0}")]
    Raft(#[from] raft::Error),
    /// The state of a snapshot cannot be read.
    #[error(transparent)]
    Snapshot(#[from] snapshot::SnapshotError),
    /// An entry cannot be read.
    #[error(
        "log entry {index} cannot be read: {why}; this build may be too old for it: upgrade it"
    )]
    Entry {
        /// Which.
        index: u64,
        /// Why.
        why: String,
    },
}

impl Voter {
    /// Voter `id`, from what it had saved. `dice` seeds its election time-outs.
    pub fn new(id: u64, saved: Saved, dice: u64) -> Result<Self, CoreError> {
        let meta = saved.snapshot.get_metadata().clone();
        let state = match meta.index {
            0 => Arc::default(),
            _ => Arc::new(snapshot::decode(&saved.snapshot.data)?),
        };
        let applied = Applied { index: meta.index, term: meta.term, state: Arc::clone(&state) };
        let mut hard = saved.hard;
        // A snapshot that was made here is of what was committed, whatever was written last.
        hard.commit = hard.commit.max(meta.index);
        let log = Log::new(hard, meta.get_conf_state().clone(), applied, saved.entries);
        let config = Config {
            id,
            applied: meta.index,
            election_tick: ELECTION_TICKS.start,
            heartbeat_tick: HEARTBEAT_TICKS,
            min_election_tick: ELECTION_TICKS.start,
            max_election_tick: ELECTION_TICKS.end,
            max_size_per_msg: MESSAGE_BYTES,
            max_inflight_msgs: INFLIGHT_MESSAGES,
            check_quorum: true,
            pre_vote: true,
            read_only_option: ReadOnlyOption::Safe,
            ..Config::default()
        };
        let node = RawNode::new(&config, log, &bridge::logger(id))?;
        let compaction = (COMPACT_EVERY, KEEP_ENTRIES);
        let mut voter = Self { node, dice, ticks: 0, state, compaction, owed: Owed::Nothing };
        voter.draw();
        Ok(voter)
    }

    /// The first voter of a new log.
    pub fn found(id: u64) -> Result<Saved, CoreError> {
        let conf = ConfState { voters: vec![id], ..Default::default() };
        // It begins behind entry 1, so that whoever comes later must take a snapshot first.
        let applied = Applied { index: 1, term: 1, state: Arc::default() };
        let hard = HardState { term: 1, commit: 1, ..Default::default() };
        Ok(Saved { hard, snapshot: snapshot_of(&applied, &conf)?, entries: Vec::new() })
    }

    /// Compacts after so many entries and keeps so many behind a snapshot: a simulator's logs are short.
    #[doc(hidden)]
    pub fn compact_after(&mut self, every: usize, keep: u64) {
        self.compaction = (every, keep);
    }

    /// Time has passed: one `TICK`.
    pub fn tick(&mut self) {
        self.ticks += 1;
        self.node.tick();
        self.draw();
    }

    /// Takes a message of another voter. One that makes no sense is dropped, as the network may drop
    /// any.
    pub fn step(&mut self, message: Message) {
        if let Err(error) = self.node.step(message) {
            tracing::debug!(%error, "a message of another coordinator was dropped");
        }
        self.draw();
    }

    /// Stands for election now. For a lone voter that is all it takes.
    pub fn campaign(&mut self) {
        let _ = self.node.campaign();
        self.draw();
    }

    /// Offers a command to the log; `false` where nobody leads, and it is to be offered again later.
    /// It may be lost on its way all the same.
    pub fn propose(&mut self, command: &Command) -> bool {
        let bytes = match postcard::to_stdvec(command) {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::error!(%error, "a command cannot be encoded");
                return false;
            }
        };
        self.node.propose(Vec::new(), bytes).is_ok()
    }

    /// Asks for the index at which a read is current. Its number comes back in `Done::reads`, or is
    /// lost: ask again. The leader tells questions apart by their words alone, so they say whose they are
    /// and of which start.
    pub fn read(&mut self, number: u64) {
        self.node.read_index(self.question(number));
    }

    fn question(&self, number: u64) -> Vec<u8> {
        [self.node.raft.id, self.dice, number].iter().flat_map(|n| n.to_le_bytes()).collect()
    }

    /// Lets another voter lead, if this one does.
    pub fn transfer(&mut self, to: u64) {
        self.node.transfer_leader(to);
    }

    /// A voter cannot be reached.
    pub fn unreachable(&mut self, id: u64) {
        self.node.report_unreachable(id);
    }

    /// What became of a snapshot on its way.
    pub fn snapshot_sent(&mut self, id: u64, arrived: bool) {
        let status = if arrived { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
        self.node.report_snapshot(id, status);
    }

    /// Proposes what the log's configuration lacks of what the state says, if this voter leads.
    pub fn settle_members(&mut self) {
        if !self.leads() || self.node.raft.has_pending_conf() {
            return;
        }
        let progress = self.node.raft.prs();
        let committed = self.node.raft.raft_log.committed;
        // One that has nothing yet may wait for a snapshot, however short the log is.
        let near = |matched: u64| matched > 0 && matched + membership::NEAR >= committed;
        let caught_up = |id: u64| progress.get(id).is_some_and(|p| near(p.matched));
        let wanted = membership::wanted(&self.state);
        let step =
            membership::next(&wanted, self.node.store().conf(), self.node.raft.id, caught_up);
        match step {
            None => {}
            Some(membership::Step::Handover { to }) => self.transfer(to),
            Some(membership::Step::Change(change)) => {
                if let Err(error) = self.node.propose_conf_change(Vec::new(), change) {
                    tracing::debug!(%error, "a change of the voters was not taken");
                }
            }
        }
    }

    /// Begins a round, if there is anything to do. It must be finished, or the voter dropped.
    pub fn begin(&mut self) -> Result<Option<Round>, CoreError> {
        if !self.node.has_ready() && self.owed != Owed::Members {
            return Ok(None);
        }
        let mut ready = self.node.ready();
        let send = ready.take_messages();
        let mut write = Write { hard: ready.hs().cloned(), ..Write::default() };
        let owed = std::mem::replace(&mut self.owed, Owed::Nothing);
        if write.hard.is_none() && owed != Owed::Nothing {
            write.hard = Some(self.node.store().hard().clone());
        }
        if !ready.snapshot().is_empty() {
            let snapshot = ready.snapshot().clone();
            self.state = Arc::new(snapshot::decode(&snapshot.data)?);
            self.node.mut_store().restore(snapshot.get_metadata(), Arc::clone(&self.state));
            write.snapshot = Some(snapshot);
        }
        write.entries = ready.take_entries();
        let log = self.node.mut_store();
        log.append(&write.entries);
        if let Some(hard) = &write.hard {
            log.set_hard(hard.clone());
        }
        Ok(Some(Round { send, write, ready }))
    }

    /// Ends a round whose write is on the disk.
    pub fn finish(&mut self, round: Round) -> Result<Done, CoreError> {
        let Round { mut ready, write, .. } = round;
        let mut done = Done { applied: write.snapshot.is_some(), ..Done::default() };
        for read in ready.take_read_states() {
            let number = read.request_ctx.last_chunk().map(|number| u64::from_le_bytes(*number));
            if let Some(number) = number.filter(|n| self.question(*n) == read.request_ctx) {
                done.reads.push((number, read.index));
            }
        }
        done.send = ready.take_persisted_messages();
        let committed = ready.take_committed_entries();
        self.apply(committed, &mut done)?;
        let mut light = self.node.advance(ready);
        done.send.extend(light.take_messages());
        let committed = light.take_committed_entries();
        if let Some(commit) = light.commit_index() {
            self.node.mut_store().commit_to(commit);
            let normal = |entry: &Entry| entry.get_entry_type() == EntryType::EntryNormal;
            self.owed = match committed.iter().all(normal) {
                true => Owed::Commit,
                false => Owed::Members,
            };
        }
        self.apply(committed, &mut done)?;
        self.node.advance_apply();
        self.draw();
        let (every, keep) = self.compaction;
        if self.node.store().len() >= every + keep as usize {
            done.compact = Some(self.compact()?);
        }
        Ok(done)
    }

    fn apply(&mut self, entries: Vec<Entry>, done: &mut Done) -> Result<(), CoreError> {
        for entry in entries {
            let index = entry.index;
            if let Some(command) = command_of(&entry)? {
                // What it came to stays in the state, for whoever asks.
                let _ = Arc::make_mut(&mut self.state).apply(&command);
                done.applied = true;
            } else if entry.get_entry_type() == EntryType::EntryConfChangeV2 {
                let change = ConfChangeV2::decode(entry.data.as_ref())
                    .map_err(|error| CoreError::Entry { index, why: error.to_string() })?;
                let conf = self.node.apply_conf_change(&change)?;
                self.node.mut_store().set_conf(conf);
                done.applied = true;
            }
            let state = Arc::clone(&self.state);
            self.node.mut_store().set_applied(index, state);
        }
        Ok(())
    }

    fn compact(&mut self) -> Result<Snapshot, CoreError> {
        let log = self.node.mut_store();
        let snapshot = snapshot_of(log.applied(), log.conf())?;
        log.compact(snapshot.get_metadata().index.saturating_sub(self.compaction.1));
        Ok(snapshot)
    }

    /// The state as far as it is applied.
    pub fn state(&self) -> &Arc<ClusterState> {
        &self.state
    }

    /// The last entry in the state.
    pub fn applied(&self) -> u64 {
        self.node.store().applied().index
    }

    /// Who leads; `None` where nobody is known to.
    pub fn leader(&self) -> Option<u64> {
        Some(self.node.raft.leader_id).filter(|id| *id != raft::INVALID_ID)
    }

    /// Whether this voter leads, and has applied all that was committed before its term.
    pub fn leads(&self) -> bool {
        self.node.raft.state == StateRole::Leader && self.node.raft.commit_to_current_term()
    }

    /// The epoch in which this voter leads, from its election on.
    pub fn reign(&self) -> Option<u64> {
        (self.node.raft.state == StateRole::Leader).then(|| self.term())
    }

    /// The number of the reign.
    pub fn term(&self) -> u64 {
        self.node.raft.term
    }

    /// Who votes and who learns.
    pub fn conf(&self) -> &ConfState {
        self.node.store().conf()
    }

    /// Whether nobody else belongs to the log: then time does not matter.
    pub fn is_alone(&self) -> bool {
        let conf = self.conf();
        conf.voters == [self.node.raft.id]
            && conf.learners.is_empty()
            && conf.voters_outgoing.is_empty()
    }

    /// Whether nobody else belongs to the log, and it does not lead for all that: a change of members that
    /// it had not applied yet was in the way of its election.
    pub fn is_lost_alone(&self) -> bool {
        self.is_alone() && self.node.raft.state != StateRole::Leader
    }

    /// A voter that has everything, to take over from this one.
    pub fn heir(&self) -> Option<u64> {
        if self.node.raft.state != StateRole::Leader {
            return None;
        }
        let progress = self.node.raft.prs();
        let me = self.node.raft.id;
        let voters = self.conf().voters.iter().filter(|id| **id != me);
        let known = voters.filter_map(|id| Some((progress.get(*id)?, *id)));
        let active = known.filter(|(progress, _)| progress.recent_active);
        active.max_by_key(|(progress, _)| progress.matched).map(|(_, id)| id)
    }

    /// The crate draws election time-outs from its thread's randomness whenever it resets them; this
    /// puts ours in their place: the same for the same seed.
    fn draw(&mut self) {
        let width = (ELECTION_TICKS.end - ELECTION_TICKS.start) as u64;
        let epoch = self.ticks / ELECTION_TICKS.end as u64;
        let drawn = mix(self.dice ^ mix(self.node.raft.term ^ mix(epoch)));
        let ticks = ELECTION_TICKS.start + (drawn % width) as usize;
        self.node.raft.set_randomized_election_timeout(ticks);
    }
}

/// SplitMix64's finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number generators").
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The command in an entry; `None` where it is one of the algorithm's own.
pub(super) fn command_of(entry: &Entry) -> Result<Option<Command>, CoreError> {
    let bad = |why: String| CoreError::Entry { index: entry.index, why };
    match entry.get_entry_type() {
        // A new leader begins its term with an empty entry.
        EntryType::EntryNormal if entry.data.is_empty() => Ok(None),
        EntryType::EntryNormal => {
            postcard::from_bytes(&entry.data).map(Some).map_err(|error| bad(error.to_string()))
        }
        EntryType::EntryConfChangeV2 => Ok(None),
        EntryType::EntryConfChange => Err(bad("it is of an unknown kind".into())),
    }
}

/// A change of several members at once: joint consensus that leaves by itself.
pub(super) fn joint(changes: Vec<(ConfChangeType, u64)>) -> ConfChangeV2 {
    let single = |(kind, node_id): (ConfChangeType, u64)| {
        let mut change = ConfChangeSingle { node_id, ..Default::default() };
        change.set_change_type(kind);
        change
    };
    let mut change = ConfChangeV2::default();
    change.set_transition(ConfChangeTransition::Auto);
    change.set_changes(changes.into_iter().map(single).collect());
    change
}

#[cfg(test)]
#[path = "core_test.rs"]
mod tests;
