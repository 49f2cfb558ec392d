//! ● The log, its snapshot and the vote in one redb file.
//!
//! | table | key | value |
//! |---|---|---|
//! | `raft_log` | index, without a gap | format · BLAKE3 · an `Entry` |
//! | `raft_snapshot` | 0 | format · BLAKE3 · a `Snapshot` |
//! | `raft_vote` | 0 | format · BLAKE3 · a `HardState` |
//! | `raft_vote` | 1 | format · BLAKE3 · [`Owner`] |
//!
//! The log begins right behind the snapshot. redb writes whole transactions or none, syncs before
//! `commit` returns, and checks its own pages; the checksums here catch what happens to a value
//! outside of it. A damaged entry may have been promised to others, so it is never left out: the file
//! is refused, and its coordinator joins anew under another number.

use std::cell::Cell;
use std::fs::OpenOptions;
use std::path::Path;
use std::sync::{Arc, Once};

use prost::Message as _;
use raft::prelude::{Entry, HardState, Snapshot};
use redb::{
    Database, ReadableDatabase, ReadableTable, Table, TableDefinition, TableError, TableHandle,
    WriteTransaction,
};
use serde::{Deserialize, Serialize};
use shoal_protocol::id::{Incarnation, NodeId};

use super::core::{Saved, Write};

type Bytes<'a> = TableDefinition<'a, u64, &'static [u8]>;

const LOG: Bytes<'_> = TableDefinition::new("raft_log");
const SNAPSHOT: Bytes<'_> = TableDefinition::new("raft_snapshot");
const VOTE: Bytes<'_> = TableDefinition::new("raft_vote");

const THE_SNAPSHOT: u64 = 0;
const THE_VOTE: u64 = 0;
const THE_OWNER: u64 = 1;
/// Why nobody may vote with it, in words. Older builds do not look.
const THE_VERDICT: u64 = 2;

/// The format of values that this build writes.
const FORMAT: u8 = 1;

/// Opens the file. Called again after an error, since redb gives a database up at the first one.
pub(super) type Opener = Arc<dyn Fn() -> Result<Database, redb::DatabaseError> + Send + Sync>;

/// Whose log this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    /// Its number is what votes, and is never given twice.
    pub node: NodeId,
    /// Its last start.
    pub incarnation: Incarnation,
}

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
    /// The library gave up, with an error or a panic.
    #[error("the file is damaged ({0}); {REPAIR}")]
    Damaged(String),
    /// An entry is missing.
    #[error("the log jumps from entry {from} to {to}; {REPAIR}")]
    Gap {
        /// The last entry before it.
        from: u64,
        /// The first entry after it.
        to: u64,
    },
    /// A value is not what was written.
    #[error("{what} is damaged: {why}; {REPAIR}")]
    Value {
        /// Which.
        what: String,
        /// Why.
        why: String,
    },
    /// It was written before there were several coordinators.
    #[error(
        "it was written by a build of before several coordinators, which this one cannot read: start a \
         new cluster on an empty folder"
    )]
    Older,
    /// It is another coordinator's.
    #[error(
        "it belongs to {found}, and this coordinator is {expected}; each needs a folder of its own"
    )]
    NotOurs {
        /// Whose it is.
        found: NodeId,
        /// Who opens it.
        expected: NodeId,
    },
    /// Another coordinator said so when it last ran.
    #[error(
        "{0} (said when it last ran, and remembered by its file. What undoes it: its backup put in its place again, where \
         whoever said it is gone; `shoal coordinators recover-alone`, where all others are)"
    )]
    Condemned(String),
}

impl DiskError {
    /// Whether the file is what is wrong, and stays so until a person gives another one.
    pub(super) fn needs_a_person(&self) -> bool {
        match self {
            Self::Damaged(_)
            | Self::Gap { .. }
            | Self::Value { .. }
            | Self::Older
            | Self::NotOurs { .. }
            | Self::Condemned(_) => true,
            Self::Open(_) | Self::InUse | Self::Io(_) => false,
        }
    }
}

/// Sees to it that what is read from a file is what lies on the disk. After a sync that failed, Linux keeps
/// pages that were never written and calls them clean, also for the next process: what can still be written
/// is written, and the rest is forgotten, so that it is read again.
pub(super) fn distrust_cache(path: &Path) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).open(path)?;
    file.sync_all()?;
    // A file system that cannot do it has no such cache.
    #[cfg(target_os = "linux")]
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    Ok(())
}

