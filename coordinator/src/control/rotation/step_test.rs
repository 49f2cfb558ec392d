use shoal_protocol::id::{Incarnation, Role};
use shoal_protocol::trust::{PAST_MAX, Trust, fingerprint};

use super::*;
use crate::control::state::{
    Change, Command, CoordinatorCommand, Effect, KeyFingerprint, NodeCommand, Refusal,
    VersionCommand, snapshot,
};

const C: [NodeId; 3] = [NodeId::coordinator(1), NodeId::coordinator(2), NodeId::coordinator(3)];
const W: [NodeId; 3] = [NodeId::worker(1), NodeId::worker(2), NodeId::worker(3)];

/// More rounds than any rotation here needs.
const ROUNDS_MAX: u32 = 40;

/// A worker with what it keeps on its disk.
#[derive(Clone, Debug)]
struct Actor {
    connected: bool,
    trust: Trust,
    shows: Vec<u8>,
}

/// Three coordinators and three workers that do what the shells do.
struct World {
    state: ClusterState,
    workers: BTreeMap<NodeId, Actor>,
    /// The coordinators that run.
    running: BTreeSet<NodeId>,
    /// What the leader has heard: lost with it.
    seen: BTreeMap<NodeId, SeenWorker>,
    now: Timestamp,
    sequence: u64,
    cas: u8,
    settled: bool,
}

impl World {
    fn new(protocols: [u16; 3]) -> Self {
        let mut world = Self {
            state: ClusterState::default(),
            workers: BTreeMap::new(),
            running: C.into(),
            seen: BTreeMap::new(),
            now: Timestamp(1_000_000),
            sequence: 0,
            cas: 1,
            settled: true,
        };
        let key = KeyFingerprint([1; 32]);
        for role in [Role::Coordinator; 3].into_iter().chain([Role::Worker; 3]) {
            world.make(Change::Node(NodeCommand::Enrol { role, key }));
        }
        for (node, cluster) in C.into_iter().zip(["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"]) {
            let cluster = cluster.parse().unwrap();
            let (incarnation, build) = (Incarnation(1), "test".to_owned());
            let announce =
                CoordinatorCommand::Announce { node, incarnation, boot: 7, cluster, build };
            world.make(Change::Coordinator(announce));
        }
        let heard = C.into_iter().map(|node| (node, 7)).collect();
        world.make(Change::Version(VersionCommand::Raise { to: 2, heard }));
        let voters = C.into();
        world.make(Change::Coordinator(CoordinatorCommand::SetVoters { voters }));
        for (node, protocol) in W.into_iter().zip(protocols) {
            let (incarnation, build) = (Incarnation(1), "test".to_owned());
            let start = VersionCommand::Start { node, incarnation, build, protocol };
            world.make(Change::Version(start));
            let trust = Trust { cas: vec![vec![1]], ..Trust::default() };
            world.workers.insert(node, Actor { connected: true, trust, shows: vec![1] });
        }
        world
    }

    fn propose(&mut self, change: Change) -> Result<Vec<Effect>, Refusal> {
        self.sequence += 1;
        let (sequence, at) = (self.sequence, self.now);
        let (client, incarnation) = (C[0], Incarnation(1));
        self.state.apply(&Command { client, incarnation, sequence, at, change })
    }

    fn make(&mut self, change: Change) {
        let made = self.propose(change.clone());
        assert!(made.is_ok(), "{change:?}: {made:?}");
    }

    fn begin(&mut self, skip_absent: bool) -> Result<Vec<Effect>, Refusal> {
        let present = vec![self.cas];
        let next = vec![self.cas + 1];
        let (introduction, maker) = (vec![self.cas + 1, self.cas], C[0]);
        let begin = AuthorityCommand::Begin { present, next, introduction, maker, skip_absent };
        let begun = self.propose(Change::Authority(begin));
        self.cas += u8::from(begun.is_ok());
        begun
    }

    fn rotation(&self) -> Option<&Rotation> {
        self.state.authorities.rotation()
    }

    fn verdict(&self) -> Verdict {
        let stands = self.rotation().map(|rotation| rotation.signs.unwrap_or(rotation.begun));
        let seen_s = stands.map_or(0, |since| self.now.0.saturating_sub(since.0));
        self.verdict_after(Duration::from_secs(seen_s))
    }

    fn verdict_after(&self, seen_for: Duration) -> Verdict {
        let entitled = self.state.coordinators.voters();
        let (state, workers, now, settled) = (&self.state, &self.seen, self.now, self.settled);
        View { state, entitled, workers, now, seen_for, settled }.decide()
    }

