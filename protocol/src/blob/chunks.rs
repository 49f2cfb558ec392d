//! ○ Chunks of a file: which ones a range of bytes touches, and what can be asked for at once.

use std::collections::BTreeSet;
use std::ops::Range;

pub use crate::weights::ChunkId;

/// The length of a chunk. It is what travels, what is hashed and what is on record as one thing: small
/// enough that the slice of a tensor rank is not rounded up by much, large enough that the hashes of a
/// terabyte are 8 MiB.
pub const CHUNK: u64 = 4 << 20;

/// What is asked of an origin at once: long enough that a request's round trip hardly shows, short enough
/// that the few that are held in memory do not show beside the weights.
pub const RUN: u64 = 16 << 20;

/// How the files of a model are cut. Everybody cuts in the same way; tests cut small files smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Bytes of a chunk, the last one of a file aside.
    pub chunk: u64,
    /// The most bytes of one request.
    pub run: u64,
}

impl Default for Cut {
    fn default() -> Self {
        Self { chunk: CHUNK, run: RUN }
    }
}

impl Cut {
    /// The bytes of a chunk of a file of this length; empty behind its end.
    pub fn bytes(self, index: u32, file_len: u64) -> Range<u64> {
        let first = (u64::from(index) * self.chunk).min(file_len);
        first..(first + self.chunk).min(file_len)
    }

    /// How many chunks a file of this length has.
    pub fn count(self, file_len: u64) -> u32 {
        u32::try_from(file_len.div_ceil(self.chunk)).unwrap_or(u32::MAX)
    }

    /// The chunks that a range of bytes touches.
    pub fn touched(self, bytes: &Range<u64>) -> Range<u32> {
        if bytes.is_empty() {
            return 0..0;
        }
        let number = |chunk: u64| u32::try_from(chunk).unwrap_or(u32::MAX);
        number(bytes.start / self.chunk)..number(bytes.end.div_ceil(self.chunk))
    }

    /// The longest run of neighbours from the first of these on, within the bound of a request.
    pub fn run(self, first: ChunkId, missing: &BTreeSet<ChunkId>) -> Vec<ChunkId> {
        let most = (self.run / self.chunk).max(1) as usize;
        let mut run = vec![first];
        while run.len() < most {
            let next = ChunkId { file: first.file, index: first.index + run.len() as u32 };
            if !missing.contains(&next) {
                break;
            }
            run.push(next);
        }
        run
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CUT: Cut = Cut { chunk: 10, run: 30 };

    #[test]
    fn a_range_touches_every_chunk_that_has_a_byte_of_it() {
        for (bytes, expected) in [
            (0..1, 0..1),
            (0..10, 0..1),
            (9..11, 0..2),
            (10..20, 1..2),
            (5..5, 0..0),
            (19..41, 1..5),
        ] {
            assert_eq!(CUT.touched(&bytes), expected, "{bytes:?}");
        }
    }

    #[test]
    fn the_last_chunk_ends_with_its_file() {
        assert_eq!(CUT.bytes(2, 25), 20..25);
        assert_eq!(CUT.bytes(3, 25), 25..25);
        assert_eq!((CUT.count(25), CUT.count(20), CUT.count(0)), (3, 2, 0));
    }

    #[test]
    fn a_run_ends_at_a_gap_at_the_bound_and_with_its_file() {
        let at = |index| ChunkId { file: 0, index };
        let missing: BTreeSet<_> = [0, 1, 3, 4, 5, 6].map(at).into();
        assert_eq!(CUT.run(at(0), &missing), [at(0), at(1)]);
        assert_eq!(CUT.run(at(3), &missing), [at(3), at(4), at(5)]);
        assert_eq!(CUT.run(at(6), &missing), [at(6)]);
    }
}
