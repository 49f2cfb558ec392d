//! The state as dialogs: a list of commands, and what each comes to.

use std::time::Duration;

use shoal_protocol::id::{
    DeploymentName, Generation, Incarnation, PlanRevision, RankIndex, ReplicaId, Role,
};
use shoal_protocol::plan::{
    DeploymentSpec, ModelRef, ModelSource, Numerics, Precision, PretendSpec, ReplicaLimits,
    ReplicaPlan, ShardMemory, ShardPlan, StagePlan, StagesAsked,
};
use shoal_protocol::units::LayerRange;

use super::*;
use crate::control::shape::{ModelShape, small_pretend};

const C1: NodeId = NodeId::coordinator(1);
const KEY: KeyFingerprint = KeyFingerprint([7; 32]);

struct Dialog {
    state: ClusterState,
    sequence: u64,
}

impl Dialog {
    fn new() -> Self {
        Self { state: ClusterState::default(), sequence: 0 }
    }

    /// Sends a command at this second and compares what it comes to.
    #[track_caller]
    fn say(&mut self, at: u64, change: Change, expected: Result<Vec<Effect>, Refusal>) {
        self.sequence += 1;
        let command = Command {
            client: C1,
            incarnation: Incarnation(1),
            sequence: self.sequence,
            at: Timestamp(at),
            change,
        };
        let before = self.state.clone();
        assert_eq!(self.state.apply(&command), expected);
        assert_eq!(check::violations(&self.state), []);
        let bytes = snapshot::encode(&self.state).unwrap();
        assert_eq!(snapshot::decode(&bytes).as_ref(), Ok(&self.state), "the snapshot differs");
        if expected.is_err() {
            let same = ClusterState { last: self.state.last.clone(), ..before };
            assert_eq!(self.state, same, "a refused command changed something");
        }
        let again = self.state.clone();
        assert_eq!(self.state.apply(&command), expected, "the second time");
        assert_eq!(self.state, again, "a repeated command was applied twice");
    }

    fn with_workers(n: u32) -> Self {
        let mut dialog = Self::new();
        for number in 1..=n {
            let node = NodeId::worker(number);
            dialog.say(0, enrol(Role::Worker), Ok(vec![Effect::NodeAdded { node }]));
        }
        dialog
    }
}

fn enrol(role: Role) -> Change {
    Change::Node(NodeCommand::Enrol { role, key: KEY })
}

fn join(secret: u8) -> Change {
    Change::Node(NodeCommand::Join { token: TokenHash::of(&[secret; 32]), key: KEY })
}

fn token(secret: u8, role: Role, uses: u32, expires: Duration) -> Change {
    let hash = TokenHash::of(&[secret; 32]);
    Change::Token(TokenCommand::Create { hash, role, uses, expires })
}

fn name(text: &str) -> DeploymentName {
    DeploymentName::new(text).unwrap()
}

fn shape() -> PretendSpec {
    small_pretend(4, 10)
}

fn spec(text: &str) -> DeploymentSpec {
    let model = ModelRef { source: ModelSource::Pretend(shape()), fingerprint: [1; 32] };
    DeploymentSpec { name: name(text), model, stages: None, precision: None }
}

fn create(text: &str) -> Change {
    let shape = ModelShape::Pretend(shape());
    Change::Deployment(DeploymentCommand::Create { spec: spec(text), shape, replicas: 1 })
}

fn plan(text: &str, replica: u32, generation: u64, stages: &[(u32, u32, u32)]) -> ReplicaPlan {
    let stage = |&(start, end, worker): &(u32, u32, u32)| StagePlan {
        layers: LayerRange::new(start, end),
        shards: vec![ShardPlan {
            rank: RankIndex(0),
            node: NodeId::worker(worker),
            device: "cpu".into(),
            memory: ShardMemory::default(),
        }],
    };
    ReplicaPlan {
        id: ReplicaId(replica),
        deployment: name(text),
        generation: Generation(generation),
        model: spec(text).model,
        precision: Precision::F32,
        numerics: Numerics::N1,
        stages: stages.iter().map(stage).collect(),
        limits: ReplicaLimits {
            kv_blocks: 4,
            context_max: 64,
            step_rows_max: 8,
            sequences_max: 4,
            steps_in_flight_max: 3,
        },
    }
}

