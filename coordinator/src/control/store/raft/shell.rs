//! ● The thread that owns a voter, its disk and the only copy of the state that changes.
//!
//! After an error of the disk nobody can know what it holds, so the file is closed and the voter
//! dropped: changes are refused, reads go on, and the next change (or the next second) opens the file
//! and begins anew from what is found there.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use raft::prelude::Message as RaftMessage;
use shoal_protocol::id::{Incarnation, NodeId};
use shoal_protocol::units::Instant;
use tokio::sync::{mpsc, watch};
use tokio::time::{Interval, MissedTickBehavior};

use super::core::{CoreError, TICK, Voter};
use super::disk::{Disk, DiskError, Opener, message_of};
use super::pending::{Proposals, Reads};
use crate::control::state::{ClusterState, Timestamp};
use crate::control::store::{Members, Message, PROPOSALS_MAX, ProposeError, ReadError, Standing};

/// How often a file that failed is opened again.
const REOPEN: Duration = Duration::from_secs(1);

/// Ticks between looks at the members: whoever has caught up waits no longer.
const SETTLE_TICKS: u32 = 10;

/// Messages that are taken together: one write for all of them.
const BATCH_MAX: usize = 64;

/// How long changes that wait may take at the end: an election and a few syncs. Without a majority they
/// would wait in vain.
const LAST_CHANGES: Duration = Duration::from_secs(1);

/// How long a leader that stops may look for another.
const HANDOVER: Duration = Duration::from_millis(300);

/// What the network brings.
#[derive(Debug)]
pub enum NetworkEvent {
    /// A message for this voter.
    Message(Box<RaftMessage>),
    /// A message to this one could not be delivered.
    Unreachable(u64),
    /// A snapshot has arrived at this one, or has not.
    SnapshotSent(u64, bool),
}

/// Takes messages for other voters; never blocks, and may lose any.
pub type SendMessage = Box<dyn Fn(RaftMessage) + Send>;

/// What the shell is made with.
pub(super) struct Parts {
    pub me: NodeId,
    pub incarnation: Incarnation,
    pub dice: u64,
    pub opener: Opener,
    pub voter: Voter,
    pub disk: Disk,
    pub published: watch::Sender<Arc<ClusterState>>,
    pub standing: watch::Sender<Standing>,
    pub members: watch::Sender<Members>,
    pub send: SendMessage,
}

pub(super) struct Shell {
    parts: Shown,
    /// `None` after an error, until the file has been opened again.
    live: Option<(Voter, Disk)>,
    proposals: Proposals,
    reads: Reads,
    origin: std::time::Instant,
    /// How far the state that was shown goes: a voter that begins anew may know less at first.
    shown: u64,
    failed_at: Option<std::time::Instant>,
    ticks: u32,
}

struct Shown {
    me: NodeId,
    dice: u64,
    opener: Opener,
    published: watch::Sender<Arc<ClusterState>>,
    standing: watch::Sender<Standing>,
    members: watch::Sender<Members>,
    send: SendMessage,
}

/// Why a voter was dropped.
#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Core(#[from] CoreError),
}

impl Shell {
    pub fn new(parts: Parts) -> Self {
        let proposals = Proposals::new(parts.me, parts.incarnation);
        let shown = parts.voter.applied();
        Self {
            live: Some((parts.voter, parts.disk)),
            proposals,
            reads: Reads::default(),
            origin: std::time::Instant::now(),
            shown,
            failed_at: None,
            ticks: 0,
            parts: Shown {
                me: parts.me,
                dice: parts.dice,
                opener: parts.opener,
                published: parts.published,
                standing: parts.standing,
                members: parts.members,
                send: parts.send,
            },
        }
    }

