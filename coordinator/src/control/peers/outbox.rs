//! ○ Messages for the other coordinators, until somebody carries them.
//!
//! The log's algorithm repeats whatever it still needs, so an outbox that is full loses its oldest
//! message, and one whose peer is away is emptied.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use raft::prelude::Message;
use tokio::sync::Notify;

/// Messages that wait for one peer: the log's window and the heartbeats of a second beside it.
const OUTBOX_MAX: usize = 512;

/// The outboxes of all peers. Cheap to clone.
#[derive(Clone, Default)]
pub struct Outboxes {
    /// Guards plain data; nothing is awaited under it.
    inner: Arc<Mutex<BTreeMap<u64, Arc<Outbox>>>>,
    /// Fires when somebody is written to for the first time.
    news: Arc<Notify>,
}

/// What waits for one peer.
#[derive(Default)]
pub struct Outbox {
    messages: Mutex<VecDeque<Message>>,
    filled: Notify,
}

impl Outboxes {
    /// Puts a message where its receiver's carrier finds it.
    pub fn push(&self, message: Message) {
        let outbox = {
            let mut all = self.lock();
            let news = !all.contains_key(&message.to);
            let outbox = Arc::clone(all.entry(message.to).or_default());
            if news {
                self.news.notify_one();
            }
            outbox
        };
        outbox.push(message);
    }

    /// All that were ever written to.
    pub fn all(&self) -> Vec<(u64, Arc<Outbox>)> {
        self.lock().iter().map(|(id, outbox)| (*id, Arc::clone(outbox))).collect()
    }

    /// Resolves when somebody has been written to for the first time.
    pub async fn news(&self) {
        self.news.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Outbox>>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outbox {
    fn push(&self, message: Message) {
        let mut messages = self.lock();
        if messages.len() == OUTBOX_MAX {
            messages.pop_front();
        }
        messages.push_back(message);
        drop(messages);
        self.filled.notify_one();
    }

    /// The next message. Cancel safe.
    pub async fn next(&self) -> Message {
        loop {
            if let Some(message) = self.lock().pop_front() {
                return message;
            }
            self.filled.notified().await;
        }
    }

    /// Resolves when there is a message, and leaves it there.
    pub async fn wait(&self) {
        while self.lock().is_empty() {
            self.filled.notified().await;
        }
    }

    /// Forgets what waits.
    pub fn clear(&self) -> Vec<Message> {
        self.lock().drain(..).collect()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Message>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_goes_where_there_is_no_room() {
        let outboxes = Outboxes::default();
        for index in 0..OUTBOX_MAX as u64 + 3 {
            outboxes.push(Message { to: 2, index, ..Message::default() });
        }
        outboxes.news().await;
        let (id, outbox) = outboxes.all().pop().unwrap();
        assert_eq!(id, 2);
        outbox.wait().await;
        assert_eq!(outbox.next().await.index, 3);
        assert_eq!(outbox.clear().len(), OUTBOX_MAX - 1);
    }
}