    /// What each node does by itself.
    fn act(&mut self) {
        let Some(trust) = self.state.authorities.trust() else { return };
        let signing = trust.cas[0].clone();
        for (node, actor) in &mut self.workers {
            if actor.connected {
                if trust.revision > actor.trust.revision {
                    actor.trust = trust.clone();
                }
                actor.shows.clone_from(&signing);
                let trusts = actor.trust.fingerprints();
                let shows = Some(fingerprint(&actor.shows));
                self.seen.insert(*node, SeenWorker { connected: true, trusts, shows });
            } else if let Some(seen) = self.seen.get_mut(node) {
                seen.connected = false;
            }
        }
        let Some(rotation) = self.rotation().cloned() else { return };
        let (ca, anybody) =
            (rotation.ca(), rotation.holding.iter().any(|c| self.running.contains(c)));
        let shows = rotation.signs.is_some();
        let steps = [(CaStep::Trusts, true), (CaStep::Holds, anybody), (CaStep::Shows, shows)];
        for (step, reached) in steps {
            let nodes = self.running.clone();
            if reached && !nodes.is_empty() {
                let reached = AuthorityCommand::Reached { ca, step, nodes };
                self.make(Change::Authority(reached));
            }
        }
    }

    /// What the leader does; whether the rotation is over.
    fn lead(&mut self) -> bool {
        for command in self.verdict().commands {
            if matches!(command, AuthorityCommand::Sign { .. }) {
                self.check_everybody_believes();
            }
            self.make(Change::Authority(command));
        }
        self.rotation().is_none()
    }

    fn check_everybody_believes(&self) {
        let next = &self.rotation().unwrap().next;
        for (node, actor) in self.workers.iter().filter(|(_, actor)| actor.connected) {
            assert!(actor.trust.cas.contains(next), "{node} does not believe what is signed");
        }
    }

    /// The leader dies, or all of them do: what is in the state stays, what was heard does not.
    fn crash(&mut self) {
        self.state = snapshot::decode(&snapshot::encode(&self.state).unwrap()).unwrap();
        self.seen.clear();
    }

    fn run(&mut self) {
        for _ in 0..ROUNDS_MAX {
            self.act();
            if self.lead() {
                return;
            }
            self.now.0 += 1;
        }
        panic!("it does not end: {:?}", self.verdict());
    }
}

#[test]
fn a_rotation_goes_on_from_a_crash_after_every_command() {
    for crash_after in 0..30 {
        let mut world = World::new([2; 3]);
        world.begin(false).unwrap();
        let begun = world.sequence;
        for _ in 0..ROUNDS_MAX {
            if world.sequence >= begun + crash_after {
                world.crash();
            }
            world.act();
            if world.lead() {
                break;
            }
        }
        assert!(world.rotation().is_none(), "crashed after {crash_after}: {:?}", world.verdict());
        let trust = world.state.authorities.trust().unwrap();
        assert_eq!(trust.cas, [vec![2]], "the old one has left");
        assert_eq!(trust.lineage, [vec![2, 1], vec![1]], "and leads to the new one");
    }
}

#[test]
fn nothing_is_signed_before_everybody_who_is_there_believes_it() {
    let mut world = World::new([2; 3]);
    world.begin(false).unwrap();
    world.act();
    // It is there and has not answered yet, for however long.
    world.seen.get_mut(&W[1]).unwrap().trusts = vec![fingerprint(&[1])];
    world.seen.get_mut(&W[1]).unwrap().shows = Some(fingerprint(&[1]));
    for _ in 0..3 {
        for command in world.verdict().commands {
            assert!(matches!(command, AuthorityCommand::Reached { .. }), "{command:?}");
            world.make(Change::Authority(command));
        }
        world.now = world.now + Duration::from_secs(3600);
    }
    assert_eq!(world.verdict().waits_for, [W[1]]);
    assert!(world.rotation().unwrap().signs.is_none());
    world.run();
}

#[test]
fn a_coordinator_that_is_off_is_waited_for_and_then_not() {
    let mut world = World::new([2; 3]);
    world.running.remove(&C[2]);
    world.begin(false).unwrap();
    let begun = world.now;
    while world.rotation().unwrap().signs.is_none() {
        world.act();
        assert!(!world.lead());
        world.now.0 += 1;
    }
    assert!(world.now >= begun + COORDINATOR_PATIENCE);
    // Of three one is not most: then nobody but the maker would have the key.
    let mut world = World::new([2; 3]);
    world.running = [C[0]].into();
    world.begin(false).unwrap();
    for _ in 0..ROUNDS_MAX * 10 {
        world.act();
        assert!(!world.lead());
        world.now.0 += 1;
    }
    assert!(world.rotation().unwrap().signs.is_none());
    assert_eq!(world.verdict().waits_for, [C[1], C[2]]);
}

