//! Stories of coordinators that come, go and are behind: what they must not disturb.

use shoal_protocol::control::ShardState;
use shoal_protocol::error::ErrorCode;

use super::world_test::{MS, World};
use super::*;

#[test]
fn a_coordinator_that_was_away_waits_for_all_of_its_workers() {
    let mut world = World::ready(3, None, 10_000);
    (1..=3).for_each(|number| world.lose(number));
    world.expect(10_100, &["m is Loading: no worker of it is connected; this coordinator waits a moment for w1, w2, w3"]);
    // The first one back does not get all of the layers.
    world.worker(2).connected = true;
    world.expect(
        10_200,
        &["m is Loading: no worker of it is connected; this coordinator waits a moment for w1, w3"],
    );
    world.worker(1).connected = true;
    world.worker(3).connected = true;
    world.expect(10_300, &["m is Ready: g1 3x1 on w1, w2, w3"]);
    // From then on a lost worker is a lost worker again.
    world.lose(2);
    world.observed.now = Instant(10_400 * MS);
    let decision = world.round();
    assert!(decision.actions.iter().any(|action| matches!(action, Action::Adopt { .. })));
}

#[test]
fn a_new_coordinator_waits_for_the_workers_and_disturbs_nothing() {
    let mut world = World::ready(3, None, 0);
    let before = std::mem::take(&mut world.observed);
    world.observed.since = Instant(100_000 * MS);
    let waits = "m is Loading: this coordinator has just started and waits for";
    world.expect(100_000, &[&format!("{waits} w1, w2, w3")]);
    for number in [1, 3] {
        world.connect(number, 1);
        let report = before.workers[&NodeId::worker(number)].report.clone();
        world.worker(number).report = report;
    }
    // They are not told to drop what they have while w2 may still come.
    world.expect(101_000, &[&format!("{waits} w2")]);
    world.connect(2, 1);
    world.worker(2).report = before.workers[&NodeId::worker(2)].report.clone();
    world.expect(
        102_000,
        &[
            "assign w1 1 shard: it has just connected; r1 g1: stage 0 with layers 0..2",
            "assign w2 1 shard: it has just connected; r1 g1: stage 1 with layers 2..4",
            "assign w3 1 shard: it has just connected; r1 g1: stage 2 with layers 4..6",
            "m is Ready: g1 3x1 on w1, w2, w3",
        ],
    );
}

#[test]
fn a_new_coordinator_goes_on_without_a_worker_that_does_not_come() {
    let mut world = World::ready(3, None, 0);
    world.observed = Observed { since: Instant(100_000 * MS), ..Observed::default() };
    world.connect(1, 1);
    world.connect(3, 1);
    world.expect(104_999, &["m is Loading: this coordinator has just started and waits for w2"]);
    assert_eq!(world.round().wake_at, Some(Instant(105_000 * MS)));
    world.observed.now = Instant(105_000 * MS);
    let decision = world.round();
    assert_eq!(
        decision.actions[0].to_string(),
        "adopt r1 g2 (2x1 on w1, w3): w2 did not come back"
    );
}

#[test]
fn a_state_from_an_old_backup_goes_on_after_what_the_workers_have_seen() {
    let mut world = World::ready(2, None, 10_000);
    // The workers have seen four more layouts than the state, and w1 even one more.
    for (number, generation) in [(1, 6), (2, 5)] {
        world.fail(number, ErrorCode::StaleGeneration, "the coordinator's data is older");
        world.worker(number).report.shards[0].generation = Generation(generation);
    }
    world.expect(
        10_000,
        &[
            "adopt r1 g7 (2x1 on w1, w2): w1: the coordinator's data is older",
            "m is Loading: g7 is being made: 2x1 on w1, w2",
        ],
    );
    // What they say until they have read of it is no news.
    world.expect(
        10_001,
        &[
            "assign w1 1 shard: r1 g7: stage 0 with layers 0..3",
            "assign w2 1 shard: r1 g7: stage 1 with layers 3..6",
            "m is Loading: g7: w1 is told, w2 is told",
        ],
    );
    world.report(1, ShardState::Ready);
    world.report(2, ShardState::Ready);
    world.expect(10_002, &["m is Ready: g7 2x1 on w1, w2"]);
}

#[test]
fn another_layout_under_the_same_number_is_made_anew_and_nonsense_is_not_believed() {
    let mut world = World::ready(2, None, 10_000);
    world.fail(1, ErrorCode::StaleGeneration, "taken");
    world.worker(2).report.shards[0].generation = Generation(u64::MAX);
    world.expect(
        10_000,
        &[
            "adopt r1 g2 (2x1 on w1, w2): w1: taken",
            "m is Loading: g2 is being made: 2x1 on w1, w2",
        ],
    );
}

#[test]
fn a_follower_foresees_and_blames_nobody() {
    let mut world = World::ready(3, None, 0);
    world.observed.follows = true;
    world.lose(2);
    for at_ms in [10_000, 20_000, 60_000] {
        world.observed.now = Instant(at_ms * MS);
        let decision = world.round();
        assert_eq!(decision.actions, [], "only the leader acts");
        let history = decision.history.values().next().unwrap();
        assert_eq!((history.failures, history.not_before), (0, Instant(0)), "{decision}");
    }
    // It becomes the leader, and acts at once.
    world.observed.follows = false;
    world.observed.now = Instant(60_001 * MS);
    let actions = world.round().actions;
    assert!(matches!(actions.first(), Some(Action::Adopt { .. })), "{actions:?}");
}

#[test]
fn a_new_leader_gives_a_layout_that_nobody_was_told_its_whole_time() {
    let mut world = World::new(2, Some(2));
    world.observed.now = Instant(0);
    // The leader made a layout and died before it told anybody.
    world.round();
    world.observed.follows = true;
    for at_ms in [10, 20_000, 40_000] {
        world.observed.now = Instant(at_ms * MS);
        let decision = world.round();
        assert_eq!(decision.actions, [], "{decision}");
        let phase = decision.phases.values().next().unwrap();
        assert!(phase.reason.starts_with("g1: ") && phase.reason.contains("is told"), "{phase:?}");
    }
    world.observed.follows = false;
    world.observed.now = Instant(40_001 * MS);
    let actions = world.round().actions;
    assert!(!actions.is_empty());
    assert!(actions.iter().all(|a| matches!(a, Action::Assign { .. })), "g1 is told: {actions:?}");
}

#[test]
fn whoever_follows_takes_restarted_workers_as_their_leader_does() {
    let mut world = World::ready(2, None, 10_000);
    world.observed.follows = true;
    let told: Vec<_> = (1..=2).map(|number| world.worker(number).pushed.clone()).collect();
    world.connect(1, 2);
    world.connect(2, 2);
    let words = "w1 was started again, w2 was started again";
    world.expect(10_100, &[&format!("m is Loading: {words}; g2 is for the leader to make")]);
    // The leader had not seen them before their new start, and tells them the layout that there is.
    for (number, told) in (1..).zip(told) {
        world.worker(number).pushed = told;
        world.report(number, ShardState::Linking);
    }
    world.expect(10_200, &["m is Loading: g1: w1 links, w2 links"]);
    world.report(1, ShardState::Ready);
    world.report(2, ShardState::Ready);
    world.expect(10_300, &["m is Ready: g1 2x1 on w1, w2"]);
}
