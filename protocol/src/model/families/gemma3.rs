//! Gemma 3, text: Gemma 2 with norms over queries and keys, without caps, five layers of six seeing a
//! window with a rotation of their own.

use serde_json::{Map, Value};

use crate::model::config::{window, windowed, windowed_layers};
use crate::model::families::Definition;
use crate::model::families::gemma2::{NAMES, WINDOW, cap, read_gemma};
use crate::model::fields::{Fields, bad};
use crate::model::options::LayerRope;
use crate::model::rope::read_one;
use crate::model::spec::{Family, ModelSpec, SpecError};

/// Rotary bases where the file does not say: of layers that see all, and of the others.
const THETA: f32 = 1_000_000.0;
const LOCAL_THETA: f32 = 10_000.0;

pub(super) const DEFINITION: Definition =
    Definition { architecture: "Gemma3ForCausalLM", model_type: "gemma3_text", names: NAMES, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    // Its rotations are written in a way of their own.
    let mut rest: Map<String, Value> = config.0.clone();
    for field in ["rope_parameters", "rope_scaling", "rope_theta"] {
        rest.remove(field);
    }
    let mut spec = read_gemma(Fields(&rest), Family::Gemma3)?;
    let pattern = config.size_or("sliding_window_pattern", 1 << 10, 6)?;
    let types = windowed_layers(config, spec.layers, |layer| !(layer + 1).is_multiple_of(pattern))?;
    let size = window(config, Some(WINDOW))?;
    let is_local = |layer: u32| types[layer as usize];
    spec.options.layers = windowed(spec.layers, size, is_local);
    for (layer, options) in (0..).zip(&mut spec.options.layers) {
        options.rope = if is_local(layer) { LayerRope::Local } else { LayerRope::Global };
    }
    spec.qk_norm = true;
    spec.options.attention_softcap = cap(config, "attn_logit_softcapping", None)?;
    spec.options.logit_softcap = cap(config, "final_logit_softcapping", None)?;
    read_ropes(config, &mut spec)?;
    Ok(spec)
}

/// Both rotations: transformers 5 keeps one object for each kind of layer, transformers 4 scales the
/// global one alone.
fn read_ropes(config: Fields<'_>, spec: &mut ModelSpec) -> Result<(), SpecError> {
    let context = (spec.context_max, None);
    let parameters = config.get("rope_parameters");
    let of = |kind: &str| parameters.and_then(|p| p.get(kind)).filter(|value| !value.is_null());
    if let Some(flat) = parameters
        && of("full_attention").or(of("sliding_attention")).is_none()
    {
        // Read as one of the two it would be wrong for the other, and silently.
        let expected = "an object with `full_attention` and `sliding_attention`, a rotation each";
        return Err(bad("rope_parameters", flat, expected));
    }
    let (field, global) = match parameters {
        Some(_) => ("rope_parameters", of("full_attention")),
        None => ("rope_scaling", config.get("rope_scaling")),
    };
    let global = read_one((field, global), (config.get("rope_theta"), THETA), context)?;
    let base = config.get("rope_local_base_freq");
    let local =
        read_one(("rope_parameters", of("sliding_attention")), (base, LOCAL_THETA), context)?;
    spec.rope_theta = global.theta;
    spec.rope_scaling = global.scaling;
    spec.options.local_rope = Some((local.theta, local.scaling));
    Ok(())
}
