//! The seam between layers and devices: layers are written once against [`Ops`].
//!
//! ```text
//! loader ─► Ops::weight_builders ─► pack_rows (any thread, any order) ─► finish ─► Weight
//! step:    caller's &mut [f32] ─► enter ─► Stream ─► layers: Stream ⇄ Buf, Weight, Vector, Kv ─► leave
//! ```
//!
//! A device brings its own memory: weights, vectors, scratch buffers and KV caches are associated
//! types that only the device looks into. On the CPU the residual stream *is* the caller's slice
//! (the buffer that the frame was received into) and is changed in place; a device with memory of
//! its own copies it in at [`Ops::enter`] and out at [`Ops::leave`].
//!
//! Everything is allocated at construction. A step allocates nothing.
//!
//! All results follow a numerics contract (`docs/decisions/001-numerics-contract-n1.md`, `032-numerics-contract-n2.md`):
//! a row's bits depend on its own sequence alone.

pub mod cpu;
pub mod cpus;
mod encode;
mod family;
#[cfg(feature = "cuda")]
pub mod nccl;
pub mod pool;

use shoal_protocol::model::Activation;
use shoal_protocol::plan::{Activations, KvPrecision, Precision};

pub use encode::{EncodeOps, Pool};
pub use family::{FamilyOps, HeadColumns, Router};

use crate::model::{ComputeError, Span};

