//! ● One answer over all of its attempts.
//!
//! It holds one stream to one head at a time, and everything to open the next one. Dropping it cancels
//! what runs.

use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{DeploymentName, Generation, ReplicaId};
use shoal_protocol::trace::Value;
use shoal_protocol::units;
use shoal_protocol::version::{KNOWS_PREFIXES, KNOWS_TRACES};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Instant;

use super::course::{GiveUp, Loss, Next, Recovery, is_superseded};
use super::error::RecoveryError;
use super::pace::{Pace, SILENCE};
use super::probation::Probation;
use crate::api::places::{Place, Places};
use crate::dispatch::{Answer, AnswerEvent, DispatchError, Dispatcher, Sequence, Target};
use crate::router::RouteRequest;
use crate::serving::{ServedDeployment, ServingTable};
use crate::telemetry::Telemetry;
use crate::trace::{AttemptTrace, RequestTrace};

/// What all answers need to go on. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Resumer {
    /// The hand that reaches heads.
    pub dispatcher: Dispatcher,
    /// What is served where.
    pub table: watch::Receiver<Arc<ServingTable>>,
    /// The router.
    pub places: Arc<Places>,
    /// Where stalls are counted.
    pub telemetry: Arc<Telemetry>,
    probation: Arc<Probation>,
}

/// An answer that goes on elsewhere when its replica is lost.
#[derive(Debug)]
pub struct LastingAnswer {
    resumer: Resumer,
    /// What the client asked for: a deployment or an adapter.
    deployment: DeploymentName,
    /// The deployment whose replicas answer.
    base: DeploymentName,
    /// As it was when the attempt began; afterwards the attempt has it.
    sequence: Sequence,
    running: Option<Running>,
    recovery: Recovery,
    /// What ended the last attempt, and in which words.
    last: Option<(Loss, String)>,
    /// Held while it is a suspect.
    alone: Option<OwnedSemaphorePermit>,
    origin: Instant,
    deadline: Instant,
    trace: RequestTrace,
}

#[derive(Debug)]
struct Running {
    answer: Answer,
    place: Place,
    trace: AttemptTrace,
    pace: Pace,
}

/// Why an attempt ended.
enum Ended {
    /// Before the head had the request: it is not to blame for what happened.
    Unbegun(DispatchError),
    Error(DispatchError),
    Superseded,
}

impl Resumer {
    /// For the answers of one coordinator.
    pub fn new(
        dispatcher: Dispatcher,
        table: watch::Receiver<Arc<ServingTable>>,
        places: Arc<Places>,
        telemetry: Arc<Telemetry>,
    ) -> Self {
        Self { dispatcher, table, places, telemetry, probation: Arc::default() }
    }

    /// The same, by way of another router.
    pub fn through(self, places: Arc<Places>) -> Self {
        Self { places, ..self }
    }

    /// An answer that nobody has been asked for yet.
    pub fn answer(
        &self,
        deployment: &ServedDeployment,
        sequence: Sequence,
        deadline: Instant,
    ) -> LastingAnswer {
        LastingAnswer {
            resumer: self.clone(),
            deployment: deployment.name.clone(),
            base: deployment.base().clone(),
            sequence,
            running: None,
            recovery: Recovery::new(deployment.created).with(deployment.adapter.clone()),
            last: None,
            alone: None,
            origin: Instant::now(),
            deadline,
            trace: RequestTrace::default(),
        }
    }
}

impl LastingAnswer {
    /// The same, of a request others of whose answers are under way: it waits for room.
    pub fn promised(self) -> Self {
        Self { recovery: self.recovery.promised(), ..self }
    }

    /// The same, as a part of this request's trace.
    pub fn traced(self, trace: &RequestTrace) -> Self {
        Self { trace: trace.clone(), ..self }
    }

    /// Makes the first attempt at this place. Whether it worked is `next`'s business; false: others
    /// need not try that head at once.
    pub async fn begin(&mut self, place: Place) -> Result<bool, RecoveryError> {
        self.attempt(place).await?;
        Ok(self.running.is_some())
    }

    /// The next event, from whichever head; waits out what is lost meanwhile, until the deadline. After
    /// an error, or after `Done`, there is none: drop the answer.
    pub async fn next(&mut self) -> Result<AnswerEvent, RecoveryError> {
        loop {
            let Some(running) = &mut self.running else {
                self.resume().await?;
                continue;
            };
            let at = (running.place.ticket.replica, running.place.ticket.generation);
            let silence = running.pace.silence();
            let superseded = superseded(&mut self.resumer.table, &self.deployment, at, silence);
            let ended = tokio::select! {
                // What has come counts, whatever the table says.
                biased;
                event = running.answer.next() => match event {
                    Ok(event) => {
                        match &event {
                            AnswerEvent::Token(token) => {
                                running.pace.token(now_since(self.origin));
                                running.place.ticket.reused = running.answer.sequence().reused;
                                running.place.token(token.first.map(|(_, prefill)| prefill));
                            }
                            AnswerEvent::Vector(vector) => {
                                running.place.token(Some(vector.encode_us));
                                running.place.complete();
                                running.trace.complete();
                            }
                            AnswerEvent::Done { .. } => {
                                running.place.complete();
                                running.trace.complete();
                            }
                        }
                        self.went_on();
                        return Ok(event);
                    }
                    Err(error) => Ended::Error(error),
                },
                () = superseded => Ended::Superseded,
            };
            self.sequence = running.answer.sequence().clone();
            if let Some(Running { mut place, trace, .. }) = self.running.take() {
                self.lost(&mut place, trace, ended)?;
            }
        }
    }

