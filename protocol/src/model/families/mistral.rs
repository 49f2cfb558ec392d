//! Mistral: Llama whose layers see a window of positions.

use crate::model::config::{Common, window, windowed};
use crate::model::families::Definition;
use crate::model::fields::{Fields, unsupported};
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::LLAMA;

/// `sliding_window` where the file does not say; `null` means none.
const WINDOW: u32 = 4096;

pub(super) const DEFINITION: Definition =
    Definition { architecture: "MistralForCausalLM", model_type: "mistral", names: LLAMA, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let mut spec = Common::of(Family::Mistral).read(config)?;
    if config.get("layer_types").is_some() {
        let supported = "one window for all layers, without `layer_types`";
        return Err(unsupported("layer_types", "a list", supported));
    }
    spec.options.layers = windowed(spec.layers, window(config, Some(WINDOW))?, |_| true);
    Ok(spec)
}
