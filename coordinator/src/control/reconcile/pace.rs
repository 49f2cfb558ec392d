//! Which worker of a layout is slow: not dead, since it is heard, and far behind the others.
//!
//! ```text
//! steps and compute time of each shard, by its reports ─► µs for a byte of weights, second by second
//!   ─► far behind the fastest other one, for so many seconds in a row ─► slow ─► its layers move, once
//! ```
//!
//! Machines of a cluster may differ; what counts as slow is beyond that ([`SLOW_FACTOR`]). A second with
//! few steps says nothing. Between the two factors nothing changes, so that a worker at the border is
//! not judged anew each second.

use std::collections::BTreeMap;
use std::time::Duration;

use shoal_protocol::control::ShardReport;
use shoal_protocol::id::{Generation, NodeId};
use shoal_protocol::units::Instant;

/// So many times slower for the same bytes is slow. Two generations of processors are two to three times
/// apart.
pub const SLOW_FACTOR: f64 = 4.0;

/// Below this it is not slow any more.
pub const FAST_FACTOR: f64 = 2.0;

/// Seconds in a row after which people are told.
pub const NOTICED: u32 = 3;

/// Seconds in a row after which its layers move: a compiler's burst or a backup's is over by then, and a
/// move costs a load and a prefill.
pub const LASTING: u32 = 10;

/// A pace is taken over so long.
const WINDOW: Duration = Duration::from_secs(1);

/// Steps in a window that say something.
const STEPS_MIN: u64 = 10;

/// The pause after such a move, doubled with each further one: a worker that is slow because of what it
/// was given makes the next one slow as well.
pub const REST: Duration = Duration::from_secs(60);

/// The longest such pause.
pub const REST_MAX: Duration = Duration::from_secs(3600);

/// What is remembered of the workers of one layout.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Paces {
    generation: Generation,
    of: BTreeMap<NodeId, Pace>,
    /// No move before, and how many there were.
    rests: (Instant, u32),
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Pace {
    /// Where the window began: when, steps, microseconds.
    from: Option<(Instant, u64, u64)>,
    /// Microseconds for a byte, in the last window that said something.
    last: Option<f64>,
    /// Windows in a row in which it was slow.
    slow: u32,
}

// The figures are never NaN: they are quotients of sums by what is above zero.
impl Eq for Paces {}

impl Paces {
    /// Takes what the shards report; `bytes`: the weights that a step of each reads.
    pub fn look(
        &mut self,
        generation: Generation,
        shards: &[(NodeId, Option<&ShardReport>, u64)],
        now: Instant,
    ) {
        if self.generation != generation {
            *self = Self { generation, of: BTreeMap::new(), rests: self.rests };
        }
        let mut news = Vec::new();
        for (node, shard, bytes) in shards {
            let Some(counters) = shard.map(|shard| shard.counters) else { continue };
            let pace = self.of.entry(*node).or_default();
            let (steps, time) = (counters.steps, counters.compute_us);
            let Some((since, before, spent)) = pace.from else {
                pace.from = Some((now, steps, time));
                continue;
            };
            if now.since(since) < WINDOW {
                continue;
            }
            pace.from = Some((now, steps, time));
            let done = steps.saturating_sub(before);
            if done >= STEPS_MIN && *bytes > 0 {
                let each = time.saturating_sub(spent) as f64 / done as f64;
                pace.last = Some(each / *bytes as f64);
                news.push(*node);
            }
        }
        for node in news {
            self.judge(node);
        }
    }

    fn judge(&mut self, node: NodeId) {
        let others = self.of.iter().filter(|(other, _)| **other != node);
        let fastest = others.filter_map(|(_, pace)| pace.last).reduce(f64::min);
        let Some(pace) = self.of.get_mut(&node) else { return };
        let (Some(fastest), Some(own)) = (fastest, pace.last) else { return };
        if fastest <= 0.0 {
            return;
        }
        let factor = own / fastest;
        if factor >= SLOW_FACTOR {
            pace.slow = pace.slow.saturating_add(1);
        } else if factor < FAST_FACTOR {
            pace.slow = 0;
        }
    }

