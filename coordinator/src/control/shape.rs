//! ○ What the planner has to know of a model: how many layers, and what a range of them costs.

use serde::{Deserialize, Serialize};
use shoal_protocol::model::{
    EncoderOutput, EncoderSpec, Family, ModelSpec, Options, Part, RopeScaling, TensorPart,
    TensorRole,
};
use shoal_protocol::plan::{KvPrecision, Precision, PretendSpec, ReplicaLimits, ShardMemory};
use shoal_protocol::units::{Bytes, LayerRange};

use super::planner::experts;
use crate::serving::ServedKind;

/// The shape of a model, of either kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
#[allow(clippy::large_enum_variant)] // One per deployment.
pub enum ModelShape {
    /// A checkpoint's.
    Checkpoint(ModelSpec),
    /// A pretend model's: its weights are a number.
    Pretend(PretendSpec),
    /// An encoder's. Nodes know it from protocol version `version::KNOWS_ENCODERS` on.
    Encoder(EncoderSpec),
}

/// As it stands in the log and in snapshots, where nothing ever changes its form: what the first build
/// knew of a model, and beside it models of which it knew nothing.
#[derive(Clone, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant)] // Lives while one is written or read.
enum Written {
    Checkpoint(FirstSpec),
    Pretend(PretendSpec),
    /// Of everybody who reads it version `KNOWS_FAMILIES` is asked.
    Family(ModelSpec),
    /// Of everybody who reads it version `KNOWS_ENCODERS` is asked.
    Encoder(EncoderSpec),
}

/// [`ModelSpec`] as it was before families had options of their own.
#[derive(Clone, Serialize, Deserialize)]
struct FirstSpec {
    family: Family,
    layers: u32,
    hidden: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    intermediate: u32,
    vocab: u32,
    context_max: u32,
    norm_eps: f32,
    rope_theta: f32,
    rope_scaling: RopeScaling,
    tied_embeddings: bool,
    qkv_bias: bool,
    o_bias: bool,
    mlp_bias: bool,
    qk_norm: bool,
    stored: Precision,
}

impl From<ModelShape> for Written {
    fn from(shape: ModelShape) -> Self {
        let is_new = shape.is_new();
        match shape {
            ModelShape::Pretend(spec) => Written::Pretend(spec),
            ModelShape::Encoder(spec) => Written::Encoder(spec),
            ModelShape::Checkpoint(spec) if is_new => Written::Family(spec),
            ModelShape::Checkpoint(spec) => Written::Checkpoint(FirstSpec {
                family: spec.family,
                layers: spec.layers,
                hidden: spec.hidden,
                heads: spec.heads,
                kv_heads: spec.kv_heads,
                head_dim: spec.head_dim,
                intermediate: spec.intermediate,
                vocab: spec.vocab,
                context_max: spec.context_max,
                norm_eps: spec.norm_eps,
                rope_theta: spec.rope_theta,
                rope_scaling: spec.rope_scaling,
                tied_embeddings: spec.tied_embeddings,
                qkv_bias: spec.qkv_bias,
                o_bias: spec.o_bias,
                mlp_bias: spec.mlp_bias,
                qk_norm: spec.qk_norm,
                stored: spec.stored,
            }),
        }
    }
}

impl From<Written> for ModelShape {
    fn from(written: Written) -> Self {
        match written {
            Written::Pretend(spec) => ModelShape::Pretend(spec),
            Written::Family(spec) => ModelShape::Checkpoint(spec),
            Written::Encoder(spec) => ModelShape::Encoder(spec),
            Written::Checkpoint(first) => ModelShape::Checkpoint(ModelSpec {
                family: first.family,
                layers: first.layers,
                hidden: first.hidden,
                heads: first.heads,
                kv_heads: first.kv_heads,
                head_dim: first.head_dim,
                intermediate: first.intermediate,
                vocab: first.vocab,
                context_max: first.context_max,
                norm_eps: first.norm_eps,
                rope_theta: first.rope_theta,
                rope_scaling: first.rope_scaling,
                tied_embeddings: first.tied_embeddings,
                qkv_bias: first.qkv_bias,
                o_bias: first.o_bias,
                mlp_bias: first.mlp_bias,
                qk_norm: first.qk_norm,
                options: Options::default(),
                stored: first.stored,
            }),
        }
    }
}

