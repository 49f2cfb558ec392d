//! ● What the store asks of etcd: each request with a deadline, each answer in our own words.

use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, Error, EventType, GetOptions, GetResponse,
    PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse, WatchOptions, WatchResponse, WatchStream,
};
use shoal_protocol::id::NodeId;

use super::chunks::{ChunkError, Manifest, PART_LEN};
use super::entry::ENTRY_LEN_MAX;
use super::keys::{Key, Keys, Span};
use super::tail::{Heard, Lost, Tail};
use crate::control::state::snapshot::{self, SnapshotError};

/// How long one request may take. A healthy etcd answers in milliseconds and elects a leader in
/// about a second.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Commands in one answer: up to 16 MiB of them.
const PAGE: i64 = 16;

/// The longest answer that is taken: a page of the longest commands, and room for their keys.
const ANSWER_LEN_MAX: usize = PAGE as usize * ENTRY_LEN_MAX + PART_LEN;

/// A request that was not answered as it should be.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// No answer in time. A change may have been made.
    #[error("etcd did not answer within {REQUEST_TIMEOUT:?}")]
    TimedOut,
    /// It answered that it could not. A change may have been made.
    #[error("etcd says: {0}")]
    Failed(String),
    /// An answer that makes no sense.
    #[error("etcd's answer cannot be read: {0}")]
    Answer(&'static str),
    /// The log cannot be followed.
    #[error("the log in etcd: {0}")]
    Lost(#[from] Lost),
    /// The snapshot is not what was written.
    #[error("the snapshot in etcd: {0}")]
    Chunks(#[from] ChunkError),
    /// The snapshot is not what was written.
    #[error("the snapshot in etcd: {0}")]
    Snapshot(#[from] SnapshotError),
}

impl From<Error> for EtcdError {
    fn from(error: Error) -> Self {
        Self::Failed(match error {
            Error::GRpcStatus(status) => match status.message() {
                "" => format!("{:?}", status.code()),
                message => message.trim_start_matches("etcdserver: ").to_owned(),
            },
            error => error.to_string(),
        })
    }
}

/// Waits for an answer until the deadline.
pub async fn timely<T>(request: impl Future<Output = Result<T, Error>>) -> Result<T, EtcdError> {
    match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(EtcdError::TimedOut),
    }
}

/// What an append came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// It stands in the log, written at this revision.
    Done {
        /// The revision.
        revision: i64,
    },
    /// The log is longer than the appender knew.
    Behind,
    /// Somebody else leads than the appender knew, or nobody.
    OtherLeader,
}

/// Who holds the leader's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Who, where the key says it in our words.
    pub node: Option<NodeId>,
    /// Its create-revision.
    pub epoch: i64,
    /// Under which lease.
    pub lease: i64,
}

/// The requests of one cluster's coordinator.
#[derive(Clone)]
pub struct Etcd {
    client: Client,
    keys: Keys,
}

impl Etcd {
    /// Wraps a client.
    pub fn new(client: Client, keys: Keys) -> Self {
        Self { client, keys }
    }

    /// Shows the password again. A token does not outlive an etcd that is started again, or a change
    /// of its users; without a user nothing is asked.
    pub async fn sign_in(&self) {
        if let Err(error) = timely(self.client.refresh_token()).await {
            tracing::debug!(%error, "cannot sign in at etcd");
        }
    }

    /// Loads snapshot and log; the state as of one moment.
    pub async fn load(&self) -> Result<Tail, EtcdError> {
        let (get, head) = (self.get(&self.keys.manifest()), self.get(&self.keys.head()));
        let answer = self.transact(Txn::new().and_then([get, head])).await?;
        let at = revision(&answer)?;
        let mut answers = gets(&answer);
        let manifest = answers.next().ok_or(EtcdError::Answer("no manifest"))?;
        let mut tail = match manifest.kvs().first() {
            None => Tail::new(Default::default(), 0),
            Some(found) => {
                let manifest = Manifest::decode(found.value())?;
                let mut parts = Vec::new();
                for part in 0..manifest.parts {
                    let key = self.keys.part(&manifest.folder, part);
                    parts.push(self.value_at(&key, at).await?);
                }
                Tail::new(snapshot::decode(&manifest.join(&parts)?)?, manifest.index)
            }
        };
        self.follow(&mut tail).await?;
        Ok(tail)
    }

    async fn value_at(&self, key: &str, at: i64) -> Result<Option<Vec<u8>>, EtcdError> {
        let mut kv = self.client.kv_client();
        let options = GetOptions::new().with_revision(at);
        let answer = timely(kv.get(key, Some(options))).await?;
        Ok(answer.kvs().first().map(|found| found.value().to_vec()))
    }

