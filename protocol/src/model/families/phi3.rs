//! Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused projections, a rotation of a part of each head,
//! frequencies stretched by LongRoPE.

use crate::model::config::{Common, window, windowed};
use crate::model::families::Definition;
use crate::model::fields::Fields;
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::{
    ATTENTION_END, EMBEDDING, HEAD, INPUT_NORM, MLP_NORM, Place, Row, Shape,
};
use crate::model::tensors::{Excerpt, TensorRole};

pub(super) const DEFINITION: Definition =
    Definition { architecture: "Phi3ForCausalLM", model_type: "phi3", names: NAMES, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let common = Common { partial_rotary: true, ..Common::of(Family::Phi3) };
    let mut spec = common.read(config)?;
    spec.options.layers = windowed(spec.layers, window(config, None)?, |_| true);
    Ok(spec)
}

const NAMES: &[&[Row]] =
    &[EMBEDDING, INPUT_NORM, FUSED_QKV, ATTENTION_END, MLP_NORM, FUSED_MLP, HEAD];

const QKV: &str = "model.layers.{}.self_attn.qkv_proj.weight";
const GATE_UP: &str = "model.layers.{}.mlp.gate_up_proj.weight";

/// Queries, keys and values, one below the other.
const FUSED_QKV: &[Row] = &[
    Row::new(TensorRole::Query, Place::Layer, QKV, |m| Shape::Matrix(m.query_width(), m.hidden))
        .out_of(|m, _| qkv(m, 0)),
    Row::new(TensorRole::Key, Place::Layer, QKV, |m| Shape::Matrix(m.kv_width(), m.hidden))
        .out_of(|m, _| qkv(m, m.query_width())),
    Row::new(TensorRole::Value, Place::Layer, QKV, |m| Shape::Matrix(m.kv_width(), m.hidden))
        .out_of(|m, _| qkv(m, m.query_width() + m.kv_width())),
];

/// Gate and up, one below the other.
const FUSED_MLP: &[Row] = &[
    Row::new(TensorRole::Gate, Place::Layer, GATE_UP, |m| Shape::Matrix(m.intermediate, m.hidden))
        .out_of(|m, _| gate_up(m, 0)),
    Row::new(TensorRole::Up, Place::Layer, GATE_UP, |m| Shape::Matrix(m.intermediate, m.hidden))
        .out_of(|m, _| gate_up(m, m.intermediate)),
    Row::new(TensorRole::Down, Place::Layer, "model.layers.{}.mlp.down_proj.weight", |m| {
        Shape::Matrix(m.hidden, m.intermediate)
    }),
];

fn qkv(spec: &ModelSpec, first_row: u32) -> Option<Excerpt> {
    let rows = u64::from(spec.query_width() + 2 * spec.kv_width());
    Some(Excerpt::rows(vec![rows, spec.hidden.into()], first_row.into()))
}

fn gate_up(spec: &ModelSpec, first_row: u32) -> Option<Excerpt> {
    let rows = 2 * u64::from(spec.intermediate);
    Some(Excerpt::rows(vec![rows, spec.hidden.into()], first_row.into()))
}
