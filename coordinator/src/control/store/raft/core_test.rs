//! Several voters in one thread, on disks and a network that fail as the dice say.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use raft::storage::Storage;
use shoal_protocol::id::{Incarnation, NodeId, Role};

use super::*;
use crate::control::state::{Change, CoordinatorCommand, KeyFingerprint, NodeCommand, Timestamp};

/// What a disk holds.
#[derive(Clone, Default)]
struct Platter {
    snapshot: Snapshot,
    entries: Vec<Entry>,
    hard: HardState,
}

impl Platter {
    fn write(&mut self, write: &Write) {
        if let Some(snapshot) = &write.snapshot {
            self.snapshot = snapshot.clone();
            self.entries.clear();
        }
        if let Some(first) = write.entries.first() {
            self.entries.retain(|entry| entry.index < first.index);
            self.entries.extend_from_slice(&write.entries);
        }
        if let Some(hard) = &write.hard {
            self.hard = hard.clone();
        }
    }

    fn saved(&self) -> Saved {
        Saved {
            hard: self.hard.clone(),
            snapshot: self.snapshot.clone(),
            entries: self.entries.clone(),
        }
    }
}

/// A cluster of voters. Messages travel one at a time, in any order where the dice say so.
struct World {
    voters: BTreeMap<u64, Voter>,
    platters: BTreeMap<u64, Platter>,
    network: VecDeque<Message>,
    /// Those whose messages go nowhere and to whom none come.
    cut: BTreeSet<u64>,
    dice: u64,
    sequence: u64,
    reads: BTreeMap<u64, BTreeMap<u64, u64>>,
    /// Each (term, leader) that was ever seen.
    reigns: BTreeMap<u64, u64>,
    /// Writes of the first voter until it crashes, and whether that one is still done.
    crash: Option<(usize, bool)>,
}

impl World {
    fn new(dice: u64) -> Self {
        let mut world = Self {
            voters: BTreeMap::new(),
            platters: BTreeMap::new(),
            network: VecDeque::new(),
            cut: BTreeSet::new(),
            dice,
            sequence: 0,
            reads: BTreeMap::new(),
            reigns: BTreeMap::new(),
            crash: None,
        };
        let Saved { hard, snapshot, entries } = Voter::found(1).unwrap();
        world.platters.insert(1, Platter { snapshot, entries, hard });
        world.start(1);
        world.voters.get_mut(&1).unwrap().campaign();
        world.settle();
        world
    }

    /// A cluster in which these vote.
    fn of(voters: &[u64], dice: u64) -> Self {
        let mut world = Self::new(dice);
        for id in voters {
            let key = KeyFingerprint([0; 32]);
            world.change(Change::Node(NodeCommand::Enrol { role: Role::Coordinator, key }));
            world.announce(*id);
            if *id != 1 {
                world.start(*id);
            }
        }
        world.set_voters(voters);
        let expected: BTreeSet<u64> = voters.iter().copied().collect();
        world.until("they vote", |world| world.conf_voters() == Some(expected.clone()));
        world
    }

    fn conf_voters(&self) -> Option<BTreeSet<u64>> {
        let conf = self.voters[&self.leader()?].conf();
        conf.voters_outgoing.is_empty().then(|| conf.voters.iter().copied().collect())
    }

    fn draw(&mut self, sides: u64) -> u64 {
        self.dice = mix(self.dice);
        self.dice % sides
    }

    fn start(&mut self, id: u64) {
        let saved = self.platters.entry(id).or_default().saved();
        let dice = self.draw(u64::MAX);
        self.voters.insert(id, Voter::new(id, saved, dice).unwrap());
    }

    /// Starts one as its process does.
    fn restart(&mut self, id: u64) {
        self.start(id);
        if self.voters[&id].is_alone() {
            self.voters.get_mut(&id).unwrap().campaign();
        }
        self.rounds(id);
        if self.voters[&id].is_lost_alone() {
            self.voters.get_mut(&id).unwrap().campaign();
        }
        self.rounds(id);
    }

    fn crash(&mut self, id: u64) {
        self.voters.remove(&id);
    }

    fn leader(&self) -> Option<u64> {
        let leads = self.voters.iter().filter(|(id, v)| v.leads() && !self.cut.contains(id));
        leads.max_by_key(|(_, voter)| voter.term()).map(|(id, _)| *id)
    }

