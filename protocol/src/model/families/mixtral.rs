//! Mixtral: Mistral with a mixture of experts in each layer.

use crate::model::config::{Common, window, windowed};
use crate::model::families::Definition;
use crate::model::families::experts::{Experts, set_experts};
use crate::model::fields::Fields;
use crate::model::moe::Moe;
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::{
    ATTENTION_END, EMBEDDING, HEAD, INPUT_NORM, MLP_NORM, Place, QUERY_KEY_VALUE, Row, Shape,
};
use crate::model::tensors::TensorRole;

pub(super) const DEFINITION: Definition =
    Definition { architecture: "MixtralForCausalLM", model_type: "mixtral", names: NAMES, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let common = Common { eps: Some(1e-5), ..Common::of(Family::Mixtral) };
    let mut spec = common.read(config)?;
    spec.options.layers = windowed(spec.layers, window(config, None)?, |_| true);
    let experts = Experts { count: "num_local_experts" };
    let moe = experts.read(config, spec.intermediate)?;
    set_experts(&mut spec, Moe { normalise: true, ..moe }, |_| true);
    Ok(spec)
}

const NAMES: &[&[Row]] =
    &[EMBEDDING, INPUT_NORM, QUERY_KEY_VALUE, ATTENTION_END, MLP_NORM, EXPERTS, HEAD];

const fn expert(role: TensorRole, name: &'static str, shape: fn(&ModelSpec) -> Shape) -> Row {
    Row::new(role, Place::Layer, name, shape).each(|m| m.options.moe.map_or(0, |moe| moe.experts))
}

/// Router and experts.
const EXPERTS: &[Row] = &[
    Row::new(
        TensorRole::Router,
        Place::Layer,
        "model.layers.{}.block_sparse_moe.gate.weight",
        |m| Shape::Matrix(m.options.moe.map_or(0, |moe| moe.experts), m.hidden),
    ),
    expert(TensorRole::ExpertGate, "model.layers.{}.block_sparse_moe.experts.{e}.w1.weight", |m| {
        Shape::Matrix(m.intermediate, m.hidden)
    }),
    expert(TensorRole::ExpertUp, "model.layers.{}.block_sparse_moe.experts.{e}.w3.weight", |m| {
        Shape::Matrix(m.intermediate, m.hidden)
    }),
    expert(TensorRole::ExpertDown, "model.layers.{}.block_sparse_moe.experts.{e}.w2.weight", |m| {
        Shape::Matrix(m.hidden, m.intermediate)
    }),
];
