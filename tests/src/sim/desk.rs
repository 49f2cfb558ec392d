//! ○ A coordinator's answers (as `recovery/answer.rs` holds them): the real `Sequence`, `Recovery` and
//! router, in a loop that may lose its heads at any time.
//!
//! A real attempt has a stream of its own, which is dropped with it. Here every event of any attempt
//! reaches the sequence as long as an attempt runs, so that what keeps old ones out is always needed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use shoal_coordinator::dispatch::{Sequence, Taken};
use shoal_coordinator::recovery::{GiveUp, Loss, Next, Pace, Recovery, is_superseded};
use shoal_coordinator::router::book::Outcome;
use shoal_coordinator::router::budget::RetryBudget;
use shoal_coordinator::router::{RouteRequest, Router, Ticket};
use shoal_coordinator::serving::{ServedDeployment, ServingTable};
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{Attempt, DeploymentName, Generation, NodeId, ReplicaId};
use shoal_protocol::request::HeadEvent;
use shoal_protocol::units::Instant;

use super::bug::Bug;
use super::coordinator::Process;
use super::wire::Payload;
use super::world::World;

/// A head that is there answers a late request itself.
const LATE_US: u64 = 50_000;

/// Why an answer ends early.
#[derive(Debug)]
pub enum Ended {
    /// The core gives up.
    GaveUp(GiveUp),
    /// Its deadline has passed.
    OutOfTime,
}

/// An answer's name: a request, and one of its choices.
pub type Name = (u64, u32);

/// All answers of a coordinator.
#[derive(Default)]
pub struct Desk {
    /// The router.
    pub router: Router,
    /// The real one.
    budget: RetryBudget,
    /// What is served.
    pub table: Arc<ServingTable>,
    /// Those that go on.
    pub answers: BTreeMap<Name, Answer>,
    /// The suspect of each deployment that is tried alone.
    alone: BTreeMap<DeploymentName, Name>,
}

/// One of them.
pub struct Answer {
    /// What was asked.
    pub deployment: DeploymentName,
    /// The real one.
    pub sequence: Sequence,
    recovery: Recovery,
    running: Option<Running>,
    /// Attempts in a row that were lost with their worker or layout before they had brought a token, by our
    /// own count.
    pub fruitless: u32,
    last_event: u64,
    /// When its client will not wait any more.
    pub deadline: u64,
    /// Whose it is.
    pub client: u64,
}

struct Running {
    ticket: Ticket,
    life: u64,
    /// The real one.
    pace: Pace,
    /// Whether it has brought a token.
    fruitful: bool,
}

impl Running {
    fn new(ticket: Ticket, life: u64) -> Self {
        Self { ticket, life, pace: Pace::default(), fruitful: false }
    }
}

impl Desk {
    /// What runs at a layout, by our own count.
    pub fn running(&self, at: (ReplicaId, u64)) -> u32 {
        let tickets = self.answers.values().filter_map(|a| a.running.as_ref()).map(|r| &r.ticket);
        tickets.filter(|t| (t.replica, t.generation.0) == at).count() as u32
    }
}

impl World {
    /// A client asks here; `false` where it is turned away. All choices go to one replica.
    pub fn asked(&mut self, id: NodeId, client: u64, sequences: Vec<Sequence>) -> bool {
        let mut taken = false;
        let Some(wanted) = self.clients.by_number.get(&client) else { return false };
        let (name, deadline) = (wanted.deployment.clone(), self.now + wanted.patience);
        let now = self.now;
        self.turn(id, |world, process, _| {
            let table = Arc::clone(&process.desk.table);
            let Some(deployment) = table.deployments.get(&name) else { return };
            let Some(first) = sequences.first() else { return };
            let count = sequences.len() as u32;
            process.desk.budget.request(Instant(now));
            let Ok(ticket) = world.admit(process, deployment, first, (count, &[])) else { return };
            taken = true;
            let names: Vec<Name> = sequences.iter().map(|s| (s.request.0, s.choice)).collect();
            for (name, sequence) in names.iter().zip(sequences) {
                let answer = Answer {
                    deployment: deployment.name.clone(),
                    sequence,
                    recovery: Recovery::new(deployment.created),
                    // Taken with the others' places.
                    running: Some(Running::new(ticket.clone(), 0)),
                    fruitless: 0,
                    last_event: now,
                    deadline,
                    client,
                };
                process.desk.answers.insert(*name, answer);
            }
            for name in names {
                world.attempt(id, process, name, ticket.clone());
            }
        });
        taken
    }

