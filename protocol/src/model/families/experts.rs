//! What the families with mixtures of experts share: how files describe them and what they call them.

use serde_json::Value;

use crate::model::config::INTERMEDIATE_MAX;
use crate::model::fields::{Fields, bad};
use crate::model::moe::{Moe, Scoring};
use crate::model::options::LayerOptions;
use crate::model::spec::{ModelSpec, SpecError};
use crate::model::table::{Place, Row, Shape};
use crate::model::tensors::TensorRole::{self, *};

/// Experts of a layer; 8 times those of the widest published model.
const EXPERTS_MAX: u64 = 1 << 11;

/// What files call the sizes.
pub(super) struct Experts {
    /// The number of experts.
    pub(super) count: &'static str,
}

impl Experts {
    pub(super) const QWEN: Self = Self { count: "num_experts" };

    /// Reads a plain mixture: softmax over all, nothing shared.
    pub(super) fn read(&self, config: Fields<'_>, intermediate: u32) -> Result<Moe, SpecError> {
        let experts = config.size(self.count, EXPERTS_MAX)?;
        let top_k = config.size("num_experts_per_tok", EXPERTS_MAX)?;
        if top_k > experts {
            return Err(SpecError::BadValue {
                field: "num_experts_per_tok",
                value: top_k.to_string(),
                expected: format!("at most `{}`, which is {experts}", self.count),
            });
        }
        Ok(Moe {
            experts,
            top_k,
            intermediate,
            scoring: Scoring::Softmax,
            normalise: config.flag("norm_topk_prob", false)?,
            scale: 1.0,
            groups: None,
            shared: None,
            shared_gate: false,
            bias: false,
        })
    }
}

/// The width of an expert.
pub(super) fn expert_width(config: Fields<'_>) -> Result<u32, SpecError> {
    config.size("moe_intermediate_size", INTERMEDIATE_MAX)
}

/// Gives the layers that `is_moe` names a mixture of experts.
pub(super) fn set_experts(spec: &mut ModelSpec, moe: Moe, is_moe: impl Fn(u32) -> bool) {
    spec.options.layers = (0..spec.layers)
        .map(|layer| LayerOptions { is_moe: is_moe(layer), ..spec.layer(layer) })
        .collect();
    spec.options.moe = Some(moe);
}

/// Which layers of a Qwen have experts: every `decoder_sparse_step`-th, but for those of
/// `mlp_only_layers`.
pub(super) fn qwen_layers(config: Fields<'_>) -> Result<impl Fn(u32) -> bool, SpecError> {
    let step = config.size_or("decoder_sparse_step", 1 << 10, 1)?;
    let dense: Vec<u64> = match config.get("mlp_only_layers") {
        None => Vec::new(),
        Some(value) => {
            let layers = value.as_array().map(|list| list.iter().map(Value::as_u64).collect());
            let layers: Option<Vec<u64>> = layers.unwrap_or(None);
            layers.ok_or_else(|| bad("mlp_only_layers", value, "a list of layer numbers"))?
        }
    };
    Ok(move |layer: u32| (layer + 1).is_multiple_of(step) && !dense.contains(&layer.into()))
}

const fn row(role: TensorRole, name: &'static str, shape: fn(&ModelSpec) -> Shape) -> Row {
    Row::new(role, Place::Layer, name, shape).when(|m, layer| m.moe(layer).is_some())
}

const fn expert(role: TensorRole, name: &'static str, shape: fn(&ModelSpec) -> Shape) -> Row {
    row(role, name, shape).each(|m| of(m, |moe| moe.experts))
}

fn of(spec: &ModelSpec, size: fn(Moe) -> u32) -> u32 {
    spec.options.moe.map_or(0, size)
}

fn shared(spec: &ModelSpec) -> u32 {
    of(spec, |moe| moe.shared.unwrap_or(0))
}

fn has_shared(spec: &ModelSpec, layer: u32) -> bool {
    spec.moe(layer).is_some_and(|moe| moe.shared.is_some())
}

/// Router and experts, as Qwen and DeepSeek name them.
pub(super) const EXPERTS: &[Row] = &[
    row(Router, "model.layers.{}.mlp.gate.weight", |m| {
        Shape::Matrix(of(m, |moe| moe.experts), m.hidden)
    }),
    row(RouterCorrection, "model.layers.{}.mlp.gate.e_score_correction_bias", |m| {
        Shape::Vector(of(m, |moe| moe.experts))
    })
    .when(|m, layer| m.moe(layer).is_some_and(|moe| moe.scoring == Scoring::Sigmoid)),
    expert(ExpertGate, "model.layers.{}.mlp.experts.{e}.gate_proj.weight", |m| {
        Shape::Matrix(of(m, |moe| moe.intermediate), m.hidden)
    }),
    expert(ExpertUp, "model.layers.{}.mlp.experts.{e}.up_proj.weight", |m| {
        Shape::Matrix(of(m, |moe| moe.intermediate), m.hidden)
    }),
    expert(ExpertDown, "model.layers.{}.mlp.experts.{e}.down_proj.weight", |m| {
        Shape::Matrix(m.hidden, of(m, |moe| moe.intermediate))
    }),
];

/// The shared expert, as Qwen names it.
pub(super) const SHARED_EXPERT: &[Row] = &[
    row(SharedGate, "model.layers.{}.mlp.shared_expert.gate_proj.weight", |m| {
        Shape::Matrix(shared(m), m.hidden)
    }),
    row(SharedUp, "model.layers.{}.mlp.shared_expert.up_proj.weight", |m| {
        Shape::Matrix(shared(m), m.hidden)
    }),
    row(SharedDown, "model.layers.{}.mlp.shared_expert.down_proj.weight", |m| {
        Shape::Matrix(m.hidden, shared(m))
    }),
    row(SharedWeight, "model.layers.{}.mlp.shared_expert_gate.weight", |m| {
        Shape::Matrix(1, m.hidden)
    }),
];

/// The shared experts, which are one wide one, as DeepSeek names them.
pub(super) const SHARED_EXPERTS: &[Row] = &[
    row(SharedGate, "model.layers.{}.mlp.shared_experts.gate_proj.weight", |m| {
        Shape::Matrix(shared(m), m.hidden)
    })
    .when(has_shared),
    row(SharedUp, "model.layers.{}.mlp.shared_experts.up_proj.weight", |m| {
        Shape::Matrix(shared(m), m.hidden)
    })
    .when(has_shared),
    row(SharedDown, "model.layers.{}.mlp.shared_experts.down_proj.weight", |m| {
        Shape::Matrix(m.hidden, shared(m))
    })
    .when(has_shared),
];