    /// Brings the tail up to the log's end, as of some moment after the call (a linearizable read);
    /// returns the revision of that moment.
    pub async fn follow(&self, tail: &mut Tail) -> Result<i64, EtcdError> {
        loop {
            let span = self.keys.commands_from(tail.applied() + 1);
            let options = GetOptions::new().with_range(span.end).with_limit(PAGE);
            let page = TxnOp::get(span.start, Some(options));
            let head = self.get(&self.keys.head());
            let answer = self.transact(Txn::new().and_then([head, page])).await?;
            let at = revision(&answer)?;
            let mut answers = gets(&answer);
            let head = self.head_of(&answers.next().ok_or(EtcdError::Answer("no head"))?)?;
            let page = answers.next().ok_or(EtcdError::Answer("no commands"))?;
            let Heard::Head { index, .. } = head else {
                return Err(EtcdError::Answer("no head"));
            };
            if index < tail.applied() {
                let applied = tail.applied();
                return Err(Lost::WentBack { applied, found: index }.into());
            }
            let before = tail.applied();
            for found in page.kvs() {
                if let Some(Key::Command(index)) = self.keys.read(found.key()) {
                    tail.hear(&Heard::Command { index, bytes: found.value().to_vec() })?;
                }
            }
            // More pages, if this one brought something.
            if tail.applied() < index && tail.applied() > before {
                continue;
            }
            tail.hear(&head)?;
            return Ok(at);
        }
    }

    fn head_of(&self, answer: &GetResponse) -> Result<Heard, EtcdError> {
        let Some(found) = answer.kvs().first() else {
            return Ok(Heard::Head { index: 0, revision: 0 });
        };
        let index = number(found.value())?;
        Ok(Heard::Head { index, revision: found.mod_revision() })
    }

    /// Appends a command, if it is the next one and the leader is who the appender thinks it is.
    pub async fn append(
        &self,
        index: u64,
        bytes: Vec<u8>,
        head: i64,
        epoch: u64,
    ) -> Result<Appended, EtcdError> {
        let (command, leader) = (self.keys.command(index), self.keys.leader());
        let when = [
            Compare::mod_revision(self.keys.head(), CompareOp::Equal, head),
            Compare::create_revision(command.clone(), CompareOp::Equal, 0),
            Compare::create_revision(leader.clone(), CompareOp::Equal, epoch as i64),
        ];
        let write = [
            TxnOp::put(command, bytes, None),
            TxnOp::put(self.keys.head(), index.to_string(), None),
        ];
        let ask = [self.get(&leader)];
        let answer = self.transact(Txn::new().when(when).and_then(write).or_else(ask)).await?;
        if answer.succeeded() {
            return Ok(Appended::Done { revision: revision(&answer)? });
        }
        let leader = gets(&answer).next().ok_or(EtcdError::Answer("no leader"))?;
        match holder(&leader) {
            Some(holder) if holder.epoch == epoch as i64 => Ok(Appended::Behind),
            _ => Ok(Appended::OtherLeader),
        }
    }

    /// Writes a snapshot of the tail's state and trims the log up to it; whether it was taken.
    pub async fn compact(&self, tail: &Tail, epoch: u64, nonce: u64) -> Result<bool, EtcdError> {
        let mut kv = self.client.kv_client();
        let found = timely(kv.get(self.keys.manifest(), None)).await?;
        let before = found.kvs().first().map_or(0, |found| found.mod_revision());
        let index = tail.applied();
        if let Some(found) = found.kvs().first()
            && Manifest::decode(found.value())?.index >= index
        {
            // Another has seen more, and has trimmed what is not in ours.
            return Ok(false);
        }
        let bytes = snapshot::encode(tail.state())?;
        let manifest = Manifest::of(index, format!("{index:020}-{nonce:016x}"), &bytes)?;
        // Nobody sees the pieces before the manifest names them.
        for (part, piece) in (0..).zip(bytes.chunks(PART_LEN)) {
            timely(kv.put(self.keys.part(&manifest.folder, part), piece, None)).await?;
        }
        let when = [
            // It is still the one that is older than ours.
            Compare::mod_revision(self.keys.manifest(), CompareOp::Equal, before),
            Compare::create_revision(self.keys.leader(), CompareOp::Equal, epoch as i64),
            // The log is the one that ours is of: it may have grown since, and has not gone back.
            Compare::mod_revision(self.keys.head(), CompareOp::Greater, tail.head() - 1),
        ];
        let [older, newer] = self.keys.other_parts(&manifest.folder);
        let write = [
            TxnOp::put(self.keys.manifest(), manifest.encode()?, None),
            delete(self.keys.commands_to(index)),
            delete(older),
            delete(newer),
        ];
        Ok(self.transact(Txn::new().when(when).and_then(write)).await?.succeeded())
    }

    /// Watches the log behind a revision.
    pub async fn watch(&self, after: i64) -> Result<WatchStream, EtcdError> {
        let span = self.keys.watched();
        self.watch_span(span, after).await
    }

