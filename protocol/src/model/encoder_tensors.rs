//! Which tensors an encoder has, what they are called in its files, and what a shard of it takes of
//! memory.

use crate::mesh::Reduction;
use crate::model::encoder::{EncoderFamily, EncoderOutput, EncoderSpec};
use crate::model::split::{Part, Split, SplitError, TensorPart};
use crate::model::tensors::{Excerpt, TensorRole, TensorSpec};
use crate::plan::{BLOCK_TOKENS, Precision, ReplicaLimits, ShardMemory};
use crate::units::{Bytes, LayerRange};

/// Activations are f32.
const F32: u64 = 4;

/// Which stages need a row of the table.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    First,
    Layer,
    Last,
}

/// A tensor's role, its name (without the prefix; `{}` is the layer), rows, columns (0: a vector).
type Row = (TensorRole, Place, &'static str, u32, u32);

impl EncoderSpec {
    /// The tensors of a stage, in the order in which a step reads them. The first stage has the
    /// embeddings, the last one what stands behind the layers.
    pub fn tensors(&self, layers: LayerRange) -> Vec<TensorSpec> {
        let rows = match self.family {
            EncoderFamily::Bert | EncoderFamily::Roberta => self.bert_rows(),
            EncoderFamily::ModernBert => self.modern_rows(),
        };
        let at = |place| rows.iter().filter(move |row| row.1 == place);
        let mut tensors = Vec::new();
        if layers.start == 0 {
            tensors.extend(at(Place::First).map(|row| self.tensor(row, None)));
        }
        for layer in layers.iter() {
            // ModernBERT's first layer stands right behind the embedding's norm and has none.
            let modern_first = layer == 0 && self.family == EncoderFamily::ModernBert;
            let has = |row: &&Row| {
                use TensorRole::{AttentionNorm, AttentionNormBias};
                !(modern_first && matches!(row.0, AttentionNorm | AttentionNormBias))
            };
            let rows = at(Place::Layer).filter(has);
            tensors.extend(rows.map(|row| self.tensor(row, Some(layer))));
        }
        if layers.end == self.layers {
            tensors.extend(at(Place::Last).map(|row| self.tensor(row, None)));
        }
        tensors
    }

    /// The name that tells, by being there, that names in the files have no prefix.
    pub fn plain_name(&self) -> &'static str {
        match self.family {
            EncoderFamily::Bert | EncoderFamily::Roberta => "embeddings.word_embeddings.weight",
            EncoderFamily::ModernBert => "embeddings.tok_embeddings.weight",
        }
    }

    fn tensor(&self, row: &Row, layer: Option<u32>) -> TensorSpec {
        let (role, _, name, rows, columns) = *row;
        // What belongs to a head stands beside the encoder, but for BERT's pooler, which is a part of it.
        let beside = name.starts_with("classifier") || name.starts_with("head.");
        let prefix = if self.prefixed && !beside { self.family.prefix() } else { "" };
        let name = layer.map_or(name.to_owned(), |layer| name.replace("{}", &layer.to_string()));
        let shape = match columns {
            0 => vec![u64::from(rows)],
            _ => vec![u64::from(rows), u64::from(columns)],
        };
        let excerpt = self.packed(role).map(|(stored, first_row)| {
            let mut shape = shape.clone();
            shape[0] = u64::from(stored);
            Excerpt::rows(shape, first_row.into())
        });
        let (name, is_matrix) = (format!("{prefix}{name}"), columns > 0);
        TensorSpec { role, layer, index: 0, name, shape, is_matrix, excerpt }
    }

    /// ModernBERT packs query, key and value into one tensor, gate and up into another: how many rows
    /// that has, and the first of them that is meant.
    fn packed(&self, role: TensorRole) -> Option<(u32, u32)> {
        use TensorRole::*;
        if self.family != EncoderFamily::ModernBert {
            return None;
        }
        let (hidden, inner) = (self.hidden, self.intermediate);
        match role {
            Query | QueryBias => Some((3 * hidden, 0)),
            Key | KeyBias => Some((3 * hidden, hidden)),
            Value | ValueBias => Some((3 * hidden, 2 * hidden)),
            // The first half goes through the activation.
            Gate | GateBias => Some((2 * inner, 0)),
            Up | UpBias => Some((2 * inner, inner)),
            _ => None,
        }
    }

    fn bert_rows(&self) -> Vec<Row> {
        use Place::{First, Last, Layer};
        use TensorRole::*;
        let (hidden, inner) = (self.hidden, self.intermediate);
        let mut rows = vec![
            (Embedding, First, "embeddings.word_embeddings.weight", self.vocab, hidden),
            (
                PositionEmbedding,
                First,
                "embeddings.position_embeddings.weight",
                self.positions,
                hidden,
            ),
            (TypeEmbedding, First, "embeddings.token_type_embeddings.weight", self.types, hidden),
            (EmbeddingNorm, First, "embeddings.LayerNorm.weight", hidden, 0),
            (EmbeddingNormBias, First, "embeddings.LayerNorm.bias", hidden, 0),
            (Query, Layer, "encoder.layer.{}.attention.self.query.weight", hidden, hidden),
            (QueryBias, Layer, "encoder.layer.{}.attention.self.query.bias", hidden, 0),
            (Key, Layer, "encoder.layer.{}.attention.self.key.weight", hidden, hidden),
            (KeyBias, Layer, "encoder.layer.{}.attention.self.key.bias", hidden, 0),
            (Value, Layer, "encoder.layer.{}.attention.self.value.weight", hidden, hidden),
            (ValueBias, Layer, "encoder.layer.{}.attention.self.value.bias", hidden, 0),
            (
                AttentionOutput,
                Layer,
                "encoder.layer.{}.attention.output.dense.weight",
                hidden,
                hidden,
            ),
            (AttentionOutputBias, Layer, "encoder.layer.{}.attention.output.dense.bias", hidden, 0),
            (AttentionNorm, Layer, "encoder.layer.{}.attention.output.LayerNorm.weight", hidden, 0),
            (
                AttentionNormBias,
                Layer,
                "encoder.layer.{}.attention.output.LayerNorm.bias",
                hidden,
                0,
            ),
            (Up, Layer, "encoder.layer.{}.intermediate.dense.weight", inner, hidden),
            (UpBias, Layer, "encoder.layer.{}.intermediate.dense.bias", inner, 0),
            (Down, Layer, "encoder.layer.{}.output.dense.weight", hidden, inner),
            (DownBias, Layer, "encoder.layer.{}.output.dense.bias", hidden, 0),
            (MlpNorm, Layer, "encoder.layer.{}.output.LayerNorm.weight", hidden, 0),
            (MlpNormBias, Layer, "encoder.layer.{}.output.LayerNorm.bias", hidden, 0),
        ];
        if let EncoderOutput::Scores { labels, .. } = self.output {
            let names = match self.family {
                EncoderFamily::Roberta => [
                    "classifier.dense.weight",
                    "classifier.dense.bias",
                    "classifier.out_proj.weight",
                    "classifier.out_proj.bias",
                ],
                _ => [
                    "pooler.dense.weight",
                    "pooler.dense.bias",
                    "classifier.weight",
                    "classifier.bias",
                ],
            };
            rows.extend([
                (PoolDense, Last, names[0], hidden, hidden),
                (PoolDenseBias, Last, names[1], hidden, 0),
                (Classifier, Last, names[2], labels, hidden),
                (ClassifierBias, Last, names[3], labels, 0),
            ]);
        }
        rows
    }

    fn modern_rows(&self) -> Vec<Row> {
        use Place::{First, Last, Layer};
        use TensorRole::*;
        let (hidden, inner) = (self.hidden, self.intermediate);
        let mut rows = vec![
            (Embedding, First, "embeddings.tok_embeddings.weight", self.vocab, hidden),
            (EmbeddingNorm, First, "embeddings.norm.weight", hidden, 0),
            (EmbeddingNormBias, First, "embeddings.norm.bias", hidden, 0),
            (AttentionNorm, Layer, "layers.{}.attn_norm.weight", hidden, 0),
            (AttentionNormBias, Layer, "layers.{}.attn_norm.bias", hidden, 0),
            (Query, Layer, "layers.{}.attn.Wqkv.weight", hidden, hidden),
            (QueryBias, Layer, "layers.{}.attn.Wqkv.bias", hidden, 0),
            (Key, Layer, "layers.{}.attn.Wqkv.weight", hidden, hidden),
            (KeyBias, Layer, "layers.{}.attn.Wqkv.bias", hidden, 0),
            (Value, Layer, "layers.{}.attn.Wqkv.weight", hidden, hidden),
            (ValueBias, Layer, "layers.{}.attn.Wqkv.bias", hidden, 0),
            (AttentionOutput, Layer, "layers.{}.attn.Wo.weight", hidden, hidden),
            (AttentionOutputBias, Layer, "layers.{}.attn.Wo.bias", hidden, 0),
            (MlpNorm, Layer, "layers.{}.mlp_norm.weight", hidden, 0),
            (MlpNormBias, Layer, "layers.{}.mlp_norm.bias", hidden, 0),
            (Gate, Layer, "layers.{}.mlp.Wi.weight", inner, hidden),
            (GateBias, Layer, "layers.{}.mlp.Wi.bias", inner, 0),
            (Up, Layer, "layers.{}.mlp.Wi.weight", inner, hidden),
            (UpBias, Layer, "layers.{}.mlp.Wi.bias", inner, 0),
            (Down, Layer, "layers.{}.mlp.Wo.weight", hidden, inner),
            (DownBias, Layer, "layers.{}.mlp.Wo.bias", hidden, 0),
            (FinalNorm, Last, "final_norm.weight", hidden, 0),
            (FinalNormBias, Last, "final_norm.bias", hidden, 0),
        ];
        if let EncoderOutput::Scores { labels, .. } = self.output {
            rows.extend([
                (PoolDense, Last, "head.dense.weight", hidden, hidden),
                (PoolDenseBias, Last, "head.dense.bias", hidden, 0),
                (PoolNorm, Last, "head.norm.weight", hidden, 0),
                (PoolNormBias, Last, "head.norm.bias", hidden, 0),
                (Classifier, Last, "classifier.weight", labels, hidden),
                (ClassifierBias, Last, "classifier.bias", labels, 0),
            ]);
        }
        let present = |row: &Row| match row.0 {
            EmbeddingNormBias | AttentionNormBias | MlpNormBias | FinalNormBias | PoolNormBias => {
                self.norm_bias
            }
            QueryBias | KeyBias | ValueBias | AttentionOutputBias => self.attention_bias,
            GateBias | UpBias | DownBias => self.mlp_bias,
            PoolDenseBias => self.head_bias,
            _ => true,
        };
        rows.retain(present);
        rows
    }
}

