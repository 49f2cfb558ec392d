//! ● One at a time, and whoever waits may be told to stop waiting.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::error::BlobError;

/// How soon who waits notices that nobody wants it any more; the end of a turn wakes it before.
const CANCEL_LOOK: Duration = Duration::from_millis(50);

/// What one has at a time. It is waited for as long as the one that has it works, all of whose own waits
/// have a deadline.
#[derive(Debug, Default)]
pub(super) struct Turn {
    is_taken: Mutex<bool>,
    ended: Condvar,
}

/// It is ours until this is dropped.
#[derive(Debug)]
pub(super) struct Taken<'a>(&'a Turn);

impl Turn {
    /// Waits for it, unless `cancel` is set.
    pub fn take(&self, cancel: &AtomicBool) -> Result<Taken<'_>, BlobError> {
        let mut is_taken = self.lock();
        while *is_taken {
            if cancel.load(Ordering::Relaxed) {
                return Err(BlobError::Cancelled);
            }
            let waited = self.ended.wait_timeout(is_taken, CANCEL_LOOK);
            is_taken = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *is_taken = true;
        Ok(Taken(self))
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        // Nothing under the lock panics half-way.
        self.is_taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        *self.0.lock() = false;
        self.0.ended.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_a_turn_has_it_next_or_is_let_go_when_cancelled() {
        let turn = Turn::default();
        let cancel = AtomicBool::new(false);
        let first = turn.take(&cancel).unwrap();
        std::thread::scope(|scope| {
            let given_up = scope.spawn(|| turn.take(&AtomicBool::new(true)).map(drop));
            assert!(matches!(given_up.join().unwrap(), Err(BlobError::Cancelled)));
            let next = scope.spawn(|| turn.take(&cancel).map(drop));
            drop(first);
            assert!(next.join().unwrap().is_ok());
        });
        assert!(turn.take(&AtomicBool::new(true)).is_ok(), "a free turn needs no waiting");
    }
}