    fn admit(
        &mut self,
        process: &mut Process,
        deployment: &ServedDeployment,
        sequence: &Sequence,
        (sequences, avoid): (u32, &[(ReplicaId, Generation)]),
    ) -> Result<Ticket, ()> {
        let request = RouteRequest {
            sequences,
            prompt_tokens: sequence.rows() as u32,
            max_tokens: sequence.left(),
            avoid,
            ..RouteRequest::default()
        };
        let dice = self.dice.bits();
        let router = &mut process.desk.router;
        router.admit(Instant(self.now), dice, deployment, &request).map_err(drop)
    }

    fn attempt(&mut self, id: NodeId, process: &mut Process, request: Name, ticket: Ticket) {
        let known = process.agents.workers.get(&ticket.head).and_then(|known| known.link.as_ref());
        let life = known.map(|link| link.life);
        let Some(answer) = process.desk.answers.get_mut(&request) else { return };
        answer.sequence.attempt = answer.recovery.attempt();
        answer.sequence.reused = 0;
        // Every build here is the same one.
        let tenant = answer.sequence.tenant;
        let left_ms = answer.deadline.saturating_sub(self.now) / 1_000;
        let mut generate = answer.sequence.generate(ticket.replica, left_ms.max(1));
        let received = answer.sequence.received.len() as u32;
        if received > 0 && self.bug == Some(Bug::ReceivedBecomesPrompt) {
            generate.prompt_len += received;
        }
        if received > 1 && self.bug == Some(Bug::ResumeDropsToken) {
            generate.tokens.remove(generate.prompt_len as usize);
        }
        self.checks.attempts += 1;
        answer.last_event = self.now;
        let head = ticket.head;
        answer.running = Some(Running::new(ticket, life.unwrap_or(0)));
        match life {
            None => self.lost(id, process, request, Loss::Unreachable, ErrorCode::WorkerLost),
            Some(life) => {
                let generate = Box::new(generate);
                self.send(
                    id,
                    head,
                    life,
                    Payload::Generate { from: id, life: process.life, generate, tenant },
                );
            }
        }
    }

    /// A head has said something.
    pub fn head_event(&mut self, id: NodeId, process: &mut Process, event: HeadEvent) {
        let (request, _, choice) = event.names();
        let request = (request, choice);
        let Some(answer) = process.desk.answers.get_mut(&request) else { return };
        if answer.running.is_none() {
            return;
        }
        let mut event = event;
        if self.bug == Some(Bug::OldAttemptTaken) {
            rename(&mut event, answer.sequence.attempt);
        }
        let again = match &event {
            HeadEvent::Token { header, .. } => Some(header.token),
            _ => None,
        };
        match answer.sequence.take(event) {
            Taken::Token(token) => {
                self.progress(process, request, token.first.map(|(_, prefill)| prefill));
                self.deliver(process, request, token.id);
            }
            // No model of the simulator is an encoder.
            Taken::Vector(_) | Taken::Noted => {}
            Taken::Stale => {
                self.checks.stale += 1;
                if let Some(token) = again.filter(|_| self.bug == Some(Bug::StaleDelivered)) {
                    self.deliver(process, request, token);
                }
            }
            Taken::Done { reason, stop_token } => {
                self.release(process, request, Outcome::Complete);
                if let Some(answer) = process.desk.answers.remove(&request) {
                    self.check_done(answer.client, request, reason, stop_token);
                }
                process.desk.alone.retain(|_, holder| *holder != request);
            }
            Taken::Failed { code, message } => {
                let error = shoal_coordinator::dispatch::DispatchError::Failed { code, message };
                self.lost(id, process, request, Loss::of(&error), code);
            }
            Taken::Gap { expected, found } => {
                self.trace(u64::from(expected) << 32 | u64::from(found));
                self.lost(id, process, request, Loss::Broken, ErrorCode::ProtocolViolation);
            }
        }
    }