impl ModelShape {
    /// Whether the first build has no words for it.
    pub fn is_new(&self) -> bool {
        let spec = match self {
            ModelShape::Checkpoint(spec) => spec,
            ModelShape::Pretend(_) => return false,
            ModelShape::Encoder(_) => return true,
        };
        let first = matches!(spec.family, Family::Llama | Family::Qwen2 | Family::Qwen3)
            && !matches!(
                spec.rope_scaling,
                RopeScaling::Yarn { .. } | RopeScaling::LongRope { .. }
            );
        !first || spec.options != Options::default()
    }

    /// What a deployment of it makes of requests.
    pub fn kind(&self) -> ServedKind {
        match self {
            ModelShape::Checkpoint(_) | ModelShape::Pretend(_) => ServedKind::Generate,
            ModelShape::Encoder(spec) => match spec.output {
                EncoderOutput::Embedding { normalize, .. } => {
                    ServedKind::Embed { width: spec.hidden, normalize }
                }
                EncoderOutput::Scores { labels, .. } => ServedKind::Rank { labels },
            },
        }
    }

    /// What `shoal status` says of a deployment: what keeps it from serving, and where nothing does, what
    /// an encoder is there for.
    pub fn or_kind(&self, reason: String) -> String {
        match self.kind() {
            _ if !reason.is_empty() => reason,
            ServedKind::Generate => reason,
            ServedKind::Embed { width, .. } => format!("an encoder: embeddings of {width} numbers"),
            ServedKind::Rank { labels } => format!("an encoder: scores pairs by {labels} labels"),
        }
    }

    /// The number of layers to split; at least 1.
    pub fn layers(&self) -> u32 {
        match self {
            ModelShape::Checkpoint(spec) => spec.layers,
            ModelShape::Pretend(spec) => spec.layers,
            ModelShape::Encoder(spec) => spec.layers,
        }
    }

    /// The vocabulary's size.
    pub fn vocab(&self) -> u32 {
        match self {
            ModelShape::Checkpoint(spec) => spec.vocab,
            ModelShape::Pretend(spec) => spec.vocab,
            ModelShape::Encoder(spec) => spec.vocab,
        }
    }

    /// The longest context that the model was made for, in tokens.
    pub fn context_max(&self) -> u32 {
        match self {
            ModelShape::Checkpoint(spec) => spec.context_max,
            ModelShape::Pretend(spec) => spec.max_context,
            ModelShape::Encoder(spec) => spec.context_max,
        }
    }

    /// The precision in which the weights are stored.
    pub fn stored(&self) -> Precision {
        match self {
            ModelShape::Checkpoint(spec) => spec.stored,
            ModelShape::Pretend(_) => Precision::F32,
            ModelShape::Encoder(spec) => spec.stored,
        }
    }

    /// The memory of a shard with these layers, to the byte.
    pub fn memory(
        &self,
        layers: LayerRange,
        precision: Precision,
        limits: &ReplicaLimits,
    ) -> ShardMemory {
        match self {
            ModelShape::Checkpoint(spec) => spec.shard_memory(layers, precision, limits),
            ModelShape::Pretend(spec) => spec.shard_memory(layers, limits),
            ModelShape::Encoder(spec) => spec.shard_memory(layers, precision, limits),
        }
    }

