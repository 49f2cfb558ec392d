//! SmolLM3: Llama whose every fourth layer knows no positions.

use serde_json::Value;

use crate::model::config::{Common, full_attention_only};
use crate::model::families::Definition;
use crate::model::fields::Fields;
use crate::model::options::{LayerOptions, LayerRope};
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::LLAMA;

pub(super) const DEFINITION: Definition =
    Definition { architecture: "SmolLM3ForCausalLM", model_type: "smollm3", names: LLAMA, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let common = Common { theta: 2_000_000.0, tied: true, ..Common::of(Family::SmolLm3) };
    let mut spec = common.read(config)?;
    full_attention_only(config)?;
    spec.qkv_bias = config.flag("attention_bias", false)?;
    spec.o_bias = spec.qkv_bias;
    spec.mlp_bias = config.flag("mlp_bias", false)?;
    let interval = config.size_or("no_rope_layer_interval", 1 << 10, 4)?;
    let field = "no_rope_layers";
    let read = |value: &Value| value.as_u64().filter(|n| *n <= 1).map(|n| n == 1);
    let listed = config.list(field, spec.layers as usize, "1 with rotation, 0 without", read)?;
    let rotated = |layer: u32| match &listed {
        Some(listed) => listed[layer as usize],
        None => !(layer + 1).is_multiple_of(interval),
    };
    let rope = |layer| if rotated(layer) { LayerRope::Global } else { LayerRope::None };
    spec.options.layers = (0..spec.layers)
        .map(|layer| LayerOptions { rope: rope(layer), ..LayerOptions::PLAIN })
        .collect();
    Ok(spec)
}