    /// The workers that have been slow for so many seconds.
    pub fn slow(&self, windows: u32) -> Vec<NodeId> {
        let slow = self.of.iter().filter(|(_, pace)| pace.slow >= windows);
        slow.map(|(node, _)| *node).collect()
    }

    /// Whether layers may move because of this now.
    pub fn may_move(&self, now: Instant) -> bool {
        now >= self.rests.0
    }

    /// Layers move.
    pub fn moved(&mut self, now: Instant) {
        // A long time without one, and the next one is a first one.
        let times = if now.since(self.rests.0) > REST_MAX { 0 } else { self.rests.1 };
        let rest = REST.saturating_mul(1 << times.min(16)).min(REST_MAX);
        self.rests = (now + rest, times + 1);
    }
}

#[cfg(test)]
mod tests {
    use shoal_protocol::control::{ShardCounters, ShardState};
    use shoal_protocol::id::{ReplicaId, StageIndex};
    use shoal_protocol::plan::ShardMemory;

    use super::*;

    const GENERATION: Generation = Generation(1);

    struct Machines {
        paces: Paces,
        now: Instant,
        counters: [ShardCounters; 2],
    }

    impl Machines {
        fn new() -> Self {
            let now = Instant(5_000_000);
            Self { paces: Paces::default(), now, counters: Default::default() }
        }

        /// So many seconds in which each made so many steps of so many microseconds.
        fn run(&mut self, seconds: u32, steps: u64, us: [u64; 2]) -> &Paces {
            for _ in 0..seconds {
                self.look();
                self.now = self.now + WINDOW;
                for (counters, us) in self.counters.iter_mut().zip(us) {
                    counters.steps += steps;
                    counters.compute_us += steps * us;
                }
                self.look();
            }
            &self.paces
        }

        fn look(&mut self) {
            let reports = self.counters.map(|counters| ShardReport {
                replica: ReplicaId(1),
                generation: GENERATION,
                stage: StageIndex(0),
                state: ShardState::Ready,
                memory: ShardMemory::default(),
                counters,
            });
            let [a, b] = &reports;
            let shards = [(NodeId::worker(1), Some(a), 1000), (NodeId::worker(2), Some(b), 2000)];
            self.paces.look(GENERATION, &shards, self.now);
        }
    }

    #[test]
    fn a_worker_that_is_slow_for_long_is_named_and_one_that_has_more_layers_is_not() {
        let mut machines = Machines::new();
        assert_eq!(machines.run(30, 100, [500, 1000]).slow(1), [], "it has twice the layers");
        assert_eq!(machines.run(9, 100, [5000, 1000]).slow(LASTING), []);
        assert_eq!(machines.paces.slow(NOTICED), [NodeId::worker(1)]);
        assert_eq!(machines.run(1, 100, [5000, 1000]).slow(LASTING), [NodeId::worker(1)]);
    }

    #[test]
    fn a_burst_is_forgotten_and_an_idle_second_says_nothing() {
        let mut machines = Machines::new();
        machines.run(9, 100, [5000, 1000]);
        machines.run(20, 3, [500, 1000]);
        assert_eq!(machines.paces.slow(9), [NodeId::worker(1)], "nothing was computed since");
        machines.run(1, 100, [1500, 1000]);
        assert_eq!(machines.paces.slow(9), [NodeId::worker(1)], "between both it stays");
        machines.run(1, 100, [900, 1000]);
        assert_eq!(machines.paces.slow(1), [], "it is as fast as the other one again");
    }

    #[test]
    fn moves_rest_longer_each_time() {
        let mut paces = Paces::default();
        let s = |s: u64| Instant(s * 1_000_000);
        assert!(paces.may_move(s(5)));
        paces.moved(s(5));
        assert!(!paces.may_move(s(64)) && paces.may_move(s(65)));
        paces.moved(s(65));
        assert!(!paces.may_move(s(184)) && paces.may_move(s(185)));
        paces.moved(s(185 + 3601));
        assert!(paces.may_move(s(185 + 3601 + 60)), "a long time without one is forgotten");
    }
}
