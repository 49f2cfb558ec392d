//! Rotary positions: which angle each pair of dimensions turns by.

use std::f32::consts::PI;

use shoal_protocol::model::{ModelSpec, RopeScaling};

use crate::backend::{BackendError, Ops};
use crate::model::layers::Scratch;
use crate::model::{Batch, ComputeError};

/// The frequencies of a model; one for all its layers.
pub struct Rope<B: Ops> {
    frequencies: B::Vector,
}

impl<B: Ops> Rope<B> {
    /// The frequencies that the spec asks for.
    pub fn new(ops: &B, spec: &ModelSpec) -> Result<Self, BackendError> {
        let frequencies = inverse_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling);
        Ok(Self { frequencies: ops.vector(&frequencies)? })
    }

    /// Leaves the angles of the step's rows in `scratch` for all layers of the step.
    pub fn prepare(
        &self,
        ops: &mut B,
        batch: &Batch<'_>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), ComputeError> {
        ops.rope_angles(batch.spans, &self.frequencies, &mut scratch.angles)
    }
}

/// `head_dim / 2` angles per position, in `f32` steps as `transformers` computes them
/// (`modeling_rope_utils.py`).
pub fn inverse_frequencies(head_dim: u32, theta: f32, scaling: RopeScaling) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|pair| {
            let exponent = (2 * pair) as f32 / head_dim as f32;
            // An f64 power rounded once is the f32 nearest to the true power.
            let power = libm::pow(f64::from(theta), f64::from(exponent)) as f32;
            scaled(1.0 / power, scaling)
        })
        .collect()
}

fn scaled(frequency: f32, scaling: RopeScaling) -> f32 {
    match scaling {
        RopeScaling::None => frequency,
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
