//! ○ The events of a simulation, in order.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::control::HeadReport;
use shoal_protocol::id::{DeploymentName, Generation, NodeId, ReplicaId};
use shoal_protocol::units::Instant;

use super::head::{Head, Progress, Sequence};
use super::{Chooser, Fault, Figures, Scenario};
use crate::router::admission::AdmissionLimits;
use crate::router::book::Outcome;
use crate::router::budget::RetryBudget;
use crate::router::dice::Dice;
use crate::router::policy::Policy;
use crate::router::{RouteRequest, Router, Ticket};
use crate::serving::{ServedDeployment, ServedReplica, ServingTable};

/// How often heads report: as often as workers do.
const REPORT: u64 = 250_000;

/// How long a head that fails fast takes.
const FAIL_AFTER: u64 = 1000;

/// Tries of one request.
const TRIES: u32 = 3;

/// When a simulation ends that does not end by itself, in seconds after the last arrival: a queue
/// without bound has drained long before, and a frozen head never does.
const END: f64 = 3600.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive,
    Step(usize, u64),
    Report,
    Fault(usize),
    Fail(usize, u32),
    Check(usize, u32),
}

struct Request {
    arrived: u64,
    prompt: u32,
    answer: u32,
    attempt: u32,
    router: usize,
    replica: usize,
    ticket: Option<Ticket>,
    heard: u64,
    done: bool,
}

struct Run<'a> {
    scenario: &'a Scenario,
    chooser: Chooser,
    now: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    sequence: u64,
    heads: Vec<Head>,
    /// Steps that were begun before a head froze do not end.
    step: Vec<u64>,
    failing: Vec<bool>,
    /// When a head last said anything.
    said: Vec<u64>,
    routers: Vec<Router>,
    budget: RetryBudget,
    deployment: ServedDeployment,
    requests: Vec<Request>,
    dice: Dice,
    /// The requests' own dice: every chooser meets the same requests at the same times.
    arrivals: Dice,
    rate: f64,
    scratch: Vec<f64>,
    figures: Figures,
}

/// Runs a scenario.
pub fn run(scenario: &Scenario, chooser: Chooser, seed: u64) -> Figures {
    let policy = match chooser {
        Chooser::Router(policy) => policy,
        Chooser::Oracle => Policy::default(),
    };
    // What a bound would refuse is not what is compared here.
    let limits = AdmissionLimits { sequences_per_replica: u32::MAX / 1024 };
    let whole = scenario.service.capacity(scenario.prompt, scenario.answer);
    let speed: f64 = scenario.slow.iter().map(|slow| 1.0 / slow).sum();
    let n = scenario.slow.len();
    let mut run = Run {
        scenario,
        chooser,
        now: 0,
        events: BinaryHeap::new(),
        sequence: 0,
        heads: scenario.slow.iter().map(|slow| Head::new(scenario.service, *slow)).collect(),
        step: vec![0; n],
        failing: vec![false; n],
        said: vec![0; n],
        routers: (0..scenario.routers).map(|_| Router::new(policy, limits)).collect(),
        budget: RetryBudget::default(),
        deployment: deployment(n),
        requests: Vec::new(),
        dice: Dice::new(seed ^ 0x0d1c_e000),
        arrivals: Dice::new(seed),
        rate: scenario.load * whole * speed,
        scratch: Vec::new(),
        figures: Figures::default(),
    };
    run.go();
    run.figures
}

fn deployment(replicas: usize) -> ServedDeployment {
    let replica = |i: usize| ServedReplica {
        id: ReplicaId(i as u32),
        generation: Generation(1),
        head: NodeId::worker(i as u32 + 1),
        requests: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 4000 + i as u16))),
        ready: true,
        load: None,
    };
    ServedDeployment {
        // A constant that is a valid name; an error would be a bug of this file.
        name: DeploymentName::new("simulated").unwrap_or_else(|_| unreachable!("a valid name")),
        created: 0,
        folder: None,
        vocab: 1,
        context_max: u32::MAX,
        kind: crate::serving::ServedKind::Generate,
        adapter: None,
        replicas: (0..replicas).map(replica).collect(),
        phase: shoal_protocol::admin::DeploymentPhase::Ready,
        reason: String::new(),
    }
}

