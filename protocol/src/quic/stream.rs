//! Frames on a QUIC stream: no copy on send, one on receive.

use bytes::{Bytes, BytesMut};
use quinn::{ReadError, ReadExactError, VarInt, WriteError};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::frame::{Flat, FrameError, FrameKind, HEADER_LEN_MAX, PRELUDE_LEN, Prelude};

/// The sending half of a stream.
#[derive(Debug)]
pub struct FrameSender {
    inner: quinn::SendStream,
}

/// A frame that was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The stream or its connection is gone.
    #[error("the stream is gone: {0}")]
    Stream(#[from] WriteError),
    /// A message could not be encoded.
    #[error("the message cannot be encoded: {0}")]
    Encode(#[from] postcard::Error),
    /// A message is over the conversation's bound.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl FrameSender {
    pub(super) fn new(inner: quinn::SendStream) -> Self {
        Self { inner }
    }

    /// Sends one frame. `records` and `payload` go to the transport by reference; they are dropped
    /// when the peer has acknowledged them.
    pub async fn send<H: Flat>(
        &mut self,
        kind: FrameKind,
        header: &H,
        records: Bytes,
        payload: Bytes,
    ) -> Result<(), SendError> {
        const { assert!(H::LEN <= HEADER_LEN_MAX) };
        let mut head = BytesMut::zeroed(PRELUDE_LEN + H::LEN);
        let prelude = Prelude { kind, header_len: H::LEN, body_len: records.len() + payload.len() };
        head[..PRELUDE_LEN].copy_from_slice(&prelude.encode());
        header.write_to(&mut head[PRELUDE_LEN..]);
        self.inner.write_all_chunks(&mut [head.freeze(), records, payload]).await?;
        Ok(())
    }

    /// Sends one frame whose header is already bytes.
    pub async fn send_encoded(
        &mut self,
        kind: FrameKind,
        header: &[u8],
        body: Vec<u8>,
    ) -> Result<(), SendError> {
        let mut head = BytesMut::with_capacity(PRELUDE_LEN + header.len());
        head.extend_from_slice(
            &Prelude { kind, header_len: header.len(), body_len: body.len() }.encode(),
        );
        head.extend_from_slice(header);
        self.inner.write_all_chunks(&mut [head.freeze(), body.into()]).await?;
        Ok(())
    }

    /// Sends one postcard message of at most `len_max` bytes.
    pub async fn send_message<T: Serialize>(
        &mut self,
        message: &T,
        len_max: usize,
    ) -> Result<(), SendError> {
        let body = postcard::to_stdvec(message)?;
        if body.len() > len_max {
            return Err(
                FrameError::TooLong { what: "message", len: body.len(), max: len_max }.into()
            );
        }
        self.send_encoded(FrameKind::Message, &[], body).await
    }

    /// Says that nothing follows. What was sent is still delivered.
    pub fn finish(&mut self) {
        // It fails only on a stream that is finished already.
        let _ = self.inner.finish();
    }

    /// Gives the stream up: the peer sees a reset.
    pub fn reset(&mut self, code: u32) {
        let _ = self.inner.reset(VarInt::from_u32(code));
    }

    /// Waits until the peer has taken everything after `finish`, or has stopped the stream, or is
    /// gone.
    pub fn stopped(&self) -> impl Future<Output = ()> + Send + Sync + 'static {
        let stopped = self.inner.stopped();
        async move {
            let _ = stopped.await;
        }
    }

    /// Frames of a stream with a higher priority go first.
    pub fn set_priority(&self, priority: i32) {
        let _ = self.inner.set_priority(priority);
    }
}

/// The receiving half of a stream.
///
/// Its methods must run to their end: a future that is dropped half-way leaves the stream in the
/// middle of a frame.
#[derive(Debug)]
pub struct FrameReceiver {
    inner: quinn::RecvStream,
}

