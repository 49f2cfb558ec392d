//! Which tensors a family has, what they are called in its files, and their shapes.

use crate::model::spec::ModelSpec;
use crate::model::table::{Place, Row};
use crate::units::LayerRange;

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorRole {
    /// Token embedding `[vocab, hidden]`.
    Embedding,
    /// Norm before attention `[hidden]`.
    AttentionNorm,
    /// Query projection `[heads x head_dim, hidden]`.
    Query,
    /// Its bias.
    QueryBias,
    /// Key projection `[kv_heads x head_dim, hidden]`.
    Key,
    /// Its bias.
    KeyBias,
    /// Value projection `[kv_heads x head_dim, hidden]`.
    Value,
    /// Its bias.
    ValueBias,
    /// Norm over each query head `[head_dim]`.
    QueryNorm,
    /// Norm over each key head `[head_dim]`.
    KeyNorm,
    /// Output projection `[hidden, heads x head_dim]`.
    AttentionOutput,
    /// Its bias.
    AttentionOutputBias,
    /// Norm before the MLP `[hidden]`.
    MlpNorm,
    /// Gate projection `[intermediate, hidden]`.
    Gate,
    /// Its bias.
    GateBias,
    /// Up projection `[intermediate, hidden]`.
    Up,
    /// Its bias.
    UpBias,
    /// Down projection `[hidden, intermediate]`.
    Down,
    /// Its bias.
    DownBias,
    /// Norm before the output head `[hidden]`.
    FinalNorm,
    /// Output head `[vocab, hidden]`.
    OutputHead,
    /// Bias of the norm before attention `[hidden]`. Split: whole.
    AttentionNormBias,
    /// Bias of the norm before the MLP `[hidden]`. Split: whole.
    MlpNormBias,
    /// Bias of the norm before the output head `[hidden]`. Split: whole.
    FinalNormBias,
    /// Norm of what attention adds `[hidden]`. Split: whole, applied after the ranks' sum.
    PostAttentionNorm,
    /// Norm of what the MLP adds `[hidden]`. Split: whole, applied after the ranks' sum.
    PostMlpNorm,
    /// Each head's sink `[heads]`. Split: by query head.
    Sinks,
    /// Router `[experts, hidden]`. Split: whole.
    Router,
    /// Its bias `[experts]`. Split: whole.
    RouterBias,
    /// What is added to an expert's score for the choice alone `[experts]`. Split: whole.
    RouterCorrection,
    /// An expert's gate projection `[moe intermediate, hidden]`. Split: rows, or whole experts.
    ExpertGate,
    /// Its bias. Split: as its rows.
    ExpertGateBias,
    /// An expert's up projection `[moe intermediate, hidden]`. Split: rows, or whole experts.
    ExpertUp,
    /// Its bias. Split: as its rows.
    ExpertUpBias,
    /// An expert's down projection `[hidden, moe intermediate]`. Split: columns, or whole experts.
    ExpertDown,
    /// Its bias `[hidden]`. Split: on one rank where columns are split, else whole.
    ExpertDownBias,
    /// The shared expert's gate projection `[shared intermediate, hidden]`. Split: rows.
    SharedGate,
    /// Its up projection `[shared intermediate, hidden]`. Split: rows.
    SharedUp,
    /// Its down projection `[hidden, shared intermediate]`. Split: columns.
    SharedDown,
    /// What weighs the shared expert `[1, hidden]`. Split: whole.
    SharedWeight,
    /// Compression of the query `[q rank, hidden]`. Split: whole; [`TensorRole::Query`] is then
    /// `[heads x head_dim, q rank]`.
    QueryDown,
    /// Its norm `[q rank]`. Split: whole.
    QueryDownNorm,
    /// Compression of keys and values, and the rotated part of the key `[kv rank + rope, hidden]`.
    /// Split: whole, as is the cache.
    KvDown,
    /// Norm of the compressed part `[kv rank]`. Split: whole.
    KvDownNorm,
    /// Takes a head's query to where keys are compressed `[kv rank, nope]`. Split: whole heads.
    KeyUp,
    /// Takes a head's compressed value out `[value, kv rank]`. Split: whole heads.
    ValueUp,
    /// Encoders: table of positions `[positions, hidden]`. Split: whole.
    PositionEmbedding,
    /// Encoders: table of token types `[types, hidden]`. Split: whole.
    TypeEmbedding,
    /// Encoders: norm behind the embeddings `[hidden]`. Split: whole.
    EmbeddingNorm,
    /// Its bias.
    EmbeddingNormBias,
    /// Encoders: dense layer over the pooled row `[hidden, hidden]`. Split: whole.
    PoolDense,
    /// Its bias.
    PoolDenseBias,
    /// Norm behind it `[hidden]`. Split: whole.
    PoolNorm,
    /// Its bias.
    PoolNormBias,
    /// Encoders: head for classification `[labels, hidden]`. Split: whole.
    Classifier,
    /// Its bias.
    ClassifierBias,
}

