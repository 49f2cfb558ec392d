//! Where an `up` keeps identities, state and logs.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::registry::{SCRATCH_PREFIX, remove_scratch};

/// A data folder that no other `up` uses. A scratch folder is removed when this is dropped.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    scratch: bool,
    /// Held for its lock.
    _lock: File,
}

impl Folder {
    /// The given folder, or a fresh one under the system's folder for temporary files.
    pub fn prepare(kept: Option<&Path>, started_ms: u64) -> Result<Self, Failure> {
        let path = match kept {
            Some(path) => std::path::absolute(path)
                .map_err(|error| Failure::failed(format!("{}: {error}", path.display())))?,
            None => std::env::temp_dir()
                .join(format!("{SCRATCH_PREFIX}{}-{started_ms}", std::process::id())),
        };
        let failed = |error: std::io::Error| {
            Failure::failed(format!("cannot use the data folder {}: {error}", path.display()))
        };
        // Keys lie in it.
        DirBuilder::new().recursive(kept.is_some()).mode(0o700).create(&path).map_err(failed)?;
        fs::create_dir_all(path.join("logs")).map_err(failed)?;
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path.join("up.lock"))
            .map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path, scratch: kept.is_none(), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(Failure::failed(format!(
                "another `shoal up` uses the data folder {}; stop it or name another with --data",
                path.display()
            ))),
            Err(TryLockError::Error(error)) => Err(failed(error)),
        }
    }

    /// The folder, where it will be removed at the end.
    pub fn scratch(&self) -> Option<&Path> {
        self.scratch.then_some(self.path.as_path())
    }

    /// The data folder of a child.
    pub fn data(&self, child: &str) -> PathBuf {
        self.path.join(child)
    }

    /// The log of a child.
    pub fn log(&self, child: &str) -> PathBuf {
        self.logs().join(format!("{child}.log"))
    }

    /// The folder of the logs.
    pub fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.scratch {
            remove_scratch(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_folder_goes_and_a_given_one_stays() {
        let fresh = Folder::prepare(None, 1).unwrap();
        let path = fresh.scratch().unwrap().to_owned();
        assert!(path.is_dir());
        drop(fresh);
        assert!(!path.exists());

        let given = tempfile::tempdir().unwrap();
        let path = given.path().join("a/b");
        let kept = Folder::prepare(Some(&path), 1).unwrap();
        assert_eq!(kept.scratch(), None);
        let refused = Folder::prepare(Some(&path), 2).unwrap_err();
        assert!(refused.message.contains("another `shoal up`"), "{refused}");
        drop(kept);
        assert!(path.join("logs").is_dir());
        Folder::prepare(Some(&path), 3).unwrap();
    }
}