    /// Tokens of the prompt that the head which answers had already.
    pub fn reused(&self) -> u32 {
        let running = self.running.as_ref().map(|running| running.answer.sequence());
        running.unwrap_or(&self.sequence).reused
    }

    fn now(&self) -> units::Instant {
        now_since(self.origin)
    }

    fn went_on(&mut self) {
        self.alone = None;
        if let Some(stalled) = self.recovery.went_on(self.now()) {
            self.resumer.telemetry.stalled(self.deployment.as_str(), stalled);
        }
    }

    /// The attempt at this place has ended: on to the next, unless the core gives up.
    fn lost(
        &mut self,
        place: &mut Place,
        mut trace: AttemptTrace,
        ended: Ended,
    ) -> Result<(), RecoveryError> {
        if let Ended::Error(error) | Ended::Unbegun(error) = &ended {
            if self.is_unloaded(error) {
                self.last = Some((Loss::Final, error.to_string()));
                trace.lost("unloaded");
                return Err(self.give_up(GiveUp::Unloaded));
            }
            place.failed(error.code());
        }
        let ticket = &place.ticket;
        let (loss, words) = match &ended {
            Ended::Error(error) => (Loss::of(error), error.to_string()),
            Ended::Unbegun(error) => (Loss::of(error).unbegun(), error.to_string()),
            Ended::Superseded => {
                let words = format!("{} of {} was replaced", ticket.generation, ticket.replica);
                (Loss::Superseded, words)
            }
        };
        trace.lost(loss.label());
        let at = (ticket.replica, ticket.generation);
        let verdict = self.recovery.lost(self.now(), dice(), at, loss);
        let (request, choice) = (self.sequence.request, self.sequence.choice);
        tracing::debug!(%request, choice, replica = %at.0, generation = %at.1, words, "an attempt ended");
        self.last = Some((loss, words));
        match (verdict, ended) {
            (Ok(()), _) => Ok(()),
            (Err(GiveUp::AsItIs), Ended::Error(error) | Ended::Unbegun(error)) => Err(error.into()),
            (Err(verdict), _) => Err(self.give_up(verdict)),
        }
    }

    /// Whether it has ended because its adapter was let go: that is no fault of the replica.
    fn is_unloaded(&self, error: &DispatchError) -> bool {
        let table = self.resumer.table.borrow();
        let served = table.get(&self.deployment).map(|served| served.as_ref());
        self.recovery.is_unloaded(error.code(), served)
    }

    fn give_up(&self, verdict: GiveUp) -> RecoveryError {
        if matches!(verdict, GiveUp::Quarantined { .. }) {
            self.resumer.telemetry.quarantined(self.deployment.as_str());
        }
        RecoveryError::new(verdict, self.deployment.as_str(), self.last_words())
    }

    fn last_words(&self) -> &str {
        self.last.as_ref().map_or("it had not begun", |(_, words)| words)
    }

    /// Makes the next attempt as soon as somebody can take it, until the deadline.
    async fn resume(&mut self) -> Result<(), RecoveryError> {
        let deadline = self.deadline;
        let made = tokio::time::timeout_at(deadline, self.make_attempt()).await;
        made.unwrap_or_else(|_| Err(self.out_of_time()))
    }

    async fn make_attempt(&mut self) -> Result<(), RecoveryError> {
        if self.recovery.is_suspect() && self.alone.is_none() {
            self.alone = self.resumer.probation.enter(&self.base).await;
        }
        let since = std::time::Instant::now();
        loop {
            let table = Arc::clone(&self.resumer.table.borrow_and_update());
            let deployment = table.get(&self.deployment);
            let (now, places) = (self.now(), &self.resumer.places);
            let served = deployment.map(|d| d.as_ref());
            let next = self.recovery.next_attempt(now, dice(), served, || places.may_retry());
            match next.map_err(|verdict| self.give_up(verdict))? {
                Next::Wait(until) => self.wait(until).await,
                Next::Ask(avoid) => {
                    let Some(deployment) = deployment else { continue };
                    let request = RouteRequest {
                        sequences: 1,
                        prompt_tokens: self.sequence.rows() as u32,
                        max_tokens: self.sequence.left(),
                        avoid: &avoid,
                        ..RouteRequest::default()
                    };
                    match self.resumer.places.take_again(dice(), &table, deployment, &request) {
                        Ok(mut places) => {
                            let Some(place) = places.pop() else { continue };
                            self.trace.part("route", since, || place.why(&self.base));
                            return self.attempt(place).await;
                        }
                        Err(_) => self.recovery.no_room(self.now(), dice()),
                    }
                }
            }
        }
    }

