//! Loads a shard: reads the byte ranges of its own tensors and packs them for the device.
//!
//! ```text
//! checkpoint ─► pieces (whole panels of rows, ~4 MiB, in file order) ─► threads: pread ─► pack_rows
//! ```
//!
//! A thread has one buffer of the size of a piece, and what it packs goes straight to where it is
//! held: there is no second copy of the weights, and the page cache is not ours to count.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use shoal_protocol::model::{
    Checkpoint, PANEL_OUTPUTS, StoredScales, TensorLocation, TensorPart, TensorRole, TensorSpec,
};
use shoal_protocol::plan::Precision;
use shoal_protocol::units::Bytes;

use crate::backend::{BackendError, Linear, Norm, Ops, WeightBuilder};

#[path = "packing.rs"]
mod packing;
#[path = "turned.rs"]
mod turned;

/// What a thread reads at once: long enough for the disk, short enough that the buffers of a few
/// threads do not show beside the weights.
const PIECE_BYTES: u64 = 4 << 20;
/// More threads than this only fight for the disk and the memory bus.
const THREADS_MAX: usize = 16;

/// How to load.
pub struct LoadOptions<'a> {
    /// Threads that read and pack.
    pub threads: NonZeroUsize,
    /// Called with the bytes read and the bytes to read after each piece, by whichever thread read
    /// it; calls may overlap.
    pub on_progress: &'a (dyn Fn(Bytes, Bytes) + Sync),
    /// Set to give up: the load ends with [`WeightsError::Cancelled`] within one piece.
    pub cancel: &'a AtomicBool,
}

/// Why weights were not loaded.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A range of a file cannot be read.
    #[error("{}: tensor `{tensor}`: bytes {first}..{end}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The first byte of the range.
        first: u64,
        /// One past its last byte.
        end: u64,
        /// What the system says.
        source: io::Error,
    },
    /// The device takes no such tensor.
    #[error("tensor `{tensor}`: {source}")]
    Device {
        /// The tensor.
        tensor: String,
        /// What it says.
        source: BackendError,
    },
    /// The device has no room for the matrices of the stage.
    #[error("the matrices of this stage: {source}")]
    Memory {
        /// What it says.
        source: BackendError,
    },
    /// The checkpoint has no place for a tensor; it was opened for another model.
    #[error("tensor `{tensor}` is not in the checkpoint {}", folder.display())]
    NotLocated {
        /// The checkpoint's folder.
        folder: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A family asked for a tensor that its table does not give this stage.
    #[error("no {role:?} of layer {layer:?} among the tensors of this stage")]
    NotInTable {
        /// What it asked for.
        role: TensorRole,
        /// Of which layer.
        layer: Option<u32>,
    },
    /// A thread could not be started.
    #[error("a thread that reads weights did not start: {source}")]
    Thread {
        /// What the system says.
        source: io::Error,
    },
    /// The caller gave up.
    #[error("loading was cancelled")]
    Cancelled,
}

/// The tensors of a stage, on the device, until a family has put them together.
pub(crate) struct Weights<B: Ops> {
    matrices: BTreeMap<Key, B::Weight>,
    vectors: BTreeMap<Key, B::Vector>,
}

/// Layer, role, and which expert or head.
type Key = (Option<u32>, TensorRole, u32);

