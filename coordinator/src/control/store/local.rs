//! One voter: a thread that owns the state and a file on this disk.
//!
//! A change is applied to a copy, written and synced, and only then shown to anybody. After an error
//! of the disk nobody can know what it holds, so the file is closed, changes are refused, reads go
//! on, and the next change opens and replays the file first: what is found there is the truth.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::SystemTime;

use redb::Database;
use shoal_protocol::id::NodeId;
use tokio::sync::{mpsc, watch};

use super::disk::{Disk, DiskError, Opener};
use super::{ControlStore, Message, PROPOSALS_MAX, ProposeError, Standing};
use crate::control::state::{Change, ClusterState, Command, Effect, Timestamp};

/// The file's name in the data folder.
pub const FILE_NAME: &str = "state.redb";

/// Commands in the log before it is replaced by a snapshot: replaying so many takes milliseconds,
/// and a snapshot of a few KiB is written once in so many syncs.
const COMPACT_EVERY: u64 = 256;

/// redb's page cache: the whole file is a few hundred KiB.
const CACHE_LEN: usize = 4 << 20;

/// A store that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("the cluster's state in {}: {source}", path.display())]
pub struct OpenError {
    path: PathBuf,
    source: DiskError,
}

/// The thread behind the handles. Dropping it leaves the thread to end with the last handle; `close`
/// waits for it.
#[derive(Debug)]
pub struct LocalStore {
    proposals: mpsc::Sender<Message>,
    thread: JoinHandle<()>,
}

/// Opens or creates `state.redb` in a folder and replays it. `client` is the coordinator that
/// proposes through it.
pub fn open(folder: &Path, client: NodeId) -> Result<(ControlStore, LocalStore), OpenError> {
    let path = folder.join(FILE_NAME);
    let opener: Opener = {
        let (folder, path) = (folder.to_owned(), path.clone());
        Arc::new(move || {
            let database = Database::builder().set_cache_size(CACHE_LEN).create(&path)?;
            // The file's name must be as durable as what is in it.
            File::open(&folder).and_then(|folder| folder.sync_all())?;
            Ok(database)
        })
    };
    open_with(opener, client).map_err(|source| OpenError { path, source })
}

pub(super) fn open_with(
    opener: Opener,
    client: NodeId,
) -> Result<(ControlStore, LocalStore), DiskError> {
    let (disk, state) = Disk::open(&opener)?;
    let (proposals, inbox) = mpsc::channel(PROPOSALS_MAX);
    let (published, watch) = watch::channel(Arc::new(state));
    let voter = Voter { client, opener, disk: Some(disk), published, last: Timestamp(0) };
    let thread = std::thread::Builder::new()
        .name("shoal-store".into())
        .spawn(move || voter.run(inbox))
        .map_err(|error| DiskError::Io(redb::Error::Io(error)))?;
    // One voter always leads.
    let standing = Standing { leader: Some(client), epoch: 1, leading: true };
    let (_, standing) = watch::channel(standing);
    let store = ControlStore { proposals: proposals.clone(), state: watch, standing };
    Ok((store, LocalStore { proposals, thread }))
}

impl LocalStore {
    /// Lets the changes that wait be made, then closes the file. Blocks: call it where that is
    /// allowed.
    pub fn close(self) {
        // Either fails only where the thread has ended already.
        let _ = self.proposals.blocking_send(Message::Stop);
        let _ = self.thread.join();
    }
}

struct Voter {
    client: NodeId,
    opener: Opener,
    /// `None` after an error, until the file has been opened and replayed again.
    disk: Option<Disk>,
    published: watch::Sender<Arc<ClusterState>>,
    /// The last stamp: time in the log never goes back, whatever the clock does.
    last: Timestamp,
}

impl Voter {
    fn run(mut self, mut inbox: mpsc::Receiver<Message>) {
        loop {
            match inbox.blocking_recv() {
                // The proposer may have given up; the change is made all the same.
                Some(Message::Propose { change, reply }) => drop(reply.send(self.propose(change))),
                // Changes before it have been made.
                Some(Message::Read { reply }) => drop(reply.send(Ok(()))),
                Some(Message::Stop) | None => break,
            }
        }
        self.close();
    }

    fn propose(&mut self, change: Change) -> Result<Vec<Effect>, ProposeError> {
        let result = self.try_propose(change);
        result.unwrap_or_else(|error| {
            tracing::error!(%error, "the control state cannot be written");
            self.close();
            Err(ProposeError::Storage { why: error.to_string() })
        })
    }

    fn try_propose(
        &mut self,
        change: Change,
    ) -> Result<Result<Vec<Effect>, ProposeError>, DiskError> {
        let disk = match &mut self.disk {
            Some(disk) => disk,
            None => {
                let (disk, state) = Disk::open(&self.opener)?;
                tracing::info!("the control state can be written again");
                self.published.send_replace(Arc::new(state));
                self.disk.insert(disk)
            }
        };
        let mut state = ClusterState::clone(&self.published.borrow());
        self.last = self.last.max(Timestamp::of(SystemTime::now()));
        let sequence = state.last_sequence(self.client) + 1;
        let command = Command { client: self.client, sequence, at: self.last, change };
        let effects = match state.apply(&command) {
            // A refused command changes nothing, so it needs no place in the log.
            Err(refusal) => return Ok(Err(refusal.into())),
            Ok(effects) => effects,
        };
        disk.append(&command)?;
        let state = Arc::new(state);
        self.published.send_replace(Arc::clone(&state));
        if disk.entries >= COMPACT_EVERY
            && let Err(error) = disk.compact(&state)
        {
            // The command itself is safe; the file is opened anew for the next one.
            tracing::error!(%error, "the control state cannot be compacted");
            self.close();
        }
        Ok(Ok(effects))
    }

    fn close(&mut self) {
        if let Some(disk) = self.disk.take() {
            disk.close();
        }
    }
}

#[cfg(test)]
#[path = "store_test.rs"]
mod tests;
