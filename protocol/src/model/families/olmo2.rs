//! OLMo 2: norms after attention and MLP, and over all queries and all keys at once.

use crate::model::config::{Common, full_attention_only};
use crate::model::families::Definition;
use crate::model::fields::Fields;
use crate::model::options::Placement;
use crate::model::spec::{Family, ModelSpec, SpecError};
use crate::model::table::{
    ATTENTION_END, EMBEDDING, HEAD, MLP, POST_ATTENTION_NORM, POST_MLP_NORM, QUERY_KEY_VALUE, Row,
};

pub(super) const DEFINITION: Definition =
    Definition { architecture: "Olmo2ForCausalLM", model_type: "olmo2", names: NAMES, read };

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let mut spec = Common::of(Family::Olmo2).read(config)?;
    full_attention_only(config)?;
    spec.qkv_bias = config.flag("attention_bias", false)?;
    spec.o_bias = spec.qkv_bias;
    spec.qk_norm = true;
    spec.options.qk_norm_whole = true;
    spec.options.placement = Placement::After;
    Ok(spec)
}

const NAMES: &[&[Row]] =
    &[EMBEDDING, QUERY_KEY_VALUE, ATTENTION_END, POST_ATTENTION_NORM, MLP, POST_MLP_NORM, HEAD];