impl<B: Ops> Weights<B> {
    /// Reads these parts of tensors, holding matrices as `held`.
    pub(crate) fn load(
        ops: &B,
        checkpoint: &Checkpoint,
        tensors: Vec<TensorPart>,
        held: Precision,
        options: &LoadOptions<'_>,
    ) -> Result<Self, WeightsError> {
        let mut files = Files::default();
        let mut vectors = BTreeMap::new();
        let mut sources = Vec::new();
        let adds_one = checkpoint.lacks_one();
        for part in tensors {
            let spec = &part.spec;
            let location =
                checkpoint.locate(&spec.name).ok_or_else(|| WeightsError::NotLocated {
                    folder: checkpoint.folder().to_owned(),
                    tensor: spec.name.clone(),
                })?;
            let source = Source { file: files.open(location, spec)?, location, part };
            if source.part.spec.is_matrix {
                sources.push(source);
            } else {
                let mut values = source.read_vector()?;
                if adds_one && source.part.spec.role.is_norm_weight() {
                    values.iter_mut().for_each(|value| *value += 1.0);
                }
                let vector = ops.vector(&values).map_err(|error| source.device(error))?;
                vectors.insert(source.key(), vector);
            }
        }
        let matrices = Matrix::<B>::all(ops, sources, held)?;
        read_all(&matrices, options)?;
        let matrices = matrices
            .into_iter()
            .map(|Matrix { source, builder, .. }| {
                let weight = builder.finish().map_err(|error| source.device(error))?;
                Ok((source.key(), weight))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { matrices, vectors })
    }

    /// Takes a matrix that the stage must have.
    pub(crate) fn matrix(
        &mut self,
        role: TensorRole,
        layer: Option<u32>,
    ) -> Result<B::Weight, WeightsError> {
        self.matrix_of(role, layer, 0)
    }

    /// Takes that of an expert or a head.
    pub(crate) fn matrix_of(
        &mut self,
        role: TensorRole,
        layer: Option<u32>,
        index: u32,
    ) -> Result<B::Weight, WeightsError> {
        self.matrices.remove(&(layer, role, index)).ok_or(WeightsError::NotInTable { role, layer })
    }

    /// Takes a vector, if the model has it.
    pub(crate) fn vector(&mut self, role: TensorRole, layer: Option<u32>) -> Option<B::Vector> {
        self.vectors.remove(&(layer, role, 0))
    }

    /// Takes a matrix, and its bias where the model has one.
    pub(crate) fn linear(
        &mut self,
        roles: (TensorRole, TensorRole),
        layer: u32,
    ) -> Result<Linear<B>, WeightsError> {
        self.linear_of(roles, layer, 0)
    }

    /// Takes that of an expert.
    pub(crate) fn linear_of(
        &mut self,
        (role, bias): (TensorRole, TensorRole),
        layer: u32,
        index: u32,
    ) -> Result<Linear<B>, WeightsError> {
        let weight = self.matrix_of(role, Some(layer), index)?;
        Ok(Linear { weight, bias: self.vectors.remove(&(Some(layer), bias, index)) })
    }

    /// Takes the weight of a norm that the stage must have.
    pub(crate) fn norm(
        &mut self,
        role: TensorRole,
        layer: Option<u32>,
        eps: f32,
    ) -> Result<Norm<B>, WeightsError> {
        let weight = self.vector(role, layer).ok_or(WeightsError::NotInTable { role, layer })?;
        Ok(Norm::rms(weight, eps))
    }
}

/// The files of a checkpoint that a stage reads, each opened once.
#[derive(Default)]
struct Files(BTreeMap<Arc<Path>, Arc<File>>);

impl Files {
    fn open(&mut self, at: &TensorLocation, spec: &TensorSpec) -> Result<Arc<File>, WeightsError> {
        if let Some(file) = self.0.get(&at.file) {
            return Ok(file.clone());
        }
        let file = File::open(&at.file).map_err(|source| WeightsError::Read {
            file: at.file.to_path_buf(),
            tensor: spec.name.clone(),
            first: at.offset,
            end: at.offset + at.len,
            source,
        })?;
        let file = Arc::new(file);
        self.0.insert(at.file.clone(), file.clone());
        Ok(file)
    }
}

/// What is held of one tensor, and where its bytes are.
struct Source<'a> {
    file: Arc<File>,
    location: &'a TensorLocation,
    part: TensorPart,
}