    fn rounds(&mut self, id: u64) {
        let Some(voter) = self.voters.get_mut(&id) else { return };
        while let Some(mut round) = voter.begin().unwrap() {
            self.network.extend(round.send.drain(..));
            let crash = self.crash.as_mut().filter(|_| id == 1 && !round.write.is_empty());
            match crash {
                Some((0, done)) => {
                    if *done {
                        self.platters.get_mut(&id).unwrap().write(&round.write);
                    }
                    return self.crash(id);
                }
                Some((left, _)) => *left -= 1,
                None => {}
            }
            self.platters.get_mut(&id).unwrap().write(&round.write);
            let done = voter.finish(round).unwrap();
            self.network.extend(done.send);
            self.reads.entry(id).or_default().extend(done.reads);
            voter.settle_members();
            if voter.leads() {
                let first = *self.reigns.entry(voter.term()).or_insert(id);
                assert_eq!(first, id, "two lead in term {}", voter.term());
            }
        }
    }

    fn deliver(&mut self) -> bool {
        let Some(message) = self.network.pop_front() else { return false };
        if self.cut.contains(&message.from) || self.cut.contains(&message.to) {
            return true;
        }
        let to = message.to;
        if let Some(voter) = self.voters.get_mut(&to) {
            voter.step(message);
            self.rounds(to);
        }
        true
    }

    fn settle(&mut self) {
        let ids: Vec<u64> = self.voters.keys().copied().collect();
        ids.into_iter().for_each(|id| self.rounds(id));
        while self.deliver() {}
    }

    fn tick(&mut self) {
        let ids: Vec<u64> = self.voters.keys().copied().collect();
        for id in ids {
            let voter = self.voters.get_mut(&id).unwrap();
            voter.tick();
            voter.settle_members();
            self.rounds(id);
        }
        while self.deliver() {}
    }

    /// Lets time pass until something is so: at most 20 s of it.
    fn until(&mut self, what: &str, so: impl Fn(&Self) -> bool) {
        for _ in 0..2000 {
            if so(self) {
                return;
            }
            self.tick();
        }
        panic!("it never was so that {what}; dice {:#x}", self.dice);
    }

    fn command(&mut self, change: Change) -> Command {
        self.sequence += 1;
        Command {
            client: NodeId::coordinator(1),
            incarnation: Incarnation(1),
            sequence: self.sequence,
            at: Timestamp(self.sequence),
            change,
        }
    }

    /// Makes a change and waits until whoever leads has it.
    fn change(&mut self, change: Change) {
        let command = self.command(change);
        self.until("somebody leads", |world| world.leader().is_some());
        let leader = self.leader().unwrap();
        assert!(self.voters.get_mut(&leader).unwrap().propose(&command));
        self.settle();
        self.until("it is made", |world| {
            world.leader().is_some_and(|id| world.voters[&id].state().result_of(&command).is_some())
        });
    }

    fn enrol(&mut self) {
        let key = KeyFingerprint([0; 32]);
        self.change(Change::Node(NodeCommand::Enrol { role: Role::Worker, key }));
    }

    fn announce(&mut self, id: u64) {
        let node = NodeId::coordinator(id as u32);
        let cluster = std::net::SocketAddr::from(([127, 0, 0, 1], 7000 + id as u16));
        let (incarnation, boot, build) = (Incarnation(1), id, "test".to_owned());
        self.change(Change::Coordinator(CoordinatorCommand::Announce {
            node,
            incarnation,
            boot,
            cluster,
            build,
        }));
    }

    fn set_voters(&mut self, voters: &[u64]) {
        let voters = voters.iter().map(|id| NodeId::coordinator(*id as u32)).collect();
        self.change(Change::Coordinator(CoordinatorCommand::SetVoters { voters }));
    }

    fn workers(&self, id: u64) -> usize {
        self.voters[&id].state().nodes.workers().count()
    }

    fn everywhere(&mut self, workers: usize) {
        self.until("all have it", |world| {
            world.voters.keys().all(|id| world.workers(*id) == workers)
        });
    }
}

#[test]
fn one_becomes_three_and_each_has_everything() {
    let mut world = World::of(&[1, 2, 3], 1);
    for _ in 0..5 {
        world.enrol();
    }
    world.everywhere(5);
    let states: Vec<_> = world.voters.values().map(|voter| voter.state().clone()).collect();
    assert!(states.windows(2).all(|pair| pair[0] == pair[1]));
}

