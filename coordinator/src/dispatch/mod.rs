//! ● Sends sequences to heads and receives their tokens.

mod pool;
mod request;
mod sequence;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use shoal_protocol::frame::FrameKind;
use shoal_protocol::id::{NodeId, ReplicaId};
use shoal_protocol::prefix::{Tenant, TenantHeader};
use shoal_protocol::quic::Endpoint;
use shoal_protocol::trace::{TraceHeader, TraceMark};
use tokio::time::Instant;

pub use pool::CONNECT_DEADLINE;
use pool::Pool;
pub use request::{Answer, AnswerEvent, DispatchError};
pub use sequence::{Sequence, Taken, Token, Vector};

/// The hand that sends requests to heads. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Dispatcher {
    pool: Arc<Pool>,
    stale: Arc<AtomicU64>,
}

/// Where a sequence goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The replica.
    pub replica: ReplicaId,
    /// The worker with its head.
    pub head: NodeId,
    /// Where that worker takes requests.
    pub address: SocketAddr,
    /// Where in a trace the attempt stands, if it is traced and everybody knows the frame for that.
    pub trace: Option<TraceMark>,
    /// Whose request it is, if everybody knows what blocks that are shared are.
    pub tenant: Option<Tenant>,
}

impl Dispatcher {
    /// Connects through `endpoint`, whose identity must be a coordinator's.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { pool: Arc::new(Pool::new(endpoint)), stale: Arc::default() }
    }

    /// Asks the head to go on with a sequence, until `deadline` at the latest.
    pub async fn start(
        &self,
        target: Target,
        sequence: Sequence,
        deadline: Instant,
    ) -> Result<Answer, DispatchError> {
        let begin = async {
            match self.try_start(target, &sequence, deadline).await {
                // The pooled connection was lost and nobody had noticed yet: a new one may work.
                Err(DispatchError::Lost { .. }) => {
                    self.try_start(target, &sequence, deadline).await
                }
                first => first,
            }
        };
        let started = tokio::time::timeout_at(deadline, begin).await;
        let (send, receive) = started.unwrap_or(Err(DispatchError::Deadline))?;
        Ok(Answer {
            sequence,
            head: target.head,
            send,
            receive,
            deadline,
            over: false,
            stale: Arc::clone(&self.stale),
        })
    }

    async fn try_start(
        &self,
        target: Target,
        sequence: &Sequence,
        deadline: Instant,
    ) -> Result<
        (shoal_protocol::quic::FrameSender, shoal_protocol::quic::FrameReceiver),
        DispatchError,
    > {
        let head = target.head;
        let connection = self
            .pool
            .get(head, target.address)
            .await
            .map_err(|source| DispatchError::Connect { head, source })?;
        let lost = |why: String| DispatchError::Lost { head, why };
        let (mut send, receive) =
            connection.open_bi().await.map_err(|error| lost(error.to_string()))?;
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        // 0 would mean no deadline at all.
        let left = u64::try_from(left).unwrap_or(u64::MAX).max(1);
        if let Some(mark) = target.trace {
            let trace = TraceHeader::of_request(mark);
            send.send(FrameKind::Trace, &trace, Bytes::new(), Bytes::new())
                .await
                .map_err(|error| lost(error.to_string()))?;
        }
        if let Some(tenant) = target.tenant {
            let tenant = TenantHeader::of(tenant);
            send.send(FrameKind::Tenant, &tenant, Bytes::new(), Bytes::new())
                .await
                .map_err(|error| lost(error.to_string()))?;
        }
        let (header, body) = sequence.generate(target.replica, left).encode();
        send.send(FrameKind::Generate, &header, body.into(), Bytes::new())
            .await
            .map_err(|error| lost(error.to_string()))?;
        Ok((send, receive))
    }

    /// Events that came from another attempt or twice, and were dropped.
    pub fn stale_events(&self) -> u64 {
        self.stale.load(Ordering::Relaxed)
    }

    /// Ends the connections to nodes of which this does not hold; answers that they owe fail.
    pub fn keep(&self, member: impl Fn(NodeId) -> bool) {
        self.pool.keep(member);
    }

    /// Ends every connection; answers that are under way fail.
    pub fn close(&self) {
        self.pool.close();
    }
}
