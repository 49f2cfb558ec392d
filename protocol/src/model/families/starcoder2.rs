//! StarCoder2: layer norms with biases, an MLP without gate.

use crate::model::config::{Common, window, windowed};
use crate::model::families::Definition;
use crate::model::fields::Fields;
use crate::model::options::{Activation, NormKind};
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::{
    ATTENTION_END, EMBEDDING, HEAD, INPUT_NORM, MLP_NORM, Place, QUERY_KEY_VALUE, Row, Shape,
};
use crate::model::tensors::TensorRole;

pub(super) const DEFINITION: Definition = Definition {
    architecture: "Starcoder2ForCausalLM",
    model_type: "starcoder2",
    names: NAMES,
    read,
};

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let common = Common {
        kv_optional: false,
        eps_field: "norm_epsilon",
        eps: Some(1e-5),
        activation: ("hidden_act", "gelu_pytorch_tanh", Activation::GeluTanh),
        tied: true,
        ..Common::of(Family::StarCoder2)
    };
    let mut spec = common.read(config)?;
    spec.qkv_bias = config.flag("use_bias", true)?;
    spec.o_bias = spec.qkv_bias;
    spec.mlp_bias = spec.qkv_bias;
    spec.options.norm = NormKind::Layer;
    spec.options.norm_bias = true;
    spec.options.gated = false;
    spec.options.layers = windowed(spec.layers, window(config, None)?, |_| true);
    Ok(spec)
}

const NAMES: &[&[Row]] =
    &[EMBEDDING, INPUT_NORM, QUERY_KEY_VALUE, ATTENTION_END, MLP_NORM, UP_DOWN, HEAD];

/// The MLP's two projections.
const UP_DOWN: &[Row] = &[
    Row::new(TensorRole::Up, Place::Layer, "model.layers.{}.mlp.c_fc.weight", |m| {
        Shape::Matrix(m.intermediate, m.hidden)
    }),
    Row::new(TensorRole::UpBias, Place::Layer, "model.layers.{}.mlp.c_fc.bias", |m| {
        Shape::Vector(m.intermediate)
    })
    .when(|m, _| m.mlp_bias),
    Row::new(TensorRole::Down, Place::Layer, "model.layers.{}.mlp.c_proj.weight", |m| {
        Shape::Matrix(m.hidden, m.intermediate)
    }),
    Row::new(TensorRole::DownBias, Place::Layer, "model.layers.{}.mlp.c_proj.bias", |m| {
        Shape::Vector(m.hidden)
    })
    .when(|m, _| m.mlp_bias),
];
