//! What links tell of the ways to other workers: round trips of what is sent, and how fast a large frame comes
//! in. Said to coordinators ([`Fact::Link`]) where it has changed by more than a little.
//!
//! ```text
//! link tasks ─► Meter ─► WayBook (pure: the best of the last few) ─► facts ─► coordinators ─► planner
//! ```
//!
//! Nothing is sent to measure: what an idle way could carry is not known. The best of a few counts, since a
//! busy machine only makes a way seem worse. What was not measured for a while is forgotten, so that a way
//! that was bad once is tried again.
//!
//! A link that does not come up is said too ([`Fact::Missing`]): of three that wait for each other one alone
//! may be out of reach.

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

/// A way along which nothing went for so long may be another by now.
const KNOWN_FOR: Duration = Duration::from_secs(600);

/// How often what is old is looked for.
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// Before so many frames were sent, the transport's round trip is that of its handshake.
const FRAMES_MIN: u32 = 8;

/// How often a round trip is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Something is said again where it differs from what was said by one part of so many.
const CHANGE: u64 = 4;

/// The most workers of which a way is known, and of which one is missed: together less than may be said.
const PEERS_MAX: usize = shoal_protocol::mesh::FACTS_MAX / 4;

/// What was measured of the way to one worker.
#[derive(Debug, Default)]
struct Way {
    one_way_us: VecDeque<u64>,
    bytes_per_s: VecDeque<u64>,
    said: Option<(u64, Option<u64>)>,
    measured: Option<Instant>,
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
    /// By how many links that do not come up.
    missing: BTreeMap<NodeId, usize>,
}

impl WayBook {
    fn way(&mut self, to: NodeId, now: Instant) -> Option<&mut Way> {
        let full = self.ways.len() >= PEERS_MAX && !self.ways.contains_key(&to);
        let way = (!full).then(|| self.ways.entry(to).or_default())?;
        way.measured = Some(now);
        Some(way)
    }

    /// Forgets the ways that were not measured for long; what is to be said now, if anything.
    fn forget(&mut self, now: Instant) -> Option<Vec<Fact>> {
        let known = self.ways.len();
        let is_fresh = |at: Instant| now.saturating_duration_since(at) < KNOWN_FOR;
        self.ways.retain(|_, way| way.measured.is_some_and(is_fresh));
        (self.ways.len() < known).then(|| self.facts())
    }

    /// One more link to it does not come up, or one less.
    fn missing(&mut self, to: NodeId, is: bool) -> Option<Vec<Fact>> {
        let links = self.missing.get(&to).copied().unwrap_or(0);
        match links + usize::from(is) - usize::from(!is && links > 0) {
            0 => self.missing.remove(&to),
            _ if links == 0 && self.missing.len() >= PEERS_MAX => return None,
            links => self.missing.insert(to, links),
        };
        (self.missing.contains_key(&to) != (links > 0)).then(|| self.facts())
    }

    /// A round trip; what is to be said now, if anything.
    fn round_trip(&mut self, to: NodeId, rtt: Duration, now: Instant) -> Option<Vec<Fact>> {
        let way = self.way(to, now)?;
        let us = u64::try_from(rtt.as_micros() / 2).unwrap_or(u64::MAX);
        keep(&mut way.one_way_us, us.clamp(1, u64::from(u32::MAX)));
        self.news()
    }

    /// So many bytes came in so long; what is to be said now, if anything.
    fn transferred(
        &mut self,
        from: NodeId,
        bytes: usize,
        took: Duration,
        now: Instant,
    ) -> Option<Vec<Fact>> {
        let way = self.way(from, now)?;
        let bytes_per_s = bytes as f64 / took.as_secs_f64().max(1e-9);
        keep(&mut way.bytes_per_s, (bytes_per_s as u64).max(1));
        self.news()
    }

    fn news(&mut self) -> Option<Vec<Fact>> {
        if !self.ways.values().any(Way::is_news) {
            return None;
        }
        self.ways.values_mut().for_each(|way| way.said = way.best().or(way.said));
        Some(self.facts())
    }

