//! Raft: the log that all coordinators agree on, with one of them, three or five.
//!
//! ```text
//! propose, read ─► shell (●, a thread) ─► core (○) ─► Round ─► disk (●) ─► core ─► Done ─► messages ─► transport (●) ══shoal-raft══► the others
//!                                                                             └► state ─► watch ─► everybody
//! ```
//!
//! Only commands enter the log. A lone coordinator is the same code with one voter, which leads as soon
//! as it starts and needs no ticks.

mod alone;
mod bridge;
/// Public for the simulator alone (`shoal-tests`), as `pending` is.
#[doc(hidden)]
pub mod core;
mod disk;
mod log;
mod membership;
#[doc(hidden)]
pub mod pending;
mod shell;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use redb::Database;
use shoal_protocol::id::{Incarnation, NodeId};
use tokio::sync::{mpsc, watch};

use self::alone::Heritage;
use self::core::{CoreError, Saved, Voter};
use self::disk::{Disk, DiskError, Opener, Owner};
use self::shell::{Parts, Shell};
use super::{ControlStore, Heard, Members, Message, PROPOSALS_MAX, Presence, Standing};
use crate::control::state::{ClusterState, Timestamp};

pub use self::alone::AloneError;
pub use self::core::TICK;
pub use self::shell::{NetworkEvent, SendMessage};

/// The file's name in the data folder.
pub const FILE_NAME: &str = "state.redb";

/// redb's page cache: the whole file is a few hundred KiB.
const CACHE_LEN: usize = 4 << 20;

/// Events of the network that wait for the thread: a burst of every voter's window.
const NETWORK_MAX: usize = 1024;

/// A store that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("the cluster's state in {}: {source}", path.display())]
pub struct OpenError {
    path: PathBuf,
    source: StartError,
}

impl OpenError {
    /// Whether the next start would find the same, until a person gives it something else.
    pub fn needs_a_person(&self) -> bool {
        matches!(&self.source, StartError::Disk(error) if error.needs_a_person())
    }
}

