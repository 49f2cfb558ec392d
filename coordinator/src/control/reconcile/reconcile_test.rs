//! Reconciliation as stories: what happens to workers, and the whole list of actions that follows.

use shoal_protocol::control::ShardState;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::Role;

use super::*;
use crate::control::state::{Change, DeploymentCommand, KeyFingerprint, NodeCommand};

pub(super) use super::world_test::{MS, World};

#[test]
fn a_deployment_is_planned_then_told_then_ready() {
    let mut world = World::new(3, None);
    world.expect(
        0,
        &[
            "adopt r1 g1 (3x1 on w1, w2, w3): it has no layout yet",
            "assign w1 0 shards: it has just connected",
            "assign w2 0 shards: it has just connected",
            "assign w3 0 shards: it has just connected",
            "m is Loading: g1 is being made: 3x1 on w1, w2, w3",
        ],
    );
    world.expect(
        1,
        &[
            "assign w1 1 shard: r1 g1: stage 0 with layers 0..2",
            "assign w2 1 shard: r1 g1: stage 1 with layers 2..4",
            "assign w3 1 shard: r1 g1: stage 2 with layers 4..6",
            "m is Loading: g1: w1 is told, w2 is told, w3 is told",
        ],
    );
    world.report(1, ShardState::Ready);
    world.report(2, ShardState::Loading { done: Bytes::mib(50), total: Bytes::mib(200) });
    world.report(3, ShardState::Linking);
    world.expect(2, &["m is Loading: g1: w2 has loaded 25 % of 200.0 MiB, w3 links"]);
    world.report(2, ShardState::Ready);
    world.report(3, ShardState::Ready);
    world.expect(3, &["m is Ready: g1 3x1 on w1, w2, w3"]);
    let told = world.worker(2).pushed.clone().unwrap();
    let ports: Vec<_> = told[0].peers.iter().map(|peer| peer.activations.port()).collect();
    assert_eq!(ports, [4101, 4102, 4103]);
}

#[test]
fn a_lost_worker_is_planned_around_at_once() {
    let mut world = World::ready(3, None, 10_000);
    world.lose(2);
    world.expect(
        10_100,
        &[
            "adopt r1 g2 (2x1 on w1, w3): w2 was lost",
            "m is Loading: g2 is being made: 2x1 on w1, w3",
        ],
    );
    world.expect(
        10_101,
        &[
            "assign w1 1 shard: r1 g2: stage 0 with layers 0..3",
            "assign w3 1 shard: r1 g2: stage 1 with layers 3..6",
            "m is Loading: g2: w1 is told, w3 is told",
        ],
    );
    world.report(1, ShardState::Ready);
    world.report(3, ShardState::Ready);
    world.expect(10_200, &["m is Ready: g2 2x1 on w1, w3"]);
    // It comes back: told to be nothing, and what runs is left alone.
    world.connect(2, 2);
    world.expect(
        10_300,
        &["assign w2 0 shards: it has just connected", "m is Ready: g2 2x1 on w1, w3"],
    );
}

#[test]
fn a_removed_worker_is_replaced_or_nobody_goes_on_with_it() {
    let mut world = World::ready(3, None, 10_000);
    let remove = |number| Change::Node(NodeCommand::Remove { node: NodeId::worker(number) });
    world.apply(remove(2));
    world.observed.workers.remove(&NodeId::worker(2));
    // The others keep what they have until the next round, which has the new layout.
    world.expect(
        10_100,
        &[
            "adopt r1 g2 (2x1 on w1, w3): w2 was removed",
            "m is Loading: g2 is being made: 2x1 on w1, w3",
        ],
    );
    world.expect(
        10_101,
        &[
            "assign w1 1 shard: r1 g2: stage 0 with layers 0..3",
            "assign w3 1 shard: r1 g2: stage 1 with layers 3..6",
            "m is Loading: g2: w1 is told, w3 is told",
        ],
    );
    world.report(1, ShardState::Ready);
    world.report(3, ShardState::Ready);
    world.expect(10_200, &["m is Ready: g2 2x1 on w1, w3"]);
    world.apply(remove(3));
    world.observed.workers.remove(&NodeId::worker(3));
    world.observed.now = Instant(60_000 * MS);
    let decision = world.round().to_string();
    assert!(decision.starts_with("assign w1 0 shards: no more r1 g2\n"), "{decision}");
    assert!(decision.contains("m is Waiting: w3 was removed; "), "{decision}");
}

