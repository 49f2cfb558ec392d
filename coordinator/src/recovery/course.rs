//! ○ How an answer goes on when its attempt has ended early: the one place where that is decided.
//!
//! ```text
//! lost(now, dice, where, what) ─► the next attempt, or GiveUp
//! next(now, deployment)        ─► Ask these replicas | Wait until then or a change | GiveUp
//! went_on(now)                 ─► how long the client waited
//! ```
//!
//! **Blame.** A worker that dies takes all of its sequences along, and one of them may be the cause.
//! A sequence is blamed for a loss only where its attempt had not brought a token yet: the poisonous
//! one never brings one. Whoever was there when a worker was lost is a *suspect* and is tried again alone
//! among the suspects of its deployment (`probation`), until it has a token. So innocent ones beside a
//! poisonous one are blamed once at most, and what is lost while it is alone has shown what it does. A
//! layout that was replaced is half a loss and makes nobody a suspect by itself: a move that was planned
//! finds many in their prompts, and they would go on one after the other.

use std::collections::BTreeMap;
use std::time::Duration;

use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{Attempt, Generation, ReplicaId};
use shoal_protocol::units::Instant;

use crate::dispatch::DispatchError;
use crate::serving::{ServedAdapter, ServedDeployment, ServedReplica};

/// The first wait before the same layout is asked again: a refusal costs a round trip.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(20);

/// The longest such wait. A new layout is asked at once, so this only bounds how late it is noticed
/// that the same one serves again.
pub const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Blame for a worker that was lost before the attempt had a token.
const BLAME_LOST: u32 = 2;

/// Blame for a layout that was replaced meanwhile: its worker may have died, or an operator may have
/// moved it.
const BLAME_SUPERSEDED: u32 = 1;

/// Two workers lost in a row.
const QUARANTINE_AT: u32 = 4;

/// Attempts that may end against the protocol: a worker that stops can cut its streams off, but a head
/// that does not keep the protocol would not keep it the next time either.
const BROKEN_MAX: u32 = 1;

/// What ended an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The head cannot be reached: the attempt never began.
    Unreachable,
    /// A worker was lost while the attempt ran.
    Lost,
    /// The serving table has a newer layout, and the old one has fallen silent.
    Superseded,
    /// The head takes nothing now: it drains, links, or its layout is over.
    TurnedAway,
    /// The head has as much waiting as it may.
    Crowded,
    /// The stream ended against the protocol.
    Broken,
    /// Another attempt would end the same way.
    Final,
}

impl Loss {
    /// What an error means for the attempts to come.
    pub fn of(error: &DispatchError) -> Self {
        match error {
            DispatchError::Connect { .. } => Loss::Unreachable,
            DispatchError::Lost { .. } => Loss::Lost,
            DispatchError::Protocol { .. } => Loss::Broken,
            DispatchError::Deadline => Loss::Final,
            DispatchError::Failed { code, .. } => match code {
                ErrorCode::WorkerLost => Loss::Lost,
                ErrorCode::NotReady | ErrorCode::Draining | ErrorCode::StaleGeneration => {
                    Loss::TurnedAway
                }
                ErrorCode::Overloaded => Loss::Crowded,
                _ => Loss::Final,
            },
        }
    }

    /// The same, where it happened before the head had the request.
    pub fn unbegun(self) -> Self {
        if self == Loss::Lost { Loss::Unreachable } else { self }
    }

    /// The value of the `reason` label.
    pub fn label(self) -> &'static str {
        match self {
            Loss::Unreachable => "unreachable",
            Loss::Lost => "worker_lost",
            Loss::Superseded => "superseded",
            Loss::TurnedAway => "turned_away",
            Loss::Crowded => "crowded",
            Loss::Broken => "protocol",
            Loss::Final => "final",
        }
    }

    fn blame(self) -> u32 {
        match self {
            Loss::Lost => BLAME_LOST,
            Loss::Superseded => BLAME_SUPERSEDED,
            _ => 0,
        }
    }
}

/// One answer's losses, and what follows from them.
#[derive(Clone, Debug, PartialEq)]
pub struct Recovery {
    /// When the deployment was made: another one under the same name is another model.
    created: u64,
    /// The adapter that it is computed with: another one says other words, whatever its name.
    adapter: Option<ServedAdapter>,
    attempt: Attempt,
    /// Whether this attempt has brought an event.
    progressed: bool,
    /// Whether its client was promised it before it has begun.
    promised: bool,
    /// Since the last event.
    blame: u32,
    losses: u32,
    /// Whether the last of them took a worker along, or its layout, or an answer that was under way: a head
    /// that retires turns away at last what does not end.
    lost_at_work: bool,
    broken: u32,
    /// Whether the budget has granted the retry after the last loss.
    granted: bool,
    /// Since when the client waits.
    stalled_since: Option<Instant>,
    /// The layouts that failed us since the last event: at most one for each replica.
    avoided: BTreeMap<ReplicaId, Avoided>,
    /// Where the router has no room.
    full: Option<Avoided>,
}

