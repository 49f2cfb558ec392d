//! What a stage needs, and how generous the limits of a replica can be.
//!
//! ```text
//! stage = weights of its layers            (the first has the embedding too, the last norm and head)
//!       + kv_blocks x 16 tokens x its layers x (keys + values of one token, as `--kv` holds them)
//!       + activations of steps of at most step_rows_max rows
//! ```
//!
//! All stages hold the same block numbers, so the stage with the least room for KV decides for the
//! replica. What each part is made of stands in `shoal_protocol::model::memory`. A worked example
//! (the test `the_worked_example_is_true` keeps it so): a pretend model of 4 layers of 100 MiB, width
//! 1,024, on two workers of 300 MiB. Two layers a stage are 200 MiB of weights. Its KV is 8 bytes per
//! token and layer, so the 65,536 tokens that a replica takes at most are 1 MiB a stage. A step of 512
//! rows x 1,024 floats is 2 MiB, and three are in flight: 6 MiB, and on the last stage 256 x 256
//! logits: 0.25 MiB. So the stages need 207 and 207.25 of 300 MiB. On one worker the weights alone
//! would be 400 MiB: refused.

use shoal_protocol::model::{Part, TensorRole};
use shoal_protocol::plan::{BLOCK_TOKENS, KvPrecision, Precision, ReplicaLimits, ShardMemory};
use shoal_protocol::units::{Bytes, LayerRange};

use super::placement::Cut;
use super::split::Slice;
use super::{Candidate, ModelShape, encoders};

/// The most tokens that the KV cache of a replica holds: 256 conversations of 256 tokens. More would
/// take memory for sequences that `SEQUENCES_MAX` does not let in unless they are long, and memory
/// that is not taken is page cache for weights.
pub const KV_TOKENS_MAX: u32 = 65_536;

/// The context that a layout should have room for before balance is looked at: enough for a
/// conversation of some pages. A model with a shorter context needs no more than that.
pub const KV_TOKENS_COMFORTABLE: u32 = 4096;

/// The least that is worth serving: one question and a short answer. Less is refused.
pub const KV_TOKENS_MIN: u32 = 256;

/// Of what a worker has left once the least is taken, one part of so many may go to more KV.
const KV_SHARE: u64 = 2;

/// (rows of a step, sequences at once), the most generous first. Logits and buffers grow with both,
/// and with a large vocabulary and a small budget they would not leave room for the weights.
const STEP_LIMITS: [(u32, u32); 4] = [(512, 256), (256, 64), (128, 16), (32, 4)];

/// What ranges of a model's layers cost in one precision, worked out once per layer, so that a cut
/// can be tried in constant time.
pub(super) struct Costs<'a> {
    shape: &'a ModelShape,
    /// What of it a tensor rank has; `None`: all.
    part: Option<&'a Part>,
    precision: Precision,
    kv: KvPrecision,
    /// Weight bytes of the layers before each one, with embedding and head as if untied.
    weights_before: Vec<u64>,
    /// Bytes that a step reads in the layers before each one.
    step_before: Vec<u64>,
    /// KV bytes of one block of the layers before each one.
    kv_before: Vec<u64>,
    /// Weight bytes of all layers: a tied model holds the embedding once where one stage is first and last.
    whole: u64,
    /// Of a model with tensors: what a row of a step takes of scratch, and how wide its logits are.
    row: Option<(u64, u32)>,
}

impl<'a> Costs<'a> {
    /// Of the whole model.
    pub fn new(shape: &'a ModelShape, precision: Precision) -> Self {
        Self::with(shape, None, precision, KvPrecision::F32)
    }

    /// The same with keys and values held so.
    pub fn holding_kv(self, kv: KvPrecision) -> Self {
        if kv == self.kv {
            return self;
        }
        Self::with(self.shape, self.part, self.precision, kv)
    }

    /// Of one rank.
    pub fn of_rank(slice: &'a Slice, precision: Precision) -> Self {
        Self::with(&slice.shape, slice.part.as_ref(), precision, KvPrecision::F32)
    }

    fn with(
        shape: &'a ModelShape,
        part: Option<&'a Part>,
        precision: Precision,
        kv: KvPrecision,
    ) -> Self {
        let mut weights_before = vec![0];
        let mut step_before = vec![0];
        let mut kv_before = vec![0];
        let push = |sums: &mut Vec<u64>, more: u64| {
            sums.push(sums.last().copied().unwrap_or(0).saturating_add(more));
        };
        // Layers of a few kinds: hundreds of experts are counted once a kind.
        let mut kinds: Vec<(u32, [u64; 3])> = Vec::new();
        for layer in 0..shape.layers() {
            let known = kinds.iter().find(|(other, _)| shape.alike(*other, layer));
            let [weights, kv, step] = known.map(|known| known.1).unwrap_or_else(|| {
                let range = LayerRange::new(layer, layer + 1);
                let one = memory_of(shape, part, (range, precision, kv), &ONE_BLOCK);
                let step = shape.step_bytes_of(layer, part, precision).0;
                let kind = [one.weights.0, one.kv.0, step];
                kinds.push((layer, kind));
                kind
            });
            push(&mut weights_before, weights);
            push(&mut kv_before, kv);
            push(&mut step_before, step);
        }
        let whole = whole_weights(shape, part, precision, &weights_before);
        let row = match shape {
            ModelShape::Checkpoint(spec) => {
                let first = LayerRange::new(0, 1);
                let one = memory_of(shape, part, (first, precision, kv), &ONE_ROW).activations;
                Some((one.0, part.map_or(spec.vocab, |part| part.vocab.end - part.vocab.start)))
            }
            ModelShape::Pretend(_) | ModelShape::Encoder(_) => None,
        };
        Self { shape, part, precision, kv, weights_before, step_before, kv_before, whole, row }
    }

