//! The arithmetic that a deployment pins, and how its cache rounds: together they say which bits come out.
//!
//! ```text
//! contract = what products are of (n1: values; n2: whole numbers, where weights are in blocks of these)
//!          x how tensor ranks add (as if there were none; sum: partial sums in rank order)
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

/// What rows are when they are multiplied with weights in blocks of whole numbers.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub enum Activations {
    /// Values as they are: a product has the bits that it has with the values that the blocks stand for.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// Rounded to whole numbers in blocks of 32, as llama.cpp does: tokens take some 0.7 of the time, prompts a quarter.
    #[serde(rename = "int8")]
    Int8,
}

impl Activations {
    /// All of them.
    pub const ALL: [Activations; 2] = [Activations::F32, Activations::Int8];

    /// The word of the CLI.
    pub const fn as_str(self) -> &'static str {
        match self {
            Activations::F32 => "f32",
            Activations::Int8 => "int8",
        }
    }
}

impl std::fmt::Display for Activations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Activations {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|activations| activations.as_str() == text);
        found.ok_or_else(|| format!("`{text}` is no type of activations; use f32 or int8"))
    }
}

/// The arithmetic that a deployment pins: equal contracts promise equal bits. A worker that keeps n1 keeps all that its
/// protocol version knows.
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
    /// `docs/decisions/032-numerics-contract-n2.md`: [`Numerics::N1`] but for products with weights in blocks of
    /// whole numbers.
    N2,
    /// The same, with what [`Numerics::N1Sum`] adds to n1; and so on.
    #[serde(rename = "n2-sum")]
    N2Sum,
    /// See [`Numerics::N1KvBf16`].
    #[serde(rename = "n2-kv-bf16")]
    N2KvBf16,
    /// See [`Numerics::N1KvQ8`].
    #[serde(rename = "n2-kv-q8_0")]
    N2KvQ8,
    /// See [`Numerics::N1SumKvBf16`].
    #[serde(rename = "n2-sum-kv-bf16")]
    N2SumKvBf16,
    /// See [`Numerics::N1SumKvQ8`].
    #[serde(rename = "n2-sum-kv-q8_0")]
    N2SumKvQ8,
}

impl Numerics {
    /// All of them.
    pub const ALL: [Numerics; 12] = {
        use Numerics::*;
        [
            N1,
            N1Sum,
            N1KvBf16,
            N1KvQ8,
            N1SumKvBf16,
            N1SumKvQ8,
            N2,
            N2Sum,
            N2KvBf16,
            N2KvQ8,
            N2SumKvBf16,
            N2SumKvQ8,
        ]
    };

    /// The contract of these three choices; `sums`: tensor ranks add partial sums.
    pub const fn of(activations: Activations, sums: bool, kv: KvPrecision) -> Self {
        use Activations::{F32, Int8};
        match (activations, sums, kv) {
            (F32, false, KvPrecision::F32) => Numerics::N1,
            (F32, false, KvPrecision::Bf16) => Numerics::N1KvBf16,
            (F32, false, KvPrecision::Q8_0) => Numerics::N1KvQ8,
            (F32, true, KvPrecision::F32) => Numerics::N1Sum,
            (F32, true, KvPrecision::Bf16) => Numerics::N1SumKvBf16,
            (F32, true, KvPrecision::Q8_0) => Numerics::N1SumKvQ8,
            (Int8, false, KvPrecision::F32) => Numerics::N2,
            (Int8, false, KvPrecision::Bf16) => Numerics::N2KvBf16,
            (Int8, false, KvPrecision::Q8_0) => Numerics::N2KvQ8,
            (Int8, true, KvPrecision::F32) => Numerics::N2Sum,
            (Int8, true, KvPrecision::Bf16) => Numerics::N2SumKvBf16,
            (Int8, true, KvPrecision::Q8_0) => Numerics::N2SumKvQ8,
        }
    }

    /// What rows are in products with whole numbers.
    pub const fn activations(self) -> Activations {
        use Numerics::*;
        match self {
            N1 | N1Sum | N1KvBf16 | N1KvQ8 | N1SumKvBf16 | N1SumKvQ8 => Activations::F32,
            N2 | N2Sum | N2KvBf16 | N2KvQ8 | N2SumKvBf16 | N2SumKvQ8 => Activations::Int8,
        }
    }

    /// Whether tensor ranks add partial sums, so that the bits depend on the mesh.
    pub const fn sums(self) -> bool {
        use Numerics::*;
        matches!(self, N1Sum | N1SumKvBf16 | N1SumKvQ8 | N2Sum | N2SumKvBf16 | N2SumKvQ8)
    }

    /// How keys and values are held.
    pub const fn kv(self) -> KvPrecision {
        use Numerics::*;
        match self {
            N1 | N1Sum | N2 | N2Sum => KvPrecision::F32,
            N1KvBf16 | N1SumKvBf16 | N2KvBf16 | N2SumKvBf16 => KvPrecision::Bf16,
            N1KvQ8 | N1SumKvQ8 | N2KvQ8 | N2SumKvQ8 => KvPrecision::Q8_0,
        }
    }

    /// The same with keys and values held so.
    #[must_use]
    pub const fn with_kv(self, kv: KvPrecision) -> Self {
        Self::of(self.activations(), self.sums(), kv)
    }
}

impl std::fmt::Display for Numerics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.activations() {
            Activations::F32 => "n1",
            Activations::Int8 => "n2",
        })?;
        if self.sums() {
            f.write_str("-sum")?;
        }
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
    fn a_contract_is_a_way_to_multiply_to_add_and_to_hold() {
        for numerics in Numerics::ALL {
            let of = Numerics::of(numerics.activations(), numerics.sums(), numerics.kv());
            assert_eq!(of, numerics);
            // What people read is what scripts read.
            let written = serde_json::to_string(&numerics).unwrap();
            assert_eq!(written, format!("\"{numerics}\""));
        }
        assert_eq!(Numerics::N1Sum.with_kv(KvPrecision::Q8_0).to_string(), "n1-sum-kv-q8_0");
        assert_eq!(Numerics::N2SumKvBf16.to_string(), "n2-sum-kv-bf16");
        assert!(!Numerics::N1KvBf16.sums() && Numerics::N1SumKvBf16.sums());
    }

    #[test]
    fn each_stands_where_other_builds_look_for_it() {
        for (number, numerics) in (0..).zip(Numerics::ALL) {
            assert_eq!(postcard::to_stdvec(&numerics).unwrap(), [number]);
        }
    }
}
