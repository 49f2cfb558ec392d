//! ○ A coordinator's side of its conversations with workers (as `control/agents.rs` is), and what both
//! ends do to know whether the other is there: the real detector.

use std::collections::BTreeMap;
use std::time::Duration;

use shoal_coordinator::control::state::{Change, NodeCommand};
use shoal_protocol::control::{Register, Report};
use shoal_protocol::id::NodeId;
use shoal_protocol::liveness::{Beat, Detector, Verdict};
use shoal_protocol::plan::Assignment;
use shoal_protocol::units::Instant;

use super::bug::Bug;
use super::coordinator::{Process, Purpose};
use super::wire::{Event, Payload, Wish};
use super::world::World;

/// How often a machine beats on each of its conversations. The real ones beat every 10 ms while work
/// flows and every 200 ms else.
pub const BEAT_US: u64 = 100_000;

/// All workers that have registered at a coordinator.
#[derive(Default)]
pub struct Agents {
    /// By node.
    pub workers: BTreeMap<NodeId, Known>,
}

/// One of them.
pub struct Known {
    /// As it registered.
    pub register: Register,
    /// Its last report.
    pub report: Report,
    /// What it was told on this connection.
    pub pushed: Option<Vec<Assignment>>,
    /// A later epoch, by its own word.
    pub outranked: Option<u64>,
    /// No epoch below is any use with it.
    pub floor: u64,
    /// The conversation.
    pub link: Option<Link>,
    asked: u64,
}

/// One end of a conversation.
pub struct Link {
    /// Its number.
    pub session: u64,
    /// The process at the other end.
    pub life: u64,
    /// What its silence means.
    pub detector: Detector,
}

impl Link {
    /// A conversation that has just begun.
    pub fn new(now: u64, session: u64, life: u64) -> Self {
        let mut detector = Detector::new(Instant(now));
        detector.heard(Instant(now), Some(beat()));
        Self { session, life, detector }
    }
}

/// What a beat says.
pub fn beat() -> Beat {
    let interval = Duration::from_micros(BEAT_US);
    Beat { interval, lateness: Duration::ZERO, working: false }
}

impl World {
    /// Something has arrived for a coordinator on a stream.
    #[allow(clippy::wrong_self_convention)] // Where to, not into what.
    pub fn to_coordinator(&mut self, to: NodeId, payload: Payload) {
        self.turn(to, |world, process, _| match payload {
            Payload::Hello { from, session, life, register } => {
                world.register(to, process, (from, session, life), *register);
            }
            Payload::Report { from, session, report } => {
                if let Some(known) = process.agents.current(from, session) {
                    known.report = report;
                    world.look_soon(to, process);
                }
            }
            Payload::Outranked { from, session, epoch } => {
                if let Some(known) = process.agents.current(from, session) {
                    known.outranked = Some(epoch);
                    world.look_soon(to, process);
                }
            }
            Payload::Head(event) => world.head_event(to, process, event),
            _ => {}
        });
    }

    fn register(
        &mut self,
        at: NodeId,
        process: &mut Process,
        (from, session, life): (NodeId, u64, u64),
        register: Register,
    ) {
        let Some(node) = process.state.nodes.get(from) else { return };
        // A ghost: a newer process has this identity.
        if node.incarnation > Some(register.incarnation) {
            return;
        }
        let mut report = Report::default();
        if let Some(older) = process.agents.workers.remove(&from) {
            if older.register.incarnation == register.incarnation {
                report = older.report;
            }
            // The other end has given the conversation before up, and its answers with it.
            if older.link.is_some() {
                self.head_is_gone(at, process, from);
            }
        }
        let link = Link::new(self.now, session, life);
        let look = link.detector.next_look().0;
        self.at(look, Event::Look { at, life: process.life, peer: from, session });
        let known = Known {
            register,
            report,
            pushed: None,
            outranked: None,
            floor: 0,
            link: Some(link),
            asked: 0,
        };
        process.agents.workers.insert(from, known);
        self.record_starts(process);
        let welcome = Payload::Welcome { from: at, session, life: process.life };
        self.send(at, from, life, welcome);
        self.look_soon(at, process);
    }