fn adopt(text: &str, replica: u32, generation: u64, stages: &[(u32, u32, u32)]) -> Change {
    let plan = Box::new(plan(text, replica, generation, stages));
    Change::Plan(PlanCommand::Adopt { plan })
}

fn adopted(revision: u64, replica: u32, generation: u64) -> Result<Vec<Effect>, Refusal> {
    Ok(vec![Effect::PlanAdopted {
        revision: PlanRevision(revision),
        replica: ReplicaId(replica),
        generation: Generation(generation),
    }])
}

#[test]
fn a_token_lets_in_as_many_as_it_says_until_it_expires() {
    let mut dialog = Dialog::new();
    let hour = Duration::from_secs(3600);
    let created = |role| Ok(vec![Effect::TokenCreated { role }]);
    let added = |node| Ok(vec![Effect::NodeAdded { node }]);
    dialog.say(100, join(1), Err(Refusal::BadToken));
    dialog.say(100, token(1, Role::Worker, 2, hour), created(Role::Worker));
    dialog.say(100, token(2, Role::Admin, 9, hour), created(Role::Admin));
    dialog.say(100, join(3), Err(Refusal::BadToken));
    dialog.say(101, join(1), added(NodeId::worker(1)));
    dialog.say(102, join(2), added(NodeId::admin(1)));
    dialog.say(3700, join(1), added(NodeId::worker(2)));
    // Used up.
    dialog.say(3700, join(1), Err(Refusal::BadToken));
    // The last good second, and the one after it.
    dialog.say(3700, join(2), added(NodeId::admin(2)));
    dialog.say(3701, join(2), Err(Refusal::BadToken));
}

#[test]
fn tokens_are_bounded() {
    let mut dialog = Dialog::new();
    let hour = Duration::from_secs(3600);
    dialog.say(0, token(1, Role::Worker, 0, hour), Err(Refusal::BadUses { uses: 0 }));
    let uses = tokens::USES_MAX + 1;
    dialog.say(0, token(1, Role::Worker, uses, hour), Err(Refusal::BadUses { uses }));
    dialog.say(0, token(1, Role::Worker, 1, Duration::ZERO), Err(Refusal::BadExpiry));
    let too_long = tokens::EXPIRY_MAX + Duration::from_secs(1);
    dialog.say(0, token(1, Role::Worker, 1, too_long), Err(Refusal::BadExpiry));
    let created = Ok(vec![Effect::TokenCreated { role: Role::Worker }]);
    for _ in 0..tokens::TOKENS_MAX {
        dialog.sequence += 1;
        let change = token(1, Role::Worker, 1, hour);
        let command = Command {
            client: C1,
            incarnation: Incarnation(1),
            sequence: dialog.sequence,
            at: Timestamp(0),
            change,
        };
        assert_eq!(dialog.state.apply(&command), created);
    }
    let full = Refusal::TooMany {
        what: command::Noun::Tokens,
        max: tokens::TOKENS_MAX,
        advice: command::Advice::WaitForExpiry,
    };
    dialog.say(3600, token(1, Role::Worker, 1, hour), Err(full));
    dialog.say(3601, token(1, Role::Worker, 1, hour), created);
    assert_eq!(dialog.state.tokens.iter().count(), 1, "expired tokens are still kept");
}