    fn deliver(&mut self, process: &mut Process, request: Name, token: u32) {
        let Some(answer) = process.desk.answers.get(&request) else { return };
        let client = answer.client;
        self.check_token(client, request, token);
    }

    fn progress(&mut self, process: &mut Process, request: Name, prefill: Option<u32>) {
        let now = Instant(self.now);
        let Some(answer) = process.desk.answers.get_mut(&request) else { return };
        answer.last_event = self.now;
        answer.fruitless = 0;
        answer.recovery.went_on(now);
        if let Some(running) = &mut answer.running {
            running.fruitful = true;
            running.pace.token(now);
            match prefill {
                Some(us) => {
                    let prefill = Duration::from_micros(u64::from(us));
                    process.desk.router.first_token(now, &mut running.ticket, prefill);
                }
                None => process.desk.router.token(now, &mut running.ticket),
            }
        }
        process.desk.alone.retain(|_, holder| *holder != request);
    }

    /// Gives a place back.
    fn release(&mut self, process: &mut Process, request: Name, outcome: Outcome) {
        let Some(answer) = process.desk.answers.get_mut(&request) else { return };
        let Some(running) = answer.running.take() else { return };
        let now = Instant(self.now);
        let times = match self.bug {
            Some(Bug::PlaceFreedTwice) => 2,
            Some(Bug::PlaceLeaks) if outcome != Outcome::Complete => 0,
            _ => 1,
        };
        for _ in 0..times {
            process.desk.router.ended(now, self.dice.bits(), &running.ticket, outcome);
        }
    }

    fn lost(
        &mut self,
        id: NodeId,
        process: &mut Process,
        request: Name,
        loss: Loss,
        code: ErrorCode,
    ) {
        let dice = self.dice.bits();
        let Some(answer) = process.desk.answers.get_mut(&request) else { return };
        let Some(running) = &answer.running else { return };
        let (ticket, life) = (&running.ticket, running.life);
        let (head, at) = (ticket.head, (ticket.replica, ticket.generation));
        let cancel = cancel_of(&answer.sequence);
        if !running.fruitful && matches!(loss, Loss::Lost | Loss::Superseded) {
            answer.fruitless += 1;
        }
        let verdict = answer.recovery.lost(Instant(self.now), dice, at, loss);
        // A stream that is given up with its conversation takes no word along.
        let link = process.agents.workers.get(&head).and_then(|known| known.link.as_ref());
        if link.is_some_and(|link| link.life == life) {
            self.send(id, head, life, cancel);
        }
        self.release(process, request, Outcome::of(code));
        self.checks.losses += 1;
        if let Err(verdict) = verdict {
            self.gave_up(process, request, loss, Ended::GaveUp(verdict));
        }
    }

    /// One of a request's answers does not go on: its client is told, and the others end with it.
    fn gave_up(&mut self, process: &mut Process, request: Name, loss: Loss, verdict: Ended) {
        let Some(answer) = process.desk.answers.get(&request) else { return };
        let (client, late) = (answer.client, self.now + 1_000 >= answer.deadline);
        self.check_ended(answer, loss, &verdict);
        let poisonous = matches!(verdict, Ended::GaveUp(GiveUp::Quarantined { .. }));
        self.checks.quarantined += u64::from(poisonous);
        self.hang_up(process, request.0);
        if late {
            return self.clients.satisfied(client);
        }
        self.clients.failed(client);
        self.at(self.now + 200_000, super::wire::Event::Ask { client });
    }

    /// Nobody wants the answers of a request any more.
    pub fn hang_up(&mut self, process: &mut Process, request: u64) {
        let names: Vec<Name> =
            process.desk.answers.keys().filter(|name| name.0 == request).copied().collect();
        for name in names {
            process.desk.alone.retain(|_, holder| *holder != name);
            let Some(answer) = process.desk.answers.get(&name) else { continue };
            if let Some(running) = &answer.running {
                let (head, life) = (running.ticket.head, running.life);
                let cancel = cancel_of(&answer.sequence);
                let link = process.agents.workers.get(&head).and_then(|known| known.link.as_ref());
                if let Some(link) = link.filter(|link| link.life == life) {
                    self.send(process.id, head, link.life, cancel);
                }
                self.release(process, name, Outcome::NotJudged);
            }
            process.desk.answers.remove(&name);
        }
    }

