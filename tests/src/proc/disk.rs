//! A small disk under a node's data folder, which can be filled.
//!
//! | where | how | what a write says |
//! |---|---|---|
//! | mounting is allowed (root) | a tmpfs of a few MiB, filled by a file | ENOSPC |
//! | elsewhere | `RLIMIT_FSIZE` 0 of the running process, with SIGXFSZ ignored | EFBIG |
//!
//! The second one is no full disk, only the nearest that needs no privilege: who uses it says so.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Bytes of a disk: the state of a small cluster and its log take two or three MiB.
const SIZE: &str = "24m";

/// What is written at once, until it does not fit.
const PIECE: usize = 64 << 10;

/// A folder whose disk can be filled.
#[derive(Debug)]
pub struct Disk {
    folder: PathBuf,
    mounted: bool,
}

/// How disks are filled here, in words for a report.
pub fn means(disks: &[&Disk]) -> &'static str {
    if disks.iter().all(|disk| disk.mounted) {
        "tmpfs of 24 MiB, filled: ENOSPC"
    } else {
        "RLIMIT_FSIZE of 0, since nothing may be mounted here: EFBIG, not ENOSPC"
    }
}

impl Disk {
    /// Makes the folder, on a disk of its own where that is allowed.
    pub fn under(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={SIZE},mode=700"), "shoal-faults"])
            .arg(folder)
            .stderr(Stdio::null())
            .status();
        let mounted = mount.is_ok_and(|status| status.success());
        if !mounted {
            eprintln!(
                "{}: no disk of its own can be mounted; a write limit stands in",
                folder.display()
            );
        }
        Ok(Self { folder: folder.to_owned(), mounted })
    }

    fn filler(&self) -> PathBuf {
        self.folder.join("filler")
    }

    /// No byte more fits. `pid`: whose writes fail where this is no disk of its own.
    pub fn fill(&self, pid: Option<u32>) -> Result<()> {
        if !self.mounted {
            return pid.map_or(Ok(()), |pid| limit(pid, "0"));
        }
        let mut file = std::fs::File::create(self.filler())?;
        let mut piece = PIECE;
        while piece > 0 {
            match file.write(&vec![0; piece]) {
                Ok(written) if written > 0 => {}
                _ => piece /= 2,
            }
        }
        Ok(())
    }

    /// There is room again.
    pub fn free(&self, pid: Option<u32>) -> Result<()> {
        if !self.mounted {
            return pid.map_or(Ok(()), |pid| limit(pid, "unlimited"));
        }
        match std::fs::remove_file(self.filler()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Whether it is a disk of its own.
    pub fn is_mounted(&self) -> bool {
        self.mounted
    }
}

/// The soft limit of a running process; `prlimit` is part of util-linux.
fn limit(pid: u32, bytes: &str) -> Result<()> {
    let status = Command::new("prlimit")
        .args(["--pid", &pid.to_string(), &format!("--fsize={bytes}:")])
        .status()
        .context("prlimit")?;
    if !status.success() {
        bail!("prlimit of {pid}: {status}");
    }
    Ok(())
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.mounted {
            // Lazily: a process that is being killed may still hold it.
            let _ = Command::new("umount").arg("--lazy").arg(&self.folder).status();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_takes_no_byte_until_it_is_freed() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::under(&folder.path().join("data")).unwrap();
        if !disk.is_mounted() {
            return eprintln!("skipped: nothing may be mounted here");
        }
        disk.fill(None).unwrap();
        let file = folder.path().join("data/x");
        let error = std::fs::write(&file, b"x").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        disk.free(None).unwrap();
        std::fs::write(&file, b"x").unwrap();
    }
}
