//! ○ The shell around the real engine (as `head/driver.rs` and `head/intake.rs` are).

use shoal_protocol::activation::Samples;
use shoal_protocol::control::HeadReport;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{Attempt, NodeId, RequestId};
use shoal_protocol::prefix::Tenant;
use shoal_protocol::request::{FailedHeader, Generate, HeadEvent};
use shoal_protocol::units::Instant;
use shoal_shard_worker::agent::lifecycle::ShardKey;
use shoal_shard_worker::engine::{self, Action, ClientKey};

use super::model::embed;
use super::shard::{Client, Frame, Shard};
use super::wire::{Event, Payload};
use super::worker::WorkerProcess;
use super::world::World;

impl WorkerProcess {
    /// What its heads report.
    pub fn heads(&self) -> Vec<HeadReport> {
        let engines = self.shards.values().filter_map(|shard| shard.engine.as_ref());
        engines.map(|engine| engine.report()).collect()
    }

    /// The newest head of a replica that takes requests, or else the newest.
    fn head(&self, generate: &Generate) -> Option<ShardKey> {
        let heads = || {
            let mut all = self.shards.iter().rev();
            all.by_ref()
                .filter(|(key, shard)| key.replica == generate.replica && shard.engine.is_some())
                .collect::<Vec<_>>()
        };
        let heads = heads();
        let open = heads.iter().find(|(_, shard)| shard.refuse.is_none());
        open.or(heads.first()).map(|(key, _)| **key)
    }
}

impl World {
    /// A coordinator asks a head for an answer.
    pub fn generate(
        &mut self,
        id: NodeId,
        process: &mut WorkerProcess,
        (from, life): (NodeId, u64),
        (generate, tenant): (Generate, Option<Tenant>),
    ) {
        let key = process.head(&generate);
        let shard = key.and_then(|key| process.shards.get_mut(&key));
        let why = shard.as_ref().map_or(Some(ErrorCode::NotReady), |shard| shard.refuse);
        if let Some(code) = why {
            return self.send(id, from, life, Payload::Head(failed(&generate, code)));
        }
        let (Some(key), Some(shard)) = (key, shard) else { return };
        let client = ClientKey(self.number());
        let name = (generate.request, generate.attempt, generate.choice);
        shard.clients.insert(client, Client { from, life, name });
        let request = Box::new(generate);
        self.engine(id, process, key, engine::Event::Submit { key: client, request, tenant });
    }

    /// Nobody wants an answer any more.
    pub fn cancelled(
        &mut self,
        id: NodeId,
        process: &mut WorkerProcess,
        name: (RequestId, Attempt, u32),
    ) {
        self.cancel_all(id, process, |client| client.name == name);
    }

    /// A coordinator is gone, and with it whoever wanted its answers.
    pub fn nobody_waits(&mut self, id: NodeId, process: &mut WorkerProcess, gone: NodeId) {
        self.cancel_all(id, process, |client| client.from == gone);
    }

    fn cancel_all(
        &mut self,
        id: NodeId,
        process: &mut WorkerProcess,
        whose: impl Fn(&Client) -> bool,
    ) {
        let of = |(key, shard): (&ShardKey, &Shard)| {
            let clients = shard.clients.iter().filter(|(_, client)| whose(client));
            clients.map(|(client, _)| (*key, *client)).collect::<Vec<_>>()
        };
        let gone: Vec<_> = process.shards.iter().flat_map(of).collect();
        for (key, client) in gone {
            if let Some(shard) = process.shards.get_mut(&key) {
                shard.clients.remove(&client);
            }
            self.engine(id, process, key, engine::Event::Cancel { key: client });
        }
    }

    /// The last stage has drawn the tokens of a step.
    pub fn samples(
        &mut self,
        id: NodeId,
        process: &mut WorkerProcess,
        key: ShardKey,
        samples: Samples,
    ) {
        self.engine(id, process, key, engine::Event::Samples(samples));
    }