    /// Watches who leads, behind a revision.
    pub async fn watch_leader(&self, after: i64) -> Result<WatchStream, EtcdError> {
        let from = self.keys.leader().into_bytes();
        let mut to = from.clone();
        to.push(0);
        self.watch_span(from..to, after).await
    }

    async fn watch_span(&self, span: Span, after: i64) -> Result<WatchStream, EtcdError> {
        let options = WatchOptions::new().with_range(span.end).with_start_revision(after + 1);
        let mut client = self.client.watch_client().max_decoding_message_size(ANSWER_LEN_MAX);
        timely(client.watch(span.start, Some(options))).await
    }

    /// What a message of the log's watch says.
    pub fn heard(&self, message: &WatchResponse) -> Result<Vec<Heard>, EtcdError> {
        let mut heard = Vec::new();
        for event in message.events() {
            let Some(found) = event.kv() else { continue };
            heard.push(match (self.keys.read(found.key()), event.event_type()) {
                (Some(Key::Command(index)), EventType::Put) => {
                    Heard::Command { index, bytes: found.value().to_vec() }
                }
                (Some(Key::Command(index)), EventType::Delete) => Heard::Gone { index },
                (Some(Key::Head), EventType::Put) => {
                    let index = number(found.value())?;
                    Heard::Head { index, revision: found.mod_revision() }
                }
                // Somebody has emptied it; whoever asks next finds out.
                (Some(Key::Head), EventType::Delete) | (None, _) => continue,
            });
        }
        Ok(heard)
    }

    /// Takes the leader's key under a lease, if nobody has it; who has it then, and as of when.
    pub async fn campaign(&self, me: NodeId, lease: i64) -> Result<(Holder, i64), EtcdError> {
        let leader = self.keys.leader();
        let free = [Compare::create_revision(leader.clone(), CompareOp::Equal, 0)];
        let options = PutOptions::new().with_lease(lease);
        let take = [TxnOp::put(leader.clone(), me.to_string(), Some(options))];
        let txn = Txn::new().when(free).and_then(take).or_else([self.get(&leader)]);
        let answer = self.transact(txn).await?;
        let at = revision(&answer)?;
        if answer.succeeded() {
            return Ok((Holder { node: Some(me), epoch: at, lease }, at));
        }
        let found = gets(&answer).next().and_then(|found| holder(&found));
        Ok((found.ok_or(EtcdError::Answer("no leader"))?, at))
    }

    /// Who has the leader's key, and as of when.
    pub async fn leader(&self) -> Result<(Option<Holder>, i64), EtcdError> {
        let ask = [self.get(&self.keys.leader())];
        let answer = self.transact(Txn::new().and_then(ask)).await?;
        let found = gets(&answer).next().ok_or(EtcdError::Answer("no leader"))?;
        Ok((holder(&found), revision(&answer)?))
    }

    /// A new lease.
    pub async fn grant(&self, ttl: Duration) -> Result<i64, EtcdError> {
        let mut leases = self.client.lease_client();
        Ok(timely(leases.grant(ttl.as_secs() as i64, None)).await?.id())
    }

    /// Renews a lease; fails where it has ended.
    pub async fn renew(&self, lease: i64) -> Result<(), EtcdError> {
        let mut leases = self.client.lease_client();
        timely(leases.keep_alive(lease)).await.map(drop)
    }

    /// Ends a lease, and with it what was written under it.
    pub async fn revoke(&self, lease: i64) -> Result<(), EtcdError> {
        let mut leases = self.client.lease_client();
        timely(leases.revoke(lease)).await.map(drop)
    }

    fn get(&self, key: &str) -> TxnOp {
        TxnOp::get(key, None)
    }

    async fn transact(&self, txn: Txn) -> Result<TxnResponse, EtcdError> {
        let mut kv = self.client.kv_client().max_decoding_message_size(ANSWER_LEN_MAX);
        timely(kv.txn(txn)).await
    }
}

fn delete(span: Span) -> TxnOp {
    TxnOp::delete(span.start, Some(DeleteOptions::new().with_range(span.end)))
}

fn gets(answer: &TxnResponse) -> impl Iterator<Item = GetResponse> {
    let get = |answer| match answer {
        TxnOpResponse::Get(get) => Some(get),
        _ => None,
    };
    answer.op_responses().into_iter().filter_map(get)
}

fn revision(answer: &TxnResponse) -> Result<i64, EtcdError> {
    answer.header().map(|header| header.revision()).ok_or(EtcdError::Answer("no revision"))
}

fn number(value: &[u8]) -> Result<u64, EtcdError> {
    let text = std::str::from_utf8(value).ok();
    text.and_then(|text| text.parse().ok()).ok_or(EtcdError::Answer("the head is no number"))
}

fn holder(found: &GetResponse) -> Option<Holder> {
    let found = found.kvs().first()?;
    let node = found.value_str().ok().and_then(|text| text.parse().ok());
    Some(Holder { node, epoch: found.create_revision(), lease: found.lease() })
}
