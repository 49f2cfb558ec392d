//! ● One answer on its stream to the head.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::frame::{Flat, FrameError};
use shoal_protocol::id::{NodeId, TokenId};
use shoal_protocol::quic::{ConnectError, FrameReceiver, FrameSender, RecvError, close_code};
use shoal_protocol::request::{
    CandidateRecord, FinishReason, HeadEvent, TOP_LOGPROBS_MAX, VECTOR_MAX,
};
use tokio::time::Instant;

use super::sequence::{Sequence, Taken, Token, Vector};

/// The longest body that a head may send: an encoder's widest vector. A full list of candidates and an
/// error's message are shorter.
const BODY_LEN_MAX: usize = {
    let vector = VECTOR_MAX * size_of::<f32>();
    assert!(TOP_LOGPROBS_MAX as usize * CandidateRecord::LEN <= vector);
    assert!(WireError::MESSAGE_LEN_MAX <= vector);
    vector
};

/// An answer that is under way. Dropping it cancels the sequence at the head.
#[derive(Debug)]
pub struct Answer {
    pub(super) sequence: Sequence,
    pub(super) head: NodeId,
    pub(super) send: FrameSender,
    pub(super) receive: FrameReceiver,
    pub(super) deadline: Instant,
    pub(super) over: bool,
    /// Counts events that were not taken, for all answers of the dispatcher.
    pub(super) stale: Arc<AtomicU64>,
}

/// What comes next in an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum AnswerEvent {
    /// The next token.
    Token(Token),
    /// The answer is complete.
    Done {
        /// Why.
        reason: FinishReason,
        /// The stop token that ended it.
        stop_token: Option<TokenId>,
    },
    /// An encoder's answer, complete.
    Vector(Vector),
}

/// Why an answer cannot begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum DispatchError {
    /// The head cannot be reached.
    #[error("the worker {head}, which should answer, cannot be reached: {source}")]
    Connect {
        /// The worker with the head.
        head: NodeId,
        /// Why.
        source: ConnectError,
    },
    /// The head was lost in the middle of the answer.
    #[error("the worker {head} was lost in the middle of the answer: {why}")]
    Lost {
        /// The worker with the head.
        head: NodeId,
        /// What the transport says.
        why: String,
    },
    /// The head broke the protocol.
    #[error("the worker {head} broke the protocol: {why}")]
    Protocol {
        /// The worker with the head.
        head: NodeId,
        /// What it did.
        why: String,
    },
    /// The head gave the answer up.
    #[error("{message}")]
    Failed {
        /// What kind of error.
        code: ErrorCode,
        /// The head's words.
        message: String,
    },
    /// The request's time is up.
    #[error("the answer was not complete within the request's deadline")]
    Deadline,
}

impl DispatchError {
    /// Its code.
    pub fn code(&self) -> ErrorCode {
        match self {
            DispatchError::Connect { .. } | DispatchError::Lost { .. } => ErrorCode::WorkerLost,
            DispatchError::Protocol { .. } => ErrorCode::ProtocolViolation,
            DispatchError::Failed { code, .. } => *code,
            DispatchError::Deadline => ErrorCode::DeadlineExceeded,
        }
    }

    fn receive(head: NodeId, error: RecvError) -> Self {
        match error {
            RecvError::Stream(source) => Self::Lost { head, why: source.to_string() },
            RecvError::Truncated => Self::Lost { head, why: error.to_string() },
            RecvError::Frame(source) => Self::protocol(head, &source),
            RecvError::Decode(source) => Self::Protocol { head, why: source.to_string() },
        }
    }

    fn protocol(head: NodeId, error: &FrameError) -> Self {
        Self::Protocol { head, why: error.to_string() }
    }
}

impl Answer {
    /// What is known of it: enough to go on elsewhere.
    pub fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    /// The next event. After an error, or after `Done`, there is none: drop the answer.
    pub async fn next(&mut self) -> Result<AnswerEvent, DispatchError> {
        let deadline = self.deadline;
        let next = tokio::time::timeout_at(deadline, self.next_taken()).await;
        let next = next.unwrap_or(Err(DispatchError::Deadline));
        // A failure that the head reported ends its side; on others it must be told.
        self.over |= matches!(
            next,
            Ok(AnswerEvent::Done { .. } | AnswerEvent::Vector(_))
                | Err(DispatchError::Failed { .. } | DispatchError::Lost { .. })
        );
        next
    }

    async fn next_taken(&mut self) -> Result<AnswerEvent, DispatchError> {
        let head = self.head;
        loop {
            let event = self.next_event().await?;
            match self.sequence.take(event) {
                Taken::Token(token) => return Ok(AnswerEvent::Token(token)),
                Taken::Vector(vector) => return Ok(AnswerEvent::Vector(vector)),
                Taken::Done { reason, stop_token } => {
                    return Ok(AnswerEvent::Done { reason, stop_token });
                }
                Taken::Failed { code, message } => {
                    return Err(DispatchError::Failed { code, message });
                }
                Taken::Noted => {}
                Taken::Stale => {
                    self.stale.fetch_add(1, Ordering::Relaxed);
                }
                Taken::Gap { expected, found } => {
                    let why = format!("token {found} came where {expected} was expected");
                    return Err(DispatchError::Protocol { head, why });
                }
            }
        }
    }

    async fn next_event(&mut self) -> Result<HeadEvent, DispatchError> {
        let head = self.head;
        let lost = |error| DispatchError::receive(head, error);
        let Some(frame) = self.receive.next().await.map_err(lost)? else {
            let why = "it ended the stream before the answer was complete".to_owned();
            return Err(DispatchError::Protocol { head, why });
        };
        let body = self.receive.body(&frame, BODY_LEN_MAX).await.map_err(lost)?;
        HeadEvent::decode(frame.kind, frame.header(), &body)
            .map_err(|error| DispatchError::protocol(head, &error))
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.over {
            self.send.finish();
        } else {
            self.send.reset(close_code::DONE);
            self.receive.stop(close_code::DONE);
        }
    }
}
