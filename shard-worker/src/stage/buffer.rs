//! The buffers that travel: QUIC's chunks are copied into one, layers compute in it in place, and it
//! goes to the next stage by reference. When the transport drops it, it comes back here.
//!
//! ```text
//! pool.take ─► HiddenBuffer ── bytes_mut: filled from the wire ─► floats_mut: forward ─► into_bytes ─► quinn
//!      ▲                                                                                             │
//!      └────────────────────────────── dropped once the peer has acknowledged ───────────────────────┘
//! ```
//!
//! In the steady state no step allocates memory for activations.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

#[cfg(not(target_endian = "little"))]
compile_error!("activations cross the wire as little-endian f32 and are used without conversion");

/// A cache line, and the widest vector register.
pub const ALIGNMENT: usize = 64;

const FLOAT_LEN: usize = size_of::<f32>();

/// Buffers for the hidden states of one shard's steps.
#[derive(Clone, Debug)]
pub struct BufferPool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    width: usize,
    rows_max: usize,
    idle_max: usize,
    /// Held for the time of a push or a pop, never while anything waits.
    idle: Mutex<Vec<Vec<f32>>>,
    allocations: AtomicU64,
}

impl BufferPool {
    /// A pool of buffers for at most `rows_max` rows of `width` floats. It keeps one for each step in
    /// flight, as the plan counts them.
    pub fn new(width: usize, rows_max: usize, steps_in_flight: usize) -> Self {
        let shared = Shared {
            width,
            rows_max,
            idle_max: steps_in_flight,
            idle: Mutex::new(Vec::new()),
            allocations: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// A buffer for `rows` rows. What is in it is what its last user left.
    pub fn take(&self, rows: usize) -> HiddenBuffer {
        let shared = &self.shared;
        let len = rows * shared.width;
        let data = {
            let mut idle = shared.idle.lock().unwrap_or_else(PoisonError::into_inner);
            // The smallest that is large enough, so that a decode step leaves the large ones to prompts.
            let fitting = idle.iter().enumerate().filter(|(_, data)| data.len() >= len + SLACK);
            let best = fitting.min_by_key(|(_, data)| data.len()).map(|(at, _)| at);
            best.map(|at| idle.swap_remove(at))
        };
        let data = data.unwrap_or_else(|| {
            shared.allocations.fetch_add(1, Ordering::Relaxed);
            let rows = rows.next_power_of_two().min(shared.rows_max.max(rows));
            vec![0.0; rows * shared.width + SLACK]
        });
        // On a platform where the pointer cannot be aligned the offset is `usize::MAX`; ours can.
        let start = data.as_ptr().align_offset(ALIGNMENT).min(SLACK);
        HiddenBuffer { data, start, len, home: Arc::clone(shared) }
    }

    /// How many buffers were ever allocated: it stands still in the steady state.
    pub fn allocations(&self) -> u64 {
        self.shared.allocations.load(Ordering::Relaxed)
    }
}

/// Floats that a buffer is longer than asked, so that its first used one can be aligned.
const SLACK: usize = ALIGNMENT / FLOAT_LEN - 1;

/// The hidden states of one step, `rows x width`, aligned to `ALIGNMENT` bytes.
#[derive(Debug)]
pub struct HiddenBuffer {
    data: Vec<f32>,
    start: usize,
    len: usize,
    home: Arc<Shared>,
}

impl HiddenBuffer {
    /// The numbers.
    pub fn floats(&self) -> &[f32] {
        &self.data[self.start..self.start + self.len]
    }

    /// The numbers, to be computed with.
    pub fn floats_mut(&mut self) -> &mut [f32] {
        &mut self.data[self.start..self.start + self.len]
    }

    /// The bytes, to be filled from the wire.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(self.floats_mut())
    }

    /// The same memory as something that the transport can hold on to.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for HiddenBuffer {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(self.floats())
    }
}

impl Drop for HiddenBuffer {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        let mut idle = self.home.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push(data);
        if idle.len() > self.home.idle_max {
            // The smallest serves the fewest steps.
            let smallest = idle.iter().enumerate().min_by_key(|(_, data)| data.len());
            if let Some(at) = smallest.map(|(at, _)| at) {
                idle.swap_remove(at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_and_comes_back() {
        let pool = BufferPool::new(33, 64, 2);
        let mut first = pool.take(3);
        assert_eq!(first.floats().len(), 99);
        assert_eq!(first.floats().as_ptr() as usize % ALIGNMENT, 0);
        first.bytes_mut()[4..8].copy_from_slice(&1.5f32.to_le_bytes());
        assert_eq!(first.floats()[1], 1.5);
        let address = first.floats().as_ptr() as usize;

        let bytes = first.into_bytes();
        assert_eq!(bytes.as_ptr() as usize, address, "the send path copied");
        assert_eq!(bytes.len(), 99 * 4);
        let part = bytes.slice(8..16);
        drop(bytes);
        assert_ne!(pool.take(3).floats().as_ptr() as usize, address, "given out while in use");
        drop(part);
        assert_eq!(pool.take(4).floats().as_ptr() as usize % ALIGNMENT, 0);
        assert_eq!(pool.allocations(), 2);
    }

    #[test]
    fn the_steady_state_allocates_nothing() {
        let pool = BufferPool::new(16, 128, 3);
        let round = || {
            let held: Vec<_> = [1, 128, 7].map(|rows| pool.take(rows)).into();
            drop(held);
            pool.allocations()
        };
        let after_first = round();
        for _ in 0..100 {
            assert_eq!(round(), after_first);
        }
    }

    #[test]
    fn the_pool_keeps_a_bounded_number() {
        let pool = BufferPool::new(4, 8, 5);
        let held: Vec<_> = (0..100).map(|_| pool.take(1)).collect();
        drop(held);
        assert_eq!(pool.shared.idle.lock().unwrap().len(), 5);
    }
}
