//! The KV blocks of a replica: which are free, and how many hold each.
//!
//! A block has the same number at every stage. Counts above one are for prefixes that sequences
//! share.

/// A pool of numbered blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockPool {
    /// The free ones; the last is given next.
    free: Vec<u32>,
    /// By block: how many hold it.
    holders: Vec<u32>,
}

impl BlockPool {
    /// `total` blocks, all free.
    pub fn new(total: u32) -> Self {
        Self { free: (0..total).rev().collect(), holders: vec![0; total as usize] }
    }

    /// Blocks in all.
    pub fn total(&self) -> u32 {
        self.holders.len() as u32
    }

    /// Blocks that nobody holds.
    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Blocks that somebody holds.
    pub fn used(&self) -> u32 {
        self.total() - self.free()
    }

    /// Takes one free block.
    pub fn take(&mut self) -> Option<u32> {
        let block = self.free.pop()?;
        self.holders[block as usize] = 1;
        Some(block)
    }

    /// Takes `count` free blocks, or none where there are fewer.
    pub fn take_many(&mut self, count: u32) -> Option<Vec<u32>> {
        if self.free() < count {
            return None;
        }
        Some((0..count).filter_map(|_| self.take()).collect())
    }

    /// One more holds this block. False where it is free or no block of the pool.
    pub fn share(&mut self, block: u32) -> bool {
        match self.holders.get_mut(block as usize) {
            Some(holders) if *holders > 0 => {
                *holders += 1;
                true
            }
            _ => false,
        }
    }

    /// One fewer holds this block; with the last it is free. False where nobody held it.
    pub fn release(&mut self, block: u32) -> bool {
        match self.holders.get_mut(block as usize) {
            Some(holders) if *holders > 0 => {
                *holders -= 1;
                if *holders == 0 {
                    self.free.push(block);
                }
                true
            }
            _ => false,
        }
    }

    /// Releases each of these, the last one first, so that they are given again in the same order.
    pub fn release_all(&mut self, blocks: &[u32]) {
        for &block in blocks.iter().rev() {
            let held = self.release(block);
            debug_assert!(held, "block {block} was released and nobody held it");
        }
    }

    /// Every invariant that does not hold, in words: each block is either free, once, or held.
    pub fn check(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut times_free = vec![0u32; self.holders.len()];
        for &block in &self.free {
            match times_free.get_mut(block as usize) {
                Some(times) => *times += 1,
                None => wrong.push(format!("block {block} is free but not of the pool")),
            }
        }
        for (block, (&free, &holders)) in times_free.iter().zip(&self.holders).enumerate() {
            if (free, holders.min(1)) != (1, 0) && (free, holders.min(1)) != (0, 1) {
                wrong.push(format!("block {block} is free {free} times and held {holders} times"));
            }
        }
        wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_given_once_and_come_back() {
        let mut pool = BlockPool::new(4);
        assert_eq!(pool.take_many(3), Some(vec![0, 1, 2]));
        assert_eq!((pool.free(), pool.used(), pool.total()), (1, 3, 4));
        assert_eq!(pool.take_many(2), None);
        assert_eq!(pool.free(), 1, "a refused request takes nothing");
        pool.release_all(&[0, 1]);
        assert_eq!(pool.take_many(3), Some(vec![0, 1, 3]));
        assert_eq!(pool.take(), None);
        assert!(pool.check().is_empty());
    }

    #[test]
    fn a_shared_block_is_free_with_its_last_holder() {
        let mut pool = BlockPool::new(2);
        let block = pool.take().unwrap();
        assert!(pool.share(block) && pool.share(block));
        assert!(pool.release(block) && pool.release(block));
        assert_eq!(pool.used(), 1);
        assert!(pool.release(block));
        assert_eq!(pool.used(), 0);
        assert!(!pool.release(block) && !pool.share(block) && !pool.share(99));
        assert!(pool.check().is_empty());
    }

    #[test]
    fn the_check_sees_a_block_that_is_lost_or_free_twice() {
        let mut lost = BlockPool::new(2);
        lost.free.pop();
        let mut twice = BlockPool::new(2);
        twice.free.push(1);
        let mut both = BlockPool::new(2);
        both.holders[0] = 1;
        for pool in [lost, twice, both] {
            assert_eq!(pool.check().len(), 1, "{pool:?}");
        }
    }
}
