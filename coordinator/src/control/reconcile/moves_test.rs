//! Replicas, scaling and drains as stories.

use shoal_protocol::control::ShardState;
use shoal_protocol::plan::{Numerics, StagesAsked};

use super::tests::World;
use super::*;
use crate::control::planner::same_layout;
use crate::control::state::{Change, DeploymentCommand, DrainCommand, NodeCommand};

fn name() -> DeploymentName {
    DeploymentName::new("m").unwrap()
}

impl World {
    fn scale(&mut self, replicas: Option<u32>, stages: StagesAsked) {
        let scale = DeploymentCommand::Scale { name: name(), replicas, stages };
        self.apply(Change::Deployment(scale));
    }

    fn drain(&mut self, number: u32, draining: bool) {
        let node = NodeId::worker(number);
        self.apply(Change::Drain(match draining {
            true => DrainCommand::Begin { node },
            false => DrainCommand::End { node },
        }));
    }

    /// `r1 g1: w1 w2`, one line for each layout, the next ones behind.
    fn layouts(&self) -> Vec<String> {
        let line = |plan: &ReplicaPlan| {
            let nodes: Vec<_> = plan.nodes().map(|node| node.to_string()).collect();
            format!("{} {}: {}", plan.id, plan.generation, nodes.join(" "))
        };
        let nexts = self.state.plans.nexts().map(|plan| format!("next {}", line(plan)));
        self.state.plans.iter().map(line).chain(nexts).collect()
    }

    fn reason(&mut self) -> String {
        self.round().phases[&name()].reason.clone()
    }
}

/// `m` of 6 layers of 10 MiB, settled.
fn served(workers: u32, stages: Option<u32>, replicas: u32, memory: u64) -> World {
    let mut world = World::empty(workers, Bytes::mib(memory));
    world.deploy_many("m", stages, replicas, 10 << 20);
    world.settle();
    world
}

#[test]
fn replicas_take_workers_of_their_own_where_there_are_some() {
    for (workers, stages, replicas, expected) in [
        (4, Some(2), 2, &["r1 g1: w1 w2", "r2 g1: w3 w4"][..]),
        (4, None, 2, &["r1 g1: w1 w2", "r2 g1: w3 w4"]),
        (3, None, 2, &["r1 g1: w1", "r2 g1: w2"]),
        (3, Some(2), 2, &["r1 g1: w1 w2", "r2 g1: w3 w1"]),
        (2, Some(1), 3, &["r1 g1: w1", "r2 g1: w2", "r3 g1: w1"]),
        (1, None, 2, &["r1 g1: w1", "r2 g1: w1"]),
    ] {
        let world = served(workers, stages, replicas, 420);
        assert_eq!(world.layouts(), expected, "{replicas} x {stages:?} on {workers}");
    }
}

#[test]
fn a_replica_takes_more_than_its_share_where_it_does_not_fit_otherwise() {
    // 60 MiB of weights; two replicas of two stages on three workers of 45 MiB each.
    let mut world = World::empty(4, Bytes::mib(45));
    world.deploy_many("m", None, 3, 10 << 20);
    world.settle();
    let layouts = world.layouts();
    assert_eq!(layouts, ["r1 g1: w1 w2", "r2 g1: w3 w4"], "there is no room for a third one");
    assert!(world.reason().contains("r3: the model does not fit"), "{}", world.reason());
}

#[test]
fn scaling_up_leaves_what_serves_alone_where_it_is_as_it_would_be_planned() {
    let mut world = served(4, Some(2), 1, 420);
    world.scale(Some(2), StagesAsked::Same);
    let said = world.settle();
    assert_eq!(world.layouts(), ["r1 g1: w1 w2", "r2 g1: w3 w4"], "{said:#?}");
    assert!(said.iter().any(|line| line.starts_with("confirm r1 g1")), "{said:#?}");
}

#[test]
fn scaling_down_takes_the_last_replicas() {
    let mut world = served(4, Some(1), 4, 420);
    world.scale(Some(2), StagesAsked::Same);
    world.settle();
    assert_eq!(world.layouts(), ["r1 g1: w1", "r2 g1: w2"]);
    assert!(world.worker(4).pushed.as_ref().unwrap().is_empty(), "w4 is told to let it go");
}

