//! The crate's log lines, on their way to ours.

use slog::{Drain, Level, Logger, Never, OwnedKVList, Record, o};

/// A logger for voter `id`.
pub(super) fn logger(id: u64) -> Logger {
    Logger::root(Bridge { id }, o!())
}

struct Bridge {
    id: u64,
}

impl Drain for Bridge {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, _values: &OwnedKVList) -> Result<(), Never> {
        let (voter, text) = (self.id, record.msg());
        match record.level() {
            Level::Critical | Level::Error => tracing::error!(voter, "raft: {text}"),
            Level::Warning => tracing::warn!(voter, "raft: {text}"),
            // Each election and each member that is added is a handful of lines.
            Level::Info => tracing::debug!(voter, "raft: {text}"),
            Level::Debug | Level::Trace => tracing::trace!(voter, "raft: {text}"),
        }
        Ok(())
    }
}
