//! What tells families apart beyond sizes and biases: options of the layers that they share.
//!
//! Each is plain data that a layer or the loader reads; a family sets some and leaves the rest as
//! [`Options::default`] has them, which is Llama.

use serde::{Deserialize, Serialize};

use crate::model::moe::{Mla, Moe};
use crate::model::spec::{ModelSpec, RopeScaling};

/// How rows are normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps) * weight`.
    Rms,
    /// The same with `1 + weight`; the loader adds the one.
    RmsOnePlus,
    /// `(x - mean) / sqrt(variance + eps) * weight + bias`.
    Layer,
}

/// Where a layer normalises: `attn` stands for attention and for the MLP alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Placement {
    /// `x + attn(norm(x))`.
    Before,
    /// `x + norm(attn(x))`.
    After,
    /// `x + norm(attn(norm(x)))`.
    Both,
    /// One norm for both: `x + attn(norm(x)) + mlp(norm(x))`.
    Parallel,
}

/// The nonlinearity of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// GELU by its approximation with the hyperbolic tangent.
    GeluTanh,
    /// GPT-OSS: `gate` and `up` clamped to 7, `gate / (1 + e^(-1.702 gate)) * (up + 1)`.
    ClampedSwiglu,
    /// GELU by the error function.
    Gelu,
}

/// Which rotation the heads of a layer get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LayerRope {
    /// That of the model.
    Global,
    /// That of [`Options::local_rope`].
    Local,
    /// None: the layer knows no positions.
    None,
}

/// What one layer does otherwise than the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerOptions {
    /// How many positions a query sees, its own included; `None` for all.
    pub window: Option<u32>,
    /// Its rotation.
    pub rope: LayerRope,
    /// Whether its MLP is a mixture of experts.
    pub is_moe: bool,
}

impl LayerOptions {
    /// Full attention with the model's rotation and a dense MLP.
    pub const PLAIN: LayerOptions =
        LayerOptions { window: None, rope: LayerRope::Global, is_moe: false };
}

/// The divisors of rotary frequencies that [`RopeScaling::LongRope`] chooses from, one a pair.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RopeFactors {
    /// For contexts up to the original one.
    pub short: Vec<f32>,
    /// For longer ones.
    pub long: Vec<f32>,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// The kind of all norms.
    pub norm: NormKind,
    /// Whether norms of the stream have a bias.
    pub norm_bias: bool,
    /// Where they stand.
    pub placement: Placement,
    /// The MLP's nonlinearity.
    pub activation: Activation,
    /// Whether the MLP is `down(act(gate(x)) * up(x))`; else `down(act(up(x)))`.
    pub gated: bool,
    /// Whether the norms of queries and keys run over all heads at once.
    pub qk_norm_whole: bool,
    /// How many dimensions of a head are rotated; `None` for all.
    pub rotary_dim: Option<u32>,
    /// Whether dimension `2i` pairs with `2i + 1`; else `i` with `i + rotary_dim / 2`.
    pub interleaved: bool,
    /// The second rotation of a model that has two.
    pub local_rope: Option<(f32, RopeScaling)>,
    /// What [`RopeScaling::LongRope`] divides by.
    pub rope_factors: RopeFactors,
    /// Multiplies scores; `None` for `1 / sqrt(head_dim)`.
    pub attention_scale: Option<f32>,
    /// Scores are `cap * tanh(score / cap)`.
    pub attention_softcap: Option<f32>,
    /// The same for logits.
    pub logit_softcap: Option<f32>,
    /// Multiplies rows of the embedding.
    pub embedding_multiplier: f32,
    /// Multiplies what a layer adds to the stream.
    pub residual_multiplier: f32,
    /// Multiplies logits.
    pub logit_multiplier: f32,
    /// Whether each head has a sink: a score that takes its share of the softmax and adds nothing.
    pub sinks: bool,
    /// What each layer does otherwise; empty where all are [`LayerOptions::PLAIN`].
    pub layers: Vec<LayerOptions>,
    /// The mixture of experts of the layers that have one.
    pub moe: Option<Moe>,
    /// Attention over a compressed cache.
    pub mla: Option<Mla>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            norm: NormKind::Rms,
            norm_bias: false,
            placement: Placement::Before,
            activation: Activation::Silu,
            gated: true,
            qk_norm_whole: false,
            rotary_dim: None,
            interleaved: false,
            local_rope: None,
            rope_factors: RopeFactors::default(),
            attention_scale: None,
            attention_softcap: None,
            logit_softcap: None,
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logit_multiplier: 1.0,
            sinks: false,
            layers: Vec::new(),
            moe: None,
            mla: None,
        }
    }
}

impl ModelSpec {
    /// What a layer does otherwise than the others.
    pub fn layer(&self, layer: u32) -> LayerOptions {
        self.options.layers.get(layer as usize).copied().unwrap_or(LayerOptions::PLAIN)
    }

    /// How many dimensions of a head are rotated.
    pub fn rotary_dim(&self) -> u32 {
        self.options.rotary_dim.unwrap_or(self.head_dim)
    }

    /// What scores are multiplied with; the default is rounded once.
    pub fn attention_scale(&self) -> f32 {
        let default = (1.0 / f64::from(self.head_dim).sqrt()) as f32;
        self.options.attention_scale.unwrap_or(default)
    }

    /// The rotations that the layers need, in the order in which a step prepares them.
    pub fn ropes(&self) -> Vec<LayerRope> {
        [LayerRope::Global, LayerRope::Local]
            .into_iter()
            .filter(|rope| (0..self.layers).any(|layer| self.layer(layer).rope == *rope))
            .collect()
    }
}
