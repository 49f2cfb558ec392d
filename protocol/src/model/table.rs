//! Weight-name tables: rows, and the groups of rows that families share.
//!
//! A family's table is a list of groups in the order in which a step reads the tensors. Whether a model
//! has a tensor, and its shape, follow from the spec.

use crate::model::spec::ModelSpec;
use crate::model::tensors::{Excerpt, TensorRole, TensorSpec};

/// Which stages need a row of the table.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The first stage, once.
    First,
    /// Each stage, once for each of its layers; `{}` in the name is the layer.
    Layer,
    /// The last stage, once.
    Last,
}

/// Rows, and columns of a matrix.
pub(super) enum Shape {
    Vector(u32),
    Matrix(u32, u32),
}

/// One row of a family's weight-name table.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub(super) role: TensorRole,
    pub(super) place: Place,
    /// `{}` is the layer, `{e}` the index.
    name: &'static str,
    shape: fn(&ModelSpec) -> Shape,
    /// Whether a layer of this model has the tensor.
    present: fn(&ModelSpec, u32) -> bool,
    /// How many there are of it, one an expert or a head.
    count: fn(&ModelSpec) -> u32,
    /// Which part it is of the tensor of this name.
    excerpt: fn(&ModelSpec, u32) -> Option<Excerpt>,
}

impl Row {
    pub(super) const fn new(
        role: TensorRole,
        place: Place,
        name: &'static str,
        shape: fn(&ModelSpec) -> Shape,
    ) -> Self {
        Self { role, place, name, shape, present: |_, _| true, count: |_| 1, excerpt: |_, _| None }
    }

    /// Of models of this kind alone.
    pub(super) const fn when(self, present: fn(&ModelSpec, u32) -> bool) -> Self {
        Self { present, ..self }
    }

    /// One for each of so many.
    pub(super) const fn each(self, count: fn(&ModelSpec) -> u32) -> Self {
        Self { count, ..self }
    }

    /// A part of the tensor of this name.
    pub(super) const fn out_of(self, excerpt: fn(&ModelSpec, u32) -> Option<Excerpt>) -> Self {
        Self { excerpt, ..self }
    }

    /// How many tensors `of` gives.
    pub(super) fn count_of(self, spec: &ModelSpec, layer: Option<u32>) -> u64 {
        match (self.present)(spec, layer.unwrap_or(0)) {
            true => (self.count)(spec).into(),
            false => 0,
        }
    }

    /// The tensors of this row, of a layer or of the whole model.
    pub(super) fn of(self, spec: &ModelSpec, layer: Option<u32>) -> Vec<TensorSpec> {
        let Some((first, count)) = self.kind(spec, layer) else { return Vec::new() };
        let name = self.name_in(layer);
        let tensor = |index: u32| TensorSpec {
            index,
            name: name.replace("{e}", &index.to_string()),
            excerpt: (self.excerpt)(spec, index),
            ..first.clone()
        };
        (0..count).map(tensor).collect()
    }

    /// The first tensor of this row, and how many there are, which differ in name and place alone.
    pub(super) fn kind(self, spec: &ModelSpec, layer: Option<u32>) -> Option<(TensorSpec, u32)> {
        let count = (self.count)(spec);
        if count == 0 || !(self.present)(spec, layer.unwrap_or(0)) {
            return None;
        }
        let (shape, is_matrix) = match (self.shape)(spec) {
            Shape::Vector(len) => (vec![u64::from(len)], false),
            Shape::Matrix(rows, columns) => (vec![u64::from(rows), u64::from(columns)], true),
        };
        let first = TensorSpec {
            role: self.role,
            layer,
            index: 0,
            name: self.name_in(layer).replace("{e}", "0"),
            shape,
            is_matrix,
            excerpt: (self.excerpt)(spec, 0),
        };
        Some((first, count))
    }

    fn name_in(self, layer: Option<u32>) -> String {
        match layer {
            Some(layer) => self.name.replace("{}", &layer.to_string()),
            None => self.name.to_owned(),
        }
    }
}

use Place::{First, Last, Layer};
use Shape::{Matrix, Vector};
use TensorRole::*;

const fn layer(role: TensorRole, name: &'static str, shape: fn(&ModelSpec) -> Shape) -> Row {
    Row::new(role, Layer, name, shape)
}

/// The token embedding.
pub(super) const EMBEDDING: &[Row] =
    &[Row::new(Embedding, First, "model.embed_tokens.weight", |m| Matrix(m.vocab, m.hidden))];

/// The norm before attention.
pub(super) const INPUT_NORM: &[Row] = &[
    layer(AttentionNorm, "model.layers.{}.input_layernorm.weight", |m| Vector(m.hidden)),
    layer(AttentionNormBias, "model.layers.{}.input_layernorm.bias", |m| Vector(m.hidden))
        .when(|m, _| m.options.norm_bias),
];

/// The norm before the MLP, under the name that Llama gave it.
pub(super) const MLP_NORM: &[Row] = &[
    layer(MlpNorm, "model.layers.{}.post_attention_layernorm.weight", |m| Vector(m.hidden)),
    layer(MlpNormBias, "model.layers.{}.post_attention_layernorm.bias", |m| Vector(m.hidden))
        .when(|m, _| m.options.norm_bias),
];

