//! ○ What is under way at this coordinator: one command at a time, and reads.
//!
//! A command may be lost on its way to the leader, or with it, so it is sent again until the state
//! shows what it came to. One at a time: the state remembers one answer per client.

use std::collections::VecDeque;
use std::time::Duration;

use shoal_protocol::id::{Incarnation, NodeId};
use shoal_protocol::units::Instant;
use tokio::sync::oneshot;

use crate::control::state::{Change, ClusterState, Command, Effect, Refusal, Timestamp};
use crate::control::store::{
    ANOTHER_LEADS, PROPOSE_TIMEOUT, ProposeError, READ_TIMEOUT, ReadError,
};

/// How long after it was sent a command or a read is sent again: a round trip and two syncs of a slow
/// disk, and about an election.
const RESEND: Duration = Duration::from_millis(250);

/// Where a change's answer goes.
pub type ProposeReply = oneshot::Sender<Result<Vec<Effect>, ProposeError>>;
/// Where a read's answer goes.
pub type ReadReply = oneshot::Sender<Result<(), ReadError>>;

/// Commands of this coordinator, in order.
pub struct Proposals {
    client: NodeId,
    incarnation: Incarnation,
    sequence: u64,
    /// Bounded by the channel that they come through and by `MAX` there.
    waiting: VecDeque<Waiting>,
    current: Option<InFlight>,
}

struct Waiting {
    change: Change,
    under: Option<u64>,
    reply: ProposeReply,
    since: Instant,
}

struct InFlight {
    command: Command,
    under: Option<u64>,
    reply: ProposeReply,
    since: Instant,
    sent: Option<Instant>,
}

impl Proposals {
    /// Commands of a client that has just started.
    pub fn new(client: NodeId, incarnation: Incarnation) -> Self {
        Self { client, incarnation, sequence: 0, waiting: VecDeque::new(), current: None }
    }

    /// A change that was asked for; `under` is the epoch of the leader that wants it as the leader.
    pub fn push(&mut self, now: Instant, change: Change, under: Option<u64>, reply: ProposeReply) {
        self.waiting.push_back(Waiting { change, under, reply, since: now });
    }

    /// Fails what another leader wanted than the one that this coordinator is: `reign` is its epoch,
    /// `None` while it does not lead. To be told before a command is taken by `due`, so that none is sent
    /// to another leader.
    pub fn reign(&mut self, reign: Option<u64>) {
        let deposed = |under: Option<u64>| under.is_some() && under != reign;
        if self.current.as_ref().is_some_and(|current| deposed(current.under))
            && let Some(current) = self.current.take()
        {
            // It may be in the log already, where it came before all that the next leader does.
            let _ = current.reply.send(Err(another_leads()));
        }
        let mut kept = VecDeque::with_capacity(self.waiting.len());
        for waiting in self.waiting.drain(..) {
            match deposed(waiting.under) {
                true => drop(waiting.reply.send(Err(another_leads()))),
                false => kept.push_back(waiting),
            }
        }
        self.waiting = kept;
    }

    /// How many wait or are under way.
    pub fn count(&self) -> usize {
        self.waiting.len() + usize::from(self.current.is_some())
    }

    /// The command to send now, if there is one. `wall` stamps a new one.
    pub fn due(&mut self, now: Instant, wall: Timestamp) -> Option<&Command> {
        if self.current.is_none() {
            let Waiting { change, under, reply, since } = self.waiting.pop_front()?;
            self.sequence += 1;
            let command = Command {
                client: self.client,
                incarnation: self.incarnation,
                sequence: self.sequence,
                at: wall,
                change,
            };
            self.current = Some(InFlight { command, under, reply, since, sent: None });
        }
        let current = self.current.as_ref()?;
        let due = current.sent.is_none_or(|sent| now.since(sent) >= RESEND);
        due.then_some(&current.command)
    }

    /// The command that was due is on its way.
    pub fn sent(&mut self, now: Instant) {
        if let Some(current) = &mut self.current {
            current.sent = Some(now);
        }
    }

    /// The command is to be sent at once to whoever leads now.
    pub fn leader_changed(&mut self) {
        if let Some(current) = &mut self.current {
            current.sent = None;
        }
    }

