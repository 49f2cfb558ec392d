//! A folder in the Hugging Face layout: which file holds which bytes of which tensor.

/// A model folder whose headers have been read and checked; no tensor data is read.
#[derive(Clone, Debug)]
pub struct Checkpoint {}

/// Why a folder is refused; names file and tensor.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {}
