//! Streams from coordinators (`shoal-req`): one for each choice of a prompt.
//!
//! A stream brings one `Generate`, behind a `Trace` where it is traced and a `Tenant` where blocks may be shared, and takes tokens until `Done` or `Failed`. A reset or a stop of the
//! stream, and the loss of its connection, cancel the sequence.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::frame::{Flat, FrameError, FrameKind};
use shoal_protocol::id::{NodeId, ReplicaId};
use shoal_protocol::liveness::LEASE;
use shoal_protocol::prefix::TenantHeader;
use shoal_protocol::quic::{
    Connection, FrameReceiver, FrameSender, Pulse, RecvError, SharedLease, close_code,
};
use shoal_protocol::request::{
    Generate, GenerateHeader, HeadEvent, STOP_TOKENS_MAX, SamplingRecord,
};
use shoal_protocol::trace::TraceHeader;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::driver::{HeadClient, failed};
use super::heads::{Heads, Marks};
use crate::engine::ClientKey;

/// How long a stream that was opened may take to bring its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves the streams of one coordinator's connection until it ends; what runs for it is cancelled.
#[derive(Clone, Debug)]
pub struct Intake {
    me: NodeId,
    heads: Heads,
    lease: Arc<SharedLease>,
    next_key: Arc<AtomicU64>,
}

/// A stream that brought no request.
#[derive(Debug, thiserror::Error)]
enum IntakeError {
    #[error(transparent)]
    Receive(#[from] RecvError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("no request within {REQUEST_TIMEOUT:?}")]
    Timeout,
    #[error("the stream ended without a request")]
    Nothing,
}

impl Intake {
    /// Requests go to these heads, as long as the lease holds.
    pub fn new(me: NodeId, heads: Heads, lease: Arc<SharedLease>) -> Self {
        Self { me, heads, lease, next_key: Arc::default() }
    }

    /// Serves a connection until it ends.
    pub async fn serve(&self, connection: Connection) {
        // QUIC bounds the streams that the peer may have open at once.
        let mut streams = JoinSet::new();
        // While streams are open the coordinator hears of us often, and we of it.
        let (open, work) = watch::channel(0);
        let pulse = Pulse::default();
        let silence = pulse.keep(&connection, work);
        tokio::pin!(silence);
        loop {
            open.send_replace(streams.len());
            tokio::select! {
                silence = &mut silence => {
                    tracing::warn!("the coordinator of {} streams: {silence}", streams.len());
                    connection.close(close_code::DONE, "nothing was heard of you");
                    break;
                }
                stream = connection.accept_bi() => {
                    let Ok((sender, receiver)) = stream else { break };
                    let intake = self.clone();
                    streams.spawn(async move { intake.serve_stream(sender, receiver).await });
                }
                Some(done) = streams.join_next() => {
                    if let Err(error) = done {
                        tracing::error!("a request stream panicked: {error}");
                    }
                }
            }
        }
        // Each stream notices the end of the connection by itself, and cancels.
        while streams.join_next().await.is_some() {}
    }

    async fn serve_stream(&self, mut sender: FrameSender, mut receiver: FrameReceiver) {
        let read = tokio::time::timeout(REQUEST_TIMEOUT, self.read_request(&mut receiver)).await;
        match read.unwrap_or(Err(IntakeError::Timeout)) {
            Ok((request, marks, Some(head))) if self.lease.holds() => {
                self.run(sender, receiver, (request, marks), head).await;
            }
            Ok((request, _, head)) => {
                let words = match head {
                    None => format!(
                        "{} runs no head of {}: the layout has changed or is not up yet; try again",
                        self.me, request.replica
                    ),
                    Some(_) => format!(
                        "{} has heard no coordinator on its control links for {LEASE:?}: it finishes \
                         what runs and takes no new work; try another replica, or again",
                        self.me
                    ),
                };
                let why = WireError::new(ErrorCode::NotReady, words);
                let _ = send_event(&mut sender, failed(&request, &why)).await;
                sender.finish();
            }
            Err(error) => {
                tracing::debug!("a request stream is refused: {error}");
                receiver.stop(close_code::PROTOCOL);
                sender.reset(close_code::PROTOCOL);
            }
        }
    }

    /// Reads a request whose length is checked against its head's context before it is read.
    async fn read_request(
        &self,
        receiver: &mut FrameReceiver,
    ) -> Result<(Generate, Marks, Option<HeadClient>), IntakeError> {
        let mut head = receiver.next().await?.ok_or(IntakeError::Nothing)?;
        let mut marks = Marks::default();
        if head.kind == FrameKind::Trace {
            head.body_within(0)?;
            marks.trace = Some(TraceHeader::read_from(head.header())?.mark()?);
            head = receiver.next().await?.ok_or(IntakeError::Nothing)?;
        }
        if head.kind == FrameKind::Tenant {
            head.body_within(0)?;
            marks.tenant = Some(TenantHeader::read_from(head.header())?.tenant());
            head = receiver.next().await?.ok_or(IntakeError::Nothing)?;
        }
        if head.kind != FrameKind::Generate {
            let error = FrameError::UnexpectedKind { found: head.kind, expected: "Generate" };
            return Err(error.into());
        }
        let header = GenerateHeader::read_from(head.header())?;
        let to = self.heads.get(ReplicaId(header.replica));
        let context_max =
            to.as_ref().map_or(CONTEXT_UNKNOWN_MAX, |head| head.context_max() as usize);
        let body = receiver.body(&head, request_body_max(context_max)).await?;
        Ok((Generate::decode(head.header(), &body)?, marks, to))
    }

    async fn run(
        &self,
        mut sender: FrameSender,
        mut receiver: FrameReceiver,
        (request, marks): (Generate, Marks),
        head: HeadClient,
    ) {
        let key = ClientKey(self.next_key.fetch_add(1, Ordering::Relaxed));
        let mut events = head.submit(key, request, marks).await;
        let stopped = sender.stopped();
        let gone = async {
            tokio::select! {
                () = stopped => {}
                () = reset(&mut receiver) => {}
            }
        };
        tokio::pin!(gone);
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                () = &mut gone => {
                    head.cancel(key).await;
                    return;
                }
            };
            let Some(event) = event else {
                // Cancelled by the head for reading too slowly, or the head has ended.
                sender.reset(close_code::STALE);
                return;
            };
            let last = event.is_last();
            let sent = tokio::select! {
                sent = send_event(&mut sender, event) => sent.is_ok(),
                () = &mut gone => false,
            };
            if !sent {
                head.cancel(key).await;
                return;
            }
            if last {
                sender.finish();
                return;
            }
        }
    }
}

/// Where no head says how long a request may be: it is read only to be answered by name.
const CONTEXT_UNKNOWN_MAX: usize = 1 << 17;

/// A request that is a few tokens too long is still read, so that it is refused with words.
const TOKENS_SLACK: usize = 1 << 12;

fn request_body_max(context_max: usize) -> usize {
    SamplingRecord::LEN + size_of::<u32>() * (STOP_TOKENS_MAX + context_max + TOKENS_SLACK)
}

/// Waits for a reset. A coordinator that finishes its half just has no more to say.
async fn reset(receiver: &mut FrameReceiver) {
    if !receiver.reset_by_peer().await {
        std::future::pending().await
    }
}

async fn send_event(
    sender: &mut FrameSender,
    event: HeadEvent,
) -> Result<(), shoal_protocol::quic::SendError> {
    let (kind, header, body) = event.encode();
    sender.send_encoded(kind, &header, body).await
}
