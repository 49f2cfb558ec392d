//! Where an `up` keeps identities, state and logs.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::failure::Failure;
use crate::registry::{SCRATCH_PREFIX, remove_scratch};
use crate::run::lock::{FolderLock, NODE_LOCK};

/// A data folder that no other `up` uses, nor what is left of one. A scratch folder is removed when
/// this is dropped.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    scratch: bool,
    _lock: FolderLock,
}

impl Folder {
    /// The given folder, or a fresh one under the system's folder for temporary files. Waits a while
    /// for an `up` that ends, and for the children of one that was killed.
    pub async fn prepare(
        kept: Option<&Path>,
        started_ms: u64,
        patience: Duration,
    ) -> Result<Self, Failure> {
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
        let lock = FolderLock::take(&path, "up.lock", patience).await?;
        for child in fs::read_dir(&path).map_err(failed)? {
            let child = child.map_err(failed)?.path();
            if child.join(NODE_LOCK).exists() {
                // Taken and given back: it is the new child's.
                FolderLock::take(&child, NODE_LOCK, patience).await?;
            }
        }
        fs::create_dir_all(path.join("logs")).map_err(failed)?;
        Ok(Self { path, scratch: kept.is_none(), _lock: lock })
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

    #[tokio::test]
    async fn a_fresh_folder_goes_and_a_given_one_stays() {
        let fresh = Folder::prepare(None, 1, Duration::ZERO).await.unwrap();
        let path = fresh.scratch().unwrap().to_owned();
        assert!(path.is_dir());
        drop(fresh);
        assert!(!path.exists());

        let given = tempfile::tempdir().unwrap();
        let path = given.path().join("a/b");
        let prepare = |ms| Folder::prepare(Some(&path), 1, Duration::from_millis(ms));
        let kept = prepare(0).await.unwrap();
        assert_eq!(kept.scratch(), None);
        let refused = prepare(0).await.unwrap_err();
        assert!(refused.message.contains("stop it"), "{refused}");
        drop(kept);
        assert!(path.join("logs").is_dir());

        // A child of a killed `up` that has not ended yet.
        let child = FolderLock::of_node(&path.join("worker-1")).await.unwrap();
        let refused = prepare(1000).await.unwrap_err();
        assert!(refused.message.contains("worker-1"), "{refused}");
        drop(child);
        prepare(10_000).await.unwrap();
    }
}
