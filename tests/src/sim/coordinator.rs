//! ○ A coordinator's process: the shell around the real voter (as `store/raft/shell.rs` is), under
//! the simulator's clock, network and disk.

use std::collections::VecDeque;
use std::sync::Arc;

use raft::prelude::{Message, MessageType};
use shoal_coordinator::control::state::{Change, ClusterState, Command, Effect, Timestamp};
use shoal_coordinator::control::store::raft::core::{Done, Round, Voter, Write};
use shoal_coordinator::control::store::raft::pending::{Proposals, Reads};
use shoal_coordinator::control::store::{ProposeError, ReadError, Standing};
use shoal_protocol::id::{Incarnation, NodeId};
use shoal_protocol::units::Instant;
use tokio::sync::oneshot;

use super::agents::Agents;
use super::bug::Bug;
use super::desk::Desk;
use super::disk::Disk;
use super::executor::Executor;
use super::wire::{Datagram, Event, Wish};
use super::world::World;

/// How often a file that failed is opened again, as in the shell.
const REOPEN_US: u64 = 1_000_000;

/// Ticks between looks at the members, as in the shell.
const SETTLE_TICKS: u64 = 10;

/// A compaction after so many entries, with so many kept: the real one has 1024 and 256.
const COMPACTION: (usize, u64) = (12, 4);

/// A machine with a coordinator.
#[derive(Default)]
pub struct Coordinator {
    /// Its disk.
    pub disk: Disk,
    /// Until when writes to it fail.
    pub disk_fails_until: u64,
    /// How far its clock is off, in seconds.
    pub skew: i64,
    /// What runs.
    pub process: Option<Process>,
}

/// One life of a coordinator.
pub struct Process {
    /// Its number, over all processes of all machines.
    pub life: u64,
    /// When it began.
    pub started: u64,
    /// Which start of the coordinator this is.
    pub incarnation: Incarnation,
    /// `None` after an error of the disk.
    pub voter: Option<Voter>,
    failed_at: u64,
    writing: Option<Round>,
    late: VecDeque<Write>,
    inbox: VecDeque<Input>,
    ticks: u64,
    proposals: Proposals,
    reads: Reads,
    /// The state as it is shown to the rest of the process.
    pub state: Arc<ClusterState>,
    /// How far it goes.
    pub shown: u64,
    /// Who leads.
    pub standing: Standing,
    waits: Vec<Wait>,
    /// Its workers.
    pub agents: Agents,
    /// Its reconciliation.
    pub executor: Executor,
    /// Its answers.
    pub desk: Desk,
    last_announced: u64,
}

#[allow(clippy::large_enum_variant)] // Nearly all are messages.
enum Input {
    Message(Message),
    SnapshotSent(u64, bool),
    Tick,
}

/// Who waits for an answer of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A client or the operator; the number in the history.
    Operation(usize),
    /// The coordinator announces itself.
    Announce,
    /// A worker's start is recorded.
    Admit(NodeId, u64),
    /// A new layout.
    Adopt,
    /// Proof that this coordinator leads.
    Proof,
    /// A step of a coordinator's replacement.
    Replace(u8),
}

struct Wait {
    purpose: Purpose,
    reply: Reply,
}

enum Reply {
    Change(oneshot::Receiver<Result<Vec<Effect>, ProposeError>>),
    Read(oneshot::Receiver<Result<(), ReadError>>),
}

/// What the store answered.
pub type Answered = Result<Vec<Effect>, String>;

impl Process {
    /// Asks the store.
    pub fn ask(&mut self, now: u64, purpose: Purpose, wish: Wish, bug: Option<Bug>) {
        let reply = match wish {
            Wish::Change(change) => {
                let (send, receive) = oneshot::channel();
                // As the executor does: a plan is what a leader wants.
                let plan = matches!(change, Change::Plan(_));
                let under = self.executor.leads.filter(|_| plan);
                self.proposals.push(Instant(now), change, under, send);
                Reply::Change(receive)
            }
            Wish::Read => {
                let (send, receive) = oneshot::channel();
                if bug == Some(Bug::ReadWithoutQuorum) {
                    let _ = send.send(Ok(()));
                } else {
                    self.reads.push(Instant(now), send);
                }
                Reply::Read(receive)
            }
        };
        self.waits.push(Wait { purpose, reply });
    }