    /// The conversation with a worker is over: what runs there is lost.
    pub fn head_is_gone(&mut self, id: NodeId, process: &mut Process, head: NodeId) {
        let at = |answer: &Answer| answer.running.as_ref().is_some_and(|r| r.ticket.head == head);
        let answers = process.desk.answers.iter();
        let lost: Vec<Name> = answers.filter(|(_, a)| at(a)).map(|(request, _)| *request).collect();
        for request in lost {
            self.lost(id, process, request, Loss::Lost, ErrorCode::WorkerLost);
        }
    }

    /// What waits is tried, and what is silent is looked at.
    pub fn desk_tick(&mut self, id: NodeId, process: &mut Process) {
        let requests: Vec<Name> = process.desk.answers.keys().copied().collect();
        for request in requests {
            let Some(answer) = process.desk.answers.get(&request) else { continue };
            if self.now >= answer.deadline + LATE_US {
                self.gave_up(process, request, Loss::Final, Ended::OutOfTime);
                continue;
            }
            let table = Arc::clone(&process.desk.table);
            let deployment = table.deployments.get(&answer.deployment);
            match &answer.running {
                Some(running) => {
                    let at = (running.ticket.replica, running.ticket.generation);
                    let silence = running.pace.silence();
                    let silent = Instant(self.now) >= Instant(answer.last_event) + silence;
                    if silent && deployment.is_some_and(|deployment| is_superseded(deployment, at))
                    {
                        self.lost(
                            id,
                            process,
                            request,
                            Loss::Superseded,
                            ErrorCode::StaleGeneration,
                        );
                    }
                }
                None => self.try_again(id, process, request, deployment.map(|d| d.as_ref())),
            }
        }
    }

    fn try_again(
        &mut self,
        id: NodeId,
        process: &mut Process,
        request: Name,
        deployment: Option<&ServedDeployment>,
    ) {
        let now = Instant(self.now);
        let dice = self.dice.bits();
        let Desk { answers, budget, alone, .. } = &mut process.desk;
        let Some(answer) = answers.get_mut(&request) else { return };
        if answer.recovery.is_suspect() {
            let holder = alone.entry(answer.deployment.clone()).or_insert(request);
            if *holder != request {
                return;
            }
        }
        match answer.recovery.next_attempt(now, dice, deployment, || budget.retry(now)) {
            // A leader that has not looked yet shows nothing at all.
            Err(GiveUp::Undeployed) if deployment.is_none() => {}
            Err(verdict) => {
                self.gave_up(process, request, Loss::Final, Ended::GaveUp(verdict));
            }
            Ok(Next::Wait(_)) => {}
            Ok(Next::Ask(avoid)) => {
                let Some(deployment) = deployment else { return };
                let sequence = answer.sequence.clone();
                match self.admit(process, deployment, &sequence, (1, &avoid)) {
                    Ok(ticket) => self.attempt(id, process, request, ticket),
                    Err(()) => {
                        let dice = self.dice.bits();
                        if let Some(answer) = process.desk.answers.get_mut(&request) {
                            answer.recovery.no_room(now, dice);
                        }
                    }
                }
            }
        }
    }
}

fn cancel_of(sequence: &Sequence) -> Payload {
    let (request, attempt, choice) = (sequence.request, sequence.attempt, sequence.choice);
    Payload::Cancel { request, attempt, choice }
}

/// Makes an event look like one of this attempt.
fn rename(event: &mut HeadEvent, attempt: Attempt) {
    match event {
        HeadEvent::Token { header, .. } => header.attempt = attempt.0,
        HeadEvent::Done { header, .. } => header.attempt = attempt.0,
        HeadEvent::Failed { header, .. } => header.attempt = attempt.0,
        HeadEvent::Reused { header } => header.attempt = attempt.0,
        HeadEvent::Vector { header, .. } => header.attempt = attempt.0,
    }
}
