//! What a tensor rank holds of a model: the arithmetic of a mesh's other side.
//!
//! ```text
//! KV heads       rank r of R has heads floor(r x kv / R) .. floor((r + 1) x kv / R), and their query heads
//! intermediate   the same over blocks of 16
//! vocabulary     the same over blocks of 1,024
//! ```
//!
//! A rank is then as large as a model with so many heads, such an MLP and such a vocabulary. No rank may be
//! without a KV head.

use std::fmt;

use shoal_protocol::model::ModelSpec;
use shoal_protocol::plan::PretendSpec;

use super::ModelShape;

/// The block in which an MLP's width is split: the outputs of a packed panel.
const INTERMEDIATE_BLOCK: u32 = 16;

/// The block in which a vocabulary is split: sums over it are folded in such blocks.
const VOCAB_BLOCK: u32 = 1024;

/// The most ranks of a pretend model, which has no heads to count: more than anybody has tried.
const PRETEND_RANKS_MAX: u32 = 64;

/// One rank of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// Which, from 0.
    pub rank: u32,
    /// How many there are.
    pub ranks: u32,
}

impl Split {
    /// This rank's part of so many units.
    fn part(self, units: u32) -> u32 {
        let until = |rank: u32| u64::from(rank) * u64::from(units) / u64::from(self.ranks.max(1));
        (until(self.rank + 1) - until(self.rank)) as u32
    }

    /// The same where units come in blocks, the last of which may be shorter.
    fn blocks(self, units: u32, block: u32) -> u32 {
        let until = |rank: u32| {
            let all = u64::from(units.div_ceil(block));
            let blocks = u64::from(rank) * all / u64::from(self.ranks.max(1));
            (blocks * u64::from(block)).min(u64::from(units)) as u32
        };
        until(self.rank + 1) - until(self.rank)
    }
}

/// The most ranks that a stage of this model can have.
pub fn ranks_max(shape: &ModelShape) -> u32 {
    match shape {
        ModelShape::Checkpoint(spec) => spec.kv_heads.max(1),
        ModelShape::Pretend(_) => PRETEND_RANKS_MAX,
    }
}

/// A model as large as this rank of it.
pub(super) fn slice(shape: &ModelShape, split: Split) -> ModelShape {
    if split.ranks <= 1 {
        return shape.clone();
    }
    match shape {
        ModelShape::Checkpoint(spec) => {
            let kv_heads = split.part(spec.kv_heads);
            let group = spec.heads / spec.kv_heads.max(1);
            ModelShape::Checkpoint(ModelSpec {
                heads: kv_heads * group,
                kv_heads,
                intermediate: split.blocks(spec.intermediate, INTERMEDIATE_BLOCK),
                vocab: split.blocks(spec.vocab, VOCAB_BLOCK),
                ..spec.clone()
            })
        }
        ModelShape::Pretend(spec) => ModelShape::Pretend(PretendSpec {
            layer_weight_bytes: spec.layer_weight_bytes / u64::from(split.ranks),
            ..spec.clone()
        }),
    }
}

/// A number of ranks that a model cannot have, or has, with the arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankSums {
    /// The KV heads of the model.
    pub heads: u32,
    /// The ranks that were asked for.
    pub ranks: u32,
}

impl fmt::Display for RankSums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { heads, ranks } = *self;
        let (head, rank) = (plural(heads, "KV head"), plural(ranks, "rank"));
        if ranks > heads {
            let possible = match heads {
                0 | 1 => "1 rank".to_owned(),
                2 => "1 or 2 ranks".to_owned(),
                most => format!("1 to {most} ranks"),
            };
            return write!(f, "{head} on {rank}: a rank would hold none; possible: {possible}");
        }
        let parts = (0..ranks).map(|rank| Split { rank, ranks }.part(heads));
        let mut parts: Vec<u32> = parts.collect();
        parts.sort_unstable_by(|a, b| b.cmp(a));
        let parts: Vec<String> = parts.iter().map(u32::to_string).collect();
        write!(f, "{head} on {rank}: {} heads: possible", parts.join(", "))
    }
}

fn plural(n: u32, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sums_are_shown() {
        for (heads, ranks, expected) in [
            (8, 3, "8 KV heads on 3 ranks: 3, 3, 2 heads: possible"),
            (2, 4, "2 KV heads on 4 ranks: a rank would hold none; possible: 1 or 2 ranks"),
            (1, 2, "1 KV head on 2 ranks: a rank would hold none; possible: 1 rank"),
            (7, 8, "7 KV heads on 8 ranks: a rank would hold none; possible: 1 to 7 ranks"),
        ] {
            assert_eq!(RankSums { heads, ranks }.to_string(), expected);
        }
    }

    #[test]
    fn the_parts_are_the_whole() {
        for ranks in 1..=9 {
            for units in [1, 2, 7, 8, 1003, 11008, 128_256] {
                let all = |of: fn(Split, u32) -> u32| -> u32 {
                    (0..ranks).map(|rank| of(Split { rank, ranks }, units)).sum()
                };
                assert_eq!(all(Split::part), units);
                assert_eq!(all(|split, units| split.blocks(units, 16)), units);
                assert_eq!(all(|split, units| split.blocks(units, 1024)), units);
            }
        }
    }
}
