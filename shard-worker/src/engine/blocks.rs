//! The KV blocks of a replica: which are free, and how many hold each.
//!
//! A block has the same number at every stage. Counts above one are for prefixes that sequences share:
//! such a block is full, and nobody writes to a full block. So sharing needs no copy: what a sequence
//! writes next goes to a block of its own.

use super::prefixes::{Content, Prefixes};

/// A pool of numbered blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockPool {
    /// The free ones; the last is given next.
    free: Vec<u32>,
    /// By block: how many hold it.
    holders: Vec<u32>,
    /// What the full ones hold, as far as others may use it. Those that nobody holds are in there, and
    /// count as free.
    prefixes: Prefixes,
}

/// The blocks that a sequence begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// All of them, in order.
    pub blocks: Vec<u32>,
    /// How many of them, from the first on, are full of what the sequence has there.
    pub shared: u32,
}

impl BlockPool {
    /// `total` blocks, all free.
    pub fn new(total: u32) -> Self {
        let free = (0..total).rev().collect();
        Self { free, holders: vec![0; total as usize], prefixes: Prefixes::new(total) }
    }

    /// Blocks in all.
    pub fn total(&self) -> u32 {
        self.holders.len() as u32
    }

    /// Blocks that nobody holds.
    pub fn free(&self) -> u32 {
        self.free.len() as u32 + self.prefixes.idle()
    }

    /// Blocks that somebody holds.
    pub fn used(&self) -> u32 {
        self.total() - self.free()
    }

    /// What is known of them.
    pub fn prefixes(&self) -> &Prefixes {
        &self.prefixes
    }

    /// Takes one free block: while there are others, none whose content is known.
    pub fn take(&mut self) -> Option<u32> {
        let block = self.free.pop().or_else(|| self.prefixes.evict())?;
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

    /// Takes `total` blocks for a sequence that begins with these contents: as many of the first as are
    /// known, and free ones for the rest. None where fewer than `beside` would be left free.
    pub fn take_for(&mut self, contents: &[Content], total: u32, beside: u32) -> Option<Taken> {
        let found_max = total.min(contents.len() as u32);
        if self.free() < (total - found_max).saturating_add(beside) {
            return None;
        }
        let mut blocks: Vec<u32> = self.prefixes.find(&contents[..found_max as usize]).collect();
        let (shared, idle) = (blocks.len() as u32, self.idle_of(&blocks));
        let new = total - shared;
        if self.free() < idle.saturating_add(new).saturating_add(beside) {
            return None;
        }
        // First of all, or a new one could be one of them.
        for block in &blocks {
            let held = self.share(*block);
            debug_assert!(held, "block {block} is known and free");
        }
        blocks.extend(self.take_many(new)?);
        Some(Taken { blocks, shared })
    }

    fn idle_of(&self, blocks: &[u32]) -> u32 {
        blocks.iter().filter(|block| self.prefixes.is_idle(**block)).count() as u32
    }

    /// One more holds this block. False where it is free and nothing is known of it, or no block of the
    /// pool.
    pub fn share(&mut self, block: u32) -> bool {
        match self.holders.get_mut(block as usize) {
            Some(holders) if *holders > 0 || self.prefixes.wake(block) => {
                *holders += 1;
                true
            }
            _ => false,
        }
    }

    /// A block that is held is full of this, `depth` blocks behind the first of its sequence, and will
    /// not be written to as long as anybody may share it.
    pub fn publish(&mut self, block: u32, content: Content, depth: u32) {
        if self.holders.get(block as usize).is_some_and(|holders| *holders > 0) {
            self.prefixes.publish(block, content, depth);
        }
    }

    /// Nobody may share these any more who does not hold them already.
    pub fn forget_all(&mut self, blocks: &[u32]) {
        for &block in blocks {
            if self.prefixes.forget(block) {
                self.free.push(block);
            }
        }
    }

    /// One fewer holds this block; with the last it is free, or idle where its content is known. False
    /// where nobody held it.
    pub fn release(&mut self, block: u32) -> bool {
        match self.holders.get_mut(block as usize) {
            Some(holders) if *holders > 0 => {
                *holders -= 1;
                if *holders == 0 && !self.prefixes.rest(block) {
                    self.free.push(block);
                }
                true
            }
            _ => false,
        }
    }

    /// Releases each of these, the last one first, so that they are given again in the same order.
    pub fn release_all(&mut self, blocks: &[u32]) {
        self.prefixes.tick();
        for &block in blocks.iter().rev() {
            let held = self.release(block);
            debug_assert!(held, "block {block} was released and nobody held it");
        }
    }

    /// How many hold each block, by its number.
    pub fn holders(&self) -> &[u32] {
        &self.holders
    }

    /// Every invariant that does not hold, in words: each block is either free, once, or idle, or held.
    pub fn check(&self) -> Vec<String> {
        let mut wrong = self.prefixes.check();
        let mut times_free = vec![0u32; self.holders.len()];
        for &block in &self.free {
            match times_free.get_mut(block as usize) {
                Some(times) => *times += 1,
                None => wrong.push(format!("block {block} is free but not of the pool")),
            }
        }
        for (block, (&free, &holders)) in (0..).zip(times_free.iter().zip(&self.holders)) {
            let idle = u32::from(self.prefixes.is_idle(block));
            if free + idle + holders.min(1) != 1 {
                wrong.push(format!(
                    "block {block} is free {free} times, idle {idle} times and held {holders} times"
                ));
            }
        }
        wrong
    }
}

#[cfg(test)]
mod tests {
    use shoal_protocol::plan::BLOCK_TOKENS;
    use shoal_protocol::prefix::Tenant;

