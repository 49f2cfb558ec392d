//! ○ What computes: a head that makes one token after the other, each a hash of all before it, as long
//! as every stage of its layout is there.

use shoal_protocol::control::HeadReport;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{Attempt, NodeId, RequestId, TokenId};
use shoal_protocol::request::{
    DoneHeader, FailedHeader, FinishReason, Generate, HeadEvent, NO_STOP_TOKEN, TokenHeader,
};
use shoal_shard_worker::agent::lifecycle::ShardKey;

use super::dice::mix;
use super::wire::{Event, Payload};
use super::worker::WorkerProcess;
use super::world::World;

/// One step of all stages.
const STEP_US: u64 = 8_000;

/// A token of a prompt or of an answer that goes on.
const PREFILL_US: u64 = 400;

/// An answer at a head.
pub struct Running {
    key: ShardKey,
    from: NodeId,
    from_life: u64,
    generate: Generate,
    fresh: bool,
}

/// The token after these: what every undisturbed cluster would say.
pub fn oracle(seed: u64, tokens: &[TokenId]) -> TokenId {
    let fold = |hash, token: &TokenId| mix(hash ^ u64::from(*token)).wrapping_add(1);
    tokens.iter().fold(mix(seed), fold) as u32
}

impl WorkerProcess {
    /// A coordinator is gone, and with it whoever wanted its answers.
    pub fn nobody_waits(&mut self, coordinator: NodeId) {
        self.running.retain(|_, running| running.from != coordinator);
    }

    /// What its heads report.
    pub fn heads(&self) -> Vec<HeadReport> {
        let heads = self.shards.iter().filter(|(_, shard)| shard.assignment.is_first());
        let of = |key: &ShardKey| HeadReport {
            replica: key.replica,
            generation: key.generation,
            running: self.running.values().filter(|running| running.key == *key).count() as u32,
            blocks_total: 100,
            ..HeadReport::default()
        };
        heads.map(|(key, _)| of(key)).collect()
    }
}

impl World {
    /// A coordinator asks a head for an answer.
    pub fn generate(
        &mut self,
        id: NodeId,
        process: &mut WorkerProcess,
        (from, from_life): (NodeId, u64),
        generate: Generate,
    ) {
        let shards = process.shards.iter();
        let mut heads = shards.filter(|(key, shard)| {
            key.replica == generate.replica && shard.assignment.is_first() && shard.linked
        });
        let key = heads.rfind(|(_, shard)| !shard.broken).map(|(key, _)| *key);
        let (request, attempt) = (generate.request, generate.attempt);
        let Some(key) = key else {
            let failed = failed(&generate, ErrorCode::NotReady);
            return self.send(id, from, from_life, Payload::Head(failed));
        };
        let prefill = PREFILL_US * generate.tokens.len() as u64;
        let running = Running { key, from, from_life, generate, fresh: true };
        process.running.insert((request, attempt), running);
        let at = self.now + prefill + STEP_US;
        self.at(at, Event::Step { at: id, life: process.life, request, attempt });
    }

    /// A head's next step for an answer.
    pub fn head_step(&mut self, id: NodeId, life: u64, request: RequestId, attempt: Attempt) {
        self.worker(id, life, |world, process| {
            let Some(running) = process.running.get(&(request, attempt)) else { return };
            let key = running.key;
            let slow = world.net.slow.values().copied().max().unwrap_or(1);
            let next = Event::Step { at: id, life, request, attempt };
            if !world.ring_is_whole(id, process, key) {
                return world.at(world.now + 20_000, next);
            }
            let Some(running) = process.running.get_mut(&(request, attempt)) else { return };
            let generate = &mut running.generate;
            let index = generate.tokens.len() as u32 - generate.prompt_len;
            if index >= generate.max_tokens {
                let event = done(generate, index);
                let (to, their_life) = (running.from, running.from_life);
                process.running.remove(&(request, attempt));
                return world.send(id, to, their_life, Payload::Head(event));
            }
            let token = oracle(generate.sampling.seed, &generate.tokens);
            generate.tokens.push(token);
            let prefill_us = if std::mem::take(&mut running.fresh) { 1_000 } else { 0 };
            let header = TokenHeader {
                request: request.0,
                attempt: attempt.0,
                choice: generate.choice,
                index,
                token,
                prefill_us,
                ..TokenHeader::default()
            };
            let event = HeadEvent::Token { header, candidates: Vec::new() };
            let (to, their_life) = (running.from, running.from_life);
            world.checks.tokens += 1;
            world.send(id, to, their_life, Payload::Head(event));
            world.at(world.now + STEP_US * slow, next);
        });
    }

    /// Whether every stage of a layout can take a step now.
    fn ring_is_whole(&self, id: NodeId, process: &WorkerProcess, key: ShardKey) -> bool {
        let Some(shard) = process.shards.get(&key) else { return false };
        let others = shard.assignment.replica.nodes().filter(|node| *node != id);
        others.into_iter().all(|node| {
            let Some((life, _)) = shard.ring.get(&node) else { return false };
            let there = self.workers.get(&node).and_then(|worker| worker.process.as_ref());
            let there = there.filter(|process| process.life == *life);
            let runs = there.and_then(|p| p.shards.get(&key)).is_some_and(|shard| !shard.broken);
            let cut = self.net.cut.contains(&(id, node)) || self.net.cut.contains(&(node, id));
            runs && !cut && !self.is_frozen(node)
        })
    }

    /// Ends all answers of a shard with an error.
    pub fn fail_answers(
        &mut self,
        id: NodeId,
        process: &mut WorkerProcess,
        key: ShardKey,
        code: ErrorCode,
    ) {
        let gone: Vec<_> =
            process.running.iter().filter(|(_, r)| r.key == key).map(|(name, _)| *name).collect();
        for name in gone {
            let Some(running) = process.running.remove(&name) else { continue };
            let failed = failed(&running.generate, code);
            self.send(id, running.from, running.from_life, Payload::Head(failed));
        }
    }
}

fn done(generate: &Generate, tokens: u32) -> HeadEvent {
    let header = DoneHeader {
        request: generate.request.0,
        attempt: generate.attempt.0,
        choice: generate.choice,
        reason: FinishReason::Length as u32,
        tokens,
        stop_token: NO_STOP_TOKEN,
        ..DoneHeader::default()
    };
    HeadEvent::Done { header, reason: FinishReason::Length }
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
