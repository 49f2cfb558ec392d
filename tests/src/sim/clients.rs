//! ○ Those who ask for answers, and what they must get: the oracle's tokens, in order, once.

use std::collections::BTreeMap;
use std::sync::Arc;

use shoal_coordinator::dispatch::Sequence;
use shoal_protocol::id::{Attempt, DeploymentName, NodeId, RequestId, TokenId};
use shoal_protocol::request::SamplingRecord;

use super::head::oracle;
use super::wire::Event;
use super::world::World;

/// How long a client waits before it asks again where it was turned away, or its coordinator has died.
const AGAIN_US: u64 = 150_000;

/// All clients.
#[derive(Default)]
pub struct Clients {
    by_number: BTreeMap<u64, Client>,
}

/// One answer that is wanted; asked for again where its coordinator dies.
struct Client {
    deployment: DeploymentName,
    prompt: Arc<[TokenId]>,
    seed: u64,
    max_tokens: u32,
    tries: u64,
    /// Of this try.
    got: Vec<TokenId>,
    at: Option<(NodeId, u64)>,
    complete: bool,
}

impl Clients {
    /// A client that will ask.
    pub fn add(&mut self, number: u64, deployment: DeploymentName, seed: u64, max_tokens: u32) {
        let prompt: Vec<u32> = (0..3 + seed % 6).map(|i| (seed >> i) as u32 & 0xFFFF).collect();
        let client = Client {
            deployment,
            prompt: prompt.into(),
            seed,
            max_tokens,
            tries: 0,
            got: Vec::new(),
            at: None,
            complete: false,
        };
        self.by_number.insert(number, client);
    }

    /// What a client wants to talk to.
    pub fn deployment(&self, number: u64) -> DeploymentName {
        self.by_number[&number].deployment.clone()
    }

    /// A token for a client: the next one of the oracle's, or words.
    pub fn token(&mut self, number: u64, token: TokenId) -> Result<(), String> {
        let Some(client) = self.by_number.get_mut(&number) else { return Ok(()) };
        let before: Vec<_> = client.prompt.iter().chain(&client.got).copied().collect();
        let expected = oracle(client.seed, &before);
        let index = client.got.len();
        client.got.push(token);
        match token == expected && index < client.max_tokens as usize {
            true => Ok(()),
            false => Err(format!("token {index} is {token}, the oracle says {expected}")),
        }
    }

    /// An answer has come to its end.
    pub fn complete(&mut self, number: u64) {
        if let Some(client) = self.by_number.get_mut(&number) {
            client.complete = client.got.len() == client.max_tokens as usize;
        }
    }

    /// A client was told that its answer does not go on.
    pub fn failed(&mut self, number: u64) {
        if let Some(client) = self.by_number.get_mut(&number) {
            client.at = None;
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
            client.at = None;
            client.got.clear();
            client.tries += 1;
            let request = number * 1_000 + client.tries;
            let sequence = Sequence {
                request: RequestId(request),
                attempt: Attempt(0),
                choice: 0,
                prompt: Arc::clone(&client.prompt),
                received: Vec::new(),
                sampling: SamplingRecord { seed: client.seed, ..SamplingRecord::GREEDY },
                stop_tokens: Arc::from([]),
                max_tokens: client.max_tokens,
            };
            if let Some((id, life)) = self.dice.pick(&lives)
                && !self.is_frozen(id)
                && self.asked(id, number, request, sequence)
                && let Some(client) = self.clients.by_number.get_mut(&number)
            {
                client.at = Some((id, life));
            }
        }
        self.at(self.now + AGAIN_US, Event::Ask { client: number });
    }
}
