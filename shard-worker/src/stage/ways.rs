//! What links tell of the ways to other workers: round trips of what is sent, and how fast a large frame comes
//! in. Said to coordinators ([`Fact::Link`]) where it has changed by more than a little.
//!
//! ```text
//! link tasks ─► Meter ─► WayBook (pure: the best of the last few) ─► facts ─► coordinators ─► planner
//! ```
//!
//! Nothing is sent to measure: what an idle way could carry is not known. The best of a few counts, since a
//! busy machine only makes a way seem worse.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use shoal_protocol::id::NodeId;
use shoal_protocol::mesh::Fact;
use shoal_protocol::quic::Connection;
use tokio::sync::watch;

/// Of so many measurements the best one counts.
const LAST: usize = 8;

/// A transfer of fewer bytes says more about waking up than about the way.
pub(crate) const TRANSFER_MIN: usize = 256 << 10;

/// A frame that was there before it was asked for has not been timed.
pub(crate) const WAITED_MIN: Duration = Duration::from_micros(100);

/// Before so many frames were sent, the transport's round trip is that of its handshake.
const FRAMES_MIN: u32 = 8;

/// How often a round trip is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Something is said again where it differs from what was said by one part of so many.
const CHANGE: u64 = 4;

/// The most workers of which something is known: half of what may be said.
const PEERS_MAX: usize = shoal_protocol::mesh::FACTS_MAX / 2;

/// What was measured of the way to one worker.
#[derive(Debug, Default)]
struct Way {
    one_way_us: VecDeque<u64>,
    bytes_per_s: VecDeque<u64>,
    said: Option<(u64, Option<u64>)>,
}

impl Way {
    fn best(&self) -> Option<(u64, Option<u64>)> {
        let latency = self.one_way_us.iter().min()?;
        Some((*latency, self.bytes_per_s.iter().max().copied()))
    }

    /// Whether this is news.
    fn is_news(&self) -> bool {
        let Some((latency, bytes)) = self.best() else { return false };
        let differs = |a: u64, b: u64| a.abs_diff(b) > b / CHANGE;
        match self.said {
            None => true,
            Some((said, said_bytes)) => {
                let bytes = bytes.zip(said_bytes).map_or(bytes.is_some(), |(a, b)| differs(a, b));
                differs(latency, said) || bytes
            }
        }
    }
}

fn keep(list: &mut VecDeque<u64>, value: u64) {
    list.push_back(value);
    if list.len() > LAST {
        list.pop_front();
    }
}

/// What is known of all ways.
#[derive(Debug, Default)]
struct WayBook {
    ways: BTreeMap<NodeId, Way>,
}

impl WayBook {
    fn way(&mut self, to: NodeId) -> Option<&mut Way> {
        let full = self.ways.len() >= PEERS_MAX && !self.ways.contains_key(&to);
        (!full).then(|| self.ways.entry(to).or_default())
    }

    /// A round trip; what is to be said now, if anything.
    fn round_trip(&mut self, to: NodeId, rtt: Duration) -> Option<Vec<Fact>> {
        let way = self.way(to)?;
        let us = u64::try_from(rtt.as_micros() / 2).unwrap_or(u64::MAX);
        keep(&mut way.one_way_us, us.clamp(1, u64::from(u32::MAX)));
        self.news()
    }

    /// So many bytes came in so long; what is to be said now, if anything.
    fn transferred(&mut self, from: NodeId, bytes: usize, took: Duration) -> Option<Vec<Fact>> {
        let way = self.way(from)?;
        let bytes_per_s = bytes as f64 / took.as_secs_f64().max(1e-9);
        keep(&mut way.bytes_per_s, (bytes_per_s as u64).max(1));
        self.news()
    }

    fn news(&mut self) -> Option<Vec<Fact>> {
        if !self.ways.values().any(Way::is_news) {
            return None;
        }
        self.ways.values_mut().for_each(|way| way.said = way.best().or(way.said));
        let fact = |(to, way): (&NodeId, &Way)| {
            let (latency, bytes_per_s) = way.said?;
            Some(Fact::Link { to: *to, latency_us: latency as u32, bytes_per_s })
        };
        Some(self.ways.iter().filter_map(fact).collect())
    }
}