impl Source<'_> {
    fn key(&self) -> Key {
        let spec = &self.part.spec;
        (spec.layer, spec.role, spec.index)
    }

    /// The columns that are read of each row: the part's, and what is in one block with them.
    fn columns_read(&self) -> Range<u64> {
        let (elements, _) = self.location.dtype.block();
        let columns = &self.part.columns;
        let end = columns.end.next_multiple_of(elements).min(self.part.columns_stored());
        columns.start / elements * elements..end
    }

    /// Bytes of so many columns in the file; they are whole blocks, or the checkpoint would have been
    /// refused.
    fn bytes_of(&self, columns: u64) -> u64 {
        self.location.dtype.row_bytes(columns).unwrap_or(0)
    }

    /// Bytes that are read of one row; where a row is no range of the file, its share of all.
    fn row_bytes(&self) -> u64 {
        if self.is_read_whole() {
            return self.location.len / self.part.spec.shape[0];
        }
        let columns = self.columns_read();
        self.bytes_of(columns.end - columns.start)
    }

    /// Whether words go across rows, so that all of them are read at once.
    fn is_read_whole(&self) -> bool {
        matches!(self.location.scales.as_deref(), Some(StoredScales::FourBits { .. }))
    }

    /// Reads rows of the part, `first` counted from its first one: at once where they are whole, else
    /// the part's columns of each.
    fn read_rows(&self, first: u64, buffer: &mut [u8]) -> Result<(), WeightsError> {
        if let Some(StoredScales::Exponents { .. }) = self.location.scales.as_deref() {
            return self.read_blocks(first, buffer);
        }
        let stored = self.bytes_of(self.part.columns_stored());
        let first = self.part.rows.start + first;
        if let Some(turned) = self.turned() {
            return self.read_turned(turned, first, buffer);
        }
        let skipped_rows = self.part.spec.excerpt.as_ref().map_or(0, |excerpt| excerpt.first_row);
        let first = (skipped_rows + first) * stored;
        if self.row_bytes() == stored {
            return self.read(first, buffer);
        }
        let skipped = self.bytes_of(self.columns_read().start);
        let rows = buffer.chunks_exact_mut(self.row_bytes() as usize);
        (0..).zip(rows).try_for_each(|(row, to)| self.read(first + row * stored + skipped, to))
    }

    /// Reads bytes of the tensor, `first` counted from its beginning.
    fn read(&self, first: u64, buffer: &mut [u8]) -> Result<(), WeightsError> {
        let first = self.location.offset + first;
        self.file.read_exact_at(buffer, first).map_err(|source| WeightsError::Read {
            file: self.location.file.to_path_buf(),
            tensor: self.part.spec.name.clone(),
            first,
            end: first + buffer.len() as u64,
            source: match source.kind() {
                // The header was right when the checkpoint was opened.
                io::ErrorKind::UnexpectedEof => {
                    let words = "the file has become shorter since it was opened";
                    io::Error::new(io::ErrorKind::UnexpectedEof, words)
                }
                _ => source,
            },
        })
    }

    /// Reads bytes of another file, of a tensor that belongs to this one.
    fn read_at(&self, file: &Path, first: u64, buffer: &mut [u8]) -> Result<(), WeightsError> {
        let read = File::open(file).and_then(|file| file.read_exact_at(buffer, first));
        read.map_err(|source| WeightsError::Read {
            file: file.to_path_buf(),
            tensor: self.part.spec.name.clone(),
            first,
            end: first + buffer.len() as u64,
            source,
        })
    }

    fn device(&self, source: BackendError) -> WeightsError {
        WeightsError::Device { tensor: self.part.spec.name.clone(), source }
    }
}

/// A matrix that is being packed.
struct Matrix<'a, B: Ops> {
    source: Source<'a>,
    held: Precision,
    builder: B::WeightBuilder,
}

