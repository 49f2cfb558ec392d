//! Memory for matrices, caches and scratch: zeroed, aligned to a cache line.

use memmap2::{Advice, MmapMut};

use crate::backend::BackendError;
use crate::backend::cpu::simd::LANES;

/// Anonymous memory of the system: zero, and free until a page is touched.
pub struct Mapped {
    map: MmapMut,
}

impl Mapped {
    /// At least `bytes`, page-aligned.
    pub fn new(what: &'static str, bytes: usize) -> Result<Self, BackendError> {
        let map = MmapMut::map_anon(bytes.max(1)).map_err(|error| BackendError::OutOfMemory {
            what,
            bytes,
            why: error.to_string(),
        })?;
        Ok(Self { map })
    }

    /// Asks for huge pages: what is streamed from end to end needs fewer address translations.
    pub fn prefer_huge_pages(&self) {
        // Where the kernel has none, small pages do.
        #[cfg(target_os = "linux")]
        let _ = self.map.advise(Advice::HugePage);
    }

    /// The first byte.
    pub fn as_ptr<T>(&self) -> *const T {
        self.map.as_ptr().cast()
    }

    /// The first byte, to write.
    pub fn as_mut_ptr<T>(&mut self) -> *mut T {
        self.map.as_mut_ptr().cast()
    }
}

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

/// A fixed number of `f32`, from the start of a cache line to the end of one.
pub struct Floats {
    lines: Vec<Line>,
}

impl Floats {
    /// Zeros, at least `len`.
    pub fn zeros(len: usize) -> Result<Self, BackendError> {
        let count = len.div_ceil(LANES);
        let mut lines = Vec::new();
        lines.try_reserve_exact(count).map_err(|error| BackendError::OutOfMemory {
            what: "scratch",
            bytes: 4 * len,
            why: error.to_string(),
        })?;
        lines.resize(count, Line([0.0; LANES]));
        Ok(Self { lines })
    }

    /// A copy of `values`, zeros after it.
    pub fn copy_of(values: &[f32]) -> Result<Self, BackendError> {
        let mut floats = Self::zeros(values.len())?;
        floats.as_mut_slice()[..values.len()].copy_from_slice(values);
        Ok(floats)
    }

    /// How many, a multiple of a line.
    pub fn len(&self) -> usize {
        self.lines.len() * LANES
    }

    /// All of them.
    pub fn as_slice(&self) -> &[f32] {
        // SAFETY: a `Line` is 16 `f32` and nothing else (`repr(C)`, size equals alignment).
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len()) }
    }

    /// All of them, to write.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        let len = self.len();
        // SAFETY: a `Line` is 16 `f32` and nothing else (`repr(C)`, size equals alignment).
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }
}
