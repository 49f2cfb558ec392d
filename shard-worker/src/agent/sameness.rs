//! What two assignments have in common, and in words what they have not.
//!
//! Pure: the lifecycle decides by it.

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::Generation;
use shoal_protocol::plan::{Assignment, ShardMemory};
use shoal_protocol::units::Bytes;

use super::lifecycle::ShardKey;

/// The memory that the plan gives this shard.
pub fn memory_of(assignment: &Assignment) -> ShardMemory {
    let stage = assignment.replica.stages.get(assignment.stage.0 as usize);
    let shard = stage.and_then(|stage| stage.shards.iter().find(|s| s.rank == assignment.rank));
    shard.map(|shard| shard.memory).unwrap_or_default()
}

/// Whether the weights and the cache of one can serve the other: the same part of the same model, in
/// the same precision and the same bounds.
pub(super) fn same_weights(a: &Assignment, b: &Assignment) -> bool {
    a.replica.model == b.replica.model
        && a.replica.precision == b.replica.precision
        && a.replica.numerics == b.replica.numerics
        && a.replica.limits == b.replica.limits
        && a.layers() == b.layers()
        && a.split() == b.split()
        && a.is_last() == b.is_last()
        && memory_of(a) == memory_of(b)
}

/// A new layout says who was lost: those who are not where they were.
pub(super) fn why_replaced(old: &Assignment, new: &Assignment) -> String {
    let (before, after) = (ShardKey::of(old), new.replica.generation);
    let lost: Vec<String> = old
        .peers
        .iter()
        .filter(|peer| !new.peers.contains(peer))
        .map(|peer| peer.node.to_string())
        .collect();
    if lost.is_empty() {
        return format!("{after} takes the place of {before}");
    }
    format!("{} was lost or restarted: {after} takes the place of {before}", lost.join(", "))
}

/// Whether both are the same shard of the same layout, wherever its neighbours are.
pub(super) fn is_same_layout(a: &Assignment, b: &Assignment) -> bool {
    (&a.replica, a.stage, a.rank) == (&b.replica, b.stage, b.rank)
}

pub(super) fn is_stale(told: ShardKey, newest: Generation) -> WireError {
    let message = format!(
        "{told} is wanted, but {newest} of it, or another layout under that number, has been here \
         already, so the coordinator's data is older than this worker's (was it restored from a \
         backup?); a generation after {newest} is needed"
    );
    WireError::new(ErrorCode::StaleGeneration, message)
}

pub(super) fn does_not_fit(assignment: &Assignment, held: Bytes, budget: Bytes) -> WireError {
    let ShardMemory { weights, kv, activations } = memory_of(assignment);
    let total = memory_of(assignment).total();
    let message = format!(
        "layers {} of {} need {total} here (weights {weights} + KV {kv} + activations \
         {activations}); this worker's budget is {budget}, of which other shards hold {held}: \
         {} are missing; give it more with --memory, or add a worker",
        assignment.layers(),
        assignment.replica.model.source,
        (total + held).saturating_sub(budget),
    );
    WireError::new(ErrorCode::DoesNotFit, message)
}
