//! ○ A shard that runs: the real stage table, the real engine at the head, and what ends them (as
//! `stage/shard.rs` and `stage/driver.rs` are). Frames go to the next stage over the simulated network.

use std::collections::{BTreeMap, VecDeque};

use shoal_protocol::activation::{CloseHeader, Open, Samples, Step};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{Attempt, NodeId, RequestId};
use shoal_protocol::liveness::Detector;
use shoal_protocol::plan::{Assignment, ReplicaLimits, ReplicaPlan};
use shoal_protocol::units::{Bytes, LayerRange};
use shoal_shard_worker::agent::lifecycle::{Event as Told, ShardKey, Stop, memory_of};
use shoal_shard_worker::engine::{ClientKey, Engine, EngineConfig};
use shoal_shard_worker::stage::table::StageTable;

use super::bug::Bug;
use super::model::{self, Kv, VOCAB};
use super::wire::{Event, Payload};
use super::worker::WorkerProcess;
use super::world::World;

/// What all stages of a layout together take for a step, however few rows it has.
const STEP_US: u64 = 6_000;

/// And for each row.
const ROW_US: u64 = 150;

/// How long what runs may take to finish (`DRAIN_TIMEOUT`), how long a head that retires still takes
/// requests (`LAME_DUCK`), and how long the others wait for it (`HEAD_FIRST`).
const DRAIN_US: u64 = 5_000_000;
const LAME_DUCK_US: u64 = 500_000;
const HEAD_FIRST_US: u64 = 2_000_000;

/// How often a shard that lets out what runs looks whether it is out.
const LOOK_US: u64 = 25_000;

/// What travels from stage to stage.
#[derive(Clone, Debug)]
pub enum Frame {
    /// A sequence begins.
    Open(Open),
    /// Rows, with the hidden state of each.
    Step(Step, Vec<u64>),
    /// A sequence ends.
    Close(CloseHeader),
    /// From the last stage to the head.
    Samples(Samples),
}

/// A shard that runs.
pub struct Shard {
    /// What it is.
    pub assignment: Assignment,
    /// What it holds.
    pub weights: Weights,
    /// The others of its layout, as far as it is linked with them.
    pub ring: BTreeMap<NodeId, (u64, Detector)>,
    /// Whether it has been told that it is linked.
    pub linked: bool,
    /// Whether it has lost a link, or cannot go on.
    pub broken: bool,
    /// The real table of its sequences.
    pub table: StageTable,
    /// The real engine, at the head.
    pub engine: Option<Engine>,
    /// Whose answers the engine has.
    pub clients: BTreeMap<ClientKey, Client>,
    /// Why the head takes nothing new.
    pub refuse: Option<ErrorCode>,
    /// What the only stage of a layout has drawn, in order.
    pub drawn: VecDeque<Samples>,
    /// When the engine is to be woken.
    pub wake: u64,
    /// Preemptions that are counted.
    pub preempted: u64,
    kv: Kv,
    busy_until: u64,
    unsent: VecDeque<Frame>,
    stopping: Option<Stopping>,
}

/// What a shard has in memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weights {
    /// How much.
    pub bytes: Bytes,
    /// Of which layers.
    pub layers: LayerRange,
}

impl Weights {
    /// What an assignment needs.
    pub fn of(assignment: &Assignment) -> Self {
        Self { bytes: memory_of(assignment).total(), layers: assignment.layers() }
    }
}

/// Who waits for an answer of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// The coordinator.
    pub from: NodeId,
    /// Its process.
    pub life: u64,
    /// What it asked for.
    pub name: (RequestId, Attempt, u32),
}

#[derive(Clone, Copy, Debug)]
struct Stopping {
    how: Stop,
    open_until: u64,
    until: u64,
}

impl Shard {
    /// A shard that has just been put together.
    pub fn new(assignment: Assignment, weights: Weights) -> Self {
        let plan = &assignment.replica;
        let limits = limits(plan);
        let generation = plan.generation;
        let config = EngineConfig {
            limits: limits.clone(),
            queue_max: 12,
            prefill_rows_min: 4,
            split_rows_min: 2,
            prefix_key: Some([generation.0 as u8; 32]),
            ..EngineConfig::of_plan(plan, VOCAB)
        };
        // Whatever were wrong with the settings would leave the replica without a head.
        let engine = if assignment.is_first() { Engine::new(config).ok() } else { None };
        // It computes with what it has, whatever its assignment says.
        let kv = Kv::new(weights.layers, limits.kv_blocks);
        Self {
            table: StageTable::new(generation, limits, assignment.is_last()),
            engine,
            kv,
            assignment,
            weights,
            ring: BTreeMap::new(),
            linked: false,
            broken: false,
            clients: BTreeMap::new(),
            refuse: Some(ErrorCode::NotReady),
            drawn: VecDeque::new(),
            wake: 0,
            preempted: 0,
            busy_until: 0,
            unsent: VecDeque::new(),
            stopping: None,
        }
    }