    /// The keys and values of a shard, held so. A pretend model's are hashes, which nobody rounds.
    pub fn kv_bytes(
        &self,
        layers: LayerRange,
        part: Option<&Part>,
        blocks: u32,
        held: KvPrecision,
    ) -> Bytes {
        match (self, part) {
            (ModelShape::Checkpoint(spec), None) => spec.kv_bytes_held(layers, blocks, held),
            (ModelShape::Checkpoint(spec), Some(part)) => {
                part.widths(spec).kv_bytes_held(layers, blocks, held)
            }
            (ModelShape::Pretend(spec), _) => spec.kv_bytes(layers, blocks),
            (ModelShape::Encoder(_), _) => Bytes(0),
        }
    }

    /// The weight bytes that a decode step of one row reads in one layer, and after the last layer those of
    /// the output head. The embedding is not among them: a step looks up a row per token there; and of a mixture
    /// of experts only those that the row uses. This is what a stage's time is proportional to, for decode by
    /// memory bandwidth and for prefill by arithmetic.
    pub fn step_bytes(&self, layer: u32, precision: Precision) -> Bytes {
        self.step_bytes_of(layer, None, precision)
    }

    /// The same of one tensor rank; `None`: of all. Of experts as many as the rank has that has the most of a row.
    pub fn step_bytes_of(&self, layer: u32, part: Option<&Part>, precision: Precision) -> Bytes {
        let range = LayerRange::new(layer, layer + 1);
        let is_table = |role| {
            use TensorRole::{Embedding, PositionEmbedding, TypeEmbedding};
            matches!(role, Embedding | PositionEmbedding | TypeEmbedding)
        };
        match self {
            ModelShape::Pretend(spec) => {
                // Modelled time is all there is of a pretend model, and it is the same per layer.
                Bytes(spec.layer_weight_bytes.max(1))
            }
            ModelShape::Encoder(spec) => spec
                .part_tensors(part.unwrap_or(&spec.sizes().whole()), range)
                .iter()
                .filter(|tensor| !is_table(tensor.spec.role))
                .map(|tensor| tensor.held_bytes(precision))
                .sum(),
            ModelShape::Checkpoint(spec) => {
                let whole = spec.whole();
                let part = part.unwrap_or(&whole);
                let used = spec.moe(layer).map(|moe| experts::busiest(&moe, part.split.ranks));
                // A tied head is the embedding, which the last stage reads whole.
                let head_is_table = spec.tied_embeddings && layer + 1 == spec.layers;
                let read = |(tensor, count): &(TensorPart, u64)| {
                    let one = tensor.held_bytes(precision).0;
                    match (tensor.spec.role, used) {
                        (TensorRole::Embedding, _) if !head_is_table => 0,
                        (role, Some(used)) if role.is_expert() => {
                            one.saturating_mul(used.min(count * experts::THOUSAND))
                                / experts::THOUSAND
                        }
                        _ => one * count,
                    }
                };
                Bytes(part.tensor_kinds(spec, range).iter().map(read).sum())
            }
        }
    }

    /// Whether two layers take as much as each other, on any rank and in any precision.
    pub fn alike(&self, a: u32, b: u32) -> bool {
        let last = self.layers().saturating_sub(1);
        let ends = |layer: u32| (layer == 0, layer == last);
        let same = match self {
            ModelShape::Checkpoint(spec) => spec.layer(a) == spec.layer(b),
            ModelShape::Pretend(_) => true,
            // They are few, and nobody has counted which of them are alike.
            ModelShape::Encoder(_) => a == b,
        };
        ends(a) == ends(b) && same
    }
}

/// A small pretend model, for the tests of whatever deploys one.
#[cfg(test)]
pub(super) fn small_pretend(layers: u32, layer_weight_bytes: u64) -> PretendSpec {
    PretendSpec {
        layers,
        hidden: 8,
        vocab: 32,
        max_context: 64,
        seed: 1,
        layer_step_ns: 0,
        layer_row_ns: 0,
        layer_weight_bytes,
    }
}
