//! One process for one data folder: a lock that the system lets go of with its holder, however that
//! ends.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::DRAIN_TIMEOUT;
use crate::failure::Failure;

/// The file in a node's data folder.
pub const NODE_LOCK: &str = "node.lock";

/// How long to wait for a holder that is about to end: the children of an `up` that was killed drain
/// first.
pub const PATIENCE: Duration = DRAIN_TIMEOUT.saturating_add(Duration::from_secs(2));

/// A data folder that is used by this process alone, until this is dropped.
#[derive(Debug)]
pub struct FolderLock {
    /// Held for its lock.
    _file: File,
}

impl FolderLock {
    /// Locks a node's data folder, which is made if need be.
    pub async fn of_node(folder: &Path) -> Result<Self, Failure> {
        Self::take(folder, NODE_LOCK, PATIENCE).await
    }

    /// Locks `folder` by the file `name` in it. Where another process holds that, waits for its end,
    /// and says so.
    pub async fn take(folder: &Path, name: &str, patience: Duration) -> Result<Self, Failure> {
        let failed = |error: io::Error| {
            Failure::failed(format!("cannot use the data folder {}: {error}", folder.display()))
        };
        // Keys lie in it.
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        let mut file = open(&folder.join(name)).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::Error(error)) => return Err(failed(error)),
            Err(TryLockError::WouldBlock) => {
                let who = holder(&mut file);
                if patience > Duration::ZERO {
                    eprintln!(
                        "{who} uses the data folder {}; waiting up to {patience:?} for its end",
                        folder.display()
                    );
                }
                file = tokio::time::timeout(patience, locked(file))
                    .await
                    .map_err(|_| in_use(&who, folder))?
                    .map_err(failed)?;
            }
        }
        // For whoever finds it locked. A full disk is no reason not to start.
        let pid = std::process::id();
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{pid}"));
        Ok(Self { _file: file })
    }
}

fn in_use(who: &str, folder: &Path) -> Failure {
    Failure::failed(format!(
        "{who} uses the data folder {}, and only one process may; stop it, or name another folder \
         with --data",
        folder.display()
    ))
}

fn open(path: &PathBuf) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

/// Waits for the lock. The thread that waits ends with the lock's holder, or with this process.
async fn locked(file: File) -> io::Result<File> {
    let locking = tokio::task::spawn_blocking(move || file.lock().map(|()| file));
    locking.await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// Who holds the lock, as far as is written in its file.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.rewind().and_then(|()| file.read_to_string(&mut text));
    // What is written next belongs at the beginning.
    let _ = file.rewind();
    match read.ok().and_then(|_| text.trim().parse::<u32>().ok()) {
        Some(pid) => format!("another process (pid {pid})"),
        None => "another process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_folder_is_for_one_and_free_again_when_that_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("a/b");
        let take = |patience| FolderLock::take(&data, "x.lock", patience);
        let held = take(Duration::ZERO).await.unwrap();
        let refused = take(Duration::from_millis(20)).await.unwrap_err().message;
        let pid = std::process::id().to_string();
        for words in [data.to_str().unwrap(), &pid, "stop it", "--data"] {
            assert!(refused.contains(words), "{words:?} is not in {refused}");
        }
        let waiting = take(Duration::from_secs(10));
        let (taken, ()) = tokio::join!(waiting, async { drop(held) });
        let taken = taken.unwrap();
        assert!(take(Duration::ZERO).await.is_err());
        drop(taken);
        // Those that gave up above may hold it for a moment.
        take(Duration::from_secs(10)).await.unwrap();
    }
}
