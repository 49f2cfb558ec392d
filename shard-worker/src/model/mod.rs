//! What a stage computes: the seam between stages (which know sequences) and layers (which know
//! rows, positions and KV blocks).

pub mod adapters;
mod bounds;
pub mod families;
pub mod layers;
pub mod pretend;
mod weights;

pub use adapters::{AdapterLoadError, AdapterSlices};
pub use families::{LoadError, load_shard};
pub use weights::{LoadOptions, WeightsError};

use shoal_protocol::id::AdapterId;

use crate::collective::{Collective, CollectiveError};

/// Rows of one sequence that are computed in one step: adjacent rows at consecutive positions.
///
/// A decode step has one row; a chunk of a prompt has many.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// The first of its rows in the batch.
    pub first_row: usize,
    /// How many rows.
    pub rows: usize,
    /// The position of the first row in its sequence, counted from 0.
    pub first_position: u32,
    /// The KV blocks of the sequence in order, enough for the last of these rows:
    /// `blocks[p / BLOCK_TOKENS]` holds position `p` in slot `p % BLOCK_TOKENS`.
    pub blocks: &'a [u32],
    /// What is added to its projections; `None`: nothing.
    pub adapter: Option<AdapterId>,
}

/// One step's rows.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The sequences, in row order, without gaps.
    pub spans: &'a [Span<'a>],
    /// Rows in all.
    pub rows: usize,
    /// The rows of which the last stage wants logits, ascending.
    pub sample_rows: &'a [usize],
}

/// What stands in the rows of the last stage's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Logits, from which tokens are drawn.
    Logits,
    /// An encoder's vectors: each is an answer. Such a model takes a whole input in one step, from
    /// position 0 on, and keeps nothing of it.
    Vectors,
}

/// One shard's weights, KV cache and arithmetic.
pub trait ShardModel: Send {
    /// The width of the residual stream.
    fn hidden(&self) -> usize;

    /// The token ids of which this shard computes logits; empty on a stage that has no output head, and
    /// on a rank that has no part of it.
    fn vocab(&self) -> std::ops::Range<usize>;

    /// The longest message of a round of [`Collective`] in a step of this shard; of a draw see
    /// `sample::ranks`.
    fn round_bytes_max(&self) -> usize;

    /// What the rows of `logits` are; the same on all stages.
    fn output(&self) -> Output {
        Output::Logits
    }

    /// Takes the rows through this shard's layers, in place.
    ///
    /// `tokens` has one id per row on the first stage and is `None` on others; `hidden`
    /// (`rows x hidden`, row-major) is written on the first stage and read and overwritten on
    /// others. On the last stage `logits` (`sample_rows.len() x vocab().len()`) is written; `hidden` is
    /// then scratch. K and V of every row are written to the cache before attention reads them.
    ///
    /// The ranks of a stage do the same step at the same time and tell each other through `peers`.
    ///
    /// A row's bits depend on its own sequence alone, never on what else is in the batch or on how
    /// the sequence was cut into steps.
    fn forward(
        &mut self,
        batch: &Batch<'_>,
        tokens: Option<&[u32]>,
        hidden: &mut [f32],
        logits: Option<&mut [f32]>,
        peers: &mut dyn Collective,
    ) -> Result<(), ComputeError>;

    /// Takes an adapter, so that spans can name it. Allocates.
    fn load_adapter(
        &mut self,
        _id: AdapterId,
        _slices: &AdapterSlices,
    ) -> Result<(), AdapterLoadError> {
        Err(AdapterLoadError::NoProjections("a pretend model"))
    }

    /// Forgets an adapter; whether it was there. No span may name it any more.
    fn unload_adapter(&mut self, _id: AdapterId) -> bool {
        false
    }
}

/// A step that could not be computed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ComputeError {
    /// A batch that does not fit this shard; the stage checks before, so this is a bug.
    #[error("a batch that does not fit the shard: {0}")]
    BadBatch(String),
    /// Another rank of the stage is gone, or of another plan.
    #[error(transparent)]
    Peers(#[from] CollectiveError),
    /// The device failed.
    #[error("the device failed: {0}")]
    Device(String),
}
