//! A model as a tensor rank has it. What a rank holds is `shoal_protocol::model::split`'s arithmetic; here it
//! stands beside the whole model, and the most ranks are put into words.

use std::fmt;

use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::split::or_exact;
use shoal_protocol::model::{Part, Split};
use shoal_protocol::plan::{Precision, PretendSpec};

use super::ModelShape;

/// The most ranks of a pretend model, which has no heads to count: more than anybody has tried.
const PRETEND_RANKS_MAX: u32 = 64;

/// The usual bound of ranks, as `ModelSpec::ranks_max` calls it.
const HEADS: &str = "key/value heads";

/// The most ranks that a stage of this model can have, and what bounds them: where results are summed and
/// weights held in blocks, whole blocks do.
pub fn ranks_max(shape: &ModelShape, reduction: Reduction, held: Precision) -> (u32, &'static str) {
    match shape {
        ModelShape::Checkpoint(spec) => {
            let (most, what) = spec.ranks_max_held(reduction, held);
            (most.max(1), what)
        }
        ModelShape::Encoder(spec) => {
            let (most, what) = spec.sizes().ranks_max_held(reduction, held);
            (most.max(1), what)
        }
        ModelShape::Pretend(_) => (PRETEND_RANKS_MAX, "ranks that anybody has tried"),
    }
}

/// One rank of a model.
#[derive(Clone, Debug)]
pub(super) struct Slice {
    /// The model: of a pretend one as small as the rank.
    pub shape: ModelShape,
    /// What it has of a model with tensors; `None`: all.
    pub part: Option<Part>,
}

/// This rank of a model; a rank that cannot be is as large as all of it.
pub(super) fn slice(
    shape: &ModelShape,
    split: Split,
    (reduction, held): (Reduction, Precision),
) -> Slice {
    if split.is_whole() {
        return Slice { shape: shape.clone(), part: None };
    }
    match shape {
        ModelShape::Checkpoint(spec) => {
            let part = spec.part(split, reduction, held).ok();
            Slice { shape: shape.clone(), part }
        }
        ModelShape::Encoder(spec) => {
            let part = spec.part(split, reduction, held).ok();
            Slice { shape: shape.clone(), part }
        }
        // What it says that it takes is modelled; its cache is whole on each rank.
        ModelShape::Pretend(spec) => {
            let layer_weight_bytes = spec.layer_weight_bytes / u64::from(split.ranks);
            let shape = ModelShape::Pretend(PretendSpec { layer_weight_bytes, ..spec.clone() });
            Slice { shape, part: None }
        }
    }
}

/// A number of ranks that a model cannot have, or has, with the arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankSums {
    /// The units of which each rank must have one.
    pub units: u32,
    /// What they are.
    pub what: &'static str,
    /// The ranks that were asked for.
    pub ranks: u32,
    /// The most that there could be with `--reduction exact`, which cuts no blocks.
    pub exact: u32,
}

impl fmt::Display for RankSums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { units, what, ranks, exact } = *self;
        let units_words = match what {
            HEADS => plural(units, "KV head"),
            // One of them is of one kind, in one word.
            _ if units == 1 => match what.split_once("s ") {
                Some((one, rest)) => format!("1 {one} {rest}"),
                None => format!("1 {}", what.trim_end_matches('s')),
            },
            _ => format!("{units} {what}"),
        };
        let rank = plural(ranks, "rank");
        if ranks > units {
            let possible = match units {
                0 | 1 => "1 rank".to_owned(),
                2 => "1 or 2 ranks".to_owned(),
                most => format!("1 to {most} ranks"),
            };
            let more = or_exact(units, exact);
            return write!(
                f,
                "{units_words} on {rank}: a rank would hold none; possible: {possible}{more}"
            );
        }
        let until = |rank: u32| u64::from(rank) * u64::from(units) / u64::from(ranks.max(1));
        let mut parts: Vec<u64> = (0..ranks).map(|rank| until(rank + 1) - until(rank)).collect();
        parts.sort_unstable_by(|a, b| b.cmp(a));
        let parts: Vec<String> = parts.iter().map(u64::to_string).collect();
        write!(f, "{units_words} on {rank}: {}: possible", parts.join(", "))
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
        let panels = "panels of 16 in the width of its MLP";
        let blocks = RankSums { units: 1, what: "runs of heads", ranks: 2, exact: 4 };
        assert_eq!(
            blocks.to_string(),
            "1 run of heads on 2 ranks: a rank would hold none; possible: 1 rank, or up to 4 with --reduction exact, \
             which cuts no blocks"
        );
        for (units, what, ranks, expected) in [
            (8, HEADS, 3, "8 KV heads on 3 ranks: 3, 3, 2: possible"),
            (2, HEADS, 4, "2 KV heads on 4 ranks: a rank would hold none; possible: 1 or 2 ranks"),
            (1, HEADS, 2, "1 KV head on 2 ranks: a rank would hold none; possible: 1 rank"),
            (7, HEADS, 8, "7 KV heads on 8 ranks: a rank would hold none; possible: 1 to 7 ranks"),
            (
                3,
                panels,
                4,
                "3 panels of 16 in the width of its MLP on 4 ranks: a rank would hold none; possible: 1 to 3 ranks",
            ),
        ] {
            assert_eq!(RankSums { units, what, ranks, exact: 0 }.to_string(), expected);
        }
    }
}
