//! The families, one file each: how its `config.json` is read and what it calls its tensors.
//!
//! A family has no arithmetic of its own. Its reader sets sizes and
//! [`Options`](crate::model::options::Options); the layers of the worker are put together by those.

mod cohere;
mod cohere2;
mod deepseek2;
mod deepseek3;
mod encoder;
mod experts;
mod gemma2;
mod gemma3;
mod gpt_oss;
mod granite;
mod llama;
mod mistral;
mod mixtral;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod smollm3;
mod starcoder2;

use crate::model::fields::Fields;
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::Row;

/// What a family is.
pub(super) struct Definition {
    /// What `architectures` in `config.json` calls it.
    pub(super) architecture: &'static str,
    /// What `model_type` in `config.json` calls it.
    pub(super) model_type: &'static str,
    /// Its weight-name table.
    pub(super) names: &'static [&'static [Row]],
    /// Reads its `config.json`.
    pub(super) read: fn(Fields<'_>) -> Result<ModelSpec, SpecError>,
}

impl Family {
    /// What it is.
    pub(super) fn definition(self) -> &'static Definition {
        match self {
            Family::Llama => &llama::DEFINITION,
            Family::Qwen2 => &qwen2::DEFINITION,
            Family::Qwen3 => &qwen3::DEFINITION,
            Family::Mistral => &mistral::DEFINITION,
            Family::Phi3 => &phi3::DEFINITION,
            Family::Olmo2 => &olmo2::DEFINITION,
            Family::Granite => &granite::DEFINITION,
            Family::SmolLm3 => &smollm3::DEFINITION,
            Family::Gemma2 => &gemma2::DEFINITION,
            Family::Gemma3 => &gemma3::DEFINITION,
            Family::Cohere => &cohere::DEFINITION,
            Family::Cohere2 => &cohere2::DEFINITION,
            Family::StarCoder2 => &starcoder2::DEFINITION,
            Family::Mixtral => &mixtral::DEFINITION,
            Family::Qwen2Moe => &qwen2_moe::DEFINITION,
            Family::Qwen3Moe => &qwen3_moe::DEFINITION,
            Family::GptOss => &gpt_oss::DEFINITION,
            Family::DeepSeek2 => &deepseek2::DEFINITION,
            Family::DeepSeek3 => &deepseek3::DEFINITION,
            Family::Encoder => &encoder::DEFINITION,
        }
    }
}

#[cfg(test)]
mod families_test;
