//! What KV blocks hold: full ones by their content, so that a sequence that begins as another did takes
//! its blocks instead of computing them.
//!
//! ```text
//! seed = H(key; tenant, adapter)      block i = H(block i-1; the 16 ids of block i)      H: BLAKE3, keyed
//!
//!           publish (its rows came back)             last holder leaves
//! held ────────────────────────────────► held, known ───────────────► idle, known ──► given away: unknown
//!                                             ▲──────── share ─────────────┘   the least recently used first
//! ```
//!
//! A block's hash stands for all tokens up to its end, for who asked and for the adapter, so equal hashes
//! mean equal contents; 128 bits of a keyed hash of cryptographic strength are taken for equality. Which
//! block of two with equal contents is known does not matter, as their bits are equal (decisions/001).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use shoal_protocol::id::{AdapterId, TokenId};
use shoal_protocol::plan::BLOCK_TOKENS;
use shoal_protocol::prefix::Tenant;

/// What a full block holds, and all blocks before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Content([u8; 16]);

/// The contents of a sequence's full blocks, as far as its tokens are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    blocks: Vec<Content>,
    /// The whole hash of the last block, or the seed: the next one's key.
    end: [u8; 32],
}

impl Chain {
    /// Of a sequence without tokens. Only what was made with one `key` can be compared.
    pub fn new(key: &[u8; 32], tenant: Tenant, adapter: Option<AdapterId>) -> Self {
        let mut seed = [0; 24];
        seed[..16].copy_from_slice(&tenant.0.to_le_bytes());
        seed[16..].copy_from_slice(&u64::from(AdapterId::to_wire(adapter)).to_le_bytes());
        Self { blocks: Vec::new(), end: *blake3::keyed_hash(key, &seed).as_bytes() }
    }

    /// Adds the blocks that these tokens, all of the sequence, fill.
    pub fn extend(&mut self, tokens: &[TokenId]) {
        let known = self.blocks.len() * BLOCK_TOKENS as usize;
        let new = tokens.get(known..).unwrap_or_default();
        for block in new.chunks_exact(BLOCK_TOKENS as usize) {
            let mut ids = [0; 4 * BLOCK_TOKENS as usize];
            for (into, id) in ids.chunks_exact_mut(4).zip(block) {
                into.copy_from_slice(&id.to_le_bytes());
            }
            self.end = *blake3::keyed_hash(&self.end, &ids).as_bytes();
            let mut content = [0; 16];
            content.copy_from_slice(&self.end[..16]);
            self.blocks.push(Content(content));
        }
    }

    /// The full blocks, from the first on.
    pub fn blocks(&self) -> &[Content] {
        &self.blocks
    }
}

/// What is known of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Note {
    content: Content,
    /// How many blocks of its chain stand before it.
    depth: u32,
    /// Since when nobody holds it, in the order of such times; `None` while somebody does.
    idle: Option<u64>,
}

/// Which blocks are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefixes {
    known: BTreeMap<Content, u32>,
    /// By block.
    notes: Vec<Option<Note>>,
    /// Known blocks that nobody holds, in the order in which they are given away: those that were let go
    /// first, and of those that were let go together the last of their chain, since a block without those
    /// before it is of no use.
    idle: BTreeSet<(u64, Reverse<u32>, u32)>,
    clock: u64,
    evictions: u64,
}

impl Prefixes {
    /// Nothing is known of `total` blocks.
    pub fn new(total: u32) -> Self {
        Self {
            known: BTreeMap::new(),
            notes: vec![None; total as usize],
            idle: BTreeSet::new(),
            clock: 0,
            evictions: 0,
        }
    }

    /// Blocks whose content is known.
    pub fn len(&self) -> u32 {
        self.known.len() as u32
    }

    /// Those of them that nobody holds.
    pub fn idle(&self) -> u32 {
        self.idle.len() as u32
    }

    /// Known blocks that were given away so far.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// The blocks with these contents, up to the first that is not known.
    pub fn find<'a>(&'a self, contents: &'a [Content]) -> impl Iterator<Item = u32> + 'a {
        contents.iter().map_while(|content| self.known.get(content).copied())
    }

    /// Whether nobody holds this known block.
    pub fn is_idle(&self, block: u32) -> bool {
        self.note(block).is_some_and(|note| note.idle.is_some())
    }

    /// Somebody holds this block and has filled it. Where another block is known for the same content,
    /// or the block for another, nothing changes.
    pub fn publish(&mut self, block: u32, content: Content, depth: u32) {
        let Some(note) = self.notes.get_mut(block as usize) else { return };
        if note.is_none() && !self.known.contains_key(&content) {
            *note = Some(Note { content, depth, idle: None });
            self.known.insert(content, block);
        }
    }

    /// What is let go from now on is let go together.
    pub fn tick(&mut self) {
        self.clock += 1;
    }

    /// Nobody holds this block any more. False where it is not known: it is free.
    pub fn rest(&mut self, block: u32) -> bool {
        let Some(Some(note)) = self.notes.get_mut(block as usize) else { return false };
        note.idle = Some(self.clock);
        self.idle.insert((self.clock, Reverse(note.depth), block));
        true
    }

    /// Somebody holds this block again. False where it was not idle.
    pub fn wake(&mut self, block: u32) -> bool {
        let Some(Some(note)) = self.notes.get_mut(block as usize) else { return false };
        let Some(since) = note.idle.take() else { return false };
        self.idle.remove(&(since, Reverse(note.depth), block))
    }