impl TensorRole {
    /// Whether it is a matrix of an expert of which rows choose some.
    pub const fn is_expert_matrix(self) -> bool {
        matches!(self, TensorRole::ExpertGate | TensorRole::ExpertUp | TensorRole::ExpertDown)
    }

    /// Whether it is one expert's of a mixture.
    pub fn is_expert(self) -> bool {
        use TensorRole::*;
        self.is_expert_matrix() || matches!(self, ExpertGateBias | ExpertUpBias | ExpertDownBias)
    }

    /// Whether it is the weight, not the bias, of a norm.
    pub fn is_norm_weight(self) -> bool {
        use TensorRole::*;
        matches!(
            self,
            AttentionNorm
                | MlpNorm
                | FinalNorm
                | PostAttentionNorm
                | PostMlpNorm
                | QueryNorm
                | KeyNorm
                | QueryDownNorm
                | KvDownNorm
        )
    }
}

/// Which part of a stored tensor a tensor is, where files keep several in one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excerpt {
    /// The stored tensor's shape. All but its last dimension are seen as rows.
    pub stored: Vec<u64>,
    /// The first of its rows that counts.
    pub first_row: u64,
    /// `None`: row `i` of the tensor is row `first_row + i`. Else the tensor lies the other way round:
    /// its rows are columns of the rows from `first_row` on, as many as the tensor has columns.
    pub columns: Option<Columns>,
}

/// Some columns of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    /// The first one.
    pub first: u64,
    /// How far the next one is.
    pub step: u64,
}

impl Excerpt {
    /// Adjacent rows from `first_row` on.
    pub fn rows(stored: Vec<u64>, first_row: u64) -> Self {
        Self { stored, first_row, columns: None }
    }

    /// The same the other way round: columns from `first` on.
    pub fn turned(self, first: u64, step: u64) -> Self {
        Self { columns: Some(Columns { first, step }), ..self }
    }
}

/// One tensor that a shard needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// What it is for.
    pub role: TensorRole,
    /// The layer; `None` for embedding, final norm and output head.
    pub layer: Option<u32>,
    /// Which expert or head; 0 where there is one of it.
    pub index: u32,
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape, rows first.
    pub shape: Vec<u64>,
    /// Whether it is held in the deployment's precision (matrices) or always as f32 (norms, biases).
    pub is_matrix: bool,
    /// Which part it is of the tensor of this name; `None` where it is all of it.
    pub excerpt: Option<Excerpt>,
}

impl TensorSpec {
    /// The number of its elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// The shape of the tensor of this name in the checkpoint.
    pub fn stored_shape(&self) -> &[u64] {
        self.excerpt.as_ref().map_or(&self.shape, |excerpt| &excerpt.stored)
    }
}

impl ModelSpec {
    /// The tensors of a stage, in the order in which a step reads them. The first stage
    /// (`layers.start == 0`) has the embedding, the last one (`layers.end == self.layers`) final
    /// norm and output head; tied models read the embedding for both, and a stage that has both
    /// holds it once, as [`TensorRole::Embedding`].
    pub fn tensors(&self, layers: LayerRange) -> Vec<TensorSpec> {
        self.rows(layers).flat_map(|(row, layer)| row.of(self, layer)).collect()
    }

    /// The same, where of each row of the family's table only the first tensor is listed, with their number:
    /// experts of a layer, or heads, differ in name and place alone. For sums over models of hundreds of experts.
    pub fn tensor_kinds(&self, layers: LayerRange) -> Vec<(TensorSpec, u32)> {
        self.rows(layers).filter_map(|(row, layer)| row.kind(self, layer)).collect()
    }

