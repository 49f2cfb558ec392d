//! What a model is: its shape, its tensors, and what of its files each stage needs.
//!
//! Pure but for [`checkpoint`], which reads the folder.

pub mod builtin;
pub mod checkpoint;
mod config;
mod families;
mod fields;
pub mod memory;
pub mod moe;
pub mod options;
mod pretend;
mod rope;
pub(crate) mod safetensors;
pub mod spec;
pub mod split;
mod table;
pub mod tensors;

pub use builtin::BuiltinModel;
pub use checkpoint::{Checkpoint, CheckpointError, TensorLocation};
pub use memory::{PANEL_OUTPUTS, ScratchWidths};
pub use moe::{Groups, Mla, Moe, Scoring};
pub use options::{Activation, LayerOptions, LayerRope, NormKind, Options, Placement, RopeFactors};
pub use pretend::PRETEND_HIDDEN_MIN;
pub use spec::{Family, ModelSpec, RopeScaling, SpecError};
pub use split::{Part, Reduction, Split, SplitError, TensorPart, VOCAB_BLOCK};
pub use tensors::{Columns, Excerpt, TensorRole, TensorSpec};