/// One becomes three, and is killed before or after each of its writes. It starts again where it cannot be
/// heard: it must not lead alone what the two others lead without it.
#[test]
fn a_founder_that_dies_while_one_becomes_three_never_leads_beside_the_others() {
    let mut deaths = 0;
    for (at, done) in (0..60).flat_map(|at| [(at, false), (at, true)]) {
        let mut world = World::new(900 + at as u64);
        for id in 1..=3 {
            let key = KeyFingerprint([0; 32]);
            world.change(Change::Node(NodeCommand::Enrol { role: Role::Coordinator, key }));
            world.announce(id);
        }
        world.crash = Some((at, done));
        world.start(2);
        world.start(3);
        let voters = (1..=3).map(NodeId::coordinator).collect();
        let command = world.command(Change::Coordinator(CoordinatorCommand::SetVoters { voters }));
        world.voters.get_mut(&1).unwrap().propose(&command);
        world.settle();
        for _ in 0..200 {
            world.tick();
        }
        if world.voters.contains_key(&1) {
            break;
        }
        deaths += 1;
        world.crash = None;
        world.cut.insert(1);
        world.restart(1);
        for _ in 0..300 {
            world.tick();
        }
        world.cut.clear();
        world.enrol();
        world.until("all three vote", |world| {
            world.conf_voters().is_some_and(|voters| voters.len() == 3)
                || world.voters[&1].state().coordinators.voters().len() == 1
        });
        let leader = world.leader().unwrap();
        world.until("all agree", |world| {
            let members = world.voters[&leader].conf().clone();
            let all = members.voters.iter().chain(&members.learners);
            let mut states = all.map(|id| world.voters[id].state());
            let first = states.next().unwrap();
            states.all(|state| state == first)
        });
    }
    assert!(deaths > 8, "only {deaths} writes were there to die at");
}

/// Three become one, and the operator is told so and ends the two others. The one that is left is killed at
/// once: it must find itself alone again, or the cluster is lost.
#[test]
fn one_that_was_left_alone_leads_alone_after_a_crash() {
    for dice in 300..320 {
        let mut world = World::of(&[1, 2, 3], dice);
        world.set_voters(&[1]);
        for id in [2, 3] {
            let node = NodeId::coordinator(id);
            world.change(Change::Coordinator(CoordinatorCommand::Remove { node }));
        }
        world.until("it is alone", |world| world.voters[&1].is_alone());
        for id in 1..=3 {
            world.crash(id);
        }
        world.restart(1);
        assert!(world.voters[&1].leads(), "dice {dice}");
        world.enrol();
    }
}

#[test]
fn what_was_made_outlives_the_leader_and_a_restart_of_all() {
    let mut world = World::of(&[1, 2, 3], 2);
    world.enrol();
    let first = world.leader().unwrap();
    world.crash(first);
    world.until("another leads", |world| world.leader().is_some_and(|id| id != first));
    world.enrol();
    world.start(first);
    world.everywhere(2);
    for id in 1..=3 {
        world.crash(id);
    }
    for id in 1..=3 {
        world.start(id);
    }
    world.everywhere(2);
}

#[test]
fn a_minority_takes_no_change_and_a_leader_that_is_cut_off_steps_down() {
    let mut world = World::of(&[1, 2, 3], 3);
    world.enrol();
    let old = world.leader().unwrap();
    world.cut.insert(old);
    let key = KeyFingerprint([9; 32]);
    let command = world.command(Change::Node(NodeCommand::Enrol { role: Role::Admin, key }));
    world.voters.get_mut(&old).unwrap().propose(&command);
    world.until("it steps down", |world| !world.voters[&old].leads());
    world.until("another leads", |world| world.leader().is_some_and(|id| id != old));
    world.enrol();
    assert_eq!(world.workers(old), 1, "it made a change alone");
    world.cut.clear();
    world.everywhere(2);
    assert!(world.voters[&1].state().result_of(&command).is_none());
}

#[test]
fn a_read_is_answered_by_a_majority_alone() {
    let mut world = World::of(&[1, 2, 3], 4);
    let old = world.leader().unwrap();
    let follower = (1..=3).find(|id| *id != old).unwrap();
    for (number, id) in [(7, old), (8, follower)] {
        world.voters.get_mut(&id).unwrap().read(number);
        world.settle();
        let applied = world.voters[&id].applied();
        assert!(world.reads[&id][&number] <= applied, "{id}");
    }
    world.cut.insert(old);
    world.voters.get_mut(&old).unwrap().read(9);
    for _ in 0..200 {
        world.tick();
    }
    assert!(!world.reads[&old].contains_key(&9), "a leader that is cut off answered a read");
}

/// Each counts its own questions from one, so they ask with the same numbers all the time.
#[test]
fn reads_of_several_with_the_same_number_are_all_answered() {
    let mut world = World::of(&[1, 2, 3], 14);
    for id in 1..=3 {
        world.voters.get_mut(&id).unwrap().read(1);
    }
    world.settle();
    for id in 1..=3 {
        assert!(world.reads[&id].contains_key(&1), "{id} was not answered");
    }
}

