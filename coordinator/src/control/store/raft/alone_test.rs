//! A log that three had, in the hands of one.

use raft::prelude::{Entry, EntryType};
use shoal_protocol::id::Role;

use super::*;
use crate::control::state::{KeyFingerprint, NodeCommand};
use crate::control::store::raft::core::Voter;

const C: [NodeId; 3] = [NodeId::coordinator(1), NodeId::coordinator(2), NodeId::coordinator(3)];

/// A log of `C` in `epoch`, with `workers` workers, of which the last is in an entry of which nobody
/// here has heard that it is committed.
fn log(epoch: u64, workers: usize) -> Saved {
    let Saved { hard, snapshot, .. } = Voter::found(1).unwrap();
    let enrol = |role, n: u8| NodeCommand::Enrol { role, key: KeyFingerprint([n; 32]) };
    let mut changes: Vec<Change> =
        C.iter().zip(1..).map(|(c, n)| Change::Node(enrol(c.role, n))).collect();
    changes.extend(C.map(|node| {
        Change::Coordinator(CoordinatorCommand::Announce {
            node,
            incarnation: Incarnation(1),
            boot: 1,
            cluster: ([127, 0, 0, 1], 4000 + node.number as u16).into(),
            build: String::new(),
        })
    }));
    let voters = C.into_iter().collect();
    changes.push(Change::Coordinator(CoordinatorCommand::SetVoters { voters }));
    changes.extend((0..workers).map(|n| Change::Node(enrol(Role::Worker, 100 + n as u8))));
    let entry = |(change, index): (Change, u64)| {
        let (client, incarnation) = (C[0], Incarnation(1));
        let command = Command { client, incarnation, sequence: index, at: Timestamp(9), change };
        let data = postcard::to_stdvec(&command).unwrap();
        Entry { index, term: epoch, data, ..Default::default() }
    };
    let mut entries: Vec<Entry> = changes.into_iter().zip(2..).map(entry).collect();
    // The algorithm's own are among them.
    let last = entries.len() as u64 + 2;
    let mut own = Entry { index: last, term: epoch, ..Default::default() };
    own.set_entry_type(EntryType::EntryConfChangeV2);
    entries.push(own);
    Saved { hard: HardState { term: epoch, commit: last - 2, ..hard }, snapshot, entries }
}

fn alone(saved: &Saved, give_up: &[NodeId]) -> Result<(Write, u64), AloneError> {
    Heritage::of(saved)?.alone(C[2], Incarnation(7), Timestamp(10), give_up)
}

/// The voter that finds this in its file.
fn started(write: Write) -> Voter {
    let saved = Saved {
        hard: write.hard.unwrap(),
        snapshot: write.snapshot.unwrap(),
        entries: write.entries,
    };
    let mut voter = Voter::new(3, saved, 1).unwrap();
    assert!(voter.is_alone());
    voter.campaign();
    while let Some(round) = voter.begin().unwrap() {
        voter.finish(round).unwrap();
    }
    voter
}

#[test]
fn one_of_three_leads_alone_with_all_that_it_had_and_above_all_epochs() {
    let (write, epoch) = alone(&log(41, 5), &C[..2]).unwrap();
    let voter = started(write);
    assert!(voter.leads());
    assert_eq!(epoch, 1 << 32);
    assert!(voter.term() > epoch, "it is elected above it");
    let state = voter.state();
    assert_eq!(state.nodes.workers().count(), 5, "the last entry counts too");
    assert_eq!(*state.coordinators.voters(), BTreeSet::from([C[2]]));
    for lost in &C[..2] {
        assert!(state.nodes.get(*lost).is_none() && state.nodes.was_given(*lost));
        assert!(state.coordinators.get(*lost).is_none());
    }
    // Whoever joined without its knowledge has a number that is not given again.
    assert!(state.nodes.was_given(NodeId::coordinator(3 + NUMBERS_SKIPPED)));
    assert!(state.nodes.was_given(NodeId::worker(5 + NUMBERS_SKIPPED)));
}

#[test]
fn a_second_time_outranks_the_first() {
    let (_, first) = alone(&log(41, 0), &C[..2]).unwrap();
    // Four thousand elections later.
    let (_, second) = alone(&log(first + 4000, 0), &C[..2]).unwrap();
    assert_eq!((first, second), (1 << 32, 2 << 32));
}

#[test]
fn everybody_else_must_be_named_and_nobody_more() {
    let check = |give_up: &[NodeId], words: &str| {
        let error = alone(&log(3, 0), give_up).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    check(&[], "c1,c2 would be given up, and nobody was said");
    check(&C[..1], "c1,c2 would be given up, and c1 was said");
    check(&C, "c1,c2,c3 was said");
}

#[test]
fn who_has_no_say_or_no_log_or_nobody_beside_it_is_refused() {
    let heritage = Heritage::of(&log(3, 0)).unwrap();
    let stranger = heritage.others(NodeId::coordinator(4)).unwrap_err().to_string();
    assert!(stranger.contains("c4 does not vote"), "{stranger}");
    let (write, _) = alone(&log(3, 0), &C[..2]).unwrap();
    let again =
        Saved { hard: write.hard.unwrap(), snapshot: write.snapshot.unwrap(), entries: Vec::new() };
    let already = Heritage::of(&again).unwrap().others(C[2]).unwrap_err().to_string();
    assert!(already.contains("c3 is the only coordinator already"), "{already}");
    let nothing =
        Saved { hard: HardState::default(), snapshot: Default::default(), entries: Vec::new() };
    assert!(matches!(Heritage::of(&nothing), Err(AloneError::NoLog)));
}
