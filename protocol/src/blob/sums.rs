//! ● Whether a whole file is the one that its origin means: the one check that a lie on which workers
//! agree does not pass.
//!
//! It is made of every file whose chunks are all here, hashed by this process. That it was made goes on
//! record with what it was made of, the hashes of all chunks: so it is made once, and again where any of
//! them is another, whatever broke off in between.

use std::collections::BTreeSet;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::chunks::ChunkId;
use super::error::BlobError;
use super::fill::{Alone, Entry, Filling, Model, Peers};
use super::origin::{Checksum, hex};
use crate::id::NodeId;

const WHY: &str = "the whole file's SHA-256 is not the one that its origin says";

impl Model {
    /// Checks the files that are whole. One that is another is fetched again, from the origin alone;
    /// `own` names those of which nothing was here before this.
    pub fn check_sums(
        &self,
        wanted: &BTreeSet<ChunkId>,
        own: &[bool],
        peers: &dyn Peers,
        filling: &Filling<'_>,
    ) -> Result<(), BlobError> {
        // Whoever waits for it sees that it goes on: a large file takes longer than anybody is patient.
        let mut done = self.bytes_of(wanted);
        for (number, entry) in self.files.iter().enumerate() {
            if self.is_meant(number, &mut done, filling)? {
                continue;
            }
            let givers = self.take_givers(number);
            entry.here.forget()?;
            if givers.is_empty() && own[number] {
                // The origin has just sent all of it.
                return Err(self.damaged(&entry.remote.name, WHY));
            }
            tracing::warn!("{}: {WHY}; {givers:?} gave parts of it", entry.remote.name);
            givers.iter().for_each(|node| peers.avoid(*node, WHY));
            // All of it, whoever wanted which part: what lies there now may be anybody's.
            let chunks = 0..self.cut.count(entry.here.len());
            let again = chunks.map(|index| ChunkId { file: number as u32, index });
            let again = again.chain(wanted.iter().copied()).collect();
            self.fetch(&again, &Alone, filling)?;
            if !self.is_meant(number, &mut done, filling)? {
                entry.here.forget()?;
                return Err(self.damaged(&entry.remote.name, WHY));
            }
        }
        Ok(())
    }

    /// False where it is another file than its origin means; true too where that cannot be said, because
    /// not all of it is here or the origin says nothing.
    fn is_meant(
        &self,
        number: usize,
        done: &mut u64,
        filling: &Filling<'_>,
    ) -> Result<bool, BlobError> {
        let Entry { remote, here, .. } = &self.files[number];
        let Some(Checksum::Sha256(expected)) = &remote.checksum else { return Ok(true) };
        let Some(whole) = here.whole() else { return Ok(true) };
        if here.proven() == Some(whole) {
            return Ok(true);
        }
        let total = *done + here.len();
        let mut context = ring::digest::Context::new(&ring::digest::SHA256);
        for index in 0..self.cut.count(here.len()) {
            if filling.cancel.load(Ordering::Relaxed) {
                return Err(BlobError::Cancelled);
            }
            let chunk = here.read(index)?;
            context.update(&chunk);
            *done += chunk.len() as u64;
            (filling.on_progress)(*done, total);
        }
        let is_meant = hex(context.finish().as_ref()) == *expected;
        if is_meant {
            here.prove(whole)?;
            self.take_givers(number);
        }
        Ok(is_meant)
    }

    /// Who has given chunks of a file to this process.
    fn take_givers(&self, number: usize) -> BTreeSet<NodeId> {
        let mut givers = self.givers.lock().unwrap_or_else(PoisonError::into_inner);
        let of = givers.extract_if(.., |(file, _)| *file as usize == number);
        of.map(|(_, node)| node).collect()
    }
}
