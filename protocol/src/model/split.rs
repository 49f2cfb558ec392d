//! What a tensor rank holds: how a stage is cut across its layers.
//!
//! ```text
//! q k v      rows, by key/value head and the query heads of its group      ┐
//! gate up    rows, in panels                                               ├ each rank computes its own
//! shared expert's gate up  rows, in panels                                 │
//! experts    whole ones, by id; the router is on every rank                │
//! sinks, and what takes a head into a compressed cache and out of it: by head │
//! embedding, output head   rows, in blocks of `VOCAB_BLOCK` tokens         ┘
//! o down     sum:   columns, as their inputs are cut; partial results are added in rank order
//!            exact: rows, in panels; their inputs are gathered first, so that each output is one chain over all of k
//! norms, router, what compresses queries, keys and values, and a compressed cache: whole on every rank
//! ```
//!
//! Shares need not be equal: of `n` units over `R` ranks, rank `r` has units `r*n/R .. (r+1)*n/R`. A
//! rank without any is refused. Where columns are cut and weights share a scale in blocks, a unit ends with
//! a block, so that ranks hold the very numbers of an uncut stage.

use std::ops::Range;

use crate::mesh::Reduction;
use crate::model::memory::PANEL_OUTPUTS;
use crate::model::moe::Moe;
use crate::model::options::Options;
use crate::model::spec::ModelSpec;
pub use crate::model::tensor_part::TensorPart;
use crate::model::tensors::{TensorRole, TensorSpec};
use crate::plan::{Assignment, Precision, ReplicaLimits, ReplicaPlan, ShardMemory, StagePlan};
use crate::units::{Bytes, LayerRange};

/// Tokens of one block of the vocabulary: no rank's share ends within one, so that sums over the
/// vocabulary are folded from the same blocks wherever it is cut.
pub const VOCAB_BLOCK: u32 = 1024;

/// Which of how many ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Split {
    /// This one, counted from 0.
    pub rank: u32,
    /// All of the stage.
    pub ranks: u32,
}

impl Split {
    /// A stage of one rank.
    pub const WHOLE: Split = Split { rank: 0, ranks: 1 };

    /// Whether nothing is cut.
    pub fn is_whole(self) -> bool {
        self.ranks <= 1
    }

    /// This rank's share of `units`.
    fn share(self, units: u32) -> Range<u32> {
        let border =
            |rank: u32| (u64::from(units) * u64::from(rank) / u64::from(self.ranks.max(1))) as u32;
        border(self.rank)..border(self.rank + 1)
    }

    /// Its share of a vocabulary.
    pub fn vocab(self, vocab: u32) -> Range<u32> {
        self.share_in(vocab, VOCAB_BLOCK)
    }

    /// Its share of `total` in steps of `unit`; the last step may be shorter.
    fn share_in(self, total: u32, unit: u32) -> Range<u32> {
        let units = self.share(total.div_ceil(unit));
        (units.start * unit).min(total)..(units.end * unit).min(total)
    }
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {}", self.rank, self.ranks)
    }
}

/// What one rank of a stage has of each width of its model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which rank it is.
    pub split: Split,
    /// How results are put together.
    pub reduction: Reduction,
    /// What matrices are held in: where columns are cut, no border is inside of a block of it.
    pub held: Precision,
    /// Key/value heads.
    pub kv_heads: Range<u32>,
    /// Query heads.
    pub heads: Range<u32>,
    /// Of the MLP's width.
    pub intermediate: Range<u32>,
    /// Experts, by id.
    pub experts: Range<u32>,
    /// Of the shared expert's width.
    pub shared: Range<u32>,
    /// Token ids.
    pub vocab: Range<u32>,
    /// Of the stream's width, where outputs are cut.
    pub hidden: Range<u32>,
}

