//! What the silence of a peer means.
//!
//! Silence is counted only while the observer itself runs: it looks at the peer at least once an
//! interval, and what its own timer was late by is taken off, because in that time the packets lay
//! in its own socket. So a stall of the observer is never the peer's.

use std::time::Duration;

use super::beat::{BEAT_IDLE, Beat};
use super::experience::Known;
use super::worst::Worst;
use crate::units::Instant;

/// However rough a peer's machine is: after so long the peer is dead. It stays below the transport's
/// idle time-out (1.5 s), which knows no names.
pub const DEAD_MAX: Duration = Duration::from_millis(1200);

/// The jitter that is assumed of a link of which little has been seen yet.
const JITTER_UNSEEN: Duration = Duration::from_millis(40);

/// Arrivals after which what was seen counts and not `JITTER_UNSEEN`: ten seconds of busy beats. With one
/// second, seven of nine false deaths under synthetic compile load fell into the first twelve.
const ARRIVALS_KNOWN: u32 = 1000;

/// So many rough stalls in a minute, and the machine is one whose cores are fought for: then the next
/// stall may be far longer than all before it, and silence is believed only after `DEAD_MAX`. A worst
/// case of a minute alone forgets too soon: all but one of the false deaths under synthetic compile load
/// fell into minutes with no long stall and dozens of rough ones.
const ROUGH_MACHINE: u32 = 12;

/// A timer that fires so late is on time: a runtime's timers have steps of a millisecond, and a wake
/// from idle costs some, too.
const ON_TIME: Duration = Duration::from_millis(2);

/// The shortest time between two looks.
const LOOK_MIN: Duration = Duration::from_millis(1);

/// A death takes three times the jitter, and once more for each of these in it. Stalls of a machine
/// that is only a virtual one end soon; where they reach tens of milliseconds something competes for
/// its cores, and then the next one may be far longer than all before it.
const JITTER_ROUGH: Duration = Duration::from_millis(8);

/// What is thought of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Verdict {
    /// It is heard as it has announced.
    #[default]
    Alive,
    /// A beat is missing. It is asked whether anybody is there at all.
    Late,
    /// Several are missing, for longer than any stall of the last minute but not by so much that it is
    /// certain. Nothing is ended; no new work should go there.
    Suspect,
    /// It is given up.
    Dead,
}

/// From how much counted silence on a verdict holds.
///
/// With the interval I that the peer has announced and the jitter J, which is the worst of the last
/// minute of (a gap beyond I, the peer's timers by its own word, the observer's timers):
///
/// | verdict | after | I = 10 ms, J ≤ 5 ms | J = 8 ms | J = 20 ms | J = 60 ms |
/// |---|---|---|---|---|---|
/// | Late | max(1.5 I, I + J) | 15 ms | 18 ms | 30 ms | 70 ms |
/// | Suspect | max(2.5 I, I + 2 J) | 25 ms | 26 ms | 50 ms | 130 ms |
/// | Dead | max(4.5 I, I + (3 + J / 8 ms) J), at most 1.2 s | 45 ms | 45 ms | 120 ms | 640 ms |
///
/// A peer stops on average half an interval after its last beat, so that where stalls stay under 8 ms
/// the median from stop to Dead is 40 ms, and one timer's wake. A false Dead needs a stall that is 4
/// times the worst one of the last minute where that was 8 ms, 5.5 times where it was 20 ms, 10 times
/// where it was 60 ms. From J = 87 ms on, silence is believed only after 1.2 s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// `Verdict::Late`.
    pub late: Duration,
    /// `Verdict::Suspect`.
    pub suspect: Duration,
    /// `Verdict::Dead`.
    pub dead: Duration,
}

/// The bounds for an interval and a jitter.
pub fn bounds(interval: Duration, jitter: Duration) -> Bounds {
    let rough = 3.0 + jitter.as_secs_f64() / JITTER_ROUGH.as_secs_f64();
    // Beyond the longest bound more makes no difference, and cannot overflow.
    let margin = jitter.min(DEAD_MAX).mul_f64(rough.min(100.0));
    let dead = (interval * 9 / 2).max(interval + margin).min(DEAD_MAX);
    Bounds {
        late: (interval * 3 / 2).max(interval + jitter).min(dead),
        suspect: (interval * 5 / 2).max(interval + jitter * 2).min(dead),
        dead,
    }
}

/// One observer of one peer.
#[derive(Debug)]
pub struct Detector {
    interval: Duration,
    /// Counted up to `looked`.
    silence: Duration,
    looked: Instant,
    heard: Instant,
    /// When the next look was to be.
    due: Instant,
    arrivals: u32,
    /// Gaps beyond the interval.
    gaps: Worst,
    /// How late our own timer was.
    own: Worst,
    /// How late the peer's are, by its own word.
    theirs: Duration,
    /// What this process knows of its own timers from all of its links.
    known: Known,
    /// How late our own timer was at the last look.
    stall: Duration,
    refused: bool,
    verdict: Verdict,
}

