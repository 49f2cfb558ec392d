//! Assignments of shards as a coordinator would give them, for tests that load them without one.

use anyhow::Result;
use shoal_protocol::id::{DeploymentName, Generation, NodeId, RankIndex, ReplicaId, StageIndex};
use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{Checkpoint, Split};
use shoal_protocol::plan::{
    Assignment, ModelRef, ModelSource, Numerics, ReplicaLimits, ReplicaPlan, ShardPlan, StagePlan,
};
use shoal_protocol::units::LayerRange;

/// A little room: nothing is computed.
const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: 4,
    context_max: 64,
    step_rows_max: 16,
    sequences_max: 4,
    steps_in_flight_max: 1,
};

/// The shards of one replica of a model from this source, stage by stage and rank by rank: `w1`, `w2` …
/// `checkpoint` is what is there. Layers are spread evenly.
pub fn assignments(
    checkpoint: &Checkpoint,
    source: &ModelSource,
    (stages, ranks): (u32, u32),
    numerics: Numerics,
) -> Result<Vec<Assignment>> {
    let spec = checkpoint.spec();
    let reduction = Reduction::of(numerics);
    let shard = |stage: u32, layers: LayerRange, rank: u32| -> Result<ShardPlan> {
        let part = spec.part(Split { rank, ranks }, reduction, spec.stored)?;
        Ok(ShardPlan {
            rank: RankIndex(rank),
            node: NodeId::worker(stage * ranks + rank + 1),
            device: "cpu".into(),
            memory: part.memory(spec, layers, spec.stored, &LIMITS),
        })
    };
    let stage = |stage: u32| -> Result<StagePlan> {
        let at = |border: u32| border * spec.layers / stages;
        let layers = LayerRange::new(at(stage), at(stage + 1));
        let shards = (0..ranks).map(|rank| shard(stage, layers, rank)).collect::<Result<_>>()?;
        Ok(StagePlan { layers, shards })
    };
    let replica = ReplicaPlan {
        id: ReplicaId(1),
        deployment: DeploymentName::new("test")?,
        generation: Generation(1),
        model: ModelRef { source: source.clone(), fingerprint: checkpoint.fingerprint() },
        precision: spec.stored,
        numerics,
        stages: (0..stages).map(stage).collect::<Result<_>>()?,
        limits: LIMITS,
    };
    let all = (0..stages).flat_map(|stage| (0..ranks).map(move |rank| (stage, rank)));
    let assignment = |(stage, rank)| Assignment {
        replica: replica.clone(),
        stage: StageIndex(stage),
        rank: RankIndex(rank),
        peers: Vec::new(),
    };
    Ok(all.map(assignment).collect())
}