/// What a device can do with rows of `f32`.
///
/// Rows are row-major: `rows x width`. All operations take the number of rows that are in use; a
/// buffer may have room for more. Shapes that do not fit are [`ComputeError::BadBatch`].
pub trait Ops: Send + Sized + 'static {
    /// A matrix `[outputs, cols]`, packed for the device.
    type Weight: Send + Sync;
    /// Fills a [`Ops::Weight`] piece by piece.
    type WeightBuilder: WeightBuilder<Weight = Self::Weight>;
    /// A few `f32` values: a bias, the weight of a norm, rotary frequencies.
    type Vector: Send + Sync;
    /// Scratch: `rows_max x width` of `f32`.
    type Buf: Send;
    /// The keys and values of one layer: blocks of `BLOCK_TOKENS` positions.
    type Kv: Send;
    /// The residual stream of the step: `rows x width`.
    type Stream<'a>;

    // --- Construction: may allocate.

    /// Memory for matrices of `(outputs, cols)` that are held as `held`, in this order. A shard asks
    /// for all of its matrices at once, so that a device can put them into one piece of memory.
    fn weight_builders(
        &self,
        held: Precision,
        shapes: &[(usize, usize)],
    ) -> Result<Vec<Self::WeightBuilder>, BackendError>;

    /// Copies a vector to the device.
    fn vector(&self, values: &[f32]) -> Result<Self::Vector, BackendError>;

    /// Scratch of `rows_max x width`; also makes the device's own scratch large enough for a
    /// product with it.
    fn buffer(&mut self, rows_max: usize, width: usize) -> Result<Self::Buf, BackendError>;

    /// How caches that are made from now on hold keys and values; f32 where nobody says so.
    fn hold_kv(&mut self, held: KvPrecision) -> Result<(), BackendError> {
        match held {
            KvPrecision::F32 => Ok(()),
            other => Err(BackendError::BadShape {
                what: "KV cache",
                why: format!("this device holds keys and values as f32, not as {other}"),
            }),
        }
    }

    /// What rows are from now on in products with weights in blocks of whole numbers; f32 where nobody says so.
    fn multiply(&mut self, activations: Activations) -> Result<(), BackendError> {
        match activations {
            Activations::F32 => Ok(()),
            Activations::Int8 => Err(BackendError::BadShape {
                what: "activations",
                why: format!("this device multiplies values of f32, not of {activations}"),
            }),
        }
    }

    /// The KV cache of one layer. Blocks that were never written cost no memory where the device
    /// can help it.
    fn kv(&mut self, shape: KvShape) -> Result<Self::Kv, BackendError>;

    // --- A step: allocates nothing.

    /// The first `rows` rows of a buffer, `rows x width`, in the host's memory, to be read and changed:
    /// what tensor ranks tell each other. A device with memory of its own has a collective of its own.
    fn host<'a>(
        &mut self,
        buf: &'a mut Self::Buf,
        rows: usize,
    ) -> Result<&'a mut [f32], ComputeError>;

    /// The same of the residual stream.
    fn host_stream<'a>(&mut self, stream: &'a mut Self::Stream<'_>) -> &'a mut [f32];

    /// Binds the caller's residual stream, `rows x width`, for a step.
    fn enter<'a>(
        &mut self,
        hidden: &'a mut [f32],
        width: usize,
    ) -> Result<Self::Stream<'a>, ComputeError>;

    /// Makes the caller's slice hold the stream.
    fn leave(&mut self, stream: Self::Stream<'_>) -> Result<(), ComputeError>;

    /// `out[r] = table[tokens[r]]`, exactly as held. An id beyond the table is refused.
    fn embed(
        &mut self,
        tokens: &[u32],
        table: &Self::Weight,
        out: &mut Self::Stream<'_>,
    ) -> Result<(), ComputeError>;

    /// `out[i] = norm(x[row i of rows])`.
    fn rms_norm(
        &mut self,
        x: &Self::Stream<'_>,
        rows: RowSet<'_>,
        norm: &Norm<Self>,
        out: &mut Self::Buf,
    ) -> Result<(), ComputeError>;

    /// Normalises each head (as wide as the norm's weight) of each row, in place.
    fn head_norm(
        &mut self,
        x: &mut Self::Buf,
        rows: usize,
        norm: &Norm<Self>,
    ) -> Result<(), ComputeError>;

    /// `out[r] = weight · x[r] + bias`; `out`'s width is the weight's outputs.
    fn linear(
        &mut self,
        x: &Self::Buf,
        rows: usize,
        linear: &Linear<Self>,
        out: &mut Self::Buf,
    ) -> Result<(), ComputeError>;

    /// `out[r] = weight · x[r]` into the caller's memory, `rows x outputs`.
    fn logits(
        &mut self,
        x: &Self::Buf,
        rows: usize,
        weight: &Self::Weight,
        out: &mut [f32],
    ) -> Result<(), ComputeError>;

    /// `out[r] += x[r]`.
    fn add(
        &mut self,
        x: &Self::Buf,
        rows: usize,
        out: &mut Self::Stream<'_>,
    ) -> Result<(), ComputeError>;

    /// `gate[r] = act(gate[r]) * up[r]`.
    fn gate(
        &mut self,
        gate: &mut Self::Buf,
        up: &Self::Buf,
        rows: usize,
        act: Activation,
    ) -> Result<(), ComputeError>;

    /// The cosines, then the sines, of each row's angles, times `factor`: `out` is
    /// `rows x (2 x frequencies)`. An angle is the `f32` product of position and frequency.
    fn rope_angles(
        &mut self,
        spans: &[Span<'_>],
        frequencies: &Self::Vector,
        factor: f32,
        out: &mut Self::Buf,
    ) -> Result<(), ComputeError>;

    /// Rotates a part of each head of each row in place: as many dimensions as `angles` is wide.
    fn rope(
        &mut self,
        x: &mut Self::Buf,
        rows: usize,
        angles: &Self::Buf,
        turn: Turn,
    ) -> Result<(), ComputeError>;

    /// Writes the rows' keys and values, `rows x (kv_heads x head_dim)` each, at their positions.
    fn kv_write(
        &mut self,
        spans: &[Span<'_>],
        keys: &Self::Buf,
        values: &Self::Buf,
        kv: &mut Self::Kv,
    ) -> Result<(), ComputeError>;

    /// Attention of each row over its sequence's cache: up to its own position and so many ahead of it as
    /// `how` says; those are in the cache where their rows are of the same span. `query`
    /// and `out` are `rows x (heads x head_dim)`; `heads` is a multiple of the cache's `kv_heads`.
    fn attend(
        &mut self,
        spans: &[Span<'_>],
        query: &Self::Buf,
        kv: &Self::Kv,
        how: &Attend<'_, Self>,
        out: &mut Self::Buf,
    ) -> Result<(), ComputeError>;
}

/// Which part of each head is rotated, and what pairs with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// The width of a head.
    pub head_dim: usize,
    /// The first dimension that is rotated.
    pub first: usize,
    /// Whether adjacent dimensions are pairs; else dimension `i` of those rotated pairs with the one
    /// half their number further on.
    pub interleaved: bool,
}

impl Turn {
    /// Whole heads, the first half against the second.
    pub fn whole(head_dim: usize) -> Self {
        Self { head_dim, first: 0, interleaved: false }
    }
}

/// How scores become weights.
pub struct Attend<'a, B: Ops> {
    /// Multiplies each score.
    pub scale: f32,
    /// Scores are `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// How many positions a query sees, its own included.
    pub window: Option<u32>,
    /// How many positions behind its own it sees: 0 in decoders.
    pub ahead: u32,
    /// A score for each head that takes part in the softmax and adds nothing.
    pub sinks: Option<&'a B::Vector>,
}

impl<B: Ops> Attend<'_, B> {
    /// Plain attention.
    pub fn plain(scale: f32) -> Self {
        Self { scale, softcap: None, window: None, ahead: 0, sinks: None }
    }
}

