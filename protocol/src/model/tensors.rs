//! Which tensors a family has, what they are called in its files, and their shapes.

use crate::model::spec::{Family, ModelSpec};
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
}

/// One tensor that a shard needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// What it is for.
    pub role: TensorRole,
    /// The layer; `None` for embedding, final norm and output head.
    pub layer: Option<u32>,
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape, rows first.
    pub shape: Vec<u64>,
    /// Whether it is held in the deployment's precision (matrices) or always as f32 (norms, biases).
    pub is_matrix: bool,
}

impl TensorSpec {
    /// The number of its elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// Which stages need a row of the table.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The first stage, once.
    First,
    /// Each stage, once for each of its layers; `{}` in the name is the layer.
    Layer,
    /// The last stage, once.
    Last,
}

/// One row of a family's weight-name table.
struct Row {
    role: TensorRole,
    place: Place,
    name: &'static str,
    /// Rows, and columns of a matrix.
    shape: fn(&ModelSpec) -> Shape,
    /// Whether a model of this shape has the tensor.
    present: fn(&ModelSpec) -> bool,
}

/// Rows, and columns of a matrix.
enum Shape {
    Vector(u32),
    Matrix(u32, u32),
}

const fn row(
    role: TensorRole,
    place: Place,
    name: &'static str,
    shape: fn(&ModelSpec) -> Shape,
    present: fn(&ModelSpec) -> bool,
) -> Row {
    Row { role, place, name, shape, present }
}

/// The names that Llama, Qwen2 and Qwen3 share, in the order in which a step reads the tensors.
const LLAMA_NAMES: &[Row] = {
    use Place::{First, Last, Layer};
    use Shape::{Matrix, Vector};
    use TensorRole::*;
    const ALWAYS: fn(&ModelSpec) -> bool = |_| true;
    &[
        row(Embedding, First, "model.embed_tokens.weight", |m| Matrix(m.vocab, m.hidden), ALWAYS),
        row(
            AttentionNorm,
            Layer,
            "model.layers.{}.input_layernorm.weight",
            |m| Vector(m.hidden),
            ALWAYS,
        ),
        row(
            Query,
            Layer,
            "model.layers.{}.self_attn.q_proj.weight",
            |m| Matrix(m.query_width(), m.hidden),
            ALWAYS,
        ),
        row(
            QueryBias,
            Layer,
            "model.layers.{}.self_attn.q_proj.bias",
            |m| Vector(m.query_width()),
            |m| m.qkv_bias,
        ),
        row(
            Key,
            Layer,
            "model.layers.{}.self_attn.k_proj.weight",
            |m| Matrix(m.kv_width(), m.hidden),
            ALWAYS,
        ),
        row(
            KeyBias,
            Layer,
            "model.layers.{}.self_attn.k_proj.bias",
            |m| Vector(m.kv_width()),
            |m| m.qkv_bias,
        ),
        row(
            Value,
            Layer,
            "model.layers.{}.self_attn.v_proj.weight",
            |m| Matrix(m.kv_width(), m.hidden),
            ALWAYS,
        ),
        row(
            ValueBias,
            Layer,
            "model.layers.{}.self_attn.v_proj.bias",
            |m| Vector(m.kv_width()),
            |m| m.qkv_bias,
        ),
        row(
            QueryNorm,
            Layer,
            "model.layers.{}.self_attn.q_norm.weight",
            |m| Vector(m.head_dim),
            |m| m.qk_norm,
        ),
        row(
            KeyNorm,
            Layer,
            "model.layers.{}.self_attn.k_norm.weight",
            |m| Vector(m.head_dim),
            |m| m.qk_norm,
        ),
        row(
            AttentionOutput,
            Layer,
            "model.layers.{}.self_attn.o_proj.weight",
            |m| Matrix(m.hidden, m.query_width()),
            ALWAYS,
        ),
        row(
            AttentionOutputBias,
            Layer,
            "model.layers.{}.self_attn.o_proj.bias",
            |m| Vector(m.hidden),
            |m| m.o_bias,
        ),
        row(
            MlpNorm,
            Layer,
            "model.layers.{}.post_attention_layernorm.weight",
            |m| Vector(m.hidden),
            ALWAYS,
        ),
        row(
            Gate,
            Layer,
            "model.layers.{}.mlp.gate_proj.weight",
            |m| Matrix(m.intermediate, m.hidden),
            ALWAYS,
        ),
        row(
            GateBias,
            Layer,
            "model.layers.{}.mlp.gate_proj.bias",
            |m| Vector(m.intermediate),
            |m| m.mlp_bias,
        ),
        row(
            Up,
            Layer,
            "model.layers.{}.mlp.up_proj.weight",
            |m| Matrix(m.intermediate, m.hidden),
            ALWAYS,
        ),
        row(
            UpBias,
            Layer,
            "model.layers.{}.mlp.up_proj.bias",
            |m| Vector(m.intermediate),
            |m| m.mlp_bias,
        ),
        row(
            Down,
            Layer,
            "model.layers.{}.mlp.down_proj.weight",
            |m| Matrix(m.hidden, m.intermediate),
            ALWAYS,
        ),
        row(
            DownBias,
            Layer,
            "model.layers.{}.mlp.down_proj.bias",
            |m| Vector(m.hidden),
            |m| m.mlp_bias,
        ),
        row(FinalNorm, Last, "model.norm.weight", |m| Vector(m.hidden), ALWAYS),
        row(
            OutputHead,
            Last,
            "lm_head.weight",
            |m| Matrix(m.vocab, m.hidden),
            |m| !m.tied_embeddings,
        ),
        row(
            OutputHead,
            Last,
            "model.embed_tokens.weight",
            |m| Matrix(m.vocab, m.hidden),
            |m| m.tied_embeddings,
        ),
    ]
};