    /// The only stage of a layout has computed a step.
    pub fn drawn(&mut self, id: NodeId, process: &mut WorkerProcess, key: ShardKey) {
        let drawn = process.shards.get_mut(&key).and_then(|shard| shard.drawn.pop_front());
        if let Some(samples) = drawn {
            self.samples(id, process, key, samples);
        }
    }

    /// The engine's deadline has come.
    pub fn wake(&mut self, id: NodeId, life: u64, key: ShardKey) {
        self.worker(id, life, |world, process| {
            let Some(shard) = process.shards.get_mut(&key) else { return };
            if shard.wake <= world.now {
                shard.wake = 0;
                world.engine(id, process, key, engine::Event::Tick);
            }
        });
    }

    /// Ends all answers of a shard with an error.
    pub fn fail_answers(
        &mut self,
        id: NodeId,
        process: &mut WorkerProcess,
        key: ShardKey,
        why: &str,
    ) {
        let Some(shard) = process.shards.get_mut(&key) else { return };
        shard.refuse = Some(ErrorCode::NotReady);
        let reason = why.to_owned();
        self.engine(id, process, key, engine::Event::Fault { reason });
    }

    /// Tells an engine something and does what it wants: first what the stages wait for, then what
    /// clients hear.
    fn engine(
        &mut self,
        id: NodeId,
        process: &mut WorkerProcess,
        key: ShardKey,
        event: engine::Event,
    ) {
        let now = Instant(self.now);
        let Some(shard) = process.shards.get_mut(&key) else { return };
        let Some(engine) = &mut shard.engine else { return };
        engine.handle(now, event);
        let (mut frames, mut heard, mut fault) = (Vec::new(), Vec::new(), None);
        while let Some(action) = engine.poll_action() {
            match action {
                Action::Open(open) => frames.push(Frame::Open(open)),
                Action::Close(close) => frames.push(Frame::Close(close)),
                Action::Issue { step, tokens } => {
                    let rows = tokens.iter().map(|token| embed(*token)).collect();
                    frames.push(Frame::Step(step, rows));
                }
                Action::Emit { key, event } => heard.push((key, event)),
                Action::Fault { reason } => fault = Some(reason),
            }
        }
        for frame in frames {
            self.stage_takes(id, process, key, frame);
        }
        for (client, event) in heard {
            self.emit(id, process, key, client, event);
        }
        if let Some(why) = fault {
            self.frame_misfits(id, key, &why);
            self.broken(id, process, key, &why);
        }
        self.check_engine(id, key, process);
        let life = process.life;
        let Some(shard) = process.shards.get_mut(&key) else { return };
        let preempted = shard.engine.as_ref().map_or(0, |engine| engine.report().preemptions);
        self.checks.preemptions += preempted - std::mem::replace(&mut shard.preempted, preempted);
        let due = shard.engine.as_ref().and_then(|engine| engine.next_deadline());
        if let Some(due) = due
            && (shard.wake == 0 || due.0 < shard.wake)
        {
            shard.wake = due.0.max(self.now);
            self.at(shard.wake, Event::Wake { at: id, life, key });
        }
    }

    fn emit(
        &mut self,
        id: NodeId,
        process: &mut WorkerProcess,
        key: ShardKey,
        client: ClientKey,
        event: HeadEvent,
    ) {
        let Some(shard) = process.shards.get_mut(&key) else { return };
        let last = event.is_last();
        let to =
            if last { shard.clients.remove(&client) } else { shard.clients.get(&client).copied() };
        let Some(to) = to else { return };
        match event {
            HeadEvent::Token { .. } => self.checks.tokens += 1,
            HeadEvent::Reused { .. } => self.checks.reused += 1,
            _ => {}
        }
        self.send(id, to.from, to.life, Payload::Head(event));
    }
}

fn failed(generate: &Generate, code: ErrorCode) -> HeadEvent {
    let header = FailedHeader {
        request: generate.request.0,
        attempt: generate.attempt.0,
        choice: generate.choice,
        code: u32::from(code.number()),
        ..FailedHeader::default()
    };
    HeadEvent::Failed { header, code, message: String::new() }
}
