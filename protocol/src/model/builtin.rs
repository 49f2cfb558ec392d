//! Models inside the binary: unpacked into a node's data folder, then read like any other.

use std::io;
use std::path::{Path, PathBuf};

/// A model folder as bytes.
#[derive(Clone, Copy, Debug)]
pub struct BuiltinModel {
    /// What it is called: `demo`.
    pub name: &'static str,
    /// Its files by name.
    pub files: &'static [(&'static str, &'static [u8])],
}

impl BuiltinModel {
    /// Writes the files under `data/models/<name>-<content hash>/` where they are not there yet, and
    /// returns that folder. A process that dies half-way leaves a folder under another name.
    pub fn unpack(&self, data: &Path) -> io::Result<PathBuf> {
        let mut hasher = blake3::Hasher::new();
        for (name, bytes) in self.files {
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes());
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        }
        let hash = hasher.finalize().to_hex();
        let models = data.join("models");
        let folder = models.join(format!("{}-{}", self.name, &hash[..16]));
        if folder.is_dir() {
            return Ok(folder);
        }
        let scratch = models.join(format!(".{}-{}-{}", self.name, &hash[..16], std::process::id()));
        std::fs::create_dir_all(&scratch)?;
        for (name, bytes) in self.files {
            std::fs::write(scratch.join(name), bytes)?;
        }
        match std::fs::rename(&scratch, &folder) {
            Ok(()) => Ok(folder),
            // Another process was faster; its files are the same.
            Err(_) if folder.is_dir() => {
                std::fs::remove_dir_all(&scratch)?;
                Ok(folder)
            }
            Err(error) => Err(error),
        }
    }
}
