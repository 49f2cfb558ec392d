//! DeepSeek-V3 and R1: V2 whose experts are scored one by one, with a correction for the choice.

use crate::model::families::Definition;
use crate::model::families::deepseek2::{NAMES, first_dense, groups, read_deepseek};
use crate::model::families::experts::set_experts;
use crate::model::fields::Fields;
use crate::model::moe::{Moe, Scoring};
use crate::model::spec::{Family, ModelSpec, SpecError};

pub(super) const DEFINITION: Definition = Definition {
    architecture: "DeepseekV3ForCausalLM",
    model_type: "deepseek_v3",
    names: NAMES,
    read,
};

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let (mut spec, moe) = read_deepseek(config, Family::DeepSeek3)?;
    let groups = Some(groups(config, &moe, 2)?);
    let normalise = config.flag("norm_topk_prob", true)?;
    let moe = Moe { groups, normalise, scoring: Scoring::Sigmoid, ..moe };
    let dense = first_dense(config, 3)?;
    set_experts(&mut spec, moe, |layer| u64::from(layer) >= dense);
    Ok(spec)
}
