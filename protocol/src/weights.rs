//! Who has which chunks of which model: what workers say of that, and what they ask each other for
//! (`shoal-blob`).
//!
//! A chunk counts by its BLAKE3 hash. Who fetched it from an origin says its hash to the coordinators, and
//! they pass it on; a worker takes a chunk from another only where a hash is known that a coordinator has
//! passed on, and compares. So no worker is believed about its own bytes.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The longest message of `shoal-blob`: a question, or what comes before a chunk.
pub const ASK_LEN_MAX: usize = 256;

/// The most chunks that one message names: 160 KiB of them.
pub const NAMED_MAX: usize = 4096;

/// The most ranges of wanted chunks that a message names: as many as a model has files, and a few.
pub const RANGES_MAX: usize = 8192;

/// A BLAKE3 hash of a chunk.
pub type ChunkHash = [u8; 32];

/// A pinned model, by the hash of how it is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ModelKey(pub [u8; 32]);

/// A chunk of a model: the place of its file among the model's files, and its own place there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkId {
    /// Weights files are numbered in the order of their names.
    pub file: u32,
    /// From the file's beginning.
    pub index: u32,
}

/// What a worker says of the chunks of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlobNews {
    /// It wants these, and to hear of others who have or want them.
    Wants {
        /// Of which model.
        key: ModelKey,
        /// By file; at most `RANGES_MAX`.
        chunks: Vec<(u32, Range<u32>)>,
    },
    /// It has these, and gives them to others.
    Has {
        /// Of which model.
        key: ModelKey,
        /// At most `NAMED_MAX`.
        chunks: Vec<(ChunkId, ChunkHash)>,
    },
    /// It is not there any more: said by coordinators alone.
    Gone {
        /// Of which model.
        key: ModelKey,
    },
}

impl BlobNews {
    /// Which model it is about.
    pub fn key(&self) -> ModelKey {
        match self {
            BlobNews::Wants { key, .. } | BlobNews::Has { key, .. } | BlobNews::Gone { key } => {
                *key
            }
        }
    }

    /// Whether it is within its bounds.
    pub fn is_bounded(&self) -> bool {
        match self {
            BlobNews::Wants { chunks, .. } => chunks.len() <= RANGES_MAX,
            BlobNews::Has { chunks, .. } => chunks.len() <= NAMED_MAX,
            BlobNews::Gone { .. } => true,
        }
    }
}

/// One worker asks another for a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkAsk {
    /// Of which model.
    pub key: ModelKey,
    /// Which.
    pub chunk: ChunkId,
}

/// The answer; the bytes follow in a frame of their own where it has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChunkReply {
    /// So many bytes follow.
    Here {
        /// How many.
        len: u32,
    },
    /// It has no such chunk, or no such chunk any more.
    NotHere,
}
