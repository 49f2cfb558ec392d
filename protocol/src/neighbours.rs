//! ○ Which shards of a layout are joined by a link.
//!
//! ```text
//!            ┌─► (0,1) ◄─► …        each rank of a stage is dialled by one rank of the stage before:
//! head (0,0) ┼─► (1,0) ◄─┐          rank r by rank r mod R. The head's rank hands what it has from the
//!            │           ├ ranks    head to the other ranks of stage 0, rank 0 of the last stage dials
//!            └─► (1,1) ◄─┘          the head. Ranks of one stage are joined in pairs; the lower dials.
//! ```

use crate::id::NodeId;
use crate::plan::ReplicaPlan;

/// A place in the mesh: stage and rank.
pub type Place = (u32, u32);

/// How many ranks a stage has; 0 where there is no such stage.
pub fn ranks(replica: &ReplicaPlan, stage: u32) -> u32 {
    replica.stages.get(stage as usize).map_or(0, |stage| stage.shards.len() as u32)
}

/// All places, in mesh order.
pub fn places(replica: &ReplicaPlan) -> Vec<Place> {
    (0..replica.stages.len() as u32)
        .flat_map(|stage| (0..ranks(replica, stage)).map(move |rank| (stage, rank)))
        .collect()
}

/// Who dials this place with what it takes; `None`: nobody, the head is beside it.
pub fn feeder(replica: &ReplicaPlan, (stage, rank): Place) -> Option<Place> {
    match (stage, rank) {
        (0, 0) => {
            let last = replica.stages.len() as u32 - 1;
            (last > 0).then_some((last, 0))
        }
        (0, _) => Some((0, 0)),
        (stage, rank) => Some((stage - 1, rank % ranks(replica, stage - 1).max(1))),
    }
}

/// Whether a link joins two places.
pub fn are_joined(replica: &ReplicaPlan, a: Place, b: Place) -> bool {
    a != b && (a.0 == b.0 || feeder(replica, a) == Some(b) || feeder(replica, b) == Some(a))
}

/// The places that links join, each pair once, by their index in mesh order.
pub fn joined(replica: &ReplicaPlan) -> Vec<(usize, usize)> {
    let places = places(replica);
    let pairs = (0..places.len()).flat_map(|b| (0..b).map(move |a| (a, b)));
    pairs.filter(|(a, b)| are_joined(replica, places[*a], places[*b])).collect()
}

/// The workers that links join, each pair once.
pub fn neighbours(replica: &ReplicaPlan) -> Vec<(NodeId, NodeId)> {
    let nodes: Vec<_> = replica.nodes().collect();
    joined(replica).into_iter().map(|(a, b)| (nodes[a], nodes[b])).collect()
}