    /// Whether an answer is awaited for this.
    pub fn awaits(&self, purpose: Purpose) -> bool {
        self.waits.iter().any(|wait| wait.purpose == purpose)
    }

    fn answered(&mut self) -> Vec<(Purpose, Answered)> {
        let mut answers = Vec::new();
        self.waits.retain_mut(|wait| {
            use oneshot::error::TryRecvError::{Closed, Empty};
            let answer = match &mut wait.reply {
                Reply::Change(reply) => match reply.try_recv() {
                    Ok(answer) => answer.map_err(|error| error.to_string()),
                    Err(Empty) => return true,
                    Err(Closed) => Err("closed".to_owned()),
                },
                Reply::Read(reply) => match reply.try_recv() {
                    Ok(answer) => answer.map(|()| Vec::new()).map_err(|error| error.to_string()),
                    Err(Empty) => return true,
                    Err(Closed) => Err("closed".to_owned()),
                },
            };
            answers.push((wait.purpose, answer));
            false
        });
        answers
    }
}

impl World {
    /// Starts the process of a coordinator.
    pub fn start_coordinator(&mut self, id: NodeId) {
        let life = self.new_life();
        let dice = self.dice.bits();
        let (now, bug) = (self.now, self.bug);
        let Some(machine) = self.coordinators.get_mut(&id) else { return };
        if bug != Some(Bug::SameIncarnation) || machine.disk.incarnation == 0 {
            machine.disk.incarnation += 1;
        }
        let incarnation = Incarnation(machine.disk.incarnation);
        let voter = match open(id, &machine.disk, dice, bug) {
            Ok(voter) => voter,
            Err(why) => return self.violate("disks", format!("{id}: {why}")),
        };
        machine.process = Some(Process {
            life,
            started: now,
            incarnation,
            shown: voter.applied(),
            state: Arc::clone(voter.state()),
            voter: Some(voter),
            failed_at: 0,
            writing: None,
            late: VecDeque::new(),
            inbox: VecDeque::new(),
            ticks: 0,
            proposals: Proposals::new(id, incarnation),
            reads: Reads::default(),
            standing: Standing::default(),
            waits: Vec::new(),
            agents: Agents::default(),
            executor: Executor::default(),
            desk: Desk::default(),
            last_announced: 0,
        });
        let first = self.dice.range(0, 10_000);
        self.at(now + first, Event::Tick { at: id, life });
        self.at(now + 1_000, Event::Beats { at: id, life });
        self.at(now + 1_000, Event::Reconcile { at: id, life });
        self.turn(id, |_, _, _| {});
    }

    /// Lets a coordinator's process do something, and then all that follows from it.
    pub fn turn(&mut self, id: NodeId, work: impl FnOnce(&mut World, &mut Process, &mut Disk)) {
        let Some(mut machine) = self.coordinators.remove(&id) else { return };
        if let Some(mut process) = machine.process.take() {
            work(self, &mut process, &mut machine.disk);
            self.pump(id, &mut machine, &mut process);
            machine.process = Some(process);
        }
        self.coordinators.insert(id, machine);
    }

    /// A datagram of another voter.
    pub fn raft_message(&mut self, to: NodeId, message: Message) {
        self.turn(to, |_, process, _| process.inbox.push_back(Input::Message(message)));
    }

    /// A snapshot has, or has not, arrived.
    pub fn snapshot_sent(&mut self, at: NodeId, life: u64, to: u64, arrived: bool) {
        self.turn(at, |_, process, _| {
            if process.life == life {
                process.inbox.push_back(Input::SnapshotSent(to, arrived));
            }
        });
    }

    /// A tick of a coordinator's thread.
    pub fn coordinator_tick(&mut self, id: NodeId, life: u64) {
        let period = 10_000 * self.net.slow.get(&id).copied().unwrap_or(1).min(3);
        self.at(self.now + period, Event::Tick { at: id, life });
        self.turn(id, |world, process, disk| {
            // A thread that was held up has not seen the others be silent.
            if !process.inbox.iter().any(|input| matches!(input, Input::Tick)) {
                process.inbox.push_back(Input::Tick);
            }
            if process.voter.is_none() && world.now >= process.failed_at + REOPEN_US {
                world.reopen(id, process, disk);
            }
            world.announce(id, process);
            world.desk_tick(id, process);
        });
    }