/// Something that is not asked again for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Avoided {
    generation: Generation,
    times: u32,
    until: Instant,
}

impl Avoided {
    /// Once more.
    fn again(before: Option<Self>, generation: Generation, now: Instant, dice: u64) -> Self {
        let before = before.filter(|before| before.generation == generation);
        let times = before.map_or(1, |before| before.times.saturating_add(1));
        Self { generation, times, until: now + backoff(times, dice) }
    }
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Move {
    /// Ask one that is not to be avoided.
    Ask,
    /// Wait for the table to change, or until then where it says when.
    Wait(Option<Instant>),
}

/// What to do next, with all that keeps an attempt back.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// Ask any but these layouts.
    Ask(Vec<(ReplicaId, Generation)>),
    /// Wait for the table to change, or until then where it says when.
    Wait(Option<Instant>),
}

/// Why an answer does not go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GiveUp {
    /// What ended the attempt is the client's to know.
    AsItIs,
    /// It was lost with its workers time and again.
    Quarantined {
        /// How often in a row.
        losses: u32,
    },
    /// The deployment is gone.
    Undeployed,
    /// The adapter is gone.
    Unloaded,
    /// The deployment cannot be served as it is.
    Hopeless {
        /// The deployment's words.
        reason: String,
    },
}

impl Recovery {
    /// An answer of a deployment made at `created`, before its first attempt.
    pub fn new(created: u64) -> Self {
        Self {
            created,
            adapter: None,
            attempt: Attempt(0),
            progressed: false,
            promised: false,
            blame: 0,
            losses: 0,
            lost_at_work: false,
            broken: 0,
            granted: false,
            stalled_since: None,
            avoided: BTreeMap::new(),
            full: None,
        }
    }

    /// The same, computed with this adapter.
    pub fn with(self, adapter: Option<ServedAdapter>) -> Self {
        Self { adapter, ..self }
    }

    /// The same, of a request others of whose answers are under way: that a head has no room for this one is
    /// no news for the client, who would lose those.
    pub fn promised(self) -> Self {
        Self { promised: true, ..self }
    }

    /// The attempt that runs or is to be made.
    pub fn attempt(&self) -> Attempt {
        self.attempt
    }

    /// Whether it may have killed its worker: it is tried again alone.
    pub fn is_suspect(&self) -> bool {
        self.blame >= BLAME_LOST
    }

    /// How long the client has waited for the next event, where something was lost.
    pub fn stalled(&self, now: Instant) -> Option<Duration> {
        self.stalled_since.map(|since| now.since(since))
    }

    /// The attempt brought an event. Returns how long the client waited for it, where something was
    /// lost before.
    pub fn went_on(&mut self, now: Instant) -> Option<Duration> {
        let stalled = self.stalled(now);
        self.progressed = true;
        (self.blame, self.losses, self.broken) = (0, 0, 0);
        (self.stalled_since, self.full) = (None, None);
        self.avoided.clear();
        stalled
    }

    /// The attempt at this layout has ended early.
    pub fn lost(
        &mut self,
        now: Instant,
        dice: u64,
        at: (ReplicaId, Generation),
        loss: Loss,
    ) -> Result<(), GiveUp> {
        let begun = self.progressed || self.promised || self.stalled_since.is_some();
        let new = self.attempt == Attempt(0) && !begun;
        match loss {
            Loss::Final => return Err(GiveUp::AsItIs),
            // Nothing was promised to a new request: its client hears of it while it can go elsewhere.
            Loss::Crowded if new => return Err(GiveUp::AsItIs),
            Loss::Broken => {
                self.broken += 1;
                if self.broken > BROKEN_MAX {
                    return Err(GiveUp::AsItIs);
                }
            }
            _ => {}
        }
        self.losses += 1;
        self.granted = false;
        self.lost_at_work = self.progressed || matches!(loss, Loss::Lost | Loss::Superseded);
        if !self.progressed {
            self.blame += loss.blame();
            if self.blame >= QUARANTINE_AT {
                return Err(GiveUp::Quarantined { losses: self.losses });
            }
        }
        self.attempt = Attempt(self.attempt.0 + 1);
        self.progressed = false;
        self.stalled_since.get_or_insert(now);
        let (replica, generation) = at;
        let before = self.avoided.get(&replica).copied();
        self.avoided.insert(replica, Avoided::again(before, generation, now, dice));
        Ok(())
    }