#[test]
fn a_worker_that_was_started_again_gets_its_layers_back_in_a_new_generation() {
    let mut world = World::ready(3, Some(3), 10_000);
    world.connect(2, 2);
    world.expect(
        10_100,
        &[
            "adopt r1 g2 (3x1 on w1, w2, w3): w2 was started again",
            "assign w2 1 shard: it has just connected; r1 g1: stage 1 with layers 2..4",
            "m is Loading: g2 is being made: 3x1 on w1, w2, w3",
        ],
    );
    world.expect(
        10_101,
        &[
            "assign w1 1 shard: r1 g2: stage 0 with layers 0..2",
            "assign w2 1 shard: r1 g2: stage 1 with layers 2..4",
            "assign w3 1 shard: r1 g2: stage 2 with layers 4..6",
            "m is Loading: g2: w1 is told, w2 is told, w3 is told",
        ],
    );
}

#[test]
fn what_does_not_fit_waits_for_a_worker() {
    let mut world = World::ready(3, Some(3), 10_000);
    world.lose(3);
    let refusal = "m is Waiting: w3 was lost; 3 stages were asked for, but 2 workers are connected and each takes one stage of a replica; start 1 more, or give --stages 2";
    world.expect(10_100, &[refusal]);
    world.fail(1, ErrorCode::WorkerLost, "the link to w3 broke");
    world.expect(10_200, &[refusal]);
    world.connect(3, 2);
    world.expect(
        60_000,
        &[
            "adopt r1 g2 (3x1 on w1, w2, w3): w3 was started again",
            "assign w3 1 shard: it has just connected; r1 g1: stage 2 with layers 4..6",
            "m is Loading: g2 is being made: 3x1 on w1, w2, w3",
        ],
    );
}

#[test]
fn a_broken_link_waits_for_its_cause_and_is_then_replaced() {
    let mut world = World::ready(3, None, 10_000);
    world.fail(1, ErrorCode::WorkerLost, "the link to w2 broke");
    world.expect(10_000, &["m is Loading: w1: the link to w2 broke"]);
    let wake_at = world.round().wake_at;
    assert_eq!(wake_at, Some(Instant(10_020 * MS)));
    // One that is silent since may be found dead any moment; two seconds are enough for that.
    world.worker(2).silent_for = Duration::from_millis(40);
    world.expect(10_030, &["m is Loading: w1: the link to w2 broke"]);
    world.worker(2).silent_for = Duration::from_millis(2010);
    world.expect(11_999, &["m is Loading: w1: the link to w2 broke"]);
    world.expect(
        12_000,
        &[
            "adopt r1 g2 (3x1 on w1, w2, w3): w1: the link to w2 broke",
            "m is Loading: g2 is being made: 3x1 on w1, w2, w3",
        ],
    );
}

#[test]
fn a_broken_link_between_two_that_are_heard_is_replaced_at_once() {
    let mut world = World::ready(3, None, 10_000);
    world.fail(1, ErrorCode::WorkerLost, "the link to w2 broke");
    world.expect(10_000, &["m is Loading: w1: the link to w2 broke"]);
    world.worker(2).silent_for = Duration::from_millis(9);
    // The same workers, linked anew.
    world.expect(
        10_020,
        &[
            "adopt r1 g2 (3x1 on w1, w2, w3): w1: the link to w2 broke; all its workers were heard \
             since, so it is a link or a shard",
            "m is Loading: g2 is being made: 3x1 on w1, w2, w3",
        ],
    );
}

#[test]
fn repeated_failures_are_spaced_out_and_forgotten_after_a_while() {
    let mut world = World::ready(2, None, 10_000);
    world.fail(1, ErrorCode::ComputeFailed, "not finite");
    let adopt = |generation: u64| format!("adopt r1 g{generation} (2x1 on w1, w2): w1: not finite");
    let mut now = 10_000;
    for (generation, wait) in [(2, 0), (3, 250), (4, 500), (5, 1000)] {
        world.observed.now = Instant(now * MS);
        if wait > 0 {
            let decision = world.round();
            assert_eq!(decision.actions, []);
            assert_eq!(decision.wake_at, Some(Instant((now + wait) * MS)));
        }
        now += wait;
        world.observed.now = Instant(now * MS);
        let adopted = world.round();
        assert_eq!(adopted.actions[0].to_string(), adopt(generation));
        world.round();
        world.fail(1, ErrorCode::ComputeFailed, "not finite");
    }
    now += 2000;
    world.observed.now = Instant(now * MS);
    assert_eq!(world.round().actions[0].to_string(), adopt(6));
    world.round();
    world.report(1, ShardState::Ready);
    world.report(2, ShardState::Ready);
    world.round();
    now += STABLE_AFTER.as_millis() as u64;
    world.observed.now = Instant(now * MS);
    world.round();
    world.fail(1, ErrorCode::ComputeFailed, "not finite");
    assert_eq!(world.round().actions[0].to_string(), adopt(7));
}