    /// Whether it is on its way out.
    pub fn is_stopping(&self) -> bool {
        self.stopping.is_some()
    }

    /// The process of the stage behind this one; behind the last comes the head.
    fn next(&self) -> Option<NodeId> {
        let stages = &self.assignment.replica.stages;
        let next = (self.assignment.stage.0 as usize + 1) % stages.len();
        stages.get(next).and_then(|stage| stage.shards.first()).map(|shard| shard.node)
    }
}

/// The plan's bounds, with so few blocks that they run out: the longest answer takes 11 of them.
fn limits(plan: &ReplicaPlan) -> ReplicaLimits {
    let generation = plan.generation.0 as u32;
    ReplicaLimits {
        kv_blocks: 12 + generation % 7,
        step_rows_max: 12 + generation % 3 * 10,
        sequences_max: 3 + generation % 4,
        ..plan.limits.clone()
    }
}

impl World {
    /// A frame comes to a stage, or samples to its head.
    pub fn stage_takes(
        &mut self,
        id: NodeId,
        process: &mut WorkerProcess,
        key: ShardKey,
        frame: Frame,
    ) {
        let Some(shard) = process.shards.get_mut(&key).filter(|shard| !shard.broken) else {
            return;
        };
        let (mut took, last) = (0, shard.assignment.is_last());
        let done = match frame {
            Frame::Samples(samples) => return self.samples(id, process, key, samples),
            Frame::Open(open) => {
                shard.table.open(&open).map(|()| (!last).then_some(Frame::Open(open)))
            }
            Frame::Close(close) => {
                shard.table.close(&close).map(|()| (!last).then_some(Frame::Close(close)))
            }
            Frame::Step(step, mut rows) => {
                let stages = shard.assignment.replica.stages.len() as u64;
                let slow = self.net.slow.get(&id).copied().unwrap_or(1);
                took = slow * (STEP_US / stages + ROW_US * rows.len() as u64);
                compute(shard, &step, &mut rows).map(|samples| match samples {
                    Some(samples) => Some(Frame::Samples(samples)),
                    None => Some(Frame::Step(step, rows)),
                })
            }
        };
        match done {
            Err(fault) => {
                self.frame_misfits(id, key, &fault.to_string());
                self.broken(id, process, key, &fault.to_string());
            }
            Ok(frame) => {
                let end = shard.busy_until.max(self.now) + took;
                shard.busy_until = end;
                self.check_stage(id, key, process);
                if let Some(frame) = frame {
                    self.pass_on(id, process, key, frame);
                }
            }
        }
    }

    /// Sends a frame to the stage behind this one, when it is computed.
    fn pass_on(&mut self, id: NodeId, process: &mut WorkerProcess, key: ShardKey, frame: Frame) {
        let Some(shard) = process.shards.get_mut(&key) else { return };
        let Some(next) = shard.next() else { return };
        if next == id {
            let Frame::Samples(samples) = frame else { return };
            shard.drawn.push_back(samples);
            let life = process.life;
            return self.at(shard.busy_until, Event::Samples { at: id, life, key });
        }
        let Some((life, _)) = shard.ring.get(&next) else {
            return shard.unsent.push_back(frame);
        };
        let life = *life;
        let delay = shard.busy_until.saturating_sub(self.now);
        let frame = Payload::Frame { key, frame: Box::new(frame) };
        self.send_later(delay, id, next, life, frame);
    }

    /// A link has come up: what waited for it goes.
    pub fn flush(&mut self, id: NodeId, process: &mut WorkerProcess, key: ShardKey) {
        let Some(shard) = process.shards.get_mut(&key) else { return };
        for frame in std::mem::take(&mut shard.unsent) {
            self.pass_on(id, process, key, frame);
        }
    }

