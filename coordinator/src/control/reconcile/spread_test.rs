use shoal_protocol::units::Bytes;

use super::super::world_test::World;
use super::*;
use crate::control::state::{Change, DrainCommand};

/// `m` of 60 MiB in one stage for each replica, on workers of so much memory, settled.
fn served(workers: u32, replicas: u32, memory: u64) -> World {
    let mut world = World::empty(workers, Bytes::mib(memory));
    world.deploy_many("m", Some(1), replicas, 10 << 20);
    world.settle();
    world
}

impl World {
    fn drain_it(&mut self, number: u32, draining: bool) -> Vec<String> {
        let node = NodeId::worker(number);
        self.apply(Change::Drain(match draining {
            true => DrainCommand::Begin { node },
            false => DrainCommand::End { node },
        }));
        self.settle()
    }

    /// What is done from then on until nothing changes.
    fn after(&mut self, s: u64) -> Vec<String> {
        self.observed.now = self.observed.now + Duration::from_secs(s);
        self.settle()
    }

    /// `r1: w1`, one for each replica.
    fn shares(&self) -> Vec<String> {
        let line = |plan: &ReplicaPlan| {
            let nodes: Vec<_> = plan.nodes().map(|node| node.to_string()).collect();
            format!("{}: {}", plan.id, nodes.join(" "))
        };
        self.state.plans.iter().map(line).collect()
    }
}

/// Two replicas on w1, and w2 has been given back.
fn stacked() -> World {
    let mut world = served(2, 2, 420);
    assert_eq!(world.shares(), ["r1: w1", "r2: w2"]);
    world.drain_it(2, true);
    assert_eq!(world.drain_it(2, false), [""; 0], "not at once");
    assert_eq!(world.shares(), ["r1: w1", "r2: w1"]);
    world
}

#[test]
fn a_worker_that_is_given_back_gets_its_share_again_and_nothing_pauses() {
    let mut world = stacked();
    let since = world.round().wake_at.expect("it looks again by itself");
    assert!(since <= world.observed.now + STACKED_FOR);
    assert_eq!(world.after(20), [""; 0]);
    let said = world.after(10);
    assert_eq!(said[0], "prepare r2 g3 (1x1 on w2): it shares w1 with r1 while w2 is idle");
    assert!(said.iter().any(|line| line == "promote r2 g3: all of it is ready"), "{said:#?}");
    assert_eq!(world.shares(), ["r1: w1", "r2: w2"]);
    // There it stays.
    assert_eq!((world.after(100), world.after(1000)), (vec![], vec![]));
}

#[test]
fn an_upgrade_of_one_worker_after_the_other_ends_with_each_replica_on_its_own() {
    let mut world = served(3, 3, 420);
    for number in 1..=3 {
        world.drain_it(number, true);
        world.after(5);
        assert!(world.shares().iter().all(|place| !place.ends_with(&format!("w{number}"))));
        world.drain_it(number, false);
    }
    for _ in 0..3 {
        world.after(30);
    }
    let mut nodes: Vec<_> = world.state.plans.iter().flat_map(ReplicaPlan::nodes).collect();
    nodes.sort();
    assert_eq!(nodes, [1, 2, 3].map(NodeId::worker), "{:?}", world.shares());
}

#[test]
fn who_shares_a_worker_stays_where_nothing_is_better() {
    let stays = |what: &str, change: &dyn Fn(&mut World)| {
        let mut world = stacked();
        change(&mut world);
        for _ in 0..3 {
            assert_eq!(world.after(31), [""; 0], "{what}");
        }
        assert_eq!(world.shares()[..2], ["r1: w1", "r2: w1"], "{what}");
    };
    stays("it is drained again", &|world| {
        world.drain_it(2, true);
    });
    stays("it is gone again", &|world| world.lose(2));
    stays("it has no room", &|world| world.worker(2).register.devices[0].memory = Bytes::mib(50));
    stays("it is known to be far slower", &|world| {
        for (number, rate) in [(1, 10_000), (2, 4_000)] {
            world.worker(number).facts.rates.insert("cpu".into(), rate);
        }
    });
    stays("another coordinator leads", &|world| world.observed.follows = true);
    stays("it holds something else", &|world| {
        world.worker(1).register.devices[0].memory = Bytes::mib(130);
        world.deploy_many("other", Some(1), 1, 10 << 20);
        world.settle();
    });
}

#[test]
fn a_place_that_is_lost_time_and_again_is_waited_for_longer_each_time() {
    let mut world = stacked();
    for wait in [30, 60, 120, 240] {
        assert_eq!(world.after(wait - 1), [""; 0], "{wait}");
        assert!(world.after(1)[0].contains("it shares w1 with r1"), "{wait}");
        world.drain_it(2, true);
        world.drain_it(2, false);
    }
    // The longest wait is an hour, and stays so.
    for wait in [480, 960, 1920, 3600, 3600, 3600] {
        assert_eq!(world.after(wait - 1), [""; 0], "{wait}");
        assert!(world.after(1)[0].contains("it shares w1 with r1"), "{wait}");
        world.drain_it(2, true);
        world.drain_it(2, false);
    }
    // Where nothing has moved for two, it is forgotten.
    world.after(3600);
    world.after(7200);
    world.drain_it(2, true);
    world.drain_it(2, false);
    assert!(!world.after(30).is_empty());
}

#[test]
fn a_worker_at_which_a_layout_has_just_failed_is_left_alone() {
    let mut world = stacked();
    let history = world.observed.history.values_mut();
    let now = world.observed.now;
    history.for_each(|history| history.suspects.blame(&[NodeId::worker(2)], now));
    assert_eq!(world.after(250), [""; 0]);
    assert!(!world.after(60).is_empty(), "five minutes later it is as good as any");
}

#[test]
fn a_worker_that_comes_and_goes_moves_nobody() {
    let mut world = stacked();
    for start in 2..8 {
        assert_eq!(world.after(20), [""; 0]);
        world.lose(2);
        assert_eq!(world.after(1), [""; 0]);
        world.connect(2, start);
        // It is told what it should be: nothing.
        world.settle();
    }
    assert_eq!(world.shares(), ["r1: w1", "r2: w1"]);
    assert!(!world.after(30).is_empty(), "now it stays");
}