#[test]
fn an_older_process_with_the_same_identity_is_refused() {
    let mut dialog = Dialog::with_workers(1);
    let w1 = NodeId::worker(1);
    let start = |node, n| {
        let incarnation = Incarnation(n);
        Change::Node(NodeCommand::Start { node, incarnation, build: "0.1".into() })
    };
    let started = |n| Ok(vec![Effect::NodeStarted { node: w1, incarnation: Incarnation(n) }]);
    dialog.say(0, start(w1, 3), started(3));
    dialog.say(0, start(w1, 3), Ok(vec![]));
    dialog.say(0, start(w1, 5), started(5));
    let old =
        Refusal::OldIncarnation { node: w1, incarnation: Incarnation(4), last: Incarnation(5) };
    dialog.say(0, start(w1, 4), Err(old));
    let w2 = NodeId::worker(2);
    dialog.say(0, start(w2, 1), Err(Refusal::UnknownNode { node: w2 }));
}

#[test]
fn a_removed_node_is_forgotten_and_its_number_is_not_given_again() {
    let mut dialog = Dialog::with_workers(2);
    let (w1, w2, w3) = (NodeId::worker(1), NodeId::worker(2), NodeId::worker(3));
    let remove = |node| Change::Node(NodeCommand::Remove { node });
    dialog.say(0, create("x"), {
        Ok(vec![Effect::DeploymentCreated { name: name("x"), replica: ReplicaId(1) }])
    });
    dialog.say(0, adopt("x", 1, 1, &[(0, 2, 1), (2, 4, 2)]), adopted(1, 1, 1));
    // The layout that names it stays, for its successor to follow; a new one must not name it.
    dialog.say(0, remove(w2), Ok(vec![Effect::NodeRemoved { node: w2 }]));
    dialog.say(0, remove(w2), Err(Refusal::UnknownNode { node: w2 }));
    let fault = "stage 0 is on w2, no worker of ours".to_owned();
    let refusal = Refusal::BadPlan { replica: ReplicaId(1), fault };
    dialog.say(0, adopt("x", 1, 2, &[(0, 4, 2)]), Err(refusal));
    let start = NodeCommand::Start { node: w2, incarnation: Incarnation(9), build: "0.1".into() };
    dialog.say(0, Change::Node(start), Err(Refusal::UnknownNode { node: w2 }));
    dialog.say(0, enrol(Role::Worker), Ok(vec![Effect::NodeAdded { node: w3 }]));
    dialog.say(0, adopt("x", 1, 2, &[(0, 4, 3)]), adopted(2, 1, 2));
    dialog.say(0, remove(w1), Ok(vec![Effect::NodeRemoved { node: w1 }]));

    for role in [Role::Coordinator, Role::Admin, Role::Admin] {
        let number = dialog.state.nodes.given(role) + 1;
        let node = NodeId { role, number };
        dialog.say(0, enrol(role), Ok(vec![Effect::NodeAdded { node }]));
    }
    for node in [NodeId::coordinator(1), NodeId::admin(1)] {
        dialog.say(0, remove(node), Err(Refusal::NotToBeRemoved { node }));
    }
    let a2 = NodeId::admin(2);
    dialog.say(0, remove(a2), Ok(vec![Effect::NodeRemoved { node: a2 }]));
}

#[test]
fn a_token_that_was_taken_back_is_as_if_it_had_never_been() {
    let mut dialog = Dialog::new();
    let hour = Duration::from_secs(3600);
    let created = Ok(vec![Effect::TokenCreated { role: Role::Worker }]);
    dialog.say(0, token(1, Role::Worker, 2, hour), created.clone());
    dialog.say(0, token(2, Role::Worker, 2, hour), created);
    let hash = TokenHash::of(&[1; 32]);
    let revoke = Change::Token(TokenCommand::Revoke { hash });
    let revoked = Ok(vec![Effect::TokenRevoked { role: Role::Worker }]);
    dialog.say(0, revoke.clone(), revoked);
    dialog.say(0, join(1), Err(Refusal::BadToken));
    dialog.say(0, revoke, Err(Refusal::BadToken));
    dialog.say(0, join(2), Ok(vec![Effect::NodeAdded { node: NodeId::worker(1) }]));
}