    /// Answers the command that is under way, if the state shows what it came to. The state must be
    /// shown to others before.
    pub fn answer(&mut self, state: &ClusterState) -> bool {
        let result = self.current.as_ref().and_then(|c| state.result_of(&c.command));
        let Some(result) = result else { return false };
        if let Some(current) = self.current.take() {
            // Whoever asked may have given up.
            let _ = current.reply.send(result.map_err(|refusal: Refusal| refusal.into()));
        }
        true
    }

    /// Gives up what has waited too long. It may still be made.
    pub fn expire(&mut self, now: Instant) {
        let late = |since: Instant| now.since(since) >= PROPOSE_TIMEOUT;
        if self.current.as_ref().is_some_and(|current| late(current.since))
            && let Some(current) = self.current.take()
        {
            let _ = current.reply.send(Err(ProposeError::TimedOut));
        }
        while self.waiting.front().is_some_and(|waiting| late(waiting.since)) {
            if let Some(waiting) = self.waiting.pop_front() {
                let _ = waiting.reply.send(Err(ProposeError::TimedOut));
            }
        }
    }

    /// None of them can be made now.
    pub fn fail(&mut self, error: &ProposeError) {
        let current = self.current.take().map(|current| current.reply);
        for reply in current.into_iter().chain(self.waiting.drain(..).map(|waiting| waiting.reply))
        {
            let _ = reply.send(Err(error.clone()));
        }
    }
}

fn another_leads() -> ProposeError {
    ProposeError::Unavailable { why: ANOTHER_LEADS.to_owned() }
}

/// Reads that wait for an index, or for this copy to reach it.
#[derive(Default)]
pub struct Reads {
    asked: Vec<Read>,
    number: u64,
}

struct Read {
    reply: ReadReply,
    since: Instant,
    /// The question that covers it: one that was asked after it came.
    number: Option<u64>,
    sent: Instant,
    index: Option<u64>,
}

impl Reads {
    /// A read that was asked for.
    pub fn push(&mut self, now: Instant, reply: ReadReply) {
        self.asked.push(Read { reply, since: now, number: None, sent: now, index: None });
    }

    /// How many wait.
    pub fn count(&self) -> usize {
        self.asked.len()
    }

    /// The number of the question to ask now, if one is to be asked: for all reads that have none, or
    /// whose question may be lost.
    pub fn due(&mut self, now: Instant) -> Option<u64> {
        let due = |read: &Read| {
            read.index.is_none() && (read.number.is_none() || now.since(read.sent) >= RESEND)
        };
        if !self.asked.iter().any(due) {
            return None;
        }
        self.number += 1;
        for read in self.asked.iter_mut().filter(|read| due(read)) {
            read.number = Some(self.number);
            read.sent = now;
        }
        Some(self.number)
    }

    /// The answer to a question.
    pub fn index(&mut self, number: u64, index: u64) {
        for read in self.asked.iter_mut().filter(|read| read.number == Some(number)) {
            read.index = Some(index);
        }
    }

    /// Answers the reads that a copy with everything up to `applied` can answer.
    pub fn answer(&mut self, applied: u64) {
        let done = |read: &mut Read| read.index.is_some_and(|index| index <= applied);
        for read in self.asked.extract_if(.., done) {
            let _ = read.reply.send(Ok(()));
        }
    }

    /// None of them can be answered now.
    pub fn fail(&mut self, error: &ReadError) {
        for read in self.asked.drain(..) {
            let _ = read.reply.send(Err(error.clone()));
        }
    }

