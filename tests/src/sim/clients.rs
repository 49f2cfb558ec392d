//! ○ Those who ask for answers: with one choice or several, with stop tokens, deadlines and penalties,
//! and some hang up. What they must get says `invariants/streams.rs`.

use std::collections::BTreeMap;
use std::sync::Arc;

use shoal_coordinator::dispatch::Sequence;
use shoal_protocol::id::{Attempt, DeploymentName, NodeId, RequestId, TokenId};
use shoal_protocol::prefix::Tenant;
use shoal_protocol::request::SamplingRecord;

use super::dice::Dice;
use super::genesis;
use super::model::{Oracle, VOCAB};
use super::wire::Event;
use super::world::World;

/// How long a client waits before it asks again where it was turned away, or its coordinator has died.
const AGAIN_US: u64 = 150_000;

/// A deadline that no answer comes near.
const PATIENT_US: u64 = 600_000_000;

/// All clients.
#[derive(Default)]
pub struct Clients {
    /// By number.
    pub by_number: BTreeMap<u64, Client>,
}

/// Answers that are wanted; asked for again where their coordinator dies.
pub struct Client {
    /// What it talks to.
    pub deployment: DeploymentName,
    prompt: Arc<[TokenId]>,
    sampling: SamplingRecord,
    /// A sampled one of these ends an answer.
    pub stop_tokens: Arc<[TokenId]>,
    /// The longest answer.
    pub max_tokens: u32,
    /// How long it waits for its answers.
    pub patience: u64,
    tries: u64,
    /// Of this try, one for each answer that is wanted.
    pub choices: Vec<Choice>,
    n: u32,
    at: Option<(NodeId, u64)>,
    /// Whether it wants nothing more.
    pub complete: bool,
}

/// What has come of one answer.
pub struct Choice {
    oracle: Oracle,
    /// What comes next.
    pub expected: Option<TokenId>,
    /// Tokens so far.
    pub got: u32,
    /// Whether it has ended well.
    pub done: bool,
}

impl Choice {
    fn new(layers: u32, prompt: &[TokenId], sampling: SamplingRecord) -> Self {
        let mut oracle = Oracle::new(layers, prompt, sampling);
        let expected = oracle.next();
        Self { oracle, expected, got: 0, done: false }
    }

    /// On to the next token.
    pub fn advance(&mut self) {
        self.got += 1;
        self.expected = self.oracle.next();
    }
}

impl Client {
    /// A client that will ask.
    pub fn draw(dice: &mut Dice, deployment: DeploymentName) -> Self {
        let mut prompt: Vec<u32> =
            (0..dice.range(1, 24)).map(|_| dice.range(0, u64::from(VOCAB)) as u32).collect();
        let mut sampling = SamplingRecord { seed: dice.bits(), ..SamplingRecord::GREEDY };
        if sampling.seed & 1 == 0 {
            // Every second one begins as all of these do.
            (7..).zip(&mut prompt).for_each(|(place, token)| *token = place * 5 % VOCAB);
        }
        if dice.one_in(2) {
            sampling.temperature = 0.9;
        }
        if dice.one_in(2) {
            sampling.presence_penalty = 0.5;
            sampling.frequency_penalty = 0.7;
        }
        let stops = if dice.one_in(4) { 1 } else { 0 };
        let stop_tokens: Vec<u32> =
            (0..stops).map(|_| dice.range(0, u64::from(VOCAB)) as u32).collect();
        Self {
            deployment,
            prompt: prompt.into(),
            sampling,
            stop_tokens: stop_tokens.into(),
            max_tokens: dice.range(4, 150) as u32,
            patience: if dice.one_in(6) { dice.range(200_000, 2_000_000) } else { PATIENT_US },
            tries: 0,
            choices: Vec::new(),
            n: if dice.one_in(4) { dice.range(2, 4) as u32 } else { 1 },
            at: None,
            complete: false,
        }
    }

    /// Begins anew: nothing of an earlier try counts.
    fn sequences(&mut self, number: u64) -> Vec<Sequence> {
        self.tries += 1;
        self.at = None;
        self.choices.clear();
        let layers = genesis::layers(&self.deployment);
        let mut sequences = Vec::new();
        for choice in 0..self.n {
            let stream = SamplingRecord::stream_of(0, choice as u16);
            let sampling = SamplingRecord { stream, ..self.sampling };
            self.choices.push(Choice::new(layers, &self.prompt, sampling));
            sequences.push(Sequence {
                request: RequestId(number * 1_000 + self.tries),
                attempt: Attempt(0),
                choice,
                prompt: Arc::clone(&self.prompt),
                received: Vec::new(),
                sampling,
                stop_tokens: Arc::clone(&self.stop_tokens),
                max_tokens: self.max_tokens,
                adapter: None,
                tenant: Some(Tenant(u128::from(self.sampling.seed >> 1 & 1))),
                reused: 0,
            });
        }
        sequences
    }
}

impl Clients {
    /// A client was told that its answer does not go on.
    pub fn failed(&mut self, number: u64) {
        if let Some(client) = self.by_number.get_mut(&number) {
            client.at = None;
        }
    }

    /// It wants nothing more.
    pub fn satisfied(&mut self, number: u64) {
        if let Some(client) = self.by_number.get_mut(&number) {
            client.complete = true;
        }
    }

    /// What is not complete.
    pub fn waiting(&self) -> usize {
        self.by_number.values().filter(|client| !client.complete).count()
    }
}

impl World {
    /// A client asks, or looks whether its coordinator still lives.
    pub fn client_asks(&mut self, number: u64) {
        let lives: Vec<(NodeId, u64)> = self
            .coordinators
            .iter()
            .filter_map(|(id, machine)| Some((*id, machine.process.as_ref()?.life)))
            .collect();
        let Some(client) = self.clients.by_number.get_mut(&number) else { return };
        if client.complete {
            return;
        }
        if client.at.is_none_or(|at| !lives.contains(&at)) {
            let sequences = client.sequences(number);
            if let Some((id, life)) = self.dice.pick(&lives)
                && !self.is_frozen(id)
                && self.asked(id, number, sequences)
                && let Some(client) = self.clients.by_number.get_mut(&number)
            {
                client.at = Some((id, life));
            }
        }
        self.at(self.now + AGAIN_US, Event::Ask { client: number });
    }

    /// A client goes away.
    pub fn client_hangs_up(&mut self, number: u64) {
        let Some(client) = self.clients.by_number.get_mut(&number) else { return };
        client.complete = true;
        let (at, request) = (client.at.take(), number * 1_000 + client.tries);
        let Some((id, _)) = at else { return };
        self.turn(id, |world, process, _| world.hang_up(process, request));
    }
}
