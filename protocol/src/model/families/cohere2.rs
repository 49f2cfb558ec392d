//! Command R7B and Command A: Cohere whose layers see a window, but for every fourth, which sees all
//! and knows no positions.

use crate::model::config::{window, windowed, windowed_layers};
use crate::model::families::Definition;
use crate::model::families::cohere::{NAMES, read_cohere};
use crate::model::fields::Fields;
use crate::model::options::LayerRope;
use crate::model::spec::{Family, ModelSpec, SpecError};

/// `sliding_window` where the file does not say; `null` means none.
const WINDOW: u32 = 4096;

pub(super) const DEFINITION: Definition =
    Definition { architecture: "Cohere2ForCausalLM", model_type: "cohere2", names: NAMES, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let mut spec = read_cohere(config, Family::Cohere2)?;
    let pattern = config.size_or("sliding_window_pattern", 1 << 10, 4)?;
    let types = windowed_layers(config, spec.layers, |layer| !(layer + 1).is_multiple_of(pattern))?;
    let size = window(config, Some(WINDOW))?;
    let is_local = |layer: u32| types[layer as usize];
    spec.options.layers = windowed(spec.layers, size, is_local);
    for (layer, options) in (0..).zip(&mut spec.options.layers) {
        // transformers rotates where a window is, and only there.
        let rotated = is_local(layer) && size.is_some();
        options.rope = if rotated { LayerRope::Global } else { LayerRope::None };
    }
    Ok(spec)
}