    /// A shard cannot go on.
    pub fn broken(&mut self, id: NodeId, process: &mut WorkerProcess, key: ShardKey, why: &str) {
        let Some(shard) = process.shards.get_mut(&key) else { return };
        if std::mem::replace(&mut shard.broken, true) {
            return;
        }
        let stopping = shard.is_stopping();
        self.leave_ring(id, process, key);
        self.fail_answers(id, process, key, why);
        if !stopping {
            let error = WireError::new(ErrorCode::WorkerLost, why);
            self.tell(id, process, Told::Broken(key, error));
        }
    }

    /// Tells the others of a layout that this one goes.
    fn leave_ring(&mut self, id: NodeId, process: &mut WorkerProcess, key: ShardKey) {
        let Some(shard) = process.shards.get(&key) else { return };
        for (node, (life, _)) in &shard.ring {
            self.send(id, *node, *life, Payload::Bye { from: id, key });
        }
    }

    /// A shard is to end.
    pub fn stop_shard(
        &mut self,
        id: NodeId,
        process: &mut WorkerProcess,
        key: ShardKey,
        how: Stop,
    ) {
        let life = process.life;
        let Some(shard) = process.shards.get_mut(&key) else { return };
        let head = shard.engine.is_some();
        let (open, patience) = match how {
            Stop::Now | Stop::Keep => return self.end_shard(id, process, key, how),
            Stop::Drain => (0, DRAIN_US),
            Stop::Retire if head => (LAME_DUCK_US, LAME_DUCK_US + DRAIN_US),
            Stop::Retire => (0, LAME_DUCK_US + DRAIN_US + HEAD_FIRST_US),
        };
        let (open_until, until) = (self.now + open, self.now + patience);
        shard.stopping = Some(Stopping { how, open_until, until });
        self.at(self.now, Event::Leave { at: id, life, key });
    }

    /// Looks whether a shard that is to end has let out what runs.
    pub fn leave_look(&mut self, id: NodeId, life: u64, key: ShardKey) {
        self.worker(id, life, |world, process| {
            let Some(shard) = process.shards.get_mut(&key) else { return };
            let Some(stopping) = shard.stopping else { return };
            let now = world.now;
            let closed = now >= stopping.open_until;
            if closed {
                shard.refuse = Some(ErrorCode::Draining);
            }
            let idle = match (&shard.engine, stopping.how) {
                (Some(engine), _) => closed && engine.is_idle(),
                (None, Stop::Drain) => shard.table.is_empty(),
                (None, _) => false,
            };
            if idle || shard.broken || now >= stopping.until {
                return world.end_shard(id, process, key, stopping.how);
            }
            world.at(now + LOOK_US, Event::Leave { at: id, life, key });
        });
    }

    fn end_shard(&mut self, id: NodeId, process: &mut WorkerProcess, key: ShardKey, how: Stop) {
        self.leave_ring(id, process, key);
        self.fail_answers(id, process, key, "its layout has ended");
        let Some(shard) = process.shards.remove(&key) else { return };
        process.left.insert(key, shard.weights);
        let (life, kept) = (process.life, how == Stop::Keep);
        let mut at = self.now + self.dice.range(2_000, 60_000);
        if self.bug == Some(Bug::StoppedTooEarly) && !kept {
            self.at(at + 400_000, Event::Freed { at: id, life, key });
            at = self.now + 500;
        }
        self.at(at, Event::Stopped { at: id, life, key, kept });
    }

    /// A shard has stopped.
    pub fn stopped(&mut self, id: NodeId, life: u64, key: ShardKey, kept: bool) {
        self.worker(id, life, |world, process| {
            if !kept && world.bug != Some(Bug::StoppedTooEarly) {
                process.left.remove(&key);
            }
            world.tell(id, process, Told::Stopped { key, kept });
        });
    }
}

/// One step at one stage: where its rows go says the table; the last stage draws.
fn compute(
    shard: &mut Shard,
    step: &Step,
    rows: &mut [u64],
) -> Result<Option<Samples>, shoal_shard_worker::stage::table::StageFault> {
    let placed = shard.table.begin_step(step)?;
    for span in placed.spans() {
        let of_span = &mut rows[span.first_row..span.first_row + span.rows];
        shard.kv.forward(&span, of_span);
    }
    if !shard.assignment.is_last() {
        return Ok(None);
    }
    let mut logits = Vec::new();
    placed.sample_rows().iter().for_each(|row| model::logits(rows[*row], &mut logits));
    shard.table.draw(step, &logits, VOCAB as usize).map(Some)
}
