//! GPT-OSS: sinks in the softmax, every other layer sees a window, experts with biases and a clamped
//! gate. Experts in bf16 as transformers writes them, or in MXFP4 as they are published (`scheme`).

use crate::model::config::{Common, window, windowed, windowed_layers};
use crate::model::families::Definition;
use crate::model::families::experts::{Experts, set_experts};
use crate::model::fields::Fields;
use crate::model::moe::Moe;
use crate::model::options::Activation;
use crate::model::spec::{Family, ModelSpec, RopeScaling, SpecError};
use crate::model::table::{
    ATTENTION_END, EMBEDDING, HEAD, INPUT_NORM, MLP_NORM, Place, QUERY_KEY_VALUE, Row, Shape,
};
use crate::model::tensors::Excerpt;
use crate::model::tensors::TensorRole::{self, *};

pub(super) const DEFINITION: Definition =
    Definition { architecture: "GptOssForCausalLM", model_type: "gpt_oss", names: NAMES, read };

/// `head_dim` where the file does not say; transformers' default.
const HEAD_DIM: u32 = 64;
/// `sliding_window` where the file does not say; `null` means none.
const WINDOW: u32 = 128;

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let common = Common {
        head_dim: Some(HEAD_DIM),
        eps: Some(1e-5),
        theta: 150_000.0,
        ..Common::of(Family::GptOss)
    };
    let mut spec = common.read(config)?;
    config.only("swiglu_alpha", &1.702.into())?;
    config.only("swiglu_limit", &7.0.into())?;
    if config.get("rope_scaling").is_none() && config.get("rope_parameters").is_none() {
        // transformers' default for this family.
        spec.rope_scaling = RopeScaling::Yarn {
            factor: 32.0,
            original_context: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: (0.1 * 32.0_f64.ln() + 1.0) as f32,
            truncate: false,
        };
    }
    spec.qkv_bias = config.flag("attention_bias", true)?;
    spec.o_bias = spec.qkv_bias;
    spec.options.activation = Activation::ClampedSwiglu;
    spec.options.sinks = true;
    let types = windowed_layers(config, spec.layers, |layer| layer.is_multiple_of(2))?;
    let size = window(config, Some(WINDOW))?;
    spec.options.layers = windowed(spec.layers, size, |layer| types[layer as usize]);
    let experts = Experts { count: "num_local_experts" };
    let moe = experts.read(config, spec.intermediate)?;
    set_experts(&mut spec, Moe { normalise: true, bias: true, ..moe }, |_| true);
    Ok(spec)
}

const NAMES: &[&[Row]] =
    &[EMBEDDING, INPUT_NORM, QUERY_KEY_VALUE, ATTENTION_END, MLP_NORM, EXPERTS, HEAD];

const fn row(role: TensorRole, name: &'static str, shape: fn(&ModelSpec) -> Shape) -> Row {
    Row::new(role, Place::Layer, name, shape)
}

fn experts(spec: &ModelSpec) -> u32 {
    spec.options.moe.map_or(0, |moe| moe.experts)
}

/// Gate (`first` 0) and up (1) are the even and the odd columns of an expert's matrix, which lies the
/// other way round.
fn gate_up(spec: &ModelSpec, expert: u32, first: u64) -> Option<Excerpt> {
    let (hidden, width) = (u64::from(spec.hidden), 2 * u64::from(spec.intermediate));
    let stored = vec![experts(spec).into(), hidden, width];
    Some(Excerpt::rows(stored, u64::from(expert) * hidden).turned(first, 2))
}

fn gate_up_bias(spec: &ModelSpec, expert: u32, first: u64) -> Option<Excerpt> {
    let stored = vec![experts(spec).into(), 2 * u64::from(spec.intermediate)];
    Some(Excerpt::rows(stored, expert.into()).turned(first, 2))
}

fn down(spec: &ModelSpec, expert: u32) -> Option<Excerpt> {
    let (hidden, width) = (u64::from(spec.hidden), u64::from(spec.intermediate));
    let stored = vec![experts(spec).into(), width, hidden];
    Some(Excerpt::rows(stored, u64::from(expert) * width).turned(0, 1))
}

fn down_bias(spec: &ModelSpec, expert: u32) -> Option<Excerpt> {
    let stored = vec![experts(spec).into(), spec.hidden.into()];
    Some(Excerpt::rows(stored, expert.into()).turned(0, 1))
}

const GATE_UP: &str = "model.layers.{}.mlp.experts.gate_up_proj";
const GATE_UP_BIAS: &str = "model.layers.{}.mlp.experts.gate_up_proj_bias";

const EXPERTS: &[Row] = &[
    row(Router, "model.layers.{}.mlp.router.weight", |m| Shape::Matrix(experts(m), m.hidden)),
    row(RouterBias, "model.layers.{}.mlp.router.bias", |m| Shape::Vector(experts(m))),
    row(ExpertGate, GATE_UP, |m| Shape::Matrix(m.intermediate, m.hidden))
        .each(experts)
        .out_of(|m, expert| gate_up(m, expert, 0)),
    row(ExpertGateBias, GATE_UP_BIAS, |m| Shape::Vector(m.intermediate))
        .each(experts)
        .out_of(|m, expert| gate_up_bias(m, expert, 0)),
    row(ExpertUp, GATE_UP, |m| Shape::Matrix(m.intermediate, m.hidden))
        .each(experts)
        .out_of(|m, expert| gate_up(m, expert, 1)),
    row(ExpertUpBias, GATE_UP_BIAS, |m| Shape::Vector(m.intermediate))
        .each(experts)
        .out_of(|m, expert| gate_up_bias(m, expert, 1)),
    row(ExpertDown, "model.layers.{}.mlp.experts.down_proj", |m| {
        Shape::Matrix(m.hidden, m.intermediate)
    })
    .each(experts)
    .out_of(down),
    row(ExpertDownBias, "model.layers.{}.mlp.experts.down_proj_bias", |m| Shape::Vector(m.hidden))
        .each(experts)
        .out_of(down_bias),
];
