//! What a model is: its shape, its tensors, and what of its files each stage needs.
//!
//! Pure but for [`checkpoint`], [`adapter`] and what they call ([`gguf`], `files`, `safetensors`, `torch`), which
//! read headers.

pub mod adapter;
pub mod builtin;
pub mod checkpoint;
mod checkpoint_error;
mod config;
pub mod encoder;
mod encoder_tensors;
mod families;
mod fields;
mod files;
pub mod gguf;
pub mod memory;
pub mod moe;
pub mod options;
mod pickle;
mod pretend;
mod rope;
pub(crate) mod safetensors;
mod scheme;
mod sentence;
pub mod spec;
pub mod split;
mod stored;
mod table;
mod tensor_part;
pub mod tensors;
mod torch;

pub use adapter::{Adapter, AdapterError, Delta, DeltaPart};
pub use builtin::BuiltinModel;
pub use checkpoint::{Checkpoint, CheckpointError, TensorLocation};
pub use encoder::{EncoderFamily, EncoderOutput, EncoderSpec, Pooling};
pub use memory::{PANEL_OUTPUTS, ScratchWidths};
pub use moe::{Groups, Mla, Moe, Scoring};
pub use options::{Activation, LayerOptions, LayerRope, NormKind, Options, Placement, RopeFactors};
pub use pretend::PRETEND_HIDDEN_MIN;
pub use spec::{Family, ModelSpec, RopeScaling, SpecError};
pub use split::{JointWidths, Part, Split, SplitError, TensorPart, VOCAB_BLOCK};
pub use stored::{FourBitPacking, RowOrder, StoredPart, StoredScales, StoredType};
pub use tensors::{Columns, Excerpt, TensorRole, TensorSpec};