    fn reopen(&mut self, id: NodeId, process: &mut Process, disk: &Disk) {
        process.failed_at = self.now;
        let dice = self.dice.bits();
        match open(id, disk, dice, self.bug) {
            Ok(voter) => process.voter = Some(voter),
            Err(why) => self.violate("disks", format!("{id}: {why}")),
        }
    }

    /// A write has come to its end.
    pub fn written(&mut self, id: NodeId, life: u64, good: bool) {
        let bug = self.bug;
        self.turn(id, |world, process, disk| {
            if process.life != life {
                return;
            }
            if let Some(write) = process.late.pop_front() {
                return disk.write(&write, bug);
            }
            let Some(round) = process.writing.take() else { return };
            if good || world.dice.one_in(2) {
                disk.write(&round.write, bug);
            }
            if good {
                world.finish(id, process, disk, round);
            } else {
                world.fail(process, "the disk");
            }
        });
    }

    fn fail(&mut self, process: &mut Process, why: &str) {
        process.voter = None;
        process.writing = None;
        process.late.clear();
        process.failed_at = self.now;
        process.proposals.fail(&ProposeError::Storage { why: why.to_owned() });
        process.reads.fail(&ReadError::NoQuorum);
        let epoch = process.standing.epoch;
        process.standing = Standing { leader: None, epoch, leading: false };
    }

    fn pump(&mut self, id: NodeId, machine: &mut Coordinator, process: &mut Process) {
        while process.writing.is_none() {
            while let Some(input) = process.inbox.pop_front() {
                self.take_input(process, input);
            }
            let wall = (1_000_000 + self.now as i64 / 1_000_000 + machine.skew).max(0) as u64;
            self.offer(process, Timestamp(wall));
            let Some(voter) = &mut process.voter else { break };
            match voter.begin() {
                Ok(None) => break,
                Ok(Some(round)) => self.begin_round(id, machine, process, round),
                Err(error) => return self.violate("cores", format!("{id}: {error}")),
            }
        }
        self.show(id, process);
        for (purpose, answer) in process.answered() {
            self.store_answered(id, process, purpose, answer);
        }
    }

    fn take_input(&mut self, process: &mut Process, input: Input) {
        let now = Instant(self.now);
        if matches!(input, Input::Tick) {
            process.ticks += 1;
            process.proposals.expire(now);
            process.reads.expire(now);
        }
        let Some(voter) = &mut process.voter else { return };
        match input {
            Input::Message(message) => voter.step(message),
            Input::SnapshotSent(to, arrived) => voter.snapshot_sent(to, arrived),
            Input::Tick => {
                voter.tick();
                if process.ticks.is_multiple_of(SETTLE_TICKS) {
                    voter.settle_members();
                }
            }
        }
    }

    fn offer(&mut self, process: &mut Process, wall: Timestamp) {
        let now = Instant(self.now);
        let Some(voter) = &mut process.voter else { return };
        process.proposals.reign(voter.reign());
        if voter.leader().is_some()
            && let Some(command) = process.proposals.due(now, wall).cloned()
        {
            let offered = self.disguised(&command);
            if voter.propose(&offered) {
                process.proposals.sent(now);
                if self.bug == Some(Bug::AckBeforeCommit) && voter.leads() {
                    let mut state = (**voter.state()).clone();
                    let _ = state.apply(&command);
                    process.proposals.answer(&state);
                }
            }
        }
        if let Some(number) = process.reads.due(now) {
            voter.read(number);
        }
    }

    /// The command as it is sent.
    fn disguised(&mut self, command: &Command) -> Command {
        let mut command = command.clone();
        if self.bug == Some(Bug::ApplyTwice) {
            let again = self.checks.offered(&command);
            command.client.number += 100 * again;
        }
        command
    }

