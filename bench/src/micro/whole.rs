//! A whole model on one thread of this process: for what is measured of models, and not of clusters.

use std::num::NonZeroUsize;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use shoal_protocol::id::{DeploymentName, Generation, NodeId, RankIndex, ReplicaId, StageIndex};
use shoal_protocol::model::Checkpoint;
use shoal_protocol::plan::{
    Assignment, ModelRef, ModelSource, Numerics, Precision, ReplicaLimits, ReplicaPlan, ShardPlan,
    StagePlan,
};
use shoal_protocol::units::LayerRange;
use shoal_shard_worker::backend::cpu::{CpuOps, Isa};
use shoal_shard_worker::collective::Alone;
use shoal_shard_worker::model::{Batch, LoadOptions, ShardModel, Span, load_shard};

/// See the module. It computes one sequence at a time, which has all blocks.
pub struct Whole {
    shard: Box<dyn ShardModel>,
    blocks: Vec<u32>,
    hidden: Vec<f32>,
    logits: Vec<f32>,
}

impl Whole {
    /// Loads it.
    pub fn load(
        checkpoint: &Checkpoint,
        (held, numerics): (Precision, Numerics),
        limits: ReplicaLimits,
    ) -> Result<Self> {
        let spec = checkpoint.spec();
        let layers = LayerRange::new(0, spec.layers);
        let shard = ShardPlan {
            rank: RankIndex(0),
            node: NodeId::worker(1),
            device: "cpu".into(),
            memory: spec.shard_memory(layers, held, &limits),
        };
        let replica = ReplicaPlan {
            id: ReplicaId(1),
            deployment: DeploymentName::new("whole")?,
            generation: Generation(1),
            model: ModelRef {
                source: ModelSource::Folder { path: checkpoint.folder().display().to_string() },
                fingerprint: checkpoint.fingerprint(),
            },
            precision: held,
            numerics,
            stages: vec![StagePlan { layers, shards: vec![shard] }],
            limits: limits.clone(),
        };
        let (stage, rank) = (StageIndex(0), RankIndex(0));
        let assignment = Assignment { replica, stage, rank, peers: Vec::new() };
        let options = LoadOptions {
            threads: NonZeroUsize::MIN,
            on_progress: &|_, _| (),
            cancel: &AtomicBool::new(false),
        };
        let ops = CpuOps::new(1, Isa::best())?;
        let shard = load_shard(ops, checkpoint, &assignment, &options)?;
        let rows = limits.step_rows_max as usize;
        Ok(Self {
            blocks: (0..limits.kv_blocks).collect(),
            hidden: vec![0.0; rows * shard.hidden()],
            logits: vec![0.0; rows * shard.vocab().len()],
            shard,
        })
    }

    /// The logits after each of the tokens from row `sampled` on; the first token is at position `first`.
    pub fn step(&mut self, tokens: &[u32], first: usize, sampled: usize) -> Result<Vec<&[f32]>> {
        let rows = tokens.len();
        let spans = [Span {
            first_row: 0,
            rows,
            first_position: first as u32,
            blocks: &self.blocks,
            adapter: None,
        }];
        let sample_rows: Vec<usize> = (sampled..rows).collect();
        let batch = Batch { spans: &spans, rows, sample_rows: &sample_rows };
        let vocab = self.shard.vocab().len();
        let hidden = &mut self.hidden[..rows * self.shard.hidden()];
        let logits = &mut self.logits[..sample_rows.len() * vocab];
        self.shard.forward(&batch, Some(tokens), hidden, Some(&mut *logits), &mut Alone)?;
        Ok(self.logits[..sample_rows.len() * vocab].chunks_exact(vocab).collect())
    }
}
