//! The way from a stage to its downstream link.
//!
//! ```text
//! compute thread ─┬─ nothing else waits ──► FrameSender, and the connection is driven here
//!                 └─ else ──► queue ──► the link's task ──► FrameSender
//! ```
//!
//! A compute thread that has nothing else to do would only fall asleep while the link's thread wakes
//! up: it sends by itself. One that has the next step before it hands the frame over, and computes
//! while the link's thread sends. Frames leave in the order in which they were given, whichever way
//! they go.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use shoal_protocol::quic::{Connection, FrameSender};
use tokio::sync::mpsc;

use super::counters::Counters;
use super::wire::{Encoded, LinkEnd, LinkFrame};

/// A stage's way out and its link's end of it. `frames_max` frames may wait.
pub fn outlet(frames_max: usize, counters: Arc<Counters>) -> (Outlet, OutletEnd) {
    let (to, frames) = mpsc::channel(frames_max);
    let shared = Arc::new(Shared { behind: AtomicUsize::new(0), sender: Mutex::new(None) });
    let end = OutletEnd { frames, shared: Arc::clone(&shared), counters: Arc::clone(&counters) };
    (Outlet { frames: to, shared, counters }, end)
}

/// Where a compute thread puts its frames.
#[derive(Debug)]
pub struct Outlet {
    frames: mpsc::Sender<Encoded>,
    shared: Arc<Shared>,
    counters: Arc<Counters>,
}

/// Where a link takes them.
#[derive(Debug)]
pub struct OutletEnd {
    frames: mpsc::Receiver<Encoded>,
    shared: Arc<Shared>,
    counters: Arc<Counters>,
}

/// The link has gone; its owner knows why.
#[derive(Debug)]
pub struct Closed;

#[derive(Debug)]
struct Shared {
    /// Frames that were handed over and are not yet written whole. While there is one, the next must
    /// go the same way.
    behind: AtomicUsize,
    /// `None` before the link is up, while its task writes, and after its end.
    sender: Mutex<Option<(FrameSender, Connection)>>,
}

impl Shared {
    /// Held for one write that does not wait, never over an await.
    fn sender(&self) -> MutexGuard<'_, Option<(FrameSender, Connection)>> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outlet {
    /// Gives a frame out; `idle` says that the caller has nothing else to do. Blocks while the queue is
    /// full.
    pub fn send(&self, frame: LinkFrame, idle: bool) -> Result<(), Closed> {
        let mut frame = frame.encode();
        if idle && self.send_here(&mut frame) {
            return Ok(());
        }
        self.shared.behind.fetch_add(1, Ordering::AcqRel);
        self.frames.blocking_send(frame).map_err(|_| Closed)
    }

    /// Whether the whole frame has gone. What is left of it, and an error, are the link's business.
    fn send_here(&self, frame: &mut Encoded) -> bool {
        if self.shared.behind.load(Ordering::Acquire) > 0 {
            return false;
        }
        let mut sender = self.shared.sender();
        let Some((sender, connection)) = sender.as_mut() else { return false };
        let Ok(true) = sender.write_now(&mut frame.pieces) else { return false };
        connection.send_here();
        frame.count(&self.counters);
        true
    }
}

impl OutletEnd {
    /// The next frame, without a link; `None` where the stage gives no more.
    pub async fn recv(&mut self) -> Option<Encoded> {
        self.frames.recv().await
    }

    /// Sends frames until the link ends, or, without an error, the stage gives no more.
    pub(super) async fn run(
        mut self,
        sender: FrameSender,
        connection: &Connection,
    ) -> Result<(), LinkEnd> {
        let shared = Arc::clone(&self.shared);
        *shared.sender() = Some((sender, connection.clone()));
        let sent = self.send_all(connection).await;
        // Nobody else keeps the connection open.
        *shared.sender() = None;
        sent
    }

    async fn send_all(&mut self, connection: &Connection) -> Result<(), LinkEnd> {
        loop {
            let frame = tokio::select! {
                frame = self.frames.recv() => frame,
                // An idle link notices a loss too.
                reason = connection.closed() => return Err(LinkEnd::Gone(reason.to_string())),
            };
            let Some(mut frame) = frame else { return Ok(()) };
            let Some(mut sender) = self.shared.sender().take() else { return Ok(()) };
            sender.0.write(&mut frame.pieces).await?;
            frame.count(&self.counters);
            *self.shared.sender() = Some(sender);
            self.shared.behind.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Encoded {
    fn count(&self, counters: &Counters) {
        if let Some((bytes, ready)) = self.step {
            counters.sent(bytes, Instant::now().saturating_duration_since(ready));
        }
    }
}