/// A model that cannot be cut over so many ranks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{ranks} tensor ranks: the model has {units} {what}, so that a rank would hold none; possible: \
     1 to {possible} ranks{}", or_exact(*possible, *exact)
)]
pub struct SplitError {
    /// What was asked for.
    pub ranks: u32,
    /// What does not suffice.
    pub what: &'static str,
    /// How many of them there are.
    pub units: u32,
    /// The most ranks that this model can have.
    pub possible: u32,
    /// The most that it can have where results are exact, which cuts no blocks.
    pub exact: u32,
}

/// The way out where more ranks are possible if no block is cut; nothing where there is none.
pub fn or_exact(possible: u32, exact: u32) -> String {
    match exact > possible {
        true => format!(", or up to {exact} with --reduction exact, which cuts no blocks"),
        false => String::new(),
    }
}

/// What bounds the ranks of a model, as refusals call it.
const MLP_PANELS: &str = "panels of 16 in the width of its MLP";
const SHARED_PANELS: &str = "panels of 16 in the width of its shared expert";
/// The same where columns are cut and weights are held in blocks.
const MLP_BLOCKS: &str = "blocks of this precision in the width of its MLP";
const SHARED_BLOCKS: &str = "blocks of this precision in the width of its shared expert";
const HEAD_RUNS: &str = "runs of key/value heads that end where a block of this precision does";

/// What a rank's share is counted in.
struct Units {
    /// Key/value heads.
    heads: u32,
    /// Values of the MLP's width, or of the shared expert's.
    width: u32,
}

impl ModelSpec {
    /// The most tensor ranks of a stage that cuts no columns, or none of blocks; and what bounds them.
    pub fn ranks_max(&self) -> (u32, &'static str) {
        self.ranks_max_held(Reduction::Exact, Precision::F32)
    }

    /// The same with results put together and weights held like this.
    pub fn ranks_max_held(&self, reduction: Reduction, held: Precision) -> (u32, &'static str) {
        let units = self.units(reduction, held);
        let panels = |width: u32| width.div_ceil(PANEL_OUTPUTS as u32);
        let (of_mlp, of_shared) = match units.width > PANEL_OUTPUTS as u32 {
            true => (MLP_BLOCKS, SHARED_BLOCKS),
            false => (MLP_PANELS, SHARED_PANELS),
        };
        let heads = match self.options.mla {
            _ if units.heads > 1 => (self.kv_heads.div_ceil(units.heads), HEAD_RUNS),
            Some(_) => (self.heads, "heads"),
            None => (self.kv_heads, "key/value heads"),
        };
        let any = |is_moe: bool| (0..self.layers).any(|layer| self.moe(layer).is_some() == is_moe);
        let dense = Some((self.intermediate.div_ceil(units.width), of_mlp));
        let moe = self.options.moe.filter(|_| any(true));
        let shared = moe.and_then(|moe| moe.shared);
        [
            Some(heads),
            dense.filter(|_| any(false)),
            moe.map(|moe| (moe.experts, "experts")),
            shared.map(|width| (width.div_ceil(units.width), of_shared)),
            Some((panels(self.hidden), "panels of 16 in the width of its stream")),
        ]
        .into_iter()
        .flatten()
        .min_by_key(|(units, _)| *units)
        .unwrap_or((1, "layers"))
    }

    /// Panels and single heads; where columns are cut that are held in blocks, whole blocks, and as many
    /// heads as end with one.
    fn units(&self, reduction: Reduction, held: Precision) -> Units {
        let block = match reduction {
            // Experts are whole.
            Reduction::Sum => held.of(TensorRole::Down).block().0 as u32,
            Reduction::Exact => 1,
        };
        let columns = self.attention_width() / self.kv_heads.max(1);
        Units { heads: block / common(block, columns), width: block.max(PANEL_OUTPUTS as u32) }
    }

    /// The width of what attention's output projection takes.
    pub fn attention_width(&self) -> u32 {
        self.options.mla.map_or(self.query_width(), |mla| self.heads * mla.value)
    }

