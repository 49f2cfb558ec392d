//! ● The task that owns the state: proposals and reads in, the log followed meanwhile.
//!
//! ```text
//! propose ─► staged on a copy ─► transaction {head as I know it, n is free, leader as I know him}
//!              ▲      yes ─► applied, told        head differs ─► read on, stage again
//!              │      no answer ─► the same again: at most one of them finds the head as it was
//! ```
//!
//! One change at a time: each is compared with the whole log before it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use etcd_client::WatchStream;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::client::{Appended, Etcd, EtcdError};
use super::entry::EntryId;
use super::tail::{Lost, Proposer, Staged, Tail, Unstaged};
use crate::control::state::{Change, ClusterState, Effect, Timestamp};
use crate::control::store::{ANOTHER_LEADS, Message, ProposeError, ReadError, Standing};

/// How long a change is tried: some requests and an election, and less than `PROPOSE_TIMEOUT`, so that
/// whoever waits hears why it failed.
const PROPOSE_PATIENCE: Duration = Duration::from_secs(6);

/// How long a read is tried; less than `READ_TIMEOUT` for the same reason.
const READ_PATIENCE: Duration = Duration::from_secs(4);

/// How long to wait after etcd did not answer.
const RETRY: Duration = Duration::from_millis(200);

/// How often the log's end is asked for, whatever the watch says: one that was lost without a word
/// must not leave an old picture for long.
const AUDIT_PERIOD: Duration = Duration::from_secs(5);

/// Commands that are appended before a snapshot that failed is tried again.
const COMPACT_RETRY: u64 = 32;

/// Tells the time. Tests have clocks that are wrong.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// The task's own.
pub struct Voter {
    pub proposer: Proposer,
    pub clock: Clock,
    pub etcd: Etcd,
    pub tail: Tail,
    pub published: watch::Sender<Arc<ClusterState>>,
    pub standing: watch::Receiver<Standing>,
    pub doubt: Arc<Notify>,
    pub follow: Follow,
    /// Why nothing in etcd is believed any more.
    pub broken: Option<Lost>,
    /// The log's length at which a snapshot is tried again.
    pub compact_at: u64,
}

/// How the log is followed.
pub enum Follow {
    /// By a watch.
    Watch(Box<WatchStream>),
    /// Not, and when to try again.
    Lost(Instant),
}

impl Voter {
    /// Serves until it is told to stop, or the last handle is gone.
    pub async fn run(mut self, mut inbox: mpsc::Receiver<Message>) {
        let mut audit = Instant::now() + AUDIT_PERIOD;
        loop {
            tokio::select! {
                message = inbox.recv() => match message {
                    Some(Message::Propose { change, under, reply }) => {
                        // Nobody waits for it any more, and nothing of it has been written.
                        if reply.is_closed() {
                            continue;
                        }
                        let result = self.propose(change, under).await;
                        if let Err(error @ ProposeError::Unavailable { .. }) = &result {
                            turn_away(&mut inbox, error);
                        }
                        // The proposer may have given up; the change is made all the same.
                        drop(reply.send(result));
                    }
                    Some(Message::Read { under, reply }) => {
                        let result = self.read(under).await;
                        drop(reply.send(result));
                    }
                    Some(Message::Stop) | None => return,
                },
                heard = self.follow.next() => self.hear(heard).await,
                () = sleep_until(audit) => {
                    audit = Instant::now() + AUDIT_PERIOD;
                    if matches!(self.follow, Follow::Watch(_)) && let Err(error) = self.catch_up().await {
                        self.lose(&error);
                    }
                }
            }
            self.compact().await;
        }
    }

    async fn propose(
        &mut self,
        change: Change,
        under: Option<u64>,
    ) -> Result<Vec<Effect>, ProposeError> {
        let until = Instant::now() + PROPOSE_PATIENCE;
        let result = timeout_at(until, self.try_propose(change, under)).await;
        self.tail.forget();
        // The last request may have been made, and is found in the log then.
        result.unwrap_or_else(|_| Err(unavailable("etcd does not answer")))
    }