    /// Gives the least recently used idle block away.
    pub fn evict(&mut self) -> Option<u32> {
        let (_, _, block) = *self.idle.first()?;
        self.forget(block);
        self.evictions += 1;
        Some(block)
    }

    /// Nothing is known of this block any more. Says whether it was idle: it is free now.
    pub fn forget(&mut self, block: u32) -> bool {
        let Some(note) = self.notes.get_mut(block as usize).and_then(Option::take) else {
            return false;
        };
        self.known.remove(&note.content);
        note.idle.is_some_and(|since| self.idle.remove(&(since, Reverse(note.depth), block)))
    }

    /// Every invariant that does not hold, in words.
    pub fn check(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for (content, block) in &self.known {
            if self.note(*block).is_none_or(|note| note.content != *content) {
                wrong.push(format!("block {block} is known for what it does not hold"));
            }
        }
        let noted = || (0..).zip(&self.notes).filter_map(|(block, note)| Some((block, (*note)?)));
        for (block, note) in noted() {
            let listed = note.idle.map(|since| (since, Reverse(note.depth), block));
            if listed.is_some_and(|listed| !self.idle.contains(&listed)) {
                wrong.push(format!("block {block} is idle and not listed"));
            }
        }
        let idle = noted().filter(|(_, note)| note.idle.is_some()).count();
        if noted().count() != self.known.len() || idle != self.idle.len() {
            wrong.push(format!(
                "{} blocks are noted and {} known, {idle} are idle and {} listed",
                noted().count(),
                self.known.len(),
                self.idle.len()
            ));
        }
        wrong
    }

    fn note(&self, block: u32) -> Option<&Note> {
        self.notes.get(block as usize)?.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; 32] = [7; 32];

    fn chain(tenant: u128, adapter: Option<u32>, tokens: &[TokenId]) -> Vec<Content> {
        let mut chain = Chain::new(&KEY, Tenant(tenant), adapter.map(AdapterId));
        chain.extend(tokens);
        chain.blocks().to_vec()
    }

    #[test]
    fn a_block_is_all_that_stands_before_it_and_who_asked_with_what() {
        let tokens: Vec<TokenId> = (0..80).collect();
        let of = chain(1, None, &tokens);
        assert_eq!(of.len(), 5);
        assert_eq!(chain(1, None, &tokens[..79]), of[..4], "full blocks alone");
        let mut grown = Chain::new(&KEY, Tenant(1), None);
        (0..=80).for_each(|len| grown.extend(&tokens[..len]));
        assert_eq!(grown.blocks(), of, "token by token as at once");

        let mut other = tokens.clone();
        other[20] = 7;
        let other = chain(1, None, &other);
        assert_eq!(other[0], of[0]);
        let differs = |other: &[Content]| other.iter().zip(&of).all(|(a, b)| a != b);
        assert!(differs(&other[1..]) || other[1] != of[1], "what follows a difference differs");
        assert!((1..5).all(|i| other[i] != of[i]));
        assert!(differs(&chain(2, None, &tokens)), "another tenant");
        assert!(differs(&chain(1, Some(3), &tokens)), "an adapter");
        let mut keyed = Chain::new(&[8; 32], Tenant(1), None);
        keyed.extend(&tokens);
        assert!(differs(keyed.blocks()), "another process");
    }

    #[test]
    fn what_was_let_go_first_goes_first_and_of_a_chain_its_end() {
        let mut prefixes = Prefixes::new(8);
        let of = |tenant| chain(tenant, None, &(0..48).collect::<Vec<_>>());
        for (block, content) in (0..).zip(of(1).into_iter().chain(of(2))) {
            prefixes.publish(block, content, block % 3);
        }
        prefixes.tick();
        assert!([2, 1, 0].into_iter().all(|block| prefixes.rest(block)));
        prefixes.tick();
        assert!([5, 4, 3].into_iter().all(|block| prefixes.rest(block)));
        assert_eq!((prefixes.len(), prefixes.idle()), (6, 6));
        // The first chain is used once more.
        assert!([0, 1].into_iter().all(|block| prefixes.wake(block)));
        prefixes.tick();
        assert!([1, 0].into_iter().all(|block| prefixes.rest(block)));
        assert_eq!(prefixes.check(), Vec::<String>::new());
        let order: Vec<u32> = std::iter::from_fn(|| prefixes.evict()).collect();
        assert_eq!(order, [2, 5, 4, 3, 1, 0]);
        assert_eq!((prefixes.len(), prefixes.evictions()), (0, 6));
    }

    #[test]
    fn a_content_is_known_of_one_block_and_until_it_is_forgotten() {
        let mut prefixes = Prefixes::new(4);
        let contents = chain(1, None, &(0..64).collect::<Vec<_>>());
        prefixes.publish(0, contents[0], 0);
        prefixes.publish(1, contents[0], 0);
        prefixes.publish(0, contents[3], 3);
        prefixes.publish(2, contents[2], 2);
        prefixes.publish(9, contents[1], 1);
        assert_eq!(prefixes.find(&contents).collect::<Vec<_>>(), [0], "up to what is missing");
        assert!(!prefixes.rest(1), "it was not taken for the content: it is free");
        assert!(!prefixes.wake(0) && prefixes.rest(0) && prefixes.forget(0));
        assert!(!prefixes.forget(0) && !prefixes.forget(2), "not idle");
        assert_eq!((prefixes.find(&contents).count(), prefixes.len()), (0, 0));
        assert_eq!(prefixes.check(), Vec::<String>::new());
    }
}
