//! The arithmetic that a deployment pins, and how its cache rounds: together they say which bits come out.
//!
//! ```text
//! contract = how tensor ranks add (n1: as if there were none; n1-sum: partial sums in rank order)
//!          x how keys and values are held (f32: nothing is rounded; kv-bf16, kv-q8_0)
//! ```
//!
//! A cache of fewer bits gives other logits, so it is part of the contract's name: whoever goes on with a
//! stream elsewhere goes on under the same one.

use serde::{Deserialize, Serialize};

/// The type in which a shard holds keys and values.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub enum KvPrecision {
    /// IEEE single precision: nothing is rounded.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// bfloat16.
    #[serde(rename = "bf16")]
    Bf16,
    /// Blocks of 32 dimensions with one scale.
    #[serde(rename = "q8_0")]
    Q8_0,
}

impl KvPrecision {
    /// All of them, in the order in which messages list them.
    pub const ALL: [KvPrecision; 3] = [KvPrecision::F32, KvPrecision::Bf16, KvPrecision::Q8_0];

    /// Bytes of one key (or value) of one head.
    pub const fn vector_bytes(self, head_dim: u64) -> u64 {
        match self {
            KvPrecision::F32 => 4 * head_dim,
            KvPrecision::Bf16 => 2 * head_dim,
            KvPrecision::Q8_0 => head_dim + 2 * head_dim.div_ceil(32),
        }
    }

    /// The word of the CLI.
    pub const fn as_str(self) -> &'static str {
        match self {
            KvPrecision::F32 => "f32",
            KvPrecision::Bf16 => "bf16",
            KvPrecision::Q8_0 => "q8_0",
        }
    }
}

impl std::fmt::Display for KvPrecision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for KvPrecision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|precision| precision.as_str() == text);
        found.ok_or_else(|| {
            format!("`{text}` is no precision of the KV cache; use f32, bf16 or q8_0")
        })
    }
}

/// The arithmetic that a deployment pins: only workers that have it are candidates, and equal
/// contracts promise equal bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Numerics {
    /// `docs/decisions/001-numerics-contract-n1.md`: the same bits on every mesh.
    N1,
    /// The same within a rank; tensor ranks add partial sums in rank order, so that the bits depend on
    /// the mesh (`docs/decisions/029-tensor-ranks.md`).
    #[serde(rename = "n1-sum")]
    N1Sum,
    /// [`Numerics::N1`] over keys and values of bfloat16.
    #[serde(rename = "n1-kv-bf16")]
    N1KvBf16,
    /// [`Numerics::N1`] over keys and values in blocks of q8_0.
    #[serde(rename = "n1-kv-q8_0")]
    N1KvQ8,
    /// [`Numerics::N1Sum`] over keys and values of bfloat16.
    #[serde(rename = "n1-sum-kv-bf16")]
    N1SumKvBf16,
    /// [`Numerics::N1Sum`] over keys and values in blocks of q8_0.
    #[serde(rename = "n1-sum-kv-q8_0")]
    N1SumKvQ8,
}

impl Numerics {
    /// All of them.
    pub const ALL: [Numerics; 6] = [
        Numerics::N1,
        Numerics::N1Sum,
        Numerics::N1KvBf16,
        Numerics::N1KvQ8,
        Numerics::N1SumKvBf16,
        Numerics::N1SumKvQ8,
    ];

    /// Whether tensor ranks add partial sums, so that the bits depend on the mesh.
    pub const fn sums(self) -> bool {
        matches!(self, Numerics::N1Sum | Numerics::N1SumKvBf16 | Numerics::N1SumKvQ8)
    }

    /// How keys and values are held.
    pub const fn kv(self) -> KvPrecision {
        match self {
            Numerics::N1 | Numerics::N1Sum => KvPrecision::F32,
            Numerics::N1KvBf16 | Numerics::N1SumKvBf16 => KvPrecision::Bf16,
            Numerics::N1KvQ8 | Numerics::N1SumKvQ8 => KvPrecision::Q8_0,
        }
    }

    /// The same with keys and values held so.
    #[must_use]
    pub const fn with_kv(self, kv: KvPrecision) -> Self {
        match (self.sums(), kv) {
            (false, KvPrecision::F32) => Numerics::N1,
            (false, KvPrecision::Bf16) => Numerics::N1KvBf16,
            (false, KvPrecision::Q8_0) => Numerics::N1KvQ8,
            (true, KvPrecision::F32) => Numerics::N1Sum,
            (true, KvPrecision::Bf16) => Numerics::N1SumKvBf16,
            (true, KvPrecision::Q8_0) => Numerics::N1SumKvQ8,
        }
    }
}

impl std::fmt::Display for Numerics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.sums() { "n1-sum" } else { "n1" })?;
        match self.kv() {
            KvPrecision::F32 => Ok(()),
            kv => write!(f, "-kv-{kv}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_contract_is_a_way_to_add_and_a_way_to_hold() {
        for numerics in Numerics::ALL {
            assert_eq!(numerics.with_kv(numerics.kv()), numerics);
            // What people read is what scripts read.
            let written = serde_json::to_string(&numerics).unwrap();
            assert_eq!(written, format!("\"{numerics}\""));
        }
        assert_eq!(Numerics::N1Sum.with_kv(KvPrecision::Q8_0).to_string(), "n1-sum-kv-q8_0");
        assert!(!Numerics::N1KvBf16.sums() && Numerics::N1SumKvBf16.sums());
    }

    #[test]
    fn the_first_two_stand_where_older_builds_look_for_them() {
        let numbers = Numerics::ALL.map(|numerics| postcard::to_stdvec(&numerics).unwrap());
        assert_eq!(numbers, [[0], [1], [2], [3], [4], [5]].map(|number| number.to_vec()));
    }
}