    /// Waits for another table, or until then.
    async fn wait(&mut self, until: Option<units::Instant>) {
        let changed = async {
            if self.resumer.table.changed().await.is_err() {
                // The control plane is gone; the deadline or the stop ends this.
                std::future::pending().await
            }
        };
        match until {
            None => changed.await,
            Some(until) => {
                let until = self.origin + Duration::from_micros(until.0);
                let _ = tokio::time::timeout_at(until, changed).await;
            }
        }
    }

    /// Opens a stream to the head of this place. An error that can be waited out is noted.
    async fn attempt(&mut self, mut place: Place) -> Result<(), RecoveryError> {
        let ticket = &place.ticket;
        let at = (ticket.replica, ticket.generation);
        self.sequence.attempt = self.recovery.attempt();
        self.sequence.reused = 0;
        let trace = self.trace.attempt(|| self.facts(&place));
        let protocol = self.resumer.table.borrow().protocol;
        let target = Target {
            replica: ticket.replica,
            head: ticket.head,
            address: ticket.address,
            trace: trace.mark().filter(|_| protocol >= KNOWS_TRACES),
            tenant: self.sequence.tenant.filter(|_| protocol >= KNOWS_PREFIXES),
        };
        let mut table = self.resumer.table.clone();
        let started = tokio::select! {
            biased;
            started = self.resumer.dispatcher.start(target, self.sequence.clone(), self.deadline) => {
                started.map_err(Ended::Unbegun)
            }
            // A connection to a worker that is gone takes long to fail.
            () = superseded(&mut table, &self.deployment, at, SILENCE) => {
                let message = format!("{} of {} was replaced", at.1, at.0);
                let code = ErrorCode::StaleGeneration;
                Err(Ended::Unbegun(DispatchError::Failed { code, message }))
            }
        };
        match started {
            Ok(answer) => {
                self.note_resume(&place);
                let pace = Pace::default();
                self.running = Some(Running { answer, place, trace, pace });
                Ok(())
            }
            Err(ended) => self.lost(&mut place, trace, ended),
        }
    }

    /// What a trace says of the attempt at this place.
    fn facts(&self, place: &Place) -> Vec<(&'static str, Value)> {
        let (sequence, ticket) = (&self.sequence, &place.ticket);
        let after = self.last.as_ref().map_or("new", |(loss, _)| loss.label());
        vec![
            ("shoal.attempt", sequence.attempt.0.into()),
            ("shoal.choice", sequence.choice.into()),
            ("shoal.replica", ticket.replica.to_string().into()),
            ("shoal.generation", ticket.generation.0.into()),
            ("shoal.head", ticket.head.to_string().into()),
            ("shoal.after", after.into()),
            ("shoal.replayed_tokens", sequence.received.len().into()),
        ]
    }

    /// One line and one count for each attempt that takes another's place.
    fn note_resume(&self, place: &Place) {
        let Some((loss, why)) = &self.last else { return };
        self.resumer.telemetry.resumed(self.deployment.as_str(), loss.label());
        let ticket = &place.ticket;
        tracing::info!(
            request = %self.sequence.request,
            choice = self.sequence.choice,
            attempt = self.sequence.attempt.0,
            replica = %ticket.replica,
            generation = %ticket.generation,
            tokens = self.sequence.received.len(),
            waited_ms = self.recovery.stalled(self.now()).unwrap_or_default().as_millis() as u64,
            why,
            "an answer goes on"
        );
    }

    fn out_of_time(&self) -> RecoveryError {
        let table = Arc::clone(&self.resumer.table.borrow());
        let missing = match table.get(&self.deployment) {
            Some(deployment) if !deployment.reason.is_empty() => deployment.reason.clone(),
            Some(_) => "a replica that takes it".to_owned(),
            None => "the deployment".to_owned(),
        };
        let waited = self.recovery.stalled(self.now()).unwrap_or_default();
        RecoveryError::OutOfTime { waited, last: self.last_words().to_owned(), missing }
    }
}

fn now_since(origin: Instant) -> units::Instant {
    units::Instant(0) + origin.elapsed()
}

/// Resolves when nothing has come for a while and the table has a newer layout that serves.
async fn superseded(
    table: &mut watch::Receiver<Arc<ServingTable>>,
    deployment: &DeploymentName,
    at: (ReplicaId, Generation),
    silence: Duration,
) {
    tokio::time::sleep(silence).await;
    let newer = |table: &Arc<ServingTable>| {
        table.get(deployment).is_some_and(|deployment| is_superseded(deployment, at))
    };
    if table.wait_for(newer).await.is_err() {
        // The control plane is gone: there is no newer layout.
        std::future::pending().await
    }
}

/// 64 bits from the system; without them nothing is spread, and all still goes on.
fn dice() -> u64 {
    getrandom::u64().unwrap_or_default()
}