#[test]
fn how_long_a_coordinator_is_waited_for_does_not_hang_on_whose_clock_is_right() {
    let mut world = World::new([2; 3]);
    world.running.remove(&C[2]);
    world.begin(false).unwrap();
    world.act();
    world.lead();
    let begun = world.now;
    let signs = |world: &World, seen_for| {
        let commands = world.verdict_after(seen_for).commands;
        commands.iter().any(|command| matches!(command, AuthorityCommand::Sign { .. }))
    };
    // An hour behind whoever led before, and an hour ahead.
    for now in [Timestamp(begun.0 - 3600), begun + Duration::from_secs(3600)] {
        world.now = now;
        assert!(!signs(&world, COORDINATOR_PATIENCE - Duration::from_secs(1)), "{now:?}");
        assert!(signs(&world, COORDINATOR_PATIENCE), "{now:?}");
    }
}

#[test]
fn a_worker_that_is_off_keeps_the_old_ca_for_a_day_unless_it_is_removed_or_skipped() {
    let off = |skip_absent| {
        let mut world = World::new([2; 3]);
        world.workers.get_mut(&W[2]).unwrap().connected = false;
        world.begin(skip_absent).unwrap();
        for _ in 0..ROUNDS_MAX {
            world.act();
            world.lead();
            world.now.0 += 1;
        }
        world
    };
    let mut world = off(false);
    let signs = world.rotation().unwrap().signs.unwrap();
    assert_eq!(world.verdict().waits_for, [W[2]]);
    world.now = Timestamp(signs.0 + LEAVING_MAX.as_secs() - 1);
    assert!(!world.lead());
    world.now.0 += 1;
    assert!(world.lead(), "a day has passed");

    let mut world = off(false);
    world.make(Change::Node(NodeCommand::Remove { node: W[2] }));
    assert!(world.lead(), "a removed one does not count");

    let mut world = off(false);
    let ca = world.rotation().unwrap().ca();
    world.make(Change::Authority(AuthorityCommand::SkipAbsent { ca }));
    assert!(world.lead(), "it was said not to wait");
    assert!(off(true).rotation().is_none());
}

#[test]
fn a_worker_that_was_off_is_heard_as_soon_as_it_is_back() {
    let mut world = World::new([2; 3]);
    world.workers.get_mut(&W[2]).unwrap().connected = false;
    world.begin(false).unwrap();
    for _ in 0..ROUNDS_MAX {
        world.act();
        world.lead();
    }
    assert!(world.rotation().is_some());
    world.workers.get_mut(&W[2]).unwrap().connected = true;
    world.run();
}

#[test]
fn a_rotation_whose_key_nobody_has_any_more_is_given_up() {
    let mut world = World::new([2; 3]);
    world.begin(false).unwrap();
    let voters = [C[1]].into();
    world.make(Change::Coordinator(CoordinatorCommand::SetVoters { voters }));
    world.make(Change::Coordinator(CoordinatorCommand::Remove { node: C[0] }));
    let ca = world.rotation().unwrap().ca();
    assert_eq!(world.verdict().commands, [AuthorityCommand::Abandon { ca }]);
    assert!(world.lead());
    let trust = world.state.authorities.trust().unwrap();
    assert_eq!((trust.revision, trust.cas), (2, vec![vec![1]]));
    // And another one may begin.
    world.cas = 1;
    world.begin(false).unwrap();
}

#[test]
fn an_older_worker_holds_a_rotation_back_by_name() {
    let mut world = World::new([2, 1, 2]);
    let refused = world.begin(false).unwrap_err();
    assert!(matches!(&refused, Refusal::HeldBack { by, .. } if by == &[W[1]]), "{refused:?}");
    assert!(refused.to_string().contains("w2"), "{refused}");
    assert!(world.state.authorities.is_empty());
}

#[test]
fn a_step_of_another_rotation_changes_nothing() {
    let mut world = World::new([2; 3]);
    let stale = |world: &mut World, command: AuthorityCommand| {
        let before = world.state.authorities.clone();
        assert_eq!(world.propose(Change::Authority(command)), Err(Refusal::StaleRotation));
        assert_eq!(world.state.authorities, before);
    };
    let of = |ca: u8| fingerprint(&[ca]);
    stale(&mut world, AuthorityCommand::Sign { ca: of(2) });
    world.begin(false).unwrap();
    assert_eq!(world.begin(false), Err(Refusal::RotationUnderWay));
    for command in [
        AuthorityCommand::Sign { ca: of(3) },
        AuthorityCommand::Retire { ca: of(2) },
        AuthorityCommand::Abandon { ca: of(1) },
        AuthorityCommand::SkipAbsent { ca: of(9) },
    ] {
        stale(&mut world, command);
    }
    world.make(Change::Authority(AuthorityCommand::Sign { ca: of(2) }));
    stale(&mut world, AuthorityCommand::Abandon { ca: of(2) });
}