    async fn try_propose(
        &mut self,
        change: Change,
        under: Option<u64>,
    ) -> Result<Vec<Effect>, ProposeError> {
        let mut staged: Option<Staged> = None;
        let mut epoch = self.epoch_but(None).await;
        loop {
            if let Some(lost) = &self.broken {
                return Err(unavailable(lost));
            }
            // What a leader wants it wants as the leader.
            if under.is_some_and(|under| under != epoch) {
                return Err(unavailable(ANOTHER_LEADS));
            }
            let next = match staged.take() {
                Some(staged) => staged,
                None => match self.stage(change.clone())? {
                    Ok(staged) => staged,
                    Err(refusal) => match self.is_current().await {
                        Ok(true) => return Err(refusal),
                        Ok(false) => continue,
                        Err(error) => return Err(unavailable(error)),
                    },
                },
            };
            let (index, head) = (self.tail.applied() + 1, self.tail.head());
            match self.etcd.append(index, next.bytes.clone(), head, epoch).await {
                Ok(Appended::Done { revision }) => {
                    let effects = self.tail.settle(next, revision);
                    self.publish();
                    return Ok(effects);
                }
                Ok(Appended::OtherLeader) => {
                    self.doubt.notify_one();
                    epoch = self.epoch_but(Some(epoch)).await;
                    staged = Some(next);
                }
                Ok(Appended::Behind) => {
                    self.tail.await_answer(&next);
                    let caught_up = self.catch_up().await;
                    if let Some(effects) = self.tail.take_answer() {
                        return Ok(effects);
                    }
                    caught_up.map_err(unavailable)?;
                }
                Err(error) => {
                    tracing::debug!(%error, index, "a command was not answered; trying again");
                    self.recover().await;
                    // The very same one, at the same place: it stands there once or not at all.
                    staged = Some(next);
                }
            }
        }
    }

    /// A command of the change; inside, what the state as it is here has against it.
    fn stage(&self, change: Change) -> Result<Result<Staged, ProposeError>, ProposeError> {
        let mut id = EntryId::default();
        getrandom::fill(&mut id).map_err(unavailable)?;
        let now = Timestamp::of((self.clock)());
        match self.tail.stage(self.proposer, now, id, change) {
            Ok(staged) => Ok(Ok(staged)),
            Err(Unstaged::Refused(refusal)) => Ok(Err(refusal.into())),
            Err(Unstaged::Unwritable(error)) => Err(unavailable(error)),
        }
    }

    /// Waits until somebody leads, and another than who is known not to.
    async fn epoch_but(&mut self, gone: Option<u64>) -> u64 {
        let known = |standing: &Standing| standing.epoch != 0 && Some(standing.epoch) != gone;
        let found = self.standing.wait_for(known).await.map(|standing| standing.epoch);
        match found {
            Ok(epoch) => epoch,
            // The election has ended, and so will this task.
            Err(_) => std::future::pending().await,
        }
    }

    /// Whether the state was at the log's end; if not, it is now.
    async fn is_current(&mut self) -> Result<bool, EtcdError> {
        let before = self.tail.applied();
        self.catch_up().await?;
        Ok(self.tail.applied() == before)
    }

