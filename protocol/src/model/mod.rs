//! What a model is: its shape, its tensors, and what of its files each stage needs.
//!
//! Pure but for [`checkpoint`], which reads the folder.

pub mod builtin;
pub mod checkpoint;
mod config;
pub mod memory;
mod pretend;
pub(crate) mod safetensors;
pub mod spec;
pub mod split;
pub mod tensors;

pub use builtin::BuiltinModel;
pub use checkpoint::{Checkpoint, CheckpointError, TensorLocation};
pub use memory::PANEL_OUTPUTS;
pub use pretend::PRETEND_HIDDEN_MIN;
pub use spec::{Family, ModelSpec, RopeScaling, SpecError};
pub use split::{Part, Reduction, Split, SplitError, TensorPart, VOCAB_BLOCK};
pub use tensors::{TensorRole, TensorSpec};
