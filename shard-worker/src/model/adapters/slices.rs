//! Reads what a shard holds of an adapter, on whatever thread may wait for a disk. Packing is left to the
//! compute thread, which has the device.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use shoal_protocol::model::{Adapter, DeltaPart, ModelSpec, Part, TensorLocation, TensorRole};
use shoal_protocol::plan::Precision;
use shoal_protocol::units::{Bytes, LayerRange};

/// The bytes of one shard's part of an adapter.
#[derive(Debug)]
pub struct AdapterSlices {
    /// By projection.
    pub deltas: Vec<DeltaSlice>,
    /// Bytes that they take once they are packed.
    pub held: Bytes,
}

/// The part of the two matrices beside one projection.
#[derive(Debug)]
pub struct DeltaSlice {
    /// The projection.
    pub role: TensorRole,
    /// Its layer.
    pub layer: u32,
    /// Multiplies the product.
    pub scaling: f32,
    /// The rank of both.
    pub rank: usize,
    /// Columns of the first.
    pub inputs: usize,
    /// Rows of the second.
    pub outputs: usize,
    /// How the first is stored and held.
    pub down_held: Precision,
    /// `[rank, inputs]`.
    pub down: Vec<u8>,
    /// How the second is stored and held.
    pub up_held: Precision,
    /// `[outputs, rank]`.
    pub up: Vec<u8>,
}

/// An adapter's file that cannot be read any more.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}; was it changed after it was opened?", file.display())]
pub struct AdapterReadError {
    /// The file.
    pub file: PathBuf,
    /// What the system says.
    pub source: io::Error,
}

impl AdapterSlices {
    /// Reads the part of these layers.
    pub fn read(
        adapter: &Adapter,
        base: &ModelSpec,
        part: &Part,
        layers: LayerRange,
    ) -> Result<Self, AdapterReadError> {
        let deltas =
            adapter.parts(base, part, layers).map(DeltaSlice::read).collect::<Result<_, _>>()?;
        Ok(Self { deltas, held: adapter.held_bytes(base, part, layers) })
    }
}

impl DeltaSlice {
    fn read(part: DeltaPart<'_>) -> Result<Self, AdapterReadError> {
        let DeltaPart { delta, inputs, outputs } = part;
        let rank = u64::from(delta.rank);
        Ok(Self {
            role: delta.role,
            layer: delta.layer,
            scaling: delta.scaling,
            rank: delta.rank as usize,
            inputs: (inputs.end - inputs.start) as usize,
            outputs: (outputs.end - outputs.start) as usize,
            down_held: held(&delta.down),
            down: read(&delta.down, 0..rank, inputs)?,
            up_held: held(&delta.up),
            up: read(&delta.up, outputs, 0..rank)?,
        })
    }
}

/// What is opened of an adapter is stored value by value.
fn held(at: &TensorLocation) -> Precision {
    at.dtype.held().unwrap_or(Precision::F32)
}

/// Reads these columns of these rows.
fn read(
    at: &TensorLocation,
    rows: std::ops::Range<u64>,
    columns: std::ops::Range<u64>,
) -> Result<Vec<u8>, AdapterReadError> {
    let failed = |source| AdapterReadError { file: at.file.to_path_buf(), source };
    let file = File::open(&at.file).map_err(failed)?;
    let (_, element) = at.dtype.block();
    let stored = at.shape.last().copied().unwrap_or(1);
    let width = columns.end - columns.start;
    let mut bytes = vec![0; ((rows.end - rows.start) * width * element) as usize];
    if width == stored {
        let first = at.offset + rows.start * stored * element;
        file.read_exact_at(&mut bytes, first).map_err(failed)?;
        return Ok(bytes);
    }
    for (row, to) in rows.zip(bytes.chunks_exact_mut((width * element) as usize)) {
        let first = at.offset + (row * stored + columns.start) * element;
        file.read_exact_at(to, first).map_err(failed)?;
    }
    Ok(bytes)
}