#[test]
fn generations_belong_to_one_replica_and_never_go_back() {
    let mut dialog = Dialog::with_workers(3);
    let created = |text, replica| {
        Ok(vec![Effect::DeploymentCreated { name: name(text), replica: ReplicaId(replica) }])
    };
    dialog.say(0, create("x"), created("x", 1));
    dialog.say(0, create("y"), created("y", 2));
    dialog.say(0, create("x"), Err(Refusal::NameTaken { name: name("x") }));
    dialog.say(0, adopt("x", 1, 1, &[(0, 2, 1), (2, 4, 2)]), adopted(1, 1, 1));
    dialog.say(0, adopt("y", 2, 1, &[(0, 4, 3)]), adopted(2, 2, 1));
    dialog.say(0, adopt("x", 1, 2, &[(0, 1, 2), (1, 4, 1)]), adopted(3, 1, 2));
    assert_eq!(dialog.state.plans.generation(ReplicaId(2)), Generation(1));
    for offered in [1, 2] {
        let stale = Refusal::StalePlan {
            replica: ReplicaId(1),
            current: Generation(2),
            offered: Generation(offered),
        };
        dialog.say(0, adopt("x", 1, offered, &[(0, 4, 1)]), Err(stale));
    }
    // After a restore from a backup the numbers go on behind what the workers have seen.
    dialog.say(0, adopt("x", 1, 5, &[(0, 4, 1)]), adopted(4, 1, 5));
    let offered = 6 + GENERATIONS_SKIPPED_MAX;
    let refusal = Refusal::BadPlan {
        replica: ReplicaId(1),
        fault: format!("it jumps from g5 to g{offered}"),
    };
    dialog.say(0, adopt("x", 1, offered, &[(0, 4, 1)]), Err(refusal));
    let remove = |text| Change::Deployment(DeploymentCommand::Remove { name: name(text) });
    let removed = vec![
        Effect::DeploymentRemoved { name: name("x") },
        Effect::PlanRemoved { revision: PlanRevision(5), replica: ReplicaId(1) },
    ];
    dialog.say(0, remove("x"), Ok(removed));
    dialog.say(0, remove("x"), Err(Refusal::UnknownDeployment { name: name("x") }));
    // The same name again is another replica: numbers are never given twice.
    dialog.say(0, create("x"), created("x", 3));
    let unknown = Refusal::UnknownDeployment { name: name("x") };
    dialog.say(0, adopt("x", 1, 3, &[(0, 4, 1)]), Err(unknown));
}

#[test]
fn a_plan_must_be_whole() {
    let mut dialog = Dialog::with_workers(2);
    let created = Effect::DeploymentCreated { name: name("x"), replica: ReplicaId(1) };
    dialog.say(0, create("x"), Ok(vec![created]));
    for (stages, fault) in [
        (&[][..], "its stages end at layer 0 of 4"),
        (&[(0, 2, 1)], "its stages end at layer 2 of 4"),
        (&[(0, 2, 1), (3, 4, 2)], "stage 1 has layers 3..4, not from 2"),
        (&[(0, 2, 1), (2, 2, 2)], "stage 1 has layers 2..2, not from 2"),
        (&[(0, 4, 9)], "stage 0 is on w9, no worker of ours"),
        (&[(0, 2, 1), (2, 4, 1)], "two shards are on w1 cpu"),
    ] {
        let refusal = Refusal::BadPlan { replica: ReplicaId(1), fault: fault.into() };
        dialog.say(0, adopt("x", 1, 1, stages), Err(refusal));
    }
    dialog.say(0, adopt("x", 1, 1, &[(0, 4, 2)]), adopted(1, 1, 1));
}