    /// Whether the next attempt is a retry, which the budget of retries must grant. The first one after a
    /// worker was lost at work is none, nor is it after tokens came: there is one for each loss, and an
    /// answer that was promised goes on.
    /// What was turned away, or lost again before it had a token, may be one of very many.
    pub fn is_retry(&self) -> bool {
        self.losses > 0 && !(self.losses == 1 && self.lost_at_work)
    }

    /// The layouts that are not to be asked now.
    pub fn avoided(&self, now: Instant) -> Vec<(ReplicaId, Generation)> {
        let avoided = self.avoided.iter().filter(|(_, avoided)| now < avoided.until);
        avoided.map(|(replica, avoided)| (*replica, avoided.generation)).collect()
    }

    /// The router has no room, or the budget no retry left: ask again a little later.
    pub fn no_room(&mut self, now: Instant, dice: u64) {
        self.stalled_since.get_or_insert(now);
        self.full = Some(Avoided::again(self.full, Generation(0), now, dice));
    }

    /// What to do now, also by the budget: `may_retry` takes a retry off it, once for each loss.
    pub fn next_attempt(
        &mut self,
        now: Instant,
        dice: u64,
        deployment: Option<&ServedDeployment>,
        may_retry: impl FnOnce() -> bool,
    ) -> Result<Next, GiveUp> {
        if let Move::Wait(until) = self.next(now, deployment)? {
            return Ok(Next::Wait(until));
        }
        self.granted = self.granted || !self.is_retry() || may_retry();
        if !self.granted {
            // A client that heard an error now would ask again too, and begin anew.
            self.no_room(now, dice);
            return Ok(Next::Wait(self.full.map(|full| full.until)));
        }
        Ok(Next::Ask(self.avoided(now)))
    }

    /// Whether an attempt has ended with this because its adapter was let go while it waited or was
    /// preempted: numbers that are not finite are computed then.
    pub fn is_unloaded(&self, code: ErrorCode, deployment: Option<&ServedDeployment>) -> bool {
        let is_there = deployment.is_some_and(|deployment| self.is_of(deployment));
        code == ErrorCode::ComputeFailed && self.adapter.is_some() && !is_there
    }

    /// Whether this is the very thing that the answer began with: a name can be given again.
    fn is_of(&self, deployment: &ServedDeployment) -> bool {
        deployment.created == self.created && deployment.adapter == self.adapter
    }

    fn what_is_gone(&self) -> GiveUp {
        if self.adapter.is_some() { GiveUp::Unloaded } else { GiveUp::Undeployed }
    }

    /// What to do now, the deployment being as it is.
    pub fn next(
        &self,
        now: Instant,
        deployment: Option<&ServedDeployment>,
    ) -> Result<Move, GiveUp> {
        let Some(deployment) = deployment.filter(|deployment| self.is_of(deployment)) else {
            return Err(self.what_is_gone());
        };
        if deployment.phase == DeploymentPhase::Failed {
            return Err(GiveUp::Hopeless { reason: deployment.reason.clone() });
        }
        if let Some(full) = self.full.filter(|full| now < full.until) {
            return Ok(Move::Wait(Some(full.until)));
        }
        let avoided_until = |replica: &ServedReplica| {
            let avoided = self.avoided.get(&replica.id)?;
            let avoids = avoided.generation == replica.generation && now < avoided.until;
            avoids.then_some(avoided.until)
        };
        let ready = || deployment.replicas.iter().filter(|r| r.ready && r.requests.is_some());
        Ok(match ready().any(|replica| avoided_until(replica).is_none()) {
            true => Move::Ask,
            false => Move::Wait(ready().filter_map(avoided_until).min()),
        })
    }
}

/// Whether a deployment has a newer layout of a replica that serves.
pub fn is_superseded(deployment: &ServedDeployment, at: (ReplicaId, Generation)) -> bool {
    let mut replicas = deployment.replicas.iter();
    replicas.any(|replica| replica.ready && replica.id == at.0 && replica.generation > at.1)
}

/// Doubles with each time; the dice take up to half of it off, so that what was lost together
/// does not come back together.
fn backoff(waits: u32, dice: u64) -> Duration {
    let doubled = BACKOFF_FIRST.saturating_mul(1 << waits.saturating_sub(1).min(16));
    let full = doubled.min(BACKOFF_MAX);
    full - full.mul_f64((dice >> 11) as f64 / (1u64 << 53) as f64 / 2.0)
}

#[cfg(test)]
#[path = "course_test.rs"]
mod tests;