impl Detector {
    /// A peer that has just been heard, in the handshake.
    pub fn new(now: Instant) -> Self {
        Self {
            interval: BEAT_IDLE,
            silence: Duration::ZERO,
            looked: now,
            heard: now,
            due: now + BEAT_IDLE,
            arrivals: 0,
            gaps: Worst::default(),
            own: Worst::default(),
            theirs: Duration::ZERO,
            known: Known::default(),
            stall: Duration::ZERO,
            refused: false,
            verdict: Verdict::Alive,
        }
    }

    /// What this process knows of its own timers by now.
    pub fn learn(&mut self, known: Known) {
        self.known = known;
    }

    /// How late our own timer was at the last look or arrival: what all links of a process learn from.
    pub fn last_stall(&self) -> Duration {
        self.stall
    }

    /// Something of the peer has arrived: a beat, or whatever else only a living peer sends.
    pub fn heard(&mut self, now: Instant, beat: Option<Beat>) {
        if self.verdict == Verdict::Dead {
            return;
        }
        self.count(now);
        // What comes sooner than announced says nothing about how rough it is.
        let excess = self.silence.saturating_sub(self.interval);
        if excess > Duration::ZERO {
            self.gaps.note(now, excess);
        }
        self.arrivals = self.arrivals.saturating_add(1);
        self.silence = Duration::ZERO;
        self.heard = now;
        self.refused = false;
        self.verdict = Verdict::Alive;
        if let Some(beat) = beat {
            self.interval = beat.interval;
            self.theirs = beat.lateness;
        }
        self.due = now + self.step();
    }

    /// The peer's host says that nobody listens there any more. Certain once the peer is also silent:
    /// anybody could forge such a packet.
    pub fn refused(&mut self) {
        self.refused = true;
        self.judge();
    }

    /// The observer's timer has fired.
    pub fn look(&mut self, now: Instant) -> Verdict {
        self.count(now);
        self.judge();
        self.due = now + self.step();
        self.verdict
    }

    /// Whether a look now would find it late, or worse.
    pub fn is_late_at(&self, now: Instant) -> bool {
        self.silence + now.since(self.looked) >= self.bounds().late
    }

    /// When to look again.
    pub fn next_look(&self) -> Instant {
        self.due
    }

    /// What is thought now.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Whether its host has said that nobody listens there.
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// How long it has been silent, as far as that was observed.
    pub fn silence(&self) -> Duration {
        self.silence
    }

    /// How long ago it was heard, whoever slept meanwhile.
    pub fn silent_for(&self, now: Instant) -> Duration {
        now.since(self.heard)
    }

    /// What it has announced.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// How late our own timers were at worst: what our own beats announce. Who knows little of them
    /// says `JITTER_UNSEEN`, so that the peer need not ask itself how long we have been there.
    pub fn own_lateness(&self) -> Duration {
        let seen = self.own.get().max(self.known.worst);
        if self.knows_itself() { seen } else { seen.max(JITTER_UNSEEN) }
    }

    fn knows_itself(&self) -> bool {
        self.known.enough || self.arrivals >= ARRIVALS_KNOWN
    }

    /// The worst of late: of the peer's gaps, of its timers, of ours.
    pub fn jitter(&self) -> Duration {
        let seen = self.gaps.get().max(self.own.get()).max(self.theirs).max(self.known.worst);
        if self.knows_itself() { seen } else { seen.max(JITTER_UNSEEN) }
    }

    /// Whether this machine or the peer's is one whose cores are fought for.
    pub fn is_rough(&self) -> bool {
        let own = self.own.rough().max(self.known.rough);
        self.gaps.rough().saturating_add(own) >= ROUGH_MACHINE
    }

    /// The bounds that hold now.
    pub fn bounds(&self) -> Bounds {
        let bounds = bounds(self.interval, self.jitter());
        if self.is_rough() { Bounds { dead: DEAD_MAX, ..bounds } } else { bounds }
    }

    /// Adds to the silence what of the time since the last look was observed.
    fn count(&mut self, now: Instant) {
        let late = now.since(self.due);
        self.own.turn(now);
        self.gaps.turn(now);
        let own_stall = if late > ON_TIME { late } else { Duration::ZERO };
        self.stall = own_stall;
        if own_stall > Duration::ZERO {
            self.own.note(now, own_stall);
        }
        self.silence += now.since(self.looked).saturating_sub(own_stall);
        self.looked = now;
    }

    fn judge(&mut self) {
        let bounds = self.bounds();
        let of_silence = match self.silence {
            silence if silence >= bounds.dead => Verdict::Dead,
            silence if silence >= bounds.suspect => Verdict::Suspect,
            silence if silence >= bounds.late => Verdict::Late,
            _ => Verdict::Alive,
        };
        let sure = self.refused && of_silence >= Verdict::Late;
        self.verdict = self.verdict.max(if sure { Verdict::Dead } else { of_silence });
    }

    /// From one look to the next: to the next bound, and not longer than an interval, because a stall
    /// of ours between two looks shows only in the second one's lateness.
    fn step(&self) -> Duration {
        let bounds = self.bounds();
        let mut next = [bounds.late, bounds.suspect, bounds.dead].into_iter();
        let next = next.find(|bound| *bound > self.silence).unwrap_or(bounds.dead);
        next.saturating_sub(self.silence).clamp(LOOK_MIN, self.interval.max(LOOK_MIN))
    }
}

#[cfg(test)]
#[path = "detector_test.rs"]
mod detector_test;