impl<'a, B: Ops> Matrix<'a, B> {
    fn all(ops: &B, sources: Vec<Source<'a>>, held: Precision) -> Result<Vec<Self>, WeightsError> {
        let of = |source: &Source<'_>| held.of(source.part.spec.role);
        let shape = |source: &Source<'_>| {
            (source.part.row_count() as usize, source.part.column_count() as usize)
        };
        let (mut all, mut rest) = (Vec::with_capacity(sources.len()), sources);
        // Those of one precision lie side by side.
        while let Some(held) = rest.first().map(of) {
            let (same, others): (Vec<_>, Vec<_>) =
                rest.into_iter().partition(|source| of(source) == held);
            let shapes: Vec<_> = same.iter().map(shape).collect();
            let builders = ops
                .weight_builders(held, &shapes)
                .map_err(|source| WeightsError::Memory { source })?;
            let with = same.into_iter().zip(builders);
            all.extend(with.map(|(source, builder)| Self { source, held, builder }));
            rest = others;
        }
        Ok(all)
    }

    fn row_bytes(&self) -> u64 {
        self.source.row_bytes()
    }

    /// Rows that are read at once: all where each piece would read the bytes of all.
    fn piece_rows(&self) -> u64 {
        if self.source.is_read_whole() || self.source.turned().is_some() {
            return self.source.part.row_count();
        }
        let panel_bytes = PANEL_OUTPUTS * self.row_bytes();
        PANEL_OUTPUTS * (PIECE_BYTES / panel_bytes).max(1)
    }
}

/// Rows of one matrix that are read at once.
struct Piece {
    matrix: usize,
    first_row: u64,
    rows: u64,
}

/// Cuts the matrices into pieces of whole panels, so that no two threads write to the same one, in
/// the order in which they lie in the files.
fn pieces<B: Ops>(matrices: &[Matrix<'_, B>]) -> Vec<Piece> {
    let mut order: Vec<usize> = (0..matrices.len()).collect();
    order.sort_by_key(|&i| {
        let Source { location, part, .. } = &matrices[i].source;
        let first_row = part.spec.excerpt.as_ref().map_or(0, |excerpt| excerpt.first_row);
        (&location.file, location.offset, first_row)
    });
    let mut pieces = Vec::new();
    for matrix in order {
        let rows_max = matrices[matrix].piece_rows();
        let rows_all = matrices[matrix].source.part.row_count();
        let mut first_row = 0;
        while first_row < rows_all {
            let rows = rows_max.min(rows_all - first_row);
            pieces.push(Piece { matrix, first_row, rows });
            first_row += rows;
        }
    }
    pieces
}

/// Reads and packs all matrices. The first error ends the work of all threads.
fn read_all<B: Ops>(
    matrices: &[Matrix<'_, B>],
    options: &LoadOptions<'_>,
) -> Result<(), WeightsError> {
    let pieces = pieces(matrices);
    let bytes = |matrix: &Matrix<'_, B>| matrix.source.part.row_count() * matrix.row_bytes();
    let total = Bytes(matrices.iter().map(bytes).sum());
    let (next, done) = (AtomicUsize::new(0), AtomicU64::new(0));
    // The first error; it also tells the other threads to stop.
    let failure: Mutex<Option<WeightsError>> = Mutex::new(None);
    let failed = AtomicBool::new(false);
    let fail = |error| {
        failed.store(true, Ordering::Relaxed);
        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    };
    let work = || {
        let mut buffer = Vec::new();
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            if failed.load(Ordering::Relaxed) {
                return;
            }
            if options.cancel.load(Ordering::Relaxed) {
                return fail(WeightsError::Cancelled);
            }
            let matrix = &matrices[piece.matrix];
            if let Err(error) = matrix.pack(piece, &mut buffer) {
                return fail(error);
            }
            let bytes = piece.rows * matrix.row_bytes();
            let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            (options.on_progress)(Bytes(done), total);
        }
    };
    let threads = options.threads.get().min(THREADS_MAX).min(pieces.len().max(1));
    std::thread::scope(|scope| {
        for i in 1..threads {
            let name = format!("weights-{i}");
            if let Err(source) = std::thread::Builder::new().name(name).spawn_scoped(scope, work) {
                fail(WeightsError::Thread { source });
                break;
            }
        }
        work();
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