/// The weight-name table of a family.
fn names(family: Family) -> &'static [Row] {
    match family {
        // One set of names; what a family has of it follows from its spec.
        Family::Llama | Family::Qwen2 | Family::Qwen3 => LLAMA_NAMES,
    }
}

impl ModelSpec {
    /// The tensors of a stage, in the order in which a step reads them. The first stage
    /// (`layers.start == 0`) has the embedding, the last one (`layers.end == self.layers`) final
    /// norm and output head; tied models read the embedding for both, and a stage that has both
    /// holds it once, as [`TensorRole::Embedding`].
    pub fn tensors(&self, layers: LayerRange) -> Vec<TensorSpec> {
        let rows = || names(self.family).iter().filter(|row| (row.present)(self));
        let is_first = layers.start == 0;
        let is_last = layers.end == self.layers;
        let mut tensors = Vec::new();
        if is_first {
            tensors.extend(rows().filter(|r| r.place == Place::First).map(|r| r.of(self, None)));
        }
        for layer in layers.iter() {
            let layer = Some(layer);
            tensors.extend(rows().filter(|r| r.place == Place::Layer).map(|r| r.of(self, layer)));
        }
        if is_last {
            let held = |row: &&Row| {
                !(is_first && self.tied_embeddings && row.role == TensorRole::OutputHead)
            };
            let last = rows().filter(|r| r.place == Place::Last).filter(held);
            tensors.extend(last.map(|r| r.of(self, None)));
        }
        tensors
    }
}

impl Row {
    fn of(&self, spec: &ModelSpec, layer: Option<u32>) -> TensorSpec {
        let (shape, is_matrix) = match (self.shape)(spec) {
            Shape::Vector(len) => (vec![u64::from(len)], false),
            Shape::Matrix(rows, columns) => (vec![u64::from(rows), u64::from(columns)], true),
        };
        let name = match layer {
            Some(layer) => self.name.replace("{}", &layer.to_string()),
            None => self.name.to_owned(),
        };
        TensorSpec { role: self.role, layer, name, shape, is_matrix }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::spec::RopeScaling;
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
