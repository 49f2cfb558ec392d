//! How layers are put together, by family, and how a shard comes to be.
//!
//! A family is a file in `shoal_protocol::model::families`: how its config is read and what its tensors
//! are called. All of them are one assembly here, the [`decoder`] of [layers](layer): what tells them
//! apart is in the spec's options and in which tensors their tables give it. Encoders put the same layers
//! together otherwise: [`encoder`].

mod decoder;
mod encoder;
mod layer;

use shoal_protocol::model::{Checkpoint, Part};
use shoal_protocol::plan::{Assignment, ModelSource};
use shoal_protocol::units::LayerRange;

use crate::backend::{BackendError, EncodeOps};
use crate::model::ShardModel;
use crate::model::weights::{LoadOptions, Weights, WeightsError};

use decoder::Decoder;
use encoder::Encoder;

/// Why a shard was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The assignment is not one that this worker can carry out.
    #[error("the assignment is refused: {0}")]
    Assignment(String),
    /// The files are not those of the plan.
    #[error(
        "{folder}: these are not the files that the coordinator read when the model was deployed; \
         expected the same content under this path on every node: copy the folder again"
    )]
    OtherModel {
        /// The folder.
        folder: String,
    },
    /// Its tensors could not be loaded.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The device has no room for cache or scratch.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// Loads the shard that the assignment names: its weights out of the checkpoint, a cache and
/// scratch by the replica's limits. Blocks; `options` tells how to watch and how to stop it.
///
/// `ops` is the device, made for this shard alone.
pub fn load_shard<B: EncodeOps>(
    mut ops: B,
    checkpoint: &Checkpoint,
    assignment: &Assignment,
    options: &LoadOptions<'_>,
) -> Result<Box<dyn ShardModel>, LoadError> {
    let (layers, part) = check(checkpoint, assignment)?;
    let replica = &assignment.replica;
    ops.hold_kv(replica.numerics.kv())?;
    ops.multiply(replica.numerics.activations())?;
    let tensors = checkpoint.part_tensors(&part, layers);
    let weights = Weights::load(&ops, checkpoint, tensors, replica.precision, options)?;
    let bounds = (&replica.limits, &part);
    if let Some(spec) = checkpoint.encoder() {
        return Ok(Box::new(Encoder::assemble(ops, spec, layers, weights, bounds)?));
    }
    let decoder = Decoder::assemble(ops, checkpoint.spec(), layers, weights, bounds)?;
    Ok(Box::new(decoder))
}

fn check(
    checkpoint: &Checkpoint,
    assignment: &Assignment,
) -> Result<(LayerRange, Part), LoadError> {
    let refuse = |what: String| Err(LoadError::Assignment(what));
    let replica = &assignment.replica;
    let spec = checkpoint.spec();
    let Some(stage) = replica.stages.get(assignment.stage.0 as usize) else {
        return refuse(format!("{} of {}", assignment.stage, replica.stages.len()));
    };
    if matches!(replica.model.source, ModelSource::Pretend(_)) {
        return refuse("a pretend model has no checkpoint".into());
    }
    let split = stage.split(assignment.rank);
    if split.rank >= split.ranks {
        return refuse(format!("{} of {}", assignment.rank, stage.shards.len()));
    }
    let layers = stage.layers;
    if layers.is_empty() || layers.end > spec.layers {
        return refuse(format!("layers {layers} of a model of {}", spec.layers));
    }
    let part = match spec.part(split, replica.reduction(), replica.precision) {
        Ok(part) => part,
        Err(error) => return refuse(error.to_string()),
    };
    if replica.model.fingerprint != checkpoint.fingerprint() {
        return Err(LoadError::OtherModel { folder: checkpoint.folder().display().to_string() });
    }
    Ok((layers, part))
}