    pub fn shape(&self) -> &'a ModelShape {
        self.shape
    }

    pub fn precision(&self) -> Precision {
        self.precision
    }

    pub fn kv(&self) -> KvPrecision {
        self.kv
    }

    pub fn layers(&self) -> u32 {
        self.shape.layers()
    }

    /// Weight bytes of the layers before each one.
    pub fn weights_before(&self) -> Vec<u64> {
        self.weights_before.clone()
    }

    /// Weight bytes of a range.
    pub fn weights(&self, range: LayerRange) -> Bytes {
        Bytes(between(&self.weights_before, range))
    }

    /// Weight bytes that a step reads in a range: what its time is proportional to.
    pub fn step(&self, range: LayerRange) -> u64 {
        between(&self.step_before, range)
    }

    /// What a shard takes, as the worker will count it.
    pub fn memory(&self, range: LayerRange, limits: &ReplicaLimits) -> ShardMemory {
        let (ModelShape::Checkpoint(spec), Some((row, vocab))) = (self.shape, self.row) else {
            return memory_of(self.shape, self.part, (range, self.precision, self.kv), limits);
        };
        let is_last = range.end == self.layers();
        let kv = between(&self.kv_before, range).saturating_mul(u64::from(limits.kv_blocks));
        let scratch = Bytes(u64::from(limits.step_rows_max).saturating_mul(row));
        ShardMemory {
            weights: if is_last && range.start == 0 {
                Bytes(self.whole)
            } else {
                self.weights(range)
            },
            kv: Bytes(kv),
            activations: scratch + limits.buffer_bytes(spec.hidden, vocab, is_last),
        }
    }

    /// What stages need in all under these limits. Ranges differ only in weights and KV; the rest follows
    /// from whether the stage is the first or the last.
    pub fn needs(&self, limits: &ReplicaLimits) -> Needs {
        let layers = self.layers();
        let of = |start, end| self.memory(LayerRange::new(start, end), limits).activations.0;
        let middle = if layers > 2 { of(1, 2) } else { 0 };
        let blocks = u64::from(limits.kv_blocks);
        let sums = self.weights_before.iter().zip(&self.kv_before);
        let with_kv = |weights: u64, kv: u64| weights.saturating_add(kv.saturating_mul(blocks));
        Needs {
            before: sums.map(|(weights, kv)| with_kv(*weights, *kv)).collect(),
            whole: with_kv(self.whole, self.kv_before[layers as usize]),
            activations: [[middle, of(layers - 1, layers)], [of(0, 1), of(0, layers)]],
        }
    }
}

/// One block of keys and values, and one row.
const ONE_BLOCK: ReplicaLimits = ReplicaLimits {
    kv_blocks: 1,
    context_max: 1,
    step_rows_max: 1,
    sequences_max: 1,
    steps_in_flight_max: 1,
};

/// One row, and no buffers beside its scratch.
const ONE_ROW: ReplicaLimits =
    ReplicaLimits { sequences_max: 0, steps_in_flight_max: 0, ..ONE_BLOCK };

/// The weights of a stage that is all of the model.
fn whole_weights(
    shape: &ModelShape,
    part: Option<&Part>,
    precision: Precision,
    before: &[u64],
) -> u64 {
    let layers = shape.layers();
    let all = before.last().copied().unwrap_or(0);
    let ModelShape::Checkpoint(spec) = shape else {
        let range = LayerRange::new(0, layers);
        return memory_of(shape, part, (range, precision, KvPrecision::F32), &ONE_BLOCK).weights.0;
    };
    if !spec.tied_embeddings || layers <= 1 {
        return all;
    }
    // The last layer's sum has the head too.
    let whole = spec.whole();
    let last = part.unwrap_or(&whole).tensor_kinds(spec, LayerRange::new(layers - 1, layers));
    let head = last.iter().filter(|(tensor, _)| tensor.spec.role == TensorRole::OutputHead);
    let head: u64 = head.map(|(tensor, count)| tensor.held_bytes(precision).0 * count).sum();
    all.saturating_sub(head)
}

