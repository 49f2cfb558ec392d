//! Adapters beside a shard's weights, and what they add to a step.
//!
//! ```text
//! rows of the step, by adapter ─► x of one adapter's rows ─► A ─► scaling ─► B ─► added to those rows of y
//! ```
//!
//! A row's bits depend on its own adapter alone: `A x` and `B (A x)` are chains over `k` as any product
//! of contract n1, and each row of `y` gets one sum. Rows without an adapter are not touched. Over tensor
//! ranks the two are cut as the projection is: where its partial results are summed, so are these, before
//! the sum; else every rank has the whole `A` and its own rows of `B`.

mod slices;

use std::collections::BTreeMap;
use std::ops::Range;

use shoal_protocol::adapters::ADAPTERS_MAX;
use shoal_protocol::id::AdapterId;
use shoal_protocol::model::TensorRole;
use shoal_protocol::plan::Precision;

pub use slices::{AdapterSlices, DeltaSlice};

use super::{ComputeError, Span};
use crate::backend::{BackendError, FamilyOps, Linear, Ops, WeightBuilder};

/// Adapters that a shard holds: all that there may be, and as many that go behind their last sequence.
const HELD_MAX: usize = 2 * ADAPTERS_MAX;

/// Why an adapter was not taken.
#[derive(Debug, thiserror::Error)]
pub enum AdapterLoadError {
    /// Another one has this number already.
    #[error("{0} is loaded already; unload it first")]
    Loaded(AdapterId),
    /// There are too many.
    #[error(
        "{HELD_MAX} adapters are held, those among them that wait for their last answer to end; try again when some are gone"
    )]
    TooMany,
    /// This kind of model has none.
    #[error("{0} has no projections that an adapter changes")]
    NoProjections(&'static str),
    /// The device has no room, or the matrices are not whole.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// The two matrices beside one projection, packed.
struct LowRank<B: Ops> {
    down: Linear<B>,
    up: Linear<B>,
    scaling: f32,
    rank: usize,
    widths: (usize, usize),
}

/// One adapter: what it has beside which projections of this shard.
type Loaded<B> = BTreeMap<(u32, TensorRole), LowRank<B>>;

/// Rows in between, as wide as the widest adapter needs them.
struct Between<B: Ops> {
    x: B::Buf,
    low: B::Buf,
    y: B::Buf,
    /// Inputs, rank, outputs.
    widths: [usize; 3],
}

/// All adapters of a shard. See the module.
pub struct Adapters<B: FamilyOps> {
    rows_max: usize,
    loaded: BTreeMap<AdapterId, Loaded<B>>,
    between: Option<Between<B>>,
    /// The step's rows that have an adapter, those of one beside each other.
    rows: Vec<usize>,
    groups: Vec<(AdapterId, Range<usize>)>,
    /// Rows whose adapter is not here.
    lost: Vec<Range<usize>>,
    layer: u32,
}

impl<B: FamilyOps> Adapters<B> {
    /// None, for steps of at most so many rows.
    pub fn new(rows_max: usize) -> Self {
        let (rows, groups, lost) = (Vec::new(), Vec::new(), Vec::new());
        Self { rows_max, loaded: BTreeMap::new(), between: None, rows, groups, lost, layer: 0 }
    }

    /// Packs and keeps an adapter. Allocates what steps need from now on.
    pub fn load(
        &mut self,
        ops: &mut B,
        id: AdapterId,
        slices: &AdapterSlices,
    ) -> Result<(), AdapterLoadError> {
        if self.loaded.contains_key(&id) {
            return Err(AdapterLoadError::Loaded(id));
        }
        if self.loaded.len() >= HELD_MAX {
            return Err(AdapterLoadError::TooMany);
        }
        let mut loaded = Loaded::new();
        let mut widths = [1; 3];
        for slice in &slices.deltas {
            let (inputs, outputs, rank) = (slice.inputs, slice.outputs, slice.rank);
            let down = pack(ops, slice.down_held, (rank, inputs), &slice.down)?;
            let up = pack(ops, slice.up_held, (outputs, rank), &slice.up)?;
            for (widest, width) in widths.iter_mut().zip([inputs, rank, outputs]) {
                *widest = width.max(*widest);
            }
            let widths = (inputs, outputs);
            let low_rank = LowRank { down, up, scaling: slice.scaling, rank, widths };
            loaded.insert((slice.layer, slice.role), low_rank);
        }
        self.widen(ops, widths)?;
        self.loaded.insert(id, loaded);
        Ok(())
    }

    /// Forgets an adapter; whether it was there. What the rows in between take goes with the last one.
    pub fn unload(&mut self, id: AdapterId) -> bool {
        let was = self.loaded.remove(&id).is_some();
        if self.loaded.is_empty() {
            (self.between, self.rows, self.groups) = (None, Vec::new(), Vec::new());
        }
        was
    }

    fn widen(&mut self, ops: &mut B, needed: [usize; 3]) -> Result<(), BackendError> {
        let rows = self.rows_max;
        let had = self.between.as_ref().map_or([0; 3], |between| between.widths);
        let widths = [0, 1, 2].map(|i| needed[i].max(had[i]));
        if widths != had {
            self.between = Some(Between {
                x: ops.buffer(rows, widths[0])?,
                low: ops.buffer(rows, widths[1])?,
                y: ops.buffer(rows, widths[2])?,
                widths,
            });
        }
        self.rows.reserve(rows);
        self.groups.reserve(HELD_MAX);
        Ok(())
    }

    /// Sorts a step's rows by adapter.
    pub fn begin(&mut self, spans: &[Span<'_>]) {
        self.rows.clear();
        self.groups.clear();
        self.lost.clear();
        for (at, span) in spans.iter().enumerate() {
            let Some(id) = span.adapter else { continue };
            if !self.loaded.contains_key(&id) {
                self.lost.push(span.first_row..span.first_row + span.rows);
                continue;
            }
            // Its first span takes the others along.
            if spans[..at].iter().any(|before| before.adapter == span.adapter) {
                continue;
            }
            let first = self.rows.len();
            for span in spans[at..].iter().filter(|other| other.adapter == span.adapter) {
                self.rows.extend(span.first_row..span.first_row + span.rows);
            }
            self.groups.push((id, first..self.rows.len()));
        }
    }

    /// The step's rows whose adapter is not here: it went while their sequence was on its way. What is
    /// computed of them is worth nothing, and must not be taken for an answer.
    pub fn lost(&self) -> &[Range<usize>] {
        &self.lost
    }

    /// The layer whose projections follow.
    pub fn enter(&mut self, layer: u32) {
        self.layer = layer;
    }

    /// Adds to the rows of `y`, which a projection made of `x`, what their adapters add there.
    pub fn add(
        &mut self,
        ops: &mut B,
        role: TensorRole,
        x: &B::Buf,
        y: &mut B::Buf,
    ) -> Result<(), ComputeError> {
        let Some(between) = &mut self.between else { return Ok(()) };
        for (id, range) in &self.groups {
            let low_rank = self.loaded.get(id).and_then(|one| one.get(&(self.layer, role)));
            let Some(LowRank { down, up, scaling, rank, widths }) = low_rank else { continue };
            let rows = &self.rows[range.clone()];
            ops.reshape(&mut between.x, widths.0)?;
            ops.reshape(&mut between.low, *rank)?;
            ops.reshape(&mut between.y, widths.1)?;
            ops.take_rows(x, rows, &mut between.x)?;
            ops.linear(&between.x, rows.len(), down, &mut between.low)?;
            ops.scale(&mut between.low, rows.len(), *scaling)?;
            ops.linear(&between.low, rows.len(), up, &mut between.y)?;
            ops.add_to_rows(&between.y, rows, y)?;
        }
        Ok(())
    }
}

fn pack<B: Ops>(
    ops: &B,
    held: Precision,
    shape: (usize, usize),
    bytes: &[u8],
) -> Result<Linear<B>, BackendError> {
    let no_matrix = || BackendError::BadShape { what: "adapter", why: format!("{shape:?}") };
    let builder = ops.weight_builders(held, &[shape])?.pop().ok_or_else(no_matrix)?;
    builder.pack_rows(0, held, bytes)?;
    Ok(Linear { weight: builder.finish()?, bias: None })
}
