//! What a copy of the log does with what it hears: a table of everything that etcd can say.

use shoal_protocol::id::Role;

use super::*;
use crate::control::state::{KeyFingerprint, NodeCommand};

const C1: Proposer = (NodeId::coordinator(1), Incarnation(1));
const C2: Proposer = (NodeId::coordinator(2), Incarnation(1));

fn enrol() -> Change {
    Change::Node(NodeCommand::Enrol { role: Role::Worker, key: KeyFingerprint([0; 32]) })
}

/// A log of `n` commands by C1 at seconds 1 to n, as it stands in etcd.
fn log(n: u64) -> Vec<Vec<u8>> {
    let mut tail = Tail::new(ClusterState::default(), 0);
    let entry = |i: u64| {
        let staged = tail.stage(C1, Timestamp(i), [i as u8; 16], enrol()).unwrap();
        let bytes = staged.bytes.clone();
        tail.settle(staged, i as i64);
        bytes
    };
    (1..=n).map(entry).collect()
}

fn command(log: &[Vec<u8>], index: u64) -> Heard {
    Heard::Command { index, bytes: log[index as usize - 1].clone() }
}

fn at(log: &[Vec<u8>], applied: u64) -> Tail {
    let mut tail = Tail::new(ClusterState::default(), 0);
    for index in 1..=applied {
        tail.hear(&command(log, index)).unwrap();
    }
    tail
}

#[test]
fn what_is_heard_is_applied_known_or_a_reason_to_load_again() {
    let log = log(5);
    let gap = |to| Err(Lost::Gap { from: 3, to });
    for (heard, expected, applied) in [
        (command(&log, 4), Ok(()), 4),
        (command(&log, 3), Ok(()), 3),
        (command(&log, 1), Ok(()), 3),
        (command(&log, 5), gap(5), 3),
        (Heard::Head { index: 3, revision: 9 }, Ok(()), 3),
        (Heard::Head { index: 2, revision: 8 }, Ok(()), 3),
        (Heard::Head { index: 4, revision: 10 }, gap(4), 3),
        (Heard::Gone { index: 3 }, Ok(()), 3),
        (Heard::Gone { index: 4 }, gap(4), 3),
    ] {
        let mut tail = at(&log, 3);
        assert_eq!(tail.hear(&heard), expected, "{heard:?}");
        assert_eq!(tail.applied(), applied, "{heard:?}");
        assert_eq!(tail.state().nodes.workers().count() as u64, applied, "{heard:?}");
    }
}

#[test]
fn a_head_that_is_not_ours_is_never_compared() {
    let log = log(4);
    let mut tail = at(&log, 3);
    tail.hear(&Heard::Head { index: 3, revision: 30 }).unwrap();
    assert_eq!(tail.head(), 30);
    tail.hear(&Heard::Head { index: 2, revision: 20 }).unwrap();
    assert_eq!(tail.head(), 30);
    // An append at command 4 with the revision of head 3 fails in etcd, as it should.
    tail.hear(&command(&log, 4)).unwrap();
    assert_eq!(tail.head(), 30);
    tail.hear(&Heard::Head { index: 4, revision: 40 }).unwrap();
    assert_eq!(tail.head(), 40);
}

#[test]
fn a_damaged_command_is_named_and_changes_nothing() {
    let log = log(4);
    let sound = &log[3];
    for bit in 0..sound.len() * 8 {
        let mut bytes = sound.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let mut tail = at(&log, 3);
        let lost = tail.hear(&Heard::Command { index: 4, bytes }).unwrap_err();
        assert!(matches!(lost, Lost::Entry { index: 4, .. }), "bit {bit}: {lost}");
        assert_eq!(tail.applied(), 3);
    }
    for len in 0..sound.len() {
        let heard = Heard::Command { index: 4, bytes: sound[..len].to_vec() };
        assert!(at(&log, 3).hear(&heard).is_err(), "{len} bytes");
    }
}

#[test]
fn a_clock_that_is_behind_does_not_turn_time_back() {
    let log = log(3);
    let mut tail = at(&log, 3);
    let staged = tail.stage(C2, Timestamp(1), [9; 16], enrol()).unwrap();
    tail.settle(staged, 4);
    let joined: Vec<_> = tail.state().nodes.workers().map(|(_, node)| node.joined).collect();
    assert!(joined.is_sorted(), "{joined:?}");
}

#[test]
fn a_lost_answer_is_found_in_the_log_or_in_the_snapshot_and_only_there() {
    let before = log(3);
    let stage = |tail: &Tail| tail.stage(C2, Timestamp(4), [9; 16], enrol()).unwrap();
    // It stands in the log.
    let mut tail = at(&before, 3);
    let staged = stage(&tail);
    tail.await_answer(&staged);
    assert_eq!(tail.take_answer(), None);
    tail.hear(&Heard::Command { index: 4, bytes: staged.bytes.clone() }).unwrap();
    let effects = vec![Effect::NodeAdded { node: NodeId::worker(4) }];
    assert_eq!(tail.take_answer(), Some(effects.clone()));
    assert_eq!(tail.take_answer(), None);
    // Another's command with the same words stands there.
    let mut tail = at(&before, 3);
    tail.await_answer(&stage(&tail));
    let other = tail.stage(C2, Timestamp(4), [8; 16], enrol()).unwrap();
    tail.hear(&Heard::Command { index: 4, bytes: other.bytes }).unwrap();
    assert_eq!(tail.take_answer(), None);
    // It is in a snapshot already.
    let mut tail = at(&before, 3);
    let staged = stage(&tail);
    tail.await_answer(&staged);
    let mut loaded = at(&before, 3);
    loaded.settle(staged, 4);
    tail.replace(loaded).unwrap();
    assert_eq!(tail.take_answer(), Some(effects));
}

#[test]
fn a_log_that_is_shorter_than_it_was_is_not_believed() {
    let log = log(3);
    let mut tail = at(&log, 3);
    let before = Arc::clone(tail.state());
    assert_eq!(tail.replace(at(&log, 2)), Err(Lost::WentBack { applied: 3, found: 2 }));
    assert_eq!((tail.applied(), tail.state()), (3, &before));
    assert_eq!(tail.replace(at(&log, 3)), Ok(()));
}