impl Run<'_> {
    fn go(&mut self) {
        self.report();
        self.after(0, Event::Arrive);
        for (i, (at, ..)) in self.scenario.faults.iter().enumerate() {
            self.at(micros(*at), Event::Fault(i));
        }
        let end = micros(self.scenario.warm_up + self.scenario.measured + END);
        let mut progress = Vec::new();
        while let Some(Reverse((at, _, event))) = self.events.pop() {
            if at > end {
                break;
            }
            self.now = at;
            match event {
                Event::Arrive => self.arrive(),
                Event::Step(replica, step) if step == self.step[replica] => {
                    self.step_done(replica, &mut progress);
                }
                Event::Step(..) => {}
                Event::Report => self.report(),
                Event::Fault(i) => self.fault(i),
                Event::Fail(request, attempt) => self.give_up(request, attempt, Outcome::Broken),
                Event::Check(request, attempt) => self.check(request, attempt),
            }
        }
        let late = self.requests.iter().filter(|r| !r.done && measured(self.scenario, r.arrived));
        self.figures.errors += late.count();
        self.figures.times.sort_by(f64::total_cmp);
    }

    fn time(&self) -> f64 {
        self.now as f64 * 1e-6
    }

    fn at(&mut self, at: u64, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((at, self.sequence, event)));
    }

    fn after(&mut self, micros: u64, event: Event) {
        self.at(self.now + micros, event);
    }

    fn arrive(&mut self) {
        let next = micros(self.arrivals.exponential(1.0 / self.rate));
        let mut length = |mean: f64| {
            let drawn = self.arrivals.exponential(mean).min(4.0 * mean);
            (drawn as u32).max(1)
        };
        let request = Request {
            arrived: self.now,
            prompt: length(self.scenario.prompt),
            answer: length(self.scenario.answer),
            attempt: 0,
            router: (self.arrivals.bits() % self.routers.len() as u64) as usize,
            replica: 0,
            ticket: None,
            heard: self.now,
            done: false,
        };
        self.requests.push(request);
        self.budget.request(Instant(self.now));
        self.send(self.requests.len() - 1, None);
        if self.time() < self.scenario.warm_up + self.scenario.measured {
            self.after(next, Event::Arrive);
        }
    }

    fn send(&mut self, at: usize, avoid: Option<usize>) {
        let request = &self.requests[at];
        let (router, prompt, answer) = (request.router, request.prompt, request.answer);
        let replica = match self.chooser {
            Chooser::Oracle => {
                let scratch = &mut self.scratch;
                let usable = (0..self.heads.len()).filter(|i| !self.failing[*i]);
                let mut time = |i: &usize| self.heads[*i].foresee(prompt, answer, scratch);
                let best = usable.map(|i| (time(&i), i)).min_by(|a, b| a.0.total_cmp(&b.0));
                best.map_or(0, |(_, i)| i)
            }
            Chooser::Router(_) => {
                let avoid = avoid.map(|i| (ReplicaId(i as u32), Generation(1)));
                let ask = RouteRequest {
                    sequences: 1,
                    prompt_tokens: prompt,
                    max_tokens: (4.0 * self.scenario.answer) as u32,
                    block_hashes: &[],
                    avoid: avoid.as_slice(),
                };
                let (now, dice) = (Instant(self.now), self.dice.bits());
                match self.routers[router].admit(now, dice, &self.deployment, &ask) {
                    Err(_) => return self.fail(at),
                    Ok(ticket) => {
                        let replica = ticket.replica.0 as usize;
                        self.requests[at].ticket = Some(ticket);
                        replica
                    }
                }
            }
        };
        self.count(replica);
        let request = &mut self.requests[at];
        (request.replica, request.heard) = (replica, self.now);
        let attempt = request.attempt;
        if self.failing[replica] {
            return self.after(FAIL_AFTER, Event::Fail(at, attempt));
        }
        if let Some(patience) = self.scenario.patience {
            self.after(micros(patience), Event::Check(at, attempt));
        }
        let sequence = Sequence { request: at, attempt, prompt, answer, began: 0.0 };
        self.heads[replica].waiting.push_back(sequence);
        if !self.heads[replica].busy {
            self.begin(replica);
        }
    }

    fn count(&mut self, replica: usize) {
        let second = (self.now / 1_000_000) as usize;
        if self.figures.shares.len() <= second {
            self.figures.shares.resize(second + 1, (0, 0));
        }
        self.figures.shares[second].0 += 1;
        self.figures.shares[second].1 += u32::from(replica == 0);
    }

    fn begin(&mut self, replica: usize) {
        let time = self.time();
        self.step[replica] += 1;
        if let Some(takes) = self.heads[replica].begin(time) {
            let step = self.step[replica];
            self.after(micros(takes), Event::Step(replica, step));
        }
    }

    fn step_done(&mut self, replica: usize, progress: &mut Vec<Progress>) {
        let time = self.time();
        self.said[replica] = self.now;
        self.heads[replica].end(time, progress);
        for progress in progress.iter() {
            self.progress(progress);
        }
        self.begin(replica);
    }

    fn progress(&mut self, progress: &Progress) {
        let request = &mut self.requests[progress.request];
        if request.done || request.attempt != progress.attempt {
            return;
        }
        request.heard = self.now;
        let now = Instant(self.now);
        let router = &mut self.routers[request.router];
        if let Some(ticket) = &mut request.ticket {
            match progress.first {
                Some(seconds) => {
                    router.first_token(now, ticket, Duration::from_secs_f64(seconds));
                }
                None => router.token(now, ticket),
            }
        }
        if progress.done {
            request.done = true;
            if let Some(ticket) = request.ticket.take() {
                router.ended(now, self.dice.bits(), &ticket, Outcome::Complete);
            }
            if measured(self.scenario, request.arrived) {
                self.figures.times.push((self.now - request.arrived) as f64 * 1e-6);
            }
        }
    }

    fn check(&mut self, at: usize, attempt: u32) {
        let request = &self.requests[at];
        if request.done || request.attempt != attempt {
            return;
        }
        let patience = micros(self.scenario.patience.unwrap_or(END));
        // As the cluster's heartbeats do, it asks whether the head lives, not whether this request
        // has waited long.
        let due = request.heard.max(self.said[request.replica]) + patience;
        if due > self.now {
            return self.at(due, Event::Check(at, attempt));
        }
        self.heads[request.replica].cancel(at, attempt);
        self.give_up(at, attempt, Outcome::Lost);
    }

    fn give_up(&mut self, at: usize, attempt: u32, outcome: Outcome) {
        let request = &mut self.requests[at];
        if request.done || request.attempt != attempt {
            return;
        }
        let (now, replica) = (Instant(self.now), request.replica);
        if let Some(ticket) = request.ticket.take() {
            self.routers[request.router].ended(now, self.dice.bits(), &ticket, outcome);
        }
        request.attempt += 1;
        if request.attempt >= TRIES || !self.budget.retry(now) {
            return self.fail(at);
        }
        self.figures.retries += 1;
        self.send(at, Some(replica));
    }

    fn fail(&mut self, at: usize) {
        let request = &mut self.requests[at];
        request.done = true;
        self.figures.errors += usize::from(measured(self.scenario, request.arrived));
    }

    fn fault(&mut self, i: usize) {
        let (_, replica, fault) = self.scenario.faults[i];
        let head = &mut self.heads[replica];
        match fault {
            Fault::FailFast(on) => self.failing[replica] = on,
            Fault::Freeze => {
                head.frozen = true;
                // Its step never ends.
                self.step[replica] += 1;
            }
            Fault::Slow(slow) => {
                head.slow = slow;
                if std::mem::take(&mut head.frozen) {
                    self.begin(replica);
                }
            }
        }
    }

    fn report(&mut self) {
        for (head, served) in self.heads.iter().zip(&mut self.deployment.replicas) {
            // What is frozen says nothing.
            if !head.frozen {
                let (running, waiting) = (head.running.len() as u32, head.waiting.len() as u32);
                let steps = self.now;
                served.load = Some(HeadReport { running, waiting, steps, ..HeadReport::default() });
            }
        }
        let deployment = Arc::new(self.deployment.clone());
        let deployments = BTreeMap::from([(deployment.name.clone(), deployment)]);
        let table = ServingTable { deployments, ..ServingTable::default() };
        self.routers.iter_mut().for_each(|router| router.observe(Instant(self.now), &table));
        // Without anything else to come, nothing will change any more.
        if !self.events.is_empty() || self.now == 0 {
            self.after(REPORT, Event::Report);
        }
    }
}

fn measured(scenario: &Scenario, arrived: u64) -> bool {
    let at = arrived as f64 * 1e-6;
    (scenario.warm_up..scenario.warm_up + scenario.measured).contains(&at)
}

fn micros(seconds: f64) -> u64 {
    (seconds * 1e6).round().max(1.0) as u64
}