    async fn read(&mut self, under: Option<u64>) -> Result<(), ReadError> {
        let until = Instant::now() + READ_PATIENCE;
        loop {
            if let Some(lost) = &self.broken {
                return Err(ReadError::Unavailable { why: lost.to_string() });
            }
            let read = async {
                self.catch_up().await?;
                self.still_leads(under).await
            };
            let why = match timeout_at(until, read).await {
                Ok(Ok(true)) => return Ok(()),
                Ok(Ok(false)) => {
                    self.doubt.notify_one();
                    return Err(ReadError::Unavailable { why: ANOTHER_LEADS.to_owned() });
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "etcd does not answer".to_owned(),
            };
            if self.broken.is_none() && Instant::now() + RETRY >= until {
                return Err(ReadError::Unavailable { why });
            }
            self.recover().await;
        }
    }

    /// Whether the leader's key is still the one of this epoch. What the leaders before it decided was
    /// written while theirs was, so whoever read before has all of it.
    async fn still_leads(&self, under: Option<u64>) -> Result<bool, EtcdError> {
        let Some(epoch) = under else { return Ok(true) };
        let (holder, _) = self.etcd.leader().await?;
        Ok(holder.is_some_and(|holder| holder.epoch as u64 == epoch))
    }

    /// Reads the log to its end, or all of it again where that cannot be; returns the revision.
    async fn catch_up(&mut self) -> Result<i64, EtcdError> {
        let followed = self.etcd.follow(&mut self.tail).await;
        let result = match followed {
            Err(EtcdError::Lost(lost @ (Lost::Gap { .. } | Lost::Entry { .. }))) => {
                tracing::info!(%lost, "loading the state from etcd again");
                self.load().await
            }
            followed => followed,
        };
        if let Err(EtcdError::Lost(lost @ Lost::WentBack { .. })) = &result {
            tracing::error!(%lost, "nothing in etcd is believed any more");
            self.broken = Some(lost.clone());
        }
        self.publish();
        result
    }

    async fn load(&mut self) -> Result<i64, EtcdError> {
        let loaded = self.etcd.load().await?;
        self.tail.replace(loaded)?;
        self.etcd.follow(&mut self.tail).await
    }

    fn publish(&self) {
        self.published.send_if_modified(|state| {
            let newer = !Arc::ptr_eq(state, self.tail.state());
            *state = Arc::clone(self.tail.state());
            newer
        });
    }

    /// After a request that failed: a pause, and the password again.
    async fn recover(&self) {
        tokio::time::sleep(RETRY).await;
        self.etcd.sign_in().await;
    }

    async fn hear(&mut self, message: Result<Option<etcd_client::WatchResponse>, String>) {
        let message = match message {
            Ok(Some(message)) => message,
            // It is time to try again.
            Ok(None) => return self.resume().await,
            Err(why) => return self.lose(&why),
        };
        if message.canceled() {
            let compacted = message.compact_revision() > 0;
            let why = if compacted { "etcd was compacted" } else { message.cancel_reason() };
            return self.lose(&why);
        }
        let heard = self.etcd.heard(&message);
        let taken = heard.and_then(|heard| {
            heard.iter().try_for_each(|heard| self.tail.hear(heard)).map_err(EtcdError::from)
        });
        self.publish();
        if let Err(error) = taken {
            self.lose(&error);
        }
    }

    /// The watch is of no use any more.
    fn lose(&mut self, why: &dyn std::fmt::Display) {
        tracing::info!("the watch of the log in etcd is lost ({why}); reading it again");
        self.follow = Follow::Lost(Instant::now());
    }

    /// Reads the log to its end and watches from there.
    async fn resume(&mut self) {
        self.follow = Follow::Lost(Instant::now() + RETRY);
        if self.broken.is_some() {
            // Only a new start helps.
            self.follow = Follow::Lost(Instant::now() + AUDIT_PERIOD);
            return;
        }
        let resumed = async {
            let at = self.catch_up().await?;
            self.etcd.watch(at).await
        };
        match resumed.await {
            Ok(watch) => self.follow = Follow::Watch(Box::new(watch)),
            Err(error) => {
                tracing::debug!(%error, "the log in etcd cannot be followed; trying on");
                self.etcd.sign_in().await;
            }
        }
    }

    /// The leader replaces a long log by a snapshot.
    async fn compact(&mut self) {
        let standing = *self.standing.borrow();
        if !standing.leading || !self.tail.is_long() || self.tail.applied() < self.compact_at {
            return;
        }
        let mut nonce = [0; 8];
        let drawn = getrandom::fill(&mut nonce).is_ok();
        let nonce = u64::from_le_bytes(nonce);
        self.compact_at = self.tail.applied() + COMPACT_RETRY;
        match self.etcd.compact(&self.tail, standing.epoch, nonce).await {
            _ if !drawn => {}
            Ok(true) => self.tail.trim(self.tail.applied()),
            Ok(false) => tracing::debug!("another has written a snapshot"),
            Err(error) => tracing::warn!(%error, "no snapshot was written; trying again later"),
        }
    }
}

impl Follow {
    /// The next message of the watch; `None` when it is time to begin one. Cancel safe.
    async fn next(&mut self) -> Result<Option<etcd_client::WatchResponse>, String> {
        match self {
            Follow::Lost(retry_at) => {
                sleep_until(*retry_at).await;
                Ok(None)
            }
            Follow::Watch(watch) => match watch.message().await {
                Ok(Some(message)) => Ok(Some(message)),
                Ok(None) => Err("it has ended".to_owned()),
                Err(error) => Err(EtcdError::from(error).to_string()),
            },
        }
    }
}

/// Those that waited behind a change that failed would fare no better: each would wait as long.
fn turn_away(inbox: &mut mpsc::Receiver<Message>, error: &ProposeError) {
    for _ in 0..inbox.len() {
        match inbox.try_recv() {
            Ok(Message::Propose { reply, .. }) => drop(reply.send(Err(error.clone()))),
            Ok(Message::Read { reply, .. }) => {
                drop(reply.send(Err(ReadError::Unavailable { why: error.to_string() })));
            }
            // Stopping: the handles find that out.
            Ok(Message::Stop) | Err(_) => inbox.close(),
        }
    }
}

fn unavailable(why: impl std::fmt::Display) -> ProposeError {
    ProposeError::Unavailable { why: why.to_string() }
}
