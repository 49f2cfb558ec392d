//! Memory for matrices, caches and scratch: zeroed, aligned to a cache line.

use std::sync::atomic::{AtomicU64, Ordering};

#[cfg(all(target_os = "linux", not(miri)))]
use memmap2::Advice;
use memmap2::{MmapMut, MmapRaw};

use crate::backend::BackendError;
use crate::backend::cpu::simd::LANES;

/// A huge page of the machines that have them.
const HUGE_PAGE: usize = 2 << 20;

/// What all matrices, caches and scratch of this process hold.
static HELD: AtomicU64 = AtomicU64::new(0);

/// Bytes that the weights, caches and scratch of all shards in this process were made with: what a plan
/// promises, apart from what travels between stages.
pub fn held_bytes() -> u64 {
    HELD.load(Ordering::Relaxed)
}

/// Bytes that count for as long as this is there.
struct Held(u64);

impl Held {
    fn new(bytes: usize) -> Self {
        HELD.fetch_add(bytes as u64, Ordering::Relaxed);
        Self(bytes as u64)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// Anonymous memory of the system: zero, and free until a page is touched.
///
/// The mapping is raw, so that it can be written through a shared reference: no Rust reference to
/// its bytes exists but those that somebody makes out of its pointers, and who does says who else
/// writes there.
pub struct Mapped {
    map: MmapRaw,
    /// Where in the mapping the first byte is.
    start: usize,
    _held: Held,
}

impl Mapped {
    /// At least `bytes`, page-aligned.
    pub fn new(what: &'static str, bytes: usize) -> Result<Self, BackendError> {
        Ok(Self { map: map(what, bytes)?, start: 0, _held: Held::new(bytes) })
    }

    /// The same on huge pages, as far as it fills them: what is streamed from end to end needs
    /// fewer address translations. What is left at the end takes small pages, so that no memory is
    /// taken that nobody asked for.
    pub fn on_huge_pages(what: &'static str, bytes: usize) -> Result<Self, BackendError> {
        let huge = bytes / HUGE_PAGE * HUGE_PAGE;
        if huge == 0 {
            return Self::new(what, bytes);
        }
        // The system places a mapping at any page; what is before the first huge page is not used.
        let map = map(what, bytes.saturating_add(HUGE_PAGE))?;
        let address = map.as_ptr().addr();
        let start = address.next_multiple_of(HUGE_PAGE) - address;
        // Where the kernel has none, small pages do.
        #[cfg(all(target_os = "linux", not(miri)))]
        let _ = map.advise_range(Advice::HugePage, start, huge);
        Ok(Self { map, start, _held: Held::new(bytes) })
    }

    /// The first byte.
    pub fn as_ptr<T>(&self) -> *const T {
        self.as_mut_ptr::<T>().cast_const()
    }

    /// The first byte, to write.
    pub fn as_mut_ptr<T>(&self) -> *mut T {
        // In bounds: see the constructors; `wrapping_add` leaves the proof to the access.
        self.map.as_mut_ptr().wrapping_add(self.start).cast()
    }
}

fn map(what: &'static str, bytes: usize) -> Result<MmapRaw, BackendError> {
    let map = MmapMut::map_anon(bytes.max(1)).map_err(|error| BackendError::OutOfMemory {
        what,
        bytes,
        why: error.to_string(),
    })?;
    Ok(map.into())
}

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

/// A fixed number of `f32`, from the start of a cache line to the end of one.
pub struct Floats {
    lines: Vec<Line>,
    _held: Held,
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
        Ok(Self { lines, _held: Held::new(count * size_of::<Line>()) })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_memory_starts_with_a_huge_page_and_can_be_written_to_its_end() {
        for bytes in [1, HUGE_PAGE - 1, HUGE_PAGE, 2 * HUGE_PAGE + 1] {
            let memory = Mapped::on_huge_pages("a test", bytes).unwrap();
            let first = memory.as_mut_ptr::<u8>();
            assert!(bytes < HUGE_PAGE || first.addr().is_multiple_of(HUGE_PAGE), "{bytes}");
            // SAFETY: `bytes` were asked for, and nobody else has this memory.
            unsafe {
                let last = first.add(bytes - 1);
                assert_eq!(last.read(), 0);
                last.write(7);
                assert_eq!(memory.as_ptr::<u8>().add(bytes - 1).read(), 7);
            }
        }
    }

    #[test]
    fn memory_that_no_system_has_is_refused() {
        for bytes in [usize::MAX, isize::MAX as usize] {
            let error = Mapped::on_huge_pages("a test", bytes).err();
            assert!(matches!(error, Some(BackendError::OutOfMemory { .. })), "{error:?}");
        }
    }
}
