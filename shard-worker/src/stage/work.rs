//! What flows at a worker: how many sequences are open at all of its shards together. While there are
//! any, its coordinators hear of it as often as its neighbours do.

use std::sync::Arc;

use tokio::sync::watch;

/// The worker's count.
#[derive(Clone, Debug)]
pub struct Work(Arc<watch::Sender<usize>>);

impl Default for Work {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }
}

impl Work {
    /// The count, as it changes.
    pub fn subscribe(&self) -> watch::Receiver<usize> {
        self.0.subscribe()
    }

    /// One shard's part of it.
    pub fn share(&self) -> WorkShare {
        WorkShare { all: self.clone(), mine: 0 }
    }
}

/// What one shard adds to the count, until it is dropped.
#[derive(Debug)]
pub struct WorkShare {
    all: Work,
    mine: usize,
}

impl WorkShare {
    /// So many sequences are open at this shard now.
    pub fn set(&mut self, open: usize) {
        let before = std::mem::replace(&mut self.mine, open);
        // Those who wait care for the first and the last alone.
        self.all.0.send_if_modified(|all| {
            let was = *all;
            *all = (was + open).saturating_sub(before);
            (was == 0) != (*all == 0)
        });
    }
}

impl Drop for WorkShare {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_that_goes_takes_its_part_with_it() {
        let work = Work::default();
        let mut seen = work.subscribe();
        let (mut one, mut other) = (work.share(), work.share());
        one.set(2);
        assert!(seen.has_changed().unwrap(), "work begins");
        seen.mark_unchanged();
        other.set(1);
        one.set(1);
        assert_eq!((*seen.borrow(), seen.has_changed().unwrap()), (2, false));
        drop(one);
        other.set(0);
        assert_eq!((*seen.borrow(), seen.has_changed().unwrap()), (0, true));
    }
}
