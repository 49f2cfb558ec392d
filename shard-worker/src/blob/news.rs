//! ● What this worker has to say of its chunks: a list that grows, which every conversation with a
//! coordinator reads from its beginning at its own pace.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use shoal_protocol::control::{BLOB_NEWS_MAX, WorkerMessage};
use shoal_protocol::weights::{BlobNews, ChunkHash, ChunkId, ModelKey, NAMED_MAX};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Blobs;

/// News that follow each other sooner are told as one message.
const PAUSE: Duration = Duration::from_millis(10);

/// The most chunks that are told of: ten terabytes of them. What is beyond is given to nobody.
const ITEMS_MAX: usize = 1 << 21;

/// How far somebody has read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cursor(usize);

/// The list.
#[derive(Debug, Default)]
pub struct NewsLog {
    items: Mutex<Vec<(ModelKey, Item)>>,
    len: watch::Sender<usize>,
}

#[derive(Clone, Debug)]
enum Item {
    Wants(Vec<(u32, Range<u32>)>),
    Has(ChunkId, ChunkHash),
}

impl NewsLog {
    pub(super) fn wants(&self, key: ModelKey, chunks: Vec<(u32, Range<u32>)>) {
        self.push(key, Item::Wants(chunks));
    }

    pub(super) fn has(&self, key: ModelKey, chunk: ChunkId, hash: ChunkHash) {
        self.push(key, Item::Has(chunk, hash));
    }

    /// Changes whenever there is more.
    pub fn watch(&self) -> watch::Receiver<usize> {
        self.len.subscribe()
    }

    /// What comes next, as much as a message takes; empty at the end.
    pub fn next(&self, cursor: &mut Cursor) -> Vec<BlobNews> {
        let items = self.lock();
        let mut news: Vec<BlobNews> = Vec::new();
        for (key, item) in items.iter().skip(cursor.0).take(NAMED_MAX) {
            let full = news.len() == BLOB_NEWS_MAX;
            match (item, news.last_mut()) {
                (Item::Has(chunk, hash), Some(BlobNews::Has { key: last, chunks }))
                    if last == key =>
                {
                    chunks.push((*chunk, *hash));
                }
                _ if full => break,
                (Item::Has(chunk, hash), _) => {
                    news.push(BlobNews::Has { key: *key, chunks: vec![(*chunk, *hash)] });
                }
                (Item::Wants(chunks), _) => {
                    news.push(BlobNews::Wants { key: *key, chunks: chunks.clone() });
                }
            }
            cursor.0 += 1;
        }
        news
    }

    fn push(&self, key: ModelKey, item: Item) {
        let mut items = self.lock();
        if items.len() < ITEMS_MAX {
            items.push((key, item));
            let len = items.len();
            drop(items);
            self.len.send_replace(len);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(ModelKey, Item)>> {
        // Nothing under the lock panics half-way.
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One conversation's way through the list.
#[derive(Debug)]
pub struct Telling {
    address: SocketAddr,
    log: Arc<NewsLog>,
    len: watch::Receiver<usize>,
    cursor: Cursor,
    /// When the next message is sent: it outlives a call that is dropped.
    due: Option<Instant>,
}

impl Telling {
    /// From its beginning.
    pub fn new(blobs: &Blobs) -> Self {
        let (log, address) = (Arc::clone(blobs.news()), blobs.address());
        Self { address, len: log.watch(), log, cursor: Cursor::default(), due: None }
    }
}

/// The next message, once there is one; never, where there is nothing to tell of. Cancel safe.
pub async fn more(telling: &mut Option<Telling>) -> WorkerMessage {
    let Some(Telling { address, log, len, cursor, due }) = telling else {
        return std::future::pending().await;
    };
    let read = *cursor;
    if len.wait_for(|len| *len > read.0).await.is_err() {
        // The list is gone, and with it this worker.
        return std::future::pending().await;
    }
    // Chunks come many at a time, and messages cost more than they do.
    tokio::time::sleep_until(*due.get_or_insert_with(|| Instant::now() + PAUSE)).await;
    *due = None;
    WorkerMessage::Blobs { address: *address, news: log.next(cursor) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_reads_all_of_it_in_messages_of_bounded_length() {
        let (log, key) = (NewsLog::default(), ModelKey([1; 32]));
        log.wants(key, vec![(0, 0..10_000)]);
        for index in 0..10_000 {
            log.has(key, ChunkId { file: 0, index }, [7; 32]);
        }
        for _ in 0..2 {
            let (mut cursor, mut chunks, mut messages) = (Cursor::default(), 0, 0);
            loop {
                let news = log.next(&mut cursor);
                if news.is_empty() {
                    break;
                }
                messages += 1;
                assert!(news.len() <= BLOB_NEWS_MAX && news.iter().all(BlobNews::is_bounded));
                chunks += news
                    .iter()
                    .map(|news| match news {
                        BlobNews::Has { chunks, .. } => chunks.len(),
                        _ => 0,
                    })
                    .sum::<usize>();
            }
            assert_eq!((chunks, messages), (10_000, 3));
        }
    }
}