    use super::super::prefixes::Chain;
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

    /// The contents of a sequence of so many full blocks.
    fn contents(blocks: u32) -> Vec<Content> {
        let mut chain = Chain::new(&[1; 32], Tenant::OPEN, None);
        chain.extend(&(0..blocks * BLOCK_TOKENS).collect::<Vec<_>>());
        chain.blocks().to_vec()
    }

    #[test]
    fn a_sequence_takes_what_is_known_and_free_blocks_for_the_rest() {
        let (mut pool, contents) = (BlockPool::new(6), contents(4));
        let first = pool.take_for(&contents, 4, 0).unwrap();
        assert_eq!(first, Taken { blocks: vec![0, 1, 2, 3], shared: 0 });
        (0..3).for_each(|i| pool.publish(first.blocks[i], contents[i], i as u32));
        let second = pool.take_for(&contents, 4, 0).unwrap();
        assert_eq!(second, Taken { blocks: vec![0, 1, 2, 4], shared: 3 });
        assert_eq!(pool.holders(), [2, 2, 2, 1, 1, 0]);
        assert_eq!((pool.free(), pool.used()), (1, 5));
        pool.release_all(&first.blocks);
        assert_eq!(pool.free(), 2, "the block of which nothing is known");
        pool.release_all(&second.blocks);
        assert_eq!((pool.free(), pool.prefixes().idle(), pool.used()), (6, 3, 0));
        assert_eq!(pool.check(), Vec::<String>::new());
        // Those that are free go first, then the end of what is known.
        assert_eq!(pool.take_many(4).map(|blocks| blocks[3]), Some(2));
        let found = pool.take_for(&contents, 2, 0).unwrap();
        assert_eq!(found, Taken { blocks: vec![0, 1], shared: 2 });
        assert_eq!(pool.check(), Vec::<String>::new());
    }

    #[test]
    fn blocks_that_are_shared_do_not_count_as_free_beside() {
        let (mut pool, contents) = (BlockPool::new(4), contents(3));
        let held = pool.take_for(&contents, 3, 0).unwrap();
        (0..3).for_each(|i| pool.publish(held.blocks[i], contents[i], i as u32));
        pool.release_all(&held.blocks);
        assert_eq!(pool.free(), 4);
        assert_eq!(pool.take_for(&contents, 4, 1), None, "three are idle and one is free");
        assert_eq!(pool.take_for(&contents[..2], 4, 1), None);
        assert_eq!((pool.free(), pool.check()), (4, vec![]), "a refusal takes nothing");
        assert_eq!(pool.take_for(&contents, 3, 1).map(|taken| taken.shared), Some(3));
    }

    #[test]
    fn what_is_forgotten_stays_with_those_who_hold_it() {
        let (mut pool, contents) = (BlockPool::new(4), contents(2));
        let first = pool.take_for(&contents, 2, 0).unwrap();
        (0..2).for_each(|i| pool.publish(first.blocks[i], contents[i], i as u32));
        let second = pool.take_for(&contents[..1], 1, 0).unwrap();
        pool.release_all(&first.blocks);
        pool.forget_all(&first.blocks);
        assert_eq!((pool.prefixes().len(), pool.free(), pool.used()), (0, 3, 1));
        pool.release_all(&second.blocks);
        pool.publish(0, contents[0], 0);
        assert_eq!((pool.free(), pool.prefixes().len()), (4, 0), "nobody holds it");
        assert_eq!(pool.check(), Vec::<String>::new());
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