    /// Runs until it is told to stop, or all handles are gone. A panic inside ends it too: what the
    /// algorithm finds impossible, nobody should build on.
    pub fn run(mut self, inbox: mpsc::Receiver<Message>, network: mpsc::Receiver<NetworkEvent>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => return tracing::error!(%error, "the control state has no runtime"),
        };
        let work = AssertUnwindSafe(|| runtime.block_on(self.work(inbox, network)));
        if let Err(panic) = std::panic::catch_unwind(work) {
            let why = message_of(&*panic);
            tracing::error!(
                "the log found something impossible ({why}): this coordinator ends; start it again, and \
                 if it ends again remove it and join anew on an empty folder"
            );
        }
        if let Some((_, disk)) = self.live.take() {
            disk.close();
        }
    }

    async fn work(
        &mut self,
        mut inbox: mpsc::Receiver<Message>,
        mut network: mpsc::Receiver<NetworkEvent>,
    ) {
        let mut ticker = tokio::time::interval(TICK);
        // A thread that was held up has not seen the others be silent.
        ticker.set_missed_tick_behavior(MissedTickBehavior::Skip);
        self.rounds();
        loop {
            let room = self.proposals.count() + self.reads.count() < PROPOSALS_MAX;
            tokio::select! {
                message = inbox.recv(), if room => match message {
                    Some(Message::Stop) => break self.work_off(&mut network, &mut ticker).await,
                    None => break,
                    Some(message) => self.take(message),
                },
                // The transport outlives this; if it is gone the runtime ends.
                Some(event) = network.recv() => self.hear(event),
                () = tick(&mut ticker), if !self.is_idle() => self.tick(),
            }
            for _ in 0..BATCH_MAX {
                match network.try_recv() {
                    Ok(event) => self.hear(event),
                    Err(_) => break,
                }
            }
            self.pump();
        }
        self.hand_over(&mut network, &mut ticker).await;
    }

    /// Whether nothing happens unless somebody asks.
    fn is_idle(&self) -> bool {
        let alone = self.live.as_ref().is_some_and(|(voter, _)| voter.is_alone() && voter.leads());
        alone && self.proposals.count() == 0 && self.reads.count() == 0
    }

    fn take(&mut self, message: Message) {
        let now = self.now();
        match message {
            Message::Propose { change, under, reply } => {
                self.proposals.push(now, change, under, reply);
            }
            // A leader's read passes only while a majority follows it; whoever asks for more looks who leads
            // when it is answered.
            Message::Read { reply, .. } => self.reads.push(now, reply),
            Message::Stop => {}
        }
        if self.live.is_none() {
            self.reopen();
        }
    }

    fn hear(&mut self, event: NetworkEvent) {
        let Some((voter, _)) = &mut self.live else { return };
        match event {
            NetworkEvent::Message(message) => voter.step(*message),
            NetworkEvent::Unreachable(id) => voter.unreachable(id),
            NetworkEvent::SnapshotSent(id, arrived) => voter.snapshot_sent(id, arrived),
        }
    }

    fn tick(&mut self) {
        self.ticks = self.ticks.wrapping_add(1);
        let now = self.now();
        self.proposals.expire(now);
        self.reads.expire(now);
        match &mut self.live {
            Some((voter, _)) if !voter.is_alone() => {
                voter.tick();
                if self.ticks.is_multiple_of(SETTLE_TICKS) {
                    voter.settle_members();
                }
            }
            Some((voter, _)) if voter.is_lost_alone() => voter.campaign(),
            Some(_) => {}
            None if self.failed_at.is_none_or(|at| at.elapsed() >= REOPEN) => self.reopen(),
            None => {}
        }
    }

    /// Sends what is due and does what is ready, until nothing is.
    fn pump(&mut self) {
        loop {
            let now = self.now();
            let Some((voter, _)) = &mut self.live else { return };
            self.proposals.reign(voter.reign());
            if voter.leader().is_some()
                && let Some(command) = self.proposals.due(now, Timestamp::of(SystemTime::now()))
                && voter.propose(command)
            {
                self.proposals.sent(now);
            }
            if let Some(number) = self.reads.due(now) {
                voter.read(number);
            }
            if !self.rounds() {
                return;
            }
        }
    }

    /// Does what is ready. Whether a command was answered, so that the next one is due.
    fn rounds(&mut self) -> bool {
        let mut answered = false;
        loop {
            match self.round() {
                Ok(None) => break,
                Ok(Some(one)) => answered |= one,
                Err(error) => {
                    tracing::error!(%error, "the control state cannot be written");
                    self.fail(&error.to_string());
                    break;
                }
            }
        }
        self.show_standing();
        answered
    }

    fn round(&mut self) -> Result<Option<bool>, RoundError> {
        let Some((voter, disk)) = &mut self.live else { return Ok(None) };
        let Some(mut round) = voter.begin()? else { return Ok(None) };
        round.send.drain(..).for_each(|message| (self.parts.send)(message));
        disk.write(&round.write)?;
        let done = voter.finish(round)?;
        done.send.into_iter().for_each(|message| (self.parts.send)(message));
        for (number, index) in done.reads {
            self.reads.index(number, index);
        }
        if done.applied {
            voter.settle_members();
        }
        let (state, applied) = (Arc::clone(voter.state()), voter.applied());
        if applied > self.shown {
            self.shown = applied;
            self.parts.published.send_replace(Arc::clone(&state));
        }
        self.reads.answer(self.shown.min(applied));
        let answered = done.applied && self.proposals.answer(&state);
        if let Some(snapshot) = done.compact {
            disk.compact(&snapshot)?;
        }
        Ok(Some(answered))
    }

    fn show_standing(&mut self) {
        let Some((voter, _)) = &self.live else { return };
        let node = |id: &u64| NodeId::coordinator(u32::try_from(*id).unwrap_or(u32::MAX));
        let standing = Standing {
            leader: voter.leader().as_ref().map(node),
            epoch: voter.term(),
            leading: voter.leads(),
        };
        let conf = voter.conf();
        let members = Members {
            voters: conf.voters.iter().map(node).collect(),
            learners: conf.learners.iter().map(node).collect(),
        };
        let before = *self.parts.standing.borrow();
        if before != standing {
            tracing::info!(
                leader = ?standing.leader, epoch = standing.epoch, "who leads has changed"
            );
            self.parts.standing.send_replace(standing);
            if before.leader != standing.leader {
                self.proposals.leader_changed();
            }
        }
        self.parts.members.send_if_modified(|shown| {
            let changed = *shown != members;
            if changed {
                *shown = members;
            }
            changed
        });
    }

    /// Nobody knows what the disk holds: nothing is promised until it has been read again.
    fn fail(&mut self, why: &str) {
        if let Some((_, disk)) = self.live.take() {
            disk.close();
        }
        self.failed_at = Some(std::time::Instant::now());
        self.fail_all(why);
        let epoch = self.parts.standing.borrow().epoch;
        self.parts.standing.send_replace(Standing { leader: None, epoch, leading: false });
    }

    fn reopen(&mut self) {
        match super::begin(&self.parts.opener, self.parts.me, self.parts.dice) {
            Ok((voter, disk)) => {
                tracing::info!("the control state can be written again");
                self.live = Some((voter, disk));
                self.failed_at = None;
                self.rounds();
            }
            Err(error) => {
                tracing::warn!(%error, "the control state cannot be opened yet");
                self.failed_at = Some(std::time::Instant::now());
                self.fail_all(&error.to_string());
            }
        }
    }

    fn fail_all(&mut self, why: &str) {
        self.proposals.fail(&ProposeError::Storage { why: why.to_owned() });
        self.reads.fail(&ReadError::Storage { why: why.to_owned() });
    }

    /// Lets what was asked for before the end be made and read.
    async fn work_off(
        &mut self,
        network: &mut mpsc::Receiver<NetworkEvent>,
        ticker: &mut Interval,
    ) {
        let work = async {
            self.pump();
            while self.live.is_some() && self.proposals.count() + self.reads.count() > 0 {
                tokio::select! {
                    Some(event) = network.recv() => self.hear(event),
                    () = tick(ticker) => self.tick(),
                }
                self.pump();
            }
        };
        let _ = tokio::time::timeout(LAST_CHANGES, work).await;
    }

    /// A leader that stops lets another lead first: changes wait for a round trip, not for an election.
    async fn hand_over(
        &mut self,
        network: &mut mpsc::Receiver<NetworkEvent>,
        ticker: &mut Interval,
    ) {
        let heir = self.live.as_ref().and_then(|(voter, _)| voter.heir());
        let (Some(heir), Some((voter, _))) = (heir, &mut self.live) else { return };
        voter.transfer(heir);
        self.rounds();
        let handed = async {
            while self.live.as_ref().is_some_and(|(voter, _)| voter.leads()) {
                tokio::select! {
                    Some(event) = network.recv() => self.hear(event),
                    () = tick(ticker) => self.tick(),
                }
                self.rounds();
            }
        };
        let _ = tokio::time::timeout(HANDOVER, handed).await;
    }

    fn now(&self) -> Instant {
        Instant(0) + self.origin.elapsed()
    }
}

async fn tick(ticker: &mut Interval) {
    ticker.tick().await;
}