    /// What a rank holds of a model whose matrices are held like this; refused where it would hold
    /// nothing. A vocabulary of fewer blocks than ranks is no reason: ranks without a token gather like
    /// the others.
    pub fn part(
        &self,
        split: Split,
        reduction: Reduction,
        held: Precision,
    ) -> Result<Part, SplitError> {
        let (possible, what) = self.ranks_max_held(reduction, held);
        if split.ranks > possible {
            let (exact, _) = self.ranks_max();
            return Err(SplitError { ranks: split.ranks, what, units: possible, possible, exact });
        }
        Ok(self.cut(split, reduction, held))
    }

    /// All of a stage.
    pub fn whole(&self) -> Part {
        self.cut(Split::WHOLE, Reduction::Exact, self.stored)
    }

    fn cut(&self, split: Split, reduction: Reduction, held: Precision) -> Part {
        let units = self.units(reduction, held);
        let kv_heads = split.share_in(self.kv_heads, units.heads);
        let group = self.heads / self.kv_heads.max(1);
        let shared = self.options.moe.and_then(|moe| moe.shared).unwrap_or(0);
        Part {
            split,
            reduction,
            held,
            heads: kv_heads.start * group..kv_heads.end * group,
            kv_heads,
            intermediate: split.share_in(self.intermediate, units.width),
            experts: split.share(self.options.moe.map_or(0, |moe| moe.experts)),
            shared: split.share_in(shared, units.width),
            vocab: split.vocab(self.vocab),
            hidden: split.share_in(self.hidden, PANEL_OUTPUTS as u32),
        }
    }
}

/// The greatest common divisor; `n` is no zero.
fn common(n: u32, other: u32) -> u32 {
    if other == 0 { n } else { common(other, n % other) }
}

impl Part {
    /// The parts of all ranks of the stage, in rank order.
    pub fn all(&self, model: &ModelSpec) -> Vec<Part> {
        let split = |rank| Split { rank, ..self.split };
        let of = |rank| model.part(split(rank), self.reduction, self.held).ok();
        (0..self.split.ranks).filter_map(of).collect()
    }

    /// What this rank holds of a tensor; `None`: nothing.
    pub(super) fn of(&self, spec: TensorSpec, model: &ModelSpec) -> Option<TensorPart> {
        use TensorRole::*;
        let scaled = |range: &Range<u32>, by: u32| {
            u64::from(range.start) * u64::from(by)..u64::from(range.end) * u64::from(by)
        };
        let rows_all = 0..spec.shape[0];
        let columns_all = 0..if spec.is_matrix { spec.shape[1] } else { 1 };
        let summed = self.reduction == Reduction::Sum && !self.split.is_whole();
        let is_own = match spec.role {
            role if role.is_expert() => self.experts.contains(&spec.index),
            KeyUp | ValueUp => self.heads.contains(&spec.index),
            _ => true,
        };
        if !is_own {
            return None;
        }
        let (rows, columns) = match spec.role {
            Embedding | OutputHead => (scaled(&self.vocab, 1), columns_all),
            Query | QueryBias => (scaled(&self.heads, model.head_dim), columns_all),
            Key | KeyBias | Value | ValueBias => {
                (scaled(&self.kv_heads, model.head_dim), columns_all)
            }
            Gate | GateBias | Up | UpBias => (scaled(&self.intermediate, 1), columns_all),
            Sinks => (scaled(&self.heads, 1), columns_all),
            SharedGate | SharedUp => (scaled(&self.shared, 1), columns_all),
            AttentionOutput if summed => {
                (rows_all, scaled(&self.heads, model.attention_width() / model.heads.max(1)))
            }
            SharedDown if summed => (rows_all, scaled(&self.shared, 1)),
            Down if summed => (rows_all, scaled(&self.intermediate, 1)),
            // Added once, to the first partial sum.
            AttentionOutputBias | DownBias if summed => {
                (if self.split.rank == 0 { rows_all } else { 0..0 }, columns_all)
            }
            AttentionOutput | AttentionOutputBias | Down | DownBias | SharedDown => {
                (scaled(&self.hidden, 1), columns_all)
            }
            // Norms and their biases, the router, what compresses; of heads and experts own ones.
            _ => (rows_all, columns_all),
        };
        let part = TensorPart { spec, rows, columns };
        (part.row_count() > 0).then_some(part)
    }