const REPAIR: &str = "where other coordinators live, remove this one and join anew on an empty folder; \
                      else restore the data folder from a backup";

fn io(error: impl Into<redb::Error>) -> DiskError {
    DiskError::Io(error.into())
}

/// An open file.
pub(super) struct Disk {
    database: Database,
}

/// What is in a file.
pub(super) struct Found {
    /// Whose it is; `None` in a new file.
    pub owner: Option<Owner>,
    /// The log; `None` where there has never been one.
    pub saved: Option<Saved>,
    /// Why it may not vote, where another coordinator has said so.
    pub verdict: Option<String>,
}

impl Disk {
    /// Opens the file and reads what is in it.
    pub fn open(opener: &Opener) -> Result<(Self, Found), DiskError> {
        guarded(|| {
            let database = opener().map_err(|error| match error {
                redb::DatabaseError::DatabaseAlreadyOpen => DiskError::InUse,
                redb::DatabaseError::Storage(redb::StorageError::Corrupted(why)) => {
                    DiskError::Damaged(why)
                }
                redb::DatabaseError::Storage(redb::StorageError::Io(error))
                    if error.kind() == std::io::ErrorKind::InvalidData =>
                {
                    DiskError::Damaged("it does not begin as a redb file does".to_owned())
                }
                error => DiskError::Open(error),
            })?;
            let found = read(&database)?;
            Ok((Self { database }, found))
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

    /// Says whose it is, and with which start. What was said against it before is over.
    pub fn own(&self, owner: Owner) -> Result<(), DiskError> {
        let bytes = postcard::to_stdvec(&owner).map_err(|error| unwritable(&error))?;
        self.transaction(|transaction| {
            let mut votes = transaction.open_table(VOTE).map_err(io)?;
            votes.remove(THE_VERDICT).map_err(io)?;
            put(&mut votes, THE_OWNER, &bytes)
        })
    }

    /// Says why nobody may vote with it.
    pub fn condemn(&self, why: &str) -> Result<(), DiskError> {
        self.transaction(|transaction| {
            let mut votes = transaction.open_table(VOTE).map_err(io)?;
            put(&mut votes, THE_VERDICT, why.as_bytes())
        })
    }

    /// All of it is on the disk when this returns, or none.
    pub fn write(&self, write: &Write) -> Result<(), DiskError> {
        if write.is_empty() {
            return Ok(());
        }
        self.transaction(|transaction| {
            if let Some(snapshot) = &write.snapshot {
                put_snapshot(transaction, snapshot, u64::MAX)?;
            }
            if let Some(first) = write.entries.first() {
                let mut log = transaction.open_table(LOG).map_err(io)?;
                log.retain_in(first.index.., |_, _| false).map_err(io)?;
                for entry in &write.entries {
                    put(&mut log, entry.index, &entry.encode_to_vec())?;
                }
            }
            if let Some(hard) = &write.hard {
                let mut votes = transaction.open_table(VOTE).map_err(io)?;
                put(&mut votes, THE_VOTE, &hard.encode_to_vec())?;
            }
            Ok(())
        })
    }

    /// Replaces the entries in a snapshot by it.
    pub fn compact(&self, snapshot: &Snapshot) -> Result<(), DiskError> {
        let index = snapshot.get_metadata().index;
        self.transaction(|transaction| put_snapshot(transaction, snapshot, index))
    }

    fn transaction(
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

fn put_snapshot(
    transaction: &WriteTransaction,
    snapshot: &Snapshot,
    up_to: u64,
) -> Result<(), DiskError> {
    let mut snapshots = transaction.open_table(SNAPSHOT).map_err(io)?;
    put(&mut snapshots, THE_SNAPSHOT, &snapshot.encode_to_vec())?;
    let mut log = transaction.open_table(LOG).map_err(io)?;
    log.retain_in(..=up_to, |_, _| false).map_err(io)
}

fn read(database: &Database) -> Result<Found, DiskError> {
    let transaction = database.begin_read().map_err(io)?;
    if transaction.list_tables().map_err(io)?.any(|table| table.name() == "log") {
        return Err(DiskError::Older);
    }
    let value = |table: Bytes<'_>, key: u64, what: &str| match transaction.open_table(table) {
        Ok(table) => {
            let bytes = table.get(key).map_err(io)?;
            bytes.map(|bytes| open(bytes.value(), what).map(<[u8]>::to_vec)).transpose()
        }
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(io(error)),
    };
    let owner = value(VOTE, THE_OWNER, "the owner's name")?
        .map(|bytes| postcard::from_bytes(&bytes).map_err(|error| bad("the owner's name", &error)))
        .transpose()?;
    let hard: HardState =
        decoded(value(VOTE, THE_VOTE, "the vote")?, "the vote")?.unwrap_or_default();
    let verdict = value(VOTE, THE_VERDICT, "what was said against it")?
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let snapshot: Option<Snapshot> =
        decoded(value(SNAPSHOT, THE_SNAPSHOT, "the snapshot")?, "the snapshot")?;
    let begin = snapshot.as_ref().map_or(0, |snapshot| snapshot.get_metadata().index);
    let entries = match transaction.open_table(LOG) {
        Ok(log) => read_entries(&log, begin)?,
        Err(TableError::TableDoesNotExist(_)) => Vec::new(),
        Err(error) => return Err(io(error)),
    };
    transaction.close().map_err(io)?;
    let known = snapshot.is_some() || hard != HardState::default() || !entries.is_empty();
    let saved = known.then(|| Saved { hard, snapshot: snapshot.unwrap_or_default(), entries });
    Ok(Found { owner, saved, verdict })
}

fn read_entries(
    log: &impl ReadableTable<u64, &'static [u8]>,
    begin: u64,
) -> Result<Vec<Entry>, DiskError> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut last = begin;
    for entry in log.range(begin + 1..).map_err(io)? {
        let (index, bytes) = entry.map_err(io)?;
        let index = index.value();
        if index != last + 1 {
            return Err(DiskError::Gap { from: last, to: index });
        }
        let what = format!("log entry {index}");
        let entry =
            Entry::decode(open(bytes.value(), &what)?).map_err(|error| bad(&what, &error))?;
        entries.push(entry);
        last = index;
    }
    Ok(entries)
}

fn put(table: &mut Table<'_, u64, &[u8]>, key: u64, body: &[u8]) -> Result<(), DiskError> {
    let mut bytes = Vec::with_capacity(1 + blake3::OUT_LEN + body.len());
    bytes.push(FORMAT);
    bytes.extend_from_slice(blake3::hash(body).as_bytes());
    bytes.extend_from_slice(body);
    table.insert(key, bytes.as_slice()).map_err(io)?;
    Ok(())
}

/// The body of a value.
fn open<'a>(bytes: &'a [u8], what: &str) -> Result<&'a [u8], DiskError> {
    let Some((header, body)) = bytes.split_at_checked(1 + blake3::OUT_LEN) else {
        return Err(bad(what, &format!("it has only {} bytes", bytes.len())));
    };
    if header[0] > FORMAT {
        let why =
            format!("it has format {}, this build reads up to {FORMAT}: upgrade it", header[0]);
        return Err(bad(what, &why));
    }
    if blake3::hash(body).as_bytes()[..] != header[1..] {
        return Err(bad(what, &"its checksum does not match"));
    }
    Ok(body)
}

fn decoded<M: prost::Message + Default>(
    bytes: Option<Vec<u8>>,
    what: &str,
) -> Result<Option<M>, DiskError> {
    bytes.map(|bytes| M::decode(bytes.as_slice()).map_err(|error| bad(what, &error))).transpose()
}

fn bad(what: &str, why: &dyn std::fmt::Display) -> DiskError {
    DiskError::Value { what: what.to_owned(), why: why.to_string() }
}

fn unwritable(error: &postcard::Error) -> DiskError {
    bad("the owner's name", error)
}

/// Makes a panic an error like any other: a damaged page can make redb panic wherever it reads one,
/// and the thread that owns the state must outlive that. A database that has panicked is given up.
fn guarded<T>(work: impl FnOnce() -> Result<T, DiskError>) -> Result<T, DiskError> {
    hush();
    GUARDED.set(true);
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    GUARDED.set(false);
    done.unwrap_or_else(|panic| Err(DiskError::Damaged(message_of(&*panic))))
}

thread_local! {
    /// Whether this thread is inside of `guarded`: what panics there is told as an error.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whoever reads the error needs no stack of redb's before it. Other panics are told as before.
fn hush() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| match GUARDED.get() {
            true => tracing::debug!("inside the file of the log: {panic}"),
            false => tell(panic),
        }));
    });
}

pub(super) fn message_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}