/// A frame that was not received.
#[derive(Debug, thiserror::Error)]
pub enum RecvError {
    /// The stream or its connection is gone.
    #[error("the stream is gone: {0}")]
    Stream(#[from] ReadError),
    /// The stream ended in the middle of a frame.
    #[error("the stream ended in the middle of a frame")]
    Truncated,
    /// The peer broke the protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A message could not be decoded.
    #[error("the message cannot be decoded: {0}")]
    Decode(#[from] postcard::Error),
}

/// A frame's kind, header and the length of the body that is still to be read.
#[derive(Clone, Copy, Debug)]
pub struct FrameHead {
    /// What the frame is.
    pub kind: FrameKind,
    /// Bytes of the body: read exactly as many before the next `next`.
    pub body_len: usize,
    header: [u8; HEADER_LEN_MAX],
    header_len: usize,
}

impl FrameHead {
    /// The header's bytes.
    pub fn header(&self) -> &[u8] {
        &self.header[..self.header_len]
    }

    /// The body's length, if it is within a bound.
    pub fn body_within(&self, max: usize) -> Result<usize, FrameError> {
        if self.body_len > max {
            return Err(FrameError::TooLong { what: "body", len: self.body_len, max });
        }
        Ok(self.body_len)
    }
}

impl FrameReceiver {
    pub(super) fn new(inner: quinn::RecvStream) -> Self {
        Self { inner }
    }

    /// The next frame's head; `None` where the peer has finished the stream between two frames.
    pub async fn next(&mut self) -> Result<Option<FrameHead>, RecvError> {
        let mut prelude = [0; PRELUDE_LEN];
        match self.inner.read_exact(&mut prelude).await {
            Ok(()) => {}
            Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
            Err(ReadExactError::FinishedEarly(_)) => return Err(RecvError::Truncated),
            Err(ReadExactError::ReadError(error)) => return Err(error.into()),
        }
        let prelude = Prelude::decode(&prelude)?;
        let mut header = [0; HEADER_LEN_MAX];
        self.read_into(&mut header[..prelude.header_len]).await?;
        Ok(Some(FrameHead {
            kind: prelude.kind,
            body_len: prelude.body_len,
            header,
            header_len: prelude.header_len,
        }))
    }

    /// Fills `out` with the next bytes of the body: the one copy, from QUIC's chunks into the buffer
    /// that becomes the tensor.
    pub async fn read_into(&mut self, out: &mut [u8]) -> Result<(), RecvError> {
        self.inner.read_exact(out).await.map_err(|error| match error {
            ReadExactError::FinishedEarly(_) => RecvError::Truncated,
            ReadExactError::ReadError(error) => error.into(),
        })
    }

    /// The whole body of a frame, if it is within a bound that is checked before allocating.
    pub async fn body(&mut self, head: &FrameHead, max: usize) -> Result<Vec<u8>, RecvError> {
        let mut body = vec![0; head.body_within(max)?];
        self.read_into(&mut body).await?;
        Ok(body)
    }

    /// The next postcard message of at most `len_max` bytes; `None` where the peer has finished.
    pub async fn message<T: DeserializeOwned>(
        &mut self,
        len_max: usize,
    ) -> Result<Option<T>, RecvError> {
        let Some(head) = self.next().await? else {
            return Ok(None);
        };
        if head.kind != FrameKind::Message {
            return Err(
                FrameError::UnexpectedKind { found: head.kind, expected: "a message" }.into()
            );
        }
        let body = self.body(&head, len_max).await?;
        let (message, rest) = postcard::take_from_bytes(&body)?;
        crate::frame::expect_end(rest, "message")?;
        Ok(Some(message))
    }

    /// Tells the peer that nothing more will be read.
    pub fn stop(&mut self, code: u32) {
        let _ = self.inner.stop(VarInt::from_u32(code));
    }

    /// Waits until the peer resets the stream (`true`), or finishes it or is gone (`false`). For
    /// streams on which nothing more is expected.
    pub async fn reset_by_peer(&mut self) -> bool {
        matches!(self.inner.received_reset().await, Ok(Some(_)))
    }
}
