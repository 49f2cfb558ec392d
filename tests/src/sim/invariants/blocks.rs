//! **KV blocks balance.** Between any two calls each block of an engine is free once, or known and idle, or
//! held as often as running sequences have it, none of which may still write to it where there are two; each
//! stage's table has for its sequences exactly the blocks that they need, and
//! when all is over no engine holds a block, no stage a sequence, and no head has somebody waiting.

use shoal_protocol::id::NodeId;
use shoal_shard_worker::agent::lifecycle::ShardKey;

use crate::sim::worker::WorkerProcess;
use crate::sim::world::World;

impl World {
    /// An engine was told something.
    pub fn check_engine(&mut self, id: NodeId, key: ShardKey, process: &WorkerProcess) {
        let engine = process.shards.get(&key).and_then(|shard| shard.engine.as_ref());
        if let Some(wrong) = engine.and_then(|engine| engine.check().into_iter().next()) {
            self.violate("blocks", format!("{id} {key}, engine: {wrong}"));
        }
    }

    /// A stage took a frame.
    pub fn check_stage(&mut self, id: NodeId, key: ShardKey, process: &WorkerProcess) {
        let wrong =
            process.shards.get(&key).and_then(|shard| shard.table.check().into_iter().next());
        if let Some(wrong) = wrong {
            self.violate("blocks", format!("{id} {key}, stage: {wrong}"));
        }
    }

    /// All answers have ended: what is still held?
    pub fn held_blocks(&self) -> Option<String> {
        let processes = self.workers.iter().filter_map(|(id, w)| Some((id, w.process.as_ref()?)));
        for (id, process) in processes {
            for (key, shard) in &process.shards {
                let report = shard.engine.as_ref().map(|engine| engine.report());
                let used = report.map_or(0, |report| report.blocks_used);
                let (open, waiting) = (shard.table.len(), shard.clients.len());
                if used > 0 || open > 0 || waiting > 0 {
                    return Some(format!(
                        "{id} {key}: {used} blocks, {open} sequences and {waiting} clients are left"
                    ));
                }
            }
        }
        None
    }
}
