//! The `shoal up`s that run on this machine, so that operator verbs find the newest by themselves.
//!
//! Each writes one small file and holds a lock on it for as long as it lives. The system lets go of
//! a lock when its holder dies in whatever way, so an entry that can be locked is a dead one's: a
//! process number that was given anew cannot be mistaken for it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What an `up` tells others of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its process.
    pub pid: u32,
    /// When it started: milliseconds since 1970.
    pub started_ms: u64,
    /// Its context file.
    pub context: PathBuf,
    /// Its data folder, where that is to be removed at its end.
    pub scratch: Option<PathBuf>,
}

/// The folder with one file per running `up`.
#[derive(Clone, Debug)]
pub struct Registry {
    folder: PathBuf,
}

/// An entry that stands for as long as this value lives.
#[derive(Debug)]
pub struct Registration {
    path: PathBuf,
    /// Held for its lock.
    _file: File,
}

impl Registry {
    /// That of this user: `$XDG_RUNTIME_DIR/shoal/ups`, else `$XDG_STATE_HOME/shoal/ups`, else
    /// `~/.local/state/shoal/ups`; `None` where not even a home is known.
    pub fn of_user() -> Option<Self> {
        let from = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let base = from("XDG_RUNTIME_DIR")
            .or_else(|| from("XDG_STATE_HOME"))
            .or_else(|| from("HOME").map(|home| home.join(".local/state")))?;
        Some(Self::at(base.join("shoal/ups")))
    }

    /// The registry in a folder.
    pub fn at(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Adds an entry. It is locked before it gets the name under which others look.
    pub fn register(&self, entry: &Entry) -> io::Result<Registration> {
        fs::create_dir_all(&self.folder)?;
        let path = self.folder.join(format!("{}.json", entry.pid));
        let scratch = self.folder.join(format!(".{}.scratch", entry.pid));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&scratch)?;
        file.lock()?;
        file.write_all(&serde_json::to_vec(entry)?)?;
        fs::rename(&scratch, &path)?;
        Ok(Registration { path, _file: file })
    }

    /// All that run, newest first. Entries of dead ones are removed, and the folders that they could
    /// not remove themselves with them.
    pub fn running(&self) -> Vec<Entry> {
        let Ok(files) = fs::read_dir(&self.folder) else { return Vec::new() };
        let paths = files.filter_map(|file| file.ok().map(|file| file.path()));
        let mut entries: Vec<Entry> = paths
            .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
            .filter_map(|path| running_entry(&path))
            .collect();
        entries.sort_by_key(|entry| std::cmp::Reverse((entry.started_ms, entry.pid)));
        entries
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // Somebody who found it unlocked a moment ago may have removed it already.
        let _ = fs::remove_file(&self.path);
    }
}

fn running_entry(path: &Path) -> Option<Entry> {
    let mut file = File::open(path).ok()?;
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    let entry: Option<Entry> = serde_json::from_str(&text).ok();
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => entry,
        // Locks do not work there: better a dead one too many than a live one missed.
        Err(TryLockError::Error(_)) => entry,
        Ok(()) => {
            if let Some(scratch) = entry.and_then(|entry| entry.scratch) {
                remove_scratch(&scratch);
            }
            let _ = fs::remove_file(path);
            None
        }
    }
}

/// What the name of a scratch folder begins with; nothing else is ever removed.
pub const SCRATCH_PREFIX: &str = "shoal-up-";

/// Removes a data folder that `up` made for itself.
pub fn remove_scratch(folder: &Path) {
    let ours = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with(SCRATCH_PREFIX);
    if folder.file_name().is_some_and(ours) {
        // Whoever removes it first is right.
        let _ = fs::remove_dir_all(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(pid: u32, started_ms: u64) -> Entry {
        let context = PathBuf::from(format!("/data/{pid}/admin.context"));
        Entry { pid, started_ms, context, scratch: None }
    }

    #[test]
    fn the_newest_that_runs_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        let registry = Registry::at(folder.path().join("ups"));
        assert_eq!(registry.running(), []);
        let _old = registry.register(&entry(7, 100)).unwrap();
        let new = registry.register(&entry(3, 200)).unwrap();
        assert_eq!(registry.running(), [entry(3, 200), entry(7, 100)]);
        drop(new);
        assert_eq!(registry.running(), [entry(7, 100)]);
    }

    #[test]
    fn a_dead_ones_entry_and_folder_go() {
        let folder = tempfile::tempdir().unwrap();
        let registry = Registry::at(folder.path().to_owned());
        let scratch = folder.path().join("shoal-up-x");
        let precious = folder.path().join("precious");
        for made in [&scratch, &precious] {
            fs::create_dir(made).unwrap();
        }
        for (pid, made) in [(1, &scratch), (2, &precious)] {
            // Written without a lock, as the file of a killed process is found.
            let dead = Entry { scratch: Some(made.clone()), ..entry(pid, 1) };
            let path = folder.path().join(format!("{pid}.json"));
            fs::write(path, serde_json::to_vec(&dead).unwrap()).unwrap();
        }
        assert_eq!(registry.running(), []);
        assert!(!scratch.exists() && precious.exists());
        assert!(!folder.path().join("1.json").exists());
    }

    #[test]
    fn what_is_no_entry_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("1.json"), b"{").unwrap();
        fs::write(folder.path().join("readme"), b"").unwrap();
        assert_eq!(Registry::at(folder.path().to_owned()).running(), []);
    }
}