    fn begin_round(
        &mut self,
        id: NodeId,
        machine: &mut Coordinator,
        process: &mut Process,
        mut round: Round,
    ) {
        for message in std::mem::take(&mut round.send) {
            self.raft_send(id, process.life, message);
        }
        if round.write.is_empty() {
            return self.finish(id, process, &mut machine.disk, round);
        }
        let took = match self.net.rough && self.dice.one_in(12) {
            true => self.dice.range(2_000, 40_000),
            false => self.dice.range(100, 900),
        };
        let slow = self.net.slow.get(&id).copied().unwrap_or(1);
        let good = self.now >= machine.disk_fails_until;
        let life = process.life;
        self.at(self.now + took * slow, Event::Written { at: id, life, good });
        if self.bug == Some(Bug::SendBeforeWrite) {
            process.late.push_back(round.write.clone());
            return self.finish(id, process, &mut machine.disk, round);
        }
        process.writing = Some(round);
    }

    fn finish(&mut self, id: NodeId, process: &mut Process, disk: &mut Disk, round: Round) {
        let Some(voter) = &mut process.voter else { return };
        let done: Done = match voter.finish(round) {
            Ok(done) => done,
            Err(error) => return self.violate("cores", format!("{id}: {error}")),
        };
        for (number, index) in done.reads {
            process.reads.index(number, index);
        }
        if done.applied {
            voter.settle_members();
        }
        let (state, applied) = (Arc::clone(voter.state()), voter.applied());
        self.checks.applied(id, applied, &state);
        if applied > process.shown {
            process.shown = applied;
            process.state = Arc::clone(&state);
            self.look_soon(id, process);
        }
        let mut upto = process.shown.min(applied);
        if self.bug == Some(Bug::ReadBeforeApply) {
            upto = u64::MAX;
        }
        process.reads.answer(upto);
        if done.applied {
            process.proposals.answer(&state);
        }
        if let Some(snapshot) = done.compact {
            self.checks.compactions += 1;
            disk.compact(&snapshot, self.bug);
        }
        for message in done.send {
            self.raft_send(id, process.life, message);
        }
    }

    fn raft_send(&mut self, from: NodeId, life: u64, message: Message) {
        let to = NodeId::coordinator(message.to as u32);
        let snapshot = message.get_msg_type() == MessageType::MsgSnapshot;
        let number = message.to;
        let arrived = self.datagram(from, to, Datagram::Raft(Box::new(message)));
        if snapshot {
            let sent = Event::SnapshotSent { at: from, life, to: number, arrived };
            self.at(self.now + 2_000, sent);
        }
    }

    fn show(&mut self, id: NodeId, process: &mut Process) {
        let Some(voter) = &process.voter else { return };
        let node = |number: u64| NodeId::coordinator(number as u32);
        let standing = Standing {
            leader: voter.leader().map(node),
            epoch: voter.term(),
            leading: voter.leads(),
        };
        if standing.leading {
            self.checks.leads(id, standing.epoch);
        }
        if standing != process.standing {
            let before = std::mem::replace(&mut process.standing, standing);
            if before.leader != standing.leader {
                process.proposals.leader_changed();
            }
            self.look_soon(id, process);
        }
    }

    /// Says in the log which start this is, until the log shows it.
    fn announce(&mut self, id: NodeId, process: &mut Process) {
        use shoal_coordinator::control::state::CoordinatorCommand;
        let recorded = process.state.nodes.get(id).and_then(|node| node.incarnation);
        let due = self.now >= process.last_announced + 500_000;
        if recorded >= Some(process.incarnation) || !due || process.awaits(Purpose::Announce) {
            return;
        }
        let Some(record) = process.state.coordinators.get(id) else { return };
        process.last_announced = self.now;
        let change = Change::Coordinator(CoordinatorCommand::Announce {
            node: id,
            incarnation: process.incarnation,
            boot: process.life,
            cluster: record.cluster,
            build: "sim".into(),
        });
        process.ask(self.now, Purpose::Announce, Wish::Change(change), self.bug);
    }
}

fn open(id: NodeId, disk: &Disk, dice: u64, bug: Option<Bug>) -> Result<Voter, String> {
    let saved = disk.read(bug)?;
    let mut voter = Voter::new(u64::from(id.number), saved, dice).map_err(|e| e.to_string())?;
    voter.compact_after(COMPACTION.0, COMPACTION.1);
    Ok(voter)
}
