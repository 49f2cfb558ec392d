//! Encoders: BERT, RoBERTa, ModernBERT. Their configs and tables are [`crate::model::encoder`]'s; here they
//! only have a place among the families, in whose words their layers are said.

use crate::model::families::Definition;
use crate::model::fields::{Fields, list, unsupported};
use crate::model::spec::{Family, ModelSpec, SpecError};

pub(super) const DEFINITION: Definition =
    Definition { architecture: "BertModel", model_type: "bert", names: &[], read };

/// Nobody is sent here: the family is not among [`Family::ALL`].
fn read(_: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let decoders = list(Family::ALL.iter().map(|family| family.architecture()));
    Err(unsupported("architectures", "that of an encoder", decoders))
}