#[test]
fn what_no_layout_can_mend_fails_with_the_workers_words() {
    let mut world = World::ready(2, None, 10_000);
    world.fail(1, ErrorCode::WorkerLost, "the link to w2 broke");
    world.fail(2, ErrorCode::BadModel, "model.safetensors: truncated");
    world.observed.now = Instant(20_000 * MS);
    // The other worker's copy is good, and it has no room for all of it.
    let printed = world.round().to_string();
    let words = "m is Failed: w2: model.safetensors: truncated; the model does not fit";
    assert!(printed.starts_with(words), "{printed}");
    // A worker that was started again may have better files.
    world.connect(2, 2);
    let decision = world.round();
    assert_eq!(
        decision.actions[0].to_string(),
        "adopt r1 g2 (2x1 on w1, w2): w2 was started again"
    );
}

#[test]
fn deployments_share_memory_and_leave_each_other_alone() {
    let mut world = World::ready(2, Some(2), 10_000);
    // 300 of 420 MiB are taken on each: a second one does not fit.
    world.deploy("n", Some(2));
    world.observed.now = Instant(10_000 * MS);
    let decision = world.round();
    assert_eq!(decision.actions, []);
    let name = |text| DeploymentName::new(text).unwrap();
    assert_eq!(decision.phases[&name("n")].phase, DeploymentPhase::Waiting);
    assert_eq!(decision.phases[&name("m")].phase, DeploymentPhase::Ready);
    let reason = &decision.phases[&name("n")].reason;
    assert!(reason.contains("420.0 MiB, of which "), "{reason}");
    // With more workers it fits, and the first one's generation stays.
    let key = KeyFingerprint([0; 32]);
    for number in [3, 4] {
        world.apply(Change::Node(NodeCommand::Enrol { role: Role::Worker, key }));
        world.connect(number, 1);
    }
    let decision = world.round();
    let printed: Vec<_> = decision.actions.iter().map(|action| action.to_string()).collect();
    assert_eq!(
        printed,
        [
            "adopt r2 g1 (2x1 on w3, w4): it has no layout yet",
            "assign w3 0 shards: it has just connected",
            "assign w4 0 shards: it has just connected",
        ]
    );
    let remove = DeploymentCommand::Remove { name: name("m") };
    world.apply(Change::Deployment(remove));
    world.expect(
        11_000,
        &[
            "assign w1 0 shards: no more r1 g1",
            "assign w2 0 shards: no more r1 g1",
            "assign w3 1 shard: r2 g1: stage 0 with layers 0..3",
            "assign w4 1 shard: r2 g1: stage 1 with layers 3..6",
            "n is Loading: g1: w3 is told, w4 is told",
        ],
    );
}

#[test]
fn a_worker_that_is_silent_about_what_it_was_told_ends_the_generation() {
    let mut world = World::ready(2, None, 10_000);
    world.worker(1).report.shards.clear();
    world.expect(10_000, &["m is Loading: g1: w1 is told"]);
    assert_eq!(world.round().wake_at, Some(Instant(20_000 * MS)));
    world.expect(19_999, &["m is Loading: g1: w1 is told"]);
    let silent = "w1 was told its shard and has not begun to load it for 10s";
    world.expect(
        20_000,
        &[
            &format!("adopt r1 g2 (2x1 on w1, w2): {silent}"),
            "m is Loading: g2 is being made: 2x1 on w1, w2",
        ],
    );
    // The next one has all of its time.
    world.observed.now = Instant(20_001 * MS);
    world.round();
    world.report(2, ShardState::Ready);
    world.expect(30_000, &["m is Loading: g2: w1 is told"]);
}

#[test]
fn a_load_may_take_as_long_as_it_goes_on() {
    let mut world = World::ready(2, None, 0);
    let loaded = |done| ShardState::Loading { done: Bytes::mib(done), total: Bytes::mib(300) };
    let mut now = 0;
    for done in 0..10 {
        world.report(1, loaded(done));
        world.report(2, ShardState::Linking);
        world.observed.now = Instant(now * MS);
        assert_eq!(world.round().actions, []);
        now += 119_000;
    }
    world.observed.now = Instant(now * MS);
    assert_eq!(world.round().actions, [], "w2 waits for w1, whose time has not passed");
    world.observed.now = Instant((now + 1000) * MS);
    let action = world.round().actions[0].to_string();
    let words = "w1 has loaded 9.0 MiB and nothing more for 120s";
    assert_eq!(action, format!("adopt r1 g2 (2x1 on w1, w2): {words}"));
}

#[test]
fn a_link_that_does_not_come_up_ends_the_generation() {
    let mut world = World::ready(3, None, 10_000);
    world.report(1, ShardState::Linking);
    world.report(2, ShardState::Linking);
    world.expect(50_000, &["m is Loading: g1: w1 links, w2 links"]);
    world.report(2, ShardState::Ready);
    world.observed.now = Instant(70_000 * MS);
    let action = world.round().actions[0].to_string();
    let words = "w1 has loaded its shard and has not linked it for 20s";
    assert_eq!(action, format!("adopt r1 g2 (3x1 on w1, w2, w3): {words}"));
}