fn memory_of(
    shape: &ModelShape,
    part: Option<&Part>,
    (layers, precision, kv): (LayerRange, Precision, KvPrecision),
    limits: &ReplicaLimits,
) -> ShardMemory {
    let memory = match (shape, part) {
        (ModelShape::Checkpoint(spec), Some(part)) => part.memory(spec, layers, precision, limits),
        (ModelShape::Encoder(spec), Some(part)) => {
            spec.part_memory(part, layers, precision, limits)
        }
        _ => shape.memory(layers, precision, limits),
    };
    match kv {
        KvPrecision::F32 => memory,
        kv => ShardMemory { kv: shape.kv_bytes(layers, part, limits.kv_blocks, kv), ..memory },
    }
}

/// What stages need of memory under some limits, as sums over the layers before each one.
#[derive(PartialEq, Eq)]
pub(super) struct Needs {
    /// Weights and KV.
    before: Vec<u64>,
    /// The same of a stage that is first and last.
    whole: u64,
    /// By `[is first][is last]`.
    activations: [[u64; 2]; 2],
}

impl Needs {
    /// What a stage needs.
    pub fn of(&self, range: LayerRange) -> Bytes {
        let is_first = range.start == 0;
        let is_last = range.end as usize + 1 == self.before.len();
        let held = if is_first && is_last { self.whole } else { between(&self.before, range) };
        Bytes(held.saturating_add(self.activations[usize::from(is_first)][usize::from(is_last)]))
    }
}

fn between(sums: &[u64], range: LayerRange) -> u64 {
    sums[range.end as usize] - sums[range.start as usize]
}

/// The limits to try, the most generous first: comfortable contexts with ever smaller steps, then
/// the least context.
pub(super) fn limits_to_try(costs: &Costs<'_>, stages: usize) -> Vec<ReplicaLimits> {
    if let ModelShape::Encoder(spec) = costs.shape() {
        return encoders::limits(spec, stages);
    }
    let context = costs.shape().context_max().max(1);
    let mut goals = vec![KV_TOKENS_COMFORTABLE.min(context), KV_TOKENS_MIN.min(context)];
    goals.dedup();
    let of = |tokens: u32, (rows, sequences)| ReplicaLimits {
        kv_blocks: tokens.div_ceil(BLOCK_TOKENS),
        context_max: context,
        step_rows_max: rows,
        sequences_max: sequences,
        // One in each stage, and one that travels.
        steps_in_flight_max: stages as u32 + 1,
    };
    goals.iter().flat_map(|tokens| STEP_LIMITS.map(|steps| of(*tokens, steps))).collect()
}

/// The same limits with as many KV blocks as all stages have room for, and what follows from them.
///
/// Beyond the context that was planned for, KV takes at most half of what a worker has left: the next
/// deployment, and the next layout of this one beside it, need room too.
pub(super) fn largest_limits(
    costs: &Costs<'_>,
    least: ReplicaLimits,
    cuts: &[Cut],
    workers: &[&Candidate],
) -> ReplicaLimits {
    if matches!(costs.shape(), ModelShape::Encoder(_)) {
        // Its blocks are numbers without memory, and are all there.
        return least;
    }
    let need = |cut: &Cut| {
        let layers = cut.layers;
        move |limits: &ReplicaLimits| costs.memory(layers, limits).total()
    };
    let seats: Vec<_> =
        cuts.iter().zip(workers).map(|(cut, worker)| (need(cut), worker.free())).collect();
    largest(least, &seats)
}

/// The same for any shards: what each needs under which limits, and what its worker has left.
pub(super) fn largest(
    least: ReplicaLimits,
    seats: &[(impl Fn(&ReplicaLimits) -> Bytes, Bytes)],
) -> ReplicaLimits {
    let context = u64::from(least.context_max);
    let tokens_max = u64::from(KV_TOKENS_MAX).min(context * u64::from(least.sequences_max));
    let with = |kv_blocks: u32| ReplicaLimits {
        kv_blocks,
        context_max: least.context_max.min(kv_blocks.saturating_mul(BLOCK_TOKENS)),
        sequences_max: least.sequences_max.min(kv_blocks),
        ..least.clone()
    };
    let bounds: Vec<Bytes> = seats
        .iter()
        .map(|(need, free)| {
            let least = need(&least);
            least + Bytes(free.saturating_sub(least).0 / KV_SHARE)
        })
        .collect();
    let fits = |kv_blocks: u32| {
        let limits = with(kv_blocks);
        seats.iter().zip(&bounds).all(|((need, _), bound)| need(&limits) <= *bound)
    };
    // `least.kv_blocks` fits: the cut was made with it. The largest number that does is found by
    // halving, since memory grows with the number of blocks.
    let mut fitting = least.kv_blocks;
    let mut limit = (tokens_max as u32).div_ceil(BLOCK_TOKENS).max(fitting) + 1;
    while limit - fitting > 1 {
        let middle = fitting + (limit - fitting) / 2;
        if fits(middle) {
            fitting = middle;
        } else {
            limit = middle;
        }
    }
    with(fitting)
}