    fn facts(&self) -> Vec<Fact> {
        let fact = |(to, way): (&NodeId, &Way)| {
            let (latency, bytes_per_s) = way.said?;
            Some(Fact::Link { to: *to, latency_us: latency as u32, bytes_per_s })
        };
        let missing = self.missing.keys().map(|to| Fact::Missing { to: *to });
        self.ways.iter().filter_map(fact).chain(missing).collect()
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

    /// Forgets what is old, for as long as there is anybody to tell.
    pub async fn keep_fresh(self) {
        let mut look = tokio::time::interval(FORGET_EVERY);
        while !self.say.is_closed() {
            look.tick().await;
            self.note(|book| book.forget(Instant::now()));
        }
    }

    /// A link that does not come up, until the guard is dropped.
    pub(super) fn missing(&self, to: NodeId) -> Missing {
        self.note(|book| book.missing(to, true));
        Missing { ways: self.clone(), to }
    }

    /// A round trip as a transport has it.
    pub fn round_trip(&self, to: NodeId, rtt: Duration) {
        self.note(|book| book.round_trip(to, rtt, Instant::now()));
    }

    /// A large transfer.
    pub fn transferred(&self, from: NodeId, bytes: usize, took: Duration) {
        if bytes >= TRANSFER_MIN {
            self.note(|book| book.transferred(from, bytes, took, Instant::now()));
        }
    }

    fn note(&self, note: impl FnOnce(&mut WayBook) -> Option<Vec<Fact>>) {
        // Nothing under the lock panics half-way.
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(links) = note(&mut book) else { return };
        self.say.send_modify(|known| {
            known.retain(|fact| !matches!(fact, Fact::Link { .. } | Fact::Missing { .. }));
            known.extend(links);
        });
    }
}

/// See [`Ways::missing`].
#[derive(Debug)]
pub(super) struct Missing {
    ways: Ways,
    to: NodeId,
}

impl Drop for Missing {
    fn drop(&mut self) {
        self.ways.note(|book| book.missing(self.to, false));
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
        let (us, now) = (Duration::from_micros, Instant::now());
        assert_eq!(
            book.transferred(W2, 1 << 20, us(1000), now),
            None,
            "without a latency it is no way"
        );
        assert_eq!(book.round_trip(W2, us(200), now), link(100, Some(1_048_576_000)));
        assert_eq!(book.round_trip(W2, us(300), now), None, "worse than the best is nothing new");
        assert_eq!(book.round_trip(W2, us(190), now), None, "a little better is nothing new");
        assert_eq!(book.round_trip(W2, us(100), now), link(50, Some(1_048_576_000)));
        assert_eq!(book.transferred(W2, 1 << 20, us(500), now), link(50, Some(2_097_152_000)));
        // A way that has become worse is believed once all that was better is long ago.
        let said: Vec<_> = (0..LAST).map(|_| book.round_trip(W2, us(20_000), now)).collect();
        assert_eq!(said[..LAST - 1], vec![None; LAST - 1]);
        assert_eq!(said[LAST - 1], link(10_000, Some(2_097_152_000)));
    }

    #[test]
    fn a_way_that_was_not_measured_for_long_is_forgotten() {
        let mut book = WayBook::default();
        let (ms, begin) = (Duration::from_millis, Instant::now());
        book.round_trip(W2, ms(50), begin);
        book.round_trip(NodeId::worker(3), ms(2), begin + KNOWN_FOR / 2);
        assert_eq!(book.forget(begin + KNOWN_FOR - ms(1)), None);
        let other = Fact::Link { to: NodeId::worker(3), latency_us: 1000, bytes_per_s: None };
        assert_eq!(book.forget(begin + KNOWN_FOR), Some(vec![other]));
        assert_eq!(book.round_trip(W2, ms(2), begin + KNOWN_FOR).map(|said| said.len()), Some(2));
    }

    #[test]
    fn a_worker_is_missed_for_as_long_as_any_link_to_it_is() {
        let (say, heard) = watch::channel(Vec::new());
        let ways = Ways::telling(Arc::new(say));
        let links = [ways.missing(W2), ways.missing(W2)];
        assert_eq!(*heard.borrow(), [Fact::Missing { to: W2 }]);
        let [one, other] = links;
        drop(one);
        assert_eq!(*heard.borrow(), [Fact::Missing { to: W2 }]);
        drop(other);
        assert_eq!(*heard.borrow(), []);
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