#[test]
fn a_new_number_of_stages_is_made_beside_the_old_one_and_then_takes_over() {
    let mut world = served(4, Some(2), 1, 420);
    world.scale(None, StagesAsked::Exactly(3));
    // On w1 and w2 there is less room while the old one is there, so they come last.
    world.expect(
        1000,
        &[
            "prepare r1 g2 (3x1 on w3, w4, w1): it was asked for anew",
            "m is Ready: g1 2x1 on w1, w2; it was asked for anew: g2 is being made: 3x1 on w3, w4, w1",
        ],
    );
    world.expect(
        1001,
        &[
            "assign w1 2 shards: r1 g2: stage 2 with layers 4..6",
            "assign w3 1 shard: r1 g2: stage 0 with layers 0..2",
            "assign w4 1 shard: r1 g2: stage 1 with layers 2..4",
            "m is Ready: g1 2x1 on w1, w2; moving: g2: w3 is told, w4 is told, w1 is told",
        ],
    );
    [1, 3, 4].into_iter().for_each(|number| world.report(number, ShardState::Ready));
    world.expect(
        1002,
        &[
            "promote r1 g2: all of it is ready",
            "m is Ready: g1 2x1 on w1, w2; moving: the next layout is ready and takes over",
        ],
    );
    world.expect(
        1003,
        &[
            "assign w1 1 shard: no more r1 g1",
            "assign w2 0 shards: no more r1 g1",
            "m is Ready: g2 3x1 on w3, w4, w1",
        ],
    );
}

#[test]
fn auto_stages_spread_over_the_workers_that_have_come_since() {
    let mut world = served(2, None, 1, 420);
    world.join(3);
    world.settle();
    assert_eq!(world.layouts(), ["r1 g1: w1 w2"], "nobody has asked for it");
    world.scale(None, StagesAsked::Auto);
    world.settle();
    assert_eq!(world.layouts(), ["r1 g2: w3 w1 w2"]);
}

#[test]
fn a_drained_worker_holds_nothing_in_the_end_and_gets_nothing_new() {
    let mut world = served(3, Some(2), 1, 420);
    world.drain(2, true);
    let said = world.settle();
    assert_eq!(world.layouts(), ["r1 g2: w3 w1"], "{said:#?}");
    assert_eq!(said[0], "prepare r1 g2 (2x1 on w3, w1): w2 is drained");
    world.drain(2, false);
    world.drain(1, true);
    world.settle();
    assert_eq!(world.layouts(), ["r1 g3: w2 w3"]);
    for number in [1, 2] {
        world.drain(number, true);
    }
    world.settle();
    let reason = world.reason();
    assert!(
        reason.contains("w2 is drained, but 2 stages were asked for, but 1 workers"),
        "{reason}"
    );
    assert_eq!(world.layouts(), ["r1 g3: w2 w3"], "it stays, and serves");
}

#[test]
fn what_has_room_moves_and_the_rest_stays() {
    // 60 MiB of weights in one stage; a worker has room for one.
    let mut world = served(3, Some(1), 2, 90);
    world.drain(1, true);
    world.drain(2, true);
    let said = world.settle();
    assert_eq!(world.layouts(), ["r1 g2: w3", "r2 g1: w2"], "{said:#?}");
    let reason = world.reason();
    assert!(reason.contains("r2: g1 1x1 on w2; w2 is drained, but the model does not"), "{reason}");
}

#[test]
fn without_memory_for_both_layouts_one_replica_moves_at_a_time() {
    let mut world = served(2, Some(1), 2, 90);
    world.scale(None, StagesAsked::Exactly(2));
    let first = world.round();
    assert!(first.actions[0].to_string().starts_with("adopt r1 g2 (2x1"), "{first}");
    assert!(first.replicas[&ReplicaId(2)].reason.contains("it moves when r1 serves"), "{first}");
    assert!(!first.actions.iter().any(|a| a.to_string().contains("r2 g2")), "{first}");
    world.settle();
    assert_eq!(world.layouts().len(), 2);
    assert!(world.state.plans.iter().all(|plan| plan.stages.len() == 2), "{:?}", world.layouts());
}

#[test]
fn where_there_is_no_memory_for_both_streams_pause() {
    // Two layouts of 30 MiB a worker do not fit beside each other on w1.
    let mut world = served(3, Some(2), 1, 50);
    world.drain(2, true);
    let said = world.settle();
    assert_eq!(
        said[0],
        "adopt r1 g2 (2x1 on w1, w3): w2 is drained; there is no memory for both layouts, so streams pause"
    );
    assert_eq!(world.layouts(), ["r1 g2: w1 w3"]);
}

#[test]
fn a_next_layout_that_fails_is_given_up_and_what_serves_goes_on() {
    let mut world = served(4, Some(2), 1, 420);
    world.drain(2, true);
    world.round();
    world.round();
    assert_eq!(world.layouts(), ["r1 g1: w1 w2", "next r1 g2: w3 w4"]);
    world.observed.now = Instant(10_000_000);
    world.worker(3).report.shards.clear();
    world.round();
    world.observed.now = Instant(21_000_000);
    world.expect(
        21_000,
        &[
            "abandon r1 g2: w3 was told its shard and has not begun to load it for 21s, w4 was told its shard and has not begun to load it for 21s",
            "m is Ready: g1 2x1 on w1, w2; w2 is drained: a new layout is made in 250.0ms",
        ],
    );
}