    /// Proposes the start numbers that the log does not show yet.
    pub fn record_starts(&mut self, process: &mut Process) {
        let mut asks = Vec::new();
        for (node, known) in &mut process.agents.workers {
            let recorded = process.state.nodes.get(*node).and_then(|node| node.incarnation);
            let Some(link) = &known.link else { continue };
            let due = known.asked == 0 || self.now >= known.asked + 1_000_000;
            if recorded < Some(known.register.incarnation) && due {
                known.asked = self.now;
                asks.push((*node, link.session, known.register.incarnation));
            }
        }
        for (node, session, incarnation) in asks {
            let purpose = Purpose::Admit(node, session);
            if process.awaits(purpose) {
                continue;
            }
            let build = "sim".to_owned();
            let change = Change::Node(NodeCommand::Start { node, incarnation, build });
            process.ask(self.now, purpose, Wish::Change(change), self.bug);
        }
    }

    /// A beat on a conversation.
    pub fn heard_beat(&mut self, at: NodeId, from: NodeId, session: u64) {
        let now = Instant(self.now);
        let heard = |link: Option<&mut Link>| {
            if let Some(link) = link.filter(|link| link.session == session) {
                link.detector.heard(now, Some(beat()));
            }
        };
        if let Some(process) = self.coordinators.get_mut(&at).and_then(|c| c.process.as_mut()) {
            heard(process.agents.workers.get_mut(&from).and_then(|known| known.link.as_mut()));
        } else if let Some(process) = self.workers.get_mut(&at).and_then(|w| w.process.as_mut()) {
            heard(process.links.get_mut(&from));
        }
    }

    /// The other end of a conversation is looked at.
    pub fn look_at_link(&mut self, at: NodeId, life: u64, peer: NodeId, session: u64) {
        let now = Instant(self.now);
        let never = self.bug == Some(Bug::NeverDead);
        let mut next = None;
        let judge = |link: &mut Link| match link.detector.look(now) {
            Verdict::Dead if !never => None,
            _ => Some(link.detector.next_look().0.max(now.0 + 1_000)),
        };
        if self.coordinators.contains_key(&at) {
            self.turn(at, |world, process, _| {
                let link = process.agents.workers.get_mut(&peer).and_then(|k| k.link.as_mut());
                let link = link.filter(|link| link.session == session);
                let Some(link) = link.filter(|_| process.life == life) else { return };
                next = judge(link);
                if next.is_none() {
                    world.link_is_gone(at, process, peer);
                }
            });
        } else {
            self.worker(at, life, |world, process| {
                let link = process.links.get_mut(&peer).filter(|l| l.session == session);
                let Some(link) = link else { return };
                next = judge(link);
                if next.is_none() {
                    process.links.remove(&peer);
                    world.nobody_waits(at, process, peer);
                }
            });
        }
        if let Some(next) = next {
            self.at(next, Event::Look { at, life, peer, session });
        }
    }

    fn link_is_gone(&mut self, at: NodeId, process: &mut Process, peer: NodeId) {
        if let Some(known) = process.agents.workers.get_mut(&peer) {
            known.link = None;
            known.outranked = None;
            known.pushed = None;
        }
        self.head_is_gone(at, process, peer);
        self.look_soon(at, process);
    }

    /// A coordinator's beats.
    pub fn coordinator_beats(&mut self, id: NodeId, life: u64) {
        let Some(process) = self.coordinators.get(&id).and_then(|c| c.process.as_ref()) else {
            return;
        };
        if process.life != life {
            return;
        }
        let workers = process.agents.workers.iter();
        let to: Vec<_> =
            workers.filter_map(|(node, k)| Some((*node, k.link.as_ref()?.session))).collect();
        self.at(self.now + BEAT_US, Event::Beats { at: id, life });
        for (node, session) in to {
            self.datagram(id, node, super::wire::Datagram::Beat { from: id, session });
        }
        self.turn(id, |world, process, _| world.record_starts(process));
    }
}

impl Agents {
    fn current(&mut self, node: NodeId, session: u64) -> Option<&mut Known> {
        let known = self.workers.get_mut(&node)?;
        let current = known.link.as_ref().is_some_and(|link| link.session == session);
        current.then_some(known)
    }
}