/// The norm after attention.
pub(super) const POST_ATTENTION_NORM: &[Row] =
    &[layer(PostAttentionNorm, "model.layers.{}.post_attention_layernorm.weight", |m| {
        Vector(m.hidden)
    })];

/// The norm before the MLP, beside one after it.
pub(super) const PRE_MLP_NORM: &[Row] =
    &[layer(MlpNorm, "model.layers.{}.pre_feedforward_layernorm.weight", |m| Vector(m.hidden))];

/// The norm after the MLP.
pub(super) const POST_MLP_NORM: &[Row] =
    &[layer(PostMlpNorm, "model.layers.{}.post_feedforward_layernorm.weight", |m| {
        Vector(m.hidden)
    })];

/// Projections of queries, keys and values.
pub(super) const QUERY_KEY_VALUE: &[Row] = &[
    layer(Query, "model.layers.{}.self_attn.q_proj.weight", |m| Matrix(m.query_width(), m.hidden)),
    layer(QueryBias, "model.layers.{}.self_attn.q_proj.bias", |m| Vector(m.query_width()))
        .when(|m, _| m.qkv_bias),
    layer(Key, "model.layers.{}.self_attn.k_proj.weight", |m| Matrix(m.kv_width(), m.hidden)),
    layer(KeyBias, "model.layers.{}.self_attn.k_proj.bias", |m| Vector(m.kv_width()))
        .when(|m, _| m.qkv_bias),
    layer(Value, "model.layers.{}.self_attn.v_proj.weight", |m| Matrix(m.kv_width(), m.hidden)),
    layer(ValueBias, "model.layers.{}.self_attn.v_proj.bias", |m| Vector(m.kv_width()))
        .when(|m, _| m.qkv_bias),
];

/// Norms of queries and keys, the output projection.
pub(super) const ATTENTION_END: &[Row] = &[
    layer(QueryNorm, "model.layers.{}.self_attn.q_norm.weight", |m| {
        Vector(if m.options.qk_norm_whole { m.query_width() } else { m.head_dim })
    })
    .when(|m, _| m.qk_norm),
    layer(KeyNorm, "model.layers.{}.self_attn.k_norm.weight", |m| {
        Vector(if m.options.qk_norm_whole { m.kv_width() } else { m.head_dim })
    })
    .when(|m, _| m.qk_norm),
    layer(Sinks, "model.layers.{}.self_attn.sinks", |m| Vector(m.heads))
        .when(|m, _| m.options.sinks),
    layer(AttentionOutput, "model.layers.{}.self_attn.o_proj.weight", |m| {
        Matrix(m.hidden, m.query_width())
    }),
    layer(AttentionOutputBias, "model.layers.{}.self_attn.o_proj.bias", |m| Vector(m.hidden))
        .when(|m, _| m.o_bias),
];

/// The gated MLP of the layers that have no experts.
pub(super) const MLP: &[Row] = &[
    layer(Gate, "model.layers.{}.mlp.gate_proj.weight", |m| Matrix(m.intermediate, m.hidden))
        .when(|m, layer| m.moe(layer).is_none()),
    layer(GateBias, "model.layers.{}.mlp.gate_proj.bias", |m| Vector(m.intermediate))
        .when(|m, layer| m.mlp_bias && m.moe(layer).is_none()),
    layer(Up, "model.layers.{}.mlp.up_proj.weight", |m| Matrix(m.intermediate, m.hidden))
        .when(|m, layer| m.moe(layer).is_none()),
    layer(UpBias, "model.layers.{}.mlp.up_proj.bias", |m| Vector(m.intermediate))
        .when(|m, layer| m.mlp_bias && m.moe(layer).is_none()),
    layer(Down, "model.layers.{}.mlp.down_proj.weight", |m| Matrix(m.hidden, m.intermediate))
        .when(|m, layer| m.moe(layer).is_none()),
    layer(DownBias, "model.layers.{}.mlp.down_proj.bias", |m| Vector(m.hidden))
        .when(|m, layer| m.mlp_bias && m.moe(layer).is_none()),
];

/// The last norm and the output head, which may be the embedding.
pub(super) const HEAD: &[Row] = &[
    Row::new(FinalNorm, Last, "model.norm.weight", |m| Vector(m.hidden)),
    Row::new(FinalNormBias, Last, "model.norm.bias", |m| Vector(m.hidden))
        .when(|m, _| m.options.norm_bias),
    Row::new(OutputHead, Last, "lm_head.weight", |m| Matrix(m.vocab, m.hidden))
        .when(|m, _| !m.tied_embeddings),
    Row::new(OutputHead, Last, "model.embed_tokens.weight", |m| Matrix(m.vocab, m.hidden))
        .when(|m, _| m.tied_embeddings),
];

/// The names of Llama, in the order in which a step reads the tensors.
pub(super) const LLAMA: &[&[Row]] =
    &[EMBEDDING, INPUT_NORM, QUERY_KEY_VALUE, ATTENTION_END, MLP_NORM, MLP, HEAD];