#[test]
fn one_who_was_long_away_takes_a_snapshot() {
    let mut world = World::of(&[1, 2, 3], 5);
    let away = (1..=3).find(|id| Some(*id) != world.leader()).unwrap();
    world.crash(away);
    for _ in 0..COMPACT_EVERY + KEEP_ENTRIES as usize + 10 {
        world.enrol();
    }
    let leader = world.leader().unwrap();
    assert!(world.voters[&leader].node.store().first_index().unwrap() > 300, "not compacted");
    world.start(away);
    world.everywhere(COMPACT_EVERY + KEEP_ENTRIES as usize + 10);
}

#[test]
fn a_coordinator_is_replaced_and_the_leader_can_leave() {
    let mut world = World::of(&[1, 2, 3], 6);
    let key = KeyFingerprint([0; 32]);
    world.change(Change::Node(NodeCommand::Enrol { role: Role::Coordinator, key }));
    world.announce(4);
    world.start(4);
    let leader = world.leader().unwrap();
    let mut voters: Vec<u64> = (1..=4).filter(|id| *id != leader).collect();
    world.set_voters(&voters);
    let expected: BTreeSet<u64> = voters.drain(..).collect();
    world.until("it has left", |world| world.conf_voters() == Some(expected.clone()));
    let node = NodeId::coordinator(leader as u32);
    world.change(Change::Coordinator(CoordinatorCommand::Remove { node }));
    world.until("it is gone", |world| {
        let now = world.leader().unwrap();
        world.voters[&now].conf().learners.is_empty()
    });
    world.crash(leader);
    world.enrol();
    world.everywhere(1);
}

/// Messages are lost, doubled and out of order, voters crash and come back, links are cut: never two
/// leaders of one term, never a change lost that was made, and after the faults everybody agrees.
#[test]
fn nothing_is_lost_whatever_the_network_does() {
    for seed in 0..40 {
        let mut world = World::of(&[1, 2, 3], 100 + seed);
        let mut offered = Vec::new();
        for _ in 0..600 {
            let id = 1 + world.draw(3);
            match world.draw(40) {
                0 => world.crash(id),
                1..=3 if !world.voters.contains_key(&id) => world.start(id),
                4 => drop(world.cut.insert(id)),
                5..=8 => drop(world.cut.remove(&id)),
                9..=12 => {
                    let key = KeyFingerprint([0; 32]);
                    let command =
                        world.command(Change::Node(NodeCommand::Enrol { role: Role::Worker, key }));
                    if let Some(voter) = world.voters.get_mut(&id)
                        && voter.propose(&command)
                    {
                        offered.push(command);
                        world.rounds(id);
                    }
                }
                13..=20 => {
                    if let Some(voter) = world.voters.get_mut(&id) {
                        voter.tick();
                        world.rounds(id);
                    }
                }
                21 => drop(world.network.pop_front()),
                22 => {
                    let copy = world.network.front().cloned();
                    world.network.extend(copy);
                }
                23..=25 => {
                    if let Some(message) = world.network.pop_front() {
                        world.network.push_back(message);
                    }
                }
                _ => drop(world.deliver()),
            }
        }
        let highest = world.voters.values().map(Voter::applied).max().unwrap_or(0);
        world.cut.clear();
        for id in 1..=3 {
            if !world.voters.contains_key(&id) {
                world.start(id);
            }
        }
        world.enrol();
        world.until("all agree", |world| {
            let mut states = world.voters.values().map(|voter| voter.state());
            let first = states.next().unwrap();
            states.all(|state| state == first)
        });
        let leader = world.leader().unwrap();
        assert!(world.voters[&leader].applied() >= highest, "seed {seed}: it went back");
        assert!(world.workers(leader) <= offered.len() + 1, "seed {seed}: made twice");
    }
}

#[test]
fn the_same_dice_give_the_same_history() {
    let run = |dice| {
        let mut world = World::of(&[1, 2, 3], dice);
        let first = world.leader().unwrap();
        world.crash(first);
        let mut ticks = 0;
        while world.leader().is_none() {
            world.tick();
            ticks += 1;
        }
        (first, world.leader(), ticks, world.reigns)
    };
    for dice in 50..60 {
        assert_eq!(run(dice), run(dice));
    }
    assert!((50..60).any(|dice| run(dice) != run(dice + 100)), "the dice do nothing");
}