#[test]
fn an_old_command_of_a_client_is_refused() {
    let mut state = ClusterState::default();
    let command = |sequence| Command {
        client: C1,
        incarnation: Incarnation(1),
        sequence,
        at: Timestamp(0),
        change: enrol(Role::Worker),
    };
    assert!(state.apply(&command(5)).is_ok());
    let refusal = Refusal::Superseded { client: C1, sequence: 4, last: 5 };
    assert_eq!(state.apply(&command(4)), Err(refusal));
    // Another coordinator counts for itself.
    let other = Command { client: NodeId::coordinator(2), ..command(1) };
    assert_eq!(state.apply(&other), Ok(vec![Effect::NodeAdded { node: NodeId::worker(2) }]));
    assert_eq!(state.last_sequence(C1, Incarnation(1)), 5);
}

#[test]
fn a_damaged_snapshot_is_refused() {
    let mut dialog = Dialog::with_workers(2);
    let created = Effect::DeploymentCreated { name: name("x"), replica: ReplicaId(1) };
    dialog.say(0, create("x"), Ok(vec![created]));
    let bytes = snapshot::encode(&dialog.state).unwrap();
    for len in 0..bytes.len() {
        assert!(snapshot::decode(&bytes[..len]).is_err(), "{len} bytes were taken");
    }
    for at in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x10;
        assert!(snapshot::decode(&bytes).is_err(), "a change of byte {at} was taken");
    }
    let mut newer = bytes;
    newer[7] = snapshot::FORMAT + 1;
    let refusal = snapshot::SnapshotError::NewerFormat { found: snapshot::FORMAT + 1 };
    assert_eq!(snapshot::decode(&newer), Err(refusal));
}

fn prepare(text: &str, replica: u32, generation: u64, stages: &[(u32, u32, u32)]) -> Change {
    let plan = Box::new(plan(text, replica, generation, stages));
    Change::Plan(PlanCommand::Prepare { plan, asked: 2 })
}

#[test]
fn a_next_layout_takes_over_or_is_given_up_and_its_number_is_used_up() {
    let mut dialog = Dialog::with_workers(2);
    let (replica, generation) = (ReplicaId(1), Generation);
    let created = Effect::DeploymentCreated { name: name("x"), replica };
    dialog.say(0, create("x"), Ok(vec![created]));
    let fault = "there is no layout that serves meanwhile".into();
    dialog.say(0, prepare("x", 1, 1, &[(0, 4, 1)]), Err(Refusal::BadPlan { replica, fault }));
    dialog.say(0, adopt("x", 1, 1, &[(0, 4, 1)]), adopted(1, 1, 1));
    let prepared = |revision, number| {
        let (revision, generation) = (PlanRevision(revision), Generation(number));
        Ok(vec![Effect::PlanPrepared { revision, replica, generation }])
    };
    let abandon =
        |number| Change::Plan(PlanCommand::Abandon { replica, generation: generation(number) });
    let promote =
        |number| Change::Plan(PlanCommand::Promote { replica, generation: generation(number) });
    let stale = |current, offered| {
        let (current, offered) = (Generation(current), Generation(offered));
        Err(Refusal::StalePlan { replica, current, offered })
    };
    dialog.say(0, promote(2), stale(1, 2));
    dialog.say(0, prepare("x", 1, 2, &[(0, 4, 2)]), prepared(2, 2));
    assert_eq!(dialog.state.plans.get(replica).unwrap().generation, Generation(1));
    dialog.say(0, promote(1), stale(2, 1));
    let abandoned =
        Effect::PlanAbandoned { revision: PlanRevision(3), replica, generation: Generation(2) };
    dialog.say(0, abandon(2), Ok(vec![abandoned]));
    dialog.say(0, abandon(2), stale(2, 2));
    dialog.say(0, prepare("x", 1, 2, &[(0, 4, 2)]), stale(2, 2));
    dialog.say(0, prepare("x", 1, 3, &[(0, 4, 2)]), prepared(4, 3));
    dialog.say(0, promote(3), adopted(5, 1, 3));
    let plans = &dialog.state.plans;
    assert_eq!(plans.get(replica).unwrap().generation, Generation(3));
    assert_eq!((plans.next(replica), plans.asked(replica)), (None, 2));
    // A layout that is adopted ends the next one, too.
    dialog.say(0, prepare("x", 1, 4, &[(0, 4, 1)]), prepared(6, 4));
    dialog.say(0, adopt("x", 1, 5, &[(0, 4, 1)]), adopted(7, 1, 5));
    dialog.say(0, promote(4), stale(5, 4));
}