/// Memory, to the byte, as [`super::memory`] has it for decoders.
impl EncoderSpec {
    /// Blocks of keys and values that a shard holds: those of one step's inputs in one layer, since no
    /// layer keeps them for the next step.
    pub fn scratch_blocks(&self, limits: &ReplicaLimits) -> u32 {
        // Each input may leave its last block partly empty.
        limits.step_rows_max.div_ceil(BLOCK_TOKENS).saturating_add(limits.sample_rows_max())
    }

    /// What a rank holds of the tensors of a stage. What stands before and behind the layers is whole on
    /// every rank, but for the tokens' table: the rest is small, and every rank has all rows of the stream.
    pub fn part_tensors(&self, part: &Part, layers: LayerRange) -> Vec<TensorPart> {
        let sizes = self.sizes();
        self.tensors(layers).into_iter().filter_map(|tensor| part.of(tensor, &sizes)).collect()
    }

    /// Everything that one shard takes.
    pub fn part_memory(
        &self,
        part: &Part,
        layers: LayerRange,
        precision: Precision,
        limits: &ReplicaLimits,
    ) -> ShardMemory {
        let sizes = self.sizes();
        let own = part.widths(&sizes);
        let is_last = layers.end == self.layers;
        let blocks = u64::from(self.scratch_blocks(limits)) * u64::from(BLOCK_TOKENS);
        let keys_and_values = Bytes(blocks * 2 * u64::from(own.kv_width()) * F32);
        let held = self.part_tensors(part, layers);
        ShardMemory {
            weights: held.iter().map(|tensor| tensor.held_bytes(precision)).sum(),
            kv: Bytes(0),
            activations: own.scratch_bytes(limits.step_rows_max)
                + part.joining_bytes(&sizes, limits.step_rows_max)
                + keys_and_values
                + limits.buffer_bytes(self.hidden, self.output_width(), is_last)
                + self.pooled_bytes(limits, is_last),
        }
    }

    /// The same of a stage that is not cut.
    pub fn shard_memory(
        &self,
        layers: LayerRange,
        precision: Precision,
        limits: &ReplicaLimits,
    ) -> ShardMemory {
        self.part_memory(&self.sizes().whole(), layers, precision, limits)
    }

    /// What a rank holds of each width; see [`ModelSpec::part`](super::ModelSpec::part).
    pub fn part(
        &self,
        split: Split,
        reduction: Reduction,
        held: Precision,
    ) -> Result<Part, SplitError> {
        self.sizes().part(split, reduction, held)
    }

    /// The rows that the last stage pools, and what its head makes of them.
    fn pooled_bytes(&self, limits: &ReplicaLimits, is_last: bool) -> Bytes {
        let hidden = u64::from(self.hidden);
        let floats = match (is_last, self.output) {
            (false, _) => 0,
            (true, EncoderOutput::Embedding { .. }) => hidden,
            (true, EncoderOutput::Scores { labels, .. }) => 2 * hidden + u64::from(labels),
        };
        Bytes(u64::from(limits.sample_rows_max()) * floats * F32)
    }
}