#[test]
fn one_rotation_follows_another_and_the_past_is_bounded() {
    let mut world = World::new([2; 3]);
    for turn in 1..=PAST_MAX + 2 {
        world.begin(false).unwrap();
        world.run();
        let trust = world.state.authorities.trust().unwrap();
        assert_eq!(trust.check(), Ok(()));
        assert_eq!(trust.cas, [vec![world.cas]]);
        assert_eq!(trust.lineage.len(), 2 * turn.min(PAST_MAX));
    }
    // A CA that has left does not come back.
    world.cas = 3;
    assert_eq!(world.begin(false), Err(Refusal::StaleRotation));
}

#[test]
fn a_new_leader_waits_for_the_workers_that_are_on_their_way_to_it() {
    let mut world = World::new([2; 3]);
    world.begin(false).unwrap();
    world.act();
    // All that workers said was lost before it was written down, and none of them is here yet.
    world.crash();
    world.settled = false;
    assert_eq!(world.verdict().commands, []);
    world.settled = true;
    let ca = world.rotation().unwrap().ca();
    assert_eq!(world.verdict().commands, [AuthorityCommand::Sign { ca }], "they are off");
    world.settled = false;
    world.act();
    world.lead();
    assert_eq!(world.verdict().commands, []);
    world.settled = true;
    world.run();
}

/// Takes its vote, and removes it.
fn remove(world: &mut World, node: NodeId) {
    let voters = [C[0]].into();
    world.make(Change::Coordinator(CoordinatorCommand::SetVoters { voters }));
    world.make(Change::Coordinator(CoordinatorCommand::Remove { node }));
    world.running.remove(&node);
}

#[test]
fn what_a_coordinator_has_that_is_removed_while_the_key_spreads_never_signs() {
    for reported in [false, true] {
        let mut world = World::new([2; 3]);
        world.begin(false).unwrap();
        if reported {
            world.act();
        }
        let ca = world.rotation().unwrap().ca();
        // It may have been handed the key a moment ago.
        remove(&mut world, C[2]);
        world.crash();
        let sign = Change::Authority(AuthorityCommand::Sign { ca });
        assert_eq!(world.propose(sign), Err(Refusal::StaleRotation), "it was on its way");
        world.run();
        assert_eq!(world.state.authorities.trust().unwrap().cas, [vec![1]], "it was given up");
        assert!(world.state.authorities.again());
        // What comes next is another CA.
        let next = vec![9];
        let (introduction, maker) = (vec![9, 1], C[0]);
        let begin = AuthorityCommand::Begin {
            present: vec![1],
            next,
            introduction,
            maker,
            skip_absent: false,
        };
        world.make(Change::Authority(begin));
        assert!(!world.state.authorities.again(), "one is enough");
        world.run();
        assert_eq!(world.state.authorities.trust().unwrap().cas, [vec![9]]);
    }
}

#[test]
fn another_rotation_follows_where_a_coordinator_is_removed_while_the_old_ca_leaves() {
    let mut world = World::new([2; 3]);
    world.workers.get_mut(&W[2]).unwrap().connected = false;
    world.begin(false).unwrap();
    for _ in 0..ROUNDS_MAX {
        world.act();
        world.lead();
    }
    assert!(world.rotation().unwrap().signs.is_some());
    remove(&mut world, C[2]);
    assert!(world.state.authorities.again());
    world.workers.get_mut(&W[2]).unwrap().connected = true;
    world.run();
    world.crash();
    assert!(world.state.authorities.again(), "it has the key of the one that signs");
    world.begin(false).unwrap();
    assert!(!world.state.authorities.again());
    world.run();
    assert_eq!(world.state.authorities.trust().unwrap().cas, [vec![3]]);
    // A worker has no key.
    world.begin(false).unwrap();
    world.make(Change::Node(NodeCommand::Remove { node: W[2] }));
    assert!(!world.state.authorities.again());
}

#[test]
fn a_key_that_was_received_of_the_old_ca_is_none_of_the_one_that_signs() {
    let mut world = World::new([2; 3]);
    world.running.remove(&C[2]);
    world.begin(false).unwrap();
    while world.rotation().unwrap().signs.is_none() {
        world.act();
        world.lead();
        world.now.0 += 1;
    }
    let holds = |world: &World| world.state.coordinators.get(C[2]).unwrap().holds_key;
    let received = || Change::Coordinator(CoordinatorCommand::KeyReceived { node: C[2] });
    // It was on its way when the other one began to sign.
    world.make(received());
    assert!(!holds(&world));
    let (ca, step, nodes) = (world.rotation().unwrap().ca(), CaStep::Holds, [C[2]].into());
    world.make(Change::Authority(AuthorityCommand::Reached { ca, step, nodes }));
    world.make(received());
    assert!(holds(&world));
}