/// Fills a matrix while its bytes arrive, without a second copy of it.
///
/// Several threads may pack different rows at once.
pub trait WeightBuilder: Send + Sync {
    /// What it becomes.
    type Weight;

    /// Packs whole rows, from `first_row` on, out of little-endian values of type `stored`; how
    /// many follows from the length of `bytes`. Values are rounded to nearest even where the held
    /// type is narrower. Each row can be packed once.
    fn pack_rows(
        &self,
        first_row: usize,
        stored: Precision,
        bytes: &[u8],
    ) -> Result<(), BackendError>;

    /// The matrix; refused unless every row was packed.
    fn finish(self) -> Result<Self::Weight, BackendError>;
}

/// A projection: a matrix and perhaps a bias.
pub struct Linear<B: Ops> {
    /// `[outputs, cols]`.
    pub weight: B::Weight,
    /// `[outputs]`.
    pub bias: Option<B::Vector>,
}

/// A norm: `x / sqrt(mean(x²) + eps) * weight`; or, of what is centred, with the mean taken from `x`
/// first and a bias added last.
pub struct Norm<B: Ops> {
    /// As wide as what it normalises.
    pub weight: B::Vector,
    /// Added to the mean square.
    pub eps: f32,
    /// Whether it is a layer norm: rows are centred first.
    pub centred: bool,
    /// Added at the end.
    pub bias: Option<B::Vector>,
}

impl<B: Ops> Norm<B> {
    /// A root-mean-square norm.
    pub fn rms(weight: B::Vector, eps: f32) -> Self {
        Self { weight, eps, centred: false, bias: None }
    }
}

/// Which rows of a stream.
#[derive(Clone, Copy, Debug)]
pub enum RowSet<'a> {
    /// The first so many.
    First(usize),
    /// These, in this order.
    Of(&'a [usize]),
}

impl RowSet<'_> {
    /// How many rows.
    pub fn len(&self) -> usize {
        match self {
            RowSet::First(rows) => *rows,
            RowSet::Of(rows) => rows.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The index in the stream of row `i` of the set; `i` is below `len`.
    pub fn index(&self, i: usize) -> usize {
        match self {
            RowSet::First(_) => i,
            RowSet::Of(rows) => rows[i],
        }
    }
}

/// The shape of one layer's KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Blocks of `BLOCK_TOKENS` positions.
    pub blocks: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// The width of a head.
    pub head_dim: u32,
}

/// Something that a device could not be built with.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BackendError {
    /// The system gave no memory.
    #[error("no memory for {bytes} bytes of {what}: {why}; lower --worker-memory or add workers")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// How much.
        bytes: usize,
        /// What the system said.
        why: String,
    },
    /// A shape that cannot be.
    #[error("{what}: {why}")]
    BadShape {
        /// Of what.
        what: &'static str,
        /// What is wrong and what was expected.
        why: String,
    },
    /// A matrix whose rows were not packed exactly once.
    #[error("row {row} of a matrix of {rows} rows was {how}; each row is packed exactly once")]
    BadRow {
        /// The first such row.
        row: usize,
        /// The matrix's rows.
        rows: usize,
        /// What happened to it.
        how: &'static str,
    },
    /// An instruction set that this machine lacks, or a word that names none.
    #[error("instruction set {asked}: {why}")]
    InstructionSet {
        /// What was asked for.
        asked: String,
        /// What is wrong and which ones there are.
        why: String,
    },
    /// A compute thread did not start.
    #[error("compute thread {thread} did not start: {why}")]
    Thread {
        /// Which one.
        thread: usize,
        /// What the system said.
        why: String,
    },
}