#[test]
fn a_worker_that_hung_is_tried_again_after_those_that_did_not() {
    let mut world = World::empty(3, Bytes::mib(420));
    world.deploy("m", Some(2));
    world.round();
    world.round();
    world.report(2, ShardState::Ready);
    world.observed.now = Instant(30_000_000);
    let adopted = world.round().actions[0].to_string();
    assert!(
        adopted.starts_with("adopt r1 g2 (2x1 on w2, w3)")
            || adopted.starts_with("adopt r1 g2 (2x1 on w3, w2)"),
        "w1 hung: {adopted}"
    );
}

#[test]
fn a_lost_worker_in_the_middle_of_a_move_is_left_to_the_next_layout() {
    let mut world = served(4, Some(2), 1, 420);
    world.drain(2, true);
    world.round();
    world.round();
    world.lose(2);
    world.observed.now = Instant(1_000_000);
    let decision = world.round();
    assert_eq!(decision.actions, [], "{decision}");
    for number in [3, 4] {
        world.report(number, ShardState::Ready);
    }
    world.settle();
    assert_eq!(world.layouts(), ["r1 g2: w3 w4"]);
}

#[test]
fn a_removed_worker_is_no_place_to_move_to_and_nobody_stays_with_it() {
    let mut world = served(4, Some(2), 1, 420);
    let remove = |world: &mut World, number| {
        let node = NodeId::worker(number);
        world.apply(Change::Node(NodeCommand::Remove { node }));
        world.observed.workers.remove(&node);
    };
    world.drain(2, true);
    world.round();
    world.round();
    assert_eq!(world.layouts(), ["r1 g1: w1 w2", "next r1 g2: w3 w4"]);
    remove(&mut world, 3);
    let decision = world.round();
    assert!(decision.to_string().starts_with("abandon r1 g2: w3 was removed\n"), "{decision}");
    assert_eq!(decision.replicas[&ReplicaId(1)].phase, DeploymentPhase::Ready, "{decision}");
    // The one that is drained goes too, before the next layout is there.
    remove(&mut world, 2);
    world.settle();
    let places: Vec<_> = world.state.plans.all().flat_map(|plan| plan.nodes()).collect();
    assert_eq!(places.len(), 2, "{:?}", world.layouts());
    assert!([1, 4].iter().all(|number| places.contains(&NodeId::worker(*number))), "{places:?}");
    assert!(!world.state.drains.contains(NodeId::worker(2)));
}

#[test]
fn a_preview_shows_where_everything_would_be_and_changes_nothing() {
    let world = served(4, Some(2), 1, 420);
    let scale = DeploymentCommand::Scale {
        name: name(),
        replicas: Some(2),
        stages: StagesAsked::Exactly(1),
    };
    let tried = preview(&world.state, &world.observed, Change::Deployment(scale)).unwrap();
    let (before, after) = tried.difference(&world.state);
    assert_eq!((before.len(), after.len()), (1, 2));
    assert!(tried.stands.iter().all(|(_, stand)| stand.settled), "{:?}", tried.stands);
    let twice = preview(
        &world.state,
        &world.observed,
        Change::Drain(DrainCommand::Begin { node: NodeId::worker(9) }),
    );
    assert!(twice.unwrap_err().to_string().contains("w9 is not a node of this cluster"));
}

/// What makes no layout possible may be what was asked for, and not who is there.
#[test]
fn what_is_asked_for_after_a_refusal_is_planned_with_the_same_workers() {
    let mut world = served(2, Some(3), 1, 1000);
    assert!(world.layouts().is_empty() && world.reason().contains('3'), "{}", world.reason());
    world.scale(None, StagesAsked::Exactly(2));
    world.settle();
    assert_eq!(world.layouts(), ["r1 g1: w1 w2"], "{}", world.reason());
}

#[test]
fn another_numerics_contract_is_another_layout() {
    let world = served(2, Some(2), 1, 1000);
    let plan = world.state.plans.iter().next().unwrap();
    let summed = ReplicaPlan { numerics: Numerics::N1Sum, ..plan.clone() };
    assert!(same_layout(plan, plan) && !same_layout(plan, &summed));
}

#[test]
fn what_a_drain_lacks_is_fewer_stages_only_where_those_have_room() {
    // 60 MiB of weights in two stages, on two workers.
    for (memory, fits) in [(420, true), (45, false)] {
        let world = served(2, Some(2), 1, memory);
        let node = NodeId::worker(1);
        let drain = Change::Drain(DrainCommand::Begin { node });
        let tried = preview(&world.state, &world.observed, drain).unwrap();
        assert_eq!(tried.difference(&world.state).1, [], "it stays where it is");
        let leaves = tried.leaves_with_open_stages(&world.observed, node, &name());
        assert_eq!(leaves, fits, "{memory} MiB a worker");
    }
}
