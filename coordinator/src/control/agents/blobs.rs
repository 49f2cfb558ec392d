//! ● What workers say of chunks of weights, passed on to those who want the same model.
//!
//! ```text
//! worker ─► Blobs ─► Tracker (○) ─► Blobs ─► the other workers that want that model
//! ```

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use shoal_protocol::blob::tracker::{Told, Tracker};
use shoal_protocol::control::{BLOB_NEWS_MAX, CoordinatorMessage};
use shoal_protocol::id::NodeId;
use shoal_protocol::version::KNOWS_HUB;
use shoal_protocol::weights::BlobNews;
use tokio::sync::watch;

use super::{Agents, SessionEnd};
use crate::control::registry::OUTBOX_MAX;

/// News that follow each other sooner are passed on as one message.
const PAUSE: Duration = Duration::from_millis(20);

/// What all conversations share.
#[derive(Debug, Default)]
pub(super) struct Blobs {
    tracker: Mutex<Tracker>,
    /// Counts what was heard.
    heard: watch::Sender<u64>,
}

impl Agents {
    /// Takes what a worker says.
    pub(super) fn hear_blobs(
        &self,
        node: NodeId,
        address: SocketAddr,
        news: Vec<BlobNews>,
    ) -> Result<(), &'static str> {
        if news.len() > BLOB_NEWS_MAX || !news.iter().all(BlobNews::is_bounded) {
            return Err("it names more chunks than a message may");
        }
        for news in news {
            let heard = self.with_tracker(|tracker| tracker.hear(node, address, news));
            if let Err(conflict) = heard {
                tracing::warn!("weights: {conflict}; one of them is damaged, or lies");
            }
        }
        self.blobs.heard.send_modify(|n| *n += 1);
        Ok(())
    }

    /// Passes on what others say, for as long as the conversation lasts.
    pub(super) async fn tell_blobs(&self, node: NodeId, session: u64, speaks: u16) -> SessionEnd {
        match self.pass_on(node, session, speaks).await {}
    }

    async fn pass_on(&self, node: NodeId, session: u64, speaks: u16) -> Infallible {
        let mut heard = self.blobs.heard.subscribe();
        let mut told = Told::default();
        loop {
            if speaks < KNOWS_HUB || heard.changed().await.is_err() {
                // The conversation goes on without it.
                return std::future::pending().await;
            }
            let mut more = true;
            while more {
                tokio::time::sleep(PAUSE).await;
                more = self.tell_some(node, session, &mut told);
            }
        }
    }

    /// Tells the next of it where the outbox has room; whether there may be more.
    fn tell_some(&self, node: NodeId, session: u64, told: &mut Told) -> bool {
        let room = |capacity: usize| capacity > OUTBOX_MAX / 2;
        let sent = self.with_link(node, session, |worker| {
            let link = worker.link.as_ref()?;
            // What is urgent must find a place.
            if !room(link.outbox.capacity()) {
                return Some(true);
            }
            let news = self.with_tracker(|tracker| tracker.tell(node, told));
            if news.is_empty() {
                return Some(false);
            }
            Some(link.send(node, CoordinatorMessage::Blobs(news)))
        });
        sent.flatten().unwrap_or(false)
    }

    /// What a worker said is gone with its conversation, unless a newer one has taken its place; it says it
    /// again.
    pub(super) fn forget_blobs(&self, node: NodeId, session: u64) {
        if self.with_link(node, session, |_| ()).is_none() {
            return;
        }
        self.with_tracker(|tracker| tracker.gone(node));
        self.blobs.heard.send_modify(|n| *n += 1);
    }

    fn with_tracker<T>(&self, action: impl FnOnce(&mut Tracker) -> T) -> T {
        // Nothing under the lock panics half-way.
        action(&mut self.blobs.tracker.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