    /// The rows of the family's table that a stage needs, with the layer of each.
    fn rows(&self, layers: LayerRange) -> impl Iterator<Item = (Row, Option<u32>)> {
        let names = self.family.definition().names;
        let rows = move || names.iter().copied().flatten().copied();
        let is_first = layers.start == 0;
        let is_last = layers.end == self.layers;
        let embedding_is_held = is_first && self.tied_embeddings;
        let first = rows().filter(move |row| is_first && row.place == Place::First);
        let own = layers.iter().flat_map(move |layer| {
            rows().filter(|row| row.place == Place::Layer).map(move |row| (row, Some(layer)))
        });
        let last = rows().filter(move |row| {
            let held = embedding_is_held && row.role == TensorRole::OutputHead;
            is_last && row.place == Place::Last && !held
        });
        first.map(|row| (row, None)).chain(own).chain(last.map(|row| (row, None)))
    }

    /// How many tensors all layers have, without making a list of them.
    pub(super) fn tensor_count(&self) -> u64 {
        let rows = self.family.definition().names.iter().copied().flatten();
        let of_row = |row: &Row| match row.place {
            Place::Layer => (0..self.layers).map(|layer| row.count_of(self, Some(layer))).sum(),
            Place::First | Place::Last => row.count_of(self, None),
        };
        rows.map(of_row).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::options::Options;
    use crate::model::spec::{Family, RopeScaling};
    use crate::plan::Precision;

    fn spec() -> ModelSpec {
        ModelSpec {
            family: Family::Llama,
            layers: 3,
            hidden: 40,
            heads: 6,
            kv_heads: 2,
            head_dim: 12,
            intermediate: 77,
            vocab: 259,
            context_max: 512,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            tied_embeddings: false,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            options: Options::default(),
            stored: Precision::F32,
        }
    }

    fn names(spec: &ModelSpec, start: u32, end: u32) -> Vec<String> {
        spec.tensors(LayerRange::new(start, end))
            .into_iter()
            .map(|t| t.name.replace("model.layers.", "L").replace(".weight", ""))
            .collect()
    }

    #[test]
    fn a_stage_has_its_layers_and_the_ends_have_their_own() {
        let layer = |i: u32| {
            [
                "input_layernorm",
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.o_proj",
                "post_attention_layernorm",
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.down_proj",
            ]
            .map(|name| format!("L{i}.{name}"))
            .to_vec()
        };
        let embedding = vec!["model.embed_tokens".to_owned()];
        let norm = vec!["model.norm".to_owned()];
        let head = vec!["lm_head".to_owned()];
        let tied = ModelSpec { tied_embeddings: true, ..spec() };
        for (spec, start, end, expected) in [
            (spec(), 0, 1, [embedding.clone(), layer(0)].concat()),
            (spec(), 1, 2, layer(1)),
            (spec(), 2, 3, [layer(2), norm.clone(), head].concat()),
            (tied.clone(), 2, 3, [layer(2), norm.clone(), embedding.clone()].concat()),
            (tied, 0, 3, [embedding, layer(0), layer(1), layer(2), norm].concat()),
        ] {
            assert_eq!(names(&spec, start, end), expected, "{start}..{end}");
        }
    }

    #[test]
    fn options_add_their_tensors_with_their_shapes() {
        let plain = spec().tensors(LayerRange::new(1, 2));
        let added = |spec: ModelSpec| {
            spec.tensors(LayerRange::new(1, 2))
                .into_iter()
                .filter(|tensor| !plain.contains(tensor))
                .map(|t| (t.role, t.shape, t.is_matrix))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            added(ModelSpec { qkv_bias: true, ..spec() }),
            [
                (TensorRole::QueryBias, vec![72], false),
                (TensorRole::KeyBias, vec![24], false),
                (TensorRole::ValueBias, vec![24], false),
            ]
        );
        assert_eq!(
            added(ModelSpec { o_bias: true, mlp_bias: true, ..spec() }),
            [
                (TensorRole::AttentionOutputBias, vec![40], false),
                (TensorRole::GateBias, vec![77], false),
                (TensorRole::UpBias, vec![77], false),
                (TensorRole::DownBias, vec![40], false),
            ]
        );
        assert_eq!(
            added(ModelSpec { qk_norm: true, ..spec() }),
            [(TensorRole::QueryNorm, vec![12], false), (TensorRole::KeyNorm, vec![12], false),]
        );
    }
}
