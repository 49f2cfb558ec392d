//! Failures that are no deaths, as stories: a way between two workers that is gone, and a worker that is
//! slow.

use shoal_protocol::control::ShardState;
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::lost::{SILENT, message};

use super::world_test::World;
use super::*;

impl World {
    /// The shard of a worker says that its neighbour fell silent; the worker itself was just heard.
    fn miss(&mut self, number: u32, neighbour: u32) {
        let words = message(format!("w{neighbour} (stage 0 at 127.0.0.1:4000)"), SILENT);
        self.report(number, ShardState::Failed(WireError::new(ErrorCode::WorkerLost, words)));
    }

    fn places(&self) -> Vec<String> {
        let place = |plan: &ReplicaPlan| {
            let nodes: Vec<_> = plan.nodes().map(|node| node.to_string()).collect();
            nodes.join(" ")
        };
        let nexts = self.state.plans.nexts().map(|plan| format!("next {}", place(plan)));
        self.state.plans.iter().map(place).chain(nexts).collect()
    }

    fn pass(&mut self, time: Duration) {
        self.observed.now = self.observed.now + time;
    }

    /// So many seconds in which each worker makes 100 steps of so many microseconds.
    fn compute(&mut self, seconds: u32, us: &[u64]) -> String {
        let mut reason = String::new();
        for _ in 0..seconds {
            self.pass(Duration::from_secs(1));
            for (worker, us) in self.observed.workers.values_mut().zip(us) {
                for shard in &mut worker.report.shards {
                    shard.counters.steps += 100;
                    shard.counters.compute_us += 100 * us;
                }
            }
            let decision = self.round();
            reason = decision.phases.values().map(|phase| phase.reason.clone()).collect();
        }
        reason
    }
}

/// The first two workers are a layout, and do not reach each other any more.
fn torn(workers: u32) -> World {
    let mut world = World::ready(workers, Some(2), 10_000);
    world.miss(1, 2);
    world.miss(2, 1);
    world.round();
    // All were heard since.
    world.pass(Duration::from_millis(50));
    world.observed.workers.values_mut().for_each(|w| w.silent_for = Duration::from_millis(5));
    world.round();
    world
}

#[test]
fn two_workers_that_do_not_reach_each_other_are_no_neighbours_again() {
    let mut world = torn(4);
    assert_eq!(world.places(), ["w1 w3"]);
    world.settle();
    // The pair is forgotten after a minute, and nothing moves for it.
    world.pass(Duration::from_secs(120));
    world.round();
    assert_eq!(world.places(), ["w1 w3"]);
    // The next layout that is needed for another reason may use the way again.
    world.lose(3);
    world.lose(4);
    world.round();
    assert_eq!(world.places(), ["w1 w2"]);
}

#[test]
fn where_nobody_else_is_there_the_same_two_try_again() {
    let world = torn(2);
    assert_eq!(world.places(), ["w1 w2"], "perhaps it was a moment's loss");
}

#[test]
fn a_layout_that_does_not_link_tells_who_does_not_reach_whom() {
    let mut world = World::new(3, Some(2));
    world.pass(Duration::from_secs(10));
    world.round();
    world.round();
    assert_eq!(world.places(), ["w1 w2"]);
    world.report(1, ShardState::Linking);
    world.report(2, ShardState::Linking);
    world.round();
    world.pass(patience::LINKING + Duration::from_secs(1));
    world.round();
    assert_eq!(world.places(), ["w1 w3"]);
}

#[test]
fn of_many_that_wait_for_each_other_the_one_that_is_missed_is_left_out() {
    let mut world = World::new(4, Some(3));
    world.pass(Duration::from_secs(10));
    world.round();
    world.round();
    assert_eq!(world.places(), ["w1 w2 w3"]);
    (1..=3).for_each(|number| world.report(number, ShardState::Linking));
    world.round();
    // Nobody reaches w2; the link between the others is up, but a shard waits for all of its links.
    for (one, other) in [(1, 2), (3, 2), (2, 1), (2, 3)] {
        world.worker(one).facts.missing.insert(NodeId::worker(other));
    }
    world.pass(patience::LINKING + Duration::from_secs(1));
    world.round();
    let places = world.places().join(", ");
    let all = ["w1", "w3", "w4"].iter().all(|node| places.contains(node));
    assert!(all && !places.contains("w2"), "{places}");
}

#[test]
fn the_layers_of_a_worker_that_stays_slow_move_to_a_better_place_once() {
    let mut world = World::empty(3, Bytes::mib(420));
    world.deploy_many("m", Some(2), 1, 10 << 20);
    world.settle();
    assert_eq!(world.places(), ["w1 w2"]);
    assert!(world.compute(5, &[900, 1000, 1000]).contains("g1 2x1 on w1, w2"));
    let told = world.compute(5, &[9000, 1000, 1000]);
    assert!(told.contains("w1 is slow"), "{told}");
    assert_eq!(world.places(), ["w1 w2"], "it may be a burst");
    world.compute(7, &[9000, 1000, 1000]);
    let places = world.places();
    let [serves, next] = places.as_slice() else { panic!("none beside the one that serves") };
    assert_eq!(serves, "w1 w2");
    let next = next.trim_start_matches("next ").to_owned();
    assert!(next.contains("w2") && next.contains("w3"), "{next}");
    // It is loaded, and takes over.
    world.settle();
    world.settle();
    assert_eq!(world.places(), std::slice::from_ref(&next));
    // Now the other one is slow: that has to wait, and nothing goes back at once.
    world.compute(30, &[1000, 9000, 1000]);
    assert_eq!(world.places(), [next]);
}

#[test]
fn a_slow_worker_stays_where_there_is_no_better_place() {
    let mut world = World::ready(2, Some(2), 10_000);
    let told = world.compute(20, &[9000, 1000]);
    assert!(told.contains("w1 has been slow for 10 s and more"), "{told}");
    assert!(told.contains("there is no better place for its layers"), "{told}");
    assert_eq!(world.places(), ["w1 w2"]);
}

/// On each worker there is room for one layout's stage, not for two.
fn full() -> World {
    let mut world = World::empty(3, Bytes::mib(50));
    world.deploy_many("m", Some(2), 1, 10 << 20);
    world.settle();
    assert_eq!(world.places(), ["w1 w2"]);
    world
}

#[test]
fn a_slow_layout_is_not_ended_before_the_better_one_is_there() {
    let mut world = full();
    let told = world.compute(20, &[9000, 1000, 1000]);
    assert!(told.contains("there is no memory for a better place beside it"), "{told}");
    assert_eq!(world.places(), ["w1 w2"], "it serves, and nothing else would meanwhile");
}

#[test]
fn a_worker_that_is_slow_does_not_take_the_blame_for_another_one_that_fails() {
    let mut world = full();
    world.compute(20, &[9000, 1000, 1000]);
    world.report(2, ShardState::Linking);
    world.round();
    world.pass(patience::LINKING + Duration::from_secs(1));
    world.round();
    let places = world.places().join(", ");
    assert!(places.contains("w1") && places.contains("w3"), "w2 failed: {places}");
}