    /// Gives up those that have waited too long.
    pub fn expire(&mut self, now: Instant) {
        for read in self.asked.extract_if(.., |read| now.since(read.since) >= READ_TIMEOUT) {
            let _ = read.reply.send(Err(ReadError::NoQuorum));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::state::{KeyFingerprint, NodeCommand};
    use shoal_protocol::id::Role;

    const C1: NodeId = NodeId::coordinator(1);

    fn at(ms: u64) -> Instant {
        Instant(0) + Duration::from_millis(ms)
    }

    fn enrol() -> Change {
        Change::Node(NodeCommand::Enrol { role: Role::Worker, key: KeyFingerprint([0; 32]) })
    }

    type Answer = oneshot::Receiver<Result<Vec<Effect>, ProposeError>>;

    fn proposals() -> (Proposals, Vec<Answer>) {
        let mut proposals = Proposals::new(C1, Incarnation(3));
        let mut answers = Vec::new();
        for _ in 0..2 {
            let (reply, answer) = oneshot::channel();
            proposals.push(at(0), enrol(), None, reply);
            answers.push(answer);
        }
        (proposals, answers)
    }

    #[test]
    fn one_command_is_sent_again_until_the_state_answers_it() {
        let (mut proposals, mut answers) = proposals();
        let mut state = ClusterState::default();
        let first = proposals.due(at(0), Timestamp(7)).unwrap().clone();
        assert_eq!(
            (first.sequence, first.at, first.incarnation),
            (1, Timestamp(7), Incarnation(3))
        );
        proposals.sent(at(0));
        assert!(proposals.due(at(200), Timestamp(8)).is_none(), "it is on its way");
        assert_eq!(proposals.due(at(250), Timestamp(8)), Some(&first), "the same, stamp and all");
        proposals.sent(at(250));
        proposals.leader_changed();
        assert_eq!(proposals.due(at(251), Timestamp(8)), Some(&first));
        proposals.sent(at(251));
        assert!(!proposals.answer(&state));

        // However often it arrives it is applied once.
        for _ in 0..3 {
            state.apply(&first).unwrap();
        }
        assert_eq!(state.nodes.workers().count(), 1);
        assert!(proposals.answer(&state));
        assert!(matches!(answers[0].try_recv(), Ok(Ok(_))));
        let second = proposals.due(at(252), Timestamp(9)).unwrap();
        assert_eq!(second.sequence, 2);
    }

    /// Nothing of it is sent to the next leader: neither what waits nor what is under way.
    #[test]
    fn what_a_leader_wants_is_not_sent_once_another_leads() {
        let mut proposals = Proposals::new(C1, Incarnation(3));
        let mut answers = Vec::new();
        for under in [Some(7), None, Some(7)] {
            let (reply, answer) = oneshot::channel();
            proposals.push(at(0), enrol(), under, reply);
            answers.push(answer);
        }
        proposals.reign(Some(7));
        assert_eq!(proposals.due(at(0), Timestamp(0)).unwrap().sequence, 1);
        proposals.sent(at(0));
        proposals.reign(Some(7));
        assert_eq!(proposals.count(), 3);
        proposals.reign(None);
        let (first, last) = (answers[0].try_recv().unwrap(), answers[2].try_recv().unwrap());
        for result in [first, last] {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("another coordinator leads now"), "{error}");
        }
        // What is nobody's in particular is made by whoever leads, and has a number of its own.
        assert!(answers[1].try_recv().is_err());
        assert_eq!(proposals.due(at(1), Timestamp(0)).unwrap().sequence, 2);
    }

    #[test]
    fn what_waits_too_long_is_given_up() {
        let (mut proposals, mut answers) = proposals();
        proposals.due(at(0), Timestamp(0));
        proposals.expire(at(9_999));
        assert_eq!(proposals.count(), 2);
        proposals.expire(at(10_000));
        assert_eq!(proposals.count(), 0);
        for answer in &mut answers {
            assert_eq!(answer.try_recv().unwrap(), Err(ProposeError::TimedOut));
        }
    }

    #[test]
    fn a_read_waits_for_its_index_and_asks_again() {
        let mut reads = Reads::default();
        let (reply, mut answer) = oneshot::channel();
        reads.push(at(0), reply);
        let first = reads.due(at(0)).unwrap();
        assert_eq!(reads.due(at(100)), None);
        let second = reads.due(at(250)).unwrap();
        // The first answer comes late: it is not the question that was asked last.
        reads.index(first, 4);
        reads.answer(9);
        assert!(answer.try_recv().is_err());
        reads.index(second, 5);
        reads.answer(4);
        assert!(answer.try_recv().is_err(), "the copy is behind");
        reads.answer(5);
        assert_eq!(answer.try_recv().unwrap(), Ok(()));

        let (reply, mut late) = oneshot::channel();
        reads.push(at(300), reply);
        reads.expire(at(5_299));
        assert!(late.try_recv().is_err());
        reads.expire(at(5_300));
        assert_eq!(late.try_recv().unwrap(), Err(ReadError::NoQuorum));
    }
}
