//! ○ Which blocks a replica has probably seen: a bounded index of the hashes of what we sent there.
//!
//! A block's hash covers all tokens up to its end, so a replica that has a block has the blocks
//! before it, and the number of known blocks is found by halving.

use shoal_protocol::id::{AdapterId, TokenId};
use shoal_protocol::plan::BLOCK_TOKENS;
use shoal_protocol::prefix::Tenant;

/// Blocks that are remembered per replica: 64 Ki tokens, 32 KiB. What collides is forgotten.
const SLOTS: usize = 4096;

/// The blocks sent to one replica.
#[derive(Clone, Debug, Default)]
pub struct PrefixIndex {
    /// Empty until something is noted. The hash stands in the slot of its low bits.
    slots: Vec<u64>,
}

impl PrefixIndex {
    /// These blocks, from a prompt's first on, were sent.
    pub fn note(&mut self, hashes: &[u64]) {
        if self.slots.is_empty() && !hashes.is_empty() {
            self.slots = vec![0; SLOTS];
        }
        for hash in hashes {
            self.slots[*hash as usize % SLOTS] = *hash;
        }
    }

    /// How many leading blocks are probably there.
    pub fn known(&self, hashes: &[u64]) -> usize {
        if self.slots.is_empty() {
            return 0;
        }
        hashes.partition_point(|hash| self.slots[*hash as usize % SLOTS] == *hash)
    }
}

/// The hash of each full block of a prompt, each over all tokens before it too. They guess at a
/// cache's contents and decide about time alone, so they need not withstand an attacker.
/// What an adapter made of the same tokens is something else, and tenants share nothing.
pub fn block_hashes(
    tokens: &[TokenId],
    (tenant, adapter): (Tenant, Option<AdapterId>),
    out: &mut Vec<u64>,
) {
    out.clear();
    let mut state = 0x5368_6f61_6c00_0001u64 ^ tenant.0 as u64 ^ (tenant.0 >> 64) as u64;
    if let Some(AdapterId(number)) = adapter {
        state = super::dice::mix(state ^ u64::from(number));
    }
    for block in tokens.chunks_exact(BLOCK_TOKENS as usize) {
        for token in block {
            state = super::dice::mix(state ^ u64::from(*token));
        }
        // 0 marks an empty slot.
        out.push(state.max(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_beginnings_have_shared_hashes_and_are_found_again() {
        let tokens: Vec<TokenId> = (0..100).collect();
        let mut other = tokens.clone();
        other[40] = 7;
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let open = (Tenant::OPEN, None);
        block_hashes(&tokens, open, &mut a);
        block_hashes(&other, open, &mut b);
        assert_eq!(a.len(), 6, "full blocks alone");
        assert_eq!(a[..2], b[..2]);
        assert!(a[2..].iter().zip(&b[2..]).all(|(a, b)| a != b), "all that follows differs");
        let mut index = PrefixIndex::default();
        assert_eq!(index.known(&a), 0);
        index.note(&a);
        assert_eq!((index.known(&a), index.known(&b)), (6, 2));
        for (tenant, adapter) in [(Tenant::OPEN, Some(AdapterId(1))), (Tenant(7), None)] {
            block_hashes(&tokens, (tenant, adapter), &mut b);
            assert_eq!((b.len(), index.known(&b)), (6, 0), "{tenant:?}, {adapter:?}");
        }
    }
}