    /// The tensors of this rank of a stage, in the order in which a step reads them.
    pub fn tensors(&self, model: &ModelSpec, layers: LayerRange) -> Vec<TensorPart> {
        let all = model.tensors(layers).into_iter();
        all.filter_map(|tensor| self.of(tensor, model)).collect()
    }

    /// The same, where tensors that differ in name and place alone stand there once, with their number.
    pub fn tensor_kinds(&self, model: &ModelSpec, layers: LayerRange) -> Vec<(TensorPart, u64)> {
        use TensorRole::*;
        let own = |(tensor, count): (TensorSpec, u32)| {
            let all = 0..count;
            let own = match tensor.role {
                role if role.is_expert() => &self.experts,
                KeyUp | ValueUp => &self.heads,
                _ => &all,
            };
            let count = u64::from(own.end - own.start);
            let first = TensorSpec { index: own.start, ..tensor };
            let part = (count > 0).then(|| self.of(first, model)).flatten()?;
            Some((part, count))
        };
        model.tensor_kinds(layers).into_iter().filter_map(own).collect()
    }

    /// Everything that the shard takes.
    pub fn memory(
        &self,
        model: &ModelSpec,
        layers: LayerRange,
        precision: Precision,
        limits: &ReplicaLimits,
    ) -> ShardMemory {
        let is_last = layers.end == model.layers;
        let kinds = self.tensor_kinds(model, layers);
        let held = kinds.iter().map(|(tensor, count)| tensor.held_bytes(precision).0 * count);
        let own = self.widths(model);
        ShardMemory {
            weights: Bytes(held.sum()),
            kv: own.kv_bytes(layers, limits.kv_blocks),
            activations: own.scratch_bytes(limits.step_rows_max)
                + self.joining_bytes(model, limits.step_rows_max)
                + limits.buffer_bytes(model.hidden, own.vocab, is_last),
        }
    }

    /// A model as narrow as this rank's part of it: what its scratch and its cache are made for.
    /// The stream keeps its width, and the router all experts.
    pub fn widths(&self, model: &ModelSpec) -> ModelSpec {
        let len = |range: &Range<u32>| range.end - range.start;
        let own = |moe: Moe| Moe { shared: moe.shared.map(|_| len(&self.shared)), ..moe };
        let options = Options { moe: model.options.moe.map(own), ..model.options.clone() };
        ModelSpec {
            heads: len(&self.heads),
            kv_heads: len(&self.kv_heads),
            intermediate: len(&self.intermediate),
            vocab: len(&self.vocab),
            options,
            ..model.clone()
        }
    }

    /// How wide the buffers are that hold what all ranks have of a row.
    pub fn joint_widths(&self, model: &ModelSpec) -> JointWidths {
        if self.split.is_whole() {
            return JointWidths::default();
        }
        let (query, key) = match model.qk_norm && model.options.qk_norm_whole {
            true => (model.query_width(), model.kv_width()),
            false => (0, 0),
        };
        if self.reduction == Reduction::Sum {
            return JointWidths { query, key, ..JointWidths::default() };
        }
        let any = |is_moe: bool| (0..model.layers).any(|l| model.moe(l).is_some() == is_moe);
        let moe = model.options.moe.filter(|_| any(true));
        let dense = if any(false) { model.intermediate } else { 0 };
        JointWidths {
            attended: model.attention_width(),
            gated: dense.max(moe.and_then(|moe| moe.shared).unwrap_or(0)),
            outputs: self.hidden.end - self.hidden.start,
            query,
            key,
        }
    }