/// All ways of this worker. Clones are the same.
#[derive(Clone, Debug)]
pub struct Ways {
    book: Arc<Mutex<WayBook>>,
    say: Arc<watch::Sender<Vec<Fact>>>,
}

impl Ways {
    /// Says what it finds together with what else is known of the worker.
    pub fn telling(say: Arc<watch::Sender<Vec<Fact>>>) -> Self {
        Self { book: Arc::default(), say }
    }

    /// A round trip as a transport has it.
    pub fn round_trip(&self, to: NodeId, rtt: Duration) {
        self.note(|book| book.round_trip(to, rtt));
    }

    /// A large transfer.
    pub fn transferred(&self, from: NodeId, bytes: usize, took: Duration) {
        if bytes >= TRANSFER_MIN {
            self.note(|book| book.transferred(from, bytes, took));
        }
    }

    fn note(&self, note: impl FnOnce(&mut WayBook) -> Option<Vec<Fact>>) {
        // Nothing under the lock panics half-way.
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(links) = note(&mut book) else { return };
        self.say.send_modify(|known| {
            known.retain(|fact| !matches!(fact, Fact::Link { .. }));
            known.extend(links);
        });
    }
}

/// One link's eye for its way.
#[derive(Debug)]
pub(super) struct Meter {
    ways: Option<Ways>,
    with: NodeId,
    connection: Connection,
    frames: u32,
    looked: Instant,
}

impl Meter {
    pub fn new(ways: Option<Ways>, with: NodeId, connection: Connection) -> Self {
        Self { ways, with, connection, frames: 0, looked: Instant::now() }
    }

    /// A frame was sent.
    pub fn sent(&mut self) {
        let Some(ways) = &self.ways else { return };
        self.frames = self.frames.saturating_add(1);
        let first = self.frames == FRAMES_MIN;
        if first || (self.frames > FRAMES_MIN && self.looked.elapsed() >= LOOK_EVERY) {
            self.looked = Instant::now();
            ways.round_trip(self.with, self.connection.stats().rtt);
        }
    }

    /// A frame with so many bytes behind its head was read since `begun`; its head had been waited for.
    pub fn received(&self, bytes: usize, waited: Duration, begun: Instant) {
        if bytes < TRANSFER_MIN || waited < WAITED_MIN {
            return;
        }
        if let Some(ways) = &self.ways {
            ways.transferred(self.with, bytes, begun.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const W2: NodeId = NodeId::worker(2);

    fn link(latency_us: u32, bytes_per_s: Option<u64>) -> Option<Vec<Fact>> {
        Some(vec![Fact::Link { to: W2, latency_us, bytes_per_s }])
    }

    #[test]
    fn the_best_of_the_last_few_is_said_where_it_has_changed() {
        let mut book = WayBook::default();
        let us = Duration::from_micros;
        assert_eq!(book.transferred(W2, 1 << 20, us(1000)), None, "without a latency it is no way");
        assert_eq!(book.round_trip(W2, us(200)), link(100, Some(1_048_576_000)));
        assert_eq!(book.round_trip(W2, us(300)), None, "worse than the best is nothing new");
        assert_eq!(book.round_trip(W2, us(190)), None, "a little better is nothing new");
        assert_eq!(book.round_trip(W2, us(100)), link(50, Some(1_048_576_000)));
        assert_eq!(book.transferred(W2, 1 << 20, us(500)), link(50, Some(2_097_152_000)));
        // A way that has become worse is believed once all that was better is long ago.
        let said: Vec<_> = (0..LAST).map(|_| book.round_trip(W2, us(20_000))).collect();
        assert_eq!(said[..LAST - 1], vec![None; LAST - 1]);
        assert_eq!(said[LAST - 1], link(10_000, Some(2_097_152_000)));
    }

    #[test]
    fn what_is_said_of_ways_stands_beside_what_else_is_known() {
        let (say, heard) = watch::channel(vec![Fact::Ranks { most: 8 }]);
        let ways = Ways::telling(Arc::new(say));
        ways.transferred(W2, TRANSFER_MIN - 1, Duration::from_millis(1));
        ways.round_trip(W2, Duration::from_millis(4));
        ways.round_trip(W2, Duration::from_millis(1));
        let said = heard.borrow().clone();
        let link = Fact::Link { to: W2, latency_us: 500, bytes_per_s: None };
        assert_eq!(said, vec![Fact::Ranks { most: 8 }, link]);
    }
}
