//! ● What has models for everybody: lists their files, and sends parts of them.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::atomic::AtomicBool;

use ring::digest;
use serde::{Deserialize, Serialize};

use super::error::BlobError;

/// What an origin says that a whole file hashes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Checksum {
    /// Of a large file.
    Sha256(String),
    /// Of a small file, as git names it.
    GitBlob(String),
    /// Nothing that we can compute: only its origin can say whether it is the same.
    Etag(String),
}

impl Checksum {
    /// Whether this is that file.
    pub fn holds(&self, bytes: &[u8]) -> bool {
        match self {
            Checksum::Sha256(expected) => {
                hex(digest::digest(&digest::SHA256, bytes).as_ref()) == *expected
            }
            Checksum::Etag(_) => true,
            Checksum::GitBlob(expected) => {
                // Not for security: it is what git has. The commit came over TLS.
                let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {}\0", bytes.len()).as_bytes());
                context.update(bytes);
                hex(context.finish().as_ref()) == *expected
            }
        }
    }
}

/// A file of a model, as its origin describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RemoteFile {
    /// Its path in the model's folder.
    pub name: String,
    pub len: u64,
    /// Where the origin says one.
    pub checksum: Option<Checksum>,
}

/// All files of one revision of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listing {
    /// The revision that names these bytes for ever: a commit, or what stands for one.
    pub commit: String,
    pub files: Vec<RemoteFile>,
}

impl Listing {
    pub fn file(&self, name: &str) -> Option<&RemoteFile> {
        self.files.iter().find(|file| file.name == name)
    }
}

/// One model at an origin.
pub(super) trait Origin: Send + Sync + Debug {
    /// Who it is, for words.
    fn name(&self) -> &str;

    /// What the model consists of, at a revision.
    fn list(&self, revision: &str, cancel: &AtomicBool) -> Result<Listing, BlobError>;

    /// Appends these bytes of a file to `out`: all of them, or an error.
    fn read(
        &self,
        commit: &str,
        file: &RemoteFile,
        bytes: Range<u64>,
        out: &mut Vec<u8>,
        cancel: &AtomicBool,
    ) -> Result<(), BlobError>;
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_known_by_what_git_or_its_store_calls_it() {
        // `printf hello | git hash-object --stdin`, `printf hello | sha256sum`.
        let git = Checksum::GitBlob("b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0".to_owned());
        let sha = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824".to_owned();
        for sum in [git, Checksum::Sha256(sha)] {
            assert!(sum.holds(b"hello"));
            assert!(!sum.holds(b"hullo"));
        }
    }
}