    /// The widest row of a message between ranks.
    pub fn message_width(&self, model: &ModelSpec) -> u32 {
        let experts = model.options.moe.map_or(0, |moe| moe.top_k);
        let shared = model.options.moe.and_then(|moe| moe.shared).unwrap_or(0);
        let normed = model.query_width() + model.kv_width();
        let most = match self.reduction {
            // The results of a row's experts, all of which may be one rank's.
            Reduction::Exact => experts * model.hidden,
            Reduction::Sum => 0,
        };
        [model.hidden, normed, model.attention_width(), model.intermediate, shared, most]
            .into_iter()
            .max()
            .unwrap_or(0)
    }

    /// Scratch of what ranks put together, what the device's copy of an input, laid out for a product,
    /// grows by, and what ranks tell each other.
    pub(super) fn joining_bytes(&self, model: &ModelSpec, rows: u32) -> Bytes {
        let joint = self.joint_widths(model);
        let narrow = self.widths(model).scratch_widths().widest();
        let laid_out = joint.widest().saturating_sub(narrow);
        let floats = joint.floats() + laid_out;
        Bytes(u64::from(rows) * floats * size_of::<f32>() as u64)
            + self.travelling_bytes(model, rows)
    }

    /// Of these the part that is messages, this rank's and what comes from all others: it is there while a round is
    /// under way. Partial sums are as wide as the stream: a rank's own and the other one's, or, of more ranks, its own, all
    /// others' of its piece, and the pieces that are added. What is put together is as wide as all of it.
    pub fn travelling_bytes(&self, model: &ModelSpec, rows: u32) -> Bytes {
        if self.split.is_whole() {
            return Bytes(0);
        }
        let hidden = u64::from(model.hidden);
        let joint = self.joint_widths(model);
        let floats = match self.reduction {
            Reduction::Sum => hidden * u64::from(self.split.ranks.min(3)),
            Reduction::Exact => {
                let experts = model.options.moe.map_or(0, |moe| moe.top_k);
                joint.widest().max(hidden * u64::from(experts.max(1)))
            }
        };
        let normed = u64::from(joint.query + joint.key);
        Bytes(u64::from(rows) * floats.max(normed) * size_of::<f32>() as u64)
    }
}

/// How many values a row has in each buffer of what all ranks have; 0 where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JointWidths {
    /// The input of attention's output projection.
    pub attended: u32,
    /// The input of `down`.
    pub gated: u32,
    /// This rank's outputs: a buffer for each of the two.
    pub outputs: u32,
    /// Queries, where one norm is over all of them.
    pub query: u32,
    /// Keys, likewise.
    pub key: u32,
}

impl JointWidths {
    fn buffers(self) -> [u32; 6] {
        let of_gated = if self.gated > 0 { self.outputs } else { 0 };
        [self.attended, self.gated, self.outputs, of_gated, self.query, self.key]
    }

    /// Values of a row in all of them.
    fn floats(self) -> u64 {
        self.buffers().into_iter().map(u64::from).sum()
    }

    fn widest(self) -> u64 {
        self.buffers().into_iter().map(u64::from).max().unwrap_or(0)
    }
}

impl ReplicaPlan {
    /// How the ranks of its stages put their results together.
    pub fn reduction(&self) -> Reduction {
        Reduction::of(self.numerics)
    }
}

impl Assignment {
    /// Which rank of how many this shard is.
    pub fn split(&self) -> Split {
        let stage = self.replica.stages.get(self.stage.0 as usize);
        stage.map_or(Split::WHOLE, |stage| stage.split(self.rank))
    }
}

impl StagePlan {
    /// Which rank of this stage.
    pub fn split(&self, rank: crate::id::RankIndex) -> Split {
        Split { rank: rank.0, ranks: self.shards.len() as u32 }
    }
}

#[cfg(test)]
#[path = "split_test.rs"]
mod tests;