#[test]
fn replicas_are_given_and_taken_within_bounds() {
    let mut dialog = Dialog::with_workers(2);
    let scale = |replicas| {
        let stages = StagesAsked::Same;
        Change::Deployment(DeploymentCommand::Scale { name: name("x"), replicas, stages })
    };
    let ids = |ids: &[u32]| ids.iter().copied().map(ReplicaId).collect::<Vec<_>>();
    let scaled = |given: &[u32], taken: &[u32]| Effect::DeploymentScaled {
        name: name("x"),
        given: ids(given),
        taken: ids(taken),
    };
    dialog.say(0, scale(Some(2)), Err(Refusal::UnknownDeployment { name: name("x") }));
    let created = Effect::DeploymentCreated { name: name("x"), replica: ReplicaId(1) };
    dialog.say(0, create("x"), Ok(vec![created]));
    for replicas in [0, REPLICAS_MAX + 1] {
        dialog.say(0, scale(Some(replicas)), Err(Refusal::BadReplicas { replicas }));
    }
    dialog.say(0, scale(Some(3)), Ok(vec![scaled(&[2, 3], &[])]));
    dialog.say(0, scale(None), Ok(vec![scaled(&[], &[])]));
    dialog.say(0, adopt("x", 2, 1, &[(0, 4, 1)]), adopted(1, 2, 1));
    dialog.say(0, adopt("x", 3, 1, &[(0, 4, 2)]), adopted(2, 3, 1));
    // The one without a layout goes first, then the last one, with its layout.
    let removed = Effect::PlanRemoved { revision: PlanRevision(3), replica: ReplicaId(3) };
    dialog.say(0, scale(Some(1)), Ok(vec![scaled(&[], &[1, 3]), removed]));
    dialog.say(0, scale(Some(2)), Ok(vec![scaled(&[4], &[])]));
    let deployment = dialog.state.deployments.get(&name("x")).unwrap();
    assert_eq!((deployment.replicas.clone(), deployment.asked), (ids(&[2, 4]), 5));
}

#[test]
fn workers_are_drained_and_nobody_else() {
    let mut dialog = Dialog::with_workers(1);
    let begin = |node| Change::Drain(DrainCommand::Begin { node });
    let end = |node| Change::Drain(DrainCommand::End { node });
    let (w1, w2) = (NodeId::worker(1), NodeId::worker(2));
    let changed = |draining| Ok(vec![Effect::DrainChanged { node: w1, draining }]);
    dialog.say(0, begin(w2), Err(Refusal::UnknownNode { node: w2 }));
    dialog.say(0, begin(w1), changed(true));
    dialog.say(0, begin(w1), Ok(vec![]));
    assert!(dialog.state.drains.contains(w1));
    dialog.say(0, end(w1), changed(false));
    dialog.say(0, end(w1), Ok(vec![]));
    // Whoever is removed is not drained either.
    dialog.say(0, begin(w1), changed(true));
    let remove = Change::Node(NodeCommand::Remove { node: w1 });
    dialog.say(0, remove, Ok(vec![Effect::NodeRemoved { node: w1 }]));
    assert!(!dialog.state.drains.contains(w1));
}

