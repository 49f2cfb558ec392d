//! The command log and its snapshot in one redb file.
//!
//! | table | key | value |
//! |---|---|---|
//! | `log` | index, from 1, without a gap | format · BLAKE3 · postcard of a `Command` |
//! | `snapshot` | the index of the last command in it | `state::snapshot` |
//!
//! There is at most one snapshot, and the log begins right behind it. redb writes whole transactions
//! or none, syncs before `commit` returns, and checks its own pages; the checksums here catch what
//! happens to a value outside of it. A store with several voters keeps the same two tables and adds
//! its votes.

use std::sync::Arc;

use redb::{
    Database, ReadableDatabase, ReadableTable, TableDefinition, TableError, WriteTransaction,
};

use crate::control::state::{ClusterState, Command, snapshot};

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const SNAPSHOT: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("snapshot");

/// The format of log entries that this build writes.
const FORMAT: u8 = 1;

/// Opens the file. Called again after an error, since redb gives a database up at the first one.
pub(super) type Opener = Arc<dyn Fn() -> Result<Database, redb::DatabaseError> + Send + Sync>;

/// A disk that did not do as it was told, or a file that is not as it was left.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be opened.
    #[error("cannot open it: {0}")]
    Open(#[source] redb::DatabaseError),
    /// Another process has it.
    #[error("another coordinator is running on this data folder; stop it, or give another --data")]
    InUse,
    /// Reading or writing failed.
    #[error("{0}")]
    Io(#[source] redb::Error),
    /// The library gave up.
    #[error("the file is damaged ({0}); restore the data folder from a backup")]
    Panicked(String),
    /// An entry is missing.
    #[error("the log jumps from entry {from} to {to}; restore the data folder from a backup")]
    Gap {
        /// The last entry before it.
        from: u64,
        /// The first entry after it.
        to: u64,
    },
    /// An entry is not what was written.
    #[error("log entry {index} is damaged: {why}; restore the data folder from a backup")]
    Entry {
        /// Which.
        index: u64,
        /// Why.
        why: String,
    },
    /// The snapshot is not what was written.
    #[error(transparent)]
    Snapshot(#[from] snapshot::SnapshotError),
}

fn io(error: impl Into<redb::Error>) -> DiskError {
    DiskError::Io(error.into())
}

/// An open file.
pub(super) struct Disk {
    database: Database,
    /// The index of the last entry.
    last: u64,
    /// Entries behind the snapshot.
    pub entries: u64,
}

impl Disk {
    /// Opens the file and replays what is in it.
    pub fn open(opener: &Opener) -> Result<(Self, ClusterState), DiskError> {
        guarded(|| {
            let database = opener().map_err(|error| match error {
                redb::DatabaseError::DatabaseAlreadyOpen => DiskError::InUse,
                error => DiskError::Open(error),
            })?;
            Self::replay(database)
        })
    }

    /// Closes the file. redb writes then too, and after an error it may panic on what it has in memory.
    pub fn close(self) {
        let closed = guarded(|| {
            drop(self);
            Ok(())
        });
        if let Err(error) = closed {
            tracing::debug!(%error, "the file was not closed well; it is checked when it is opened");
        }
    }

    fn replay(database: Database) -> Result<(Self, ClusterState), DiskError> {
        let transaction = database.begin_read().map_err(io)?;
        let mut state = ClusterState::default();
        let mut start = 0;
        match transaction.open_table(SNAPSHOT) {
            Ok(table) => {
                if let Some((index, bytes)) = table.last().map_err(io)? {
                    start = index.value();
                    state = snapshot::decode(bytes.value())?;
                }
            }
            Err(TableError::TableDoesNotExist(_)) => {}
            Err(error) => return Err(io(error)),
        }
        let mut last = start;
        match transaction.open_table(LOG) {
            Ok(table) => {
                for entry in table.range(start + 1..).map_err(io)? {
                    let (index, bytes) = entry.map_err(io)?;
                    let index = index.value();
                    if index != last + 1 {
                        return Err(DiskError::Gap { from: last, to: index });
                    }
                    let command = decode(index, bytes.value())?;
                    // Only commands that were taken are written.
                    state.apply(&command).map_err(|refusal| DiskError::Entry {
                        index,
                        why: format!("it does not apply: {refusal}"),
                    })?;
                    last = index;
                }
            }
            Err(TableError::TableDoesNotExist(_)) => {}
            Err(error) => return Err(io(error)),
        }
        transaction.close().map_err(io)?;
        Ok((Self { database, last, entries: last - start }, state))
    }

    /// Writes one command behind the others. It is on the disk when this returns.
    pub fn append(&mut self, command: &Command) -> Result<(), DiskError> {
        let index = self.last + 1;
        let bytes =
            encode(command).map_err(|error| DiskError::Entry { index, why: error.to_string() })?;
        self.write(|transaction| {
            let mut log = transaction.open_table(LOG).map_err(io)?;
            log.insert(index, bytes.as_slice()).map_err(io)?;
            Ok(())
        })?;
        self.last = index;
        self.entries += 1;
        Ok(())
    }

    /// Replaces the log so far by the state that it leads to.
    pub fn compact(&mut self, state: &ClusterState) -> Result<(), DiskError> {
        let bytes = snapshot::encode(state)?;
        let last = self.last;
        self.write(|transaction| {
            let mut snapshots = transaction.open_table(SNAPSHOT).map_err(io)?;
            snapshots.retain(|_, _| false).map_err(io)?;
            snapshots.insert(last, bytes.as_slice()).map_err(io)?;
            let mut log = transaction.open_table(LOG).map_err(io)?;
            log.retain(|index, _| index > last).map_err(io)?;
            Ok(())
        })?;
        self.entries = 0;
        Ok(())
    }

    /// One transaction, on the disk when this returns.
    fn write(
        &self,
        changes: impl FnOnce(&WriteTransaction) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        guarded(|| {
            let transaction = self.database.begin_write().map_err(io)?;
            changes(&transaction)?;
            transaction.commit().map_err(io)
        })
    }
}

/// Makes a panic an error like any other: a damaged page can make redb panic wherever it reads one,
/// and the thread that owns the state must outlive that. A database that has panicked is given up.
fn guarded<T>(work: impl FnOnce() -> Result<T, DiskError>) -> Result<T, DiskError> {
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    done.unwrap_or_else(|panic| Err(DiskError::Panicked(message_of(&*panic))))
}

fn message_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}

fn encode(command: &Command) -> Result<Vec<u8>, postcard::Error> {
    let body = postcard::to_stdvec(command)?;
    let mut bytes = vec![FORMAT];
    bytes.extend_from_slice(blake3::hash(&body).as_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

fn decode(index: u64, bytes: &[u8]) -> Result<Command, DiskError> {
    let bad = |why: String| DiskError::Entry { index, why };
    let Some((header, body)) = bytes.split_at_checked(1 + blake3::OUT_LEN) else {
        return Err(bad(format!("it has only {} bytes", bytes.len())));
    };
    if header[0] > FORMAT {
        return Err(bad(format!(
            "it has format {}, this build reads up to {FORMAT}; upgrade it",
            header[0]
        )));
    }
    if blake3::hash(body).as_bytes()[..] != header[1..] {
        return Err(bad("its checksum does not match".into()));
    }
    postcard::from_bytes(body).map_err(|error| bad(error.to_string()))
}
