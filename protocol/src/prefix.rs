//! Beginnings that requests share: who may share with whom, what was found, and what heads count.
//! Since version 3.
//!
//! ```text
//! coordinator ─► Tenant, Generate ─► head        the tenant's blocks may serve this request
//!             ◄─ Reused, Token …  ◄─┘            so many tokens of the prompt were there already
//! agent       ─► WorkerMessage::Prefixes ─► coordinator
//! ```
//!
//! A request without a `Tenant` shares nothing and leaves nothing: it comes from a coordinator that
//! knows of none, or of a cluster in which a stage may know of none.

use serde::{Deserialize, Serialize};

use crate::activation::BlockGrant;
use crate::frame::flat;
use crate::id::{Generation, ReplicaId};

/// Whose requests share what they have in common. Two tenants never do: how soon an answer begins would
/// tell one what another has asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tenant(pub u128);

impl Tenant {
    /// Everybody, where the API asks nobody for a key.
    pub const OPEN: Self = Self(0);
}

flat! {
    /// Whose request comes next on this stream.
    pub struct TenantHeader = 16 {
        /// The upper half.
        pub high: u64,
        /// The lower half.
        pub low: u64,
    }
}

impl TenantHeader {
    /// What is sent for a tenant.
    pub fn of(tenant: Tenant) -> Self {
        Self { high: (tenant.0 >> 64) as u64, low: tenant.0 as u64 }
    }

    /// What was sent.
    pub fn tenant(&self) -> Tenant {
        Tenant(u128::from(self.high) << 64 | u128::from(self.low))
    }
}

flat! {
    /// A sequence begins behind what is known of it. Comes before its first token, where anything was
    /// known, and only to who named a tenant.
    pub struct ReusedHeader = 24 {
        /// The client's request.
        pub request: u64,
        /// Which try this is.
        pub attempt: u32,
        /// The choice.
        pub choice: u32,
        /// Tokens of the prompt that were not computed anew.
        pub tokens: u32,
        /// 0; for later versions.
        pub reserved: u32,
    }
}

impl BlockGrant {
    /// The block is full of what the sequence has at this place: none of its rows is computed again. Such
    /// grants stand before all others of their sequence, and the first row behind them. Sent only where
    /// every stage knows it (`version::KNOWS_PREFIXES`).
    pub const SHARED: u32 = 1;

    /// Whether the block comes with its content.
    pub fn is_shared(&self) -> bool {
        self.flags & Self::SHARED != 0
    }
}

/// What the cache of one head holds and has counted. The counts grow for as long as the head lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PrefixReport {
    /// The replica.
    pub replica: ReplicaId,
    /// Its layout.
    pub generation: Generation,
    /// KV blocks whose content is known.
    pub blocks_known: u32,
    /// Those of them that no sequence uses: they are given away when no other block is free.
    pub blocks_idle: u32,
    /// Sequences that began behind known blocks.
    pub hits: u64,
    /// Sequences that looked for some.
    pub lookups: u64,
    /// Tokens that were looked for.
    pub tokens_asked: u64,
    /// Those of them that were found.
    pub tokens_found: u64,
    /// Known blocks that were given away.
    pub evictions: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_comes_back_from_its_two_halves() {
        for tenant in [Tenant::OPEN, Tenant(1), Tenant(1 << 64), Tenant(u128::MAX - (7 << 60))] {
            assert_eq!(TenantHeader::of(tenant).tenant(), tenant);
        }
    }
}