/// Every command that version 1 had, with the numbers of its two enums.
fn version_1() -> Vec<(Change, [u8; 2])> {
    let (w1, c1, incarnation) = (NodeId::worker(1), C1, Incarnation(3));
    let (hash, build, replica) = (TokenHash([9; 32]), "0.1.0".to_owned(), ReplicaId(1));
    let generation = Generation(2);
    let announce = CoordinatorCommand::Announce {
        node: c1,
        incarnation,
        boot: 77,
        cluster: "10.0.0.1:4000".parse().unwrap(),
        build: build.clone(),
    };
    let scale =
        DeploymentCommand::Scale { name: name("a"), replicas: Some(2), stages: StagesAsked::Same };
    let alice = shoal_protocol::access::KeyName::new("alice").unwrap();
    let key = KeyCommand::Create {
        name: alice.clone(),
        hash: KeyHash::of("secret"),
        limits: shoal_protocol::access::KeyLimits::default(),
        expires: Some(Duration::from_secs(60)),
    };
    let voters = [c1].into();
    vec![
        (enrol(Role::Worker), [0, 0]),
        (join(1), [0, 1]),
        (Change::Node(NodeCommand::Start { node: w1, incarnation, build }), [0, 2]),
        (Change::Node(NodeCommand::Remove { node: w1 }), [0, 3]),
        (token(1, Role::Worker, 2, Duration::from_secs(60)), [1, 0]),
        (Change::Token(TokenCommand::Revoke { hash }), [1, 1]),
        (create("a"), [2, 0]),
        (Change::Deployment(DeploymentCommand::Remove { name: name("a") }), [2, 1]),
        (Change::Deployment(scale), [2, 2]),
        (adopt("a", 1, 1, &[(0, 4, 1)]), [3, 0]),
        (prepare("a", 1, 2, &[(0, 2, 1), (2, 4, 2)]), [3, 1]),
        (Change::Plan(PlanCommand::Promote { replica, generation }), [3, 2]),
        (Change::Plan(PlanCommand::Abandon { replica, generation }), [3, 3]),
        (Change::Plan(PlanCommand::Confirm { replica, generation, asked: 2 }), [3, 4]),
        (Change::Coordinator(announce), [4, 0]),
        (Change::Coordinator(CoordinatorCommand::SetVoters { voters }), [4, 1]),
        (Change::Coordinator(CoordinatorCommand::KeyReceived { node: c1 }), [4, 2]),
        (Change::Coordinator(CoordinatorCommand::Remove { node: c1 }), [4, 3]),
        (Change::Key(key), [5, 0]),
        (Change::Key(KeyCommand::Revoke { name: alice }), [5, 1]),
        (Change::Drain(DrainCommand::Begin { node: w1 }), [6, 0]),
        (Change::Drain(DrainCommand::End { node: w1 }), [6, 1]),
    ]
}

/// An older build reads what this one writes as long as it lasts: commands keep their bytes, and what
/// they come to keeps its numbers.
#[test]
fn what_version_1_wrote_is_written_the_same_for_ever() {
    let mut all = blake3::Hasher::new();
    for (change, numbers) in version_1() {
        let bytes = postcard::to_stdvec(&change).unwrap();
        assert_eq!(bytes[..2], numbers, "{change:?}");
        assert_eq!(versions::needs(&change), versions::Needs::NOTHING, "{change:?}");
        all.update(&bytes);
    }
    // Of the tree at f403ba0, which is what `scripts/older.sh` builds.
    assert_eq!(
        all.finalize().to_hex().as_str(),
        "7c207a3dc091755d3066f15fc3646c5d55c15f0d3996865258d0ad4ca346fbbe"
    );
    // The last ones of version 1: a variant before them would shift them.
    let node = NodeId::worker(1);
    let effect = postcard::to_stdvec(&Effect::DrainChanged { node, draining: true }).unwrap();
    assert_eq!(effect[0], 16);
    assert_eq!(postcard::to_stdvec(&Refusal::NotAWorker { node }).unwrap()[0], 21);
}