/// Why a log cannot be used.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Core(#[from] CoreError),
    #[error("cannot start its thread: {0}")]
    Thread(#[source] std::io::Error),
    #[error(transparent)]
    Alone(#[from] AloneError),
    #[error("cannot keep a copy of it as it was: {0}")]
    Copy(#[source] std::io::Error),
}

/// What to do in a folder without a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenEmpty {
    /// Begin a new log, as its only voter.
    Found,
    /// Wait until the leader of another log sends a snapshot.
    Wait,
}

/// The thread behind the handles. Dropping it leaves the thread to end with the last handle; `close`
/// waits for it.
pub struct RaftStore {
    proposals: mpsc::Sender<Message>,
    network: mpsc::Sender<NetworkEvent>,
    incarnation: Incarnation,
    thread: JoinHandle<()>,
    opener: Opener,
}

/// Opens or creates `state.redb` in a folder, as coordinator `me`. Messages for other voters go to
/// `send`; theirs come through `RaftStore::network`.
pub fn open(
    folder: &Path,
    me: NodeId,
    empty: WhenEmpty,
    send: SendMessage,
) -> Result<(ControlStore, RaftStore), OpenError> {
    let dice = getrandom::u64().unwrap_or(u64::from(me.number));
    open_with(opener(folder), me, empty, dice, send)
        .map_err(|source| OpenError { path: folder.join(FILE_NAME), source })
}

fn opener(folder: &Path) -> Opener {
    let (folder, path) = (folder.to_owned(), folder.join(FILE_NAME));
    Arc::new(move || {
        disk::distrust_cache(&path)?;
        let database = Database::builder().set_cache_size(CACHE_LEN).create(&path)?;
        // The file's name must be as durable as what is in it.
        File::open(&folder).and_then(|folder| folder.sync_all())?;
        Ok(database)
    })
}

/// What a voter could go on with alone.
#[derive(Debug)]
pub struct Survey {
    /// Whose log it is.
    pub me: NodeId,
    /// The state after all of its entries.
    pub state: ClusterState,
    /// The last entry.
    pub last: u64,
    /// The latest epoch that it has heard of.
    pub epoch: u64,
    /// Everybody else who votes or learns.
    pub others: Vec<NodeId>,
}

/// Looks at a log that nobody uses, and changes nothing.
pub fn survey(folder: &Path) -> Result<Survey, OpenError> {
    let failed = |source| OpenError { path: folder.join(FILE_NAME), source };
    survey_with(&opener(folder)).map_err(failed)
}

fn survey_with(opener: &Opener) -> Result<Survey, StartError> {
    let (disk, found) = Disk::open(opener)?;
    disk.close();
    let (Some(owner), Some(saved)) = (found.owner, found.saved) else {
        return Err(AloneError::NoLog.into());
    };
    let heritage = Heritage::of(&saved)?;
    let others = heritage.others(owner.node)?;
    let Heritage { state, last, epoch } = heritage;
    Ok(Survey { me: owner.node, state, last, epoch, others })
}

/// Makes the coordinator whose log this is the only one, for ever: `give_up` must name all others. The
/// file as it was stays beside it, under the name that is returned, with the epoch that begins.
pub fn go_on_alone(
    folder: &Path,
    at: Timestamp,
    give_up: &[NodeId],
) -> Result<(PathBuf, u64), OpenError> {
    let path = folder.join(FILE_NAME);
    let done = survey_with(&opener(folder)).and_then(|survey| {
        let copy = folder.join(format!("{FILE_NAME}.before-epoch-{}", survey.epoch));
        std::fs::copy(&path, &copy).map_err(StartError::Copy)?;
        Ok((copy, go_on_alone_with(&opener(folder), at, give_up)?))
    });
    done.map_err(|source| OpenError { path, source })
}

fn go_on_alone_with(opener: &Opener, at: Timestamp, give_up: &[NodeId]) -> Result<u64, StartError> {
    let (disk, found) = Disk::open(opener)?;
    let (Some(owner), Some(saved)) = (found.owner, found.saved) else {
        disk.close();
        return Err(AloneError::NoLog.into());
    };
    // Counted as a start of its own: what was proposed by an earlier one is over.
    let owner = Owner { incarnation: Incarnation(owner.incarnation.0 + 1), ..owner };
    let made = Heritage::of(&saved)
        .and_then(|heritage| heritage.alone(owner.node, owner.incarnation, at, give_up));
    let done = made.map_err(StartError::from).and_then(|(write, epoch)| {
        disk.own(owner)?;
        disk.write(&write)?;
        Ok(epoch)
    });
    disk.close();
    done
}

fn open_with(
    opener: Opener,
    me: NodeId,
    empty: WhenEmpty,
    dice: u64,
    send: SendMessage,
) -> Result<(ControlStore, RaftStore), StartError> {
    let incarnation = take_ownership(&opener, me, empty)?;
    let (mut voter, disk) = begin(&opener, me, dice)?;
    // A lone voter has everything that was ever promised before anybody looks.
    for _ in 0..2 {
        while let Some(round) = voter.begin()? {
            disk.write(&round.write)?;
            voter.finish(round)?;
        }
        // What it has just applied may have been in the way of its election.
        if !voter.is_lost_alone() {
            break;
        }
        voter.campaign();
    }
    let (proposals, inbox) = mpsc::channel(PROPOSALS_MAX);
    let (network, events) = mpsc::channel(NETWORK_MAX);
    let (published, state) = watch::channel(Arc::clone(voter.state()));
    let (standing, watch_standing) = watch::channel(Standing::default());
    let (members, watch_members) = watch::channel(Members::default());
    let again = Arc::clone(&opener);
    let parts =
        Parts { me, incarnation, dice, opener, voter, disk, published, standing, members, send };
    let shell = Shell::new(parts);
    let thread = std::thread::Builder::new()
        .name("shoal-store".into())
        .spawn(move || shell.run(inbox, events))
        .map_err(StartError::Thread)?;
    let store = ControlStore {
        proposals: proposals.clone(),
        state,
        standing: watch_standing,
        members: watch_members,
        elsewhere: false,
        heard: Heard::default(),
        me,
        presence: Presence::default(),
        origin: std::time::Instant::now(),
    };
    Ok((store, RaftStore { proposals, network, incarnation, thread, opener: again }))
}

/// Counts this start, and founds the log where that is wanted. On the disk when this returns.
fn take_ownership(
    opener: &Opener,
    me: NodeId,
    empty: WhenEmpty,
) -> Result<Incarnation, StartError> {
    let (disk, found) = Disk::open(opener)?;
    if let Some(why) = found.verdict {
        disk.close();
        return Err(DiskError::Condemned(why).into());
    }
    let last = match found.owner {
        Some(owner) if owner.node != me && found.saved.is_some() => {
            let error = DiskError::NotOurs { found: owner.node, expected: me };
            disk.close();
            return Err(error.into());
        }
        Some(owner) if owner.node == me => owner.incarnation,
        _ => Incarnation(0),
    };
    let incarnation = Incarnation(last.0 + 1);
    disk.own(Owner { node: me, incarnation })?;
    if found.saved.is_none() && empty == WhenEmpty::Found {
        let Saved { hard, snapshot, .. } = Voter::found(u64::from(me.number))?;
        let write =
            self::core::Write { snapshot: Some(snapshot), entries: Vec::new(), hard: Some(hard) };
        disk.write(&write)?;
    }
    disk.close();
    Ok(incarnation)
}

/// Opens the file and starts a voter from what is in it. One that is alone stands for election at once.
fn begin(opener: &Opener, me: NodeId, dice: u64) -> Result<(Voter, Disk), StartError> {
    let (disk, found) = Disk::open(opener)?;
    let saved = found.saved.unwrap_or_else(|| Saved {
        hard: Default::default(),
        snapshot: Default::default(),
        entries: Vec::new(),
    });
    let mut voter = Voter::new(u64::from(me.number), saved, dice)?;
    if voter.is_alone() {
        voter.campaign();
    }
    Ok((voter, disk))
}

impl RaftStore {
    /// The number of this start.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Where messages of other voters go.
    pub fn network(&self) -> mpsc::Sender<NetworkEvent> {
        self.network.clone()
    }

    /// Lets another lead, then closes the file. Blocks: call it where that is allowed.
    pub fn close(self) {
        // Either fails only where the thread has ended already.
        let _ = self.proposals.blocking_send(Message::Stop);
        let _ = self.thread.join();
    }

    /// Closes the file and sees to it that nobody votes with it again. Its start number guards against that once
    /// only: the next start has a higher one. Blocks, as `close` does.
    pub fn condemn(self, why: &str) {
        let opener = Arc::clone(&self.opener);
        self.close();
        let condemned = Disk::open(&opener).and_then(|(disk, _)| {
            let condemned = disk.condemn(why);
            disk.close();
            condemned
        });
        if let Err(error) = condemned {
            tracing::error!(%error, "cannot write down that this data folder must not be used: do not start it again");
        }
    }
}

impl std::fmt::Debug for RaftStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RaftStore").field("incarnation", &self.incarnation).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "disk_test.rs"]
mod tests;
