//! Rotary positions: which angle each pair of dimensions turns by.

use std::f32::consts::PI;

use shoal_protocol::model::{LayerRope, ModelSpec, RopeScaling};

use crate::backend::{BackendError, FamilyOps, Ops};
use crate::model::layers::Scratch;
use crate::model::{Batch, ComputeError};

/// The rotations of a model: most have one for all layers.
pub struct Rope<B: Ops> {
    /// Frequencies, and what cosines and sines are multiplied with.
    turns: Vec<(B::Vector, f32)>,
}

impl<B: FamilyOps> Rope<B> {
    /// The frequencies that the spec asks for, for sequences of at most `context` positions.
    pub fn new(ops: &B, spec: &ModelSpec, context: u32) -> Result<Self, BackendError> {
        let turn = |rope: &LayerRope| -> Result<_, BackendError> {
            let (theta, scaling) = match (rope, spec.options.local_rope) {
                (LayerRope::Local, Some(local)) => local,
                _ => (spec.rope_theta, spec.rope_scaling),
            };
            let factors = &spec.options.rope_factors;
            let frequencies = match scaling {
                RopeScaling::LongRope { original_context, .. } => {
                    let is_long = context > original_context;
                    let factors = if is_long { &factors.long } else { &factors.short };
                    divided_frequencies(spec.rotary_dim(), theta, factors)
                }
                _ => inverse_frequencies(spec.rotary_dim(), theta, scaling),
            };
            Ok((ops.vector(&frequencies)?, factor(scaling)))
        };
        Ok(Self { turns: spec.ropes().iter().map(turn).collect::<Result<_, _>>()? })
    }

    /// Leaves the angles of the step's rows in `scratch` for all layers of the step.
    pub fn prepare(
        &self,
        ops: &mut B,
        batch: &Batch<'_>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), ComputeError> {
        for ((frequencies, factor), angles) in self.turns.iter().zip(&mut scratch.angles) {
            ops.rope_angles(batch.spans, frequencies, *factor, angles)?;
        }
        Ok(())
    }
}

/// What cosines and sines are multiplied with.
fn factor(scaling: RopeScaling) -> f32 {
    match scaling {
        RopeScaling::Yarn { attention_factor, .. }
        | RopeScaling::LongRope { attention_factor, .. } => attention_factor,
        _ => 1.0,
    }
}

/// The base to the power of each pair's exponent.
fn powers(head_dim: u32, theta: f32) -> impl Iterator<Item = f32> {
    (0..head_dim / 2).map(move |pair| {
        let exponent = (2 * pair) as f32 / head_dim as f32;
        // An f64 power rounded once is the f32 nearest to the true power.
        libm::pow(f64::from(theta), f64::from(exponent)) as f32
    })
}

/// `head_dim / 2` angles per position, in `f32` steps as `transformers` computes them
/// (`modeling_rope_utils.py`).
pub fn inverse_frequencies(head_dim: u32, theta: f32, scaling: RopeScaling) -> Vec<f32> {
    let RopeScaling::Yarn { .. } = scaling else {
        return powers(head_dim, theta).map(|power| scaled(1.0 / power, scaling)).collect();
    };
    let ramp = Ramp::of(head_dim, theta, scaling);
    (0_u32..).zip(powers(head_dim, theta)).map(|(pair, power)| ramp.mix(pair, power)).collect()
}

/// The same with each pair's frequency divided by a factor of its own.
fn divided_frequencies(head_dim: u32, theta: f32, factors: &[f32]) -> Vec<f32> {
    powers(head_dim, theta).zip(factors).map(|(power, factor)| 1.0 / (factor * power)).collect()
}

/// Between which pairs YaRN goes over from kept to divided frequencies.
struct Ramp {
    low: f64,
    high: f64,
    factor: f32,
}

impl Ramp {
    fn of(head_dim: u32, theta: f32, scaling: RopeScaling) -> Self {
        let RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } =
            scaling
        else {
            return Self { low: 0.0, high: 0.0, factor: 1.0 };
        };
        let dim = f64::from(head_dim);
        // The pair that turns so often within the original context.
        let pair = |turns: f32| {
            let turn =
                f64::from(original_context) / (f64::from(turns) * 2.0 * std::f64::consts::PI);
            dim * libm::log(turn) / (2.0 * libm::log(f64::from(theta)))
        };
        let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        Self { low, high, factor }
    }

    fn mix(&self, pair: u32, power: f32) -> f32 {
        let along =
            ((pair as f32 - self.low as f32) / (self.high - self.low) as f32).clamp(0.0, 1.0);
        let kept = 1.0 - along;
        1.0 / (self.factor * power) * (1.0 - kept) + 1.0 / power * kept
    }
}

fn scaled(frequency: f32, scaling: RopeScaling) -> f32 {
    match scaling {
        // YaRN mixes and LongRoPE divides by pairs: see `Ramp` and `divided_frequencies`.
        RopeScaling::None | RopeScaling::Yarn { .. } | RopeScaling::LongRope { .. } => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let context = original_context as f32;
            let wavelength = 2.0 * PI / frequency;
            if wavelength > context / low_freq_factor {
                frequency / factor
            } else if wavelength < context / high_freq_factor {
                frequency
            } else {
                let smooth =
                    (context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}
